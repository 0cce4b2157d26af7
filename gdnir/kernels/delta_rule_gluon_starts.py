"""Where the segments of a cut sequence start, in the chunked gated delta rule on Hopper: S' = S M + H, from one to the next.

H is a segment's end from zero and M that of the identity with V = 0. M is rounded to bf16, whose error fades with what it
multiplies, and S is taken in two parts of bf16: what is carried over all segments is f32.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .delta_rule_gluon_prep import _barrier, _launch_dependents, _wait_for_primary

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "SEGMENT", "CUT"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots"]


@gluon.jit
def _load_step(steps_d, row, bar, sM, s):
    mbarrier.expect(bar, 4 * 64 * 64 * 2)
    for i in gl.static_range(4):  # rows, columns
        tma.async_copy_global_to_shared(steps_d, [row + (i // 2) * 64, (i % 2) * 64], bar, sM.index(s * 4 + i))


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_gluon_starts_kernel(
    steps_d,
    starts,
    cu_seqlens,
    read_slots,
    T,
    N,
    S,
    SEGMENT,
    CUT,
    HV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """64 of the 128 rows of one cut sequence and head. 2 N HV programs.

    starts f32 [slots,HV,128,128]: the end of the first segment and each next one's H; then each segment's start. steps_d: a
    descriptor with boxes of 64 x 64 over M, bf16 [slots,HV,128,128]. Slots as in delta_rule_gluon.py.
    """
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    _launch_dependents()
    pid = gl.program_id(0)
    half = pid % 2
    h = pid // 2 % HV
    n = pid // 2 // HV
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + 1), start), T)
    read = gl.load(read_slots + n)
    chunks = (end - start + 63) // 64
    begin = start // (64 * SEGMENT)
    # The last segment ends in the pool, and needs no slot; the first slot is a start as it is.
    slots = (chunks + SEGMENT - 1) // SEGMENT - 1
    slots = gl.where((chunks > CUT) & (read >= 0) & (read < S), slots, 0)
    sM = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, 64, 64], steps_d.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    _barrier()
    _wait_for_primary()
    if slots > 1:
        row0 = (begin * HV + h) * 128
        for i in gl.static_range(STAGES):
            if i + 1 < slots:
                _load_step(steps_d, row0 + (i + 1) * HV * 128, full.index(i), sM, i)
        rows = gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
        columns = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :]
        at = starts + (begin.to(gl.int64) * HV + h) * 16384 + half * 8192 + rows * 128 + columns
        S0, S1 = gl.load(at), gl.load(at + 64)
        at += HV * 16384
        H0, H1 = gl.load(at), gl.load(at + 64)
        s = 0
        ph = 0
        for j in range(1, slots):
            upper0, upper1 = S0.to(gl.bfloat16), S1.to(gl.bfloat16)
            lower0 = gl.convert_layout((S0 - upper0.to(gl.float32)).to(gl.bfloat16), A)
            lower1 = gl.convert_layout((S1 - upper1.to(gl.float32)).to(gl.bfloat16), A)
            upper0, upper1 = gl.convert_layout(upper0, A), gl.convert_layout(upper1, A)
            mbarrier.wait(full.index(s), ph)
            M = s * 4
            S0 = warpgroup_mma(upper0, sM.index(M), H0, is_async=True)
            S0 = warpgroup_mma(upper1, sM.index(M + 2), S0, is_async=True)
            S0 = warpgroup_mma(lower0, sM.index(M), S0, is_async=True)
            S0 = warpgroup_mma(lower1, sM.index(M + 2), S0, is_async=True)
            S1 = warpgroup_mma(upper0, sM.index(M + 1), H1, is_async=True)
            S1 = warpgroup_mma(upper1, sM.index(M + 3), S1, is_async=True)
            S1 = warpgroup_mma(lower0, sM.index(M + 1), S1, is_async=True)
            S1 = warpgroup_mma(lower1, sM.index(M + 3), S1, is_async=True)
            after = at + HV * 16384  # the next H, while the products run
            H0 = gl.load(after, mask=j + 1 < slots, other=0.0)
            H1 = gl.load(after + 64, mask=j + 1 < slots, other=0.0)
            S0, S1 = warpgroup_mma_wait(0, [S0, S1])
            gl.store(at, S0)
            gl.store(at + 64, S1)
            at = after
            _barrier()  # all warps have read M
            if j + STAGES < slots:
                _load_step(steps_d, row0 + (j + STAGES) * HV * 128, full.index(s), sM, s)
            wrap = s == STAGES - 1
            s = gl.where(wrap, 0, s + 1)
            ph = gl.where(wrap, ph ^ 1, ph)
