"""Launch the Triton kernels on tensors: shapes to grids and blocks. No checks, no sync, no tuning at run time.

Triton is imported by the first launch, not by this module. Blocks are fixed, `tables/triton_launch.json` has them: the same
launch gives the same bits, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.lowering import tables
from gdnir.lowering.relaunch import launch
from gdnir.lowering.tables import kinds, pick

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
    tokens, heads, width = o.shape
    y = o.new_empty(tokens, heads, width)
    rows = tokens * heads
    if rows * width == 0:
        return y
    (o, (o_row, o_head, _)), (z, (z_row, z_head, _)) = _strided(o, tokens), _strided(z, tokens)
    constants = _norm_constants(kinds(o.device), heads, width, activation)
    launch(
        _kernels("gated_rmsnorm").gated_rmsnorm_kernel,
        _cdiv(rows, constants["ROWS"]),
        (o, z, weight.contiguous(), y, rows, o_row, o_head, z_row, z_head, eps),
        constants,
    )
    return y


@functools.lru_cache(maxsize=256)
def _norm_constants(kinds: tuple[str, ...], heads: int, width: int, activation: str) -> dict[str, Any]:
    blocks, padded = pick(_TABLES["norm"], kinds), _next_power_of_2(width)
    return {
        "HV": heads,
        "V": width,
        "V_POW2": padded,
        "ROWS": max(1, blocks["ELEMENTS"] // padded),
        "ACTIVATION": activation,
        "num_warps": blocks["num_warps"],
    }


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
    tokens, channels = qkv.shape
    y = qkv.new_empty(tokens, channels)
    count = seq.num_seqs
    if count == 0 or channels == 0:
        return y.zero_()  # no row owns a token
    (x, (row, _)), width, kernels = _strided(qkv, tokens), weight.shape[1], _kernels("causal_conv1d")
    pool, columns, *strides = _conv_state(conv_state, conv_layout)
    slots = seq.write_slots
    tensors = (
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        conv_state,
        y,
        *_metadata(seq),
    )
    sizes = tokens, channels, count, pool, columns
    slot_row, slot_column = slots.stride()
    if seq.phase != "prefill":
        section, verify = f"update_{conv_layout}", seq.phase == "verify"
        constants = _update_constants(section, kinds(x.device), width, activation, verify, bias is None)
        launch(
            kernels.conv_update_kernel,
            count * _cdiv(channels, constants["BC"]),
            (*tensors, *sizes, slots.shape[1], row, *strides, slot_row, slot_column),
            constants,
        )
        return y
    tile, constants = _prefill_constants(kinds(x.device), x.element_size(), width, activation, bias is None)
    programs = (count + _cdiv(tokens, tile)) * _cdiv(channels, constants["BC"])
    launch(kernels.conv_prefill_kernel, programs, (*tensors, *sizes, row, *strides, slot_row, tile), constants)
    return y


# `plain`: without a bias. Launches with the same constants have tensors in the same places.
@functools.lru_cache(maxsize=256)
def _update_constants(
    section: str, kinds: tuple[str, ...], width: int, activation: str, verify: bool, plain: bool
) -> dict[str, Any]:
    filter_ = {"W": width, "W_POW2": _next_power_of_2(width), "ACTIVATION": activation}
    return {**filter_, "VERIFY": verify, **pick(_TABLES[section], kinds)}


@functools.lru_cache(maxsize=256)
def _prefill_constants(
    kinds: tuple[str, ...], element_size: int, width: int, activation: str, plain: bool
) -> tuple[int, dict[str, Any]]:
    """(tokens of a program, what the kernel is compiled for)"""
    blocks = _prefill_blocks(pick(_TABLES["conv"], kinds), element_size)
    return blocks.pop("BT"), {"W": width, "W_POW2": _next_power_of_2(width), "ACTIVATION": activation, **blocks}


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
    (h, hv, k, v), tokens, count = heads, qkv.shape[0], seq.num_seqs
    qk, value = qkv.new_empty(2, tokens, h, k), qkv.new_empty(tokens, hv, v)
    g = qkv.new_empty(tokens, hv, dtype=torch.float32)
    beta = g.new_empty(tokens, hv)
    if count == 0:  # no row owns a token, but the gates know of no rows
        from gdnir.lowering.triton_step import gdn_gate

        return *qk.zero_(), value.zero_(), *gdn_gate(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    (x, (x_row, _)), (a, (a_row, _)), (b, (b_row, _)) = _strided(qkv, tokens), _strided(a, tokens), _strided(b, tokens)
    pool, columns, *strides = _conv_state(conv_state, conv_layout)
    tile, each, constants = _prep_constants(
        kinds(qkv.device), qkv.element_size(), heads, weight.shape[1], activation, allow_neg_eigval, bias is None
    )
    launch(
        _kernels("conv_prep").conv_prep_kernel,
        (count + _cdiv(tokens, tile)) * each + _cdiv(tokens * hv, constants["BG"]),
        (
            x,
            a,
            b,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            conv_state,
            A_log.contiguous(),
            dt_bias.contiguous(),
            qk,
            value,
            g,
            beta,
            *_metadata(seq),
            tokens,
            count,
            pool,
            columns,
            x_row,
            a_row,
            b_row,
            *strides,
            seq.write_slots.stride()[0],
            eps,
            tile,
        ),
        constants,
    )
    return *qk.unbind(), value, g, beta


@functools.lru_cache(maxsize=256)
def _prep_constants(
    kinds: tuple[str, ...],
    element_size: int,
    heads: tuple[int, int, int, int],
    width: int,
    activation: str,
    allow_neg_eigval: bool,
    plain: bool,
) -> tuple[int, int, dict[str, Any]]:
    """(tokens of a program, programs that share them, what the kernel is compiled for)"""
    h, hv, k, v = heads
    k_pow2, v_pow2 = _next_power_of_2(k), _next_power_of_2(v)
    table = pick(_TABLES["prep"], kinds)
    warps = max(k_pow2, v_pow2) * element_size // (32 * table["BYTES"])
    blocks = _prefill_blocks({**table, "num_warps": min(max(warps, 1), 4)}, element_size)
    each = 2 * _cdiv(h, max(1, blocks["BC"] // k_pow2)) + _cdiv(hv, max(1, blocks["BC"] // v_pow2))
    constants = {
        "H": h,
        "HV": hv,
        "K": k,
        "V": v,
        "K_POW2": k_pow2,
        "V_POW2": v_pow2,
        "W": width,
        "W_POW2": _next_power_of_2(width),
        "ACTIVATION": activation,
        "ALLOW_NEG_EIGVAL": allow_neg_eigval,
        **pick(_TABLES["gates"], kinds),
    }
    return blocks.pop("BT"), each, {**constants, **blocks}


def _metadata(seq: Seq) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What kernels read of a batch, in their order."""
    return (
        seq.cu_seqlens.contiguous(),
        seq.read_slots.contiguous(),  # perhaps a column of the last step's write_slots
        seq.write_slots,
        seq.has_state.contiguous(),
        seq.error,
    )


def _conv_state(state: Tensor, layout: str) -> tuple[int, int, int, int, int]:
    """(slots, columns, strides of slots, channels and columns) of a convolution's states."""
    (pool, first, second), (slot, outer, inner) = state.shape, state.stride()
    return (pool, second, slot, outer, inner) if layout == "cw" else (pool, first, slot, inner, outer)


def _prefill_blocks(table: dict[str, Any], element_size: int) -> dict[str, Any]:
    """The table with BC, the channels of a program, in place of BYTES."""
    channels = table["num_warps"] * 32 * table["BYTES"] // element_size
    return {**{key: value for key, value in table.items() if key != "BYTES"}, "BC": channels}


def _strided(x: Tensor, tokens: int) -> tuple[Tensor, tuple[int, ...]]:
    """x with a last stride of 1, perhaps a copy, and its strides."""
    strides = _strides(x, tokens)
    if strides[-1] != 1:
        x = x.contiguous()
        strides = _strides(x, tokens)
    return x, strides


def _strides(x: Tensor, tokens: int) -> tuple[int, ...]:
    """Strides of x [tokens, ...]. With one token torch allows any first one, and an odd one would compile another kernel."""
    strides: tuple[int, ...] = x.stride()
    return strides if tokens > 1 else (x.shape[1:].numel(), *strides[1:])


@functools.cache
def _kernels(name: str) -> Any:
    """A module of kernels: an import statement takes longer than asking for one that is here."""
    return importlib.import_module(f"gdnir.kernels.{name}")


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
