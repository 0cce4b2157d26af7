"""The Gluon kernels of gated_delta_rule on Hopper: the cases of tests/triton_cases_gluon.py, then what only a GPU can show."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases_gluon as cases
from triton_cases import HOPPER, ON_GPU, bits, check_repeats

from gdnir import oracle_ops

pytestmark = [*ON_GPU, pytest.mark.skipif(not HOPPER, reason="needs a GPU with sm_90")]


@pytest.fixture(params=cases.SCHEDULES)
def schedule(request, monkeypatch):
    cases.only(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rule(case, schedule):
    cases.check(case, "cuda")


@pytest.mark.parametrize("heads", [(2, 8), (16, 32), (3, 9)], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.heads == (1, 1)], ids=lambda case: case.id)
def test_rule_with_more_heads(case, heads, schedule):
    cases.check(dataclasses.replace(case, heads=heads), "cuda")


@pytest.mark.parametrize("case", cases.LONG, ids=lambda case: case.id)
def test_long(case, schedule):
    cases.check(case, "cuda")


@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED, ids=str)
def test_malformed_cu_seqlens(cu_seqlens, schedule):
    cases.check_malformed(cu_seqlens, "cuda")


@pytest.mark.parametrize("segment", [0, 4])  # else it follows from the batch, unless batch_invariant is asked for
@pytest.mark.parametrize("heads", [(2, 8), (16, 64)], ids=str)
def test_bits_do_not_depend_on_neighbours(heads, segment, schedule):
    cases.check_alone(cases.Case("", cases.cont(3, 65, 0, 130, 1000, 64), heads=heads, segment=segment), "cuda")


@pytest.mark.parametrize("case", [cases.CASES[-4], *cases.LONG], ids=lambda case: case.id)
def test_both_schedules_give_the_same_bits(case, monkeypatch):
    """The lowering promises batch_invariant, and which schedule is taken depends on the batch."""
    seq = cases.make_seq(case, "cuda")
    inputs, _, _ = cases.make_inputs(case, seq, "cuda")
    _, start = cases.make_pool(case, seq, "cuda")
    found = []
    for name in cases.SCHEDULES:
        cases.only(name, monkeypatch)
        pool = start.clone()
        found.append((cases.run(case, seq, inputs, pool), pool))
    assert torch.equal(bits(found[0][0]), bits(found[1][0]))
    assert torch.equal(bits(found[0][1]), bits(found[1][1]))


def test_1000_launches_bitwise_equal(schedule):
    case = cases.Case("", tuple((n % 9 * 37, n % 2 == 0, n, n) for n in range(40)), slots=40, heads=(16, 32))
    seq = cases.make_seq(case, "cuda")
    inputs, _, _ = cases.make_inputs(case, seq, "cuda")
    _, start = cases.make_pool(case, seq, "cuda")

    def launch():
        pool = start.clone()
        return cases.run(case, seq, inputs, pool), pool

    check_repeats(launch, 1000)


def test_cuda_graph_replays_with_new_contents_and_nothing_waits(schedule):
    """Metadata is refilled between replays: other lengths, slots and flags, and fewer tokens than were captured."""
    batches = [
        ((200, True, 0, 0), (100, False, 1, 1)),
        ((3, False, 4, 5), (65, True, 2, 2)),
        ((0, True, -1, 0), (300, True, 1, 3)),
        ((64, True, 6, 6), (0, True, 7, 5)),
    ]
    made = [cases.Case("", rows, heads=(2, 4)) for rows in batches]
    seqs = [cases.make_seq(case, "cuda") for case in made]
    names = ("cu_seqlens", "read_slots", "write_slots", "has_state")
    static = dataclasses.replace(seqs[0], **{name: getattr(seqs[0], name).clone() for name in names})
    inputs, _, _ = cases.make_inputs(made[0], seqs[0], "cuda")
    start = torch.randn(8, 4, 128, 128, device="cuda")
    pool = start.clone()
    cases.run(made[0], static, inputs, pool)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.run(made[0], static, inputs, pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cases.run(made[0], static, inputs, pool)
    for case, seq in zip(made, seqs, strict=True):
        for name in names:
            getattr(static, name).copy_(getattr(seq, name))
        pool.copy_(start)
        o.fill_(float("nan"))
        wide, judge = start.double(), cases.make_seq(case, "cpu")
        want = oracle_ops.gated_delta_rule(*inputs, wide, judge, scale=cases.SCALE, state_layout="vk")
        graph.replay()
        cases.assert_close(o, want, "o")
        cases.assert_close(pool, wide, "state")


def test_a_pool_beyond_2_to_31_elements(schedule, much_memory):
    stride, heads = 2**30 + 64, (1, 2)
    much_memory(9 * 2**30)
    storage = torch.empty(2 * stride + 2 * 128 * 128, device="cuda")
    pool = storage.as_strided((3, 2, 128, 128), (stride, 128 * 128, 128, 1))
    pool.copy_(torch.randn(3, 2, 128, 128))
    case = cases.Case("", ((65, True, 2, 1), (1, True, 0, 0)), heads=heads, slots=3)
    seq = cases.make_seq(case, "cuda")
    inputs, _, _ = cases.make_inputs(case, seq, "cuda")
    small = pool.double()
    want = oracle_ops.gated_delta_rule(*inputs, small, seq, scale=cases.SCALE, state_layout="vk")
    o = cases.run(case, seq, inputs, pool)
    cases.assert_close(o, want, "o")
    cases.assert_close(pool, small, "state")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_current():
    cases.check(cases.Case("", cases.cont(5, 70)), "cuda:1")
    assert torch.cuda.current_device() == 0
