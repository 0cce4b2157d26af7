"""What the Gluon lowering of gated_delta_rule is checked against, on any device."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from triton_cases import NAN, bits, owned_tokens, poisoned
from triton_cases import Case as Batch
from triton_cases import make_seq as make_batch

from gdnir import oracle_ops
from gdnir.lowering import gluon_rule

SCALE = 128**-0.5
SCHEDULES = ("single", "pair")


def only(schedule, monkeypatch):
    """From now on this schedule is taken, whatever the shape."""
    monkeypatch.setattr(gluon_rule, "_cut", lambda *shape: (*cut(*shape)[:2], schedule == "single"))
    monkeypatch.setattr(gluon_rule, "_plan", functools.lru_cache(plan))  # without what is known of other schedules


cut, plan = gluon_rule._cut, gluon_rule._plan.__wrapped__


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. `rows`: (length, has_state, read slot, write slot); the rest as named in `make_inputs`."""

    id: str
    rows: tuple
    tail: int = 0  # tokens that nobody owns
    slots: int = 8
    heads: tuple = (1, 1)
    keys: str = "random"
    gate: float | str = "random"
    beta: float | str = "random"
    state: str = "whole"  # whole | strided | apart
    state_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.bfloat16
    views: bool = False  # q, k, v are columns of one tensor
    broken: int = -1  # the row whose operands are NaN
    segment: int | None = None  # chunks of a segment; 0: no sequence is cut
    size: float = 1.0  # of v and the states


def fresh(*lengths):
    return tuple((length, False, n, n) for n, length in enumerate(lengths))


def cont(*lengths):
    return tuple((length, True, n, n) for n, length in enumerate(lengths))


PADDED = (
    (70, True, 1, 1),
    (3, True, -1, 2),
    (65, False, 0, 0),
    (2, True, 99, 3),
    (3, True, 4, 99),
    (20, True, -1, -1),
    (2, True, 5, -1),
    (0, True, -1, 6),
)
CASES = [
    *(Case(f"len{n}-fresh", fresh(n)) for n in (0, 1, 64)),
    *(Case(f"len{n}-cont", cont(n)) for n in (0, 3, 63, 65, 128, 200)),
    Case("ragged", cont(5, 64, 0, 130, 1, 63, 65)),
    Case("ragged-fresh-and-cont", ((64, False, 3, 3), (66, True, 1, 1), (0, False, 2, 2), (7, False, 0, 0))),
    Case("all-empty", cont(0, 0, 0)),
    Case("empty-fresh", fresh(0, 2, 0)),
    Case("padded", PADDED, tail=3),
    Case("only-tail", fresh(0), tail=70),
    Case("padding-only", ((64, True, -1, -1), (5, True, -1, 2))),
    Case("no-rows", (), tail=3),
    Case("no-rows-no-tokens", ()),
    Case("write-elsewhere", ((0, True, 0, 1), (66, True, 0, 2), (1, False, 5, 3))),
    Case("write-outside", ((2, True, 1, 8), (1, True, 0, 0))),
    Case("write-outside-of-padding", ((2, True, -1, 8),)),
    Case("broken-neighbours", cont(3, 65, 1, 64, 70), broken=1),
    Case("broken-last", cont(65, 3), broken=1, tail=70),
    Case("gva4", cont(3), heads=(1, 4)),
    Case("mha", cont(66), heads=(2, 2)),
    Case("views", cont(3, 2), heads=(2, 4), views=True),
    Case("state-bf16", ((66, True, 0, 1), (0, True, 2, 3)), state_dtype=torch.bfloat16),
    Case("f16", cont(66, 0, 130), dtype=torch.float16, heads=(1, 2)),
    Case("f16-cut", cont(64 * 4 + 3, 5), dtype=torch.float16, segment=1),
    Case("state-strided", cont(66, 0), state="strided"),
    Case("state-apart", cont(66, 0), state="apart"),
    *(Case(f"gate{g}", cont(130), gate=g) for g in (0.0, -20.0, -1e4, float("-inf"), "mixed")),
    # Cut: of one chunk with a tail; of two among short ones, three segments and a last one of few tokens; other slots and
    # states; padding; what a cut sequence leaves in `starts` and `steps` must not meet its neighbour's.
    Case("cut-1", cont(64 * 4 + 3), segment=1),
    Case("cut-2-ragged", cont(64 * 6, 3, 64 * 6 + 1, 64, 0, 129), segment=2),
    Case("cut-1-side-by-side", cont(129, 193, 64 * 3, 65), segment=1),
    Case("cut-2-fresh-elsewhere", ((64 * 7, False, 0, 1), (64 * 5, True, 2, 3)), segment=2, state_dtype=torch.bfloat16),
    Case("cut-1-padded", ((200, True, -1, 0), (200, True, 1, -1), (200, True, 99, 2), (130, False, 3, 3)), segment=1),
    Case("cut-1-gates", cont(64 * 4), segment=1, gate="mixed", heads=(1, 2)),
    *(Case(f"cut-1-size{size}", cont(64 * 4), segment=1, size=size) for size in (1e7, 1e-7)),
    Case("cut-1-broken", cont(200, 130, 200), broken=1, segment=1, state="strided"),
    *(
        # No similar keys with beta = 2: along their direction the state is reflected, not forgotten, and what the rounding of
        # T to bf16 loses adds up, to several percent.
        Case(f"{keys}-beta{b}-gate{g}", cont(70), keys=keys, beta=b, gate=g)
        for keys, b, g in (
            ("correlated", "random", "random"),
            ("correlated", 1.0, 0.0),
            ("identical", "random", "random"),
            ("identical", 1.0, 0.0),
            ("random", 0.0, "random"),
            ("random", 1.0, 0.0),
            ("random", 2.0, -0.01),
        )
    ),
]
LONG = [
    Case("len1000", cont(1000), heads=(2, 8)),
    Case("ragged-long", cont(1000, 64, 0, 333, 65, 512, 2000), heads=(4, 8)),
    Case("many", cont(*(n * 7 % 131 for n in range(60))), slots=60, heads=(4, 16)),
    Case("many-gva2", cont(*(n * 37 % 300 for n in range(20))), slots=20, heads=(16, 32)),
    Case("identical-long", cont(1000), heads=(2, 4), keys="identical", beta=1.0, gate=0.0),
    Case("correlated-long", cont(1000), heads=(2, 4), keys="correlated", beta=1.0, gate=0.0),
    Case("mixed-long", cont(1000, 70), heads=(2, 4), gate="mixed"),
    Case("cut-long", cont(3000, 64, 2000, 1500), heads=(2, 8), segment=5),
    Case("cut-identical-long", cont(1000), heads=(2, 4), keys="identical", beta=1.0, gate=0.0, segment=2),
    Case("cut-correlated-long", cont(1000), heads=(2, 4), keys="correlated", beta=1.0, gate=0.0, segment=2),
]


def make_seq(case, device):
    return make_batch(Batch(case.id, "prefill", case.rows, case.tail), device)


def make_gates(kind, shape, gen):
    """Log gates: logsigmoid(randn)/16 with a quarter of the heads at 0, one number, or all kinds in turn."""
    if isinstance(kind, float):
        return torch.full(shape, kind)
    g = F.logsigmoid(torch.randn(shape, generator=gen)) / 16
    g[:, :: max(4, shape[1])] = 0
    if kind == "mixed":
        pick = torch.randint(0, 12, shape, generator=gen)
        for which, value in enumerate((0.0, -20.0, -1e4, float("-inf"))):
            g[pick == which] = value
    return g


def make_inputs(case, seq, device, seed=0):
    """q, k (l2-normalised; similar keys have cosine 0.95), v, g, beta on the device; NaN where no live row owns a token."""
    gen = torch.Generator().manual_seed(seed)
    tokens, (h, hv) = seq.num_tokens, case.heads
    q, k = (F.normalize(torch.randn(tokens, h, 128, generator=gen), dim=-1) for _ in range(2))
    one = F.normalize(torch.randn(1, h, 128, generator=gen), dim=-1)
    if case.keys == "correlated":
        k = F.normalize(0.95**0.5 * one + 0.05**0.5 * k, dim=-1)
    elif case.keys == "identical":
        k = one.expand(tokens, h, 128)
    v = torch.randn(tokens, hv, 128, generator=gen) * case.size
    g = make_gates(case.gate, (tokens, hv), gen)
    beta = torch.randn(tokens, hv, generator=gen).sigmoid() if case.beta == "random" else torch.full_like(g, case.beta)
    owned = owned_tokens(seq, case.slots)
    good = owned.clone()
    if case.broken >= 0:
        good[slice(*seq.cu_seqlens[case.broken : case.broken + 2].tolist())] = False
    whole = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1).to(device, case.dtype)
    whole[~good] = NAN
    g[~good], beta[~good] = NAN, NAN
    parts = whole.split([h * 128, h * 128, hv * 128], 1)
    q, k, v = (
        (x if case.views else x.contiguous()).unflatten(1, (n, 128))
        for x, n in zip(parts, (h, h, hv), strict=True)
    )  # fmt: skip
    return (q, k, v, g.to(device), beta.to(device)), owned.to(device), good.to(device)


def make_pool(case, seq, device):
    """(storage, view [S,HV,128,128]): NaN except what a row may rightly read."""
    gen = torch.Generator().manual_seed(7)
    shape = (case.slots, case.heads[1], 128, 128)
    if case.state == "strided":
        storage = torch.full((case.slots, 2, case.heads[1] + 1, 128, 128), NAN, dtype=case.state_dtype, device=device)
        view = storage[:, 1, :-1]
    elif case.state == "apart":
        storage = torch.full((case.slots, case.heads[1], 128, 130, 2), NAN, dtype=case.state_dtype, device=device)
        view = storage[:, :, :, :128, 1]
    else:
        storage = view = torch.full(shape, NAN, dtype=case.state_dtype, device=device)
    for has, slot in zip(seq.has_state.tolist(), seq.read_slots.tolist(), strict=True):
        if has and 0 <= slot < case.slots:
            view[slot] = (torch.randn(shape[1:], generator=gen) * case.size).to(view)
    return storage, view


def assert_close(got, want, label, limit=5e-3):
    """Norms of differences by norms: of each row, against at least a tenth of the usual row, and of everything."""
    assert_each_close(got[None], want[None], [label], limit)


def assert_each_close(got, want, labels, limit=5e-3, rows_limit=None):
    """assert_close of got[i] and want[i] for every i, waiting for the device once."""
    if not want.numel():
        return
    got, want = got.double().flatten(1, -2), want.flatten(1, -2)
    difference, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    usual = size.square().mean(1, keepdim=True).sqrt()
    rows = (difference / size.clamp(min=0.1 * usual + 1e-30)).amax(1)
    overall = difference.norm(dim=1) / size.norm(dim=1).clamp(min=1e-30)
    finite = got.isfinite().flatten(1).all(1)
    zero = want.flatten(1).any(1) | ~got.flatten(1).any(1)
    # One row's error is mostly one number's, T's or P's: only over many rows is it the usual one.
    most = limit if want.shape[1] >= 32 else 2 * limit
    for label, *found in zip(labels, *torch.stack([finite, zero, rows, overall]).tolist(), strict=True):
        assert found[0], f"{label} is not finite"
        assert found[1], f"{label} is not zero"
        assert found[2] <= (rows_limit or 6 * limit), f"{label}: row error {found[2]}"
        assert found[3] <= most, f"{label}: error {found[3]}"


def run(case, seq, inputs, pool):
    return gluon_rule.delta_rule_prefill(*inputs, pool, seq, scale=SCALE, segment=case.segment)


def check(case, device):
    """Outputs, states, untouched memory and the error flag; returns (o, storage)."""
    seq, judge = make_seq(case, device), make_seq(case, "cpu")
    inputs, owned, good = make_inputs(case, judge, device)
    storage, pool = make_pool(case, judge, device)
    before = storage.clone()
    new_pool = pool.double()
    want = oracle_ops.gated_delta_rule(*inputs, new_pool, judge, scale=SCALE, state_layout="vk")
    with poisoned():
        o = run(case, seq, inputs, pool)
        assert o.is_contiguous()
        assert (o.dtype, o.shape) == (case.dtype, inputs[2].shape)
        o = o.clone()
    assert not o[~owned].any(), "tokens of padding rows, or of nobody, are not 0"
    limit = {torch.bfloat16: 5e-3, torch.float16: 1.5e-3}[case.dtype]  # 8 and 11 bits
    assert_close(o[good], want[good], "o", limit)
    written = {}
    for n, (_, _, read, write) in enumerate(case.rows):
        if 0 <= read < case.slots and 0 <= write < case.slots:
            written[write] = n
    rounding = 3e-3 if case.state_dtype == torch.bfloat16 else 0
    sound = {slot: f"state of row {n}" for slot, n in written.items() if n != case.broken}
    # Identical keys leave a state one direction: a row of it is one number, with the rounding of T in full.
    rows_limit = 5e-2 if case.keys == "identical" else None
    assert_each_close(pool[list(sound)], new_pool[list(sound)], list(sound.values()), limit + rounding, rows_limit)
    slots = list(written)
    pool[slots] = before.as_strided(pool.shape, pool.stride(), pool.storage_offset())[slots]
    assert torch.equal(bits(storage), bits(before)), "memory of other slots"
    assert bool(seq.error.item()) == bool(judge.error.item()), "the error flag"
    return o


MALFORMED = [(0, 5, 3, 999, -4), (-7, 2, 2, 40, 4), (2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1), (9, 8, 7, 6, 5)]


def check_malformed(cu_seqlens, device):
    """cu_seqlens that lie: nothing outside the outputs and the named slots is written, and the kernel ends."""
    case = Case("", cont(70, 1, 64, 3), slots=4)
    seq = make_seq(case, device)
    inputs, _, _ = make_inputs(case, seq, device)
    storage = torch.full((6, 2, 128, 128), 7.0, device=device)
    lying = dataclasses.replace(seq, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32, device=device))
    with poisoned():
        run(case, lying, inputs, storage[1:-1])
    assert (storage[0] == 7).all()
    assert (storage[-1] == 7).all()


def check_alone(case, device):
    """A row's bits are those it has alone (one schedule)."""
    seq = make_seq(case, device)
    inputs, _, _ = make_inputs(case, seq, device)
    _, pool = make_pool(case, seq, device)
    before = pool.clone()
    o = run(case, seq, inputs, pool)
    cu = seq.cu_seqlens.tolist()
    for n, row in enumerate(case.rows):
        one = dataclasses.replace(case, rows=(row,))
        mine = before.clone()
        alone = run(one, make_seq(one, device), [x[cu[n] : cu[n + 1]] for x in inputs], mine)
        assert torch.equal(bits(o[cu[n] : cu[n + 1]]), bits(alone)), n
        if 0 <= row[3] < case.slots:
            assert torch.equal(bits(pool[row[3]]), bits(mine[row[3]])), n
