"""What the Triton conv_prep is checked against, on any device: the convolution's prefill cases, then split, norm, gates."""

from __future__ import annotations

import dataclasses

import torch
import triton_cases as base

from gdnir import oracle_ops
from gdnir.lowering import triton_launch

CASES = [case for case in base.CASES if case.phase == "prefill"]
HEADS = [(2, 4, 8, 8), (2, 2, 6, 12)]  # (H, HV, K, V); 6 and 12 are no powers of two


def check_prep(case, heads, dtype, device, *, neg=False):
    """q, k, v against the float64 oracle, element by element, with NaN wherever nothing may be read; the state bitwise."""
    h, hv, k, v = heads
    case = dataclasses.replace(case, channels=2 * h * k + hv * v)
    gen = torch.Generator().manual_seed(0)
    seq, judge = base.make_seq(case, device), base.make_seq(case, "cpu")
    storage, pool = base.make_pool(case, judge, dtype, device, gen)
    merged = torch.randn(seq.num_tokens, case.channels + 2 * hv, generator=gen).to(
        device, dtype
    )  # as in_proj_merged gives
    x, a, b = merged.split([case.channels, hv, hv], dim=1)
    owned = base.owned_tokens(judge, case.slots).to(device)
    x[~owned] = base.NAN
    weight = torch.randn(case.channels, case.width, generator=gen).to(device, dtype)
    bias = torch.randn(case.channels, generator=gen).to(device, dtype) if case.bias else None
    decay, shift = torch.randn(hv, generator=gen).to(device), torch.randn(hv, generator=gen).to(device)
    options = dict(activation=case.activation, conv_layout=case.layout)
    new_pool = pool.double()
    y = oracle_ops.causal_conv1d(x, weight, bias, new_pool, judge, **options)
    q, key, value = oracle_ops.split_qkv(y, heads=heads)
    want = oracle_ops.l2norm(q, eps=1e-6), oracle_ops.l2norm(key, eps=1e-6), value
    gates = oracle_ops.gdn_gate(a, b, decay, shift, allow_neg_eigval=neg)
    expected = storage.clone()
    view = expected.as_strided(pool.shape, pool.stride(), pool.storage_offset())
    old = pool.double()
    changed = ~((new_pool == old) | (new_pool.isnan() & old.isnan()))
    view.copy_(torch.where(changed, new_pool.to(dtype), view))

    with base.poisoned():
        got = triton_launch.conv_prep(
            x, a, b, weight, bias, pool, decay, shift, seq, **options, heads=heads, eps=1e-6, allow_neg_eigval=neg
        )
        got = [part.clone() for part in got]
    for name, mine, oracle in zip("qkv", got, want, strict=False):
        assert (mine.dtype, mine.shape) == (dtype, oracle.shape)
        assert (mine[~owned] == 0).all(), f"{name}: tokens of padding rows, or of nobody, are not 0"
        base.assert_rounded_once(mine, oracle, dtype, name)
    for name, mine, oracle in zip(("g", "beta"), got[3:], gates, strict=True):
        torch.testing.assert_close(
            mine.double(), oracle.double(), rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(base.bits(storage), base.bits(expected))
    assert bool(seq.error.item()) == bool(judge.error.item()), "the error flag"
    return got


def check_same_bits(dtype, device, heads, lengths=(70, 5, 33)):
    """A token's bits depend neither on its neighbours nor on where in the batch it lies: one batch, one by one."""
    h, hv, k, v = heads
    channels, total = 2 * h * k + hv * v, sum(lengths)
    gen = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(total, n, generator=gen).to(device, dtype) for n in (channels, hv, hv))
    weight = torch.randn(channels, 4, generator=gen).to(device, dtype)
    decay, shift = torch.randn(hv, generator=gen).to(device), torch.randn(hv, generator=gen).to(device)
    start = torch.randn(len(lengths), channels, 3, generator=gen).to(device, dtype)

    def run(at, rows, pool):
        seq = base.make_seq(base.Case("", "prefill", rows), device)
        return triton_launch.conv_prep(
            x[at], a[at], b[at], weight, None, pool, decay, shift, seq, activation="silu", conv_layout="cw", heads=heads,
            eps=1e-6, allow_neg_eigval=False,
        )  # fmt: skip

    pools = start.clone(), start.clone()
    whole = run(slice(None), base.cont(*lengths), pools[0])
    done, parts = 0, []
    for n, length in enumerate(lengths):
        parts.append(run(slice(done, done + length), ((length, True, n, n),), pools[1]))
        done += length
    for name, one, many in zip(("q", "k", "v", "g", "beta"), whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(many)), name
    assert torch.equal(*pools)
