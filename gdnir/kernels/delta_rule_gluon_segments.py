"""What the segments of long sequences do to a state, in the chunked gated delta rule on Hopper.

A segment takes a state S to S M + H: H is its end from zero and M (K x K) that of the identity with V = 0. So all segments
but the last are followed at the same time, without their outputs; delta_rule_gluon_kernel finds each start by these steps
(delta_rule_gluon_starts.py). M, whose entries are at most 1 for unit keys, is rounded to f16: in bf16 the states of 8 segments of
identical keys without decay would be wrong by 7e-3 instead of 2e-3.

A sequence of more than `segment` chunks is cut. Its segment j + 1 has the slot start // (64 segment) + j, of which there are
T // (64 segment): one less than segments, so that no two sequences' meet. Behind the gates and T of delta_rule_gluon.py:
  starts f32 [2 slots,HV,V,K]: the end of the first segment and H of the next ones; from [slots] on, at a sequence's first
    slot, where its first segment starts: the pool's slot may be overwritten by the last one.
  steps f16 [slots,HV,K,K]: M of the segment before a slot's.
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

from .delta_rule_gluon import _find_sequence, _gate_row
from .delta_rule_gluon_prep import _barrier, _launch_dependents, _wait_for_primary
from .delta_rule_gluon_starts import _starts_at

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "slots", "segment"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "has_state"]


@gluon.jit
def _summary_load(k_d, v_d, t_d, g_d, sK, sV, sT, sG, full, empty, nch, row0, tile0, hq, hv, vh,
                  HV: gl.constexpr, NSTG: gl.constexpr):  # fmt: skip
    """1 warp."""
    _wait_for_primary()
    _barrier()
    s = 0
    ph = 1
    for c in range(nch):
        mbarrier.wait(empty.index(s), ph, pred=c >= NSTG)
        bar = full.index(s)
        r = row0 + c * 64
        tile = tile0 + c * HV
        mbarrier.expect(bar, 64 * 64 * 2 * 4 + 4 * 64 * 4)
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(k_d, [r, hq * 128 + 64 * i], bar, sK.index(2 * s + i))
        tma.async_copy_global_to_shared(g_d, [tile * 256], bar, sG.index(s))
        tma.async_copy_global_to_shared(v_d, [r, hv * 128 + vh * 64], bar, sV.index(s))
        tma.async_copy_global_to_shared(t_d, [tile * 64, 0], bar, sT.index(s))
        wrap = s == NSTG - 1
        s = gl.where(wrap, 0, s + 1)
        ph = gl.where(wrap, ph ^ 1, ph)


@gluon.jit
def _summary_chain(h0_ptr, stateful, copy_ptr, starts_d, steps_d, row, kind, active, vh, sK, sV, sT, sG, full, empty, nch,
                   VS: gl.constexpr, KS: gl.constexpr, NSTG: gl.constexpr):  # fmt: skip
    """1 warpgroup, 64 rows: S through all chunks, without outputs; in two halves of K as in delta_rule_gluon_kernel."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    ci: gl.constexpr = gl.SliceLayout(0, L)
    rs: gl.constexpr = gl.SliceLayout(1, L)
    rows = gl.arange(0, 64, rs)[:, None]
    columns = gl.arange(0, 64, ci)[None, :]
    step = kind == 2
    S0 = gl.load(h0_ptr + rows * VS + columns * KS, mask=stateful, other=0.0).to(gl.float32)
    S1 = gl.load(h0_ptr + rows * VS + (columns + 64) * KS, mask=stateful, other=0.0).to(gl.float32)
    gl.store(copy_ptr + rows * 128 + columns, S0, mask=active & (kind == 0))
    gl.store(copy_ptr + rows * 128 + columns + 64, S1, mask=active & (kind == 0))
    S0 = gl.where(step & (rows + vh * 64 == columns), 1.0, S0)
    S1 = gl.where(step & (rows + vh * 64 == columns + 64), 1.0, S1)
    z = gl.zeros([64, 64], gl.float32, L)
    _barrier()
    s = 0
    ph = 0
    for _ in range(nch):
        g = sG.index(s)
        mbarrier.wait(full.index(s), ph)
        v = gl.where(step, 0.0, sV.index(s).permute((1, 0)).load(L).to(gl.float32))
        e = _gate_row(g, 1, ci)[None, :]
        d = _gate_row(g, 2, ci)[None, :]
        fade = g.slice(127, 1).load(rs)[:, None]
        B0 = gl.convert_layout(S0.to(sK.dtype), A)
        B1 = gl.convert_layout(S1.to(sK.dtype), A)
        SK = warpgroup_mma(B0, sK.index(2 * s).permute((1, 0)), z, use_acc=False, is_async=True)
        SK = warpgroup_mma(B1, sK.index(2 * s + 1).permute((1, 0)), SK, is_async=True)
        S0 = S0 * fade
        S1 = S1 * fade
        SK = warpgroup_mma_wait(0, [SK])
        W = gl.convert_layout((v - SK * e).to(sK.dtype), A)
        NV = warpgroup_mma(W, sT.index(s).permute((1, 0)), z, use_acc=False, is_async=True)
        NV = warpgroup_mma_wait(0, [NV])
        NV = gl.convert_layout((NV * d).to(sK.dtype), A)
        S0 = warpgroup_mma(NV, sK.index(2 * s), S0, is_async=True)
        S1 = warpgroup_mma(NV, sK.index(2 * s + 1), S1, is_async=True)
        S0, S1 = warpgroup_mma_wait(0, [S0, S1])
        _barrier()
        mbarrier.arrive(empty.index(s), count=1)
        wrap = s == NSTG - 1
        s = gl.where(wrap, 0, s + 1)
        ph = gl.where(wrap, ph ^ 1, ph)
    # Out through the stages of the keys: an accumulator stored as it lies takes eight lines of memory for 256 bytes.
    if active:
        if step:
            out = sK._reinterpret(steps_d.dtype, [NSTG * 2, 64, 64], steps_d.layout)
            out.index(0).store(S0.to(steps_d.dtype))
            out.index(1).store(S1.to(steps_d.dtype))
            fence_async_shared()
            _barrier()
            for i in gl.static_range(2):
                tma.async_copy_shared_to_global(steps_d, [row, 64 * i], out.index(i))
        else:
            wide = sK._reinterpret(gl.float32, [NSTG, 64, 64], starts_d.layout)
            wide.index(0).store(S0)
            wide.index(1).store(S1)
            fence_async_shared()
            _barrier()
            for i in gl.static_range(2):
                tma.async_copy_shared_to_global(starts_d, [row, 64 * i], wide.index(i))
        tma.store_wait(0)


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_gluon_summary_kernel(
    k_d,
    v_d,
    t_d,
    g_d,
    starts_d,
    steps_d,
    state,
    space,
    cu_seqlens,
    read_slots,
    has_state,
    T,
    N,
    S,
    slots,
    segment,
    stride_s,
    stride_sh,
    H: gl.constexpr,
    HV: gl.constexpr,
    VS: gl.constexpr,
    KS: gl.constexpr,
    NSTG: gl.constexpr,
):
    """64 of 128 rows of a first segment's end (2 N HV programs), or of H or M of one in the middle (4 slots HV programs).
    Operands as in delta_rule_gluon_kernel."""
    _launch_dependents()
    pid = gl.program_id(0)
    vh = pid % 2
    hv = pid // 2 % HV
    unit = pid // (2 * HV)
    main = unit < N
    behind = gl.maximum(unit - N, 0)
    kind = gl.where(main, 0, behind % 2 + 1)  # 1: H, 2: M
    number = behind // 2
    n = gl.where(main, unit, _find_sequence(cu_seqlens, number, T, N, segment))
    hq = hv // (HV // H)
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + 1), start), T)
    read = gl.load(read_slots + n)
    live = (read >= 0) & (read < S)
    chunks = gl.where(live, (end - start + 63) // 64, 0)
    begin = start // (64 * segment)
    # H and M of the segment before this slot's; the first one's end is the end of the first segment.
    ahead = gl.where(main, 0, (number - begin) * segment)
    active = (chunks > segment) & (main | (ahead > 0)) & (ahead + segment < chunks)
    nch = gl.where(active, segment, 0)
    row0 = start + ahead * 64
    tile0 = (start // 64 + n + ahead) * HV + hv
    slot = gl.where(active, gl.where(main, begin, number), 0).to(gl.int64) * HV + hv
    stateful = active & main & (gl.load(has_state + n) != 0)
    h0_ptr = state + gl.where(stateful, read, 0).to(gl.int64) * stride_s + hv.to(gl.int64) * stride_sh + vh * 64 * VS
    copy_ptr = space + _starts_at(T, N, HV) + (slot + slots.to(gl.int64) * HV) * 16384 + vh * 8192
    row = slot.to(gl.int32) * 128 + vh * 64
    sK = gl.allocate_shared_memory(k_d.dtype, [NSTG * 2, 64, 64], k_d.layout)
    sV = gl.allocate_shared_memory(k_d.dtype, [NSTG, 64, 64], v_d.layout)
    sT = gl.allocate_shared_memory(k_d.dtype, [NSTG, 64, 64], v_d.layout)
    sG = gl.allocate_shared_memory(gl.float32, [NSTG, 256], g_d.layout)
    full = gl.allocate_shared_memory(gl.int64, [NSTG, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NSTG, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NSTG):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    _barrier()
    gl.warp_specialize([
        (_summary_chain, (h0_ptr, stateful, copy_ptr, starts_d, steps_d, row, kind, active, vh, sK, sV, sT, sG, full, empty, nch,
                          VS, KS, NSTG)),
        (_summary_load, (k_d, v_d, t_d, g_d, sK, sV, sT, sG, full, empty, nch, row0, tile0, hq, hv, vh, HV, NSTG)),
    ], [1], [24])  # fmt: skip
