"""Where a segment starts, in the carry of the chunked gated delta rule on Hopper: S is the end of its sequence's first segment, and each
segment between takes it to S M + H, of which delta_rule_gluon_segments.py has computed M and H.

Every program goes through all steps before its own segment, of 32 KB of M and 32 KB of H for 64 rows of V, out of the L2 cache. A
kernel in between, that does each step once, would be a launch more and no sooner at the last segment.

M is f16, and S is multiplied in two parts of f16, its rows scaled by powers of two: so what is carried over all segments is f32.

The steps come through stages that no chunk needs yet: M in their tiles of Q, H in those of K, and for a second warpgroup of V. One
warpgroup has two buffers of two stages, of which the last step takes the second, so that the first chunks come meanwhile. Two have
one buffer, behind the first stage. loader -> (given) -> chains -> (taken) -> loader.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .delta_rule_gluon_prep import _barrier


@gluon.jit
def _starts_at(T, N, HV: gl.constexpr):
    """Where `starts` is in the memory of gates, T, starts and steps, in f32."""
    return (T // 64 + N).to(gl.int64) * (HV * 64 * (4 + 32))


@gluon.jit
def _buffer(j, prior, NWG: gl.constexpr):
    """(number, first stage) of the buffer of step j: of two, the last step has the second."""
    b = (j + prior) % (2 // NWG)
    return b, 2 * b + NWG - 1


@gluon.jit
def _load_steps(starts_d, steps_d, sQ, sK, sV, given, taken, prior, row, vh, HV: gl.constexpr, NSTG: gl.constexpr,
                NWG: gl.constexpr):  # fmt: skip
    """The loader's part. `row`: of starts_d and steps_d, where the sequence's first slot is; the step to slot j is j HV 128 behind."""
    BUFFERS: gl.constexpr = 2 // NWG
    gl.static_assert(NSTG >= 2 * BUFFERS + NWG - 1, "the steps take two stages for each buffer")
    sM = sQ._reinterpret(steps_d.dtype, [NSTG * 2, 64, 64], steps_d.layout)
    sH = sK._reinterpret(starts_d.dtype, [NSTG, 64, 64], starts_d.layout)
    for j in range(prior):
        b, stage = _buffer(j, prior, NWG)
        at = row + (j + 1) * (HV * 128)
        mbarrier.wait(taken.index(b), (j // BUFFERS - 1) & 1, pred=j >= BUFFERS)
        bar = given.index(b)
        mbarrier.expect(bar, 4 * 64 * 64 * 2 + NWG * 2 * 64 * 64 * 4)
        for i in gl.static_range(4):  # rows, columns
            m_at = [at + (i // 2) * 64, (i % 2) * 64]
            tma.async_copy_global_to_shared(steps_d, m_at, bar, sM.index(2 * stage + i))
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(starts_d, [at + vh * 64, i * 64], bar, sH.index(stage + i))
        if NWG == 2:
            sH1 = sV._reinterpret(starts_d.dtype, [NSTG, 64, 64], starts_d.layout)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(starts_d, [at + 64, i * 64], bar, sH1.index(stage + i))


@gluon.jit
def _wait_for_steps(taken, prior, c, NWG: gl.constexpr):
    """Until chunk c may take its stage in the first round."""
    BUFFERS: gl.constexpr = 2 // NWG
    for b in gl.static_range(BUFFERS):
        uses = (prior + b) // BUFFERS
        mbarrier.wait(taken.index(b), (uses - 1) & 1, pred=(c == 2 * b + NWG - 1) & (uses > 0))


@gluon.jit
def _power_of_two(x):
    """At or below x >= 0; 1 if there is none."""
    x = (x.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    return gl.where(x > 0.0, x, 1.0)


@gluon.jit
def _in_two_parts(S, inverse, A: gl.constexpr):
    """S with its rows scaled, as the sum of two f16 in layout A."""
    S = S * inverse[:, None]
    upper = S.to(gl.float16)
    lower = (S - upper.to(gl.float32)).to(gl.float16)
    return gl.convert_layout(upper, A), gl.convert_layout(lower, A)


@gluon.jit
def _follow(S0, S1, starts_d, steps_d, sQ, sK, sV, given, taken, prior, WG: gl.constexpr, NWG: gl.constexpr,
            NSTG: gl.constexpr, L: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """64 rows of S, in two halves of K, through `prior` steps."""
    BUFFERS: gl.constexpr = 2 // NWG
    sM = sQ._reinterpret(steps_d.dtype, [NSTG * 2, 64, 64], steps_d.layout)
    if WG == 0:
        sH = sK._reinterpret(starts_d.dtype, [NSTG, 64, 64], starts_d.layout)
    else:
        sH = sV._reinterpret(starts_d.dtype, [NSTG, 64, 64], starts_d.layout)
    z = gl.zeros([64, 64], gl.float32, L)
    for j in range(prior):
        b, stage = _buffer(j, prior, NWG)
        M = 2 * stage
        # f16 alone ends at 65504.
        size = _power_of_two(gl.maximum(gl.max(gl.maximum(S0, -S0), 1), gl.max(gl.maximum(S1, -S1), 1)))
        upper0, lower0 = _in_two_parts(S0, 1.0 / size, A)
        upper1, lower1 = _in_two_parts(S1, 1.0 / size, A)
        mbarrier.wait(given.index(b), (j // BUFFERS) & 1)
        S0 = warpgroup_mma(upper0, sM.index(M), z, use_acc=False, is_async=True)
        S0 = warpgroup_mma(upper1, sM.index(M + 2), S0, is_async=True)
        S0 = warpgroup_mma(lower0, sM.index(M), S0, is_async=True)
        S0 = warpgroup_mma(lower1, sM.index(M + 2), S0, is_async=True)
        S1 = warpgroup_mma(upper0, sM.index(M + 1), z, use_acc=False, is_async=True)
        S1 = warpgroup_mma(upper1, sM.index(M + 3), S1, is_async=True)
        S1 = warpgroup_mma(lower0, sM.index(M + 1), S1, is_async=True)
        S1 = warpgroup_mma(lower1, sM.index(M + 3), S1, is_async=True)
        S0, S1 = warpgroup_mma_wait(0, [S0, S1])
        S0 = S0 * size[:, None] + sH.index(stage).load(L)
        S1 = S1 * size[:, None] + sH.index(stage + 1).load(L)
        _barrier()
        mbarrier.arrive(taken.index(b), count=1)
    return S0, S1
