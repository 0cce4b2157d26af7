"""The provider `triton`: which ops it takes, and where. Kernels are in `gdnir/kernels`, launches in `triton_launch`.

Importing this file imports no Triton: without it the lowerings are registered all the same, and say what is missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdnir import ops
from gdnir.ir import Dim, StateType, TensorType
from gdnir.lowering import lowers, triton_launch
from gdnir.platforms import Platform
from gdnir.seq import Seq

MAX_WIDTH = 4
MAX_HEAD = 1024
OLDEST = 80


def on_gpu(platform: Platform) -> str | None:
    """None where our Triton kernels run: NVIDIA sm_80 and newer, AMD CDNA."""
    if platform.kind not in ("cuda", "rocm"):
        return f"Triton kernels run on CUDA and ROCm; this platform is {platform}."
    if "triton" not in platform.software:
        return "Triton is not installed on this machine; `pip install gdnir[cuda]` brings it."
    if platform.kind == "cuda" and platform.arch and int(platform.arch.removeprefix("sm_")) < OLDEST:
        return f"Triton kernels need sm_{OLDEST} or newer; this is {platform.arch}."
    return None


def _activation(name: str, type_: TensorType) -> str | None:
    return None if type_.dtype in ("bf16", "f16", "f32") else f"{name} is {type_.dtype}, want bf16, f16 or f32."


def _fits_norm(o: Any, z: Any, weight: Any, *, eps: float, activation: str) -> str | None:
    head: Dim = o.shape[-1]
    if isinstance(head, int) and head > MAX_HEAD:
        return f"V is {head}, want at most {MAX_HEAD}."
    return _activation("o", o)


def _fits_conv(
    qkv: Any, weight: Any, bias: Any, conv_state: StateType, seq: Any, *, activation: str, conv_layout: str
) -> str | None:
    width: Dim = weight.shape[1]
    if not isinstance(width, int) or not 2 <= width <= MAX_WIDTH:
        return f"the convolution is {width} wide, want 2 to {MAX_WIDTH}."
    if seq.phase == "mixed":
        return "the batch is mixed; split-mixed cuts it into parts that this kernel takes."
    return _activation("qkv", qkv)


@lowers(ops.gated_rmsnorm, "triton", available=on_gpu, accepts=_fits_norm)
def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    return triton_launch.gated_rmsnorm(o, z, weight, eps=eps, activation=activation)


@lowers(ops.causal_conv1d, "triton", available=on_gpu, accepts=_fits_conv)
def causal_conv1d(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, seq: Seq, *, activation: str, conv_layout: str
) -> Tensor:
    return triton_launch.causal_conv1d(
        qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout
    )
