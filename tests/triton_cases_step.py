"""Cases of the kernels of decode and verify, and of the small ops, on any device: interpreter and GPU run the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import triton_cases as base
from triton_cases import NAN, ROUNDING, bits, owned_tokens

from gdnir import oracle_ops
from gdnir.lowering import gluon_step, triton_step
from gdnir.oracle import row_error


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. `rows`, `tail`, `slots`: as in triton_cases. `gates` and `betas`: "random" or the value of all.

    `extra` is P - (W - 1); `strided` puts both pools into wider storage; `wide_conv`: an f32 conv state whatever x is;
    `by`: which of Gluon's ways gdn_step takes.
    """

    id: str
    phase: str
    rows: tuple
    heads: tuple = (1, 2, 16, 16)
    tail: int = 0
    slots: int = 22
    state_layout: str = "vk"
    conv_layout: str = "cw"
    width: int = 4
    extra: int = 0
    bias: bool = False
    activation: str = "silu"
    gate: str = "silu"
    neg: bool = False
    keys: str = "random"
    gates: object = "random"
    betas: object = "random"
    strided: bool = False
    wide_conv: bool = False
    by: str | int = ""

    @property
    def channels(self):
        h, hv, k, v = self.heads
        return 2 * h * k + hv * v


ROWS = {"decode": base.DECODE, "verify": base.VERIFY}
EMPTY = ((0, True, 0, 1), (1, True, 2, 2), (0, False, 3, 3), (0, True, 4, 4), (0, True, 5, -1), (0, True, -1, 6))
LONG = ((8, True, 0, tuple(range(1, 9))), (2, False, 9, tuple(range(10, 18))))
SLOTS = {"decode": 8, "verify": 22}
INF = float("inf")


def _both(name, **options):
    return [Case(f"{phase}-{name}", phase, ROWS[phase], slots=SLOTS[phase], **options) for phase in ROWS]


CASES = [
    *_both("plain", heads=(2, 4, 16, 16)),
    *_both("kv-wc", state_layout="kv", conv_layout="wc", bias=True, tail=2, activation="none", gate="sigmoid"),
    _both("strided", strided=True, extra=1, bias=True, neg=True, tail=1)[0],
    _both("kv-strided", state_layout="kv", conv_layout="wc", strided=True, extra=2)[1],
    *_both("wide-conv", wide_conv=True),
    *_both("w2-r1", width=2, heads=(2, 2, 8, 16)),
    *_both("w3-r3", width=3, heads=(1, 3, 16, 8), bias=True),
    *_both("r4-96x192", heads=(1, 4, 24, 48), bias=True),  # neither a power of two
    Case("decode-r8", "decode", ROWS["decode"], slots=8, heads=(1, 8, 4, 12)),
    *(Case(f"decode-g{g}", "decode", ROWS["decode"], slots=8, gates=g) for g in (0.0, -20.0, -1e4, -INF)),
    *(_both(f"beta{b}", betas=b, neg=b == 1.0)[int(b)] for b in (0.0, 1.0)),
    *(Case(f"verify-{keys}", "verify", LONG, keys=keys, betas=1.0) for keys in ("identical", "correlated")),
    Case("verify-g-resets", "verify", LONG, gates="resets", keys="identical"),
    Case("decode-empty-rows", "decode", EMPTY, slots=8, bias=True),
    Case("decode-empty-rows-kv", "decode", EMPTY, slots=8, state_layout="kv", conv_layout="wc", width=2),
    Case("decode-one", "decode", base.cont(1), slots=1),
    Case("decode-none", "decode", (), tail=2),
    Case("decode-nothing", "decode", ()),
    Case("verify-none", "verify", (), tail=1),
    Case("decode-read-outside", "decode", ((1, True, 99, 3), (1, True, 0, 0)), slots=8),
    Case("decode-write-outside", "decode", ((1, True, 1, 8), (1, True, 0, 0)), slots=8),
    Case("verify-unused-outside", "verify", ((1, True, 0, (1, 8)),), slots=8),
    Case("verify-L1", "verify", ((1, True, 0, (0,)), (0, True, 1, (2,)), (1, True, 3, (-1,)))),
]


def _pool(shape, strided, dtype, device):
    """(storage, view of `shape`), all NaN."""
    if not strided:
        storage = torch.full(shape, NAN, dtype=dtype, device=device)
        return storage, storage
    storage = torch.full((shape[0], 2, *shape[1:-1], shape[-1] + 3), NAN, dtype=dtype, device=device)
    return storage, storage[:, 1, ..., : shape[-1]]


def _fill(view, seq, gen):
    """Values in the slots that a row may rightly read."""
    for has, slot in zip(seq.has_state.tolist(), seq.read_slots.tolist(), strict=True):
        if has and 0 <= slot < view.shape[0]:
            view[slot] = torch.randn(view[slot].shape, generator=gen).to(view)


def _gates(case, tokens, heads, gen):
    """a, A_log, dt_bias that give the case's g; b that gives its beta (before doubling)."""
    a, rate, shift = torch.randn(tokens, heads, generator=gen), torch.zeros(heads), torch.zeros(heads)
    if case.gates == "random":
        rate, shift = torch.randn(heads, generator=gen), torch.randn(heads, generator=gen)
    elif case.gates == "resets":
        a = torch.tensor([INF, -1e4, 1e4, 20.0, 0.0])[torch.randint(5, a.shape, generator=gen)]
    else:
        a = torch.full_like(a, {0.0: -1e4, -20.0: 20.0, -1e4: 1e4, -INF: INF}[case.gates])
    b = torch.randn(tokens, heads, generator=gen)
    return a, (b if case.betas == "random" else torch.full_like(b, -1e4 if case.betas == 0 else 1e4)), rate, shift


def _keys(case, tokens, gen):
    """[T, H, K]; with a convolution that passes them through, the keys are as alike as asked for."""
    h, _, k, _ = case.heads
    keys = torch.randn(tokens, h, k, generator=gen)
    one = torch.randn(1, h, k, generator=gen)
    return {"random": keys, "correlated": 4.3 * one + keys, "identical": one.expand_as(keys)}[case.keys]


@dataclasses.dataclass
class Inputs:
    operands: tuple  # without the states and seq
    conv: torch.Tensor
    state: torch.Tensor
    storages: tuple
    seq: object
    judge: object  # seq on the CPU, for the oracle
    owned: torch.Tensor
    step: Callable
    options: dict


def make_step(case, dtype, device, state_dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    h, hv, k, v = case.heads
    c, seq, judge = case.channels, base.make_seq(case, device), base.make_seq(case, "cpu")
    tokens, owned = seq.num_tokens, owned_tokens(judge, case.slots).to(device)
    qkv = torch.randn(tokens, c, generator=gen)
    weight = torch.randn(c, case.width, generator=gen)
    if case.keys != "random":
        qkv[:, h * k : 2 * h * k] = _keys(case, tokens, gen).flatten(1)
        weight[h * k : 2 * h * k] = torch.eye(case.width)[-1]
    a, b, rate, shift = _gates(case, tokens, hv, gen)
    z = torch.randn(tokens, hv * v, generator=gen)
    merged = torch.cat([qkv, z, b, a, torch.zeros(tokens, 8)], 1).to(device, dtype)  # one projection, seen in parts
    merged[~owned] = NAN
    qkv, z, b, a, _ = merged.split([c, hv * v, hv, hv, 8], 1)
    columns = case.width - 1 + case.extra
    conv_shape = (case.slots, c, columns) if case.conv_layout == "cw" else (case.slots, columns, c)
    conv_dtype = torch.float32 if case.wide_conv else dtype
    conv_storage, conv = _pool(conv_shape, case.strided, conv_dtype, device)
    newest = conv[..., case.extra :] if case.conv_layout == "cw" else conv[:, case.extra :]
    _fill(newest, judge, gen)
    state_shape = (case.slots, hv, v, k) if case.state_layout == "vk" else (case.slots, hv, k, v)
    state_storage, state = _pool(state_shape, case.strided, state_dtype, device)
    _fill(state, judge, gen)
    bias = torch.randn(c, generator=gen).to(device, dtype) if case.bias else None
    norm = torch.randn(v, generator=gen).to(device)
    operands = (
        qkv, z.unflatten(1, (hv, v)), a, b, weight.to(device, dtype), bias, rate.to(device), shift.to(device), norm,
    )  # fmt: skip
    options = {
        "activation": case.activation, "conv_layout": case.conv_layout, "heads": case.heads, "l2norm_eps": 1e-6,
        "allow_neg_eigval": case.neg, "scale": k**-0.5, "state_layout": case.state_layout, "eps": 1e-6,
        "gate": case.gate,
    }  # fmt: skip
    return Inputs(operands, conv, state, (conv_storage, state_storage), seq, judge, owned, step_of(case.by), options)


def run_step(given, seq=None):
    qkv, z, a, b, weight, bias, rate, shift, norm = given.operands
    return given.step(
        qkv, z, a, b, weight, bias, given.conv, given.state, rate, shift, norm, seq or given.seq, **given.options
    )


def step_of(by):
    return triton_step.gdn_step if by == "" else functools.partial(gluon_step.gdn_step, by=by)


def by_bulk_copies(case, heads, state_dtype):
    """The case in each of the ways in which its states' tiles go by bulk copies, which a table may name more than once."""
    ways = [options for _, options in gluon_step._bulk(case.phase, state_dtype.itemsize, heads, 1)]
    assert ways
    return [dataclasses.replace(case, heads=heads, by=n) for n, way in enumerate(ways) if way not in ways[:n]]


def oracle_step(given, judge):
    """(y, conv pool, state pool) in float64; nothing is rounded between the ops."""
    qkv, z, a, b, weight, bias, rate, shift, norm = given.operands
    o, conv, state = given.options, given.conv.double(), given.state.double()
    y = oracle_ops.causal_conv1d(
        qkv, weight, bias, conv, judge, activation=o["activation"], conv_layout=o["conv_layout"]
    )
    q, k, v = oracle_ops.split_qkv(y, heads=o["heads"])
    g, beta = oracle_ops.gdn_gate(a, b, rate, shift, allow_neg_eigval=o["allow_neg_eigval"])
    q, k = oracle_ops.l2norm(q, eps=o["l2norm_eps"]), oracle_ops.l2norm(k, eps=o["l2norm_eps"])
    out = oracle_ops.gated_delta_rule(q, k, v, g, beta, state, judge, scale=o["scale"], state_layout=o["state_layout"])
    y = oracle_ops.gated_rmsnorm(out, z, norm, eps=o["eps"], activation=o["gate"])
    return torch.where(given.owned[:, None, None], y, 0), conv, state


def assert_rows(got, want, dtype, label):
    """Row by row (over the last dimension), and over everything: a few roundings of what float64 gives."""
    assert_each(got[None], want[None], dtype, [label])


def assert_each(got, want, dtype, labels):
    """assert_rows of got[i] and want[i] for every i, waiting for the device once."""
    if not want.numel():
        return
    got, want = got.double().flatten(1, -2), want.double().flatten(1, -2)
    smallest = torch.finfo(dtype).smallest_normal * ROUNDING[dtype]  # what underflow alone may do
    rows = torch.where((got - want).abs().amax(-1) <= smallest, 0, row_error(got, want)).amax(1)
    overall = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1).clamp(min=1e-30)
    finite = got.isfinite().flatten(1).all(1)
    for label, *found in zip(labels, *torch.stack([finite, rows, overall]).tolist(), strict=True):
        assert found[0], f"{label} is not finite"
        assert found[1] <= 3 * ROUNDING[dtype] + 3e-4, f"{label}: a row is off by {found[1]}"
        assert found[2] <= ROUNDING[dtype] + 1e-5, f"{label}: off by {found[2]} overall"


def assert_pool(storage, before, view, want, dtype, label):
    """Slots whose content the oracle changed agree with it; everything else has the bits that it had."""
    after = storage.as_strided(view.shape, view.stride(), view.storage_offset())
    old = before.as_strided(view.shape, view.stride(), view.storage_offset())
    wide = old.double()
    changed = ~((want == wide) | (want.isnan() & wide.isnan()))
    touched = changed.flatten(1).any(1)
    slots = touched.nonzero().flatten().tolist()
    real = ~want[slots].isnan()  # not the columns of a conv state that do not count
    got = torch.where(real, after[slots].double(), 0)
    assert_each(got, torch.where(real, want[slots], 0), dtype, [f"{label}[{slot}]" for slot in slots])
    rest = ~touched.view(-1, *[1] * (view.dim() - 1)) | (want.isnan() & wide.isnan())
    expected = before.clone()
    expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(torch.where(rest, old, after))
    assert torch.equal(bits(storage), bits(expected)), f"{label}: something else was written"


def check_step(case, dtype, device, state_dtype=torch.float32):
    given = make_step(case, dtype, device, state_dtype)
    want, conv, state = oracle_step(given, given.judge)
    before = [s.clone() for s in given.storages]
    with base.poisoned():
        y = run_step(given)
        assert y.is_contiguous()
        assert (y.dtype, y.shape) == (dtype, want.shape)
        y = y.clone()
    assert (y[~given.owned] == 0).all(), "tokens of padding rows, or of nobody, are not 0"
    assert_rows(y, want, dtype, "y")
    assert_pool(given.storages[0], before[0], given.conv, conv, given.conv.dtype, "conv")
    assert_pool(given.storages[1], before[1], given.state, state, state_dtype, "state")
    assert bool(given.seq.error.item()) == bool(given.judge.error.item()), "the error flag"


def _alone(seq, n):
    """Row n as a batch of its own, over the tokens from its first one on."""
    zero = seq.cu_seqlens[:1] * 0
    length = seq.cu_seqlens[n + 1 : n + 2] - seq.cu_seqlens[n : n + 1]
    count = int(length)
    return dataclasses.replace(
        seq,
        cu_seqlens=torch.cat([zero, length]),
        read_slots=seq.read_slots[n : n + 1],
        write_slots=seq.write_slots[n : n + 1],
        has_state=seq.has_state[n : n + 1],
        num_tokens=count,
        num_seqs=1,
        max_len=count,
    )


def check_step_neighbours(phase, dtype, device, state_dtype=torch.float32, heads=(2, 4, 16, 16), by=""):
    """Each row alone gives the bits that it has in the batch; so does a second launch."""
    case = Case("", phase, ROWS[phase], slots=SLOTS[phase], heads=heads, bias=True, by=by)
    whole, again, single = (make_step(case, dtype, device, state_dtype) for _ in range(3))
    y = run_step(whole)
    assert torch.equal(bits(run_step(again)), bits(y))
    cu = whole.seq.cu_seqlens.tolist()
    for n in range(len(case.rows)):
        at = slice(cu[n], cu[n + 1])
        operands = tuple(x[at] if i < 4 else x for i, x in enumerate(single.operands))
        part = run_step(dataclasses.replace(single, operands=operands), _alone(single.seq, n))
        assert torch.equal(bits(part), bits(y[at])), n
    for other in (again, single):
        for mine, theirs in zip(whole.storages, other.storages, strict=True):
            assert torch.equal(bits(mine), bits(theirs))


def check_step_malformed(cu_seqlens, phase, dtype, device, by="", heads=(1, 2, 8, 8)):
    """cu_seqlens that lie: every token of y is written, and nothing outside the named slots."""
    tokens, size, (h, hv, k, v) = 20, 8, heads
    c = 2 * h * k + hv * v
    seq = malformed_seq(cu_seqlens, phase, tokens, device)
    conv = torch.full((size + 2, c, 3), 7.0, dtype=dtype, device=device)
    state = torch.full((size + 2, hv, v, k), 7.0, device=device)
    ones = {"dtype": dtype, "device": device}
    with base.poisoned():
        y = step_of(by)(
            torch.ones(tokens, c, **ones), torch.ones(tokens, hv, v, **ones), torch.ones(tokens, hv, **ones),
            torch.ones(tokens, hv, **ones), torch.ones(c, 4, **ones), None, conv[1:-1], state[1:-1],
            torch.zeros(hv, device=device), torch.zeros(hv, device=device), torch.ones(v, device=device), seq,
            activation="silu", conv_layout="cw", heads=(h, hv, k, v), l2norm_eps=1e-6, allow_neg_eigval=False,
            scale=1.0, state_layout="vk", eps=1e-6, gate="silu",
        )  # fmt: skip
        assert y.isfinite().all(), "a token was not written"
        if by == "":
            x = torch.ones(tokens, hv, **ones).float()
            o = triton_step.delta_rule_step(
                torch.ones(tokens, h, k, **ones), torch.ones(tokens, h, k, **ones), torch.ones(tokens, hv, v, **ones),
                -x, x, state[1:-1], seq, scale=1.0, state_layout="vk",
            )  # fmt: skip
            assert o.isfinite().all(), "a token was not written"
    for pool in (conv, state):
        assert (pool[0] == 7).all()
        assert (pool[5:] == 7).all()


def malformed_seq(cu_seqlens, phase, tokens, device):
    ints = {"dtype": torch.int32, "device": device}
    return base.SeqLike(
        phase,
        torch.tensor(cu_seqlens, **ints),
        torch.tensor([0, 1, 2, 3], **ints),
        torch.tensor([[0], [1], [2], [3]], **ints),
        torch.ones(4, dtype=torch.bool, device=device),
        torch.zeros(1, **ints),
        tokens,
        4,
        tokens,
    )


def check_rule(case, dtype, device, state_dtype=torch.float32):
    """gated_delta_rule alone, with the case's rows, gates, betas and keys."""
    gen = torch.Generator().manual_seed(3)
    h, hv, k, v = case.heads
    seq, judge = base.make_seq(case, device), base.make_seq(case, "cpu")
    tokens, owned = seq.num_tokens, owned_tokens(judge, case.slots).to(device)
    q = torch.randn(tokens, h, k, generator=gen)
    key = torch.nn.functional.normalize(_keys(case, tokens, gen), dim=-1)
    merged = torch.cat([q, key], 1).to(device, dtype)  # strides of their own
    merged[~owned] = NAN
    q, key = merged.split([h, h], 1)
    value = torch.randn(tokens, hv, v, generator=gen).to(device, dtype)
    value[~owned] = NAN
    a, b, rate, shift = _gates(case, tokens, hv, gen)
    g, beta = (x.float().to(device) for x in oracle_ops.gdn_gate(a, b, rate, shift, allow_neg_eigval=case.neg))
    g[~owned] = NAN
    shape = (case.slots, hv, v, k) if case.state_layout == "vk" else (case.slots, hv, k, v)
    storage, state = _pool(shape, case.strided, state_dtype, device)
    _fill(state, judge, gen)
    before, new = storage.clone(), state.double()
    options = {"scale": k**-0.5, "state_layout": case.state_layout}
    want = oracle_ops.gated_delta_rule(q, key, value, g, beta, new, judge, **options)
    with base.poisoned():
        o = triton_step.delta_rule_step(q, key, value, g, beta, state, seq, **options)
        assert o.is_contiguous()
        assert (o.dtype, o.shape) == (dtype, value.shape)
        o = o.clone()
    assert (o[~owned] == 0).all(), "tokens of padding rows, or of nobody, are not 0"
    assert_rows(o, want, dtype, "o")
    assert_pool(storage, before, state, new, state_dtype, "state")
    assert bool(seq.error.item()) == bool(judge.error.item()), "the error flag"


SHAPES = [(5, 2, 128), (3, 3, 96), (0, 4, 64), (1, 1, 1), (7, 192), (2, 3, 2, 24)]


def check_l2norm(shape, memory, dtype, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    if memory == "wide":
        x = torch.cat([x, x.new_full(shape, NAN)], 1)[:, : shape[1]] if len(shape) > 2 else x
    elif memory == "last":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.numel():
        x[0] = 0  # eps keeps it finite
    want = oracle_ops.l2norm(x, eps=1e-6)
    with base.poisoned():
        y = triton_step.l2norm(x, eps=1e-6)
        assert y.is_contiguous()
        assert (y.dtype, y.shape) == (dtype, x.shape)
        base.assert_rounded_once(y, want, dtype, "y")


def check_gate(tokens, heads, neg, dtype, device):
    gen = torch.Generator().manual_seed(5)
    a = 8 * torch.randn(tokens, heads, generator=gen)
    a[::5] = torch.tensor([-1e4, -30.0, 30.0, 1e4, INF, 0.0]).repeat(heads)[:heads]
    merged = torch.cat([4 * torch.randn(tokens, heads, generator=gen), a], 1).to(device, dtype)
    b, a = merged.split([heads, heads], 1)
    rate, shift = torch.randn(2, heads, generator=gen).to(device)
    want = oracle_ops.gdn_gate(a, b, rate, shift, allow_neg_eigval=neg)
    with base.poisoned():
        got = triton_step.gdn_gate(a, b, rate, shift, allow_neg_eigval=neg)
        for mine, exact in zip(got, want, strict=True):
            assert (mine.dtype, mine.shape) == (torch.float32, a.shape)
            mine = mine.double()
            same = (mine == exact) | ((mine - exact).abs() <= 1e-5 * exact.abs() + 1e-30)
            assert same.all(), (mine[~same][:3], exact[~same][:3])
