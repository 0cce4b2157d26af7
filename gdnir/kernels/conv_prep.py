"""From the input projections to the delta rule's operands in one kernel: convolution, SiLU, split, l2norm, gates.

  qkv [T,C], a, b [T,HV]  ->  q, k [T,H,K] normalised, v [T,HV,V], g, beta [T,HV] f32

Each activation is read once and written once. States as in causal_conv1d.py: conv_start alone reads and writes them.
"""

import triton
import triton.language as tl

from .causal_conv1d import _SLICED, _VARYING, conv_rows, conv_start
from .gdn_gate import gate


@triton.jit(
    do_not_specialize=[*_VARYING, "stride_at", "stride_bt"], do_not_specialize_on_alignment=[*_SLICED, "a", "b"]
)
def conv_prep_kernel(
    x,
    a,
    b,
    weight,
    bias,
    conv_state,
    A_log,
    dt_bias,
    qk,  # [2, T, H, K] contiguous
    v,  # [T, HV, V] contiguous
    g,  # [T, HV] f32 contiguous
    beta,
    cu_seqlens,
    read_slots,
    write_slots,
    has_state,
    error,
    T,
    N,
    S,
    P,
    stride_xt,
    stride_at,
    stride_bt,
    stride_s,
    stride_c,
    stride_p,
    stride_wn,
    eps,
    BT,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_POW2: tl.constexpr,
    V_POW2: tl.constexpr,
    W: tl.constexpr,
    W_POW2: tl.constexpr,
    BC: tl.constexpr,
    STEP: tl.constexpr,
    BG: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr,
):
    """A program is whole heads, about BC channels of q, of k or of v, of a sequence's start and state or of BT tokens; the
    last programs are the gates."""
    KEY_HEADS: tl.constexpr = max(1, BC // K_POW2)
    VALUE_HEADS: tl.constexpr = max(1, BC // V_POW2)
    KEY_BLOCKS: tl.constexpr = (H + KEY_HEADS - 1) // KEY_HEADS
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (HV + VALUE_HEADS - 1) // VALUE_HEADS
    pid = tl.program_id(0)
    programs = (N + tl.cdiv(T, BT)) * BLOCKS
    block = pid % BLOCKS  # blocks vary fastest: neighbours read the same rows of memory
    place = pid // BLOCKS
    if pid >= programs:
        at = (pid - programs).to(tl.int64) * BG + tl.arange(0, BG)
        inside = at < T.to(tl.int64) * HV
        t, at_head = at // HV, at % HV
        a_t = tl.load(a + t * stride_at + at_head, mask=inside, other=0.0).to(tl.float32)
        b_t = tl.load(b + t * stride_bt + at_head, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(A_log + at_head, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(dt_bias + at_head, mask=inside, other=0.0).to(tl.float32)
        log_decay, strength = gate(a_t, b_t, decay, shift, ALLOW_NEG_EIGVAL)
        tl.store(g + at, log_decay, mask=inside)
        tl.store(beta + at, strength, mask=inside)
    elif block < 2 * KEY_BLOCKS:
        part = block // KEY_BLOCKS
        head = (block % KEY_BLOCKS) * KEY_HEADS + tl.arange(0, KEY_HEADS)[:, None]
        d = tl.arange(0, K_POW2)[None, :]
        o = head * K + d
        c = part * (H * K) + o
        to = qk + part.to(tl.int64) * T * (H * K)
        in_c = (head < H) & (d < K)
        if place < N:
            conv_start(
                x, to, weight, bias, conv_state, cu_seqlens, read_slots, write_slots, has_state, error, T, S, P, stride_xt,
                stride_s, stride_c, stride_p, stride_wn, H * K, place, c, o, in_c, eps, W, W_POW2, ACTIVATION, True,
            )  # fmt: skip
        else:
            conv_rows(
                x, to, weight, bias, cu_seqlens, read_slots, T, N, S, stride_xt, H * K, (place - N) * BT, BT, c, o, in_c,
                eps, W, W_POW2, STEP, ACTIVATION, True,
            )  # fmt: skip
    else:
        head_v = (block - 2 * KEY_BLOCKS) * VALUE_HEADS + tl.arange(0, VALUE_HEADS)[:, None]
        d_v = tl.arange(0, V_POW2)[None, :]
        o_v = head_v * V + d_v
        c_v = 2 * H * K + o_v
        in_v = (head_v < HV) & (d_v < V)
        if place < N:
            conv_start(
                x, v, weight, bias, conv_state, cu_seqlens, read_slots, write_slots, has_state, error, T, S, P, stride_xt,
                stride_s, stride_c, stride_p, stride_wn, HV * V, place, c_v, o_v, in_v, eps, W, W_POW2, ACTIVATION, False,
            )  # fmt: skip
        else:
            conv_rows(
                x, v, weight, bias, cu_seqlens, read_slots, T, N, S, stride_xt, HV * V, (place - N) * BT, BT, c_v, o_v, in_v,
                eps, W, W_POW2, STEP, ACTIVATION, False,
            )  # fmt: skip
