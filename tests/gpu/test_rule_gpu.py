"""The chunked gated delta rule on a GPU: the interpreter's cases in bf16 and f16, then what only a GPU can show."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases_rule as cases
from triton_cases import ON_GPU, check_repeats

from gdnir import oracle_ops
from gdnir.lowering import triton_rule

pytestmark = ON_GPU
DTYPES = [torch.bfloat16, torch.float16]
HEADS = [(2, 8, 128, 128), (16, 32, 128, 128), (16, 64, 128, 128), (4, 4, 64, 64), (6, 6, 96, 192), (2, 6, 128, 64)]
LONG = ((1000, True, 0, 0), (0, True, 1, 1), (64, False, 2, 2), (63, True, 3, 4), (129, True, 5, 5), (3, False, 6, 6))
NAMES = ("cu_seqlens", "read_slots", "write_slots", "has_state")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rule(case, dtype):
    cases.check_rule(case, dtype, "cuda")


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rule_real_heads(heads, state, layout):
    for segment in (0, 2) if heads[1] <= 8 else (0,):
        case = cases.Case("", LONG, heads, layout=layout, segment=segment, tail=7)
        cases.check_rule(case, torch.bfloat16, "cuda", state)


@pytest.mark.parametrize("gates", ["zero", "-20", "-1e4", "-inf", "mixed", "steps"])
@pytest.mark.parametrize("segment", [0, 2])
def test_rule_gates(gates, segment):
    case = cases.Case("", cases.cont(1000, 65), (2, 4, 128, 128), gates=gates, segment=segment)
    cases.check_rule(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("precision", ["f16", "bf16x3"])
@pytest.mark.parametrize("keys", ["random", "similar", "identical"])
def test_rule_keys(keys, precision, monkeypatch):
    monkeypatch.setitem(triton_rule.PREP, "sm_90", {**triton_rule.PREP["sm_90"], "PRECISION": precision})
    for beta in ("0", "1", "model"):
        case = cases.Case("", cases.fresh(129), (2, 4, 128, 128), keys=keys, beta=beta)
        cases.check_rule(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("blocks", [(64, 3, 4), (64, 2, 4), (128, 3, 8), (128, 2, 8)], ids=str)
@pytest.mark.parametrize("shared", [1, 2])
def test_rule_with_other_blocks(blocks, shared, monkeypatch):
    rows, stages, warps = blocks
    monkeypatch.setitem(triton_rule.RULE, "sm_90", {"BV": rows, "STAGES": stages, "num_warps": warps})
    monkeypatch.setitem(triton_rule.PREP, "sm_90", {**triton_rule.PREP["sm_90"], "HEADS": shared})
    cases.check_rule(cases.Case("", LONG, (2, 8, 128, 128), segment=2), torch.bfloat16, "cuda")


@pytest.mark.parametrize("segment", [0, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_same_bits_among_others(segment, dtype):
    rows = ((3, True, 0, 0), (64 * 19 + 7, True, 1, 1), (65, False, 2, 3), (64 * 8, True, 4, 4), (64 * 17, True, 5, 5))
    cases.check_same_bits(rows, (2, 8, 128, 128), segment, dtype, "cuda")


@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED, ids=str)
@pytest.mark.parametrize("segment", [0, 1])
def test_rule_survives_malformed_cu_seqlens(cu_seqlens, segment):
    cases.check_malformed(cu_seqlens, segment, torch.bfloat16, "cuda")


def _batch(case, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    seq = cases.make_seq(case, "cuda")
    inputs = cases.make_inputs(case, seq, dtype, "cuda", gen)
    return seq, inputs, cases.make_pool(case, seq, torch.float32, "cuda", gen)[1]


@pytest.mark.parametrize("heads", [(2, 8, 128, 128), (16, 32, 128, 128)], ids=str)
@pytest.mark.parametrize("segment", [0, 2])
def test_rule_200_launches_bitwise_equal(heads, segment):
    case = cases.Case("", cases.cont(64 * 10 + 5, 64 * 3, 1, 0, 64 * 12), heads, segment=segment)
    seq, inputs, start = _batch(case)

    def launch():
        pool = start.clone()
        return cases.run(case, inputs, pool, seq, 0.1), pool

    check_repeats(launch)


@pytest.mark.parametrize("segment", [0, 1])
def test_cuda_graph_replays_with_new_contents_and_nothing_waits(segment):
    """Metadata is refilled between replays: other lengths, slots and flags, and fewer tokens than were captured."""
    heads = (1, 2, 64, 64)
    batches = [
        ((64 * 5, True, 0, 0), (64 * 2, False, 1, 1)),
        ((3, False, 4, 5), (64 * 6 + 1, True, 2, 2)),
        ((0, True, -1, 0), (33, True, 1, 3)),
    ]
    made = [cases.Case("", rows, heads, segment=segment) for rows in batches]
    seqs = [cases.make_seq(case, "cuda") for case in made]
    _, inputs, _ = _batch(made[0])
    pool = torch.randn(8, 2, 64, 64, device="cuda")
    start = pool.clone()
    static = dataclasses.replace(seqs[0], **{name: getattr(seqs[0], name).clone() for name in NAMES})
    cases.run(made[0], inputs, pool, static, 0.1)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.run(made[0], inputs, pool, static, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cases.run(made[0], inputs, pool, static, 0.1)
    for case, seq in zip(made, seqs, strict=True):
        for name in NAMES:
            getattr(static, name).copy_(getattr(seq, name))
        pool.copy_(start)
        o.fill_(float("nan"))
        want_pool, judge = start.double(), cases.make_seq(case, "cpu")
        want = oracle_ops.gated_delta_rule(*inputs, want_pool, judge, scale=0.1, state_layout="vk")
        graph.replay()
        cases.check_errors(o, want, torch.bfloat16, "random", "o")
        cases.check_errors(pool, want_pool, torch.bfloat16, "random", "state")


@pytest.mark.parametrize("far", ["slot", "head", "row"])
def test_rule_state_beyond_2_to_31_elements(far, much_memory):
    hv, size = 2, 16
    stride = {"slot": 2**30 + 64, "head": 2**31 + 64, "row": 2**27 + 64}[far]
    strides = {
        "slot": (stride, size * size, size, 1),
        "head": (size * size, stride, size, 1),
        "row": (size * hv, size, stride, 1),
    }[far]
    shape = (3, hv, size, size)
    numel = sum((n - 1) * by for n, by in zip(shape, strides, strict=True)) + 1
    much_memory(2 * numel)
    pool = torch.empty(numel, dtype=torch.bfloat16, device="cuda").as_strided(shape, strides)
    pool.copy_(torch.randn(shape))
    case = cases.Case("", ((65, True, 2, 1), (3, True, 0, 0)), (1, hv, size, size), slots=3)
    seq, inputs, _ = _batch(case)
    want_pool = pool.double()
    want = oracle_ops.gated_delta_rule(*inputs, want_pool, seq, scale=0.25, state_layout="vk")
    o = triton_rule.delta_rule_prefill(*inputs, pool, seq, scale=0.25, state_layout="vk")
    cases.check_errors(o, want, torch.bfloat16, "random", "o")
    cases.check_errors(pool, want_pool, torch.bfloat16, "random", "state")


@pytest.mark.parametrize("far", ["tokens", "rows"])
def test_rule_tokens_beyond_2_to_31_elements(far, much_memory):
    """o and the workspaces have more than 2^31 elements, or q, k and v lie in rows that far apart."""
    key_dim = value_dim = 64
    if far == "tokens":
        h, hv, tokens = 1, 64, 2**19 + 65
    else:
        h, hv, tokens = 1, 1, 70
    much_memory((24 if far == "tokens" else 6) * 2**30)
    q, k = torch.nn.functional.normalize(torch.randn(2, tokens, h, key_dim, device="cuda"), dim=-1).bfloat16()
    v = torch.randn(tokens, hv, value_dim, device="cuda", dtype=torch.bfloat16)
    g = torch.full((tokens, hv), -0.1, device="cuda")
    beta = torch.full((tokens, hv), 0.5, device="cuda")
    if far == "rows":
        apart = torch.empty(tokens * (2**25 + 64), dtype=torch.bfloat16, device="cuda")
        q = apart.as_strided(q.shape, (2**25 + 64, key_dim, 1)).copy_(q)
    # The last tokens are a sequence of their own, checked against the oracle.
    first, last = tokens - 65, 65
    pool = torch.randn(2, hv, value_dim, key_dim, device="cuda")
    case = cases.Case("", ((first, True, 0, 0), (last, True, 1, 1)), (h, hv, key_dim, value_dim), slots=2)
    want_pool = pool[1:].double()
    end = cases.make_seq(dataclasses.replace(case, rows=((last, True, 0, 0),)), "cpu")
    tail = [x[-last:].contiguous() for x in (q, k, v, g, beta)]
    want = oracle_ops.gated_delta_rule(*tail, want_pool, end, scale=0.125, state_layout="vk")
    seq = cases.make_seq(case, "cuda")
    o = triton_rule.delta_rule_prefill(q, k, v, g, beta, pool, seq, scale=0.125, state_layout="vk")
    cases.check_errors(o[-last:], want, torch.bfloat16, "random", "o")
    cases.check_errors(pool[1:], want_pool, torch.bfloat16, "random", "state")
    assert all(part.isfinite().all() for part in o.split(2**16))


def test_rule_many_short_sequences():
    count = 5_000
    lengths = [n % 4 for n in range(count)]
    case = cases.Case("", cases.cont(*lengths), (1, 1, 16, 16), slots=count)
    cases.check_rule(case, torch.bfloat16, "cuda")
