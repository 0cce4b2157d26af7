"""What every op means: `native`, in plain torch, on any device, differentiable, and proven to be only that.

This file and the two it leans on import nothing but torch and gdnir. Lengths and slots live on the device:
nothing here reads a tensor's content on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdnir import ops
from gdnir.lowering import NATIVE, lowers, native_conv, native_rule
from gdnir.seq import Seq


def _wide(x: Tensor) -> Tensor:
    """x in the arithmetic's type: f32, or f64 where it is f64 already."""
    return x if x.dtype == torch.float64 else x.float()


@lowers(ops.in_proj, NATIVE)
def in_proj(x: Tensor, w_qkvz: Tensor, w_ba: Tensor, *, heads: ops.Heads) -> tuple[Tensor, ...]:
    h, hv, k, v = heads
    qkv, z = F.linear(x, w_qkvz).split_with_sizes([2 * h * k + hv * v, hv * v], dim=-1)
    b, a = F.linear(x, w_ba).split_with_sizes([hv, hv], dim=-1)
    return qkv, z.unflatten(-1, (hv, v)), b, a


@lowers(ops.in_proj_merged, NATIVE)
def in_proj_merged(x: Tensor, weight: Tensor, *, heads: ops.Heads) -> tuple[Tensor, ...]:
    h, hv, k, v = heads
    # split takes a host twice as long: it is Python, and asks first whether sizes were given
    qkv, z, b, a = F.linear(x, weight).split_with_sizes([2 * h * k + hv * v, hv * v, hv, hv], dim=-1)
    return qkv, z.unflatten(-1, (hv, v)), b, a


def _over_parts(run: Callable[[Seq, slice], Tensor], seq: Seq) -> Tensor:
    """A mixed batch is its parts, one after the other; states pass from one to the next in place."""
    if seq.phase != "mixed":
        return run(seq, slice(None))
    return torch.cat([run(part, seq.part_tokens(part.phase)) for part in seq.parts])


@lowers(ops.causal_conv1d, NATIVE)
def causal_conv1d(
    qkv: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, seq: Seq, *, activation: str, conv_layout: str
) -> Tensor:
    def run(part: Seq, at: slice) -> Tensor:
        return native_conv.causal_conv1d(
            qkv[at], weight, bias, conv_state, part, activation=activation, conv_layout=conv_layout
        )

    return _over_parts(run, seq)


@lowers(ops.split_qkv, NATIVE)
def split_qkv(y: Tensor, *, heads: ops.Heads) -> tuple[Tensor, ...]:
    h, hv, k, v = heads
    q, key, value = y.split([h * k, h * k, hv * v], dim=-1)
    return q.unflatten(-1, (h, k)), key.unflatten(-1, (h, k)), value.unflatten(-1, (hv, v))


@lowers(ops.l2norm, NATIVE)
def l2norm(x: Tensor, *, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


@lowers(ops.gdn_gate, NATIVE)
def gdn_gate(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool) -> tuple[Tensor, Tensor]:  # noqa: N803
    g = -_wide(A_log).exp() * F.softplus(_wide(a) + _wide(dt_bias))
    beta = torch.sigmoid(_wide(b))
    return g, beta * 2 if allow_neg_eigval else beta


@lowers(ops.gated_delta_rule, NATIVE)
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
    def run(part: Seq, at: slice) -> Tensor:
        return native_rule.gated_delta_rule(
            q[at], k[at], v[at], g[at], beta[at], state, part, scale=scale, state_layout=state_layout
        )

    return _over_parts(run, seq)


@lowers(ops.zero_padding, NATIVE)
def zero_padding(z: Tensor, seq: Seq) -> Tensor:
    def run(part: Seq, at: slice) -> Tensor:
        rows = z[at]
        if part.dense:
            return rows
        token = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
        row = torch.searchsorted(
            part.cu_seqlens[1:].contiguous(), token, right=True
        )  # N for tokens behind the last sequence
        live = torch.cat([part.read_slots >= 0, part.has_state.new_zeros(1)])[row]
        return torch.where(live.view(-1, *[1] * (rows.dim() - 1)), rows, 0)

    return z if seq.dense else _over_parts(run, seq)


@lowers(ops.gated_rmsnorm, NATIVE)
def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, *, eps: float, activation: str) -> Tensor:
    wide = _wide(o)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    gate = F.silu(_wide(z)) if activation == "silu" else torch.sigmoid(_wide(z))
    return (normed * gate).to(o.dtype)


@lowers(ops.out_proj, NATIVE)
def out_proj(y: Tensor, weight: Tensor) -> Tensor:
    return F.linear(y.flatten(1), weight)


@lowers(ops.permute_rows, NATIVE)
def permute_rows(weight: Tensor, *, groups: int, splits: Sequence[int]) -> Tensor:
    pieces = weight.unflatten(0, (groups, sum(splits))).split(list(splits), dim=1)
    return torch.cat([piece.flatten(0, 1) for piece in pieces])


@lowers(ops.concat_rows, NATIVE)
def concat_rows(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


@lowers(ops.seq_part, NATIVE)
def seq_part(seq: Seq, *, part: str) -> Seq:
    return seq.part(part)


@lowers(ops.slice_tokens, NATIVE)
def slice_tokens(x: Tensor, seq: Seq, *, part: str) -> Tensor:
    return x[seq.part_tokens(part)]


@lowers(ops.concat_tokens, NATIVE)
def concat_tokens(decode: Any, verify: Any, prefill: Any) -> Tensor:
    return torch.cat([decode, verify, prefill])
