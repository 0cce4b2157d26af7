"""Qwen3.5, dense and mixture of experts: four input projections, rows already flat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdnir import ops
from gdnir.models.family import Family, GdnConfig, WeightSpec, read_qwen


def _specs(config: GdnConfig) -> tuple[WeightSpec, ...]:
    _, hv, _, v = config.heads
    return (
        WeightSpec("in_proj_qkv", (config.channels, config.hidden_size)),
        WeightSpec("in_proj_z", (hv * v, config.hidden_size)),
        WeightSpec("in_proj_b", (hv, config.hidden_size)),
        WeightSpec("in_proj_a", (hv, config.hidden_size)),
        WeightSpec("conv1d", (config.channels, config.conv_width)),
        WeightSpec("A_log", (hv,), f32=True, key="A_log"),
        WeightSpec("dt_bias", (hv,), f32=True, key="dt_bias"),
        WeightSpec("norm", (v,)),
        WeightSpec("out_proj", (config.hidden_size, hv * v)),
    )


def _flat(config: GdnConfig, w: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
    qkvz = ops.concat_rows(w["in_proj_qkv"], w["in_proj_z"])
    ba = ops.concat_rows(w["in_proj_b"], w["in_proj_a"])
    return qkvz, ba, w["conv1d"], w["norm"], w["out_proj"]


def _sizes(hidden: int, layers: int, value_heads: int) -> dict[str, Any]:
    return dict(hidden_size=hidden, num_hidden_layers=layers, linear_num_key_heads=16, linear_num_value_heads=value_heads,
                linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, hidden_act="silu")  # fmt: skip


_27B = (_sizes(5120, 64, 48), "the published config.json of Qwen3.5-27B")
_35B = (_sizes(2048, 40, 32), "the published config.json of Qwen3.5-35B-A3B")

QWEN3_5 = Family(
    "qwen3_5", ("qwen3_5", "qwen3_5_text"), read_qwen("qwen3_5"), _specs, _flat,
    {
        "qwen3.5-9b": (_sizes(4096, 32, 32), "the defaults of transformers' Qwen3_5TextConfig (5.23)"),
        "qwen3.5-27b": _27B,
        "qwen3.6-27b": (_27B[0], "the published config.json of Qwen3.6-27B"),
        "qwen3.8-27b": (_27B[0], "the published config.json of Qwen3.8-27B"),
    },
)  # fmt: skip

QWEN3_5_MOE = Family(
    "qwen3_5_moe", ("qwen3_5_moe", "qwen3_5_moe_text"), read_qwen("qwen3_5_moe"), _specs, _flat,
    {"qwen3.5-35b-a3b": _35B, "qwen3.6-35b-a3b": (_35B[0], "the published config.json of Qwen3.6-35B-A3B")},
)  # fmt: skip
