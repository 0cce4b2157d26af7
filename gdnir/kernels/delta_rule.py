"""Gated delta rule over packed sequences, in chunks of 64 tokens, with a pool of states updated in place.

S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = scale S_t q_t, S being V x K. Within a chunk, with
D_ij = exp(g_{j+1} + .. + g_i) for i >= j, else 0, and d_i = exp(g_1 + .. + g_i) [arXiv:2412.06464, arXiv:2406.06484]:

  A = (I + tril(diag(beta) K K^T, -1))^-1,  T = (A * D) diag(beta),  P = scale Q K^T * D     delta_rule_prep_kernel
  U = T V - T (d K S^T),  O = scale d Q S^T + P U,  S' = d_C S + (D_C * U)^T K                  delta_rule_kernel

The decay is applied to the inverse, not inverted with it: (I + L * D)^-1 = (I + L)^-1 * D, and A is bounded for unit keys.
All products of the second line are taken transposed (V is the M dimension): S, d K S^T and U then enter them as they lie
in registers, and only what was loaded is read from shared memory.

A long sequence is cut into segments of SEGMENT chunks, if more programs are wanted than there are heads and V tiles. From
its start S a segment ends with S M + H, H being its end from zero and M (K x K) that of the identity with V = 0:
  1. delta_rule_kernel: first segments and uncut sequences, in full; H and M of the segments in the middle;
  2. delta_rule_starts_kernel: where each segment starts, one after the other;
  3. delta_rule_segments_kernel: the other segments, in full.
Step 3 alone stores the state of a cut sequence: step 1 reads the old one, which may lie in the same slot.

Shared by the kernels:
  q, k [T,H,K], v [T,HV,V], g, beta [T,HV], state [S,HV,V,K], through their strides; o [T,HV,V] contiguous.
  solve (T above) and scores (P) [HV,T,64]: row i of a chunk at its token; gates f32 [HV,2,T]: d_i, and D_Ci.
  starts f32 [T//L,HV,V,K], steps f32 [T//L,HV,K,K] for segments of L tokens: slot start//L + j is segment j + 1's start,
  and segment j's M. A cut sequence needs one slot less than it has segments, so that no two sequences' slots meet.
Metadata is read on the device and never trusted: a bad slot or a malformed cu_seqlens must not become a bad address.
"""

import triton
import triton.language as tl

from .causal_conv1d import _bounds

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "stride_wn"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "write_slots", "has_state", "error"]


@triton.jit
def _find_sequence(cu_seqlens, i, T, N, SIZE: tl.constexpr, EACH: tl.constexpr):
    """The last n in [0, N) with start_n // SIZE + EACH * n <= i; 0 if there is none."""
    n = i * 0
    left = N
    while left > 1:
        half = left // 2
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + half), 0), T)
        n += tl.where(start // SIZE + EACH * (n + half) <= i, half, 0)
        left -= half
    return n


@triton.jit
def _decays(g, inside):
    """(sums of the log2 decays, resets) up to each of 64 tokens.

    A decay below the smallest f32 (also exp(-inf)) is a reset. Resets are counted, not summed: the sums of the other gates
    stay small enough for exact differences, and none is inf - inf.
    """
    log2 = tl.load(g, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    reset = log2 < -126.0
    return tl.cumsum(tl.where(reset, 0.0, log2), 0), tl.cumsum(reset.to(tl.int32), 0)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a @ b, f32. "f16" rounds the operands to 11 bits; "bf16x3" adds the products with what bf16 rounds off: 16 bits and
    the range of f32, for three times the work. (bf16 itself would lose a factor of 8.)"""
    if PRECISION == "f16":
        product = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        product = tl.dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high)
        product = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), product)
        product = tl.dot(a_high, b_high, product)
    return product


@triton.jit
def _merge(X, L, i, j, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse's diagonal blocks of WIDTH / 2 rows made blocks of WIDTH: [[P, 0], [Q, R]]^-1 = X - X Q X, where
    X = [[P^-1, 0], [0, R^-1]]."""
    Q = tl.where((i // WIDTH == j // WIDTH) & (i // (WIDTH // 2) > j // (WIDTH // 2)), L, 0.0)
    return X - _product(X, _product(Q, X, PRECISION), PRECISION)


@triton.jit
def _unit_lower_inverse(L, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [64,64], by halves: 2 x 2 blocks, then 4 to 64.

    Every entry on the way is one of an inverse: bounded, where the powers of a Neumann series grow without limit for keys
    that resemble each other. On the diagonal, 16 x 16 blocks are products of single warps.
    """
    block = tl.arange(0, 4)
    same = block[:, None, None, None] == block[None, None, :, None]
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    diagonal = tl.sum(tl.where(same, tl.reshape(L, [4, 16, 4, 16]), 0.0), axis=2)
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, diagonal, 0.0)
    x = _merge(x, diagonal, i, j, 4, PRECISION)
    x = _merge(x, diagonal, i, j, 8, PRECISION)
    x = _merge(x, diagonal, i, j, 16, PRECISION)
    X = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [64, 64])
    i = tl.arange(0, 64)[:, None]
    j = tl.arange(0, 64)[None, :]
    X = _merge(X, L, i, j, 32, PRECISION)
    return _merge(X, L, i, j, 64, PRECISION)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_prep_kernel(
    q,
    k,
    g,
    beta,
    solve,
    scores,
    gates,
    cu_seqlens,
    read_slots,
    T,
    N,
    S,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_gt,
    stride_gh,
    stride_bt,
    stride_bh,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """solve, scores and gates of one chunk and HEADS value heads of one key head. There are T // 64 + N programs for each
    HEADS heads: chunk c of sequence n is number start_n // 64 + n + c, which no other chunk has; numbers may be free."""
    groups = HV // HEADS
    pid = tl.program_id(0)
    number = pid // groups  # heads vary fastest: neighbours read the same rows of memory
    first = (pid % groups) * HEADS
    n = _find_sequence(cu_seqlens, number, T, N, SIZE=64, EACH=1)
    start, end = _bounds(cu_seqlens, n, T)
    t0 = start + (number - n - start // 64) * 64
    slot = tl.load(read_slots + n)
    if (t0 >= start) & (t0 < end) & (slot >= 0) & (slot < S):
        i = tl.arange(0, 64)
        kk = tl.arange(0, BK)
        rows = (t0 + i).to(tl.int64)
        inside = t0 + i < end  # the rows behind are the next sequence's, of which even a NaN must not matter
        mask = inside[:, None] & (kk < K)[None, :]
        key_head = first // (HV // H)
        k_tile = tl.load(k + rows[:, None] * stride_kt + key_head * stride_kh + kk[None, :], mask=mask, other=0.0)
        q_tile = tl.load(q + rows[:, None] * stride_qt + key_head * stride_qh + kk[None, :], mask=mask, other=0.0)
        queries = tl.dot(q_tile, tl.trans(k_tile)) * scale
        keys = tl.where(i[:, None] > i[None, :], tl.dot(k_tile, tl.trans(k_tile)), 0.0)
        for j in range(HEADS):
            h = first + j
            b = tl.load(beta + rows * stride_bt + h * stride_bh, mask=inside, other=0.0).to(tl.float32)
            total, count = _decays(g + rows * stride_gt + h * stride_gh, inside)
            kept = (i[:, None] >= i[None, :]) & (count[:, None] == count[None, :])
            # queries * 0 puts the exponents where queries lie. Without it 64 x 64 decays go through shared memory.
            decay = tl.exp2(tl.where(kept, total[:, None] - total[None, :] + queries * 0.0, float("-inf")))
            out = h.to(tl.int64) * T + rows
            tile = out[:, None] * 64 + i[None, :]
            tl.store(scores + tile, (queries * decay).to(scores.dtype.element_ty), mask=inside[:, None])
            inverse = _unit_lower_inverse(keys * b[:, None], PRECISION) * decay * b[None, :]
            tl.store(solve + tile, inverse.to(solve.dtype.element_ty), mask=inside[:, None])
            # Behind the end there are no gates: the last of 64 sums is that of the last token.
            last = tl.sum(tl.where(i == 63, total, 0.0), axis=0)
            last_count = tl.sum(tl.where(i == 63, count, 0), axis=0)
            out += h.to(tl.int64) * T
            tl.store(gates + out, tl.where(count == 0, tl.exp2(total), 0.0), mask=inside)
            tl.store(gates + out + T, tl.where(count == last_count, tl.exp2(last - total), 0.0), mask=inside)


@triton.jit
def _chunks(
    S,
    first,
    last,
    start,
    end,
    h,
    v_rows,
    in_v,
    q,
    k,
    v,
    solve,
    scores,
    gates,
    o,
    T,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    OUTPUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S [BV,BK] after chunks first .. last - 1 of the sequence at [start, end); their outputs if OUTPUT."""
    dtype = k.dtype.element_ty
    i = tl.arange(0, 64)
    kk = tl.arange(0, BK)
    in_k = kk < K
    key_head = h // (HV // H)
    row = h.to(tl.int64) * T
    for c in tl.range(first, last, num_stages=STAGES):
        t0 = start + c * 64
        t = (t0 + i).to(tl.int64)
        inside = t0 + i < end  # the rows behind are the next sequence's, of which even a NaN must not matter
        mask = inside[:, None] & in_k[None, :]
        k_tile = tl.load(k + t[:, None] * stride_kt + key_head * stride_kh + kk[None, :], mask=mask, other=0.0)
        stored = inside[:, None] & in_v[None, :]
        v_tile = tl.load(v + t[:, None] * stride_vt + h * stride_vh + v_rows[None, :], mask=stored, other=0.0)
        tile = (row + t)[:, None] * 64 + i[None, :]
        solve_tile = tl.load(solve + tile, mask=inside[:, None], other=0.0)
        new = tl.dot(tl.trans(v_tile), tl.trans(solve_tile))
        fade = tl.load(gates + 2 * row + tl.minimum(t0 + 63, end - 1))  # early: its use is far below

        operand = S.to(dtype)
        seen = tl.dot(operand, tl.trans(k_tile))
        since = tl.load(gates + 2 * row + t, mask=inside, other=0.0)
        new = tl.dot((seen * -since[None, :]).to(dtype), tl.trans(solve_tile), new)
        if OUTPUT:
            q_tile = tl.load(q + t[:, None] * stride_qt + key_head * stride_qh + kk[None, :], mask=mask, other=0.0)
            scores_tile = tl.load(scores + tile, mask=inside[:, None], other=0.0)
            out = tl.dot(operand, tl.trans(q_tile)) * (since * scale)[None, :]
        until = tl.load(gates + 2 * row + T + t, mask=inside, other=0.0)
        S = tl.dot((new * until[None, :]).to(dtype), k_tile, S * fade)
        if OUTPUT:
            out = tl.dot(new.to(dtype), tl.trans(scores_tile), out)
            tl.store(
                o + (t[None, :] * HV + h) * V + v_rows[:, None],
                out.to(o.dtype.element_ty),
                mask=tl.trans(stored),
            )
    return S


@triton.jit
def _load_state(state, slot, h, v_rows, kk, mask, stride_s, stride_sh, stride_sv, stride_sk):
    """64-bit addresses: pools exceed 2^31 elements."""
    at = state + slot.to(tl.int64) * stride_s + h.to(tl.int64) * stride_sh
    tile = at + v_rows.to(tl.int64)[:, None] * stride_sv + kk.to(tl.int64)[None, :] * stride_sk
    return tl.load(tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_state(S, state, slot, h, v_rows, kk, mask, stride_s, stride_sh, stride_sv, stride_sk):
    at = state + slot.to(tl.int64) * stride_s + h.to(tl.int64) * stride_sh
    tile = at + v_rows.to(tl.int64)[:, None] * stride_sv + kk.to(tl.int64)[None, :] * stride_sk
    tl.store(tile, S.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _clear(o, first, last, h, v_rows, in_v, HV: tl.constexpr, V: tl.constexpr):
    """Exact zeros in o for tokens [first, last), this head and these rows of V."""
    i = tl.arange(0, 64)
    for t0 in range(first, last, 64):
        t = (t0 + i).to(tl.int64)
        at = o + (t[:, None] * HV + h) * V + v_rows[None, :]
        zeros = tl.zeros([64, v_rows.shape[0]], o.dtype.element_ty)
        tl.store(at, zeros, mask=(t0 + i < last)[:, None] & in_v[None, :])


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_kernel(
    q,
    k,
    v,
    solve,
    scores,
    gates,
    o,
    state,
    starts,
    steps,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    N,
    S,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_s,
    stride_sh,
    stride_sv,
    stride_sk,
    stride_wn,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,
    CUT: tl.constexpr,
):
    """One sequence, value head and BV rows of its state: all chunks, or with SEGMENT > 0 the first segment of a sequence of
    more than CUT chunks, whose end goes to `starts`. Behind those N * HV * tiles programs, with SEGMENT > 0: H and M of one
    segment in the middle, BV rows each."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i = tl.arange(0, BV)
    kk = tl.arange(0, BK)
    if pid < N * HV * TILES:
        n = pid // (HV * TILES)
        h = pid % (HV * TILES) // TILES
        v_rows = pid % TILES * BV + i
        in_v = v_rows < V
        mask = in_v[:, None] & (kk < K)[None, :]
        start, end = _bounds(cu_seqlens, n, T)
        read = tl.load(read_slots + n)
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
        tl.store(error, 1, mask=(read >= S) | (write >= S))
        if (read >= 0) & (read < S):
            stateful = mask & (tl.load(has_state + n) != 0)
            tile = _load_state(state, read, h, v_rows, kk, stateful, stride_s, stride_sh, stride_sv, stride_sk)
            chunks = tl.cdiv(end - start, 64)
            last = chunks
            if SEGMENT:
                last = tl.where(chunks > CUT, SEGMENT, chunks)
            tile = _chunks(
                tile, 0, last, start, end, h, v_rows, in_v, q, k, v, solve, scores, gates, o, T,
                stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale,
                H, HV, K, V, BK, True, STAGES,
            )  # fmt: skip
            tl.debug_barrier()  # in place: the program has read all of its rows before it writes them
            stored = mask & (write >= 0) & (write < S)
            if SEGMENT:
                stored = stored & (last == chunks)
                begin = start // (SEGMENT * 64)
                _store_state(tile, starts, begin, h, v_rows, kk, mask & (last < chunks), HV * V * K, V * K, K, 1)
            _store_state(tile, state, write, h, v_rows, kk, stored, stride_s, stride_sh, stride_sv, stride_sk)
        else:
            _clear(o, start, end, h, v_rows, in_v, HV, V)
        # Tokens behind the last sequence belong to nobody, and those before the first, which a malformed cu_seqlens has.
        _clear(o, tl.where(n == N - 1, end, T), T, h, v_rows, in_v, HV, V)
        _clear(o, 0, tl.where(n == 0, start, 0), h, v_rows, in_v, HV, V)
    elif SEGMENT:
        BOTH: tl.constexpr = TILES + (K + BV - 1) // BV
        pid -= N * HV * TILES
        number = pid // (HV * BOTH)
        h = pid % (HV * BOTH) // BOTH
        part = pid % BOTH
        n = _find_sequence(cu_seqlens, number, T, N, SIZE=SEGMENT * 64, EACH=0)
        start, end = _bounds(cu_seqlens, n, T)
        chunks = tl.cdiv(end - start, 64)
        j = number - start // (SEGMENT * 64)
        read = tl.load(read_slots + n)
        if (chunks > CUT) & (j > 0) & ((j + 1) * SEGMENT < chunks) & (read >= 0) & (read < S):
            is_step = part >= TILES
            rows = tl.where(is_step, part - TILES, part) * BV + i
            tile = tl.where(is_step & (rows[:, None] == kk[None, :]), 1.0, 0.0)
            in_v = (rows < V) & (part < TILES)
            tile = _chunks(
                tile, j * SEGMENT, (j + 1) * SEGMENT, start, end, h, rows, in_v, q, k, v, solve, scores, gates, o, T,
                stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale,
                H, HV, K, V, BK, False, STAGES,
            )  # fmt: skip
            in_k = (kk < K)[None, :]
            _store_state(tile, starts, number, h, rows, kk, in_v[:, None] & in_k, HV * V * K, V * K, K, 1)
            in_step = (rows < K) & (part >= TILES)
            _store_state(tile, steps, number, h, rows, kk, in_step[:, None] & in_k, HV * K * K, K * K, K, 1)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_starts_kernel(
    starts,
    steps,
    cu_seqlens,
    read_slots,
    T,
    N,
    S,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BV rows of one cut sequence and head: S' = S M + H from segment to segment, in f32; starts holds H, then S'."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = pid // (HV * TILES)
    h = pid % (HV * TILES) // TILES
    rows = pid % TILES * BV + tl.arange(0, BV)
    kk = tl.arange(0, BK)
    start, end = _bounds(cu_seqlens, n, T)
    chunks = tl.cdiv(end - start, 64)
    read = tl.load(read_slots + n)
    if (chunks > CUT) & (read >= 0) & (read < S):
        begin = start // (SEGMENT * 64)
        # As in the segments: the last one ends in the pool, and needs no slot.
        slots = tl.cdiv(chunks, SEGMENT) - 1
        in_k = kk < K
        mask = (rows < V)[:, None] & in_k[None, :]
        square = in_k[:, None] & in_k[None, :]
        tile = _load_state(starts, begin, h, rows, kk, mask, HV * V * K, V * K, K, 1)
        for j in tl.range(1, slots, num_stages=STAGES):
            step = _load_state(steps, begin + j, h, kk, kk, square, HV * K * K, K * K, K, 1)
            own = _load_state(starts, begin + j, h, rows, kk, mask, HV * V * K, V * K, K, 1)
            tile = tl.dot(tile, step, own, input_precision=PRECISION)
            _store_state(tile, starts, begin + j, h, rows, kk, mask, HV * V * K, V * K, K, 1)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_segments_kernel(
    q,
    k,
    v,
    solve,
    scores,
    gates,
    o,
    state,
    starts,
    cu_seqlens,
    read_slots,
    write_slots,
    T,
    N,
    S,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_s,
    stride_sh,
    stride_sv,
    stride_sk,
    stride_wn,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,
    CUT: tl.constexpr,
):
    """BV rows of one head and segment, not the first, of a cut sequence; the last segment stores the state."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    number = pid // (HV * TILES)
    h = pid % (HV * TILES) // TILES
    v_rows = pid % TILES * BV + tl.arange(0, BV)
    kk = tl.arange(0, BK)
    in_v = v_rows < V
    mask = in_v[:, None] & (kk < K)[None, :]
    n = _find_sequence(cu_seqlens, number, T, N, SIZE=SEGMENT * 64, EACH=0)
    start, end = _bounds(cu_seqlens, n, T)
    chunks = tl.cdiv(end - start, 64)
    first = (number - start // (SEGMENT * 64) + 1) * SEGMENT
    read = tl.load(read_slots + n)
    if (chunks > CUT) & (first > 0) & (first < chunks) & (read >= 0) & (read < S):
        tile = _load_state(starts, number, h, v_rows, kk, mask, HV * V * K, V * K, K, 1)
        last = tl.minimum(first + SEGMENT, chunks)
        tile = _chunks(
            tile, first, last, start, end, h, v_rows, in_v, q, k, v, solve, scores, gates, o, T,
            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale,
            H, HV, K, V, BK, True, STAGES,
        )  # fmt: skip
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
        stored = mask & (last == chunks) & (write >= 0) & (write < S)
        _store_state(tile, state, write, h, v_rows, kk, stored, stride_s, stride_sh, stride_sv, stride_sk)
