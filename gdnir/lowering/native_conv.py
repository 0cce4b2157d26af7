"""The causal convolution with state, in plain torch.

Packed sequences are convolved in one go, as if they were one; each sequence's first W - 1 tokens, which would see its
neighbour, are then replaced by the same sum over its state and those tokens. Decode and verify are that sum alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdnir.lowering.native_rule import Rows, gather, load, rows_of, scatter, store
from gdnir.seq import Seq


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
    """y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W - 1) + w, c]); before a sequence's first token x is its state.

    qkv [T, C], weight [C, W], bias [C] or None, conv_state [S, C, P] ("cw") or [S, P, C] ("wc"), whose last W - 1
    columns hold the last inputs and are updated in place -> y [T, C] in qkv's dtype. Arithmetic in f32 (f64 for f64
    qkv), rounded once.
    """
    tokens, past = qkv.shape[0], weight.shape[1] - 1
    pool = conv_state if conv_layout == "wc" else conv_state.mT
    pool = pool[:, pool.shape[1] - past :]  # [S, W - 1, C]
    rows = rows_of(seq, pool.shape[0])
    if pool.shape[0] == 0 or seq.num_seqs == 0:
        return qkv.new_zeros(qkv.shape)
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    x, taps = qkv.to(dtype), weight.to(dtype).t().contiguous()
    offset = x.new_zeros(()) if bias is None else bias.to(dtype)

    prefill, decode = seq.phase == "prefill", seq.phase == "decode"
    steps = 1 if decode else min(seq.max_len, tokens, past if prefill else tokens)
    token = rows.start[:, None] + torch.arange(steps, device=x.device)
    valid = token < (rows.start + rows.length)[:, None]
    before = load(pool, rows.read, rows.fresh).to(dtype)
    window = torch.cat([before, x[:, None] if decode else gather(x, token, valid)], 1)
    y = torch.addcmul(offset, window[:, :steps], taps[0])
    for w in range(1, past + 1):
        y.addcmul_(window[:, w : w + steps], taps[w])

    if prefill:
        store(pool, rows.write[:, 0], _last(x, before, rows), None if rows.stored is None else rows.stored[:, 0])
    for t in range(0 if prefill else steps):
        keep = (
            None
            if decode and rows.live is None
            else valid[:, t]
            if rows.stored is None
            else valid[:, t] & rows.stored[:, t]
        )
        store(pool, rows.write[:, t], window[:, t + 1 : t + 1 + past], keep)

    if decode:
        flat = y[:, 0] if rows.live is None else y[:, 0].masked_fill(~valid, 0)
    else:
        flat = _packed(x, taps, offset, rows) if prefill else x.new_zeros((tokens + 1, x.shape[1]))
        scatter(y, flat, token, valid)
    return (F.silu(flat[:tokens]) if activation == "silu" else flat[:tokens]).to(qkv.dtype)


def _packed(x: Tensor, taps: Tensor, offset: Tensor, rows: Rows) -> Tensor:
    """The convolution of x [T, C] as one sequence, zero at tokens that no row has -> [T + 1, C], the last row unused."""
    tokens, width = x.shape[0], taps.shape[0]
    y = x.new_zeros((tokens + 1, x.shape[1]))
    y[:tokens] = torch.addcmul(offset, x, taps[-1])
    for back in range(1, min(width, tokens)):
        y[back:tokens].addcmul_(x[: tokens - back], taps[width - 1 - back])
    if rows.live is None:
        return y
    one = torch.ones_like(rows.start)
    edges = torch.zeros(tokens + 1, dtype=one.dtype, device=x.device)
    edges = edges.index_add_(0, rows.start, one).index_add_(0, rows.start + rows.length, -one)
    return y.masked_fill(edges.cumsum(0)[:, None] == 0, 0)


def _last(x: Tensor, before: Tensor, rows: Rows) -> Tensor:
    """The last W - 1 inputs of each sequence, older ones from `before` [N, W - 1, C]."""
    past = before.shape[1]
    place = rows.length[:, None] + torch.arange(past, device=x.device)  # in the state followed by the tokens
    old = before.gather(1, place.clamp(max=max(past - 1, 0))[..., None].expand(before.shape))
    if x.shape[0] == 0:
        return old
    new = place >= past
    return torch.where(new[..., None], gather(x, (rows.start[:, None] + place - past).clamp(min=0), new), old)
