"""What the chunked gated delta rule is checked against, on any device: the interpreter and the GPU run the same cases."""

from __future__ import annotations

import dataclasses

import torch
from triton_cases import NAN, SeqLike, bits, make_seq, owned_tokens, poisoned

from gdnir import oracle_ops
from gdnir.lowering import triton_rule

# Largest error of a row, and of all of them together, relative to their norms. With keys that resemble each other the
# outputs are small differences of large terms, whose operands are rounded (T, P and U, as in every chunked kernel): with an
# exact inverse, f32 states and bf16 operands, the worst of these cases is wrong by 5e-2 in a row and by 2e-2 in all.
LIMITS = {
    (torch.bfloat16, "random"): (3e-2, 5e-3),
    (torch.bfloat16, "similar"): (8e-2, 3e-2),
    (torch.bfloat16, "identical"): (6e-2, 2.5e-2),
    (torch.float16, "random"): (3e-2, 7e-4),  # a row whose q . k is almost 0 meets the end of f16's range
    (torch.float16, "similar"): (3e-2, 5e-3),
    (torch.float16, "identical"): (3e-2, 5e-3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. `rows`: (length, has_state, read slot, write slot). `tail`: tokens that nobody owns."""

    id: str
    rows: tuple
    heads: tuple = (1, 1, 32, 32)  # H, HV, K, V
    tail: int = 0
    slots: int = 8
    layout: str = "vk"
    keys: str = "random"
    gates: str = "model"
    beta: str = "model"
    segment: int = 0
    strided: bool = False
    phase: str = "prefill"


def fresh(*lengths):
    return tuple((length, False, n, n) for n, length in enumerate(lengths))


def cont(*lengths):
    return tuple((length, True, n, n) for n, length in enumerate(lengths))


PADDED = (
    (4, True, 1, 1),
    (3, True, -1, 2),
    (65, False, 0, 0),
    (2, True, 99, 3),
    (3, True, 4, 99),
    (66, True, -1, -1),
    (2, True, 5, -1),
)
ELSEWHERE = ((0, True, 0, 1), (1, True, 0, 2), (70, True, 0, 3), (9, True, 0, 4), (0, False, 5, 6))

CASES = [
    *(Case(f"len{n}-fresh", fresh(n)) for n in (0, 1, 3, 64)),
    *(Case(f"len{n}-cont", cont(n)) for n in (0, 1, 3, 63, 64, 65)),
    Case("ragged", ((65, True, 0, 0), (0, False, 1, 1), (3, False, 2, 2), (63, True, 3, 3), (1, True, 5, 4))),
    Case("kv", cont(65, 3), layout="kv"),
    Case("kv-strided", cont(3, 65), layout="kv", strided=True, heads=(1, 2, 32, 48)),
    Case("strided", cont(3, 65), strided=True, heads=(1, 2, 32, 48)),
    Case("gva4", cont(33), heads=(1, 4, 16, 16)),
    Case("gva3-two-key-heads", cont(17), heads=(2, 6, 16, 16)),
    Case("olmo", cont(70), heads=(1, 1, 96, 192)),
    Case("k128", cont(66), heads=(1, 1, 128, 128)),
    Case("k64", cont(66), heads=(1, 1, 64, 64)),
    Case("padded", PADDED, tail=3),
    Case("write-elsewhere", ELSEWHERE),
    Case("only-tail", fresh(0), tail=70),
    Case("no-rows", (), tail=3),
    Case("no-rows-no-tokens", ()),
    Case("read-outside", ((2, True, 99, 3), (1, True, 0, 0))),
    Case("write-outside-of-padding", ((2, True, -1, 8),)),
    *(Case(f"gates-{gates}", cont(68), gates=gates) for gates in ("zero", "-20", "-1e4", "-inf", "mixed", "steps")),
    *(Case(f"beta-{beta}", cont(70), beta=beta) for beta in ("0", "1", "2")),
    *(Case(f"{keys}-beta-1", fresh(65), keys=keys, beta="1", gates="zero") for keys in ("similar", "identical")),
    *(Case(f"{keys}", cont(65), keys=keys) for keys in ("similar", "identical")),
    # cut: more than four segments
    Case("segments", cont(64 * 5), segment=1),
    Case("segments-tail", cont(64 * 4 + 1), segment=1, heads=(1, 2, 16, 32)),
    Case(
        "segments-ragged",
        ((3, True, 1, 1), (64 * 5 + 9, True, 0, 0), (0, True, 2, 2), (64 * 4, False, 3, 3), (64 * 5, True, 4, 5)),
        segment=1,
        layout="kv",
    ),
    Case("segments-of-two", cont(64 * 8 + 3), segment=2, gates="mixed"),
    Case("segments-padded", ((64 * 5, True, -1, 1), (64 * 5 + 3, True, 0, -1), (5, True, 2, 99)), segment=1, tail=65),
]


def make_inputs(case, seq, dtype, device, gen):
    """q, k, v as slices of one buffer, g and beta as every other column of another if `strided`."""
    h, hv, key_dim, value_dim = case.heads
    tokens = seq.num_tokens
    base = torch.randn(1, h, key_dim, generator=gen)
    k = torch.randn(tokens, h, key_dim, generator=gen)
    if case.keys == "similar":  # pairs at a cosine of 0.95
        k = base + 0.23 * k * (base.norm(dim=-1, keepdim=True) / key_dim**0.5)
    elif case.keys == "identical":
        k = base.expand(tokens, h, key_dim)
    q = torch.randn(tokens, h, key_dim, generator=gen)
    if case.keys != "random":
        q = base + 0.3 * q
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    v = torch.randn(tokens, hv, value_dim, generator=gen)
    flat = torch.cat([x.flatten(1) for x in (q, k, v, torch.zeros(tokens, 16))], dim=1).to(device, dtype)
    q, k, v = (
        x.view(tokens, *shape)
        for x, shape in zip(
            flat.split([h * key_dim, h * key_dim, hv * value_dim, 16], dim=1),
            ((h, key_dim), (h, key_dim), (hv, value_dim)),
            strict=False,
        )
    )
    pick = torch.rand(tokens, hv, generator=gen)
    slow = torch.nn.functional.logsigmoid(torch.randn(tokens, hv, generator=gen)) / 16
    g = {
        "model": slow,
        "zero": 0 * slow,
        "-20": 0 * slow - 20,
        "-1e4": torch.where(pick < 0.1, -1e4, slow),
        "-inf": torch.where(pick < 0.1, -float("inf"), slow),
        # Many large decays and resets before small ones: differences of the sums must keep their digits.
        "steps": torch.where(
            torch.arange(tokens)[:, None] % 64 < 40, torch.where(pick < 0.5, -80.0, -float("inf")), slow
        ),
    }
    g["mixed"] = torch.where(pick < 0.8, slow, torch.where(pick < 0.9, g["-1e4"], 0 * slow - 20))
    g["mixed"] = torch.where(pick > 0.95, -float("inf"), g["mixed"])
    beta = torch.sigmoid(torch.randn(tokens, hv, generator=gen))
    beta = beta if case.beta == "model" else torch.full_like(beta, float(case.beta))
    both = torch.stack([g[case.gates], beta], dim=-1 if case.strided else 0).float().to(device)
    return q, k, v, *(both.unbind(-1 if case.strided else 0))


def make_pool(case, seq, dtype, device, gen):
    """(storage, view): everything is NaN except the states that a row may rightly read."""
    _, hv, key_dim, value_dim = case.heads
    inner = (value_dim, key_dim) if case.layout == "vk" else (key_dim, value_dim)
    extra = (2, 1, 3, 16) if case.strided else (1, 0, 0, 0)
    shape = (extra[0] * case.slots, hv + extra[1], inner[0] + extra[2], inner[1] + extra[3])
    storage = torch.full(shape, NAN, dtype=dtype, device=device)
    view = storage[:: extra[0], :hv, : inner[0], : inner[1]]
    for has, slot in zip(seq.has_state.tolist(), seq.read_slots.tolist(), strict=True):
        if has and 0 <= slot < case.slots:
            view[slot] = torch.randn(view[slot].shape, generator=gen).to(view)
    return storage, view


def errors(got, want):
    """(largest error of a row relative to its norm, error of all of them). A row that should be 0 must be 0."""
    got, want = got.double().flatten(1), want.flatten(1)
    if not want.numel():
        return 0.0, 0.0
    error, norm = (got - want).norm(dim=1), want.norm(dim=1)
    assert got.isfinite().all(), "not finite"
    assert not got[norm == 0].any(), "a row that should be 0"
    total = want.norm()
    return float((error / norm.clamp(min=1e-30)).max()), float(error.norm() / total.clamp(min=1e-30))


def check_errors(got, want, dtype, keys, label):
    row, overall = errors(got, want)
    limits = LIMITS[dtype, keys]
    print(f"{label}: row {row:.1e}, overall {overall:.1e}")
    assert row <= limits[0], f"{label}: a row is wrong by {row:.1e}, want {limits[0]:.1e}"
    assert overall <= limits[1], f"{label}: wrong by {overall:.1e}, want {limits[1]:.1e}"


def run(case, inputs, pool, seq, scale):
    return triton_rule.delta_rule_prefill(
        *inputs, pool, seq, scale=scale, state_layout=case.layout, segment=case.segment
    )


def check_rule(case, dtype, device, state_dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    seq, judge = make_seq(case, device), make_seq(case, "cpu")
    storage, pool = make_pool(case, judge, state_dtype, device, gen)
    inputs = make_inputs(case, seq, dtype, device, gen)
    owned = owned_tokens(judge, case.slots).to(device)
    for x in inputs:
        x[~owned] = NAN
    scale = case.heads[2] ** -0.5
    new_pool = pool.double()
    want = oracle_ops.gated_delta_rule(*inputs, new_pool, judge, scale=scale, state_layout=case.layout)
    before = storage.clone()

    with poisoned():
        o = run(case, inputs, pool, seq, scale)
        assert o.is_contiguous()
        assert (o.dtype, o.shape) == (dtype, inputs[2].shape)
        o = o.clone()
    assert (o[~owned] == 0).all(), "tokens of padding rows, or of nobody, are not 0"
    check_errors(o[owned], want[owned], dtype, case.keys, "o")
    assert bool(seq.error.item()) == bool(judge.error.item()), "the error flag"

    old = before.as_strided(pool.shape, pool.stride(), pool.storage_offset())
    written = []
    for length, has, read, write in case.rows:
        if 0 <= read < case.slots and 0 <= write < case.slots:
            written.append(write)
            if length == 0:
                kept = old[read] if has else torch.zeros_like(old[read])
                assert torch.equal(bits(pool[write].contiguous()), bits(kept.contiguous())), "an empty row's state"
    check_errors(pool[written], new_pool[written], dtype, case.keys, "state")
    pool[written] = old[written]
    assert torch.equal(bits(storage), bits(before)), "something was written that no row names"
    return o


def check_same_bits(rows, heads, segment, dtype, device):
    """A row's bits, alone and among others; and once more."""
    case = Case("", rows, heads, segment=segment)
    seq = make_seq(case, device)
    gen = torch.Generator().manual_seed(1)
    inputs = make_inputs(case, seq, dtype, device, gen)
    start = make_pool(case, seq, torch.float32, device, gen)[1]
    pool, again = start.clone(), start.clone()
    o = run(case, inputs, pool, seq, 0.5)
    assert torch.equal(bits(run(case, inputs, again, seq, 0.5)), bits(o)), "the same launch, other bits"
    assert torch.equal(bits(again), bits(pool)), "the same launch, other bits in the states"
    cu = seq.cu_seqlens.tolist()
    for n, row in enumerate(rows):
        alone, own = dataclasses.replace(case, rows=(row,)), start.clone()
        part = run(alone, [x[cu[n] : cu[n + 1]] for x in inputs], own, make_seq(alone, device), 0.5)
        assert torch.equal(bits(part), bits(o[cu[n] : cu[n + 1]])), f"row {n}"
        assert torch.equal(bits(own[row[3]]), bits(pool[row[3]])), f"state of row {n}"


MALFORMED = [
    (0, 5, 3, 999, -4),
    (-7, 2, 2, 400, 4),
    (2**31 - 1, -(2**31), 2**31 - 1, 0, 2**31 - 1),
    (9, 8, 7, 6, 5),
    (3, 4, 5, 6, 7),
]


def check_malformed(cu_seqlens, segment, dtype, device):
    """cu_seqlens that lie: nothing outside the outputs, the workspaces and the named slots is written."""
    tokens, size, heads = 330, 8, (1, 1, 16, 16)
    storage = torch.full((size + 2, 1, 16, 16), 7.0, device=device)
    ints = {"dtype": torch.int32, "device": device}
    seq = SeqLike(
        "prefill",
        torch.tensor(cu_seqlens, **ints),
        torch.tensor([0, 1, 2, 3], **ints),
        torch.tensor([[0], [1], [2], [3]], **ints),
        torch.ones(4, dtype=torch.bool, device=device),
        torch.zeros(1, **ints),
        tokens,
        4,
        tokens,
    )
    case = Case("", (), heads, segment=segment)
    inputs = make_inputs(case, seq, dtype, device, torch.Generator().manual_seed(2))
    with poisoned():
        run(case, inputs, storage[1:-1], seq, 1.0)
    assert (storage[0] == 7).all()
    assert (storage[5:] == 7).all()
