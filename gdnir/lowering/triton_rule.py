"""Launch the Triton kernels of the gated delta rule's prefill. As in `triton_launch`: no checks, no sync, no tuning at
run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gdnir.lowering import tables
from gdnir.lowering.relaunch import launch
from gdnir.lowering.tables import kinds, pick
from gdnir.lowering.triton_launch import _cdiv, _kernels, _metadata, _next_power_of_2, _strided, _strides

if TYPE_CHECKING:
    from gdnir.seq import Seq

CHUNK = 64
# One choice for each kind of GPU whatever the batch: a row's bits follow from it.
_TABLES = tables.load(
    "triton_rule",
    {
        # HEADS: value heads of one program, at most; they share the products of a key head. PRECISION: of the inverse's
        # products.
        "prep": {"HEADS": (1, 2, 4, 8), "PRECISION": ("f16", "bf16x3"), "num_warps": (1, 2, 4, 8)},
        # BV: rows of the state of one program; STAGES: chunks in flight, 56 KB of shared memory each at K = 128, BV = 64.
        "rule": {"BV": (16, 32, 64, 128), "STAGES": (1, 2, 3, 4), "num_warps": (1, 2, 4, 8)},
        "starts": {"BV": (16, 32, 64, 128), "STAGES": (1, 2, 3, 4), "num_warps": (1, 2, 4, 8)},
    },
)
PREP, RULE, STARTS = _TABLES["prep"], _TABLES["rule"], _TABLES["starts"]
# Chunks of a segment by the most value heads it is for; a sequence of over four segments is cut. Head counts and a row's own
# length decide, nothing else, or its neighbours would change its bits.
SEGMENTS = ((8, 16), (16, 32))
# Where neighbours may: few sequences times heads, none of more chunks than the second number, are cut by this.
FEW, SHORT, SHORT_SEGMENT = 8, 64, (8, 24)


def delta_rule_prefill(
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
    segment: int | None = None,
) -> Tensor:
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t   [arXiv:2412.06464]

    q, k: [T, H, K], v: [T, HV, V] in bf16 or f16, any strides (a last stride other than 1 costs a copy); g, beta:
    [T, HV] f32, any strides; state: [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"), any strides, f32 or bf16, updated in
    place. K <= 128 and V multiples of 16. Products of rounded operands, sums in f32, the state in f32 from chunk to
    chunk. Tokens of padding rows and of nobody are exactly 0. A slot >= S sets seq.error. `segment`: chunks of a
    segment (0: no sequence is cut; None: as measured for the shapes). Returns o [T, HV, V], contiguous.
    """
    (tokens, key_heads, key_dim), (_, heads, value_dim), rows = q.shape, v.shape, seq.num_seqs
    o = v.new_empty(tokens, heads, value_dim)
    if rows == 0:
        return o.zero_()  # no row owns a token
    kernels = _kernels("delta_rule")
    (q, q_strides), (k, k_strides), (v, v_strides) = _strided(q, tokens), _strided(k, tokens), _strided(v, tokens)
    segment, cut_from = (segment, 4 * segment) if segment is not None else _segment(rows, heads, seq.max_len)
    numbers = tokens // (segment * CHUNK) if segment and seq.max_len > cut_from * CHUNK else 0
    segment = segment if numbers else 0
    solve, scores = k.new_empty(heads, tokens, CHUNK), k.new_empty(heads, tokens, CHUNK)
    gates = g.new_empty(heads, 2, tokens)
    starts, steps = g.new_empty(numbers, heads, value_dim, key_dim), g.new_empty(numbers, heads, key_dim, key_dim)
    shape = kinds(v.device), (key_heads, heads, key_dim, value_dim)
    cut = segment, cut_from if segment else 0
    constants, tiles = _rule_constants(*shape, *cut)
    slot_stride, head_stride, *last = state.stride()
    v_stride, k_stride = last if state_layout == "vk" else last[::-1]
    cu_seqlens, read_slots, write_slots, has_state, error = _metadata(seq)
    read = cu_seqlens, read_slots
    sizes = tokens, rows, state.shape[0]
    key_strides = *q_strides[:2], *k_strides[:2]
    write_stride = write_slots.stride()[0]
    strides = *key_strides, *v_strides[:2], slot_stride, head_stride, v_stride, k_stride, write_stride
    inputs = q, k, v, solve, scores, gates, o, state, starts
    if tokens:
        prep = _prep_constants(*shape)
        launch(
            kernels.delta_rule_prep_kernel,
            (tokens // CHUNK + rows) * (heads // prep["HEADS"]),
            (
                q, k, g, beta, solve, scores, gates, *read, *sizes, *key_strides, *_strides(g, tokens),
                *_strides(beta, tokens), scale,
            ),
            prep,
        )  # fmt: skip
    summaries = numbers * (tiles + _cdiv(key_dim, constants["BV"]))
    launch(
        kernels.delta_rule_kernel,
        (rows * tiles + summaries) * heads,
        (*inputs, steps, *read, write_slots, has_state, error, *sizes, *strides, scale),
        constants,
    )
    if segment:
        between = _starts_constants(*shape, *cut)
        programs = rows * heads * _cdiv(value_dim, between["BV"])
        launch(kernels.delta_rule_starts_kernel, programs, (starts, steps, *read, *sizes), between)
        args = (*inputs, *read, write_slots, *sizes, *strides, scale)
        launch(kernels.delta_rule_segments_kernel, numbers * heads * tiles, args, constants)
    return o


@functools.lru_cache(maxsize=256)
def _prep_constants(kinds: tuple[str, ...], heads: tuple[int, int, int, int]) -> dict[str, Any]:
    key_heads, value_heads, key_dim, _ = heads
    blocks = pick(PREP, kinds)
    shape = {"H": key_heads, "HV": value_heads, "K": key_dim, "BK": _next_power_of_2(key_dim)}
    return {**shape, **blocks, "HEADS": _divisor(value_heads // key_heads, blocks["HEADS"])}


@functools.lru_cache(maxsize=256)
def _rule_constants(
    kinds: tuple[str, ...], heads: tuple[int, int, int, int], segment: int, cut_from: int
) -> tuple[dict[str, Any], int]:
    """(what the kernels of the rule and of segments are compiled for, tiles of a head's state)"""
    key_heads, value_heads, key_dim, value_dim = heads
    blocks = pick(RULE, kinds)
    shape = {"H": key_heads, "HV": value_heads, "K": key_dim, "V": value_dim, "BK": _next_power_of_2(key_dim)}
    return {**shape, "SEGMENT": segment, "CUT": cut_from, **blocks}, _cdiv(value_dim, blocks["BV"])


@functools.lru_cache(maxsize=256)
def _starts_constants(
    kinds: tuple[str, ...], heads: tuple[int, int, int, int], segment: int, cut_from: int
) -> dict[str, Any]:
    _, value_heads, key_dim, value_dim = heads
    shape = {"HV": value_heads, "K": key_dim, "V": value_dim, "BK": _next_power_of_2(key_dim)}
    precision = "ieee" if "hip" in kinds else "tf32x3"
    return {**shape, "SEGMENT": segment, "CUT": cut_from, "PRECISION": precision, **pick(STARTS, kinds)}


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def segment_of_heads(heads: int) -> int:
    """Chunks of a segment for a batch whose rows must not know of each other."""
    return next((length for most, length in SEGMENTS if heads <= most), 0)


def _segment(rows: int, heads: int, longest: int) -> tuple[int, int]:
    """Chunks of a segment, and of how many more than which a sequence is cut."""
    if rows * heads <= FEW and longest <= SHORT * CHUNK:
        return SHORT_SEGMENT
    return segment_of_heads(heads), 4 * segment_of_heads(heads)
