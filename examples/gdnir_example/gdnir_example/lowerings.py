"""Lowerings: the new op's meaning (`native`), and provider `example` for the fused op and for a gdnir op."""

from typing import Any

import torch
import torch.nn.functional as F

import gdnir
from gdnir import ops
from gdnir_example.ops import clip, clipped_norm


@gdnir.lowers(clip, "native")
def clip_native(x: Any, *, limit: float) -> Any:
    return x.clamp(-limit, limit)


def _small(o: Any, z: Any, weight: Any, *, limit: float, eps: float, activation: str) -> str | None:
    head = o.shape[-1]
    return None if head <= 256 else f"V is {head}, want at most 256."


@gdnir.lowers(clipped_norm, "example", accepts=_small)
def clipped_norm_example(o: Any, z: Any, weight: Any, *, limit: float, eps: float, activation: str) -> Any:
    return gated_rmsnorm_example(o, z, weight, eps=eps, activation=activation).clamp(-limit, limit)


def _silu_only(o: Any, z: Any, weight: Any, *, eps: float, activation: str) -> str | None:
    return None if activation == "silu" else f"activation is {activation}, want silu."


@gdnir.lowers(ops.gated_rmsnorm, "example", accepts=_silu_only)
def gated_rmsnorm_example(o: Any, z: Any, weight: Any, *, eps: float, activation: str) -> Any:
    wide = o.float()
    normed = torch.nn.functional.rms_norm(wide, (o.shape[-1],), weight.float(), eps)
    return (normed * F.silu(z.float())).to(o.dtype)
