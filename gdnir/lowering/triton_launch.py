"""Launch the Triton kernels on tensors: shapes to grids and blocks. No checks, no sync, no tuning at run time.

Triton is imported by the first launch, not by this module. Blocks are fixed, `tables/triton_launch.json` has them: the same
launch gives the same bits, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.lowering import tables
from gdnir.lowering.relaunch import relaunched
from gdnir.lowering.tables import pick

if TYPE_CHECKING:
    from gdnir.seq import Seq

_WARPS = 1, 2, 4, 8, 16
_TABLES = tables.load(
    "triton_launch",
    {
        # The prefill kernels hold STEP rows, and the next STEP, in registers, BYTES of each per thread: 8 bytes leave room
        # for 16 warps on an SM of Hopper, 16 bytes for 8. 64 tokens by 128 channels a warp are then 3.9 waves at 8192
        # tokens and 8192 channels; what the last wave leaves empty costs up to 10 %.
        "conv": {"BYTES": (4, 8, 16), "BT": (32, 64, 128, 256), "STEP": (4, 8, 16, 32), "num_warps": _WARPS},
        # as many warps as the widest head takes, up to 4
        "prep": {"BYTES": (4, 8, 16), "BT": (32, 64, 128, 256), "STEP": (4, 8, 16, 32)},
        "gates": {"BG": (256, 512, 1024, 2048)},  # elements of g and of beta per program
        # In a `cw` state neighbouring channels are P elements apart: one or two channels a thread keep a warp in few lines.
        "update_cw": {"BC": (64, 128, 256, 512, 1024), "num_warps": _WARPS},
        "update_wc": {"BC": (64, 128, 256, 512, 1024), "num_warps": _WARPS},
        # Elements of o per program of gated_rmsnorm: 32 rows at V = 128, one 16-byte read of o and of z per thread.
        "norm": {"ELEMENTS": (1024, 2048, 4096, 8192, 16384), "num_warps": _WARPS},
    },
)


def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    """y = o * rsqrt(mean(o^2, -1) + eps) * weight * act(z), norm before gate; f32 inside, rounded once to o's dtype.

    o, z: [T, HV, V], any strides (a last stride other than 1 costs a copy); weight: [V]; activation: "silu" or
    "sigmoid". Returns y [T, HV, V], contiguous.
    """
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    if y.numel() == 0:
        return y
    from gdnir.kernels import gated_rmsnorm as kernels

    o, z, weight = _unit_last(o), _unit_last(z), weight.contiguous()
    tokens, heads, width = o.shape
    padded = _next_power_of_2(width)
    blocks = pick(_TABLES["norm"], o.device)
    rows_per_program = max(1, blocks["ELEMENTS"] // padded)
    rows = tokens * heads
    with _on(o.device):
        relaunched(kernels.gated_rmsnorm_kernel)[(_cdiv(rows, rows_per_program),)](
            o,
            z,
            weight,
            y,
            rows,
            _row_stride(o),
            o.stride(1),
            _row_stride(z),
            z.stride(1),
            eps,
            HV=heads,
            V=width,
            V_POW2=padded,
            ROWS=rows_per_program,
            ACTIVATION=activation,
            num_warps=blocks["num_warps"],
        )
    return y


def causal_conv1d(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    seq: Seq,
    *,
    activation: str,
    conv_layout: str,
) -> Tensor:
    """y[t,c] = act(bias[c] + sum_w weight[c,w] x[t-(W-1)+w,c]) per sequence of seq; conv_state is updated in place.

    qkv: [T, C], any row stride (a last stride other than 1 costs a copy); weight: [C, W]; bias: [C] or None;
    conv_state: [S, C, P] for conv_layout "cw", [S, P, C] for "wc", any strides, P >= W-1; activation: "silu" or
    "none". f32 inside, rounded once to qkv's dtype. Tokens of padding rows and of nobody are exactly 0. A slot >= S
    sets seq.error. Returns y [T, C], contiguous.
    """
    y = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tokens, channels = qkv.shape
    if seq.num_seqs == 0 or channels == 0:
        return y.zero_()  # no row owns a token
    from gdnir.kernels import causal_conv1d as kernels

    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    width = weight.shape[1]
    state = _conv_state(_unit_last(qkv), conv_state, seq, width, conv_layout)
    state["C"] = channels
    output: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "y": y,
        "W_POW2": _next_power_of_2(width),
        "ACTIVATION": activation,
    }
    with _on(qkv.device):
        if seq.phase != "prefill":
            blocks = pick(_TABLES[f"update_{conv_layout}"], qkv.device)
            relaunched(kernels.conv_update_kernel)[(seq.num_seqs * _cdiv(channels, blocks["BC"]),)](
                **state,
                **output,
                **_writes(seq),
                L=seq.write_slots.shape[1],
                stride_wl=seq.write_slots.stride(1),
                VERIFY=seq.phase == "verify",
                **blocks,
            )
            return y
        blocks = _prefill_blocks(pick(_TABLES["conv"], qkv.device), qkv)
        grid = ((seq.num_seqs + _cdiv(tokens, blocks["BT"])) * _cdiv(channels, blocks["BC"]),)
        relaunched(kernels.conv_prefill_kernel)[grid](**state, **output, **_writes(seq), **blocks)
    return y


def conv_prep(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    A_log: Tensor,  # noqa: N803
    dt_bias: Tensor,
    seq: Seq,
    *,
    activation: str,
    conv_layout: str,
    heads: tuple[int, int, int, int],
    eps: float,
    allow_neg_eigval: bool,
) -> tuple[Tensor, ...]:
    """causal_conv1d, split, l2norm of q and k, and the gates, of a prefill batch; conv_state is updated in place.

    qkv [T, C], a, b [T, HV]: any row stride (a last stride other than 1 costs a copy); the rest as causal_conv1d. f32
    inside, rounded once. Returns q, k [T, H, K], v [T, HV, V] in qkv's dtype and g, beta [T, HV] f32, contiguous.
    """
    h, hv, k, v = heads
    tokens = qkv.shape[0]
    qk = torch.empty((2, tokens, h, k), dtype=qkv.dtype, device=qkv.device)
    value = torch.empty((tokens, hv, v), dtype=qkv.dtype, device=qkv.device)
    g = torch.empty((tokens, hv), dtype=torch.float32, device=qkv.device)
    beta = torch.empty((tokens, hv), dtype=torch.float32, device=qkv.device)
    if seq.num_seqs == 0:  # no row owns a token, but the gates know of no rows
        from gdnir.lowering.triton_step import gdn_gate

        return *qk.zero_(), value.zero_(), *gdn_gate(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    from gdnir.kernels import conv_prep as kernels

    weight = weight.contiguous()
    a, b = _unit_last(a), _unit_last(b)
    state = _conv_state(_unit_last(qkv), conv_state, seq, weight.shape[1], conv_layout)
    k_pow2, v_pow2 = _next_power_of_2(k), _next_power_of_2(v)
    table, gates = (pick(_TABLES[name], qkv.device) for name in ("prep", "gates"))
    warps = max(k_pow2, v_pow2) * qkv.element_size() // (32 * table["BYTES"])
    blocks = _prefill_blocks({**table, "num_warps": min(max(warps, 1), 4)}, qkv)
    each = 2 * _cdiv(h, max(1, blocks["BC"] // k_pow2)) + _cdiv(hv, max(1, blocks["BC"] // v_pow2))
    with _on(qkv.device):
        grid = ((seq.num_seqs + _cdiv(tokens, blocks["BT"])) * each + _cdiv(tokens * hv, gates["BG"]),)
        relaunched(kernels.conv_prep_kernel)[grid](
            **state,
            **_writes(seq),
            a=a,
            b=b,
            weight=weight,
            bias=None if bias is None else bias.contiguous(),
            A_log=A_log.contiguous(),
            dt_bias=dt_bias.contiguous(),
            qk=qk,
            v=value,
            g=g,
            beta=beta,
            stride_at=_row_stride(a),
            stride_bt=_row_stride(b),
            eps=eps,
            H=h,
            HV=hv,
            K=k,
            V=v,
            K_POW2=k_pow2,
            V_POW2=v_pow2,
            W_POW2=_next_power_of_2(weight.shape[1]),
            ACTIVATION=activation,
            ALLOW_NEG_EIGVAL=allow_neg_eigval,
            **gates,
            **blocks,
        )
    return qk[0], qk[1], value, g, beta


def _conv_state(x: Tensor, conv_state: Tensor, seq: Seq, width: int, conv_layout: str) -> dict[str, Any]:
    """Arguments shared by all kernels of the convolution, by name: their signatures differ."""
    c_dim, p_dim = (1, 2) if conv_layout == "cw" else (2, 1)
    return {
        "x": x,
        "conv_state": conv_state,
        "cu_seqlens": _unit_last(seq.cu_seqlens),
        "read_slots": _unit_last(seq.read_slots),  # perhaps a column of the last step's write_slots
        "has_state": _unit_last(seq.has_state),
        "T": x.shape[0],
        "N": seq.num_seqs,
        "S": conv_state.shape[0],
        "P": conv_state.shape[p_dim],
        "stride_xt": _row_stride(x),
        "stride_s": conv_state.stride(0),
        "stride_c": conv_state.stride(c_dim),
        "stride_p": conv_state.stride(p_dim),
        "W": width,
    }


def _writes(seq: Seq) -> dict[str, Any]:
    return {"write_slots": seq.write_slots, "error": seq.error, "stride_wn": seq.write_slots.stride(0)}


def _prefill_blocks(table: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The table with BC, the channels of a program, in place of BYTES."""
    channels = table["num_warps"] * 32 * table["BYTES"] // x.element_size()
    return {**{key: value for key, value in table.items() if key != "BYTES"}, "BC": channels}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return nullcontext()
    guard: AbstractContextManager[Any] = module.device(device)
    return guard


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_stride(x: Tensor) -> int:
    """Stride of the tokens. With one token torch allows any value, and an odd one would compile another kernel."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1:].numel()


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
