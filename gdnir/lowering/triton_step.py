"""Launch the Triton kernels of decode and verify, and the small ops next to them. As in `triton_launch`: no checks, no
sync, no tuning at run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.lowering import tables
from gdnir.lowering.relaunch import launch
from gdnir.lowering.tables import kinds, pick
from gdnir.lowering.triton_launch import _cdiv, _conv_state, _kernels, _metadata, _next_power_of_2, _strided

if TYPE_CHECKING:
    from gdnir.seq import Seq

# TILE: elements of the state in a tile of BV rows. AHEAD: tiles of a program in flight (decode). One choice for each
# type of state whatever the batch: the order of sums follows from it, and with it a row's bits. No eviction hints: the
# code that makes them costs more than they give.
_TILES, _WARPS = (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)
_STEP = {"TILE": _TILES, "AHEAD": (1, 2, 3, 4), "num_warps": _WARPS}
_VERIFY = {"TILE": _TILES, "num_warps": _WARPS}
_TABLES = tables.load(
    "triton_step",
    {
        # by bits of an element of the state
        "step_32": _STEP,
        "step_16": _STEP,
        "verify_32": _VERIFY,
        "verify_16": _VERIFY,
        "rule": _VERIFY,
        "norm": {"ELEMENTS": _TILES},
        "gate": {"BLOCK": (128, 256, 512, 1024, 2048), "num_warps": _WARPS},
    },
)
STEP, VERIFY = ({size: _TABLES[f"{name}_{8 * size}"] for size in (4, 2)} for name in ("step", "verify"))
RULE = _TABLES["rule"]
VERIFY_ELEMENTS = 128
"""Of the state in one thread: about half of its registers."""
KV_AHEAD = 2
"""At most for a state [K, V], which takes more registers: two programs an SM are worth more than a third tile."""


def tiles(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Tiles of the state that one program of `gdn_step` goes through; of verify, its code is written out for each of a head."""
    rows = [c["TILE"] // _next_power_of_2(key_dim) for t in (STEP, VERIFY) for s in t.values() for c in s.values()]
    return value_heads // key_heads * _cdiv(value_dim, min(*rows, _next_power_of_2(value_dim)))


def gdn_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    A_log: Tensor,  # noqa: N803
    dt_bias: Tensor,
    norm_weight: Tensor,
    seq: Seq,
    *,
    activation: str,
    conv_layout: str,
    heads: tuple[int, int, int, int],
    l2norm_eps: float,
    allow_neg_eigval: bool,
    scale: float,
    state_layout: str,
    eps: float,
    gate: str,
) -> Tensor:
    """All between the projections for one (decode) or a few (verify) tokens a row; both states updated in place.

    qkv [T, C], z [T, HV, V], a, b [T, HV]: any strides (a last stride other than 1 costs a copy). conv_state
    [S, C, P] ("cw") or [S, P, C] ("wc"), state [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"): any strides. f32 inside,
    rounded once. Padding rows and tokens of nobody are exactly 0; a slot >= S sets seq.error. Returns y [T, HV, V],
    contiguous.
    """
    y = z.new_empty(z.shape[0], *heads[1::2])
    if seq.num_seqs == 0 or y.shape[1:].numel() == 0:
        return y.zero_()  # no row owns a token
    args = step_arguments(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, y, seq, conv_layout, l2norm_eps,
        scale, eps,
    )  # fmt: skip
    constants = _step_constants(
        kinds(state.device), state.element_size(), heads, weight.shape[1], state_layout, state.stride()[2:],
        seq.phase == "verify", activation, allow_neg_eigval, gate, bias is None,
    )  # fmt: skip
    launch(_kernels("gdn_step").gdn_step_kernel, seq.num_seqs * heads[0], args, constants)
    return y


def step_arguments(
    qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor,
    state: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, y: Tensor, seq: Seq, conv_layout: str,  # noqa: N803
    l2norm_eps: float, scale: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernels of `gdn_step` are launched with."""
    tokens = y.shape[0]
    (x, (x_row, _)), (z, (z_row, z_head, _)) = _strided(qkv, tokens), _strided(z, tokens)
    (a, (a_row, _)), (b, (b_row, _)) = _strided(a, tokens), _strided(b, tokens)
    conv_pool, columns, *conv_strides = _conv_state(conv_state, conv_layout)
    slots = seq.write_slots
    return (
        x,
        z,
        a,
        b,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        conv_state,
        state,
        A_log.contiguous(),
        dt_bias.contiguous(),
        norm_weight.contiguous(),
        y,
        *_metadata(seq),
        tokens,
        seq.num_seqs,
        state.shape[0],
        columns,
        slots.shape[1],
        x_row,
        z_row,
        z_head,
        a_row,
        b_row,
        *conv_strides,
        *state.stride()[:2],
        *slots.stride(),
        l2norm_eps,
        scale,
        eps,
    )


@functools.lru_cache(maxsize=256)
def _step_constants(
    kinds: tuple[str, ...],
    element_size: int,
    heads: tuple[int, int, int, int],
    width: int,
    state_layout: str,
    strides: tuple[int, ...],
    verify: bool,
    activation: str,
    allow_neg_eigval: bool,
    gate: str,
    plain: bool,
) -> dict[str, Any]:
    """What `gdn_step` is compiled for. `strides`: the state's last two; `plain`: without a bias."""
    h, hv, k, v = heads
    options = dict(pick((VERIFY if verify else STEP)[element_size], kinds))
    block_v = rows_of_tile(options.pop("TILE"), k, v)
    count = _cdiv(v, block_v)
    tiles = hv // h * count
    columns = _next_power_of_2(count) * (1 if verify else _next_power_of_2(hv // h))
    k_pow2 = max(_next_power_of_2(k), columns)
    if verify:  # a head's whole state stays in registers
        elements = _next_power_of_2(count * block_v * k_pow2)
        options["num_warps"] = max(options["num_warps"], elements // (32 * VERIFY_ELEMENTS))
    return {
        **step_names(heads, width, state_layout, strides, verify, activation, allow_neg_eigval, gate),
        "K_POW2": k_pow2,
        "R_POW2": _next_power_of_2(hv // h),
        "RV_POW2": _next_power_of_2(hv // h * v),
        "PARTS": columns,
        "BV": block_v,
        "AHEAD": 0 if verify else min(options.pop("AHEAD"), tiles, KV_AHEAD if state_layout == "kv" else tiles),
        "SHARED": block_v * k_pow2 < 64 * options["num_warps"],
        **options,
    }


def step_names(
    heads: tuple[int, int, int, int],
    width: int,
    state_layout: str,
    strides: tuple[int, ...],
    verify: bool,
    activation: str,
    allow_neg_eigval: bool,
    gate: str,
) -> dict[str, Any]:
    """What the kernels of `gdn_step` are compiled for, however the state is spread over them."""
    h, hv, k, v = heads
    return {
        **_state_strides(state_layout, strides),
        "W": width,
        "W_POW2": _next_power_of_2(width),
        "H": h,
        "R": hv // h,
        "K": k,
        "V": v,
        "VERIFY": verify,
        "ACTIVATION": activation,
        "ALLOW_NEG_EIGVAL": allow_neg_eigval,
        "GATE": gate,
    }


def _state_strides(layout: str, strides: tuple[int, ...]) -> dict[str, int]:
    v, k = strides if layout == "vk" else strides[::-1]
    return {"STRIDE_V": v, "STRIDE_K": k}


def delta_rule_step(
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
    """The gated delta rule for one (decode) or a few (verify) tokens a row; state updated in place.

    q, k [T, H, K], v [T, HV, V], g, beta [T, HV]: any strides (a last stride other than 1 costs a copy); state
    [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"), any strides. f32 inside, rounded once. Tokens of padding rows and of
    nobody are exactly 0; a slot >= S sets seq.error. Returns o [T, HV, V], contiguous.
    """
    (_, h, key_dim), (tokens, hv, value_dim), count = k.shape, v.shape, seq.num_seqs
    o = v.new_empty(tokens, hv, value_dim)
    if count == 0 or hv * value_dim == 0:
        return o.zero_()  # no row owns a token
    (q, (q_row, q_head, _)), (k, (k_row, k_head, _)) = _strided(q, tokens), _strided(k, tokens)
    (v, (v_row, v_head, _)), (g, (g_row, _)), (beta, (beta_row, _)) = [_strided(x, tokens) for x in (v, g, beta)]
    slot_stride, head_stride, *strides = state.stride()
    slots = seq.write_slots
    slot_row, slot_column = slots.stride()
    constants = _rule_constants(
        kinds(state.device), (h, hv, key_dim, value_dim), state_layout, tuple(strides), seq.phase == "verify"
    )
    launch(
        _kernels("delta_rule_step").delta_rule_step_kernel,
        count * hv * _cdiv(value_dim, constants["BV"]),
        (
            q,
            k,
            v,
            g,
            beta,
            state,
            o,
            *_metadata(seq),
            tokens,
            count,
            state.shape[0],
            slots.shape[1],
            q_row,
            q_head,
            k_row,
            k_head,
            v_row,
            v_head,
            g_row,
            beta_row,
            slot_stride,
            head_stride,
            slot_row,
            slot_column,
            scale,
        ),
        constants,
    )
    return o


@functools.lru_cache(maxsize=256)
def _rule_constants(
    kinds: tuple[str, ...], heads: tuple[int, int, int, int], state_layout: str, strides: tuple[int, int], verify: bool
) -> dict[str, Any]:
    h, hv, key_dim, value_dim = heads
    blocks = pick(RULE, kinds)
    return {
        **_state_strides(state_layout, strides),
        "R": hv // h,
        "HV": hv,
        "V": value_dim,
        "K": key_dim,
        "K_POW2": _next_power_of_2(key_dim),
        "BV": rows_of_tile(blocks["TILE"], key_dim, value_dim),
        "VERIFY": verify,
        "num_warps": blocks["num_warps"],
    }


def l2norm(x: Tensor, *, eps: float) -> Tensor:
    """x * rsqrt(sum(x^2, -1) + eps); f32 inside, rounded once to x's dtype.

    x: [..., K], any strides for [T, H, K] (a last stride other than 1, or more dimensions, may cost a copy). Returns a
    contiguous tensor of x's shape.
    """
    y = x.new_empty(*x.shape)
    if y.numel() == 0:
        return y
    width = x.shape[-1]
    x = x if x.dim() == 3 else x.reshape(-1, 1, width)
    tokens, heads, _ = x.shape
    x, (row, head, _) = _strided(x, tokens)
    rows, constants = tokens * heads, _norm_constants(kinds(x.device), heads, width)
    args = x, y, rows, row, head, eps
    launch(_kernels("l2norm").l2norm_kernel, _cdiv(rows, constants["ROWS"]), args, constants)
    return y


@functools.lru_cache(maxsize=256)
def _norm_constants(kinds: tuple[str, ...], heads: int, width: int) -> dict[str, Any]:
    padded = _next_power_of_2(width)
    rows = max(1, pick(_TABLES["norm"], kinds)["ELEMENTS"] // padded)
    return {"H": heads, "K": width, "K_POW2": padded, "ROWS": rows, "num_warps": 4}


def gdn_gate(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool) -> tuple[Tensor, Tensor]:  # noqa: N803
    """(g, beta) [T, HV] f32 of a, b [T, HV], any strides (a last stride other than 1 costs a copy)."""
    tokens, heads = a.shape
    g = a.new_empty(tokens, heads, dtype=torch.float32)
    beta, size = g.new_empty(tokens, heads), tokens * heads
    if size == 0:
        return g, beta
    (a, (a_row, _)), (b, (b_row, _)) = _strided(a, tokens), _strided(b, tokens)
    constants = _gate_constants(kinds(a.device), heads, allow_neg_eigval)
    args = a, b, A_log.contiguous(), dt_bias.contiguous(), g, beta, size, a_row, b_row
    launch(_kernels("gdn_gate").gdn_gate_kernel, _cdiv(size, constants["BLOCK"]), args, constants)
    return g, beta


@functools.lru_cache(maxsize=256)
def _gate_constants(kinds: tuple[str, ...], heads: int, allow_neg_eigval: bool) -> dict[str, Any]:
    return {"HV": heads, "ALLOW_NEG_EIGVAL": allow_neg_eigval, **pick(_TABLES["gate"], kinds)}


def rows_of_tile(elements: int, key_dim: int, value_dim: int) -> int:
    """Of a state [V, K] in a tile of about `elements`, powers of two."""
    return max(1, min(elements // _next_power_of_2(key_dim), _next_power_of_2(value_dim)))
