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

# A program's channels are one vector: q, then k, then v of its R heads, and so are the R V elements of z and y. Fewer and
# wider operations than one vector for each part; parts are gathered from it into the layout that the state asks for.


@triton.jit
def _channels(h, head, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, C_POW2: tl.constexpr):
    """(index among all channels, whether there is one) of q_h, k_h, and v of HEADS value heads from `head` on."""
    j = tl.arange(0, C_POW2)
    qk = j % K + (j // K * H + h) * K
    return tl.where(j < 2 * K, qk, 2 * H * K + head * V + j - 2 * K), j < 2 * K + HEADS * V


@triton.jit
def _load_window(conv_state, slot, c, mask, P, stride_s, stride_c, stride_p, W: tl.constexpr):
    """The W-1 last inputs of channels c in f32, oldest first."""
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
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _query_key(channels, k_dim, eps, K: tl.constexpr):
    """(q, k, q.k) after the l2norm of both; three sums in one reduction."""
    inside = k_dim < K
    q = tl.where(inside, tl.gather(channels, tl.where(inside, k_dim, 0), 0), 0.0)
    k = tl.where(inside, tl.gather(channels, tl.where(inside, k_dim + K, 0), 0), 0.0)
    qq, kk, dot = tl.reduce((q * q, k * k, q * k), 0, _add3)
    by_q, by_k = tl.rsqrt(qq + eps), tl.rsqrt(kk + eps)
    return q * by_q, k * by_k, dot * by_q * by_k


@triton.jit
def _value(channels, first, v, V: tl.constexpr):
    """The V channels from `first` on, rows v of them; zero past the end."""
    return tl.where(v < V, tl.gather(channels, tl.where(v < V, first + v, 0), 0), 0.0)


@triton.jit
def _place(os, o, row, first, last):
    """os with o in its rows `first` .. `last`."""
    inside = (row >= first) & (row < last)
    return tl.where(inside, tl.gather(o, tl.where(inside, row - first, 0), 0), os)


@triton.jit
def _gate_at(a, b, A_log, dt_bias, at, head, live, stride_at, stride_bt, ALLOW_NEG_EIGVAL: tl.constexpr):
    """(exp(g), beta) of one head of token `at`."""
    a_t = tl.load(a + at * stride_at + head, mask=live, other=0.0).to(tl.float32)
    b_t = tl.load(b + at * stride_bt + head, mask=live, other=0.0).to(tl.float32)
    g, beta = gate(
        a_t, b_t, tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32), ALLOW_NEG_EIGVAL
    )
    return tl.exp(g), beta


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
    state, slot, head, j, stateful, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Rows j BV .. of one head's state, zero if the sequence starts without one."""
    rows = j * BV + v
    old = state_tile(state, slot, head, rows, k, stride_s, stride_h, STRIDE_V, STRIDE_K)
    return tl.load(old, mask=tile_mask(stateful, rows, k, V, K, BV, K_POW2), other=0.0, eviction_policy=EVICT)


@triton.jit
def _store_tile(
    state, slot, head, j, stored, tile, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    rows = j * BV + v
    new = state_tile(state, slot, head, rows, k, stride_s, stride_h, STRIDE_V, STRIDE_K)
    mask = tile_mask(stored, rows, k, V, K, BV, K_POW2)
    tl.debug_barrier()  # in place: the program has read all of the old tile before it writes
    tl.store(new, tile.to(state.dtype.element_ty), mask=mask, eviction_policy=EVICT)


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
    V_POW2: tl.constexpr,
    RV_POW2: tl.constexpr,
    C_POW2: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
    EVICT: tl.constexpr,
    VERIFY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr,
    GATE: tl.constexpr,
):
    """The state of a value head is cut into tiles of BV rows.

    Decode is straight-line code over the tiles of all R heads: AHEAD of them are in flight at any time. VERIFY keeps
    one head's tiles in registers over the tokens, and stores them after each of the first L.
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

    if not VERIFY:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn)
        stored = valid & (write >= 0) & (write < S)
        live = valid & (end > start)
        at = start.to(tl.int64)

        # The state is almost all of the traffic: its first loads are issued before anything is computed.
        tiles = ()
        for m in tl.static_range(AHEAD):
            tile = _load_tile(
                state, read, h * R + m // BLOCKS, m % BLOCKS, stateful, v, k_dim, stride_s, stride_h,
                STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
            )  # fmt: skip
            tiles = tiles + (tile,)

        c, in_c = _channels(h, h * R, H, K, V, R, C_POW2)
        row = tl.arange(0, RV_POW2)
        z_at = z + at * stride_zt + (h * R + row // V) * stride_zh + row % V
        z_t = tl.load(z_at, mask=(row < R * V) & live, other=0.0).to(tl.float32)
        new = tl.load(x + at * stride_xt + c, mask=in_c & live, other=0.0).to(tl.float32)
        window = _load_window(conv_state, read, c, in_c & stateful, P, stride_cs, stride_cc, stride_cp, W)
        channels = _convolve(window, new, _load_filter(weight, bias, c, in_c, W), W, ACTIVATION)
        tl.debug_barrier()  # in place: the program has read all of its channels' state before it writes
        window = _shift(window, new, live, W)
        _store_window(conv_state, write, c, in_c & stored, window, P, stride_cs, stride_cc, stride_cp, W)
        decays, betas = (), ()
        for i in tl.static_range(R):
            decay, beta = _gate_at(a, b, A_log, dt_bias, at, h * R + i, live, stride_at, stride_bt, ALLOW_NEG_EIGVAL)
            decays = decays + (decay,)
            betas = betas + (beta,)
        q, k, dot = _query_key(channels, k_dim, l2norm_eps, K)

        os = tl.zeros([RV_POW2], tl.float32)
        for m in tl.static_range(TILES):
            v_t = _value(channels, 2 * K + m // BLOCKS * V, m % BLOCKS * BV + v, V)
            o, new_tile = delta_update(
                tiles[0].to(tl.float32), q, k, dot, v_t, decays[m // BLOCKS], betas[m // BLOCKS], scale
            )
            os = _place(os, o, row, m // BLOCKS * V + m % BLOCKS * BV, m // BLOCKS * V + min(m % BLOCKS * BV + BV, V))
            _store_tile(
                state, write, h * R + m // BLOCKS, m % BLOCKS, stored & live, new_tile, v, k_dim, stride_s, stride_h,
                STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
            )  # fmt: skip
            tiles = tiles[1:]
            if m + AHEAD < TILES:
                tile = _load_tile(
                    state, read, h * R + (m + AHEAD) // BLOCKS, (m + AHEAD) % BLOCKS, stateful, v, k_dim,
                    stride_s, stride_h, STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
                )  # fmt: skip
                tiles = tiles + (tile,)
        gain = tl.load(norm_weight + row % V, mask=row < R * V, other=0.0).to(tl.float32)
        out = tl.where(live, _norm_gate(os, z_t, gain, row // V, eps, R, V, GATE), 0.0)
        tl.store(y + (at * H + h) * (R * V) + row, out.to(y.dtype.element_ty), mask=(row < R * V) & (end > start))
        if stored & (end == start):  # an empty row keeps its starting state
            for j in range(TILES):
                kept = _load_tile(
                    state, read, h * R + j // BLOCKS, j % BLOCKS, stateful, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
                )  # fmt: skip
                _store_tile(
                    state, write, h * R + j // BLOCKS, j % BLOCKS, stored, kept, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
                )  # fmt: skip
    else:
        # One value head after the other, so that its tiles fit into registers. Each convolves q and k again; the last
        # one stores their state, which until then the others read.
        row = tl.arange(0, V_POW2)
        gain = tl.load(norm_weight + row, mask=row < V, other=0.0).to(tl.float32)
        for i in range(R):
            head = h * R + i
            tiles = ()
            for j in tl.static_range(BLOCKS):
                tile = _load_tile(
                    state, read, head, j, stateful, v, k_dim, stride_s, stride_h,
                    STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
                )  # fmt: skip
                tiles = tiles + (tile.to(tl.float32),)
            c, in_c = _channels(h, head, H, K, V, 1, C_POW2)
            window = _load_window(conv_state, read, c, in_c & stateful, P, stride_cs, stride_cc, stride_cp, W)
            own = in_c & ((c >= 2 * H * K) | (i == R - 1))
            t = start
            while t < stop:
                at = t.to(tl.int64)
                new = tl.load(x + at * stride_xt + c, mask=in_c & valid, other=0.0).to(tl.float32)
                z_at = z + at * stride_zt + head * stride_zh + row
                z_t = tl.load(z_at, mask=(row < V) & valid, other=0.0).to(tl.float32)
                to = write_slots + n.to(tl.int64) * stride_wn + (t - start).to(tl.int64) * stride_wl
                write = tl.load(to, mask=valid & (t - start < L), other=-1)
                stored = (write >= 0) & (write < S)
                decay, beta = _gate_at(a, b, A_log, dt_bias, at, head, valid, stride_at, stride_bt, ALLOW_NEG_EIGVAL)
                # Read again for each token: that costs less than registers to keep them would.
                channels = _convolve(window, new, _load_filter(weight, bias, c, in_c, W), W, ACTIVATION)
                window = window[1:] + (new,)
                q, k, dot = _query_key(channels, k_dim, l2norm_eps, K)

                tl.debug_barrier()  # in place: the program has read all of its channels' state before it writes
                _store_window(conv_state, write, c, own & stored, window, P, stride_cs, stride_cc, stride_cp, W)
                os = tl.zeros([V_POW2], tl.float32)
                after = ()
                for j in tl.static_range(BLOCKS):
                    v_t = _value(channels, 2 * K, j * BV + v, V)
                    o, new_tile = delta_update(tiles[j], q, k, dot, v_t, decay, beta, scale)
                    os = _place(os, o, row, j * BV, min(j * BV + BV, V))
                    _store_tile(
                        state, write, head, j, stored, new_tile, v, k_dim, stride_s, stride_h,
                        STRIDE_V, STRIDE_K, V, K, BV, K_POW2, EVICT,
                    )  # fmt: skip
                    after = after + (new_tile,)
                tiles = after
                out = tl.where(valid, _norm_gate(os, z_t, gain, row // V, eps, 1, V, GATE), 0.0)
                tl.store(y + (at * (H * R) + head) * V + row, out.to(y.dtype.element_ty), mask=row < V)
                t += 1

    report_slots(read, write_slots, error, n, tl.where(h == 0, 0, L), L, S, stride_wn, stride_wl)
    # Tokens past the last sequence belong to nobody, nor do (unless cu_seqlens is malformed) those before the first
    # and a decode row's second. Whoever is next to them clears them.
    part = tl.arange(0, RV_POW2)
    zero = tl.zeros([RV_POW2], y.dtype.element_ty)
    t = tl.where(n == 0, 0, stop)
    after_end = tl.where(n == N - 1, T, end)
    while t < after_end:
        if (t < start) | (t >= stop):
            tl.store(y + (t.to(tl.int64) * H + h) * (R * V) + part, zero, mask=part < R * V)
        t += 1
