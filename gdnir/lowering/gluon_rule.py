"""Launch the Gluon kernels of the gated delta rule's prefill on Hopper. As in `triton_launch`: no checks, no sync, no tuning at
run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.errors import ShapeError
from gdnir.lowering import tables
from gdnir.lowering.relaunch import relaunched
from gdnir.lowering.triton_launch import _on, _row_stride, _unit_last
from gdnir.platforms import PLATFORMS, copy_bandwidth

if TYPE_CHECKING:
    from gdnir.seq import Seq

HEAD = 128
CHUNK = 64
# NWG: warpgroups that share a program's tiles, 64 rows of V each. NSTG: chunks in flight. RC, RP: registers of a thread in
# the second of these warpgroups and in the one that computes P; the first gets what is left of maxnreg for each thread.
_REGISTERS, _STAGES, _WARPS, _BOOL = range(0, 256, 8), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8), (True, False)
_LAUNCH = {"num_warps": _WARPS, "maxnreg": _REGISTERS, "launch_pdl": _BOOL}
_CARRY = {"NWG": (1, 2), "NSTG": _STAGES, "RC": _REGISTERS, "RP": _REGISTERS, "EARLY": _BOOL, **_LAUNCH}
_TABLES = tables.load(
    "gluon_rule",
    {
        "single": _CARRY,
        "pair": _CARRY,
        "summary": {"NSTG": _STAGES, **_LAUNCH},
        "starts": {"STAGES": _STAGES, "num_warps": _WARPS, "launch_pdl": _BOOL},
        # 200 registers: 8 programs of one warp on each multiprocessor. More of them with fewer registers are slower.
        "prep": {"num_warps": _WARPS, "maxnreg": _REGISTERS},
    },
)
# The kernels are Hopper's alone, so one kind of GPU is all there is.
SINGLE, PAIR, SUMMARY, STARTS, PREP = (
    _TABLES[name]["default"] for name in ("single", "pair", "summary", "starts", "prep")
)
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
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tokens, heads = v.shape[:2]
    count = seq.num_seqs
    if count == 0 or heads == 0:
        return o.zero_()  # no row owns a token
    numbers = tokens // CHUNK + count
    if numbers * heads >= 1 << 23:
        raise ShapeError(
            "gated_delta_rule",
            "v, seq",
            expected="fewer than 2^23 chunks x heads on provider gluon",
            got=f"{numbers} chunks x {heads} heads",
            hint="Cut the batch, or take provider triton.",
        )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from gdnir.kernels import delta_rule_gluon as kernels
    from gdnir.kernels import delta_rule_gluon_prep as prep
    from gdnir.kernels import delta_rule_gluon_segments as segments

    def tiles(x: Tensor) -> Any:
        """A descriptor of x [T, heads, 128] as a matrix; it may not be empty."""
        x = x if tokens else x.new_empty(1, *x.shape[1:])
        return TensorDescriptor(x, [x.shape[0], x.shape[1] * HEAD], [_row_stride(x), 1], [CHUNK, 64], kernels.TILE)

    q, k, v = (_for_tma(x) for x in (q, k, v))
    transform = torch.empty((numbers * heads * CHUNK, CHUNK), dtype=v.dtype, device=v.device)
    gates = torch.empty((numbers * heads * 4 * CHUNK,), dtype=torch.float32, device=v.device)
    cu_seqlens, read_slots = _unit_last(seq.cu_seqlens), _unit_last(seq.read_slots)
    # as many rows of the longest one's length as there are tokens for
    rows, chunks = min(count, -(-tokens // max(seq.max_len, 1))), -(-seq.max_len // CHUNK)
    cores, bandwidth = _facts(v.device)
    if segment is None:
        segment = _segment((rows,), k.shape[1], heads, chunks, cores, bandwidth)
    slots = tokens // (segment * CHUNK) if segment and seq.max_len > segment * CHUNK else 0
    starts = steps = gates  # not looked at
    if slots:
        starts = torch.empty((2 * slots, heads, HEAD, HEAD), dtype=torch.float32, device=v.device)
        steps = torch.empty((slots, heads, HEAD, HEAD), dtype=torch.float16, device=v.device)
    has_state = _unit_last(seq.has_state)
    segment = segment or 1
    sizes = tokens, count, state.shape[0], slots, segment
    shape = {"H": k.shape[1], "HV": heads, "VS": state.stride(2), "KS": state.stride(3)}
    t_tiles = TensorDescriptor(transform, list(transform.shape), [CHUNK, 1], [CHUNK, CHUNK], kernels.TILE)
    shared = _shared_heads(numbers * heads, heads // k.shape[1], cores)
    gate_lines = TensorDescriptor(gates, list(gates.shape), [1], [4 * CHUNK], kernels.LINE)
    descriptors = tiles(q), tiles(k), tiles(v), t_tiles, gate_lines, tiles(o)
    with _on(v.device):
        relaunched(prep.delta_rule_gluon_prep_kernel)[((numbers + 1) * heads // shared,)](
            descriptors[1],
            t_tiles,
            g,
            beta,
            gates,
            o,
            cu_seqlens,
            read_slots,
            seq.write_slots,
            seq.error,
            tokens,
            count,
            state.shape[0],
            _row_stride(g),
            g.stride(1),
            _row_stride(beta),
            beta.stride(1),
            seq.write_slots.stride(0),
            H=k.shape[1],
            HV=heads,
            HEADS=shared,
            **PREP,
        )
        if slots:
            ends = (
                TensorDescriptor(starts, [2 * slots * heads * HEAD, HEAD], [HEAD, 1], [64, 64], kernels.WIDE_TILE),
                TensorDescriptor(steps, [slots * heads * HEAD, HEAD], [HEAD, 1], [64, 64], kernels.TILE),
            )
            relaunched(segments.delta_rule_gluon_summary_kernel)[((2 * count + 4 * slots) * heads,)](
                *descriptors[1:5],
                *ends,
                state,
                starts,
                cu_seqlens,
                read_slots,
                has_state,
                *sizes,
                state.stride(0),
                state.stride(1),
                **shape,
                **SUMMARY,
            )
            if seq.max_len > 2 * segment * CHUNK:
                relaunched(segments.delta_rule_gluon_starts_kernel)[(count * heads * 2,)](
                    *ends,
                    cu_seqlens,
                    read_slots,
                    tokens,
                    count,
                    state.shape[0],
                    segment,
                    HV=heads,
                    **STARTS,
                )
        units = (count + slots) * heads
        at_once = rows * -(-chunks // segment) if slots else count
        single, pair = _output_us(at_once * heads, heads // k.shape[1], cores, bandwidth)
        schedule = SINGLE if single <= pair else PAIR
        relaunched(kernels.delta_rule_gluon_kernel)[(units * (2 // schedule["NWG"]),)](
            *descriptors,
            o,
            state,
            cu_seqlens,
            read_slots,
            seq.write_slots,
            has_state,
            starts,
            *sizes,
            state.stride(0),
            state.stride(1),
            seq.write_slots.stride(0),
            scale,
            math.log2(scale),
            CUT=slots > 0,
            **shape,
            **schedule,
        )
    return o


def _for_tma(x: Tensor) -> Tensor:
    """x [T, heads, 128], copied if TMA cannot read it: its rows begin at multiples of 16 bytes, heads side by side."""
    rows = x.shape[0] == 1 or (x.stride(0) >= x.shape[1] * HEAD and x.stride(0) * x.element_size() % 16 == 0)
    heads = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == HEAD)
    return x if rows and heads and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _shared_heads(tiles: int, group: int, cores: int) -> int:
    """Value heads for which one program of `prep` takes a chunk's keys: all of the key head's, as long as all cores have work."""
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
# Microseconds of the launches for segments, and of a step from one to the next.
LAUNCH_US, STEP_US = 3.0, 2.3


def segment_of_heads(k: Tensor, v: Tensor) -> int:
    """Chunks of a segment for a batch whose rows must not know of each other: as if it had one of 8192 tokens, or two."""
    return _segment((1, 2), k.shape[1], v.shape[1], 128, *_facts(v.device))


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
def _facts(device: torch.device) -> tuple[int, float]:
    """Streaming multiprocessors, of which each holds one program of either schedule; bytes/s of a large copy."""
    published = PLATFORMS["cuda:sm_90"]
    cores, bandwidth = published.cores or 0, published.bandwidth or 0.0
    if device.type == "cpu":  # tests without a GPU
        return cores, bandwidth
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, copy_bandwidth(properties) or bandwidth
