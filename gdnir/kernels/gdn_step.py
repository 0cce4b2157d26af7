"""Everything between the projections of a layer for a row's few tokens, in one kernel: the state is read once.

  qkv [T,C] -> conv update, SiLU -> q, k normalised; v -> delta rule -> gated RMSNorm with z -> y [T,HV,V]

A program is one sequence and one key head h. It owns the R value heads of h and the conv channels of q_h, k_h and those
v: an in-place conv state then has one owner, and the norm over V is local. Arithmetic in f32, rounded once, in y and
in the states. Layouts and what is trusted: as in causal_conv1d.py and delta_rule_step.py.
"""

import triton
import triton.language as tl

from .causal_conv1d import _activate, _bounds, _column
from .delta_rule_step import delta_update, report_slots, state_tile, tile_mask
from .gdn_gate import gate

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
# A single token has no true row stride, and a part of a batch is a slice, at any alignment: the activations count as
# varying too. They are small; the state is what is read in vectors.
_VARYING = ["T", "N", "S", "P", "L", "stride_xt", "stride_zt", "stride_at", "stride_bt", "stride_wn", "stride_wl"]
_SLICED = ["x", "z", "a", "b", "bias", "cu_seqlens", "read_slots", "write_slots", "has_state", "error"]

# The R V elements of v, z and y are [parts, BV], one part for each tile of the state: a tile's part is picked by a comparison,
# in a loop, where a gather would cost as much as the tile itself.


@triton.jit
def _load_window(conv_state, slot, c, mask, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    """The W-1 last inputs of channels c, oldest first."""
    window = ()
    for j in tl.static_range(W - 1):
        column = _column(conv_state, slot, c, j, P, stride_s, stride_c, stride_p, W)
        window = window + (tl.load(column, mask=mask, other=0.0).to(tl.float32),)
    return window


@triton.jit
def _store_window(conv_state, slot, c, mask, window, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    for j in tl.static_range(W - 1):
        column = _column(conv_state, slot, c, j, P, stride_s, stride_c, stride_p, W)
        tl.store(column, window[j].to(conv_state.dtype.element_ty), mask=mask)


@triton.jit
def _load_filter(weight, bias, c, mask, W: tl.constexpr):
    """The W taps of channels c, then their bias."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + w, mask=mask, other=0.0).to(tl.float32),)
    if bias is None:
        b = tl.zeros(c.shape, tl.float32)
    else:
        b = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    return taps + (b,)


@triton.jit
def _convolve(window, new, taps, W: tl.constexpr, ACTIVATION: tl.constexpr):
    """Oldest tap first, as in causal_conv1d.py."""
    acc = taps[W]
    for w in tl.static_range(W - 1):
        acc += taps[w] * window[w]
    return _activate(acc + taps[W - 1] * new, ACTIVATION)


@triton.jit
def _shift(window, new, live, W: tl.constexpr):
    """The window after input `new`, or as it was if there is none."""
    after = ()
    for j in tl.static_range(1, W - 1):
        after = after + (tl.where(live, window[j], window[j - 1]),)
    return after + (tl.where(live, new, window[W - 2]),)


@triton.jit
def _update_channels(
    x_at, weight, bias, conv_state, read, write, c, mask, stateful, stored, live, P, stride_s, stride_c, stride_p,
    W: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Channels c of one token's convolution; their state goes on."""
    window = _load_window(conv_state, read, c, mask & stateful, P, stride_s, stride_c, stride_p, W)
    new = tl.load(x_at + c, mask=mask & live, other=0.0).to(tl.float32)
    taps = _load_filter(weight, bias, c, mask, W)
    tl.debug_barrier()  # in place: the program has read all of the channels' state before it writes
    after = _shift(window, new, live, W)
    _store_window(conv_state, write, c, mask & stored, after, P, stride_s, stride_c, stride_p, W)
    return _convolve(window, new, taps, W, ACTIVATION)


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _query_key(q, k, eps):
    """(q, k, q.k) after the l2norm of both; three sums in one reduction."""
    qq, kk, dot = tl.reduce((q * q, k * k, q * k), 0, _add3)
    by_q, by_k = tl.rsqrt(qq + eps), tl.rsqrt(kk + eps)
    return q * by_q, k * by_k, dot * by_q * by_k


@triton.jit
def _pick(x, index, at):
    """x[at], x given with the index of each element. Exact: the others add zeros."""
    return tl.sum(tl.where(index == at, x, 0.0), axis=0)


@triton.jit
def _gate_at(a, b, A_log, dt_bias, at, head, mask, live, stride_at, stride_bt, ALLOW_NEG_EIGVAL: tl.constexpr):
    """(exp(g), beta) of some heads of token `at`."""
    a_t = tl.load(a + at * stride_at + head, mask=mask & live, other=0.0).to(tl.float32)
    b_t = tl.load(b + at * stride_bt + head, mask=mask & live, other=0.0).to(tl.float32)
    rate = tl.load(A_log + head, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(dt_bias + head, mask=mask, other=0.0).to(tl.float32)
    g, beta = gate(a_t, b_t, rate, shift, ALLOW_NEG_EIGVAL)
    return tl.exp(g), beta


@triton.jit
def _load_token(
    x, z, a, b, write_slots, t, live, c_q, c_k, c_v, in_k, in_v, head, row, n, step, L,
    stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
):  # fmt: skip
    """What one value head needs of token t, the row's `step`th, as it lies in memory: q, k, v, z, a, b, slot."""
    at = t.to(tl.int64)
    x_at = x + at * stride_xt
    q = tl.load(x_at + c_q, mask=in_k & live, other=0.0)
    k = tl.load(x_at + c_k, mask=in_k & live, other=0.0)
    v = tl.load(x_at + c_v, mask=in_v & live, other=0.0)
    z_t = tl.load(z + at * stride_zt + head * stride_zh + row, mask=in_v & live, other=0.0)
    a_t = tl.load(a + at * stride_at + head, mask=live, other=0.0)
    b_t = tl.load(b + at * stride_bt + head, mask=live, other=0.0)
    to = write_slots + n.to(tl.int64) * stride_wn + step * stride_wl
    return q, k, v, z_t, a_t, b_t, tl.load(to, mask=live & (step < L), other=-1)


@triton.jit
def _norm_gate(o, z, gain, head, eps, HEADS: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr):
    """Gated RMSNorm of HEADS heads side by side; `head` says which head an element belongs to."""
    norm = tl.zeros(o.shape, tl.float32)
    for i in tl.static_range(HEADS):
        mean = tl.sum(tl.where(head == i, o * o, 0.0)) / V
        norm = tl.where(head == i, tl.rsqrt(mean + eps), norm)
    act = tl.sigmoid(z)
    if GATE == "silu":
        act = z * act
    return o * norm * gain * act


@triton.jit
def _load_tile(
    state, slot, head, row, stateful, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr,
):  # fmt: skip
    """Rows `row` + v of one head's state, zero if the sequence starts without one."""
    first = state + tl.cast(row, tl.int64) * STRIDE_V
    old = state_tile(first, slot, head, v, k, stride_s, stride_h, STRIDE_V, STRIDE_K)
    return tl.load(old, mask=tile_mask(stateful, row + v, k, V, K, BV, K_POW2), other=0.0)


@triton.jit
def _store_tile(
    state, slot, head, row, stored, tile, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    first = state + tl.cast(row, tl.int64) * STRIDE_V
    new = state_tile(first, slot, head, v, k, stride_s, stride_h, STRIDE_V, STRIDE_K)
    mask = tile_mask(stored, row + v, k, V, K, BV, K_POW2)
    if SHARED:
        tl.debug_barrier()  # in place, elements in several threads: all have read before one writes
    tl.store(new, tile.to(state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def gdn_step_kernel(
    x,  # qkv [T, C], any row stride
    z,  # [T, HV, V], any strides but the last
    a,  # [T, HV], any row stride
    b,  # [T, HV], any row stride
    weight,  # [C, W]
    bias,  # [C] or None
    conv_state,
    state,
    A_log,  # [HV]
    dt_bias,  # [HV]
    norm_weight,  # [V]
    y,  # [T, HV, V] contiguous
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    N,
    S,
    P,
    L,
    stride_xt,
    stride_zt,
    stride_zh,
    stride_at,
    stride_bt,
    stride_cs,
    stride_cc,
    stride_cp,
    stride_s,
    stride_h,
    stride_wn,
    stride_wl,
    l2norm_eps,
    scale,
    eps,
    STRIDE_V: tl.constexpr,
    STRIDE_K: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_POW2: tl.constexpr,
    R_POW2: tl.constexpr,
    RV_POW2: tl.constexpr,
    PARTS: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
    SHARED: tl.constexpr,
    VERIFY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr,
    GATE: tl.constexpr,
):
    """The state of a value head is cut into tiles of BV rows.

    Decode goes through the tiles of all R heads, AHEAD of them in flight; a loop, since code written out for every tile
    is fetched more slowly than it runs. VERIFY keeps one head's tiles in registers over the tokens, and stores them
    after each of the first L.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = R * BLOCKS
    pid = tl.program_id(0)
    n = pid // H
    h = pid % H
    start, end = _bounds(cu_seqlens, n, T)
    stop = end
    if not VERIFY:
        stop = tl.minimum(end, start + 1)
    read = tl.load(read_slots + n)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)
    v = tl.arange(0, BV)
    k_dim = tl.arange(0, K_POW2)
    in_k = k_dim < K
    c_q = h * K + k_dim
    c_k = H * K + c_q
    part = tl.arange(0, PARTS)[:, None]

    if not VERIFY:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
        stored = valid & (write >= 0) & (write < S)
        live = valid & (end > start)
        at = start.to(tl.int64)

        # The state is almost all of the traffic: its first loads are issued before anything is computed.
        tiles = ()
        for m in tl.static_range(AHEAD):
            tile = _load_tile(
                state, read, h * R + m // BLOCKS, m % BLOCKS * BV, stateful, v, k_dim, stride_s, stride_h,
                STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
            )  # fmt: skip
            tiles = tiles + (tile,)

        inner = part % BLOCKS * BV + v[None, :]
        head = part // BLOCKS
        row = head * V + inner
        in_v = (part < TILES) & (inner < V)
        c_v = 2 * H * K + h * R * V + row
        x_at = x + at * stride_xt
        z_at = z + at * stride_zt + (h * R + head) * stride_zh + inner
        z_t = tl.load(z_at, mask=in_v & live, other=0.0)
        q = _update_channels(
            x_at, weight, bias, conv_state, read, write, c_q, in_k, stateful, stored, live, P,
            stride_cs, stride_cc, stride_cp, W, ACTIVATION,
        )  # fmt: skip
        k = _update_channels(
            x_at, weight, bias, conv_state, read, write, c_k, in_k, stateful, stored, live, P,
            stride_cs, stride_cc, stride_cp, W, ACTIVATION,
        )  # fmt: skip
        vs = _update_channels(
            x_at, weight, bias, conv_state, read, write, c_v, in_v, stateful, stored, live, P,
            stride_cs, stride_cc, stride_cp, W, ACTIVATION,
        )  # fmt: skip
        r = tl.arange(0, R_POW2)
        decays, betas = _gate_at(
            a, b, A_log, dt_bias, at, h * R + r, r < R, live, stride_at, stride_bt, ALLOW_NEG_EIGVAL
        )
        q, k, dot = _query_key(q, k, l2norm_eps)

        os = tl.zeros([PARTS, BV], tl.float32)
        for i in range(R):
            decay, beta = _pick(decays, r, i), _pick(betas, r, i)
            for j in range(0, BLOCKS, AHEAD):
                after = ()
                for ahead in tl.static_range(AHEAD):
                    this = i * BLOCKS + j + ahead
                    v_t = _pick(vs, part, this)
                    o, new_tile = delta_update(tiles[ahead].to(tl.float32), q, k, dot, v_t, decay, beta, scale)
                    os = tl.where(part == this, o[None, :], os)
                    _store_tile(
                        state, write, h * R + i, (j + ahead) * BV, stored & live, new_tile, v, k_dim, stride_s, stride_h,
                        STRIDE_V, STRIDE_K, V, K, BV, K_POW2, SHARED,
                    )  # fmt: skip
                    if AHEAD < TILES:
                        later = (this + AHEAD) // BLOCKS
                        tile = _load_tile(
                            state, read, h * R + later, (this + AHEAD) % BLOCKS * BV, stateful & (later < R), v, k_dim,
                            stride_s, stride_h, STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
                        )  # fmt: skip
                        after = after + (tile,)
                if AHEAD < TILES:
                    tiles = after
        gain = tl.load(norm_weight + inner, mask=in_v, other=0.0).to(tl.float32)
        out = tl.where(live, _norm_gate(os, z_t.to(tl.float32), gain, head, eps, R, V, GATE), 0.0)
        tl.store(y + (at * H + h) * (R * V) + row, out.to(y.dtype.element_ty), mask=in_v & (end > start))
        if stored & (end == start):  # an empty row keeps its starting state
            for this in range(TILES):
                of, first = h * R + this // BLOCKS, this % BLOCKS * BV
                kept = _load_tile(
                    state, read, of, first, stateful, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
                )  # fmt: skip
                _store_tile(
                    state, write, of, first, stored, kept, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2, SHARED,
                )  # fmt: skip
    else:
        # One value head after the other, so that its tiles fit into registers. Each convolves q and k again; the last
        # one stores their state, which until then the others read.
        row = part * BV + v[None, :]
        in_v = row < V
        gain = tl.load(norm_weight + row, mask=in_v, other=0.0).to(tl.float32)
        for i in range(R):
            head = h * R + i
            tiles = ()
            for j in tl.static_range(BLOCKS):
                tile = _load_tile(
                    state, read, head, j * BV, stateful, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
                )  # fmt: skip
                tiles = tiles + (tile.to(tl.float32),)
            c_v = 2 * H * K + head * V + row
            window_q = _load_window(conv_state, read, c_q, in_k & stateful, P, stride_cs, stride_cc, stride_cp, W)
            window_k = _load_window(conv_state, read, c_k, in_k & stateful, P, stride_cs, stride_cc, stride_cp, W)
            window_v = _load_window(conv_state, read, c_v, in_v & stateful, P, stride_cs, stride_cc, stride_cp, W)
            # The next token's inputs are on their way while a token is worked on.
            ahead = _load_token(
                x, z, a, b, write_slots, start, valid & (start < stop), c_q, c_k, c_v, in_k, in_v, head, row, n, 0, L,
                stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
            )  # fmt: skip
            tl.debug_barrier()  # in place: the program has read all of its channels' state before it writes
            t = start
            while t < stop:
                at = t.to(tl.int64)
                new_q, new_k, new_v, z_t, a_t, b_t, write = ahead
                new_q, new_k, new_v = new_q.to(tl.float32), new_k.to(tl.float32), new_v.to(tl.float32)
                ahead = _load_token(
                    x, z, a, b, write_slots, t + 1, valid & (t + 1 < stop), c_q, c_k, c_v, in_k, in_v, head, row, n,
                    t + 1 - start, L, stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
                )  # fmt: skip
                stored = (write >= 0) & (write < S)
                rate, shift = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
                g, beta = gate(a_t.to(tl.float32), b_t.to(tl.float32), rate, shift, ALLOW_NEG_EIGVAL)
                decay = tl.exp(g)
                # The filter is read again for each token: that costs less than registers to keep it would.
                q = _convolve(window_q, new_q, _load_filter(weight, bias, c_q, in_k, W), W, ACTIVATION)
                k = _convolve(window_k, new_k, _load_filter(weight, bias, c_k, in_k, W), W, ACTIVATION)
                vs = _convolve(window_v, new_v, _load_filter(weight, bias, c_v, in_v, W), W, ACTIVATION)
                window_q, window_k, window_v = window_q[1:] + (new_q,), window_k[1:] + (new_k,), window_v[1:] + (new_v,)
                q, k, dot = _query_key(q, k, l2norm_eps)
                own = in_k & stored & (i == R - 1)
                _store_window(conv_state, write, c_q, own, window_q, P, stride_cs, stride_cc, stride_cp, W)
                _store_window(conv_state, write, c_k, own, window_k, P, stride_cs, stride_cc, stride_cp, W)
                _store_window(conv_state, write, c_v, in_v & stored, window_v, P, stride_cs, stride_cc, stride_cp, W)
                os = tl.zeros([PARTS, BV], tl.float32)
                after = ()
                for j in tl.static_range(BLOCKS):
                    o, new_tile = delta_update(tiles[j], q, k, dot, _pick(vs, part, j), decay, beta, scale)
                    os = tl.where(part == j, o[None, :], os)
                    _store_tile(
                        state, write, head, j * BV, stored, new_tile, v, k_dim, stride_s, stride_h,
                        STRIDE_V, STRIDE_K, V, K, BV, K_POW2, SHARED,
                    )  # fmt: skip
                    after = after + (new_tile,)
                tiles = after
                out = tl.where(valid, _norm_gate(os, z_t.to(tl.float32), gain, row // V, eps, 1, V, GATE), 0.0)
                tl.store(y + (at * (H * R) + head) * V + row, out.to(y.dtype.element_ty), mask=in_v)
                t += 1

    report_slots(read, write_slots, error, n, tl.where(h == 0, 0, L), L, S, stride_wn, stride_wl)
    # Tokens past the last sequence belong to nobody, nor do (unless cu_seqlens is malformed) those before the first
    # and a decode row's second. Whoever is next to them clears them.
    all_v = tl.arange(0, RV_POW2)
    zero = tl.zeros([RV_POW2], y.dtype.element_ty)
    t = tl.where(n == 0, 0, stop)
    after_end = tl.where(n == N - 1, T, end)
    while t < after_end:
        if (t < start) | (t >= stop):
            tl.store(y + (t.to(tl.int64) * H + h) * (R * V) + all_v, zero, mask=all_v < R * V)
        t += 1
