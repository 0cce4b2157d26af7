"""Peers in the same run: fla-core and FlashInfer on the operands of a benchmark, as functions of no arguments.

Each maker returns None where its package is not installed or does not take the shape. Nothing here is needed to use gdnir.
"""

import os

import torch
from gpu import chain_ms, events_ms, replay_ms

os.environ.setdefault("FLA_FLASH_QLA", "0")  # else fla-core hands prefill to FlashQLA where that is installed


def peer_ms(*calls, replays=40):
    """(median ms of one call, "graph" or "events"): CUDA-graph replays; events around calls if it cannot be captured."""
    try:
        return replay_ms(*calls, replays=replays), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
    for call in calls:
        call()
    return events_ms(calls, 20), "events"


def peer_chain_ms(*calls):
    """As peer_ms, of one call among many in one graph."""
    return chain_ms(*calls), "graph"


def error(got, want):
    """The relative error in the Frobenius norm."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def measure(name, calls, want, notes, bound=5e-2, timed=peer_ms):
    """Median ms of `calls`, the peer `name` on one or more sets of buffers; None, and a note that says why, if there is
    no call, it fails, or its first result is not ours (`want`; None for calls that were measured before, which may have
    moved their states on)."""
    if not calls:
        return None
    try:
        off = 0.0 if want is None else error(calls[0](), want)
        if not off <= bound:
            notes.append(f"{name}: left out, its result is {off:.1e} from ours")
            return None
        ms, how = timed(*calls)
    except Exception as problem:  # a peer's failure is reported, and ends no benchmark
        notes.append(f"{name}: failed, {type(problem).__name__}: {str(problem).splitlines()[0][:200]}")
        torch.cuda.synchronize()
        return None
    if how == "events":
        notes.append(f"{name}: by events around calls, it cannot be captured")
    return ms


def fla_rule(operands, seq):
    """fla-core's chunked rule of a packed prefill batch, its own copy of the initial state; returns o [T, HV, V]."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    q, k, v, g, beta, state = operands
    start = state.transpose(-1, -2).contiguous()
    cu = seq.cu_seqlens.long()  # one object: fla-core keeps what it computes from it, and can be captured then

    @torch.inference_mode()
    def run():
        return chunk_gated_delta_rule(
            q[None], k[None], v[None], g[None], beta[None], scale=k.shape[-1] ** -0.5, initial_state=start,
            output_final_state=True, cu_seqlens=cu,
        )[0][0]  # fmt: skip

    return run


def flashinfer_rule(operands, seq):
    """FlashInfer's prefill with and without context parallelism: two functions by name; none for K or V other than 128.

    It takes exp(g), and the length of the longest sequence from the host. Returns o [T, HV, V].
    """
    q, k, v, g, beta, state = operands
    if (k.shape[-1], v.shape[-1]) != (128, 128) or torch.cuda.get_device_capability()[0] < 9:
        return {}
    try:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule
    except ImportError:
        return {}
    alpha, start, cu = g.exp(), state.clone(), seq.cu_seqlens.int()

    def maker(use_cp):
        def run():
            return chunk_gated_delta_rule(
                q, k, v, alpha, beta, scale=128**-0.5, initial_state=start, output_final_state=True, cu_seqlens=cu,
                use_cp=use_cp, max_seqlen=seq.max_len,
            )[0]  # fmt: skip

        return run

    return {"flashinfer cp": maker(True), "flashinfer": maker(False)}


def fla_conv(x, weight):
    """fla-core's convolution of one sequence x [T, C], silu, final state returned; returns y [T, C]."""
    try:
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError:
        return None

    @torch.inference_mode()
    def run():
        return causal_conv1d(x[None], weight, activation="silu", output_final_state=True)[0][0]

    return run


def fla_norm(o, z, weight, eps=1e-6):
    """fla-core's gated norm of o, z [T, HV, V]; returns y [T, HV, V]."""
    try:
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
    except ImportError:
        return None

    @torch.inference_mode()
    def run():
        return rms_norm_gated(o, z, weight, None, "swish", eps=eps)

    return run


def fla_chain(acts, weight, small, conv_state, state, slots, heads, allow_neg_eigval=False, eps=1e-6):
    """fla-core's decode step in three kernels: convolution, recurrent rule with its gates and l2norm, gated norm.

    acts: qkv [B, C], z [B, HV, V], a, b [B, HV]; small: A_log, dt_bias, norm weight; conv_state [S, C, 3], state
    [S, HV, V, K] f32 and the sequences' slots: it works on copies in its own layout, not paged. Beyond B = 1 it copies
    q, k and v once more, since it wants them contiguous. Returns y [B, HV, V].
    """
    try:
        from fla.modules.causal_conv1d import causal_conv1d_update
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    except ImportError:
        return None
    (qkv, z, a, b), (A_log, dt_bias, norm) = acts, small
    (h, hv, k, v), batch = heads, qkv.shape[0]
    cache = torch.nn.functional.pad(conv_state[slots], (weight.shape[1] - conv_state.shape[-1], 0)).contiguous()
    start = state[slots].transpose(-1, -2).contiguous()

    @torch.inference_mode()
    def run():
        y, _ = causal_conv1d_update(qkv[:, None], cache, weight=weight, activation="silu")
        query, key, value = y.view(batch, 1, -1).split([h * k, h * k, hv * v], dim=-1)
        o, _ = fused_recurrent_gated_delta_rule(
            query.view(batch, 1, h, k), key.view(batch, 1, h, k), value.view(batch, 1, hv, v), g=a[:, None],
            beta=b[:, None], scale=k**-0.5, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=allow_neg_eigval,
        )  # fmt: skip
        return rms_norm_gated(o[:, 0], z, norm, None, "swish", eps=eps)

    return run
