"""Short causal depthwise convolution over packed sequences, with a pool of states updated in place.

Shared by all three kernels:
  x [T,C] packed inputs, y [T,C] contiguous outputs, weight [C,W] contiguous, bias [C] or None.
  conv_state is [S,C,P] through its strides; of P only the last W-1 columns (the newest inputs, oldest first) count.
  Metadata is read on the device and never trusted: a bad slot or a malformed cu_seqlens must not become a bad address.
"""

import triton
import triton.language as tl

from .sigmoid import silu

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "P", "L", "BT", "stride_wn", "stride_wl"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "write_slots", "has_state", "error"]


@triton.jit
def _load_taps(weight, c, in_c, W: tl.constexpr, W_POW2: tl.constexpr):
    """The W columns of weight as f32, each of c's shape. Read as rows: column by column would be scattered 2-byte loads."""
    w = tl.reshape(tl.arange(0, W_POW2), [1] * len(c.shape) + [W_POW2])
    tile = tl.load(weight + tl.expand_dims(c, -1) * W + w, mask=tl.expand_dims(in_c, -1) & (w < W), other=0.0)
    tile = tile.to(tl.float32)
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(w == i, tile, 0.0), axis=len(c.shape)),)
    return taps


@triton.jit
def _load_bias(bias, c, in_c):
    if bias is None:
        b = tl.zeros(c.shape, tl.float32)
    else:
        b = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    return b


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = silu(y)
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
def _load_row(x, t, c, inside, stride_xt):
    """Row t of x, zeros where not inside."""
    return tl.load(x + t.to(tl.int64) * stride_xt + c, mask=inside, other=0.0)


@triton.jit
def conv_rows(
    x,
    out,
    weight,
    bias,
    cu_seqlens,
    read_slots,
    T,
    N,
    S,
    stride_xt,
    stride_ot,
    t0,
    BT,  # a multiple of STEP
    c,  # [HEADS, D] channels of this program
    o,  # [HEADS, D] their columns of out
    in_c,
    eps,
    W: tl.constexpr,
    W_POW2: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """out[t] = act(convolution) of tokens t0 .. t0 + BT but the first W-1 of a sequence, which are conv_start's.

    Each row of the block is divided by its norm if L2NORM. STEP tokens at a time, while the next STEP rows are on their
    way; the W-1 rows before a step stay in registers, as f32 so that each row is converted once. A token's bits do not
    depend on where a step or a tile begins: the oldest tap comes first, everywhere.
    """
    taps = _load_taps(weight, c, in_c, W, W_POW2)
    b = _load_bias(bias, c, in_c)
    last = tl.minimum(t0 + BT, T)
    window = ()
    for i in tl.static_range(W - 1):
        t = t0 + (i - (W - 1))
        window = window + (_load_row(x, t, c, in_c & (t >= 0), stride_xt).to(tl.float32),)
    ahead = ()
    for i in tl.static_range(STEP):
        ahead = ahead + (_load_row(x, t0 + i, c, in_c & (t0 + i < last), stride_xt),)
    n = _find_sequence(cu_seqlens, t0, N)
    start, end = _bounds(cu_seqlens, n, T)
    slot = tl.load(read_slots + n)
    s = t0
    while s < last:
        rows = window
        for i in tl.static_range(STEP):
            rows = rows + (ahead[i].to(tl.float32),)
        ahead = ()
        row = x + (s + STEP).to(tl.int64) * stride_xt
        for i in tl.static_range(STEP):
            ahead = ahead + (tl.load(row + c, mask=in_c & (s + (STEP + i) < last), other=0.0),)
            row += stride_xt
        if (slot >= 0) & (slot < S) & (s - (W - 1) >= start) & (s + STEP <= end):
            # Most steps lie inside one sequence, past its first W-1 tokens.
            to = out + s.to(tl.int64) * stride_ot
            for i in tl.static_range(STEP):
                acc = b
                for w in tl.static_range(W):
                    acc += taps[w] * rows[i + w]
                y = _finish(acc, eps, ACTIVATION, L2NORM)
                tl.store(to + o, y.to(out.dtype.element_ty), mask=in_c)
                to += stride_ot
        else:
            # The step meets the start or the end of a sequence, a padding row or tokens of nobody: look at each token.
            for j in range(STEP):
                t = s + j
                while (n < N - 1) & (tl.load(cu_seqlens + n + 1) <= t):
                    n += 1
                start, end = _bounds(cu_seqlens, n, T)
                slot = tl.load(read_slots + n)
                owned = (t >= start) & (t < end)
                valid = owned & (slot >= 0) & (slot < S) & (t - (W - 1) >= start)
                acc = b
                for w in tl.static_range(W):
                    acc += taps[w] * _load_row(x, t + (w - (W - 1)), c, in_c & valid, stride_xt).to(tl.float32)
                y = tl.where(valid, _finish(acc, eps, ACTIVATION, L2NORM), 0.0)
                mine = (t < last) & ((not owned) | (t - (W - 1) >= start))
                tl.store(out + t.to(tl.int64) * stride_ot + o, y.to(out.dtype.element_ty), mask=in_c & mine)
        window = rows[STEP:]
        s += STEP


@triton.jit
def conv_start(
    x,
    out,
    weight,
    bias,
    conv_state,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    S,
    P,
    stride_xt,
    stride_s,
    stride_c,
    stride_p,
    stride_wn,
    stride_ot,
    n,
    c,  # [HEADS, D] channels of this program
    o,  # [HEADS, D] their columns of out
    in_c,
    eps,
    W: tl.constexpr,
    W_POW2: tl.constexpr,
    ACTIVATION: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """All that touches the state of sequence n: the outputs of its first W-1 tokens, then the new state.

    One program reads and writes these channels of a state, which may lie in one slot; nobody else does either. The new
    state is the last W-1 inputs, or what is left of the old state before them.
    """
    taps = _load_taps(weight, c, in_c, W, W_POW2)
    b = _load_bias(bias, c, in_c)
    start, end = _bounds(cu_seqlens, n, T)
    length = end - start
    read = tl.load(read_slots + n)
    write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)
    stored = valid & (write >= 0) & (write < S)
    tl.store(error, 1, mask=(read >= S) | (write >= S))

    values = ()  # the old state, then the first W-1 inputs
    for j in tl.static_range(W - 1):
        old = _column(conv_state, read, c, j, P, stride_s, stride_c, stride_p, W)
        values = values + (tl.load(old, mask=in_c & stateful, other=0.0).to(tl.float32),)
    for i in tl.static_range(W - 1):
        values = values + (_load_row(x, start + i, c, in_c & valid & (i < length), stride_xt).to(tl.float32),)
    for i in tl.static_range(W - 1):
        acc = b
        for w in tl.static_range(W):
            acc += taps[w] * values[i + w]
        y = tl.where(valid, _finish(acc, eps, ACTIVATION, L2NORM), 0.0)
        to = out + (start + i).to(tl.int64) * stride_ot + o
        tl.store(to, y.to(out.dtype.element_ty), mask=in_c & (i < length))

    columns = ()
    for j in tl.static_range(W - 1):
        t = length - (W - 1) + j  # the token whose input becomes column j; before the sequence if negative
        new = _load_row(x, start + t, c, in_c & stored & (t >= 0), stride_xt).to(tl.float32)
        old = _column(conv_state, read, c, j + length, P, stride_s, stride_c, stride_p, W)
        kept = tl.load(old, mask=in_c & stored & stateful & (t < 0), other=0.0).to(tl.float32)
        columns = columns + (new + kept,)  # one of the two is zero
    tl.debug_barrier()  # in place: the program has read all of the old state before it writes
    for j in tl.static_range(W - 1):
        new_column = _column(conv_state, write, c, j, P, stride_s, stride_c, stride_p, W)
        tl.store(new_column, columns[j].to(conv_state.dtype.element_ty), mask=in_c & stored)


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
    BT,
    W: tl.constexpr,
    W_POW2: tl.constexpr,
    BC: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A program is BC channels of a sequence's start and state, or of BT tokens. The starts come first: they are short."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    at = pid // blocks  # channel blocks vary fastest: neighbours read the same rows of memory
    if at < N:
        conv_start(
            x, y, weight, bias, conv_state, cu_seqlens, read_slots, write_slots, has_state, error, T, S, P, stride_xt,
            stride_s, stride_c, stride_p, stride_wn, C, at, c, c, c < C, 0.0, W, W_POW2, ACTIVATION, False,
        )  # fmt: skip
    else:
        conv_rows(
            x, y, weight, bias, cu_seqlens, read_slots, T, N, S, stride_xt, C, (at - N) * BT, BT, c, c, c < C, 0.0, W,
            W_POW2, STEP, ACTIVATION, False,
        )  # fmt: skip


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
    b = _load_bias(bias, c, in_c)

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
