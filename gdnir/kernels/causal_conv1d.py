"""Short causal depthwise convolution over packed sequences, with a pool of states updated in place.

Shared by all three kernels:
  x [T,C] packed inputs, y [T,C] contiguous outputs, weight [C,W] contiguous, bias [C] or None.
  conv_state is [S,C,P] through its strides; of P only the last W-1 columns (the newest inputs, oldest first) count.
  Metadata is read on the device and never trusted: a bad slot or a malformed cu_seqlens must not become a bad address.
"""

import triton
import triton.language as tl

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "P", "L", "stride_wn", "stride_wl"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "write_slots", "has_state", "error"]


@triton.jit
def _load_taps(weight, c, in_c, W: tl.constexpr, W_POW2: tl.constexpr):
    """The W columns of weight as f32 vectors. Read as rows: column by column would be W * BC scattered 2-byte loads."""
    w = tl.arange(0, W_POW2)[None, :]
    tile = tl.load(weight + c[:, None] * W + w, mask=in_c[:, None] & (w < W), other=0.0).to(tl.float32)
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(w == i, tile, 0.0), axis=1),)
    return taps


@triton.jit
def _load_bias(bias, c, in_c, BC: tl.constexpr):
    if bias is None:
        b = tl.zeros([BC], tl.float32)
    else:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    return b


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _column(conv_state, slot, c, j, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    """Address of column j (0 is the oldest) of the W-1 that count. 64 bits: pools exceed 2^31 elements."""
    column = (P - (W - 1) + j).to(tl.int64)
    return conv_state + slot.to(tl.int64) * stride_s + c.to(tl.int64) * stride_c + column * stride_p


@triton.jit
def _bounds(cu_seqlens, n, T):
    """Token range of sequence n, inside [0, T] whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1), start), T)
    return start, end


@triton.jit
def _find_sequence(cu_seqlens, t, N):
    """The last n in [0, N) with cu_seqlens[n] <= t; 0 if there is none. t may be a scalar or a block."""
    n = t * 0
    left = N
    while left > 1:
        half = left // 2
        n += tl.where(tl.load(cu_seqlens + n + half) <= t, half, 0)
        left -= half
    return n


@triton.jit
def _load_row(x, t, last, c, in_c, stride_xt):
    """Row t of x, zeros outside [0, last)."""
    return tl.load(x + t.to(tl.int64) * stride_xt + c, mask=in_c & (t >= 0) & (t < last), other=0.0)


@triton.jit
def conv_rows(
    x,
    out,
    weight,
    bias,
    conv_state,
    cu_seqlens,
    read_slots,
    has_state,
    T,
    N,
    S,
    P,
    stride_xt,
    stride_s,
    stride_c,
    stride_p,
    stride_ot,
    t0,
    c,  # [HEADS, D] channels of this program
    o,  # [HEADS, D] their columns of out
    in_c,
    eps,
    W: tl.constexpr,
    BT: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """out[t] = act(convolution) of tokens t0 .. t0 + BT, each row of the block divided by its norm if L2NORM.

    STEP tokens at a time, whose rows stay in registers; the next STEP rows are on their way meanwhile. A token's bits
    do not depend on where a step or a tile begins: the oldest tap comes first, everywhere.
    """
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + w, mask=in_c, other=0.0).to(tl.float32),)
    if bias is None:
        b = tl.zeros(c.shape, tl.float32)
    else:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    last = tl.minimum(t0 + BT, T)
    rows = ()
    for i in tl.static_range(STEP + W - 1):
        rows = rows + (_load_row(x, t0 + (i - (W - 1)), last, c, in_c, stride_xt),)
    n = _find_sequence(cu_seqlens, t0, N)
    start, end = _bounds(cu_seqlens, n, T)
    slot = tl.load(read_slots + n)
    s = t0
    while s < last:
        ahead = ()
        for i in tl.static_range(STEP):
            ahead = ahead + (_load_row(x, s + (STEP + i), last, c, in_c, stride_xt),)
        if (slot >= 0) & (slot < S) & (s - (W - 1) >= start) & (s + STEP <= end):
            # Most steps lie inside one sequence, past its first W-1 tokens.
            for i in tl.static_range(STEP):
                acc = b
                for w in tl.static_range(W):
                    acc += taps[w] * rows[i + w].to(tl.float32)
                y = _finish(acc, eps, ACTIVATION, L2NORM)
                tl.store(out + (s + i).to(tl.int64) * stride_ot + o, y.to(out.dtype.element_ty), mask=in_c)
        else:
            # The step meets the start or the end of a sequence, a padding row or tokens of nobody: look at each token.
            for j in range(STEP):
                t = s + j
                while (n < N - 1) & (tl.load(cu_seqlens + n + 1) <= t):
                    n += 1
                start, end = _bounds(cu_seqlens, n, T)
                slot = tl.load(read_slots + n)
                valid = (t >= start) & (t < end) & (slot >= 0) & (slot < S)
                pos = t - start  # within its sequence
                stateful = valid & (tl.load(has_state + n) != 0)
                acc = b
                for w in tl.static_range(W):
                    inside = pos + w >= W - 1
                    value = _load_row(x, t + (w - (W - 1)), last, c, in_c & valid & inside, stride_xt).to(tl.float32)
                    if w < W - 1:
                        old = _column(conv_state, slot, c, pos + w, P, stride_s, stride_c, stride_p, W)
                        value += tl.load(old, mask=in_c & stateful & (not inside), other=0.0).to(tl.float32)
                    acc += taps[w] * value
                y = tl.where(valid, _finish(acc, eps, ACTIVATION, L2NORM), 0.0)
                tl.store(out + t.to(tl.int64) * stride_ot + o, y.to(out.dtype.element_ty), mask=in_c & (t < last))
        rows = rows[STEP:] + ahead
        s += STEP


@triton.jit
def _finish(acc, eps, ACTIVATION: tl.constexpr, L2NORM: tl.constexpr):
    y = _activate(acc, ACTIVATION)
    if L2NORM:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
    return y


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def conv_prefill_kernel(
    x,
    weight,
    bias,
    conv_state,
    y,
    cu_seqlens,
    read_slots,
    has_state,
    T,
    C,
    N,
    S,
    P,
    stride_xt,
    stride_s,
    stride_c,
    stride_p,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Outputs of BT tokens x BC channels. Reads conv_state; conv_prefill_state_kernel, launched next, writes it."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    t0 = (pid // blocks) * BT  # channel blocks vary fastest: neighbours read the same rows of memory
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    conv_rows(
        x, y, weight, bias, conv_state, cu_seqlens, read_slots, has_state, T, N, S, P, stride_xt, stride_s, stride_c,
        stride_p, C, t0, c, c, c < C, 0.0, W, BT, STEP, ACTIVATION, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def conv_prefill_state_kernel(
    x,
    conv_state,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    C,
    N,
    S,
    P,
    stride_xt,
    stride_s,
    stride_c,
    stride_p,
    stride_wn,
    W: tl.constexpr,
    BC: tl.constexpr,
):
    """New state of one sequence x BC channels: its last W-1 inputs, or what is left of the old state before them."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    n = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)
    in_c = c < C
    start, end = _bounds(cu_seqlens, n, T)
    length = end - start
    read = tl.load(read_slots + n)
    write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)
    stored = valid & (write >= 0) & (write < S)
    tl.store(error, 1, mask=(read >= S) | (write >= S))

    columns = ()
    for j in tl.static_range(W - 1):
        t = length - (W - 1) + j  # the token whose input becomes column j; before the sequence if negative
        new = tl.load(x + (start + t).to(tl.int64) * stride_xt + c, mask=in_c & stored & (t >= 0), other=0.0)
        old = _column(conv_state, read, c, j + length, P, stride_s, stride_c, stride_p, W)
        kept = tl.load(old, mask=in_c & stored & stateful & (t < 0), other=0.0)
        columns = columns + (new.to(tl.float32) + kept.to(tl.float32),)  # one of the two is zero
    tl.debug_barrier()  # in place: the program has read all of the old state before it writes
    for j in tl.static_range(W - 1):
        new_column = _column(conv_state, write, c, j, P, stride_s, stride_c, stride_p, W)
        tl.store(new_column, columns[j].to(conv_state.dtype.element_ty), mask=in_c & stored)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def conv_update_kernel(
    x,
    weight,
    bias,
    conv_state,
    y,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    C,
    N,
    S,
    P,
    L,
    stride_xt,
    stride_s,
    stride_c,
    stride_p,
    stride_wn,
    stride_wl,
    W: tl.constexpr,
    W_POW2: tl.constexpr,
    VERIFY: tl.constexpr,
    BC: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Decode and verify: one sequence x BC channels, the last W-1 inputs kept in registers over its few tokens.

    VERIFY stores the state after each of the first L tokens, otherwise the state after the last one is stored.
    """
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    n = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)
    in_c = c < C
    start, end = _bounds(cu_seqlens, n, T)
    read = tl.load(read_slots + n)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)

    window = ()
    for j in tl.static_range(W - 1):
        column = _column(conv_state, read, c, j, P, stride_s, stride_c, stride_p, W)
        window = window + (tl.load(column, mask=in_c & stateful, other=0.0).to(tl.float32),)
    taps = _load_taps(weight, c, in_c, W, W_POW2)
    b = _load_bias(bias, c, in_c, BC)

    t = start
    while t < end:
        new = tl.load(x + t.to(tl.int64) * stride_xt + c, mask=in_c & valid, other=0.0).to(tl.float32)
        acc = b
        for w in tl.static_range(W - 1):
            acc += taps[w] * window[w]
        acc += taps[W - 1] * new
        out = tl.where(valid, _activate(acc, ACTIVATION), 0.0)
        tl.store(y + t.to(tl.int64) * C + c, out.to(y.dtype.element_ty), mask=in_c)
        window = window[1:] + (new,)
        if VERIFY:
            step = t - start
            to = write_slots + n.to(tl.int64) * stride_wn + step.to(tl.int64) * stride_wl
            write = tl.load(to, mask=valid & (step < L), other=-1)
            tl.debug_barrier()  # in place: the program has read all of the old state before it writes
            for j in tl.static_range(W - 1):
                column = _column(conv_state, write, c, j, P, stride_s, stride_c, stride_p, W)
                state = window[j].to(conv_state.dtype.element_ty)
                tl.store(column, state, mask=in_c & (write >= 0) & (write < S))
        t += 1

    if not VERIFY:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn, mask=valid, other=-1)
        tl.debug_barrier()  # as above
        for j in tl.static_range(W - 1):
            column = _column(conv_state, write, c, j, P, stride_s, stride_c, stride_p, W)
            state = window[j].to(conv_state.dtype.element_ty)
            tl.store(column, state, mask=in_c & (write >= 0) & (write < S))

    # Any slot that does not exist is reported, also one that nothing uses.
    tl.store(error, 1, mask=read >= S)
    step = tl.where(pid % blocks == 0, 0, L)
    while step < L:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn + step.to(tl.int64) * stride_wl)
        tl.store(error, 1, mask=write >= S)
        step += 1

    # Tokens past the last sequence belong to nobody; its program clears them.
    t = tl.where(n == N - 1, end, T)
    while t < T:
        tl.store(y + t.to(tl.int64) * C + c, tl.zeros([BC], y.dtype.element_ty), mask=in_c)
        t += 1
    # Likewise those before the first, which only a malformed cu_seqlens has.
    t = tl.where(n == 0, start, 0)
    while t > 0:
        t -= 1
        tl.store(y + t.to(tl.int64) * C + c, tl.zeros([BC], y.dtype.element_ty), mask=in_c)
