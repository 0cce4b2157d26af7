"""The provider `triton`: which ops it takes, and where. Kernels are in `gdnir/kernels`, launches in
`triton_launch`, `triton_rule` and `triton_step`.

Importing this file imports no Triton: without it the lowerings are registered all the same, and say what is missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdnir import ops
from gdnir.ir import Dim, StateType, TensorType
from gdnir.lowering import lowers, triton_launch, triton_rule, triton_step
from gdnir.lowering.opaque import opaque
from gdnir.platforms import Platform
from gdnir.seq import Seq

MAX_WIDTH = 4
MAX_HEAD = 1024
MAX_KEY = 128
MAX_VALUE = 192
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


@lowers(ops.gated_rmsnorm, "triton", available=on_gpu, accepts=_fits_norm, batch_invariant=True)
@opaque
def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    return triton_launch.gated_rmsnorm(o, z, weight, eps=eps, activation=activation)


@lowers(ops.causal_conv1d, "triton", available=on_gpu, accepts=_fits_conv, batch_invariant=True)
@opaque
def causal_conv1d(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, seq: Seq, *, activation: str, conv_layout: str
) -> Tensor:
    return triton_launch.causal_conv1d(
        qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout
    )


STEP_PHASES = ("decode", "verify")
STEP_HEAD = 256
STEP_TILES = 16
"""Most tiles of the state in one program of `gdn_step`, whose code is written out for each: the compiler takes long over more."""


def _step_phase(seq: Any) -> str | None:
    if seq.phase == "mixed":
        return "the batch is mixed; split-mixed cuts it into parts, of which decode and verify fit."
    return None if seq.phase in STEP_PHASES else f"the batch is {seq.phase}; this kernel takes decode and verify."


def _step_heads(k: Dim, v: Dim) -> str | None:
    for name, width in (("K", k), ("V", v)):
        if not isinstance(width, int) or width > STEP_HEAD:
            return f"{name} is {width}, want at most {STEP_HEAD}."
    return None


def fits_step(
    qkv: Any, z: Any, a: Any, b: Any, weight: Any, bias: Any, conv_state: Any, state: Any, A_log: Any, dt_bias: Any,  # noqa: N803
    norm_weight: Any, seq: Any, *, activation: str, conv_layout: str, heads: ops.Heads, l2norm_eps: float,
    allow_neg_eigval: bool, scale: float, state_layout: str, eps: float, gate: str,
) -> str | None:  # fmt: skip
    refusal = _step_phase(seq) or _step_heads(heads[2], heads[3])
    if refusal is not None:
        return refusal
    if triton_step.tiles(*heads) > STEP_TILES:
        return (
            f"{heads[1] // heads[0]} value heads of {heads[3]} x {heads[2]} share a key head: too much for a program."
        )
    return _fits_conv(qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout)


@lowers(ops.gdn_step, "triton", available=on_gpu, accepts=fits_step, batch_invariant=True)
@opaque
def gdn_step(
    qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor,
    state: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, seq: Seq, *, activation: str,  # noqa: N803
    conv_layout: str, heads: ops.Heads, l2norm_eps: float, allow_neg_eigval: bool, scale: float, state_layout: str,
    eps: float, gate: str,
) -> Tensor:  # fmt: skip
    return triton_step.gdn_step(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, seq, activation=activation,
        conv_layout=conv_layout, heads=heads, l2norm_eps=l2norm_eps, allow_neg_eigval=allow_neg_eigval, scale=scale,
        state_layout=state_layout, eps=eps, gate=gate,
    )  # fmt: skip


def _fits_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, seq: Any, *, scale: float, state_layout: str
) -> str | None:
    if seq.phase in STEP_PHASES:
        return _step_heads(k.shape[-1], v.shape[-1]) or _activation("q", q)
    if seq.phase != "prefill":
        return f"the batch is {seq.phase}; split-mixed cuts it into parts that these kernels take."
    if q.dtype not in ("bf16", "f16"):
        return f"q, k and v are {q.dtype}, want bf16 or f16."
    for letter, size, most in (("K", q.shape[-1], MAX_KEY), ("V", v.shape[-1], MAX_VALUE)):
        if not isinstance(size, int) or size % 16 or not 16 <= size <= most:
            return f"{letter} is {size}, want a multiple of 16 up to {most}."
    return None


@opaque
def _rule_by_heads(
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
    if seq.phase != "prefill":
        return triton_step.delta_rule_step(q, k, v, g, beta, state, seq, scale=scale, state_layout=state_layout)
    segment = triton_rule.segment_of_heads(v.shape[1])
    return triton_rule.delta_rule_prefill(
        q, k, v, g, beta, state, seq, scale=scale, state_layout=state_layout, segment=segment
    )


@lowers(ops.gated_delta_rule, "triton", available=on_gpu, accepts=_fits_rule, batch_invariant=_rule_by_heads)
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
    run = triton_rule.delta_rule_prefill if seq.phase == "prefill" else triton_step.delta_rule_step
    return run(q, k, v, g, beta, state, seq, scale=scale, state_layout=state_layout)


def _fits_l2norm(x: Any, *, eps: float) -> str | None:
    width: Dim = x.shape[-1]
    if isinstance(width, int) and width > MAX_HEAD:
        return f"the last dimension is {width}, want at most {MAX_HEAD}."
    return _activation("x", x)


@lowers(ops.l2norm, "triton", available=on_gpu, accepts=_fits_l2norm, batch_invariant=True)
@opaque
def l2norm(x: Tensor, *, eps: float) -> Tensor:
    return triton_step.l2norm(x, eps=eps)


def _fits_gate(a: Any, b: Any, A_log: Any, dt_bias: Any, *, allow_neg_eigval: bool) -> str | None:  # noqa: N803
    return _activation("a", a)


@lowers(ops.gdn_gate, "triton", available=on_gpu, accepts=_fits_gate, batch_invariant=True)
@opaque
def gdn_gate(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool) -> tuple[Tensor, Tensor]:  # noqa: N803
    return triton_step.gdn_gate(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)


def _fits_prep(
    qkv: Any, a: Any, b: Any, weight: Any, bias: Any, conv_state: StateType, A_log: Any, dt_bias: Any, seq: Any, *,  # noqa: N803
    activation: str, conv_layout: str, heads: ops.Heads, eps: float, allow_neg_eigval: bool,
) -> str | None:  # fmt: skip
    if seq.phase != "prefill":
        return f"the batch is {seq.phase}; this kernel takes prefill, gdn_step the others."
    if max(heads[2:]) > MAX_HEAD:
        return f"K is {heads[2]} and V {heads[3]}, want at most {MAX_HEAD}."
    return _fits_conv(qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout)


@lowers(ops.conv_prep, "triton", available=on_gpu, accepts=_fits_prep, batch_invariant=True)
@opaque
def conv_prep(
    qkv: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, A_log: Tensor,  # noqa: N803
    dt_bias: Tensor, seq: Seq, *, activation: str, conv_layout: str, heads: ops.Heads, eps: float, allow_neg_eigval: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return triton_launch.conv_prep(
        qkv, a, b, weight, bias, conv_state, A_log, dt_bias, seq, activation=activation, conv_layout=conv_layout,
        heads=heads, eps=eps, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
