"""Launch the Triton kernels on tensors: shapes to grids and blocks. No checks, no sync, no tuning at run time.

Triton is imported by the first launch, not by this module. Blocks are fixed: the same launch gives the same bits,
and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gdnir.seq import Seq

# The prefill kernel holds every row of a tile in registers, 16 bytes of each per thread (so BC follows from the type).
_PREFILL = {"BT": 16, "SUB": 2, "num_warps": 2}
_PREFILL_STATE = {"BC": 256, "num_warps": 4}
# In a `cw` state neighbouring channels are P elements apart: one or two channels a thread keep a warp inside few lines.
_UPDATE = {"cw": {"BC": 256, "num_warps": 4}, "wc": {"BC": 512, "num_warps": 2}}
# Elements of o per program of gated_rmsnorm: 16 rows at V = 128, two 16-byte reads of o and of z per thread.
_NORM_ELEMENTS = 2048


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
    rows_per_program = max(1, _NORM_ELEMENTS // padded)
    rows = tokens * heads
    with _on(o.device):
        kernels.gated_rmsnorm_kernel[(_cdiv(rows, rows_per_program),)](
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
            num_warps=4,
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

    x, weight = _unit_last(qkv), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    c_dim, p_dim = (1, 2) if conv_layout == "cw" else (2, 1)
    width = weight.shape[1]
    # Arguments shared by all kernels, by name: the three signatures differ.
    state: dict[str, Any] = {
        "x": x,
        "conv_state": conv_state,
        "cu_seqlens": _unit_last(seq.cu_seqlens),
        "read_slots": _unit_last(seq.read_slots),  # perhaps a column of the last step's write_slots
        "has_state": _unit_last(seq.has_state),
        "T": tokens,
        "C": channels,
        "N": seq.num_seqs,
        "S": conv_state.shape[0],
        "P": conv_state.shape[p_dim],
        "stride_xt": _row_stride(x),
        "stride_s": conv_state.stride(0),
        "stride_c": conv_state.stride(c_dim),
        "stride_p": conv_state.stride(p_dim),
        "W": width,
    }
    output: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "y": y,
        "W_POW2": _next_power_of_2(width),
        "ACTIVATION": activation,
    }
    writes: dict[str, Any] = {
        "write_slots": seq.write_slots,
        "error": seq.error,
        "stride_wn": seq.write_slots.stride(0),
    }
    with _on(qkv.device):
        if seq.phase != "prefill":
            blocks = _UPDATE[conv_layout]
            kernels.conv_update_kernel[(seq.num_seqs * _cdiv(channels, blocks["BC"]),)](
                **state,
                **output,
                **writes,
                L=seq.write_slots.shape[1],
                stride_wl=seq.write_slots.stride(1),
                VERIFY=seq.phase == "verify",
                **blocks,
            )
            return y
        if tokens:
            block_c = _PREFILL["num_warps"] * 32 * 16 // qkv.element_size()
            grid = (_cdiv(tokens, _PREFILL["BT"]) * _cdiv(channels, block_c),)
            kernels.conv_prefill_kernel[grid](**state, **output, BC=block_c, **_PREFILL)
        # After the outputs, which read the old states, on the same stream.
        grid = (seq.num_seqs * _cdiv(channels, _PREFILL_STATE["BC"]),)
        kernels.conv_prefill_state_kernel[grid](**state, **writes, **_PREFILL_STATE)
    return y


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
