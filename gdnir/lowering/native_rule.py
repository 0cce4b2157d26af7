"""The gated delta rule in plain torch, and how native code reads and writes a pool of states.

Prefill runs the chunked form, decode and verify the recurrence. Nothing here looks at what a tensor holds: only
shapes, dtypes, devices and the batch's host facts steer Python, so a recorded graph replays on other contents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gdnir.seq import Seq

CHUNK = 64
CACHE = 2 << 20
"""Bytes of state worked on at a time on a CPU: what its caches hold next to the operands."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rows(NamedTuple):
    """Where the sequences of a batch lie; safe to index with, whatever the device tensors hold.

    `start`, `length`, `read` i64[N] are clamped to the batch and the pool, and a padding row has length 0; `write`
    i64[N, L]; `fresh` bool[N] starts from zero; `live` bool[N] and `stored` bool[N, L] say which rows and which
    writes are real, None where the host knows that all are.
    """

    start: Tensor
    length: Tensor
    read: Tensor
    write: Tensor
    fresh: Tensor
    live: Tensor | None
    stored: Tensor | None


def rows_of(seq: Seq, slots: int) -> Rows:
    """The batch's rows over a pool of so many slots; raises the sticky error flag if a slot lies outside."""
    cu = seq.cu_seqlens.long().clamp(0, seq.num_tokens)
    length = (cu[1:] - cu[:-1]).clamp(min=0)
    read, write = seq.read_slots.long(), seq.write_slots.long()
    inside = seq.max_slot is not None and seq.max_slot < slots
    if inside and seq.dense:
        return Rows(cu[:-1], length, read, write, ~seq.has_state, None, None)
    if not inside:
        seq.error.bitwise_or_((read >= slots).any() | (write >= slots).any())
    live = (read >= 0) & (read < slots)
    stored = (write >= 0) & (write < slots) & live[:, None]
    return Rows(cu[:-1], length * live, read.clamp(0, max(slots - 1, 0)), write, ~seq.has_state, live, stored)


def load(pool: Tensor, slots: Tensor, fresh: Tensor) -> Tensor:
    """A copy of the pool's `slots`; zero where `fresh`, whatever lies there."""
    states = pool.index_select(0, slots)
    if torch.is_grad_enabled() and pool.requires_grad:
        return states.masked_fill(_beside(fresh, pool), 0)
    bits = _BITS[pool.element_size()]  # on a CPU ten times faster than masked_fill with a broadcast mask
    states.view(bits).bitwise_and_(_beside((~fresh).to(bits).neg_(), pool))
    return states


def store(pool: Tensor, slots: Tensor, states: Tensor, keep: Tensor | None) -> None:
    """pool[slots] = states, in place, where `keep` (None: everywhere); all else keeps its bits."""
    states = states.to(pool.dtype)
    if keep is None:
        pool.index_copy_(0, slots, states)
    elif torch.is_grad_enabled() and (pool.requires_grad or states.requires_grad):
        spill = torch.where(keep, slots, pool.shape[0])
        pool.copy_(torch.cat([pool, pool[:1]]).index_copy(0, spill, states)[:-1])
    elif keep.shape[0]:
        # A dropped row repeats the first kept one; if there is none, slot 0 gets what it holds.
        count, first, some = keep.shape[0], keep.int().argmax(0, keepdim=True), keep.any()
        slot = torch.where(keep, slots, torch.where(some, slots.index_select(0, first), 0))
        row = torch.where(keep, torch.arange(count, device=pool.device), torch.where(some, first, count))
        pool.index_copy_(0, slot, torch.cat([states, pool[:1]]).index_select(0, row))


def gather(x: Tensor, token: Tensor, valid: Tensor) -> Tensor:
    """x [T, ...] at `token` i64[n, c] -> [n, c, ...], zero where not `valid`."""
    found = x.index_select(0, token.clamp(max=x.shape[0] - 1).flatten()).view(*token.shape, *x.shape[1:])
    return found.masked_fill(_beside(~valid, found), 0)


def scatter(x: Tensor, out: Tensor, token: Tensor, valid: Tensor) -> None:
    """out [T + 1, ...] at `token` = x [n, c, ...] in place where `valid`; the last row takes what is dropped."""
    out.index_copy_(0, torch.where(valid, token, out.shape[0] - 1).flatten(), x.flatten(0, 1).to(out.dtype))


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
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t   [arXiv:2412.06464]

    q, k [T, H, K], v [T, HV, V], g, beta [T, HV], state [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"), updated in
    place -> o [T, HV, V] in v's dtype. Value head h uses key head h // (HV // H). Arithmetic in f32 (f64 for f64
    operands); the state is rounded once, when it is written.
    """
    rows = rows_of(seq, state.shape[0])
    if state.shape[0] == 0 or seq.num_seqs == 0:
        return v.new_zeros(v.shape)
    rule = _chunked if seq.phase == "prefill" else _recurrent
    return rule(q, k, v, g, beta, state, seq, rows, scale, state_layout)


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    rows: Rows,
    scale: float,
    layout: str,
) -> Tensor:
    """Token by token, storing the state after each. One product with S_{t-1} gives both S_{t-1} k_t and, since
    S_t q = exp(g) S_{t-1} q + delta (k . q), the output: the state is read once and updated once."""
    (tokens, heads), dtype, like = v.shape[:2], _arithmetic(q, v), v
    tracked = _tracked(q, k, v, g, beta, state)
    steps = 1 if seq.phase == "decode" else min(seq.max_len, tokens)
    token = rows.start[:, None] + torch.arange(steps, device=v.device)
    valid = token < (rows.start + rows.length)[:, None]
    full = tokens == seq.num_seqs * steps and (rows.live is None or seq.phase == "decode")  # no gaps, equal lengths
    q, k, v, g, beta = (
        x.view(seq.num_seqs, steps, *x.shape[1:]) if full else gather(x, token, valid) for x in (q, k, v, g, beta)
    )
    keep = rows.stored if rows.stored is None else rows.stored[:, :steps] & valid
    keep = valid if keep is None and not full else keep

    pair = torch.stack([k.to(dtype), q.to(dtype) * scale], -2).repeat_interleave(heads // q.shape[2], 2)
    overlap = (pair[..., 0, :] * pair[..., 1, :]).sum(-1, keepdim=True)
    v, decay, beta = v.to(dtype), g.to(dtype).exp()[..., None, None], beta.to(dtype)[..., None]
    out = torch.empty(v.shape, dtype=dtype, device=v.device)
    for some in _groups(state, seq.num_seqs):
        s = _turned(load(state, rows.read[some], rows.fresh[some]).to(dtype), layout)
        for t in range(steps):
            fade, key = decay[some, t], pair[some, t]  # [n, HV, 1, 1], [n, HV, 2, K]
            seen = torch.bmm(key.flatten(0, 1), s.flatten(0, 1).mT).view(*key.shape[:3], -1) * fade
            delta = beta[some, t] * (v[some, t] - seen[:, :, 0])
            out[some, t] = seen[:, :, 1] + delta * overlap[some, t]
            s = (s * fade if tracked else s.mul_(fade)).addcmul_(delta[..., None], key[:, :, :1])
            store(state, rows.write[some, t], _turned(s, layout), None if keep is None else keep[some, t])
    if full:
        out = out if rows.live is None else out.masked_fill(_beside(~valid, out), 0)
        return out.flatten(0, 1).to(like.dtype)
    flat = like.new_zeros((tokens + 1, *like.shape[1:]))
    scatter(out, flat, token, valid)
    return flat[:tokens]


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    rows: Rows,
    scale: float,
    layout: str,
) -> Tensor:
    """Chunks of 64 tokens, one after the other. Sequences go longest first, so that the host knows how many can
    still be running at step i: those have more than 64 i tokens each, hence at most T // (64 i + 1) of them."""
    tokens, dtype = v.shape[0], _arithmetic(q, v)
    tracked = _tracked(q, k, v, g, beta, state)
    alone = seq.num_seqs == 1 and rows.live is None  # the tokens are the sequence: no gather, no mask
    longest = torch.argsort(rows.length, descending=True, stable=True)
    flat = v.new_zeros((tokens + 1, *v.shape[1:]))
    for some in _groups(state, seq.num_seqs):
        row = longest[some]
        start, end = rows.start[row], (rows.start + rows.length)[row]
        s = _turned(load(state, rows.read[row], rows.fresh[row]).to(dtype), layout).contiguous()
        for at in range(0, min(seq.max_len, tokens // (some.start + 1)), CHUNK):
            n = min(some.stop, tokens // (at + 1)) - some.start
            if alone:
                part = slice(at, min(at + CHUNK, tokens))
                qc, kc, vc, gc, bc = (x[None, part].to(dtype) for x in (q, k, v, g, beta))
                o, s = _chunk(s, qc, kc, vc, gc, bc, None, scale, tracked)
                flat[part] = o[0].transpose(0, 1)
            else:
                token = start[:n, None] + torch.arange(at, at + CHUNK, device=v.device)
                valid = token < end[:n, None]
                qc, kc, vc, gc, bc = (gather(x, token, valid).to(dtype) for x in (q, k, v, g, beta))
                o, new = _chunk(s[:n], qc, kc, vc, gc, bc, valid, scale, tracked)
                s = torch.cat([new, s[n:]])
                scatter(o.transpose(1, 2), flat, token, valid)
        store(state, rows.write[row, 0], _turned(s, layout), None if rows.stored is None else rows.stored[row, 0])
    return flat[:tokens]


def _chunk(
    s: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    valid: Tensor | None,
    scale: float,
    tracked: bool,
) -> tuple[Tensor, Tensor]:
    """One chunk of n sequences: q, k [n, c, H, K], v [n, c, HV, V], g, beta [n, c, HV], s [n, HV, V, K] (changed in
    place unless `tracked`) -> o [n, HV, c, V], s.

    With G_ij = exp(g_{j+1} + .. + g_i) for i >= j and d_i = exp(g_1 + .. + g_i), the c corrections of the state are
    U = (I + tril(beta K K^T * G, -1))^-1 beta (V - d K S^T); then O = d Q S^T + tril(Q K^T * G) U and
    S' = d_c S + (G_c * U)^T K. The sums of g are taken directly: no difference of sums, hence exact for any g <= 0.
    """
    (n, c, h, _), (hv, dv) = k.shape, v.shape[2:]
    r = hv // h
    kq = torch.cat([k, q], 1).transpose(1, 2).flatten(0, 1)  # [n H, 2 c, K]
    gram = torch.bmm(kq, kq[:, :c].mT).view(n, h, 1, 2 * c, c)  # shared by the r value heads of a key head
    seen = torch.bmm(kq, s.reshape(n * h, r * dv, -1).mT).view(n, h, 2 * c, r, dv).transpose(2, 3)
    g, beta = (x.view(n, c, h, r).permute(0, 2, 3, 1) for x in (g, beta))  # [n, H, r, c]
    decay = g[..., None, :].expand(n, h, r, c, c).triu(1).cumsum(-1).exp_().mT  # 1 above the diagonal
    since = g.cumsum(-1).exp()[..., None]

    system = gram[..., :c, :] * decay * beta[..., None]  # on and above the diagonal it is not looked at
    wanted = torch.addcmul(v.view(n, c, h, r, dv).permute(0, 2, 3, 1, 4), since, seen[..., :c, :], value=-1)
    if valid is not None:  # a state that holds inf stays as it is after its sequence's end
        wanted = wanted.masked_fill(~valid[:, None, None, :, None], 0)
    # Solving loses less than multiplying by the inverse (similar keys, beta = 2), and costs a CPU the same.
    u = torch.linalg.solve_triangular(system, wanted * beta[..., None], upper=False, unitriangular=True).flatten(0, 2)
    mixed = (gram[..., c:, :].tril() * decay).flatten(0, 2)
    o = (since * seen[..., c:, :]).flatten(0, 2).baddbmm_(mixed, u, beta=scale, alpha=scale)
    keys = (k.transpose(1, 2)[:, :, None] * decay[..., -1, :, None]).flatten(0, 2)
    fade = since[..., -1, :].reshape(n, hv, 1, 1)
    s = (s * fade if tracked else s.mul_(fade)).flatten(0, 1).baddbmm_(u.mT, keys)
    return o.view(n, hv, c, dv), s.view(n, hv, dv, -1)


def _groups(state: Tensor, count: int) -> list[slice]:
    """The sequences in runs whose states fit a CPU's cache together; elsewhere all at once."""
    size = max(1, CACHE // max(1, 4 * math.prod(state.shape[1:]))) if state.device.type == "cpu" else count
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _turned(states: Tensor, layout: str) -> Tensor:
    """Between the pool's layout and [..., V, K], either way."""
    return states if layout == "vk" else states.mT


def _beside(flags: Tensor, x: Tensor) -> Tensor:
    """`flags`, shaped to broadcast over x's trailing dimensions."""
    return flags.view(*flags.shape, *[1] * (x.dim() - flags.dim()))


def _arithmetic(q: Tensor, v: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32


def _tracked(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)
