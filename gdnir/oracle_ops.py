"""The ops again, in float64, one token after the other: what every lowering is tested against.

Same signatures and state semantics as `gdnir.ops`. Operands of any dtype are widened exactly; results are float64, and
states are updated in place, so pass float64 copies of the pools. An op with a state runs where the pool lies, wherever
its other operands are; one without, where its first operand lies. This file shares no code with the lowerings: plain
loops over sequences and tokens, host reads included, vectorised over heads and channels only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdnir.seq import Seq


@dataclass(frozen=True)
class _Row:
    """One sequence: its tokens, the slot it reads (None: starts from zero), and the slot that takes the state after
    its j-th token (`after[j]`), or after the last one (`final`); None: not stored."""

    tokens: range
    read: int | None
    after: list[int | None]
    final: int | None


def _rows(seq: Seq, slots: int) -> Iterator[_Row]:
    cu, read = seq.cu_seqlens.tolist(), seq.read_slots.tolist()
    write, has_state = seq.write_slots.tolist(), seq.has_state.tolist()
    if any(slot >= slots for slot in read) or any(slot >= slots for row in write for slot in row):
        seq.error.fill_(1)
    for n in range(len(read)):
        if not 0 <= read[n] < slots:
            continue
        targets = [slot if 0 <= slot < slots else None for slot in write[n]]
        tokens = range(cu[n], cu[n + 1])
        verify = seq.phase == "verify"
        yield _Row(
            tokens,
            read[n] if has_state[n] else None,
            targets[: len(tokens)] if verify else [],
            None if verify else targets[0],
        )


def _wide(x: Tensor, where: Tensor) -> Tensor:
    return x.detach().to(where.device, torch.float64)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    *,
    scale: float,
    state_layout: str,
) -> Tensor:
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t   [arXiv:2412.06464]"""
    q, k, v, g, beta = (_wide(x, state) for x in (q, k, v, g, beta))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1)[..., None] for x in (q, k))
    v, decay, beta = v[..., None], g.exp()[..., None, None], beta[..., None, None]
    pool = state if state_layout == "vk" else state.transpose(-1, -2)
    o = torch.zeros_like(v)
    for row in _rows(seq, state.shape[0]):
        s = torch.zeros_like(pool[0]) if row.read is None else pool[row.read].clone()
        for j, t in enumerate(row.tokens):
            s *= decay[t]
            s.addcmul_(beta[t] * (v[t] - s @ k[t]), k[t].transpose(1, 2))
            o[t] = s @ q[t]
            if row.after and row.after[j] is not None:
                pool[row.after[j]] = s
        if row.final is not None:
            pool[row.final] = s
    return scale * o[..., 0]


def causal_conv1d(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    seq: Seq,
    *,
    activation: str | None,
    conv_layout: str,
) -> Tensor:
    """y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W - 1) + w, c]); before a sequence's start, x is its state."""
    qkv, weight = _wide(qkv, conv_state), _wide(weight, conv_state)
    shift = 0 if bias is None else _wide(bias, conv_state)
    width = weight.shape[1]
    pool = conv_state if conv_layout == "cw" else conv_state.transpose(-1, -2)
    pool = pool[:, :, pool.shape[2] - (width - 1) :]
    y = torch.zeros_like(qkv)
    for row in _rows(seq, conv_state.shape[0]):
        past = torch.zeros_like(pool[0]) if row.read is None else pool[row.read].clone()
        for j, t in enumerate(row.tokens):
            window = torch.cat([past, qkv[t][:, None]], dim=1)
            y[t] = (window * weight).sum(dim=1) + shift
            past = window[:, 1:]
            if row.after and row.after[j] is not None:
                pool[row.after[j]] = past
        if row.final is not None:
            pool[row.final] = past
    return y * torch.sigmoid(y) if activation == "silu" else y


def in_proj(
    x: Tensor, w_qkvz: Tensor, w_ba: Tensor, *, heads: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], w_qkvz [2 H K + 2 HV V, D] (rows q, k, v, z), w_ba [2 HV, D] (rows b, a) -> qkv, z [T, HV, V], b, a."""
    h, hv, dk, dv = heads
    y, ba = _wide(x, x) @ _wide(w_qkvz, x).T, _wide(x, x) @ _wide(w_ba, x).T
    qkv, z = torch.split(y, [2 * h * dk + hv * dv, hv * dv], dim=1)
    return qkv, z.reshape(-1, hv, dv), ba[:, :hv], ba[:, hv:]


def in_proj_merged(
    x: Tensor, weight: Tensor, *, heads: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """in_proj with w_ba's rows below w_qkvz's."""
    rows = weight.shape[0] - 2 * heads[1]
    return in_proj(x, weight[:rows], weight[rows:], heads=heads)


def split_qkv(y: Tensor, *, heads: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, 2 H K + HV V] -> q, k [T, H, K], v [T, HV, V]."""
    h, hv, dk, dv = heads
    q, k, v = torch.split(_wide(y, y), [h * dk, h * dk, hv * dv], dim=1)
    return q.reshape(-1, h, dk), k.reshape(-1, h, dk), v.reshape(-1, hv, dv)


def l2norm(x: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension."""
    x = _wide(x, x)
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + eps)


def gdn_gate(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor]:
    """g = -exp(A_log) log(1 + exp(a + dt_bias)), beta = sigmoid(b), doubled if `allow_neg_eigval`."""
    x = _wide(a, a) + _wide(dt_bias, a)
    g = -_wide(A_log, a).exp() * torch.logaddexp(x, torch.zeros_like(x))
    return g, torch.sigmoid(_wide(b, a)) * (2 if allow_neg_eigval else 1)


def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * act(z) over the last dimension; act is silu or sigmoid."""
    o, z, weight = _wide(o, o), _wide(z, o), _wide(weight, o)
    gate = torch.sigmoid(z) * (z if activation == "silu" else 1)
    return o / torch.sqrt((o * o).mean(dim=-1, keepdim=True) + eps) * weight * gate


def out_proj(y: Tensor, weight: Tensor) -> Tensor:
    """y [T, HV, V] and weight [D, HV V] -> [T, D]."""
    return _wide(y, y).flatten(1) @ _wide(weight, y).T
