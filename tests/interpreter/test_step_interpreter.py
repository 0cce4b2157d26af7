"""The kernels of decode and verify, and of the small ops, in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter

Triton reads the variable when it is imported and when a kernel is decorated, so this is a process of its own. No
bf16: the interpreter's is broken.
"""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton_cases as base
import triton_cases_step as cases

pytestmark = pytest.mark.interpreter


FUSED_ONLY = [f"{phase}-{name}" for phase in cases.ROWS for name in ("w2-r1", "w3-r3")]  # about the convolution


def _dtype(case):
    return (torch.float32, torch.float16)[cases.CASES.index(case) % 2]  # every other case: the interpreter is slow


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_step(case):
    cases.check_step(case, _dtype(case), "cpu")


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.id not in FUSED_ONLY], ids=lambda case: case.id)
def test_rule(case):
    cases.check_rule(case, _dtype(case), "cpu")


@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_state_in_several_tiles(phase, monkeypatch):
    """Small tiles: more of them than are in flight, and a last one that sticks out."""
    for table in (cases.triton_step.STEP, cases.triton_step.VERIFY):
        monkeypatch.setitem(table, 4, {kind: c | {"TILE": 64} for kind, c in table[4].items()})
    monkeypatch.setitem(cases.triton_step.RULE, "default", cases.triton_step.RULE["default"] | {"TILE": 64})
    rows = cases.ROWS[phase][:2]
    case = cases.Case("", phase, rows, heads=(1, 2, 16, 10), slots=cases.SLOTS[phase], state_layout="kv")
    cases.check_step(case, torch.float32, "cpu")
    cases.check_rule(case, torch.float32, "cpu")


@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_neighbours_change_no_bits(phase):
    cases.check_step_neighbours(phase, torch.float32, "cpu", heads=(1, 2, 16, 16))


@pytest.mark.parametrize(
    ("phase", "cu_seqlens"),
    list(zip(("decode", "verify", "verify", "decode", "verify"), base.MALFORMED, strict=True)),
    ids=str,
)
def test_survives_malformed_cu_seqlens(phase, cu_seqlens):
    cases.check_step_malformed(cu_seqlens, phase, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "wide", "last"])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_l2norm(shape, memory, dtype):
    cases.check_l2norm(shape, memory, dtype, "cpu")


@pytest.mark.parametrize(("tokens", "heads", "neg"), [(7, 6, False), (1, 1, True), (0, 4, False), (130, 5, True)])
def test_gate(tokens, heads, neg):
    cases.check_gate(tokens, heads, neg, torch.float32, "cpu")
