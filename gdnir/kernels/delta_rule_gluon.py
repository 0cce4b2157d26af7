"""Gated delta rule over packed sequences on Hopper (sm_90a): bf16 or f16, K = V = 128, chunks of 64 tokens, states in
place.

With S [V,K] (f32, in registers for a whole sequence), log2 gates G summed from the chunk's start, and T = ((I + tril(
diag(beta) K K^T, -1))^-1 * exp2(G_i - G_j)) diag(beta):
  W^T  = V^T - (S K^T) exp2(G)             NV^T = W^T T^T                       (NV: the chunk's new values)
  O^T  = scale exp2(G) (S Q^T) + NV^T P^T,   P  = tril(scale exp2(G_i - G_j) Q K^T)
  S'   = exp2(G_last) S + (NV^T exp2(G_last - G)) K                             [arXiv:2412.06464, arXiv:2406.06484]
V is the M dimension of every product, so that S, W and NV enter the wgmmas as register operands.

delta_rule_gluon_prep_kernel computes T and the gates, delta_rule_gluon_kernel the rest. Between them, in `space`:
  gates f32 [chunks * HV * 256]: of (c, h) four rows of 64: G, exp2(G), exp2(G_last - G) in the order of _gate_row, and G.
  transform, of q's type, [chunks * HV * 64, 64]: T of chunk number c and head h is the tile from row (c HV + h) 64.
  starts, steps: of sequences that are cut, see delta_rule_gluon_segments.py.
  Chunk c of sequence n has the number start_n // 64 + n + c, which no other chunk has; some numbers are free.
Rows of a last chunk behind its sequence's end: zero in T, rows and columns, and G stays what it was.
Metadata is read on the device and never trusted: a bad slot or a malformed cu_seqlens must not become a bad address.
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

from .delta_rule_gluon_prep import _barrier, _clear_rows, _wait_for_primary
from .delta_rule_gluon_starts import _follow, _load_steps, _starts_at, _wait_for_steps

# What descriptors of [64, 64] tiles (16 bits, f32), and of the gates, are made with.
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WIDE_TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
LINE = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "slots", "segment", "stride_wn"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "write_slots", "has_state", "error"]


@gluon.jit
def _find_sequence(cu_seqlens, number, T, N, segment):
    """The last n in [0, N) of which a segment can have this number: start_n // (64 segment) <= number."""
    n = number * 0
    left = N
    while left > 1:
        half = left // 2
        start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + half), 0), T)
        n += gl.where(start // (64 * segment) <= number, half, 0)
        left = left - half
    return n


@gluon.jit
def _opaque_zero(c):
    """0, but the compiler cannot know it, and the clock read that makes it stays where it is written: work that uses it
    cannot be scheduled earlier. ptxas otherwise fills the gap after the first wgmma of a group with any ready work."""
    return gl.inline_asm_elementwise(
        "{ .reg .u64 t; mov.u64 t, %clock64; shr.u64 t, t, 63; cvt.u32.u64 $0, t; } // $1",
        "=r,r",
        [c],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _after(x, zero):
    return (x.to(gl.int32, bitcast=True) + zero).to(gl.float32, bitcast=True)


@gluon.jit
def _after_16(x, zero):
    """_after for numbers of 16 bits."""
    return gl.inline_asm_elementwise(
        "add.u32 $0, $1, $2; // $3", "=r,r,r,r", [x, zero], dtype=x.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _gate_row(g, ROW: gl.constexpr, ci: gl.constexpr):
    """A gate row as a vector over token columns. The value of column 8 j + 2 q + b is stored at 16 q + 2 j + b, so the 16
    values that a thread of an accumulator layout needs are contiguous: 4 loads of 16 bytes."""
    X: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], [8]],
        lane_bases=[[16], [32], [0], [0], [0]],
        warp_bases=[[0], [0]],
        block_bases=[],
        shape=[64],
    )
    x = g.slice(64 * ROW, 64).load(X).reshape([4, 8, 2]).permute((1, 0, 2)).reshape([64])
    return gl.convert_layout(x, ci, assert_trivial=True)


# A load from shared memory waits behind all wgmmas that were issued before it, and behind the wgmmas of other warps: 100-250
# cycles. So each chunk's V and gates are read while no own wgmma is queued, long before their use.
#
# Stages of shared memory go loader -> (full) -> P and chains -> (empty) -> loader. A sequence's last chunk, if it is not
# whole, goes loader -> (full[NSTG]) -> P, which clears the rows behind the end -> (full) -> as ever; V is cleared by those who
# read it, but in `single`, which has no registers for it. P also stores the chunk's O, of which only the rows before the end may be
# touched.


@gluon.jit
def _load_part(q_d, k_d, v_d, t_d, g_d, o_d, steps, sQ, sK, sV, sT, sG, full, empty, nch, tail, row0, tile0, hq, hv,
               HV: gl.constexpr, vh, NSTG: gl.constexpr, NWG: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """1 warp. Loads chunk c once chunk c - NSTG is released; the consumers left O of that chunk in its V tile, from where it
    is stored first. The generic-to-async proxy fence is here, not in the consumers, where it costs 300 cycles."""
    starts_d, steps_d, given, taken, prior, step_row = steps
    _wait_for_primary()
    _barrier()
    if CUT:
        _load_steps(starts_d, steps_d, sQ, sK, sV, given, taken, prior, step_row, vh, HV, NSTG, NWG)
    s = 0
    ph = 1
    for c in range(nch + NSTG):
        r = row0 + c * 64
        if c >= NSTG:
            mbarrier.wait(empty.index(s), ph)
            fence_async_shared()
            if c - NSTG != tail:
                for i in gl.static_range(NWG):
                    o_at = [r - 64 * NSTG, hv * 128 + (vh + i) * 64]
                    tma.async_copy_shared_to_global(o_d, o_at, sV.index(s * NWG + i))
        if c < nch:
            if CUT:
                _wait_for_steps(taken, prior, c, NWG)
            bar = full.index(gl.where(c == tail, NSTG, s))
            tile = tile0 + c * HV
            mbarrier.expect(bar, 64 * 128 * 2 * 2 + 64 * 64 * 2 * (NWG + 1) + 4 * 64 * 4)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(k_d, [r, hq * 128 + 64 * i], bar, sK.index(2 * s + i))
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(q_d, [r, hq * 128 + 64 * i], bar, sQ.index(2 * s + i))
            tma.async_copy_global_to_shared(g_d, [tile * 256], bar, sG.index(s))
            tma.async_copy_global_to_shared(t_d, [tile * 64, 0], bar, sT.index(s))
            tma.store_wait(0)
            for i in gl.static_range(NWG):
                tma.async_copy_global_to_shared(v_d, [r, hv * 128 + (vh + i) * 64], bar, sV.index(s * NWG + i))
        wrap = s == NSTG - 1
        s = gl.where(wrap, 0, s + 1)
        ph = gl.where(wrap, ph ^ 1, ph)
    tma.store_wait(0)


@gluon.jit
def _p_chunk(sQ, sK, sG, sP, full, empty, pfull, c, s, ph, i, z, rr, cc, lscale,
             NSTG: gl.constexpr, NP: gl.constexpr, EARLY: gl.constexpr, ri: gl.constexpr, ci: gl.constexpr):  # fmt: skip
    mbarrier.wait(full.index(s), ph)
    g = sG.index(s)
    if EARLY:
        gr = g.slice(192, 64).load(ri)
        gc = _gate_row(g, 0, ci)
    P = warpgroup_mma(sQ.index(2 * s), sK.index(2 * s).permute((1, 0)), z, use_acc=False, is_async=True)
    P = warpgroup_mma(sQ.index(2 * s + 1), sK.index(2 * s + 1).permute((1, 0)), P, is_async=True)
    if EARLY:
        # (c >> 26 is 0: it keeps 32 compare results from being hoisted into registers)
        gr = gr + _after(lscale, _opaque_zero(c))
        mask = (rr + (c >> 26))[:, None] >= cc[None, :]
        e = gl.exp2(gl.where(mask, gr[:, None] - gc[None, :], float("-inf")))
    # P(c - NP) has been used once chunk c - NP is released
    back = s < NP
    mbarrier.wait(empty.index(gl.where(back, s + NSTG - NP, s - NP)), gl.where(back, ph ^ 1, ph), pred=c >= NP)
    if not EARLY:
        gr = g.slice(192, 64).load(ri) + lscale
        mask = (rr + (c >> 26))[:, None] >= cc[None, :]
        e = gl.exp2(gl.where(mask, gr[:, None] - _gate_row(g, 0, ci)[None, :], float("-inf")))
    P = warpgroup_mma_wait(0, [P])
    sP.index(i).store((P * e).to(sP.dtype))
    fence_async_shared()
    _barrier()
    mbarrier.arrive(pfull.index(i), count=1)


@gluon.jit
def _p_part(sQ, sK, sV, sG, sP, full, empty, pfull, whole, left, o_ptr, lscale, HV: gl.constexpr,
            NSTG: gl.constexpr, NP: gl.constexpr, NWG: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """1 warpgroup: P of every chunk, ahead of the consumers and off their chain. EARLY: read the gates before the wgmmas are
    queued and form the decay while they run (needs 100 registers; otherwise 72 do)"""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ri: gl.constexpr = gl.SliceLayout(1, L)
    ci: gl.constexpr = gl.SliceLayout(0, L)
    z = gl.zeros([64, 64], gl.float32, L)
    rr = gl.arange(0, 64, ri)
    cc = gl.arange(0, 64, ci)
    _barrier()
    s = 0
    ph = 0
    i = 0
    for c in range(whole):
        _p_chunk(sQ, sK, sG, sP, full, empty, pfull, c, s, ph, i, z, rr, cc, lscale, NSTG, NP, EARLY, ri, ci)
        wrap = s == NSTG - 1
        s = gl.where(wrap, 0, s + 1)
        ph = gl.where(wrap, ph ^ 1, ph)
        i = gl.where(i == NP - 1, 0, i + 1)
    if left > 0:
        B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = gl.arange(0, 64, gl.SliceLayout(1, B))[:, None]
        mbarrier.wait(full.index(NSTG), 0)
        for j in gl.static_range(2):
            _clear_rows(sK.index(2 * s + j), left, B)
            _clear_rows(sQ.index(2 * s + j), left, B)
        if NWG == 1:
            _clear_rows(sV.index(s), left, B)
        fence_async_shared()
        _barrier()
        mbarrier.arrive(full.index(s), count=1)
        _p_chunk(sQ, sK, sG, sP, full, empty, pfull, whole, s, ph, i, z, rr, cc, lscale, NSTG, NP, EARLY, ri, ci)
        mbarrier.wait(empty.index(s), ph)
        at = row * (HV * 128) + gl.arange(0, 64, gl.SliceLayout(0, B))[None, :]
        for j in gl.static_range(NWG):
            gl.store(o_ptr + 64 * j + at, sV.index(s * NWG + j).load(B), mask=row < left)


@gluon.jit
def _clear_columns(tile, ending, L: gl.constexpr):
    """Zeros behind the first `ending` columns of a tile [V, tokens]: they are the next sequence's, of which even a NaN must not
    matter. In the layout in which it is read, so that each thread clears for itself; compared only now, to hold no registers."""
    column = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :] + _opaque_zero(ending)
    tile.store(gl.where(column < ending, tile.load(L), gl.zeros([64, 64], tile.dtype, L)))


@gluon.jit
def _load_rows(ends, rows, columns, WG: gl.constexpr, VS: gl.constexpr, KS: gl.constexpr, CUT: gl.constexpr):
    """Some of the 64 rows of the state with which warpgroup WG starts, f32."""
    h0_ptr, ht_ptr, start_ptr, stateful, stored, started = ends
    if CUT:
        _wait_for_primary()
        if started:
            S = gl.load(start_ptr + (WG * 64 + rows) * 128 + columns)
        else:
            S = gl.load(h0_ptr + (WG * 64 + rows) * VS + columns * KS, mask=stateful, other=0.0).to(gl.float32)
    else:
        S = gl.load(h0_ptr + (WG * 64 + rows) * VS + columns * KS, mask=stateful, other=0.0).to(gl.float32)
    return S


@gluon.jit
def _store_rows(ends, S, rows, columns, WG: gl.constexpr, VS: gl.constexpr, KS: gl.constexpr):
    h0_ptr, ht_ptr, start_ptr, stateful, stored, started = ends
    gl.store(ht_ptr + (WG * 64 + rows) * VS + columns * KS, S.to(ht_ptr.dtype.element_ty), mask=stored)


@gluon.jit
def _single_part(ends, steps, sQ, sK, sV, sT, sG, sP, full, empty, pfull, nch, scale,
                 WG: gl.constexpr, NWG: gl.constexpr, NSTG: gl.constexpr, NP: gl.constexpr,
                 VS: gl.constexpr, KS: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """1 warpgroup, 64 rows of V, scheduled for latency. The state is kept in two halves of K (S0, S1), so that one is rounded
    to 16 bits while the other is updated; the loop starts where NV is ready and no wgmma is in flight, and every group of wgmmas
    has other work in its shadow: O1 scaling and P NV under the state update, O's epilogue under S K^T, S scaling under NV."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L, k_width=2)
    ci: gl.constexpr = gl.SliceLayout(0, L)
    rs: gl.constexpr = gl.SliceLayout(1, L)
    rows = gl.arange(0, 64, rs)[:, None]
    columns = gl.arange(0, 64, ci)[None, :]
    S0 = _load_rows(ends, rows, columns, WG, VS, KS, CUT)
    S1 = _load_rows(ends, rows, columns + 64, WG, VS, KS, CUT)
    z = gl.zeros([64, 64], gl.float32, L)
    _barrier()
    if CUT:
        starts_d, steps_d, given, taken, prior, step_row = steps
        S0, S1 = _follow(S0, S1, starts_d, steps_d, sQ, sK, sV, given, taken, prior, WG, NWG, NSTG, L, A)
    if nch == 0:
        _store_rows(ends, S0, rows, columns, WG, VS, KS)
        _store_rows(ends, S1, rows, columns + 64, WG, VS, KS)
    else:
        # chunk 0 up to NV. pfull says that P is there, and so that the whole chunk is.
        g = sG.index(0)
        mbarrier.wait(pfull.index(0), 0)
        _barrier()  # as before every other chunk's V; compute-sanitizer sees that P's warps, which may have cleared it, are done
        v = sV.index(WG).permute((1, 0)).load(L)
        e = _gate_row(g, 1, ci)[None, :]
        glast = g.slice(127, 1).load(rs)[:, None]
        d = _gate_row(g, 2, ci)[None, :]
        B0 = gl.convert_layout(S0.to(sV.dtype), A)
        B1 = gl.convert_layout(S1.to(sV.dtype), A)
        SK = warpgroup_mma(B0, sK.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
        SK = warpgroup_mma(B1, sK.index(1).permute((1, 0)), SK, is_async=True)
        O1 = warpgroup_mma(B0, sQ.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
        O1 = warpgroup_mma(B1, sQ.index(1).permute((1, 0)), O1, is_async=True)
        S0 = S0 * glast
        S1 = S1 * glast
        SK = warpgroup_mma_wait(2, [SK])
        W = gl.convert_layout((v.to(gl.float32) - SK * e).to(sV.dtype), A)
        NV = warpgroup_mma(W, sT.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
        mbarrier.wait(pfull.index(1), 0, pred=nch > 1)
        NV, O1 = warpgroup_mma_wait(0, [NV, O1])
        _barrier()
        s = 0
        s1 = 1
        i = 0
        i1 = 1
        i2 = 2
        pph = 0
        for c in range(nch - 1):
            # read what chunk c+1 needs while no wgmma is queued
            g = sG.index(s1)
            v1 = sV.index(s1 * NWG + WG).permute((1, 0)).load(L)
            e1 = _gate_row(g, 1, ci)[None, :]
            glast = g.slice(127, 1).load(rs)[:, None]
            # state update of chunk c
            NVd = gl.convert_layout((NV * d).to(sV.dtype), A)
            S0 = warpgroup_mma(NVd, sK.index(2 * s), S0, is_async=True)
            S1 = warpgroup_mma(NVd, sK.index(2 * s + 1), S1, is_async=True)
            es = e * _after(scale, _opaque_zero(c))
            O1, NV = warpgroup_mma_wait(2, [O1, NV])
            NVb = gl.convert_layout(NV.to(sV.dtype), A)
            O = warpgroup_mma(NVb, sP.index(i).permute((1, 0)), O1 * es, is_async=True)
            # S K^T and S Q^T of chunk c+1
            S0 = warpgroup_mma_wait(2, [S0])
            B0 = gl.convert_layout(S0.to(sV.dtype), A)
            SK = warpgroup_mma(B0, sK.index(2 * s1).permute((1, 0)), z, use_acc=False, is_async=True)
            S1 = warpgroup_mma_wait(2, [S1])
            B1 = gl.convert_layout(S1.to(sV.dtype), A)
            SK = warpgroup_mma(B1, sK.index(2 * s1 + 1).permute((1, 0)), SK, is_async=True)
            O1 = warpgroup_mma(B0, sQ.index(2 * s1).permute((1, 0)), z, use_acc=False, is_async=True)
            O1 = warpgroup_mma(B1, sQ.index(2 * s1 + 1).permute((1, 0)), O1, is_async=True)
            e = e1
            # O of chunk c leaves through its V tile; then its stage is free
            O = warpgroup_mma_wait(4, [O])
            sV.index(s * NWG + WG).permute((1, 0)).store(O.to(sV.dtype))
            _barrier()
            mbarrier.arrive(empty.index(s), count=1)
            _barrier()
            v1 = _after_16(v1, _opaque_zero(c))
            SK = warpgroup_mma_wait(2, [SK])
            d = _gate_row(g, 2, ci)[None, :]
            W = gl.convert_layout((v1.to(gl.float32) - SK * e).to(sV.dtype), A)
            NV = warpgroup_mma(W, sT.index(s1).permute((1, 0)), z, use_acc=False, is_async=True)
            glast = _after(glast, _opaque_zero(c))
            S0 = S0 * glast
            S1 = S1 * glast
            mbarrier.wait(pfull.index(i2), pph, pred=c + 2 < nch)
            NV, O1 = warpgroup_mma_wait(0, [NV, O1])
            s = s1
            s1 = gl.where(s1 == NSTG - 1, 0, s1 + 1)
            i = i1
            i1 = i2
            wrap = i2 == NP - 1
            i2 = gl.where(wrap, 0, i2 + 1)
            pph = gl.where(wrap, pph ^ 1, pph)
        NVd = gl.convert_layout((NV * d).to(sV.dtype), A)
        S0 = warpgroup_mma(NVd, sK.index(2 * s), S0, is_async=True)
        S1 = warpgroup_mma(NVd, sK.index(2 * s + 1), S1, is_async=True)
        O1, NV = warpgroup_mma_wait(2, [O1, NV])
        NVb = gl.convert_layout(NV.to(sV.dtype), A)
        O = warpgroup_mma(NVb, sP.index(i).permute((1, 0)), O1 * (e * scale), is_async=True)
        S0 = warpgroup_mma_wait(2, [S0])
        _store_rows(ends, S0, rows, columns, WG, VS, KS)
        S1 = warpgroup_mma_wait(1, [S1])
        _store_rows(ends, S1, rows, columns + 64, WG, VS, KS)
        O = warpgroup_mma_wait(0, [O])
        sV.index(s * NWG + WG).permute((1, 0)).store(O.to(sV.dtype))
        _barrier()
        mbarrier.arrive(empty.index(s), count=1)


@gluon.jit
def _pair_part(ends, steps, sQ2, sK2, sV, sT, sG, sP, full, empty, pfull, nch, ending, scale,
               WG: gl.constexpr, NWG: gl.constexpr, NSTG: gl.constexpr, NP: gl.constexpr,
               VS: gl.constexpr, KS: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    """1 of 2 warpgroups, 64 rows of V, scheduled for few registers (208): the other one fills the tensor cores meanwhile"""
    L64: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    L128: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    A64: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L64, k_width=2)
    A128: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=L128, k_width=2)
    ci: gl.constexpr = gl.SliceLayout(0, L64)
    rs: gl.constexpr = gl.SliceLayout(1, L128)
    # two 64 x 64 tiles side by side are one 64 x 128 tile
    sQ = sQ2._reinterpret(sQ2.dtype, [NSTG, 64, 128], sQ2.layout)
    sK = sK2._reinterpret(sK2.dtype, [NSTG, 64, 128], sK2.layout)
    rows = gl.arange(0, 64, rs)[:, None]
    columns = gl.arange(0, 128, gl.SliceLayout(0, L128))[None, :]
    z = gl.zeros([64, 64], gl.float32, L64)
    if CUT:
        starts_d, steps_d, given, taken, prior, step_row = steps
        half_rows = gl.arange(0, 64, gl.SliceLayout(1, L64))[:, None]
        half_columns = gl.arange(0, 64, ci)[None, :]
        S0 = _load_rows(ends, half_rows, half_columns, WG, VS, KS, CUT)
        S1 = _load_rows(ends, half_rows, half_columns + 64, WG, VS, KS, CUT)
        _barrier()
        S0, S1 = _follow(S0, S1, starts_d, steps_d, sQ2, sK2, sV, given, taken, prior, WG, NWG, NSTG, L64, A64)
        S = gl.join(S0, S1).permute((0, 2, 1)).reshape([64, 128])
        S = gl.convert_layout(S, L128, assert_trivial=True)
    else:
        S = _load_rows(ends, rows, columns, WG, VS, KS, CUT)
        _barrier()
    s = 0
    ph = 0
    i = 0
    pph = 0
    for c in range(nch):
        g = sG.index(s)
        k_s = sK.index(s)
        o_s = sV.index(s * NWG + WG).permute((1, 0))
        mbarrier.wait(full.index(s), ph)
        if c + 1 == nch:
            _clear_columns(o_s, ending, L64)
        v = o_s.load(L64)
        e = _gate_row(g, 1, ci)[None, :]
        glast = g.slice(127, 1).load(rs)[:, None]
        Sb = gl.convert_layout(S.to(sV.dtype), A64)
        SK = warpgroup_mma(Sb, k_s.permute((1, 0)), z, use_acc=False, is_async=True)
        O = warpgroup_mma(Sb, sQ.index(s).permute((1, 0)), z, use_acc=False, is_async=True)
        SK = warpgroup_mma_wait(1, [SK])
        W = gl.convert_layout((v.to(gl.float32) - SK * e).to(sV.dtype), A64)
        NV = warpgroup_mma(W, sT.index(s).permute((1, 0)), z, use_acc=False, is_async=True)
        S = S * _after(glast, _opaque_zero(c))
        mbarrier.wait(pfull.index(i), pph)
        d = _gate_row(g, 2, ci)[None, :]
        O = warpgroup_mma_wait(1, [O])
        O = O * (_gate_row(g, 1, ci)[None, :] * scale)
        NV = warpgroup_mma_wait(0, [NV])
        NVb = gl.convert_layout(NV.to(sV.dtype), A64)
        O = warpgroup_mma(NVb, sP.index(i).permute((1, 0)), O, is_async=True)
        NVd = gl.convert_layout((NV * d).to(sV.dtype), A128)
        S = warpgroup_mma(NVd, k_s, S, is_async=True)
        # O leaves through the V tile
        O = warpgroup_mma_wait(1, [O])
        o_s.store(O.to(sV.dtype))
        S = warpgroup_mma_wait(0, [S])
        _barrier()
        mbarrier.arrive(empty.index(s), count=1)
        wrap = s == NSTG - 1
        s = gl.where(wrap, 0, s + 1)
        ph = gl.where(wrap, ph ^ 1, ph)
        wrap = i == NP - 1
        i = gl.where(wrap, 0, i + 1)
        pph = gl.where(wrap, pph ^ 1, pph)
    _store_rows(ends, S, rows, columns, WG, VS, KS)


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_gluon_kernel(
    q_d,
    k_d,
    v_d,
    o_d,
    t_d,
    g_d,
    starts_d,
    steps_d,
    o,
    state,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    space,
    T,
    N,
    S,
    slots,
    segment,
    stride_s,
    stride_sh,
    stride_wn,
    scale,
    lscale,
    H: gl.constexpr,
    HV: gl.constexpr,
    VS: gl.constexpr,
    KS: gl.constexpr,
    NWG: gl.constexpr,
    NSTG: gl.constexpr,
    RC: gl.constexpr,
    RP: gl.constexpr,
    EARLY: gl.constexpr,
    CUT: gl.constexpr,
):
    """One sequence and head. NWG = 1: a CTA owns 64 of its 128 V rows. NWG = 2: all of them, in two warpgroups that share the
    tiles of Q, K, T and P (40 % less traffic into the SM). N HV (2 / NWG) programs. CUT: sequences of more than `segment` chunks
    are in segments, of which each finds its start; there are `slots` HV (2 / NWG) programs more.

    q_d .. steps_d are descriptors with boxes of 64 x 64 (g_d: 256) over q, k [T, H 128], v, o [T, HV 128], transform, gates, and of
    rows of 128, starts and steps; state [S,HV,128,128] is read and written through its strides (VS and KS of the last two).
    lscale is log2(scale).
    """
    NP: gl.constexpr = 3
    SPLIT: gl.constexpr = 2 // NWG
    pid = gl.program_id(0)
    vh = pid % SPLIT
    unit = pid // SPLIT
    hv = unit % HV
    n = unit // HV
    if CUT:  # behind the sequences, and first segments, are the other segments, by number of slot
        number = gl.maximum(n - N, 0)
        later = n >= N
        n = gl.where(later, _find_sequence(cu_seqlens, number, T, N, segment), n)
    hq = hv // (HV // H)
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + 1), start), T)
    read = gl.load(read_slots + n)
    write = gl.load(write_slots + n.to(gl.int64) * stride_wn)
    live = (read >= 0) & (read < S)
    stateful = live & (gl.load(has_state + n) != 0)
    # chunks, of which the program has first .. last - 1
    chunks = gl.where(live, (end - start + 63) // 64, 0)
    first = chunks * 0
    last = chunks
    started = live & False
    prior = chunks * 0  # segments between the first one and the program's
    step_row = prior
    if CUT:
        begin = start // (64 * segment)
        ahead = (number - begin + 1) * segment
        first = gl.where(later, gl.where((chunks > segment) & (ahead > 0) & (ahead < chunks), ahead, chunks), 0)
        last = gl.minimum(first + segment, chunks)
        started = (chunks > segment) & (first < chunks)
        prior = gl.where(later & started, number - begin, 0)
        step_row = (begin * HV + hv) * 128
        live = live & (last == chunks) & ((later == 0) | started)
    stored = live & (write >= 0) & (write < S)
    nch = last - first
    row0 = start + first * 64
    # whole chunks, tokens in one more, which of them is not whole (-1: none), tokens in the last one
    left = gl.where((last == chunks) & (nch > 0), (end - start) % 64, 0)
    whole = nch - (left > 0).to(gl.int32)
    tail = gl.where(left > 0, whole, -1)
    ending = gl.where(left > 0, left, 64)
    tile0 = (start // 64 + n + first) * HV + hv
    sQ = gl.allocate_shared_memory(k_d.dtype, [NSTG * 2, 64, 64], k_d.layout)
    sK = gl.allocate_shared_memory(k_d.dtype, [NSTG * 2, 64, 64], k_d.layout)
    sV = gl.allocate_shared_memory(k_d.dtype, [NSTG * NWG, 64, 64], v_d.layout)
    sT = gl.allocate_shared_memory(k_d.dtype, [NSTG, 64, 64], v_d.layout)
    sG = gl.allocate_shared_memory(gl.float32, [NSTG, 256], g_d.layout)
    sP = gl.allocate_shared_memory(k_d.dtype, [NP, 64, 64], v_d.layout)
    full = gl.allocate_shared_memory(gl.int64, [NSTG + 1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NSTG, 1], mbarrier.MBarrierLayout())
    pfull = gl.allocate_shared_memory(gl.int64, [NP, 1], mbarrier.MBarrierLayout())
    given = full
    taken = empty
    if CUT:  # never beside it: what is handed to the partitions would be put where a barrier, that none waits for, just began
        given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(given.index(i), count=1)
            mbarrier.init(taken.index(i), count=NWG)
    for i in gl.static_range(NSTG + 1):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(NSTG):
        mbarrier.init(empty.index(i), count=NWG)
    for i in gl.static_range(NP):
        mbarrier.init(pfull.index(i), count=1)
    fence_async_shared()
    _barrier()
    head = state + hv.to(gl.int64) * stride_sh + vh * 64 * VS
    h0 = head + gl.where(stateful, read, 0).to(gl.int64) * stride_s
    ht = head + gl.where(stored, write, 0).to(gl.int64) * stride_s
    start_ptr = space
    if CUT:
        slot = gl.where(started, gl.where(later, begin, slots + begin), 0)
        start_ptr += _starts_at(T, N, HV) + (slot.to(gl.int64) * HV + hv) * 16384 + vh * 8192
    ends = (h0, ht, start_ptr, stateful, stored, started)
    steps = (starts_d, steps_d, given, taken, prior, step_row)
    o_tail = o + ((row0 + whole * 64).to(gl.int64) * HV + hv) * 128 + vh * 64
    if NWG == 1:
        gl.warp_specialize([
            (_single_part, (ends, steps, sQ, sK, sV, sT, sG, sP, full, empty, pfull, nch, scale, 0, NWG, NSTG, NP, VS, KS, CUT)),
            (_p_part, (sQ, sK, sV, sG, sP, full, empty, pfull, whole, left, o_tail, lscale, HV, NSTG, NP, NWG, EARLY)),
            (_load_part, (q_d, k_d, v_d, t_d, g_d, o_d, steps, sQ, sK, sV, sT, sG, full, empty, nch, tail, row0, tile0,
                          hq, hv, HV, vh, NSTG, NWG, CUT)),
        ], [4, 1], [RP, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_pair_part, (ends, steps, sQ, sK, sV, sT, sG, sP, full, empty, pfull, nch, ending, scale, 0, NWG, NSTG, NP, VS, KS, CUT)),
            (_pair_part, (ends, steps, sQ, sK, sV, sT, sG, sP, full, empty, pfull, nch, ending, scale, 1, NWG, NSTG, NP, VS, KS, CUT)),
            (_p_part, (sQ, sK, sV, sG, sP, full, empty, pfull, whole, left, o_tail, lscale, HV, NSTG, NP, NWG, EARLY)),
            (_load_part, (q_d, k_d, v_d, t_d, g_d, o_d, steps, sQ, sK, sV, sT, sG, full, empty, nch, tail, row0, tile0,
                          hq, hv, HV, vh, NSTG, NWG, CUT)),
        ], [4, 4, 1], [RC, RP, 24])  # fmt: skip
