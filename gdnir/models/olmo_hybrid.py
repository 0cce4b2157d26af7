"""OLMo-hybrid: six input projections, three convolutions, K != V, beta doubled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdnir import ops
from gdnir.errors import ConfigError
from gdnir.models.family import Family, GdnConfig, WeightSpec, integer, make_config

NORM_EPS = 1e-5
"""Fixed in the model's code, whatever rms_norm_eps its config has."""


def _read(config: Mapping[str, Any], source: str) -> GdnConfig:
    num_layers = integer(config, "num_hidden_layers", source)
    given = {name: value for name, value in config.items() if value is not None}  # null means: derive it
    attention_heads = integer(given, "num_attention_heads", source)
    h = integer(given, "linear_num_key_heads", source, attention_heads)
    hv = integer(given, "linear_num_value_heads", source, attention_heads)
    k = integer(given, "linear_key_head_dim", source, int(0.75 * integer(given, "hidden_size", source) / h))
    v = integer(given, "linear_value_head_dim", source, 2 * k)
    neg = given.get("linear_allow_neg_eigval", True)
    if not isinstance(neg, bool):
        raise ConfigError(source, "linear_allow_neg_eigval", expected="true or false", got=repr(neg))
    return make_config("olmo_hybrid", given, source, (h, hv, k, v), num_layers, NORM_EPS, neg)


def _specs(config: GdnConfig) -> tuple[WeightSpec, ...]:
    h, hv, k, v = config.heads
    d, w = config.hidden_size, config.conv_width
    return (
        WeightSpec("q_proj", (h * k, d)),
        WeightSpec("k_proj", (h * k, d)),
        WeightSpec("v_proj", (hv * v, d)),
        WeightSpec("g_proj", (hv * v, d)),
        WeightSpec("b_proj", (hv, d)),
        WeightSpec("a_proj", (hv, d)),
        WeightSpec("q_conv1d", (h * k, w)),
        WeightSpec("k_conv1d", (h * k, w)),
        WeightSpec("v_conv1d", (hv * v, w)),
        WeightSpec("A_log", (hv,), f32=True, key="A_log"),
        WeightSpec("dt_bias", (hv,), f32=True, key="dt_bias"),
        WeightSpec("o_norm", (v,)),
        WeightSpec("o_proj", (d, hv * v)),
    )


def _flat(config: GdnConfig, w: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    qkvz = ops.concat_rows(w["q_proj"], w["k_proj"], w["v_proj"], w["g_proj"])
    ba = ops.concat_rows(w["b_proj"], w["a_proj"])
    return qkvz, ba, ops.concat_rows(w["q_conv1d"], w["k_conv1d"], w["v_conv1d"]), w["o_norm"], w["o_proj"]


OLMO_HYBRID = Family(
    "olmo_hybrid", ("olmo_hybrid",), _read, _specs, _flat,
    {
        "olmo-hybrid-7b": (
            dict(hidden_size=3840, num_hidden_layers=32, num_attention_heads=30, linear_conv_kernel_dim=4, hidden_act="silu"),
            "the defaults of transformers' OlmoHybridConfig (5.23): K = 0.75 D / heads, V = 2 K",
        )
    },
)  # fmt: skip
