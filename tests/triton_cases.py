"""What the Triton kernels are checked against, on any device: the interpreter and the GPU run the same cases."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import pytest
import torch

from gdnir import oracle_ops
from gdnir.lowering import triton_launch

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_GPU = [  # the marks of tests/gpu
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]
NAN = float("nan")
CANARY = 64
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclasses.dataclass(frozen=True)
class SeqLike:
    """What a launcher reads of a gdnir.seq.Seq, with contents that no constructor lets through."""

    phase: str
    cu_seqlens: torch.Tensor
    read_slots: torch.Tensor
    write_slots: torch.Tensor
    has_state: torch.Tensor
    error: torch.Tensor
    num_tokens: int
    num_seqs: int
    max_len: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. `rows`: (length, has_state, read slot, write slot or slots). `tail`: tokens that nobody owns."""

    id: str
    phase: str
    rows: tuple
    tail: int = 0
    slots: int = 8
    channels: int = 24
    width: int = 4
    extra: int = 0  # P - (W - 1)
    layout: str = "cw"
    bias: bool = False
    activation: str = "silu"
    strided: bool = False


def fresh(*lengths):
    return tuple((length, False, n, n) for n, length in enumerate(lengths))


def cont(*lengths):
    return tuple((length, True, n, n) for n, length in enumerate(lengths))


MIX = ((5, True, 1, 1), (0, True, 2, 2), (3, False, 3, 3), (1, True, 0, 6), (2, True, 0, 7), (18, True, 4, 4))
PADDED = (
    (4, True, 1, 1),
    (3, True, -1, 2),
    (17, False, 0, 0),
    (2, True, 99, 3),
    (3, True, 4, 99),
    (20, True, -1, -1),
    (2, True, 5, -1),
)
DECODE = (
    (1, True, 3, 3),
    (1, False, 0, 0),
    (1, True, -1, -1),
    (1, True, 5, 1),
    (1, True, 5, -1),
    (1, True, 8, 2),
    (1, True, 4, 8),
)
VERIFY = (
    (3, True, 1, (1, 2, 3)),  # the first write is in place
    (1, True, 4, (5, 6, 7)),  # columns >= l_n untouched
    (2, False, 8, (9, 8, 0)),  # reads nothing; the second write is its read slot
    (0, True, 10, (11, 12, 13)),
    (2, True, -1, (14, 15, 16)),
    (3, True, 17, (-1, 18, 99)),
    (3, True, 99, (19, 20, 21)),
)


def _verify(length):
    """Two rows of 1..length drafts, L = length."""
    return tuple(
        (n, True, 2 * length + n, tuple((n % 2) * length + i for i in range(length)))
        for n in (length, max(length - 1, 0))
    )


CASES = [
    # prefill: every interesting length, alone and in ragged mixes; tiles of 16 tokens
    *(Case(f"len{n}-fresh", "prefill", fresh(n)) for n in (0, 1, 2, 3)),
    *(Case(f"len{n}-cont", "prefill", cont(n), bias=True) for n in (0, 1, 2, 3)),
    Case("len63", "prefill", fresh(63), channels=8),
    Case("len64", "prefill", cont(64), channels=8),
    Case("len65", "prefill", cont(65), channels=8, layout="wc"),
    Case("tiles-meet-starts", "prefill", cont(16, 19, 13, 32), channels=8, bias=True),
    Case("mix", "prefill", MIX),
    Case("mix-wc-bias-none", "prefill", MIX, layout="wc", bias=True, activation="none"),
    Case("many-empty", "prefill", cont(0, 0, 5, 0, 0, 0, 20, 0), bias=True),
    Case("all-empty", "prefill", cont(0, 0, 0)),
    Case("empty-fresh", "prefill", fresh(0, 0, 2)),
    Case("padded", "prefill", PADDED, bias=True, tail=3),
    Case("padded-wc-strided", "prefill", PADDED, layout="wc", strided=True, extra=1, bias=True),
    Case("only-tail", "prefill", fresh(0), tail=18, bias=True),
    Case("no-rows", "prefill", (), tail=3, bias=True),
    Case("no-rows-no-tokens", "prefill", ()),
    Case(
        "write-elsewhere",
        "prefill",
        ((0, True, 0, 1), (1, True, 0, 2), (2, True, 0, 3), (9, True, 0, 4), (0, False, 5, 6)),
        strided=True,
    ),
    Case("three-blocks", "prefill", ((2, True, 1, 1), (20, True, 0, 2)), channels=1032, bias=True),
    *(Case(f"w{w}-{lay}", "prefill", MIX, width=w, layout=lay, extra=w % 2) for w in (2, 3) for lay in ("cw", "wc")),
    *(
        Case(f"extra{e}-{lay}", "prefill", MIX, extra=e, layout=lay, strided=lay == "cw")
        for e in (1, 2, 3)
        for lay in ("cw", "wc")
    ),
    Case("read-outside", "prefill", ((2, True, 99, 3), (1, True, 0, 0))),
    Case("write-outside", "prefill", ((2, True, 1, 8), (1, True, 0, 0))),
    Case("write-outside-of-padding", "prefill", ((2, True, -1, 8),)),
    # decode
    Case("decode-read-outside", "decode", ((1, True, 99, 3), (1, True, 0, 0))),
    Case("decode-write-outside", "decode", ((1, True, 1, 8), (1, True, 0, 0))),
    Case("verify-unused-outside", "verify", ((1, True, 0, (1, 8)),)),
    Case("decode", "decode", DECODE),
    Case("decode-bias-tail", "decode", DECODE, bias=True, tail=2),
    Case("decode-wc", "decode", DECODE, layout="wc", extra=1, strided=True, bias=True, activation="none"),
    Case("decode-one", "decode", cont(1), slots=1),
    Case("decode-empty-rows", "decode", ((0, True, 0, 1), (1, True, 2, 2), (0, False, 3, 3))),
    Case("decode-none", "decode", ()),
    Case("decode-two-blocks", "decode", DECODE, channels=520, bias=True),
    *(Case(f"decode-w{w}-{lay}", "decode", DECODE, width=w, layout=lay) for w in (2, 3) for lay in ("cw", "wc")),
    # verify
    *(
        Case(f"verify-L{n}-{lay}", "verify", _verify(n), slots=3 * n + 2, layout=lay, bias=lay == "wc")
        for n in (1, 2, 3, 4)
        for lay in ("cw", "wc")
    ),
    Case("verify", "verify", VERIFY, slots=22, tail=2, bias=True),
    Case("verify-wc-strided", "verify", VERIFY, slots=22, layout="wc", strided=True, extra=2),
    Case("verify-w2", "verify", VERIFY, slots=22, width=2, strided=True),
    Case("verify-one-empty", "verify", ((0, True, 0, (1,)),)),
]


def make_seq(case, device):
    count = len(case.rows)
    lengths = [row[0] for row in case.rows]
    cu = [sum(lengths[:n]) for n in range(count + 1)]
    slots = [row[3] if isinstance(row[3], tuple) else (row[3],) for row in case.rows]
    columns = len(slots[0]) if slots else 1

    def tensor(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    write = torch.full((count, 2, columns + 1), -7, dtype=torch.int32, device=device)  # a strided view
    if count:
        write[:, 1, :columns] = tensor(slots)
    return SeqLike(
        case.phase,
        tensor(cu),
        tensor([row[2] for row in case.rows]),
        write[:, 1, :columns],
        tensor([row[1] for row in case.rows], torch.bool),
        tensor([0]),
        cu[-1] + case.tail,
        count,
        max(lengths, default=0),
    )


def owned_tokens(seq, slots):
    """Which tokens belong to a row whose read slot exists; `seq` lies on the CPU, so nothing waits for a device."""
    cu = seq.cu_seqlens.tolist()
    owned = torch.zeros(seq.num_tokens, dtype=torch.bool)
    for n, slot in enumerate(seq.read_slots.tolist()):
        if 0 <= slot < slots:
            owned[cu[n] : cu[n + 1]] = True
    return owned


def make_pool(case, seq, dtype, device, gen):
    """(storage, view): everything is NaN except the columns that a row may rightly read."""
    keep = case.width - 1
    size, columns = case.slots, keep + case.extra
    if case.layout == "cw":
        shape = (size, 2, case.channels + 3, columns + 1) if case.strided else (size, case.channels, columns)
        storage = torch.full(shape, NAN, dtype=dtype, device=device)
        view = storage[:, 1, : case.channels, :columns] if case.strided else storage
        newest = view[:, :, columns - keep :]
    else:
        shape = (size, columns, 2 * case.channels + 1) if case.strided else (size, columns, case.channels)
        storage = torch.full(shape, NAN, dtype=dtype, device=device)
        view = storage[:, :, : 2 * case.channels : 2] if case.strided else storage
        newest = view[:, columns - keep :]
    for has, slot in zip(seq.has_state.tolist(), seq.read_slots.tolist(), strict=True):
        if has and 0 <= slot < size:
            newest[slot] = torch.randn(newest[slot].shape, generator=gen).to(newest)
    return storage, view


@contextlib.contextmanager
def poisoned():
    """What launchers allocate, outputs and workspaces, is NaN with a border that must survive. Yields the buffers."""
    buffers, real = [], torch.Tensor.new_empty

    def new_empty(x, *shape, dtype=None, **named):
        if named:  # Triton's interpreter: it names the device
            return real(x, *shape, dtype=dtype, **named)
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 2 * CANARY,), NAN, dtype=dtype or x.dtype, device=x.device)
        buffer[:CANARY] = buffer[CANARY + numel :] = 7.0
        buffers.append(buffer)
        return buffer[CANARY : CANARY + numel].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield buffers
    assert buffers, "nothing was allocated by new_empty"
    for buffer in buffers:
        borders = torch.cat([buffer[:CANARY], buffer[-CANARY:]])
        assert (borders == 7).all(), "a write outside a buffer"


def assert_rounded_once(got, want, dtype, label):
    """Every row: one rounding to dtype of a value right to f32. The worst element is named."""
    got = got.double()
    arithmetic = (2e-6 if dtype == torch.float32 else 6e-6) * want.abs().clamp(min=1)
    limit = want.abs() * ROUNDING[dtype] * 1.02 + arithmetic
    excess = torch.where(got.isfinite(), (got - want).abs() / limit, torch.full_like(want, float("inf")))
    if excess.numel():
        worst = int(excess.argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape)]
        assert excess.max() <= 1, f"{label}{where}: {got.flatten()[worst]} for {want.flatten()[worst]}"


def bits(x):
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def check_repeats(launch, times=200):
    """launch() -> tensors: the same bits each time. They are compared where they lie, and waited for once, at the end."""
    first, differ = [x.clone() for x in launch()], []
    for _ in range(times - 1):
        pairs = zip(launch(), first, strict=True)
        differ.append(torch.stack([(bits(again) != bits(x)).any() for again, x in pairs]).any())
    wrong = torch.stack(differ).nonzero().flatten().tolist()
    assert not wrong, f"other bits than the first launch's in {len(wrong)} of {times}, first in {wrong[0] + 1}"


def check_conv(case, dtype, device, state_dtype=None):
    gen = torch.Generator().manual_seed(0)
    seq, judge = make_seq(case, device), make_seq(case, "cpu")
    state_dtype = state_dtype or dtype
    storage, pool = make_pool(case, judge, state_dtype, device, gen)
    wide = torch.randn(seq.num_tokens, case.channels + 8, generator=gen).to(device, dtype)  # a row stride of its own
    x = wide[:, : case.channels]
    owned = owned_tokens(judge, case.slots).to(device)
    x[~owned] = NAN
    weight = torch.randn(case.channels, case.width, generator=gen).to(device, dtype)
    bias = torch.randn(case.channels, generator=gen).to(device, dtype) if case.bias else None
    options = {"activation": case.activation, "conv_layout": case.layout}
    new_pool = pool.double()
    want = oracle_ops.causal_conv1d(x, weight, bias, new_pool, judge, **options)
    before = storage.clone()
    expected = storage.clone()
    expected_view = expected.as_strided(pool.shape, pool.stride(), pool.storage_offset())
    old = pool.double()
    changed = ~((new_pool == old) | (new_pool.isnan() & old.isnan()))
    expected_view.copy_(torch.where(changed, new_pool.to(state_dtype), expected_view))

    with poisoned():
        y = triton_launch.causal_conv1d(x, weight, bias, pool, seq, **options)
        assert y.is_contiguous()
        assert (y.dtype, y.shape) == (dtype, x.shape)
        y = y.clone()
    assert (y[~owned] == 0).all(), "tokens of padding rows, or of nobody, are not 0"
    assert_rounded_once(y, want, dtype, "y")
    assert torch.equal(bits(storage), bits(expected)), _pool_difference(storage, expected, before)
    assert bool(seq.error.item()) == bool(judge.error.item()), "the error flag"
    return y, storage


def _pool_difference(got, want, before):
    wrong = (bits(got) != bits(want)).nonzero()[:5].tolist()
    return "pool: " + "; ".join(f"{i}: {got[tuple(i)]}, want {want[tuple(i)]}, was {before[tuple(i)]}" for i in wrong)


def check_same_bits(dtype, device, layout, lengths=(23, 7, 40), channels=24):
    """A token's bits depend neither on how its sequence was cut nor on the kernel: one prefill, two, verify, decode."""
    gen = torch.Generator().manual_seed(1)
    total, count = sum(lengths), len(lengths)
    weight = torch.randn(channels, 4, generator=gen).to(device, dtype)
    bias = torch.randn(channels, generator=gen).to(device, dtype)
    xs = [torch.randn(n, channels, generator=gen).to(device, dtype) for n in lengths]
    shape = (count, channels, 3) if layout == "cw" else (count, 3, channels)
    start = torch.randn(shape, generator=gen).to(device, dtype)

    def run(plan):
        """plan: list of (phase, tokens to take from each sequence)."""
        pool, done = start.clone(), [0] * count
        outs = [[] for _ in range(count)]
        for phase, takes in plan:
            takes = [min(take, lengths[n] - done[n]) for n, take in enumerate(takes)]
            x = torch.cat([xs[n][done[n] : done[n] + takes[n]] for n in range(count)])
            # verify: only the last draft's state is kept
            width = max(takes) if phase == "verify" else 1
            slots = tuple(
                tuple(n if i == takes[n] - 1 else -1 for i in range(width)) if phase == "verify" else n
                for n in range(count)
            )
            rows = tuple((takes[n], True, n, slots[n]) for n in range(count))
            seq = make_seq(Case("", phase, rows), device)
            y = triton_launch.causal_conv1d(x, weight, bias, pool, seq, activation="silu", conv_layout=layout)
            at = 0
            for n in range(count):
                outs[n].append(y[at : at + takes[n]])
                at += takes[n]
                done[n] += takes[n]
        return torch.cat([torch.cat(o) for o in outs]), pool

    whole = run([("prefill", lengths)])
    assert whole[0].shape == (total, channels)
    longest = max(lengths)
    plans = {
        "two prefills": [("prefill", tuple((9, 2, 21)[n % 3] for n in range(count))), ("prefill", (longest,) * count)],
        "prefill, verify": [("prefill", tuple(n - 3 for n in lengths)), ("verify", (3,) * count)],
        "prefill, decode": [
            ("prefill", tuple(n - 2 for n in lengths)),
            ("decode", (1,) * count),
            ("decode", (1,) * count),
        ],
    }
    for name, plan in plans.items():
        y, pool = run(plan)
        assert torch.equal(bits(y), bits(whole[0])), name
        assert torch.equal(bits(pool), bits(whole[1])), name


MALFORMED = [
    (0, 5, 3, 999, -4),
    (-7, 2, 2, 40, 4),
    (2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1),
    (9, 8, 7, 6, 5),
    (3, 4, 5, 6, 7),
]


def check_malformed(cu_seqlens, phase, dtype, device):
    """cu_seqlens that lie: nothing outside the outputs and the named slots is written."""
    channels, tokens, size = 8, 20, 8
    storage = torch.full((size + 2, channels, 3), 7.0, dtype=dtype, device=device)
    x = torch.ones(tokens, channels, dtype=dtype, device=device)
    ints = {"dtype": torch.int32, "device": device}
    seq = SeqLike(
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
    weight = torch.ones(channels, 4, dtype=dtype, device=device)
    with poisoned():
        y = triton_launch.causal_conv1d(x, weight, None, storage[1:-1], seq, activation="none", conv_layout="cw")
        assert y.isfinite().all(), "a token was not written"
    assert (storage[0] == 7).all()
    assert (storage[5:] == 7).all()


NORMS = [  # T, HV, V, activation, how o and z lie in memory
    (3, 2, 128, "silu", "contiguous"),
    (17, 3, 96, "sigmoid", "wide"),
    (5, 4, 192, "silu", "wide"),
    (9, 1, 1024, "sigmoid", "contiguous"),
    (4, 3, 5, "silu", "transposed"),
    (1, 1, 1, "silu", "contiguous"),
    (6, 3, 64, "sigmoid", "last"),
    (0, 4, 128, "silu", "contiguous"),
]


def check_norm(tokens, heads, width, activation, memory, dtype, device, weight_dtype=torch.float32):
    gen = torch.Generator().manual_seed(2)

    def operand(pad):
        x = torch.randn(tokens, heads, width, generator=gen).to(device, dtype)
        if memory == "wide":  # a slice of a wider projection, each of its own width
            wide = torch.full((tokens, heads * width + 16 * pad), NAN, dtype=dtype, device=device)
            wide[:, 8 : 8 + heads * width] = x.flatten(1)
            return wide[:, 8 : 8 + heads * width].view(tokens, heads, width)
        if memory == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if memory == "last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x

    o, z = operand(1), operand(2)
    if tokens > 1:
        o[1] = 0  # eps keeps it finite
        o[0] *= 100
    weight = torch.randn(width, generator=gen).to(device, weight_dtype)
    want = oracle_ops.gated_rmsnorm(o, z, weight, eps=1e-6, activation=activation)
    with poisoned():
        y = triton_launch.gated_rmsnorm(o, z, weight, eps=1e-6, activation=activation)
        assert y.is_contiguous()
        assert (y.dtype, y.shape) == (dtype, o.shape)
        y = y.clone()
    assert_rounded_once(y, want, dtype, "y")
