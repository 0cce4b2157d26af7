"""A new op, and a fused op whose body mixes it with gdnir's own."""

from typing import Any

import gdnir
from gdnir import ops


@gdnir.op("x:T.HV.V -> x:T.HV.V like x", name="example.clip")
def clip(x: Any, *, limit: float) -> None:
    """x limited to [-limit, limit]."""


@gdnir.fused("o:T.HV.V, z:T.HV.V, weight:V -> y", name="example.clipped_norm")
def clipped_norm(o: Any, z: Any, weight: Any, *, limit: float, eps: float = 1e-6, activation: ops.Gate = "silu") -> Any:
    """gated_rmsnorm, then clip: one pass instead of two."""
    return clip(ops.gated_rmsnorm(o, z, weight, eps=eps, activation=activation), limit=limit)
