"""Everything between the projections of a layer for a row's few tokens, in one kernel: the state is read once.

  qkv [T,C] -> conv update, SiLU -> q, k normalised; v -> delta rule -> gated RMSNorm with z -> y [T,HV,V]

A program is one sequence and one key head h. It owns the R value heads of h and the conv channels of q_h, k_h and those
v: an in-place conv state then has one owner, and the norm over V is local. Arithmetic in f32, rounded once, in y and
in the states. Layouts and what is trusted: as in causal_conv1d.py and delta_rule_step.py.
"""

import triton
import triton.language as tl

from .causal_conv1d import _activate, _bounds, _column
from .delta_rule_step import KEEP_IN_L2, delta_update, report_slots, state_tile, tile_mask
from .gdn_gate import gate

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
# A single token has no true row stride, and a part of a batch is a slice, at any alignment: the activations count as
# varying too. They are small; the state is what is read in vectors.
_VARYING = ["T", "N", "S", "P", "L", "stride_xt", "stride_zt", "stride_at", "stride_bt", "stride_wn", "stride_wl"]
_SLICED = [
    "x",
    "z",
    "a",
    "b",
    "bias",
    "norm_weight",
    "y",
    "cu_seqlens",
    "read_slots",
    "write_slots",
    "has_state",
    "error",
]

# v, z and y of the value heads lie flat, PARTS pieces of BV, one for each tile of the state. In decode's loop over tiles v
# is [BV, PARTS], and the sums over K pass through the same shape: a tile meets its column in a comparison, o takes v's
# place, and no value leaves its warp.


@triton.jit
def _load_window(conv_state, slot, c, mask, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    """The W-1 last inputs of channels c, oldest first, as they lie in memory."""
    oldest = _column(conv_state, slot, c, 0, P, stride_s, stride_c, stride_p, W)
    window = ()
    for j in tl.static_range(W - 1):
        window = window + (tl.load(oldest + tl.cast(stride_p, tl.int64) * j, mask=mask, other=0.0),)
    return window


@triton.jit
def _store_window(conv_state, slot, c, mask, window, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    oldest = _column(conv_state, slot, c, 0, P, stride_s, stride_c, stride_p, W)
    for j in tl.static_range(W - 1):
        tl.store(oldest + tl.cast(stride_p, tl.int64) * j, window[j].to(conv_state.dtype.element_ty), mask=mask)


@triton.jit
def _load_filter(weight, bias, c, mask, W: tl.constexpr, W_POW2: tl.constexpr):
    """The taps of channels c, [C, W_POW2], and their bias, as they lie in memory."""
    w = tl.arange(0, W_POW2)[None, :]
    taps = tl.load(weight + c[:, None] * W + w, mask=mask[:, None] & (w < W), other=0.0)
    if bias is None:
        b = tl.zeros(c.shape, tl.float32)
    else:
        b = tl.load(bias + c, mask=mask, other=0.0)
    return taps, b


@triton.jit
def _convolve(window, new, taps, bias, W: tl.constexpr, W_POW2: tl.constexpr, ACTIVATION: tl.constexpr):
    """Oldest tap first, as in causal_conv1d.py."""
    w = tl.arange(0, W_POW2)[None, :]
    taps = taps.to(tl.float32)
    acc = bias.to(tl.float32)
    inputs = window + (new,)
    for i in tl.static_range(W):
        acc += tl.sum(tl.where(w == i, taps, 0.0), axis=1) * inputs[i].to(tl.float32)
    return _activate(acc, ACTIVATION)


@triton.jit
def _in_f32(values):
    wide = ()
    for i in tl.static_range(len(values)):
        wide = wide + (values[i].to(tl.float32),)
    return wide


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
def _sum_in_parts(x, PARTS: tl.constexpr):
    """[BV, K] -> [BV, PARTS], sums of neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], PARTS, x.shape[1] // PARTS]), axis=2)


@triton.jit
def _update(S, q, k, qk, vs, mine, decay, beta, scale, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """`delta_update` where v is the column of `vs` that is `mine`, and o after it.

    With ROWS (a row of S lies in one warp) v enters the sum over K, which every thread of the row gets.
    """
    if ROWS:
        u = beta * tl.sum(tl.where(mine, vs, 0.0) - decay * _sum_in_parts(S * k[None, :], PARTS), axis=1)
        Sq = tl.sum(_sum_in_parts(S * q[None, :], PARTS), axis=1)
        o, new = scale * (decay * Sq + qk * u), decay * S + u[:, None] * k[None, :]
    else:
        o, new = delta_update(S, q, k, qk, tl.sum(tl.where(mine, vs, 0.0), axis=1), decay, beta, scale)
    return tl.where(mine, o[:, None], vs), new


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
def _in_columns(flat, BV: tl.constexpr, PARTS: tl.constexpr):
    """[PARTS * BV] -> [BV, PARTS]."""
    return tl.trans(tl.reshape(flat, [PARTS, BV]))


@triton.jit
def _norm_gate(os, z, gain, eps, HEADS: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr):
    """Gated RMSNorm of HEADS heads side by side, each as many columns; flat."""
    columns: tl.constexpr = os.shape[1] // HEADS
    mean = tl.sum(tl.reshape(tl.sum(os * os, axis=0), [HEADS, columns]), axis=1) / V
    norm = tl.broadcast_to(tl.rsqrt(mean + eps)[:, None], [HEADS, columns])
    out = os * tl.reshape(norm, [1, os.shape[1]])
    act = tl.sigmoid(z)
    if GATE == "silu":
        act = z * act
    return tl.reshape(tl.trans(out), [os.shape[0] * os.shape[1]]) * gain * act


@triton.jit
def _load_tile(
    state, slot, head, row, stateful, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr,
):  # fmt: skip
    """Rows `row` + v of one head's state, zero if the sequence starts without one."""
    first = state + tl.cast(row, tl.int64) * STRIDE_V
    old = state_tile(first, slot, head, v, k, stride_s, stride_h, STRIDE_V, STRIDE_K)
    mask = tile_mask(stateful, row + v, k, V, K, BV, K_POW2)
    return tl.load(old, mask=mask, other=0.0, eviction_policy=KEEP_IN_L2)


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
    W_POW2: tl.constexpr,
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
    read = tl.load(read_slots + n)
    start, end = _bounds(cu_seqlens, n, T)
    stop = end
    if not VERIFY:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
        stop = tl.minimum(end, start + 1)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)
    v = tl.arange(0, BV)
    k_dim = tl.arange(0, K_POW2)
    in_k = k_dim < K
    c_q = h * K + k_dim
    c_k = H * K + c_q
    flat = tl.arange(0, PARTS * BV)

    if not VERIFY:
        part = tl.arange(0, PARTS)[None, :]
        stored = valid & (write >= 0) & (write < S)
        live = valid & (end > start)
        at = start.to(tl.int64)
        COLUMNS: tl.constexpr = PARTS // R_POW2  # of a head
        head = flat // (COLUMNS * BV)
        inner = flat % (COLUMNS * BV)
        row = head * V + inner
        in_v = (head < R) & (inner < V)
        c_v = 2 * H * K + h * R * V + row
        r = tl.arange(0, R_POW2)
        heads = h * R + r

        # All that is read is asked for before anything waits: what depends on no slot, then the few inputs, then the
        # state, which is almost all of the traffic and would hold the others up.
        taps_q, bias_q = _load_filter(weight, bias, c_q, in_k, W, W_POW2)
        taps_k, bias_k = _load_filter(weight, bias, c_k, in_k, W, W_POW2)
        taps_v, bias_v = _load_filter(weight, bias, c_v, in_v, W, W_POW2)
        rate = tl.load(A_log + heads, mask=r < R, other=0.0)
        shift = tl.load(dt_bias + heads, mask=r < R, other=0.0)
        window_q = _load_window(conv_state, read, c_q, in_k & stateful, P, stride_cs, stride_cc, stride_cp, W)
        window_k = _load_window(conv_state, read, c_k, in_k & stateful, P, stride_cs, stride_cc, stride_cp, W)
        window_v = _load_window(conv_state, read, c_v, in_v & stateful, P, stride_cs, stride_cc, stride_cp, W)
        x_at = x + at * stride_xt
        new_q = tl.load(x_at + c_q, mask=in_k & live, other=0.0)
        new_k = tl.load(x_at + c_k, mask=in_k & live, other=0.0)
        new_v = tl.load(x_at + c_v, mask=in_v & live, other=0.0)
        a_t = tl.load(a + at * stride_at + heads, mask=(r < R) & live, other=0.0)
        b_t = tl.load(b + at * stride_bt + heads, mask=(r < R) & live, other=0.0)
        z_t = tl.load(z + at * stride_zt + (h * R + head) * stride_zh + inner, mask=in_v & live, other=0.0)
        tiles = ()
        for m in tl.static_range(AHEAD):
            tile = _load_tile(
                state, read, h * R + m // BLOCKS, m % BLOCKS * BV, stateful, v, k_dim, stride_s, stride_h,
                STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
            )  # fmt: skip
            tiles = tiles + (tile,)

        tl.debug_barrier()  # in place: the program reads all of its channels' state before it writes
        first_y = y + (at * H + h) * (R * V)
        if live:  # the branch also keeps the compiler from computing before it has asked for the state
            q = _convolve(window_q, new_q, taps_q, bias_q, W, W_POW2, ACTIVATION)
            k = _convolve(window_k, new_k, taps_k, bias_k, W, W_POW2, ACTIVATION)
            vs = _convolve(window_v, new_v, taps_v, bias_v, W, W_POW2, ACTIVATION)
            q, k, dot = _query_key(q, k, l2norm_eps)
            g, betas = gate(
                a_t.to(tl.float32), b_t.to(tl.float32), rate.to(tl.float32), shift.to(tl.float32), ALLOW_NEG_EIGVAL
            )
            decays = tl.exp(g)
            after_q = window_q[1:] + (new_q,)
            after_k = window_k[1:] + (new_k,)
            after_v = window_v[1:] + (new_v,)
            _store_window(conv_state, write, c_q, in_k & stored, after_q, P, stride_cs, stride_cc, stride_cp, W)
            _store_window(conv_state, write, c_k, in_k & stored, after_k, P, stride_cs, stride_cc, stride_cp, W)
            _store_window(conv_state, write, c_v, in_v & stored, after_v, P, stride_cs, stride_cc, stride_cp, W)

            vs = _in_columns(vs, BV, PARTS)
            for this in range(TILES):
                i, j = this // BLOCKS, this % BLOCKS
                decay, beta = _pick(decays, r, i), _pick(betas, r, i)
                mine = part == i * COLUMNS + j
                S_tile = tiles[0].to(tl.float32)
                vs, new_tile = _update(S_tile, q, k, dot, vs, mine, decay, beta, scale, PARTS, STRIDE_K == 1)
                _store_tile(
                    state, write, h * R + i, j * BV, stored, new_tile, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2, SHARED,
                )  # fmt: skip
                if AHEAD < TILES:
                    later = this + AHEAD
                    tile = _load_tile(
                        state, read, h * R + later // BLOCKS, later % BLOCKS * BV, stateful & (later < TILES), v, k_dim,
                        stride_s, stride_h, STRIDE_V, STRIDE_K, V, K, BV, K_POW2,
                    )  # fmt: skip
                    tiles = tiles[1:] + (tile,)
                else:
                    tiles = tiles[1:] + (tiles[0],)
            gain = tl.load(norm_weight + inner, mask=in_v, other=0.0)
            out = _norm_gate(vs, z_t.to(tl.float32), gain.to(tl.float32), eps, R_POW2, V, GATE)
            tl.store(first_y + row, out.to(y.dtype.element_ty), mask=in_v)
        elif end > start:  # a token of a padding row
            tl.store(first_y + row, tl.zeros(row.shape, y.dtype.element_ty), mask=in_v)
        elif stored:  # an empty row keeps its starting states
            _store_window(conv_state, write, c_q, in_k, window_q, P, stride_cs, stride_cc, stride_cp, W)
            _store_window(conv_state, write, c_k, in_k, window_k, P, stride_cs, stride_cc, stride_cp, W)
            _store_window(conv_state, write, c_v, in_v, window_v, P, stride_cs, stride_cc, stride_cp, W)
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
        part = tl.arange(0, PARTS)[:, None]
        row = flat
        in_v = row < V
        gain = tl.load(norm_weight + row, mask=in_v, other=0.0).to(tl.float32)
        for i in range(R):
            head = h * R + i
            rate, shift = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
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
            window_q, window_k, window_v = _in_f32(window_q), _in_f32(window_k), _in_f32(window_v)
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
                new_q, new_k, new_v = _in_f32((new_q, new_k, new_v))
                ahead = _load_token(
                    x, z, a, b, write_slots, t + 1, valid & (t + 1 < stop), c_q, c_k, c_v, in_k, in_v, head, row, n,
                    t + 1 - start, L, stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
                )  # fmt: skip
                stored = (write >= 0) & (write < S)
                g, beta = gate(a_t.to(tl.float32), b_t.to(tl.float32), rate, shift, ALLOW_NEG_EIGVAL)
                decay = tl.exp(g)
                # The filter is read again for each token: that costs less than registers to keep it would.
                taps, b_c = _load_filter(weight, bias, c_q, in_k, W, W_POW2)
                q = _convolve(window_q, new_q, taps, b_c, W, W_POW2, ACTIVATION)
                taps, b_c = _load_filter(weight, bias, c_k, in_k, W, W_POW2)
                k = _convolve(window_k, new_k, taps, b_c, W, W_POW2, ACTIVATION)
                taps, b_c = _load_filter(weight, bias, c_v, in_v, W, W_POW2)
                vs = _convolve(window_v, new_v, taps, b_c, W, W_POW2, ACTIVATION)
                window_q, window_k, window_v = window_q[1:] + (new_q,), window_k[1:] + (new_k,), window_v[1:] + (new_v,)
                q, k, dot = _query_key(q, k, l2norm_eps)
                own = in_k & stored & (i == R - 1)
                _store_window(conv_state, write, c_q, own, window_q, P, stride_cs, stride_cc, stride_cp, W)
                _store_window(conv_state, write, c_k, own, window_k, P, stride_cs, stride_cc, stride_cp, W)
                _store_window(conv_state, write, c_v, in_v & stored, window_v, P, stride_cs, stride_cc, stride_cp, W)
                vs = tl.reshape(vs, [PARTS, BV])
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
                out = tl.where(valid, _norm_gate(tl.trans(os), z_t.to(tl.float32), gain, eps, 1, V, GATE), 0.0)
                tl.store(y + (at * (H * R) + head) * V + row, out.to(y.dtype.element_ty), mask=in_v)
                t += 1

    # A decode row's first slot is at hand, and to load it again would cost the latency.
    if not VERIFY:
        tl.store(error, 1, mask=write >= S)
        unseen = tl.where(h == 0, 1, L)
    else:
        unseen = tl.where(h == 0, 0, L)
    report_slots(read, write_slots, error, n, unseen, L, S, stride_wn, stride_wl)
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
