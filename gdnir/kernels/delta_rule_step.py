"""The gated delta rule token by token, for decode and verify: the state stays in registers over a row's few tokens.

S is V x K per value head, in a pool [S,HV,V,K] or [S,HV,K,V] seen through its strides. Metadata is read on the device
and never trusted: a bad slot or a malformed cu_seqlens must not become a bad address.
"""

import triton
import triton.language as tl

from .causal_conv1d import _bounds

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
# A single token has no true row stride, and a part of a batch is a slice, at any alignment: the activations count as
# varying too. They are small; the state is what is read in vectors.
_VARYING = [
    "T",
    "N",
    "S",
    "L",
    "stride_qt",
    "stride_kt",
    "stride_vt",
    "stride_gt",
    "stride_bt",
    "stride_wn",
    "stride_wl",
]
_SLICED = ["q", "k", "v", "g", "beta", "o", "cu_seqlens", "read_slots", "write_slots", "has_state", "error"]
# For loads of states: in decode each of their lines is stored soon after. 2 to 5 % faster in large batches (docs/gluon.md).
KEEP_IN_L2 = tl.constexpr("evict_last")


@triton.jit
def state_tile(state, slot, head, v, k, stride_s, stride_h, STRIDE_V: tl.constexpr, STRIDE_K: tl.constexpr):
    """Addresses of rows v, columns k of one head's S. 64 bits: pools exceed 2^31 elements."""
    base = state + slot.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h
    return base + v.to(tl.int64)[:, None] * STRIDE_V + k.to(tl.int64)[None, :] * STRIDE_K


@triton.jit
def tile_mask(row, v, k, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, K_POW2: tl.constexpr):
    """Where a tile lies inside S, if `row` is true at all. Just `row` when nothing sticks out."""
    mask = row
    if V % BV != 0:
        mask = mask & (v < V)[:, None]
    if K != K_POW2:
        mask = mask & (k < K)[None, :]
    return mask


@triton.jit
def delta_update(S, q, k, qk, v, decay, beta, scale):
    """One token on rows of S (f32): (o, new S). Both products are taken from the old S, in one pass over it.

    S' = decay S + u k^T with u = beta (v - decay S k), hence S' q = decay S q + (q.k) u.
    """
    Sk = tl.sum(S * k[None, :], axis=1)
    Sq = tl.sum(S * q[None, :], axis=1)
    u = beta * (v - decay * Sk)
    return scale * (decay * Sq + qk * u), decay * S + u[:, None] * k[None, :]


@triton.jit
def report_slots(read, write_slots, error, n, first, L, S, stride_wn, stride_wl):
    """Raise the sticky flag for any slot that does not exist, also one that nothing uses; columns from `first` on."""
    tl.store(error, 1, mask=read >= S)
    step = first
    while step < L:
        write = tl.load(write_slots + n.to(tl.int64) * stride_wn + step.to(tl.int64) * stride_wl)
        tl.store(error, 1, mask=write >= S)
        step += 1


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_step_kernel(
    q,  # [T, H, K]
    k,  # [T, H, K]
    v,  # [T, HV, V]
    g,  # [T, HV] f32
    beta,  # [T, HV] f32
    state,
    o,  # [T, HV, V] contiguous
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    N,
    S,
    L,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_bt,
    stride_s,
    stride_h,
    stride_wn,
    stride_wl,
    scale,
    STRIDE_V: tl.constexpr,
    STRIDE_K: tl.constexpr,
    R: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    BV: tl.constexpr,
    VERIFY: tl.constexpr,
):
    """One sequence, one value head, BV rows of its state.

    VERIFY stores the state after each of the first L tokens, otherwise the state after the one token is stored.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = pid // (HV * blocks)
    head = (pid // blocks) % HV
    rows = (pid % blocks) * BV + tl.arange(0, BV)
    in_v = rows < V
    cols = tl.arange(0, K_POW2)
    in_k = cols < K
    start, end = _bounds(cu_seqlens, n, T)
    read = tl.load(read_slots + n)
    valid = (read >= 0) & (read < S)
    stateful = valid & (tl.load(has_state + n) != 0)

    old = state_tile(state, read, head, rows, cols, stride_s, stride_h, STRIDE_V, STRIDE_K)
    mask = tile_mask(stateful, rows, cols, V, K, BV, K_POW2)
    tile = tl.load(old, mask=mask, other=0.0, eviction_policy=KEEP_IN_L2).to(tl.float32)

    to = write_slots + n.to(tl.int64) * stride_wn
    t = start
    stop = end
    if not VERIFY:
        stop = tl.minimum(end, start + 1)
    while t < stop:
        at = t.to(tl.int64)
        key_head = head // R
        q_t = tl.load(q + at * stride_qt + key_head * stride_qh + cols, mask=valid & in_k, other=0.0).to(tl.float32)
        k_t = tl.load(k + at * stride_kt + key_head * stride_kh + cols, mask=valid & in_k, other=0.0).to(tl.float32)
        v_t = tl.load(v + at * stride_vt + head * stride_vh + rows, mask=valid & in_v, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(g + at * stride_gt + head, mask=valid, other=0.0))
        beta_t = tl.load(beta + at * stride_bt + head, mask=valid, other=0.0)
        o_t, tile = delta_update(tile, q_t, k_t, tl.sum(q_t * k_t), v_t, decay, beta_t, scale)
        o_t = tl.where(valid, o_t, 0.0)
        tl.store(o + (at * HV + head) * V + rows, o_t.to(o.dtype.element_ty), mask=in_v)
        if VERIFY:
            step = t - start
            write = tl.load(to + step.to(tl.int64) * stride_wl, mask=valid & (step < L), other=-1)
            new = state_tile(state, write, head, rows, cols, stride_s, stride_h, STRIDE_V, STRIDE_K)
            mask = tile_mask((write >= 0) & (write < S), rows, cols, V, K, BV, K_POW2)
            tl.debug_barrier()  # in place: the program has read all of the old tile before it writes
            tl.store(new, tile.to(state.dtype.element_ty), mask=mask)
        t += 1

    if not VERIFY:
        write = tl.load(to, mask=valid, other=-1)
        new = state_tile(state, write, head, rows, cols, stride_s, stride_h, STRIDE_V, STRIDE_K)
        mask = tile_mask((write >= 0) & (write < S), rows, cols, V, K, BV, K_POW2)
        tl.debug_barrier()  # as above
        tl.store(new, tile.to(state.dtype.element_ty), mask=mask)

    report_slots(read, write_slots, error, n, tl.where(pid % (HV * blocks) == 0, 0, L), L, S, stride_wn, stride_wl)
    # Tokens past the last sequence belong to nobody, nor do (unless cu_seqlens is malformed) those before the first
    # and a decode row's second. Whoever is next to them clears them.
    zero = tl.zeros([BV], o.dtype.element_ty)
    t = tl.where(n == 0, 0, stop)
    after = tl.where(n == N - 1, T, end)
    while t < after:
        if (t < start) | (t >= stop):
            tl.store(o + (t.to(tl.int64) * HV + head) * V + rows, zero, mask=in_v)
        t += 1
