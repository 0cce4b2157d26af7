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
from gdnir.lowering.triton_launch import _on, _row_stride, _unit_last

if TYPE_CHECKING:
    from gdnir.seq import Seq

HEAD = 128
CHUNK = 64
# NWG: warpgroups that share a program's tiles, 64 rows of V each. NSTG: chunks in flight. RC, RP: registers of a thread in
# the second of these warpgroups and in the one that computes P; the first gets what is left of maxnreg for each thread.
SINGLE = {"NWG": 1, "NSTG": 4, "RC": 0, "RP": 104, "EARLY": True, "num_warps": 4, "maxnreg": 168, "launch_pdl": True}
PAIR = {"NWG": 2, "NSTG": 3, "RC": 208, "RP": 72, "EARLY": False, "num_warps": 4, "maxnreg": 128, "launch_pdl": True}
SUMMARY = {"NSTG": 3, "num_warps": 4, "maxnreg": 128, "launch_pdl": True}
STARTS = {"STAGES": 4, "num_warps": 4, "launch_pdl": True}
# 144 registers: 14 programs of one warp on each multiprocessor.
PREP = {"num_warps": 1, "maxnreg": 144}
PREP_FILL = 7


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

    q, k [T, H, 128], v [T, HV, 128] bf16: token strides that TMA takes (multiples of 16 bytes, heads side by side), others
    cost a copy. g, beta [T, HV] f32, state [S, HV, 128, 128] f32 or bf16, any strides, updated in place. f32 inside, the
    operands of products are rounded to bf16. `segment`: chunks of a segment (0: no sequence is cut; None: as measured
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
    if segment is None:
        # as many rows of the longest one's length as there are tokens for
        rows = min(count, -(-tokens // max(seq.max_len, 1)))
        segment = _segment(rows, heads, -(-seq.max_len // CHUNK), _cores(v.device))
    slots = tokens // (segment * CHUNK) if segment and seq.max_len > segment * CHUNK else 0
    starts = torch.empty((2 * slots, heads, HEAD, HEAD), dtype=torch.float32, device=v.device)
    steps = torch.empty((slots, heads, HEAD, HEAD), dtype=torch.bfloat16, device=v.device)
    has_state = _unit_last(seq.has_state)
    segment = segment or 1
    sizes = tokens, count, state.shape[0], slots, segment
    shape = {"H": k.shape[1], "HV": heads, "VS": state.stride(2), "KS": state.stride(3)}
    t_tiles = TensorDescriptor(transform, list(transform.shape), [CHUNK, 1], [CHUNK, CHUNK], kernels.TILE)
    shared = _shared_heads(numbers * heads, heads // k.shape[1], _cores(v.device))
    gate_lines = TensorDescriptor(gates, list(gates.shape), [1], [4 * CHUNK], kernels.LINE)
    descriptors = tiles(q), tiles(k), tiles(v), t_tiles, gate_lines, tiles(o)
    with _on(v.device):
        prep.delta_rule_gluon_prep_kernel[((numbers + 1) * heads // shared,)](
            k,
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
            _row_stride(k),
            k.stride(1),
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
            segments.delta_rule_gluon_summary_kernel[((2 * count + 4 * slots) * heads,)](
                *descriptors[1:5],
                state,
                starts,
                steps,
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
                segments.delta_rule_gluon_starts_kernel[(count * heads * 2,)](
                    TensorDescriptor(steps, [slots * heads * HEAD, HEAD], [HEAD, 1], [64, 64], kernels.TILE),
                    starts,
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
        schedule = SINGLE if 2 * units <= _cores(v.device) else PAIR
        kernels.delta_rule_gluon_kernel[(units * (2 // schedule["NWG"]),)](
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


# Microseconds of a chunk, measured. FOLLOW: of 64 rows of a state without outputs, one or two programs on a core. OUTPUT: of
# a program of SINGLE, of PAIR, and of PAIR on every core.
FOLLOW_US = 0.87, 1.3
OUTPUT_US = 1.17, 1.8, 2.0
# Of the launches for segments; of the one that finds their starts, and of its step from one to the next.
LAUNCH_US, STARTS_US, STEP_US = 4.0, 2.0, 2.2


def segment_of_heads(v: Tensor) -> int:
    """Chunks of a segment for a batch whose rows must not know of each other: as for one row of 8192 tokens."""
    return _segment(1, v.shape[1], 128, _cores(v.device))


@functools.lru_cache(maxsize=1024)
def _segment(rows: int, heads: int, chunks: int, cores: int) -> int:
    """Chunks of a segment, for `rows` sequences of this length; 0 if cutting them costs more than it saves."""

    def output(units: int) -> float:
        single, pair, full = OUTPUT_US
        return single if 2 * units <= cores else units // cores * full + (pair if units % cores else 0)

    def follow(programs: int) -> float:
        one, two = FOLLOW_US
        waves, rest = divmod(programs, 2 * cores)
        return waves * two + (two if rest > cores else one if rest else 0)

    def cost(count: int) -> float:
        """Microseconds if each is cut into this many segments."""
        parallel = follow(rows * heads * (4 * count - 6)) + output(rows * heads * count)
        return -(-chunks // count) * parallel + LAUNCH_US + (STARTS_US + (count - 2) * STEP_US if count > 2 else 0)

    best = min(range(2, min(chunks, 33)), key=cost, default=0)
    return -(-chunks // best) if best and cost(best) < chunks * output(rows * heads) else 0


@functools.cache
def _cores(device: torch.device) -> int:
    """Streaming multiprocessors, of which each holds one program of either schedule."""
    if device.type == "cpu":  # tests without a GPU
        return 132
    cores: int = torch.cuda.get_device_properties(device).multi_processor_count
    return cores
