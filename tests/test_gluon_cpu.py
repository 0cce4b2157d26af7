"""The gluon lowering on a CPU, where its kernels run as tests/gluon_on_cpu.py says."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_cases as base
import triton_cases_gluon as cases
import triton_cases_step as step_cases
from gluon_on_cpu import Ring, gluon_on_cpu, pointer
from triton_cases_invariant import check_compositions


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rule(case, monkeypatch):
    # Every other case in each schedule: a CPU is slow.
    cases.only(("single", "pair")[cases.CASES.index(case) % 2], monkeypatch)
    with gluon_on_cpu():
        cases.check(case, "cpu")


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED[:2], ids=str)
def test_malformed_cu_seqlens(cu_seqlens, schedule, monkeypatch):
    cases.only(schedule, monkeypatch)
    with gluon_on_cpu():
        cases.check_malformed(cu_seqlens, "cpu")


def test_bits_do_not_depend_on_neighbours_or_timing(monkeypatch):
    cases.only("pair", monkeypatch)
    with gluon_on_cpu(seed=1):
        cases.check_alone(cases.Case("", cases.cont(3, 66, 0)), "cpu")


def test_a_few_compositions_of_a_batch():
    with gluon_on_cpu(seed=2):
        check_compositions("gluon", (1, 1, 128, 128), "cpu", count=4, lengths=(0, 3, 66, 400), neighbours=3)


BULK = (2, 4, 128, 128)  # tiles of such a state come and go by bulk copies
BY = pytest.mark.parametrize("by", ["clusters", "tiles"])


@BY
@pytest.mark.parametrize("case", step_cases.CASES, ids=lambda case: case.id)
def test_step(case, by):
    with gluon_on_cpu():
        step_cases.check_step(dataclasses.replace(case, by=by), torch.float32, "cpu")


# Tiles of 2048 to 16384 elements, two to eight on their way.
@pytest.mark.parametrize(
    "heads", [BULK, (1, 1, 128, 192), (1, 4, 64, 64), (1, 4, 64, 128), (1, 3, 64, 128), (1, 3, 64, 96)], ids=str
)
@pytest.mark.parametrize("case", step_cases.CASES, ids=lambda case: case.id)
def test_step_by_bulk_copies(case, heads):
    with gluon_on_cpu():
        for state in (torch.float32, torch.bfloat16):
            for each in step_cases.by_bulk_copies(case, heads, state):
                step_cases.check_step(each, torch.bfloat16, "cpu", state)


def test_a_fence_stands_between_what_was_taken_and_put_and_copies():
    """A bulk copy does not wait for the loads of its warp: on an H200 it came before them in 13 of 1,500 launches."""
    place, source, shape = torch.arange(8)[None] // 4 * 16, pointer(torch.zeros(16)), (1, 1, 32)
    ring = Ring(shape)
    ring.fetch(0, source, True, shape)
    ring.arrived(0, True, shape)
    tile = ring.take(0, place, None, 4, shape)
    with pytest.raises(AssertionError, match="may still be loaded"):
        ring.fetch(1, source, True, shape)
    ring.put(place, tile, 4, shape)
    with pytest.raises(AssertionError, match="before it is known"):
        ring.send(source, True, "evict_normal", shape)
    ring.fence()
    ring.fetch(1, source, True, shape)
    ring.send(source, True, "evict_normal", shape)


@BY
@pytest.mark.parametrize("heads", [(1, 4, 128, 128), (1, 1, 96, 192)], ids=str)
@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_step_of_real_heads(phase, heads, by):
    rows = step_cases.ROWS[phase]
    case = step_cases.Case("", phase, rows, heads=heads, slots=step_cases.SLOTS[phase], bias=True, by=by)
    with gluon_on_cpu():
        step_cases.check_step(case, torch.bfloat16, "cpu", torch.bfloat16)


@BY
@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_step_neighbours_and_malformed_cu_seqlens(phase, by):
    with gluon_on_cpu():
        for heads in ((2, 4, 16, 16), BULK):
            step_cases.check_step_neighbours(phase, torch.float32, "cpu", heads=heads, by=by)
        for cu_seqlens in base.MALFORMED:
            for heads in ((1, 2, 8, 8), BULK):
                step_cases.check_step_malformed(cu_seqlens, phase, torch.float32, "cpu", by, heads)
