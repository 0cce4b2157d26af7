"""Launch the Gluon kernels of the gated delta rule's prefill on Hopper. As in `triton_launch`: no checks, no sync, no tuning at
run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.errors import ShapeError
from gdnir.lowering import tables
from gdnir.lowering.descriptors import Box, Descriptors, describe
from gdnir.lowering.relaunch import Step, Steps, launch_all
from gdnir.lowering.triton_launch import _metadata, _strides
from gdnir.platforms import PLATFORMS, copy_bandwidth

if TYPE_CHECKING:
    from gdnir.seq import Seq

HEAD = 128
CHUNK = 64
# NWG: warpgroups that share a program's tiles, 64 rows of V each. NSTG: chunks in flight. RC, RP: registers of a thread in
# the second of these warpgroups and in the one that computes P; the first gets what is left of maxnreg for each thread.
_REGISTERS, _STAGES, _WARPS, _BOOL = range(0, 256, 8), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8), (True, False)
_LAUNCH = {"num_warps": _WARPS, "maxnreg": _REGISTERS, "launch_pdl": _BOOL}
_RULE = {"NWG": (1, 2), "NSTG": _STAGES, "RC": _REGISTERS, "RP": _REGISTERS, "EARLY": _BOOL, **_LAUNCH}
_TABLES = tables.load(
    "gluon_rule",
    {
        "single": _RULE,
        "pair": _RULE,
        "summary": {"NSTG": _STAGES, **_LAUNCH},
        # 200 registers: 8 programs of one warp on each multiprocessor. More of them with fewer registers are slower.
        "prep": {"num_warps": _WARPS, "maxnreg": _REGISTERS},
    },
)
# The kernels are Hopper's alone, so one kind of GPU is all there is.
SINGLE, PAIR, SUMMARY, PREP = (_TABLES[name]["default"] for name in ("single", "pair", "summary", "prep"))
# The arguments of the kernels, and what of them each takes, in its order.
_ARGS = """of_prep of_summary of_carry g beta o state cu_seqlens read_slots write_slots has_state error space T N S slots segment
    stride_gt stride_gh stride_bt stride_bh stride_s stride_sh stride_wn scale lscale"""


def _places(names: str) -> tuple[int, ...]:
    args = _ARGS.split()
    return tuple([args.index(name) for name in names.split()])


_PREP = _places("""of_prep g beta space o cu_seqlens read_slots write_slots error T N S stride_gt stride_gh stride_bt stride_bh
    stride_wn""")
_SUMMARY = _places("""of_summary state space cu_seqlens read_slots has_state T N S slots segment stride_s stride_sh""")
_CARRY = _places("""of_carry o state cu_seqlens read_slots write_slots has_state space T N S slots segment stride_s stride_sh stride_wn
    scale lscale""")
PREP_FILL = 7
"""Programs of prep for each multiprocessor, at least, before heads share one."""


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
    segment: int | None = None,
) -> Tensor:
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t   [arXiv:2412.06464, eq. 10]

    q, k [T, H, 128], v [T, HV, 128] bf16 or f16: token strides that TMA takes (multiples of 16 bytes, heads side by side), others
    cost a copy. g, beta [T, HV] f32, state [S, HV, 128, 128] f32 or bf16, any strides, updated in place. f32 inside, the
    operands of products are rounded to v's type. `segment`: chunks of a segment (0: no sequence is cut; None: as measured
    for the shapes). Returns o [T, HV, 128], contiguous. A slot >= S sets seq.error. Raises ShapeError beyond 2^23 heads x
    chunks.
    """
    (tokens, heads, _), key_heads, count = v.shape, k.shape[1], seq.num_seqs
    o = v.new_empty(tokens, heads, HEAD)
    if count == 0 or heads == 0:
        return o.zero_()  # no row owns a token
    s_stride, h_stride, *strides = state.stride()
    plan = _plan(tokens, count, seq.max_len, key_heads, heads, *strides, segment, v.device)
    space = g.new_empty(plan.space)
    tiles = _describe(q, k, v, o, space, plan)
    if tiles is None:  # the copies must live until the kernels are launched
        q, k, v = _readable(q), _readable(k), _readable(v)
        tiles = _describe(q, k, v, o if tokens else v, space, plan)
        assert tiles is not None
    args = (
        *tiles, g, beta, o, state, *_metadata(seq), space, tokens, count, state.shape[0], plan.slots, plan.segment,
        *_strides(g, tokens), *_strides(beta, tokens), s_stride, h_stride, seq.write_slots.stride()[0], scale, math.log2(scale),
    )  # fmt: skip
    launch_all(plan.launches, plan.programs, args)
    return o


@functools.cache
def _kernels() -> tuple[Any, Any, Any, Box, Box, Box]:
    """The kernels' modules, and what a copy moves: 64 rows of 64 numbers of 16 bits or f32, or the gates of a chunk."""
    from gdnir.kernels import delta_rule_gluon, delta_rule_gluon_prep, delta_rule_gluon_segments

    tile, wide = Box([CHUNK, 64], delta_rule_gluon.TILE), Box([CHUNK, 64], delta_rule_gluon.WIDE_TILE)
    line = Box([4 * CHUNK], delta_rule_gluon.LINE)
    return delta_rule_gluon_prep, delta_rule_gluon_segments, delta_rule_gluon, tile, wide, line


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """All that follows from the shapes of a batch, found once."""

    heads: tuple[int, int]
    tokens: int
    segment: int  # chunks
    slots: int  # for segments; 0: no sequence is cut
    space: int  # f32 between the kernels: rows of 64 gates, four for each chunk and head; T in v's type; starts f32; steps f16
    rows: int  # of T
    lines: int  # of steps
    launches: Steps  # prep, summary if sequences are cut, and carry
    programs: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _plan(
    tokens: int,
    count: int,
    longest: int,
    key_heads: int,
    heads: int,
    v_stride: int,
    k_stride: int,
    segment: int | None,
    device: torch.device,
) -> _Plan:
    """Raises ShapeError beyond 2^23 heads x chunks."""
    numbers = tokens // CHUNK + count
    if numbers * heads >= 1 << 23:
        raise ShapeError(
            "gated_delta_rule",
            "v, seq",
            expected="fewer than 2^23 chunks x heads on provider gluon",
            got=f"{numbers} chunks x {heads} heads",
            hint="Cut the batch, or take provider triton.",
        )
    segment, slots, single = _cut(tokens, count, longest, key_heads, heads, segment, device)
    shared = _shared_heads(numbers * heads, heads // key_heads, device)
    carry = _carry_constants(key_heads, heads, v_stride, k_stride, single, slots > 0)
    rows, lines = numbers * heads * CHUNK, slots * heads * HEAD
    prep, segments, kernels, *_ = _kernels()
    steps = [Step(prep.delta_rule_gluon_prep_kernel, _prep_constants(key_heads, heads, shared), _PREP)]
    programs = [(numbers + 1) * heads // shared]
    if slots:
        summary = _summary_constants(key_heads, heads, v_stride, k_stride)
        steps.append(Step(segments.delta_rule_gluon_summary_kernel, summary, _SUMMARY))
        programs.append((2 * count + 4 * slots) * heads)
    steps.append(Step(kernels.delta_rule_gluon_kernel, carry, _CARRY))
    programs.append((count + slots) * heads * (2 // carry["NWG"]))
    return _Plan(
        heads=(key_heads, heads),
        tokens=tokens,
        segment=segment,
        slots=slots,
        space=(4 + CHUNK // 2) * rows + (2 * HEAD + HEAD // 2) * lines,
        rows=rows,
        lines=lines,
        launches=Steps(*steps),
        programs=tuple(programs),
    )


def _describe(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, space: Tensor, plan: _Plan
) -> tuple[Descriptors, Descriptors, Descriptors] | None:
    """What prep, summary and carry take; None if TMA cannot read q, k or v."""
    return _descriptors(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), v.dtype, o.data_ptr(), space.data_ptr(), plan
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _descriptors(
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    o: int,
    space: int,
    plan: _Plan,
) -> tuple[Descriptors, Descriptors, Descriptors] | None:
    """Of addresses, which an allocator gives again."""
    _, _, _, tile, wide, line = _kernels()
    (key_heads, heads), tokens = plan.heads, plan.tokens or 1
    keys, values = (tokens, key_heads, HEAD), (tokens, heads, HEAD)
    transform = space + 16 * plan.rows
    t_tiles = start_tiles = step_tiles = describe(transform, dtype, (plan.rows, CHUNK), (CHUNK, 1), tile)
    if plan.slots:  # or they are not looked at
        starts = transform + 2 * CHUNK * plan.rows
        start_tiles = describe(starts, torch.float32, (2 * plan.lines, HEAD), (HEAD, 1), wide)
        step_tiles = describe(starts + 8 * HEAD * plan.lines, torch.float16, (plan.lines, HEAD), (HEAD, 1), tile)
    q_tiles, k_tiles = describe(q, dtype, keys, q_strides, tile), describe(k, dtype, keys, k_strides, tile)
    v_tiles = describe(v, dtype, values, v_strides, tile)
    if q_tiles is None or k_tiles is None or v_tiles is None:
        return None
    o_tiles = describe(o, dtype, values, (heads * HEAD, HEAD, 1), tile)
    gates = describe(space, torch.float32, (4 * plan.rows,), (1,), line)
    between = t_tiles, gates, start_tiles, step_tiles
    return (
        Descriptors(k_tiles, t_tiles),
        Descriptors(k_tiles, v_tiles, *between),
        Descriptors(q_tiles, k_tiles, v_tiles, o_tiles, *between),
    )


def _readable(x: Tensor) -> Tensor:
    """x or a copy of it, which TMA can read; of no tokens, room for one."""
    if describe(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), _kernels()[3]) is not None:
        return x
    return x.clone(memory_format=torch.contiguous_format) if x.shape[0] else x.new_empty(1, *x.shape[1:])


@functools.lru_cache(maxsize=256)
def _prep_constants(key_heads: int, heads: int, shared: int) -> dict[str, Any]:
    return {"H": key_heads, "HV": heads, "HEADS": shared, **PREP}


@functools.lru_cache(maxsize=256)
def _summary_constants(key_heads: int, heads: int, v_stride: int, k_stride: int) -> dict[str, Any]:
    return {"H": key_heads, "HV": heads, "VS": v_stride, "KS": k_stride, **SUMMARY}


@functools.lru_cache(maxsize=256)
def _carry_constants(
    key_heads: int, heads: int, v_stride: int, k_stride: int, single: bool, cut: bool
) -> dict[str, Any]:
    shape = {"H": key_heads, "HV": heads, "VS": v_stride, "KS": k_stride}
    return {**shape, "CUT": cut, **(SINGLE if single else PAIR)}


def _cut(
    tokens: int, count: int, longest: int, key_heads: int, heads: int, segment: int | None, device: torch.device
) -> tuple[int, int, bool]:
    """Chunks of a segment (`segment` if it is given), segments to make room for, and whether `single` runs them."""
    # as many rows of the longest one's length as there are tokens for
    rows, chunks = min(count, -(-tokens // max(longest, 1))), -(-longest // CHUNK)
    cores, bandwidth = device_facts(device)
    if segment is None:
        segment = _segment((rows,), key_heads, heads, chunks, cores, bandwidth)
    slots = tokens // (segment * CHUNK) if segment and longest > segment * CHUNK else 0
    segment = segment or 1
    at_once = rows * -(-chunks // segment) if slots else count
    single, pair = _output_us(at_once * heads, heads // key_heads, cores, bandwidth)
    return segment, slots, single <= pair


def _shared_heads(tiles: int, group: int, device: torch.device) -> int:
    """Value heads for which one program of `prep` takes a chunk's keys: all of the key head's, as long as all cores have work."""
    cores, _ = device_facts(device)
    return next(n for n in range(group, 0, -1) if group % n == 0 and (n == 1 or tiles // n >= PREP_FILL * cores))


# Fitted to the times of an H100 and an H200 (tests/test_gluon_segments.py), which differ by their bandwidth alone.
# Microseconds of a chunk while memory keeps up: of a program of SINGLE, of PAIR, and of one or two on a core that follow 64
# rows of a state without outputs. Then the share of a large copy's bandwidth that each of them reaches.
SINGLE_US, PAIR_US, FOLLOW_US = 1.14, 1.87, 1.035
SINGLE_SHARE, PAIR_SHARE, FOLLOW_SHARE = 0.86, 0.90, 0.81
# Bytes of a chunk, v, T, gates and outputs or not, and those that the value heads of a key head share.
OUTPUT_BYTES, FOLLOW_BYTES, QK_BYTES, K_BYTES = 41 << 10, 25 << 10, 32 << 10, 16 << 10
# A program loads its state, fills its stages and stores: chunks more of PAIR or SINGLE, and of one that follows.
OUTPUT_MORE, FOLLOW_MORE = 3.5, 2.0
# Microseconds of the launch for segments, and of a step from one to the next.
LAUNCH_US, STEP_US = 3.0, 2.1


def segment_of_heads(k: Tensor, v: Tensor) -> int:
    """Chunks of a segment for a batch whose rows must not know of each other: as if it had one of 8192 tokens, or two."""
    return _segment((1, 2), k.shape[1], v.shape[1], 128, *device_facts(v.device))


def _either(compute: float, memory: float) -> float:
    """Microseconds of what takes so long by itself and so long for its bytes: the longer one, or up to 15 % more."""
    return math.pow(math.pow(compute, 5) + math.pow(memory, 5), 0.2)


def _output_us(units: int, group: int, cores: int, bandwidth: float) -> tuple[float, float]:
    """Microseconds of a chunk of this many heads at the same time, by SINGLE (infinite if they do not fit) and by PAIR."""
    moved = (OUTPUT_BYTES + QK_BYTES / group) / bandwidth * 1e6
    single = _either(SINGLE_US, units * moved / SINGLE_SHARE) if 2 * units <= cores else math.inf
    full, rest = divmod(units, cores)
    pair = full * _either(PAIR_US, cores * moved / PAIR_SHARE)
    return single, pair + (_either(PAIR_US, rest * moved / PAIR_SHARE) if rest else 0.0)


@functools.lru_cache(maxsize=1024)
def _segment(batches: tuple[int, ...], key_heads: int, heads: int, chunks: int, cores: int, bandwidth: float) -> int:
    """Chunks of a segment, for sequences of this length; 0 if cutting them costs more than it saves. `batches`: how many
    there are at the same time, several numbers if it must do for each of them."""
    if chunks < 3:
        return 0
    group = heads // key_heads

    def cost(rows: int, segment: int) -> float:
        """Microseconds of so many sequences, besides prep's."""
        count = -(-chunks // segment)
        output = (segment + OUTPUT_MORE) * min(_output_us(rows * heads * count, group, cores, bandwidth))
        if count == 1:
            return output
        # All but the last are followed; those in the middle twice, for H and for M.
        waves = -(-rows * heads * (4 * count - 6) // (2 * cores))
        moved = rows * heads * (count - 1) * (FOLLOW_BYTES + K_BYTES / group) / bandwidth * 1e6
        follow = (segment + FOLLOW_MORE) * _either(waves * FOLLOW_US, moved / FOLLOW_SHARE)
        return follow + output + LAUNCH_US + (count - 2) * STEP_US

    segments = [chunks, *(-(-chunks // count) for count in range(2, min(chunks, 33)))]
    best = min(segments, key=lambda segment: math.prod(cost(rows, segment) for rows in batches))
    return best if best < chunks else 0


@functools.cache
def device_facts(device: torch.device) -> tuple[int, float]:
    """Streaming multiprocessors, of which each holds one program of either schedule; bytes/s of a large copy."""
    published = PLATFORMS["cuda:sm_90"]
    cores, bandwidth = published.cores or 0, published.bandwidth or 0.0
    if device.type == "cpu":  # tests without a GPU
        return cores, bandwidth
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, copy_bandwidth(properties) or bandwidth
