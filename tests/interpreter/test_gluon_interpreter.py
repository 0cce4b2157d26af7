"""The gluon lowering on a CPU: TRITON_INTERPRET=1 pytest tests/interpreter

Its Gluon kernels run as tests/gluon_on_cpu.py says, the Triton kernel between segments in Triton's interpreter.
"""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases_gluon as cases
from gluon_on_cpu import gluon_on_cpu

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rule(case, monkeypatch):
    # Every other case in each schedule: the interpreter is slow.
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
