"""The kernel of gdn_step.py for few rows, on Hopper: what is one program there is a cluster of them here.

  qkv [T,C] -> conv update, SiLU -> q, k normalised; v -> delta rule -> gated RMSNorm with z -> y [T,HV,V]

A cluster is one sequence and one key head h, with its R value heads. Each of its CTAs has BV rows of one head's state, in
registers over the row's tokens, and convolves q and k for itself. Two things need the others: the norm, for which each tells
all its sum of squares, and the in-place conv state of q and k, which is stored when all have read it. Arithmetic in f32,
rounded once, in y and in the states. Layouts and what is trusted: as in gdn_step.py.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.runtime.jit import constexpr_function

from .gdn_gate import gate
from .sigmoid import sigmoid, silu

# As in gdn_step.py.
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


@constexpr_function
def _split(ctas, *step):
    """Where a layout has the CTAs: each `step` after the last; all have the same if it is 0."""
    return [[x << i for x in step] for i in range(ctas.bit_length() - 1)]


@constexpr_function
def _state_layout(vector, warps, ctas):
    """8 lanes read 128 bytes of a row: a sum over K takes 3 shuffles."""
    return gl.BlockedLayout([1, vector], [4, 8], [warps, 1], [1, 0], _split(ctas, 1, 0))


@constexpr_function
def _taps_layout(channels, width, warps, ctas, step):
    """A channel's filter in one thread; what warps are too many has copies."""
    down = max(1, min(warps, channels // 32))
    return gl.BlockedLayout([1, width], [32, 1], [down, warps // down], [1, 0], _split(ctas, step, 0))


@constexpr_function
def _vector_layout(ctas, step):
    return gl.SwizzledSharedLayout(1, 1, 1, [0], _split(ctas, step))


@constexpr_function
def _sum_of_group(ctas, group):
    """PTX: $0 is the sum of $1 over the `group` neighbouring CTAs of this one; $2 is 0 and 1 by turns.

    Every CTA writes to all others' shared memory. With two places a second sum may begin while another still adds the first.
    """
    code = [
        f"{{ .shared .align 4 .b32 given[{2 * ctas}]; .reg .b32 rank, mine, at; .reg .f32 x, sum; .reg .pred some;",
        "mov.u32 rank, %cluster_ctarank; mov.u32 at, %tid.x;",
        f"setp.lt.u32 some, at, {ctas};",
        f"mov.u32 mine, given; mad.lo.u32 mine, $2, {4 * ctas}, mine;",
        "mad.lo.u32 rank, rank, 4, mine;",
        "@some mapa.shared::cluster.u32 rank, rank, at;",
        "@some st.shared::cluster.f32 [rank], $1;",
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        f"mov.u32 rank, %cluster_ctarank; and.b32 rank, rank, {ctas - group}; mad.lo.u32 at, rank, 4, mine;",
        "mov.f32 sum, 0f00000000;",
        *[f"ld.shared.f32 x, [at+{4 * i}]; add.f32 sum, sum, x;" for i in range(group)],
        "mov.f32 $0, sum; }",
    ]
    return "\n".join(code)


@gluon.jit
def _arrive():
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait():
    gl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _over_groups(x, turn, CTAS: gl.constexpr, GROUP: gl.constexpr):
    """x [CTAS], one element in each, summed over its group of CTAs; nobody goes on before all have come here."""
    if CTAS > 1:
        SUM: gl.constexpr = _sum_of_group(CTAS, GROUP)
        x = gl.inline_asm_elementwise(SUM, "=f,f,r", [x, turn], dtype=gl.float32, is_pure=False, pack=1)
    return x


@gluon.jit
def _sum_of_heads(x, turn, CTAS: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Each row of x [rows] replaced by the sum over its head, whose rows GROUP CTAs share."""
    parts = gl.reshape(x, [CTAS, x.shape[0] // CTAS])
    total = _over_groups(gl.sum(parts, axis=1), turn, CTAS, GROUP)
    _, total = gl.broadcast(parts, gl.expand_dims(total, 1))
    return gl.convert_layout(gl.reshape(total, x.shape), LAYOUT, assert_trivial=True)


@gluon.jit
def _load_filter(weight, bias, c, mask, W: gl.constexpr, W_POW2: gl.constexpr, TAPS: gl.constexpr):
    """The taps of channels c, [C, W_POW2], and their bias, as they lie in memory."""
    w = gl.arange(0, W_POW2, gl.SliceLayout(0, TAPS))[None, :]
    taps = gl.load(weight + c[:, None] * W + w, mask=mask[:, None] & (w < W), other=0.0)
    shift = gl.zeros([c.shape[0]], gl.float32, gl.SliceLayout(1, TAPS))
    if bias is not None:
        shift = gl.load(bias + c, mask=mask, other=0.0).to(gl.float32)
    return taps, shift


@gluon.jit
def _oldest(conv_state, slot, c, P, stride_s, stride_c, stride_p, W: gl.constexpr):
    """Address of the oldest of the W-1 inputs that count. 64 bits: pools exceed 2^31 elements."""
    column = (P - (W - 1)).to(gl.int64)
    return conv_state + slot.to(gl.int64) * stride_s + c.to(gl.int64) * stride_c + column * stride_p


@gluon.jit
def _load_windows(conv_state, slot, channels, masks, stateful, P, stride_s, stride_c, stride_p, W: gl.constexpr):
    """The W-1 last inputs, oldest first, of the channels of q, of k and of v, as they lie in memory."""
    windows = ()
    for i in gl.static_range(3):
        oldest = _oldest(conv_state, slot, channels[i], P, stride_s, stride_c, stride_p, W)
        window = ()
        for j in gl.static_range(W - 1):
            window = window + (gl.load(oldest + j * stride_p, mask=masks[i] & stateful, other=0.0),)
        windows = windows + (window,)
    return windows


@gluon.jit
def _store_windows(
    conv_state, slot, channels, masks, stored, windows, P, stride_s, stride_c, stride_p, W: gl.constexpr
):
    for i in gl.static_range(3):
        oldest = _oldest(conv_state, slot, channels[i], P, stride_s, stride_c, stride_p, W)
        for j in gl.static_range(W - 1):
            gl.store(oldest + j * stride_p, windows[i][j].to(conv_state.dtype.element_ty), mask=masks[i] & stored)


@gluon.jit
def _in_f32(values):
    wide = ()
    for i in gl.static_range(len(values)):
        wide = wide + (values[i].to(gl.float32),)
    return wide


@gluon.jit
def _convolve(
    window, new, filter_, W: gl.constexpr, W_POW2: gl.constexpr, ACTIVATION: gl.constexpr, TAPS: gl.constexpr
):
    """Oldest tap first, as in causal_conv1d.py."""
    w = gl.arange(0, W_POW2, gl.SliceLayout(0, TAPS))[None, :]
    taps, acc = filter_[0].to(gl.float32), filter_[1]
    inputs = window + (new,)
    for i in gl.static_range(W):
        acc = acc + gl.sum(gl.where(w == i, taps, 0.0), axis=1) * inputs[i]
    if ACTIVATION == "silu":
        acc = silu(acc)
    return acc


@gluon.jit
def _load_token(
    x, z, a, b, write_slots, t, live, channels, masks, head, inner, n, step, L,
    stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
):  # fmt: skip
    """What is needed of token t, the row's `step`th, as it lies in memory: (q, k, v), z, a, b, slot."""
    at = t.to(gl.int64)
    new = ()
    for i in gl.static_range(3):
        new = new + (gl.load(x + at * stride_xt + channels[i], mask=masks[i] & live, other=0.0),)
    in_v = masks[2] & live
    z_t = gl.load(z + at * stride_zt + head * stride_zh + inner, mask=in_v, other=0.0)
    a_t = gl.load(a + at * stride_at + head, mask=in_v, other=0.0)
    b_t = gl.load(b + at * stride_bt + head, mask=in_v, other=0.0)
    write = gl.load(write_slots + n.to(gl.int64) * stride_wn + step * stride_wl, mask=live & (step < L), other=-1)
    return new, z_t, a_t, b_t, write


@gluon.jit
def _convolved(windows, new, filters, memory, W: gl.constexpr, W_POW2: gl.constexpr, ACTIVATION: gl.constexpr,
               TAPS_K: gl.constexpr, TAPS_V: gl.constexpr):  # fmt: skip
    """q, k and v to shared memory; the windows after it."""
    memory[0].index(0).store(_convolve(windows[0], new[0], filters[0], W, W_POW2, ACTIVATION, TAPS_K))
    memory[0].index(1).store(_convolve(windows[1], new[1], filters[1], W, W_POW2, ACTIVATION, TAPS_K))
    memory[1].index(0).store(_convolve(windows[2], new[2], filters[2], W, W_POW2, ACTIVATION, TAPS_V))
    return windows[0][1:] + (new[0],), windows[1][1:] + (new[1],), windows[2][1:] + (new[2],)


@gluon.jit
def _update(tile, memory, a, b, rate, shift, l2norm_eps, scale, ALLOW_NEG_EIGVAL: gl.constexpr, TILE: gl.constexpr):
    """The tile after the token whose q, k and v lie in shared memory; its outputs go there."""
    OF_ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    columns, rows, outputs = memory
    g, beta_v = gate(a.to(gl.float32), b.to(gl.float32), rate, shift, ALLOW_NEG_EIGVAL)
    rows.index(1).store(gl.exp(g))
    rows.index(2).store(beta_v)
    q, k = columns.index(0).load(OF_COLUMN), columns.index(1).load(OF_COLUMN)
    v, decay, beta = rows.index(0).load(OF_ROW), rows.index(1).load(OF_ROW), rows.index(2).load(OF_ROW)
    # As delta_update in delta_rule_step.py, with the l2norm of q and k taken out of the sums.
    Sk = gl.sum(tile * k[None, :], axis=1)
    Sq = gl.sum(tile * q[None, :], axis=1)
    by_q = gl.rsqrt(gl.sum(q * q, axis=0) + l2norm_eps)
    by_k = gl.rsqrt(gl.sum(k * k, axis=0) + l2norm_eps)
    u = beta * by_k * (v - decay * (by_k * Sk))
    outputs.index(0).store(scale * by_q * (decay * Sq + gl.sum(q * k, axis=0) * u))
    return decay[:, None] * tile + u[:, None] * k[None, :]


@gluon.jit
def _norm_gate(
    o, z, gain, eps, turn, CTAS: gl.constexpr, GROUP: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    z = z.to(gl.float32)
    act = silu(z) if GATE == "silu" else sigmoid(z)
    return o * gl.rsqrt(_sum_of_heads(o * o, turn, CTAS, GROUP, LAYOUT) / V + eps) * gain * act


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def gdn_step_gluon_kernel(
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
    STRIDE_V: gl.constexpr,
    STRIDE_K: gl.constexpr,
    W: gl.constexpr,
    W_POW2: gl.constexpr,
    H: gl.constexpr,
    R: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    K_POW2: gl.constexpr,
    V_POW2: gl.constexpr,
    BV: gl.constexpr,
    CTAS: gl.constexpr,
    VECTOR: gl.constexpr,
    VERIFY: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALLOW_NEG_EIGVAL: gl.constexpr,
    GATE: gl.constexpr,
):
    """CTAS: those of a cluster, of whose rows each has BV. A head's rows are V_POW2 apart. VECTOR: elements in 16 bytes.

    VERIFY stores the states after each of the first L tokens, decode that after the one token, or the old one of an empty row.
    """
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = _state_layout(VECTOR, WARPS, CTAS)
    TAPS_V: gl.constexpr = _taps_layout(BV, W_POW2, WARPS, CTAS, 1)
    TAPS_K: gl.constexpr = _taps_layout(K_POW2, W_POW2, WARPS, CTAS, 0)
    OF_V: gl.constexpr = gl.SliceLayout(1, TAPS_V)
    OF_ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    if CTAS > 1:
        _arrive()  # nobody may write into the memory of one that has not begun
    columns = gl.allocate_shared_memory(gl.float32, [2, K_POW2], _vector_layout(CTAS, 0))  # q, k
    rows = gl.allocate_shared_memory(gl.float32, [3, CTAS * BV], _vector_layout(CTAS, 1))  # v, decay, beta
    memory = columns, rows, gl.allocate_shared_memory(gl.float32, [1, CTAS * BV], _vector_layout(CTAS, 1))

    pid = gl.program_id(0)
    n = pid // H
    h = pid % H
    d = gl.arange(0, K_POW2, gl.SliceLayout(1, TAPS_K))
    in_k = d < K
    i = gl.arange(0, CTAS * BV, OF_V)
    inner = i % V_POW2
    in_v = (i // V_POW2 < R) & (inner < V)
    head = gl.where(in_v, h * R + i // V_POW2, 0)
    of_y = head * V + inner
    channels = h * K + d, (H + h) * K + d, 2 * H * K + of_y
    masks = in_k, in_k, in_v
    row = gl.arange(0, CTAS * BV, OF_ROW)
    column = gl.arange(0, K_POW2, OF_COLUMN)
    in_row = (row // V_POW2 < R) & (row % V_POW2 < V)
    in_tile = in_row[:, None] & (column < K)[None, :]
    of_tile = (h * R + row // V_POW2).to(gl.int64) * stride_h + (row % V_POW2).to(gl.int64) * STRIDE_V
    of_tile = of_tile[:, None] + (column.to(gl.int64) * STRIDE_K)[None, :]

    # All that is read is asked for before anything waits: what depends on no slot, then the few inputs, then the state.
    read = gl.load(read_slots + n)
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + 1), start), T)
    stop = end
    if not VERIFY:
        stop = gl.minimum(end, start + 1)
    valid = (read >= 0) & (read < S)
    stateful = valid & (gl.load(has_state + n) != 0)
    filter_q = _load_filter(weight, bias, channels[0], in_k, W, W_POW2, TAPS_K)
    filter_k = _load_filter(weight, bias, channels[1], in_k, W, W_POW2, TAPS_K)
    filters = filter_q, filter_k, _load_filter(weight, bias, channels[2], in_v, W, W_POW2, TAPS_V)
    rate, shift = gl.load(A_log + head).to(gl.float32), gl.load(dt_bias + head).to(gl.float32)
    gain = gl.load(norm_weight + inner, mask=in_v, other=0.0).to(gl.float32)
    windows = _load_windows(conv_state, read, channels, masks, stateful, P, stride_cs, stride_cc, stride_cp, W)
    ahead = _load_token(
        x, z, a, b, write_slots, start, valid & (start < stop), channels, masks, head, inner, n, 0, L,
        stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
    )  # fmt: skip
    tile = gl.load(state + read.to(gl.int64) * stride_s + of_tile, mask=in_tile & stateful, other=0.0)
    if CTAS > 1:
        _wait()

    if VERIFY:
        tile = tile.to(gl.float32)
        windows = _in_f32(windows[0]), _in_f32(windows[1]), _in_f32(windows[2])
        t = start
        while valid & (t < stop):
            new, z_t, a_t, b_t, write = ahead
            ahead = _load_token(
                x, z, a, b, write_slots, t + 1, t + 1 < stop, channels, masks, head, inner, n, t + 1 - start, L,
                stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
            )  # fmt: skip
            stored = (write >= 0) & (write < S)
            windows = _convolved(windows, _in_f32(new), filters, memory, W, W_POW2, ACTIVATION, TAPS_K, TAPS_V)
            tile = _update(tile, memory, a_t, b_t, rate, shift, l2norm_eps, scale, ALLOW_NEG_EIGVAL, TILE)
            to = state + write.to(gl.int64) * stride_s + of_tile
            gl.store(to, tile.to(state.dtype.element_ty), mask=in_tile & stored)
            o = memory[2].index(0).load(OF_V)
            out = _norm_gate(o, z_t, gain, eps, (t - start) & 1, CTAS, V_POW2 // BV, V, GATE, OF_V)
            gl.store(y + t.to(gl.int64) * (H * R * V) + of_y, out.to(y.dtype.element_ty), mask=in_v)
            # all CTAs have read what they need of the old ones
            _store_windows(
                conv_state, write, channels, masks, stored, windows, P, stride_cs, stride_cc, stride_cp, W
            )  # fmt: skip
            t = t + 1
    else:
        write = gl.load(write_slots + n.to(gl.int64) * stride_wn)
        stored = valid & (write >= 0) & (write < S)
        to = state + write.to(gl.int64) * stride_s + of_tile
        if valid & (start < stop):
            new, z_t, a_t, b_t, _ = ahead
            old = _in_f32(windows[0]), _in_f32(windows[1]), _in_f32(windows[2])
            after = _convolved(old, _in_f32(new), filters, memory, W, W_POW2, ACTIVATION, TAPS_K, TAPS_V)
            updated = _update(
                tile.to(gl.float32), memory, a_t, b_t, rate, shift, l2norm_eps, scale, ALLOW_NEG_EIGVAL, TILE
            )  # fmt: skip
            gl.store(to, updated.to(state.dtype.element_ty), mask=in_tile & stored)
            o = memory[2].index(0).load(OF_V)
            out = _norm_gate(o, z_t, gain, eps, 0, CTAS, V_POW2 // BV, V, GATE, OF_V)
            gl.store(y + start.to(gl.int64) * (H * R * V) + of_y, out.to(y.dtype.element_ty), mask=in_v)
            # as above
            _store_windows(conv_state, write, channels, masks, stored, after, P, stride_cs, stride_cc, stride_cp, W)
        elif start == stop:  # an empty row keeps its starting states
            gl.store(to, tile, mask=in_tile & stored)
            _store_windows(conv_state, write, channels, masks, stored, windows, P, stride_cs, stride_cc, stride_cp, W)
    # A slot that does not exist raises the sticky flag, also one that nothing uses.
    gl.store(error, 1, mask=read >= S)
    step = gl.where(h == 0, 0, L)
    while step < L:
        gl.store(error, 1, mask=gl.load(write_slots + n.to(gl.int64) * stride_wn + step * stride_wl) >= S)
        step = step + 1
    # The tokens of a padding row are 0. So are those past the last sequence and (if cu_seqlens is malformed, or decode has a
    # second token) those of nobody, which whoever is next to them clears.
    t = gl.where(n == 0, 0, gl.where(valid, stop, start))
    after_end = gl.where(n == N - 1, T, end)
    while t < after_end:
        if (t < start) | (t >= stop) | (valid == 0):
            zero = gl.zeros([CTAS * BV], y.dtype.element_ty, OF_V)
            gl.store(y + t.to(gl.int64) * (H * R * V) + of_y, zero, mask=in_v)
        t = t + 1
