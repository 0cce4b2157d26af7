"""Native against the float64 oracle, row by row, in every phase and on hostile contents; and the proof that it is torch."""

import pytest
import torch

import gdnir
from gdnir import oracle, oracle_ops, testing
from gdnir.errors import PurityError
from gdnir.lowering import LOWERINGS, native_impl, native_rule
from gdnir.op import OPS
from gdnir.testing import bits

Seq = gdnir.Seq


def _inputs(tokens, h=2, hv=4, k=16, v=24, keys="random", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    q = torch.nn.functional.normalize(torch.randn(tokens, h, k), dim=-1)
    key = torch.randn(tokens, h, k)
    if keys == "identical":
        key = key[:1].expand(tokens, h, k)
    elif keys == "correlated":
        key = 4.3 * torch.randn(1, h, k) + key
    key = torch.nn.functional.normalize(key, dim=-1)
    return (
        q.to(dtype),
        key.to(dtype),
        torch.randn(tokens, hv, v).to(dtype),
        -torch.rand(tokens, hv) * 0.2,
        torch.rand(tokens, hv),
    )


def _check(inputs, state, seq, layout="vk", tolerance=1e-5):
    mine, theirs = state.clone(), state.double().clone()
    o = native_impl.gated_delta_rule(*inputs, mine, seq, scale=0.25, state_layout=layout)
    ref = oracle_ops.gated_delta_rule(*(x.double() for x in inputs), theirs, seq, scale=0.25, state_layout=layout)
    if o.numel():
        assert float(oracle.row_error(o, ref).max()) <= tolerance
    touched = ~torch.isnan(theirs).flatten(1).any(1)
    assert float(oracle.row_error(mine[touched].flatten(2), theirs[touched].flatten(2)).max()) <= tolerance
    assert torch.equal(bits(mine[~touched]), bits(state[~touched]))


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_prefill_lengths(length, layout):
    _check(
        _inputs(length),
        torch.randn(3, 4, *((24, 16) if layout == "vk" else (16, 24))),
        Seq.prefill([length], slots=[1], has_state=True),
        layout,
    )


@pytest.mark.parametrize("keys", ["random", "correlated", "identical"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_hard_keys(keys, beta):
    q, k, v, g, b = _inputs(130, keys=keys)
    # identical keys with beta 1 overwrite one direction again and again: o is a difference of like numbers
    _check(
        (q, k, v, g, torch.full_like(b, beta)),
        torch.randn(2, 4, 24, 16),
        Seq.prefill([130], slots=[0], has_state=True),
        tolerance=3e-5 if beta < 2 else 1e-3,
    )


@pytest.mark.parametrize("gate", [0.0, -20.0, -1e4, float("-inf")])
@pytest.mark.parametrize("where", ["all", "some"])
def test_hard_gates(gate, where):
    q, k, v, g, b = _inputs(130)
    g = torch.full_like(g, gate) if where == "all" else torch.where(torch.rand_like(g) < 0.1, gate, g)
    for seq in (
        Seq.prefill([130], slots=[0], has_state=True),
        Seq.prefill([65, 0, 65], slots=[0, 1, 2], has_state=True),
    ):
        state = torch.randn(3, 4, 24, 16)
        mine, theirs = state.clone(), state.double()
        o = native_impl.gated_delta_rule(q, k, v, g, b, mine, seq, scale=0.25, state_layout="vk")
        ref = oracle_ops.gated_delta_rule(
            *(x.double() for x in (q, k, v, g, b)), theirs, seq, scale=0.25, state_layout="vk"
        )
        assert torch.isfinite(o).all()
        assert torch.isfinite(mine).all()
        scale = torch.linalg.vector_norm(ref, dim=-1).median()
        assert float((torch.linalg.vector_norm(o - ref, dim=-1) / scale).max()) <= 1e-5
        assert float((mine - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("seq", [
    Seq.prefill([65, 3, 0, 1, 64], slots=[0, 1, 2, 3, 4], has_state=[True, False, True, False, True]),
    Seq.prefill([5, 70], read_slots=[0, 0], write_slots=[1, 2], has_state=True),
    Seq.prefill([5, 70], slots=[-1, 2], has_state=True),
    Seq.prefill([], slots=[]),
    Seq.decode([3, 0, 5]),
    Seq.decode([3, -1, 5], has_state=[True, True, False]),
    Seq.decode(read_slots=[0, 0], write_slots=[2, -1]),
    Seq.verify([3, 1, 0], read_slots=[0, 1, 2], write_slots=[[3, 4, 5], [6, 7, 8], [9, 10, 11]]),
    Seq.mixed(Seq.decode([0, 1]), Seq.verify([2], read_slots=[2], write_slots=[[3, 4]]), Seq.prefill([66, 2], slots=[5, 6])),
])  # fmt: skip
@pytest.mark.parametrize("poison", [False, True])
def test_batches(seq, poison):
    """Every phase; with poison, slots the batch does not read hold NaN and padding tokens are NaN."""
    inputs = _inputs(seq.num_tokens)
    state = torch.randn(12, 4, 24, 16)
    rows = [
        (p, n, r, h)
        for p in (seq.parts or (seq,))
        for n, (r, h) in enumerate(zip(p.read_slots.tolist(), p.has_state.tolist(), strict=True))
    ]
    if poison:
        read = {r for _, _, r, h in rows if h and r >= 0}
        for slot in set(range(12)) - read:
            state[slot] = float("nan")
        bounds = seq.cu_seqlens.tolist()
        for n, slot in enumerate(seq.read_slots.tolist()):
            if slot < 0:
                for x in inputs:
                    x[bounds[n] : bounds[n + 1]] = float("nan")
    mine, theirs = state.clone(), state.double()
    o = native_impl.gated_delta_rule(*inputs, mine, seq, scale=0.25, state_layout="vk")
    oracle_inputs = [x.double() for x in inputs]
    outs = []
    for part in seq.parts or (seq,):
        at = seq.part_tokens(part.phase) if seq.parts else slice(None)
        outs.append(
            oracle_ops.gated_delta_rule(*(x[at] for x in oracle_inputs), theirs, part, scale=0.25, state_layout="vk")
        )
    ref = torch.cat(outs)
    if o.numel():
        assert float(oracle.row_error(o, ref).max()) <= 1e-5
    finite = torch.isfinite(theirs).flatten(1).all(1)
    assert float((mine[finite] - theirs[finite]).abs().max() if finite.any() else 0) <= 2e-5
    assert torch.equal(bits(mine[~finite]), bits(state[~finite]))


def test_olmo_sizes_and_low_precision():
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 3e-2)):
        torch.manual_seed(0)
        _check(
            _inputs(70, h=3, hv=3, k=96, v=192, dtype=dtype),
            torch.randn(1, 3, 192, 96),
            Seq.prefill([70], slots=[0], has_state=True),
            tolerance=tolerance,
        )
    inputs, seq = _inputs(3), Seq.decode([0, 1, 2])
    _check(inputs, torch.randn(3, 4, 24, 16).bfloat16(), seq, tolerance=3e-2)


def test_strided_pool_is_updated_in_place():
    big = torch.full((4, 4, 30, 40), float("nan"))
    view = big[:, :, 2:26, 3:19]
    view.copy_(torch.randn(4, 4, 24, 16))
    plain, before = view.clone(), big.clone()
    seq = Seq.decode([2, 0])
    a = native_impl.gated_delta_rule(*_inputs(2), view, seq, scale=1.0, state_layout="vk")
    b = native_impl.gated_delta_rule(*_inputs(2), plain, seq, scale=1.0, state_layout="vk")
    assert torch.equal(a, b)
    assert torch.equal(view, plain)
    view.copy_(before[:, :, 2:26, 3:19])
    assert torch.equal(bits(big), bits(before))


def test_gradients_in_float64():
    q, k, v, g, b = (x.double() for x in _inputs(5, h=1, hv=2, k=3, v=2))
    state = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    for seq in (Seq.prefill([4, 1], slots=[0, 1], has_state=True), Seq.prefill([4, 1], slots=[0, -1], has_state=True)):

        def run(*x, seq=seq):
            s = x[5].clone()
            return native_rule.gated_delta_rule(*x[:5], s, seq, scale=0.5, state_layout="vk"), s

        assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in (q, k, v, g, b, state)])


PROVABLE = [
    op
    for op in sorted(OPS)
    if not OPS[op].fused and not op.startswith("example") and op not in ("seq_part", "slice_tokens")
]


@pytest.mark.parametrize(
    "op",
    [
        op
        for op in PROVABLE
        if "native" in LOWERINGS.get(op, {}) and LOWERINGS[op]["native"].origin.startswith("gdnir.")
    ],
)
def test_native_is_torch(op):
    calls = 0
    for first, second in zip(testing.samples(op, 0), testing.samples(op, 1), strict=True):
        calls += testing.prove_native(op, first[0], second[0], first[1])
    assert calls > 0


def test_the_proof_can_fail():
    """A lowering that reads the host is caught."""

    def cheat(x, *, eps):
        return x * float(x.sum()) if eps else x

    kept = LOWERINGS["l2norm"]["native"]
    import dataclasses

    LOWERINGS["l2norm"]["native"] = dataclasses.replace(kept, run=cheat)
    try:
        with pytest.raises(PurityError):
            testing.prove_native("l2norm", (torch.randn(3, 2, 4),), (torch.randn(3, 2, 4),), {"eps": 1e-6})
    finally:
        LOWERINGS["l2norm"]["native"] = kept


def test_every_op_has_native_or_a_body():
    for op in OPS.values():
        assert op.fused or "native" in LOWERINGS[op.name], op.name


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("layout", ["cw", "wc"])
def test_conv_state_of_any_width(width, layout):
    for seq in (
        Seq.prefill([1, 2, 70, 0], slots=[0, 1, 2, 3], has_state=[True, False, True, True]),
        Seq.decode([4, 2]),
        Seq.verify([2, 1], read_slots=[0, 1], write_slots=[[2, 3], [4, 5]]),
    ):
        torch.manual_seed(1)
        x, w, bias = torch.randn(seq.num_tokens, 10), torch.randn(10, 4), torch.randn(10)
        pool = torch.randn(6, *((10, width) if layout == "cw" else (width, 10)))
        mine, theirs = pool.clone(), pool.double()
        for activation in ("silu", "none"):
            y = native_impl.causal_conv1d(x, w, bias, mine, seq, activation=activation, conv_layout=layout)
            ref = oracle_ops.causal_conv1d(
                x.double(), w.double(), bias.double(), theirs, seq, activation=activation, conv_layout=layout
            )
            assert float(oracle.row_error(y, ref).max()) <= 1e-5
            assert torch.equal(mine.double(), theirs)
