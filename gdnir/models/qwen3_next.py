"""Qwen3-Next: two input projections, stored interleaved per key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdnir import ops
from gdnir.models.family import Family, GdnConfig, WeightSpec, read_qwen


def _specs(config: GdnConfig) -> tuple[WeightSpec, ...]:
    h, hv, k, v = config.heads
    return (
        WeightSpec("in_proj_qkvz", (2 * h * k + 2 * hv * v, config.hidden_size)),
        WeightSpec("in_proj_ba", (2 * hv, config.hidden_size)),
        WeightSpec("conv1d", (config.channels, config.conv_width)),
        WeightSpec("A_log", (hv,), f32=True, key="A_log"),
        WeightSpec("dt_bias", (hv,), f32=True, key="dt_bias"),
        WeightSpec("norm", (v,)),
        WeightSpec("out_proj", (config.hidden_size, hv * v)),
    )


def _flat(config: GdnConfig, w: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    """Per key head the rows are [q k v z] and [b a], with HV/H value heads each."""
    h, hv, k, v = config.heads
    ratio = hv // h
    qkvz = ops.permute_rows(w["in_proj_qkvz"], groups=h, splits=(k, k, ratio * v, ratio * v))
    ba = ops.permute_rows(w["in_proj_ba"], groups=h, splits=(ratio, ratio))
    return qkvz, ba, w["conv1d"], w["norm"], w["out_proj"]


QWEN3_NEXT = Family(
    "qwen3_next", ("qwen3_next",), read_qwen("qwen3_next"), _specs, _flat,
    {
        "qwen3-next-80b-a3b": (
            dict(hidden_size=2048, num_hidden_layers=48, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
                 linear_value_head_dim=128, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, hidden_act="silu"),
            "the defaults of transformers' Qwen3NextConfig (5.23)",
        )
    },
)  # fmt: skip
