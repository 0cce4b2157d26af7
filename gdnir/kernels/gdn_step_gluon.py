"""The kernel of gdn_step.py on Hopper, where a key head may have a cluster of CTAs, and a state is read once for several tokens.

  qkv [T,C] -> conv update, SiLU -> q, k normalised; v -> delta rule -> gated RMSNorm with z -> y [T,HV,V]

A cluster is one sequence and one key head h, with the states of its R value heads: their rows one after the other, V_POW2 for each
head, cut into tiles of BV. Of few clusters each has CTAS CTAs, with a tile each; of many each is one CTA, which goes through all
TILES tiles. What the tokens are made of lies in shared memory before the first tile is needed; a tile goes through all tokens in
registers, and no value of it leaves its warp. CTAs convolve q and k each for itself. Two things need the others: the norm, for
which each tells all its sums of squares, and the in-place conv state of q and k, which is stored when all have read it.
Arithmetic in f32, rounded once, in y and in the states. Layouts and what is trusted: as in gdn_step.py.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.runtime.jit import constexpr_function

from .bulk_ring import arrived, close_ring, fence, fetch, fill, open_ring, places, put, ring_shape, send, sent, take
from .causal_conv1d import _activate, _bounds
from .delta_rule_gluon_prep import _barrier
from .delta_rule_step import KEEP_IN_L2, report_slots
from .gdn_gate import gate
from .gdn_step import _SLICED, _VARYING, _in_f32, _load_window, _store_window
from .sigmoid import sigmoid, silu


@constexpr_function
def _split(ctas, *step):
    """Where a layout has the CTAs: each `step` after the last; all have the same if it is 0."""
    return [[x << i for x in step] for i in range(ctas.bit_length() - 1)]


@constexpr_function
def _state_layout(rows, vector, warps, ctas):
    """8 lanes read 128 bytes of a row: a sum over K takes 3 shuffles. `rows` neighbours in a thread."""
    return gl.BlockedLayout([rows, vector], [4, 8], [warps, 1], [1, 0], _split(ctas, 1, 0))


@constexpr_function
def _taps_layout(channels, width, warps, ctas, step):
    """A channel's filter in one thread; what warps are too many has copies."""
    down = max(1, min(warps, channels // 32))
    return gl.BlockedLayout([1, width], [32, 1], [down, warps // down], [1, 0], _split(ctas, step, 0))


@constexpr_function
def _columns_layout(rows, warps, ctas):
    """A row in the lanes that have it in a tile: they share what there is of each tile."""
    return gl.BlockedLayout([rows, 1], [4, 8], [warps, 1], [1, 0], _split(ctas, 1, 0))


@constexpr_function
def _heads_layout(warps):
    return gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0])


@constexpr_function
def _everywhere_layout(count, warps):
    """Each warp has all, so that it needs no other for their sum."""
    return gl.BlockedLayout([max(1, count // 32)], [32], [warps], [0])


@constexpr_function
def _matrix_layout(ctas, step):
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0], _split(ctas, 0, step))


@constexpr_function
def _vector_layout(ctas, step):
    return gl.SwizzledSharedLayout(1, 1, 1, [0], _split(ctas, step))


@constexpr_function
def _sums_of_groups(count, ctas, group):
    """PTX: outputs are the sums of the inputs, `count` of them, over the `group` neighbouring CTAs of this one.

    Every CTA writes to all others' shared memory, once.
    """
    given = range(count)
    code = [
        f"{{ .shared .align 4 .b32 given[{count * ctas}]; .reg .b32 rank, mine, at; .reg .f32 x, sum; .reg .pred some;",
        "mov.u32 rank, %cluster_ctarank; mov.u32 at, %tid.x; mov.u32 mine, given;",
        f"setp.lt.u32 some, at, {ctas};",
        "mad.lo.u32 rank, rank, 4, mine;",
        "@some mapa.shared::cluster.u32 rank, rank, at;",
        *[f"@some st.shared::cluster.f32 [rank+{4 * ctas * i}], ${count + i};" for i in given],
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        f"mov.u32 rank, %cluster_ctarank; and.b32 rank, rank, {ctas - group}; mad.lo.u32 at, rank, 4, mine;",
    ]
    for i in given:
        code.append("mov.f32 sum, 0f00000000;")
        code += [f"ld.shared.f32 x, [at+{4 * (ctas * i + j)}]; add.f32 sum, sum, x;" for j in range(group)]
        code.append(f"mov.f32 ${i}, sum;")
    return "\n".join([*code, "}"])


@constexpr_function
def _constraints(count):
    return ",".join(["=f"] * count + ["f"] * count)


@constexpr_function
def _floats(count):
    return [gl.float32] * count


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
def _over_groups(sums, CTAS: gl.constexpr, GROUP: gl.constexpr):
    """Each of `sums` [CTAS], one element in each CTA, over its group; nobody goes on before all have come here."""
    COUNT: gl.constexpr = len(sums)
    CODE: gl.constexpr = _sums_of_groups(COUNT, CTAS, GROUP)
    CONSTRAINTS: gl.constexpr = _constraints(COUNT)
    FLOATS: gl.constexpr = _floats(COUNT)
    return gl.inline_asm_elementwise(CODE, CONSTRAINTS, sums, dtype=FLOATS, is_pure=False, pack=1)


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
def _store_windows(
    conv_state, slots, channels, masks, inputs, S, P, stride_s, stride_c, stride_p, W: gl.constexpr, FIRST: gl.constexpr
):  # fmt: skip
    """For q and k, then for v: to each slot W-1 of the channels' `inputs`, from number FIRST on for the first slot, from one later
    for each next one."""
    for i in gl.static_range(2):
        for t in gl.static_range(len(slots)):
            stored = _exists(slots[t], S)
            last = inputs[i][FIRST + t :]
            _store_window(
                conv_state, slots[t], channels[i], masks[i] & stored, last, P, stride_s, stride_c, stride_p, W
            )  # fmt: skip


@gluon.jit
def _convolve(
    inputs, filter_, to, TOKENS: gl.constexpr, W: gl.constexpr, W_POW2: gl.constexpr, ACTIVATION: gl.constexpr,
    TAPS: gl.constexpr,
):  # fmt: skip
    """Every token's outputs to shared memory. Oldest tap first, as in causal_conv1d.py."""
    w = gl.arange(0, W_POW2, gl.SliceLayout(0, TAPS))[None, :]
    taps, of_tap = filter_[0].to(gl.float32), ()
    for i in gl.static_range(W):
        of_tap = of_tap + (gl.sum(gl.where(w == i, taps, 0.0), axis=1),)
    for t in gl.static_range(TOKENS):
        acc = filter_[1]
        for i in gl.static_range(W):
            acc = acc + of_tap[i] * inputs[t + i]
        to.index(t).store(_activate(acc, ACTIVATION))


@gluon.jit
def _exists(slot, S):
    return (slot >= 0) & (slot < S)


@gluon.jit
def _load_tokens(
    x, z, a, b, write_slots, start, stop, valid, c_k, c_v, in_k, in_v, head, inner, n, TOKENS: gl.constexpr,
    stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
):  # fmt: skip
    """What is needed of the tokens, as it lies in memory: q and k, v, z, a, b, and the slots for their states."""
    qks, vs, zs, gates, slots = (), (), (), (), ()
    for t in gl.static_range(TOKENS):
        at, live = (start + t).to(gl.int64), valid & (start + t < stop)
        qks = qks + (gl.load(x + at * stride_xt + c_k, mask=in_k & live, other=0.0),)
        vs = vs + (gl.load(x + at * stride_xt + c_v, mask=in_v & live, other=0.0),)
        zs = zs + (gl.load(z + at * stride_zt + head * stride_zh + inner, mask=in_v & live, other=0.0),)
        a_t = gl.load(a + at * stride_at + head, mask=in_v & live, other=0.0)
        gates = gates + ((a_t, gl.load(b + at * stride_bt + head, mask=in_v & live, other=0.0)),)
        to = write_slots + n.to(gl.int64) * stride_wn + t * stride_wl.to(gl.int64)
        slots = slots + (gl.load(to, mask=live, other=-1),)
    return qks, vs, zs, gates, slots


@gluon.jit
def _factors(q, k, l2norm_eps, scale, AXIS: gl.constexpr):
    """(what q is multiplied with for scale and l2norm, what k is, their product as they are)"""
    by_q = scale * gl.rsqrt(gl.sum(q * q, axis=AXIS) + l2norm_eps)
    return by_q, gl.rsqrt(gl.sum(k * k, axis=AXIS) + l2norm_eps), gl.sum(q * k, axis=AXIS)


@gluon.jit
def _normalize(qk, dots, l2norm_eps, scale, K_POW2: gl.constexpr, LAYOUT: gl.constexpr):
    """q and k of all tokens where they lie, [TOKENS_POW2, 2 K_POW2]."""
    of_q, of_k = qk.slice(0, K_POW2, dim=1), qk.slice(K_POW2, K_POW2, dim=1)
    q, k = of_q.load(LAYOUT), of_k.load(LAYOUT)
    by_q, by_k, dot = _factors(q, k, l2norm_eps, scale, 1)
    of_q.store(q * by_q[:, None])
    of_k.store(k * by_k[:, None])
    dots.store(dot * by_q * by_k)


@gluon.jit
def _update(tile, q, k, by_q, by_k, dot, v, decay, beta):
    """(o, the tile after the token), as delta_update in delta_rule_step.py; q and k still lack their factors."""
    Sk = gl.sum(tile * k[None, :], axis=1)
    Sq = gl.sum(tile * q[None, :], axis=1)
    u = beta * by_k * (v - decay * (by_k * Sk))
    return by_q * (decay * Sq + dot * u), decay[:, None] * tile + u[:, None] * k[None, :]


@gluon.jit
def _nth(m, BLOCKS: gl.constexpr, APART: gl.constexpr):
    """The mth tile that counts: the first BLOCKS of each head's APART do."""
    if BLOCKS == APART:
        j = m
    else:
        j = m // BLOCKS * APART + m % BLOCKS
    return j


@gluon.jit
def _first_of_tile(state, j, stride_h, BV: gl.constexpr, K: gl.constexpr, V_POW2: gl.constexpr):
    """Address of the cluster's jth tile in slot 0, from its first head on, whose rows have no gaps."""
    row = j * BV
    return state + stride_h.to(gl.int64) * (row // V_POW2) + row % V_POW2 * K


@gluon.jit
def _of_tile(state, j, stride_h, row, column, STRIDE_V: gl.constexpr, STRIDE_K: gl.constexpr, R: gl.constexpr,
             K: gl.constexpr, V: gl.constexpr, V_POW2: gl.constexpr):  # fmt: skip
    """(addresses of the cluster's jth tile in slot 0 from its first head on, which of them are the state's)"""
    row = j * row.shape[0] + row
    inside = ((row // V_POW2 < R) & (row % V_POW2 < V))[:, None] & (column < K)[None, :]
    at = (row // V_POW2).to(gl.int64) * stride_h + (row % V_POW2).to(gl.int64) * STRIDE_V
    return state + at[:, None] + (column.to(gl.int64) * STRIDE_K)[None, :], inside


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
    TILES: gl.constexpr,
    AHEAD: gl.constexpr,
    BULK: gl.constexpr,
    EARLY: gl.constexpr,
    TOKENS: gl.constexpr,
    TOKENS_POW2: gl.constexpr,
    VECTOR: gl.constexpr,
    VERIFY: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALLOW_NEG_EIGVAL: gl.constexpr,
    GATE: gl.constexpr,
):
    """CTAS of a cluster, tiles of a CTA, of which AHEAD are in flight: one of CTAS and TILES is 1. EARLY: q and k are normalised
    once, not for each tile (CTAS is 1). BULK: tiles go through shared memory as in bulk_ring.py, where rows have no gaps.
    VECTOR: elements in 16 bytes.

    TOKENS: most of a sequence, 1 in decode. VERIFY stores the states after each of them, decode that after the one, or the old
    one of an empty row.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = CTAS * BV  # of all CTAs' tiles
    HEADS: gl.constexpr = TILES * ROWS // V_POW2
    APART: gl.constexpr = max(1, TILES // HEADS)  # tiles from one head to the next, of which those below V count
    BLOCKS: gl.constexpr = min(APART, (V + BV - 1) // BV)
    USED: gl.constexpr = 1 if CTAS > 1 else R * BLOCKS
    HELD: gl.constexpr = BULK and TOKENS == 1  # q and k, in registers, with their factors
    ROWS_OF_THREAD: gl.constexpr = BV // (4 * WARPS) if BULK else 1  # a warp's have no gaps
    TILE: gl.constexpr = _state_layout(ROWS_OF_THREAD, VECTOR, WARPS, CTAS)
    TAPS_V: gl.constexpr = _taps_layout(TILES * BV, W_POW2, WARPS, CTAS, 1)
    TAPS_K: gl.constexpr = _taps_layout(2 * K_POW2, W_POW2, WARPS, CTAS, 0)
    COLUMNS: gl.constexpr = _columns_layout(ROWS_OF_THREAD, WARPS, CTAS)
    OF_V: gl.constexpr = gl.SliceLayout(1, TAPS_V)
    OF_ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    EVERYWHERE: gl.constexpr = _everywhere_layout(V_POW2, WARPS)
    RING: gl.constexpr = ring_shape(AHEAD, WARPS, BV * K * 16 // VECTOR)
    # Decode writes the lines that it has read, which have served; verify those of other slots, most of which nobody will read.
    WRITTEN: gl.constexpr = "evict_first" if VERIFY else "evict_normal"
    if CTAS > 1:
        _arrive()  # nobody may write into the memory of one that has not begun
    qk = gl.allocate_shared_memory(gl.float32, [TOKENS_POW2, 2 * K_POW2], _vector_layout(CTAS, 0))
    vs = gl.allocate_shared_memory(gl.float32, [TOKENS, TILES * ROWS], _vector_layout(CTAS, 1))
    decays = gl.allocate_shared_memory(gl.float32, [TOKENS, TILES * ROWS], _vector_layout(CTAS, 1))
    betas = gl.allocate_shared_memory(gl.float32, [TOKENS, TILES * ROWS], _vector_layout(CTAS, 1))
    outputs = gl.allocate_shared_memory(gl.float32, [TOKENS, TILES, ROWS], _matrix_layout(CTAS, 1))
    dots = gl.allocate_shared_memory(gl.float32, [1, TOKENS_POW2], _vector_layout(CTAS, 0))
    dot_of_token = dots._reinterpret(gl.float32, [TOKENS_POW2, 1], _vector_layout(CTAS, 0))
    q_and_k = qk._reinterpret(gl.float32, [2 * TOKENS_POW2, K_POW2], _vector_layout(CTAS, 0))
    v_of_tile = vs._reinterpret(gl.float32, [TOKENS * TILES, ROWS], _vector_layout(CTAS, 1))
    decay_of_tile = decays._reinterpret(gl.float32, [TOKENS * TILES, ROWS], _vector_layout(CTAS, 1))
    beta_of_tile = betas._reinterpret(gl.float32, [TOKENS * TILES, ROWS], _vector_layout(CTAS, 1))
    flat = outputs._reinterpret(gl.float32, [TOKENS, TILES * ROWS], _vector_layout(CTAS, 1))

    pid = gl.program_id(0)
    n = pid // H
    h = pid % H
    d = gl.arange(0, 2 * K_POW2, gl.SliceLayout(1, TAPS_K))
    in_k = d % K_POW2 < K
    c_k = (d // K_POW2 * H + h) * K + d % K_POW2
    i = gl.arange(0, TILES * ROWS, OF_V)
    inner = i % V_POW2
    in_v = (i // V_POW2 < R) & (inner < V)
    head = gl.where(in_v, h * R + i // V_POW2, 0)
    of_y = head * V + inner
    c_v = 2 * H * K + of_y
    channels, masks = (c_k, c_v), (in_k, in_v)
    row = gl.arange(0, ROWS, OF_ROW)
    column = gl.arange(0, K_POW2, OF_COLUMN)

    # All that is read is asked for before anything waits: the slot, since most waits for it, what depends on no slot, then the few
    # inputs, then the state.
    read = gl.load(read_slots + n)
    has = gl.load(has_state + n)
    if BULK and not VERIFY:
        named = gl.load(write_slots + n.to(gl.int64) * stride_wn)
    start, end = _bounds(cu_seqlens, n, T)
    stop = gl.minimum(end, start + TOKENS)
    valid = _exists(read, S)
    stateful = valid & (has != 0)
    if BULK:
        ring, memory = open_ring(RING)
    filter_k = _load_filter(weight, bias, c_k, in_k, W, W_POW2, TAPS_K)
    filter_v = _load_filter(weight, bias, c_v, in_v, W, W_POW2, TAPS_V)
    rate, shift = gl.load(A_log + head), gl.load(dt_bias + head)
    gain = gl.load(norm_weight + inner, mask=in_v, other=0.0)
    window_k = _load_window(conv_state, read, c_k, in_k & stateful, P, stride_cs, stride_cc, stride_cp, W)
    window_v = _load_window(conv_state, read, c_v, in_v & stateful, P, stride_cs, stride_cc, stride_cp, W)
    new_k, new_v, zs, gates, slots = _load_tokens(
        x, z, a, b, write_slots, start, stop, valid, c_k, c_v, in_k, in_v, head, inner, n, TOKENS,
        stride_xt, stride_zt, stride_zh, stride_at, stride_bt, stride_wn, stride_wl,
    )  # fmt: skip
    first = state + (h * R).to(gl.int64) * stride_h
    source = first + read.to(gl.int64) * stride_s
    tiles = ()
    asked = stateful & (start < stop)  # what is asked for must be taken
    for m in gl.static_range(AHEAD):
        j = _nth(m, BLOCKS, APART)
        if BULK:
            fetch(ring, m, _first_of_tile(source, j, stride_h, BV, K, V_POW2), asked & (m < USED), RING)
        else:
            at, inside = _of_tile(source, j, stride_h, row, column, STRIDE_V, STRIDE_K, R, K, V, V_POW2)
            tiles = tiles + (gl.load(at, mask=inside & stateful, other=0.0, eviction_policy=KEEP_IN_L2),)
    if CTAS > 1:
        _wait()

    if valid & (start < stop):  # the branch also keeps the compiler from computing before it has asked for the state
        inputs_k, inputs_v = _in_f32(window_k + new_k), _in_f32(window_v + new_v)
        _convolve(inputs_k, filter_k, qk, TOKENS, W, W_POW2, ACTIVATION, TAPS_K)
        _convolve(inputs_v, filter_v, vs, TOKENS, W, W_POW2, ACTIVATION, TAPS_V)
        outs = ()
        for t in gl.static_range(TOKENS):
            a_t, b_t = gates[t][0].to(gl.float32), gates[t][1].to(gl.float32)
            g, beta_t = gate(a_t, b_t, rate.to(gl.float32), shift.to(gl.float32), ALLOW_NEG_EIGVAL)
            decays.index(t).store(gl.exp(g))
            betas.index(t).store(beta_t)
            outs = outs + (gl.zeros([ROWS, TILES], gl.float32, COLUMNS),)
        if EARLY and not HELD:
            rows_of_qk = qk._reinterpret(gl.float32, [TOKENS_POW2, 2 * K_POW2], _matrix_layout(CTAS, 0))
            _normalize(rows_of_qk, dots.index(0), l2norm_eps, scale, K_POW2, _heads_layout(WARPS))
        if CTAS == 1:
            _barrier()  # all have read the old windows
            _store_windows(
                conv_state, slots, channels, masks, (inputs_k, inputs_v), S, P, stride_cs, stride_cc, stride_cp, W, 1
            )  # fmt: skip

        if HELD:
            q, k = q_and_k.index(0).load(OF_COLUMN), q_and_k.index(1).load(OF_COLUMN)
            by_q, by_k, dot = _factors(q, k, l2norm_eps, scale, 0)
        if BULK:
            place = places(row, column, K, VECTOR)
            if stateful == 0:
                fill(ring, place, gl.zeros([ROWS, K_POW2], state.dtype.element_ty, TILE), VECTOR, RING)
        for this in range(USED):
            j = _nth(this, BLOCKS, APART)
            if BULK:
                arrived(ring, this, stateful, RING)
                tile = take(ring, this, place, state.dtype.element_ty, VECTOR, RING)
            else:
                tile = tiles[0]
            tile, after = tile.to(gl.float32), ()
            if BULK:
                at = _first_of_tile(first, j, stride_h, BV, K, V_POW2)
            else:
                at, inside = _of_tile(first, j, stride_h, row, column, STRIDE_V, STRIDE_K, R, K, V, V_POW2)
            mine = gl.arange(0, TILES, gl.SliceLayout(0, COLUMNS))[None, :] == j
            for t in gl.static_range(TOKENS):
                if not HELD:
                    q, k = q_and_k.index(2 * t).load(OF_COLUMN), q_and_k.index(2 * t + 1).load(OF_COLUMN)
                    if EARLY:
                        by_q, by_k, dot = 1.0, 1.0, dot_of_token.index(t).load(OF_ROW)
                    else:
                        by_q, by_k, dot = _factors(q, k, l2norm_eps, scale, 0)
                v = v_of_tile.index(t * TILES + j).load(OF_ROW)
                decay = decay_of_tile.index(t * TILES + j).load(OF_ROW)
                beta = beta_of_tile.index(t * TILES + j).load(OF_ROW)
                o, tile = _update(tile, q, k, by_q, by_k, dot, v, decay, beta)
                o = gl.convert_layout(o, gl.SliceLayout(1, COLUMNS), assert_trivial=True)
                after = after + (gl.where(mine, o[:, None], outs[t]),)
                stored, slot = _exists(slots[t], S), slots[t].to(gl.int64) * stride_s
                if BULK:
                    sent()
                    put(ring, place, tile.to(state.dtype.element_ty), VECTOR, RING)
                    fence()
                    if t == 0:
                        later = this + AHEAD
                        next_source = _first_of_tile(source, _nth(later, BLOCKS, APART), stride_h, BV, K, V_POW2)
                        fetch(ring, later, next_source, stateful & (later < USED), RING)
                    send(ring, at + slot, stored, WRITTEN, RING)
                else:
                    gl.store(at + slot, tile.to(state.dtype.element_ty), mask=inside & stored)
            outs = after
            if not BULK:
                if AHEAD < USED:
                    later = this + AHEAD
                    at, inside = _of_tile(
                        source, _nth(later, BLOCKS, APART), stride_h, row, column, STRIDE_V, STRIDE_K, R, K, V, V_POW2
                    )
                    mask = inside & stateful & (later < USED)
                    tiles = tiles[1:] + (gl.load(at, mask=mask, other=0.0, eviction_policy=KEEP_IN_L2),)
                else:
                    tiles = tiles[1:] + (tiles[0],)
        for t in gl.static_range(TOKENS):
            outputs.index(t).permute([1, 0]).store(outs[t])
        if CTAS > 1:
            sums = ()
            for t in gl.static_range(TOKENS):
                parts = gl.reshape(flat.index(t).load(OF_V), [CTAS, BV])
                sums = sums + (gl.sum(parts * parts, axis=1),)
            sums = _over_groups(sums, CTAS, CTAS // HEADS)
        for t in gl.static_range(TOKENS):
            o = flat.index(t).load(OF_V)
            if CTAS > 1:
                _, squares = gl.broadcast(gl.reshape(o, [CTAS, BV]), gl.expand_dims(sums[t], 1))
                squares = gl.convert_layout(gl.reshape(squares, [CTAS * BV]), OF_V, assert_trivial=True)
            else:
                squares = gl.zeros([TILES * BV], gl.float32, OF_V)
                for r in gl.static_range(HEADS):
                    of_head = flat.index(t).slice(r * V_POW2, V_POW2).load(EVERYWHERE)
                    squares = gl.where(i // V_POW2 == r, gl.sum(of_head * of_head, axis=0), squares)
            z_t = zs[t].to(gl.float32)
            act = silu(z_t) if GATE == "silu" else sigmoid(z_t)
            out = o * gl.rsqrt(squares / V + eps) * gain.to(gl.float32) * act
            at_y = y + (start + t).to(gl.int64) * (H * R * V) + of_y
            gl.store(at_y, out.to(y.dtype.element_ty), mask=in_v & (start + t < stop))
        if CTAS > 1:  # all have read the old windows
            _store_windows(
                conv_state, slots, channels, masks, (inputs_k, inputs_v), S, P, stride_cs, stride_cc, stride_cp, W, 1
            )  # fmt: skip
    elif not VERIFY:
        if valid & (start == stop):  # an empty row keeps its starting states
            write = gl.load(write_slots + n.to(gl.int64) * stride_wn)
            stored = _exists(write, S)
            _store_windows(
                conv_state, (write,), channels, masks, (window_k, window_v), S, P, stride_cs, stride_cc, stride_cp, W, 0
            )  # fmt: skip
            for j in range(TILES):
                at, inside = _of_tile(first, j, stride_h, row, column, STRIDE_V, STRIDE_K, R, K, V, V_POW2)
                kept = gl.load(at + read.to(gl.int64) * stride_s, mask=inside & stateful, other=0.0)
                gl.store(at + write.to(gl.int64) * stride_s, kept, mask=inside & stored)

    if BULK:
        sent()
        close_ring(memory)
    if BULK and not VERIFY:  # as report_slots, without a load to wait for at the end
        gl.store(error, 1, mask=gl.maximum(read, named) >= S)
    else:
        report_slots(read, write_slots, error, n, gl.where(h == 0, 0, L), L, S, stride_wn, stride_wl)
    # The tokens of a padding row are 0. So are those past the last sequence and (if cu_seqlens is malformed, or a row has more
    # than TOKENS) those of nobody, which whoever is next to them clears.
    clear = gl.where(n == 0, 0, gl.where(valid, stop, start))
    after_end = gl.where(n == N - 1, T, end)
    while clear < after_end:
        if (clear < start) | (clear >= stop) | (valid == 0):
            zero = gl.zeros([TILES * ROWS], y.dtype.element_ty, OF_V)
            gl.store(y + clear.to(gl.int64) * (H * R * V) + of_y, zero, mask=in_v)
        clear = clear + 1
