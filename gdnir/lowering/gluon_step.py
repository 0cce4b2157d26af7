"""Launch the Gluon kernel of `gdn_step` on Hopper, where it is faster than Triton's. As in `triton_launch`: no checks, no sync, no
tuning at run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from gdnir.lowering import tables, triton_step
from gdnir.lowering.gluon_rule import device_facts
from gdnir.lowering.relaunch import launch
from gdnir.lowering.triton_launch import _kernels, _next_power_of_2

if TYPE_CHECKING:
    from gdnir.seq import Seq

# TILE: elements of the state in a tile. FILL: sequences and key heads for each multiprocessor up to which something else is faster
# than one program for each: clusters, or what precedes among ways by bulk copies. AHEAD: tiles of a program in flight. EARLY: q and k
# are normalised before the first tile, not for each. Bulk: a program's tiles go through shared memory by bulk copies, each warp's part
# by itself.
_TILES, _FILL = (1024, 2048, 4096, 8192, 16384), (0.4, 0.5, 0.8, 0.9, 1.0, 1.5, 2.0, 4.0, 16.0)
_WARPS, _REGISTERS = (2, 4, 8), (*range(64, 256, 8), 255)
_CLUSTERS = {"TILE": _TILES, "FILL": _FILL}
_ONE = {
    "TILE": _TILES,
    "AHEAD": (1, 2, 3, 4),
    "EARLY": (True, False),
    "num_warps": _WARPS,
    "maxnreg": _REGISTERS,
}
_BULK = {"TILE": _TILES[1:], "FILL": _FILL, "AHEAD": (1, 2, 3, 4), "num_warps": _WARPS, "maxnreg": _REGISTERS}
_WAYS = {
    ("decode", 4): ("", "_more", "_many"),
    ("decode", 2): ("", "_more", "_many", "_most"),
    ("verify", 4): ("",),
    ("verify", 2): ("",),
}
"""By bulk copies, for few sequences first: the ends of their names in the table."""
_TABLES = tables.load(
    "gluon_step",
    {  # by bits of an element of the state
        **{f"{phase}_bulk_{8 * size}{end}": _BULK for (phase, size), ends in _WAYS.items() for end in ends},
        **{f"{phase}_clusters_{8 * size}": _CLUSTERS for phase, size in _WAYS},
        **{f"{phase}_{8 * size}": _ONE for phase, size in _WAYS},
    },
)
# The kernel is Hopper's alone, so one kind of GPU is all there is.
CLUSTERS, ONE = (
    {(phase, size): _TABLES[f"{phase}{how}_{8 * size}"]["default"] for phase, size in _WAYS}
    for how in ("_clusters", "")
)
BULK = {
    (phase, size): [_TABLES[f"{phase}_bulk_{8 * size}{end}"]["default"] for end in ends]
    for (phase, size), ends in _WAYS.items()
}
MOST_CTAS = 8
"""Of a cluster that every device can run. Each has rows of one value head."""
ELEMENTS = 64
"""Of a tile in one thread, where it has the registers."""
MOST_TOKENS = 8
"""Of a row, for which the kernel's code is written out."""
MOST_ROWS = 8192
"""Of a key head's states, times tokens: a program has 16 bytes of shared memory for each."""
MOST_AHEAD = 8
"""Tiles of a program in flight: a ring has room for the barriers of 16 by 8 warps."""
SHARED = 227 << 10
"""Bytes of shared memory that a program may have on Hopper."""
TRITONS = ("3.6.", "3.7.")
"""Whose kernels are known to have their largest allocation first in shared memory, where bulk_ring.py looks for it."""


@functools.cache
def _rows(heads: tuple[int, int, int, int]) -> int:
    """Of a key head's states, each value head's as a power of two."""
    return _next_power_of_2(heads[1] // heads[0]) * _next_power_of_2(heads[3])


def _cluster(tile: int, heads: tuple[int, int, int, int]) -> dict[str, Any]:
    """A key head's states, of at most MOST_CTAS value heads, spread over CTAs of about `tile` elements."""
    rows = _rows(heads)
    each = max(triton_step.rows_of_tile(tile, *heads[2:]), rows // MOST_CTAS)
    warps = max(4, each * _next_power_of_2(heads[2]) // (32 * ELEMENTS))
    return {"BV": each, "CTAS": rows // each, "TILES": 1, "AHEAD": 1, "BULK": False, "EARLY": False, "num_warps": warps}


def _one(choices: dict[str, Any], heads: tuple[int, int, int, int]) -> dict[str, Any]:
    """A key head's states in tiles that one CTA goes through."""
    options = dict(choices)
    each = triton_step.rows_of_tile(options.pop("TILE"), *heads[2:])
    tiles = _rows(heads) // each
    return {**options, "BV": each, "CTAS": 1, "TILES": tiles, "AHEAD": min(options["AHEAD"], tiles), "BULK": False}


@functools.cache
def _bulk(
    phase: str, size: int, heads: tuple[int, int, int, int], tokens: int
) -> tuple[tuple[float, dict[str, Any]], ...]:
    """(FILL, the rest) of the ways in which a key head's states go by bulk copies, tile by tile; none for shapes that cannot, and
    with a Triton that is not known. A tile is whole rows of one head, a warp's part of it too, and 8 lanes read 128 bytes of a row.
    Where TILE does not divide a head, or a thread has too few registers for 64 elements beside what it keeps, tiles are smaller, and
    more of them ahead."""
    import triton

    k, v = heads[2:]
    if not triton.__version__.startswith(TRITONS) or k != _next_power_of_2(k) or k * size < 128:
        return ()
    made: list[tuple[float, dict[str, Any]]] = []
    rows = _rows(heads)
    qk, of_rows = 8 * _next_power_of_2(tokens) * k, 4 * tokens * rows
    for row in BULK[phase, size]:
        options = dict(row if made else {**row, "FILL": BULK[phase, size][0]["FILL"]})  # where clusters end
        fill, each, warps = options.pop("FILL"), options.pop("TILE") // k, options["num_warps"]
        keeps_much = k > 128 or heads[1] > 2 * heads[0]  # q and k; the inputs of its value heads
        most = 32 * warps * (ELEMENTS // 2 if keeps_much and options["maxnreg"] <= 128 else ELEMENTS)
        while v % each or each * k > most:
            each, options["AHEAD"] = each // 2, 2 * options["AHEAD"]
        if each % (4 * warps):
            continue
        tile = each * k * size
        room = (SHARED - qk - 4 * of_rows - (4 << 10)) // tile  # a ring has 2 KB besides its tiles
        options["AHEAD"] = min(options["AHEAD"], rows // each, room - 1, MOST_AHEAD)  # one is on its way out
        if options["AHEAD"] * tile < max(qk, of_rows, 1):  # the ring must be the largest
            continue
        made.append((fill, {**options, "BV": each, "CTAS": 1, "TILES": rows // each, "BULK": True, "EARLY": True}))
    return tuple(made)


def takes_bulk(phase: str, tokens: int, heads: tuple[int, int, int, int], state: Tensor, state_layout: str) -> bool:
    """Whether tiles come and go by bulk copies, not by loads and stores: as `_bulk`, and rows without gaps, heads and slots at
    multiples of 16 bytes."""
    size, (slot, head, *rows) = state.element_size(), state.stride()
    return (
        _bulk(phase, size, heads, tokens) != ()
        and state_layout == "vk"
        and rows == [heads[2], 1]
        and (state.data_ptr() | slot * size | head * size) % 16 == 0
    )


@functools.lru_cache(maxsize=1024)
def _fastest(
    bulk: bool, phase: str, size: int, heads: tuple[int, int, int, int], tokens: int, fill: float
) -> Literal["clusters", "tiles"] | int:
    """What `gdn_step` goes by, of this many sequences and key heads for each multiprocessor."""
    ends = [end for end, _ in _bulk(phase, size, heads, tokens)] if bulk else [CLUSTERS[phase, size]["FILL"]]
    passed = sum(fill > end for end in ends)
    return "clusters" if passed == 0 else passed - 1 if bulk else "tiles"


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
    by: Literal["clusters", "tiles"] | int | None = None,
) -> Tensor:
    """`triton_step.gdn_step` for a state [S, HV, V, K] and at most MOST_CTAS value heads of a key head.

    `by`: for each sequence and key head a cluster of CTAs, or one CTA that goes through the tiles of its states (a number: in
    which of the table's ways, where `takes_bulk`); None: what is fastest, by how many there are. More than MOST_TOKENS drafts a
    sequence are left to Triton's kernel.
    """
    tokens = seq.write_slots.shape[1] if seq.phase == "verify" else 1
    size, programs = state.element_size(), seq.num_seqs * heads[0]
    if programs == 0 or heads[1] * heads[3] == 0 or not 1 <= tokens <= min(MOST_TOKENS, MOST_ROWS // _rows(heads)):
        return triton_step.gdn_step(
            qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, seq, activation=activation,
            conv_layout=conv_layout, heads=heads, l2norm_eps=l2norm_eps, allow_neg_eigval=allow_neg_eigval, scale=scale,
            state_layout=state_layout, eps=eps, gate=gate,
        )  # fmt: skip
    bulk = by != "clusters" and takes_bulk(seq.phase, tokens, heads, state, state_layout)
    if by is None:
        by = _fastest(bulk, seq.phase, size, heads, tokens, programs / device_facts(state.device)[0])
    elif by != "clusters":
        by = "tiles" if not bulk else 0 if by == "tiles" else by
    y = z.new_empty(z.shape[0], *heads[1::2])
    args = triton_step.step_arguments(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, y, seq, conv_layout, l2norm_eps,
        scale, eps,
    )  # fmt: skip
    constants = _constants(
        by, size, heads, weight.shape[1], state_layout, state.stride()[2:], seq.phase, tokens,
        activation, allow_neg_eigval, gate, bias is None,
    )  # fmt: skip
    launch(_kernels("gdn_step_gluon").gdn_step_gluon_kernel, programs, args, constants)
    return y


# `plain`: without a bias. Launches with the same constants have tensors in the same places.
@functools.lru_cache(maxsize=256)
def _constants(
    by: str | int,
    element_size: int,
    heads: tuple[int, int, int, int],
    width: int,
    state_layout: str,
    strides: tuple[int, ...],
    phase: str,
    tokens: int,
    activation: str,
    allow_neg_eigval: bool,
    gate: str,
    plain: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for. `strides`: the state's last two."""
    if isinstance(by, int):
        spread = _bulk(phase, element_size, heads, tokens)[by][1]
    elif by == "clusters":
        spread = _cluster(CLUSTERS[phase, element_size]["TILE"], heads)
    else:
        spread = _one(ONE[phase, element_size], heads)
    return {
        **triton_step.step_names(
            heads, width, state_layout, strides, phase == "verify", activation, allow_neg_eigval, gate
        ),
        "K_POW2": _next_power_of_2(heads[2]),
        "V_POW2": _next_power_of_2(heads[3]),
        "TOKENS": tokens,
        "TOKENS_POW2": _next_power_of_2(tokens),
        "VECTOR": 16 // element_size,
        **spread,
        "num_ctas": spread["CTAS"],
    }
