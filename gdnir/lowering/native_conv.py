"""The causal convolution with state, in plain torch.

Packed sequences are convolved in one go, as if they were one; each sequence's first W - 1 tokens, which would see its
neighbour, are then replaced by the same sum over its state and those tokens. Decode and verify are that sum alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdnir.lowering.native_rule import CACHE, Rows, gather, load, rows_of, scatter, store
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
    """y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W - 1) + w, c]); before a sequence's start, x is its state.

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
    taps = weight.to(dtype).t().contiguous()
    offset = taps.new_zeros(()) if bias is None else bias.to(dtype)

    prefill, decode = seq.phase == "prefill", seq.phase == "decode"
    steps = 1 if decode else min(seq.max_len, tokens, past if prefill else tokens)
    token = rows.start[:, None] + torch.arange(steps, device=qkv.device)
    valid = token < (rows.start + rows.length)[:, None]
    before = load(pool, rows.read, rows.fresh).to(dtype)
    window = torch.cat([before, (qkv[:, None] if decode else gather(qkv, token, valid)).to(dtype)], 1)
    y = torch.addcmul(offset, window[:, :steps], taps[0])
    for w in range(1, past + 1):
        y.addcmul_(window[:, w : w + steps], taps[w])
    y = _act(y, activation)

    if prefill:
        store(pool, rows.write[:, 0], _last(qkv, before, rows), None if rows.stored is None else rows.stored[:, 0])
    else:
        every = decode and rows.live is None
        keep = valid if rows.stored is None else valid & rows.stored[:, :steps]
        for t in range(steps):
            store(pool, rows.write[:, t], window[:, t + 1 : t + 1 + past], None if every else keep[:, t])

    if decode:
        return (y[:, 0] if rows.live is None else y[:, 0].masked_fill(~valid, 0)).to(qkv.dtype)
    flat = _packed(qkv, taps, offset, rows, activation) if prefill else qkv.new_zeros((tokens + 1, qkv.shape[1]))
    scatter(y, flat, token, valid)
    return flat[:tokens]


def _packed(qkv: Tensor, taps: Tensor, offset: Tensor, rows: Rows, activation: str | None) -> Tensor:
    """The convolution of qkv [T, C] as one sequence, zero at tokens that no row has -> [T + 1, C]."""
    (tokens, channels), past = qkv.shape, taps.shape[0] - 1
    out = qkv.new_empty((tokens + 1, channels))
    one = torch.ones_like(rows.start)
    edges = torch.zeros(tokens + 1, dtype=one.dtype, device=qkv.device)
    edges = edges.index_add_(0, rows.start, one).index_add_(0, rows.start + rows.length, -one)
    nobody = edges.cumsum(0)[:, None] == 0
    size = max(CACHE // (4 * channels), 1) if qkv.device.type == "cpu" else tokens  # the passes stay in a CPU's cache
    for at in range(0, tokens, max(size, 1)):
        end, first = min(at + size, tokens), max(at - past, 0)
        x = qkv[first:end].to(taps.dtype)
        y = torch.addcmul(offset, x[at - first :], taps[past])
        for back in range(1, min(past, end - 1) + 1):
            skip = max(back - at, 0)
            y[skip:].addcmul_(x[at + skip - back - first : end - back - first], taps[past - back])
        y = _act(y, activation)
        out[at:end] = y if rows.live is None else y.masked_fill(nobody[at:end], 0)
    return out


def _act(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _last(qkv: Tensor, before: Tensor, rows: Rows) -> Tensor:
    """The last W - 1 inputs of each sequence, older ones from `before` [N, W - 1, C]."""
    past = before.shape[1]
    place = rows.length[:, None] + torch.arange(past, device=qkv.device)  # in the state followed by the tokens
    old = before.gather(1, place.clamp(max=max(past - 1, 0))[..., None].expand(before.shape))
    if qkv.shape[0] == 0:
        return old
    new = place >= past
    found = gather(qkv, (rows.start[:, None] + place - past).clamp(min=0), new).to(before.dtype)
    return torch.where(new[..., None], found, old)
