"""The provider `gluon`: ops in Triton's Gluon, each for one GPU architecture. Kernels are in `gdnir/kernels/*_gluon.py`.

Importing this file imports no Triton: without it the lowerings are registered all the same, and say what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from gdnir import ops
from gdnir.ir import StateType
from gdnir.lowering import gluon_step, lowers, triton_impl
from gdnir.lowering.gluon_rule import HEAD, delta_rule_prefill, segment_of_heads
from gdnir.lowering.opaque import opaque
from gdnir.platforms import Platform
from gdnir.seq import Seq


def on_hopper(platform: Platform) -> str | None:
    """None on NVIDIA sm_90 (wgmma and TMA as Hopper has them), with a Triton that has Gluon."""
    if platform.kind != "cuda" or platform.arch != "sm_90":
        return f"the Gluon kernels are written for Hopper's wgmma, TMA and clusters, cuda:sm_90; this platform is {platform}."
    if "triton" not in platform.software:
        return "Triton is not installed on this machine; `pip install gdnir[cuda]` brings it."
    if platform.detected and not _gluon_is_installed():
        return "the installed Triton has no Gluon for Hopper; Triton 3.6 has it."
    return None


@functools.cache
def _gluon_is_installed() -> bool:
    """Looks for the files: importing Triton takes long, and a platform may be asked for without running on it."""
    found = importlib.util.find_spec("triton")
    folders = [] if found is None else found.submodule_search_locations or []
    return any((Path(folder) / "experimental/gluon/nvidia/hopper.py").exists() for folder in folders)


def _fits(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: StateType, seq: Any, *, scale: float, state_layout: str
) -> str | None:
    if seq.phase != "prefill":
        return f"the batch's phase is {seq.phase}, want prefill."
    if v.dtype not in ("bf16", "f16") or q.dtype != v.dtype:
        return f"q is {q.dtype} and v is {v.dtype}, want bf16 or f16, both the same."
    if (q.shape[-1], v.shape[-1]) != (HEAD, HEAD):
        return f"K is {q.shape[-1]} and V is {v.shape[-1]}, want {HEAD} and {HEAD}."
    if state_layout != "vk":
        return f"the state's layout is {state_layout}, want vk."
    if scale <= 0:
        return f"scale is {scale}, want a positive number: the kernel uses its logarithm."
    return None


@opaque
def _by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    *,
    scale: float,
    state_layout: str,
) -> Tensor:
    return delta_rule_prefill(q, k, v, g, beta, state, seq, scale=scale, segment=segment_of_heads(k, v))


@lowers(ops.gated_delta_rule, "gluon", available=on_hopper, accepts=_fits, batch_invariant=_by_heads)
@opaque
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    *,
    scale: float,
    state_layout: str,
) -> Tensor:
    return delta_rule_prefill(q, k, v, g, beta, state, seq, scale=scale)


def _fits_step(
    qkv: Any, z: Any, a: Any, b: Any, weight: Any, bias: Any, conv_state: Any, state: Any, A_log: Any, dt_bias: Any,  # noqa: N803
    norm_weight: Any, seq: Any, *, activation: str, conv_layout: str, heads: ops.Heads, l2norm_eps: float,
    allow_neg_eigval: bool, scale: float, state_layout: str, eps: float, gate: str,
) -> str | None:  # fmt: skip
    refusal = triton_impl.fits_step(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, seq, activation=activation,
        conv_layout=conv_layout, heads=heads, l2norm_eps=l2norm_eps, allow_neg_eigval=allow_neg_eigval, scale=scale,
        state_layout=state_layout, eps=eps, gate=gate,
    )  # fmt: skip
    if refusal is not None:
        return refusal
    if state_layout != "vk":
        return f"the state's layout is {state_layout}, want vk."
    if heads[1] // heads[0] > gluon_step.MOST_CTAS:
        return f"{heads[1] // heads[0]} value heads share a key head, want at most {gluon_step.MOST_CTAS}."
    return None


@lowers(ops.gdn_step, "gluon", available=on_hopper, accepts=_fits_step, batch_invariant=triton_impl.gdn_step)
@opaque
def gdn_step(
    qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor,
    state: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, seq: Seq, *, activation: str,  # noqa: N803
    conv_layout: str, heads: ops.Heads, l2norm_eps: float, allow_neg_eigval: bool, scale: float, state_layout: str,
    eps: float, gate: str,
) -> Tensor:  # fmt: skip
    return gluon_step.gdn_step(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, seq, activation=activation,
        conv_layout=conv_layout, heads=heads, l2norm_eps=l2norm_eps, allow_neg_eigval=allow_neg_eigval, scale=scale,
        state_layout=state_layout, eps=eps, gate=gate,
    )  # fmt: skip
