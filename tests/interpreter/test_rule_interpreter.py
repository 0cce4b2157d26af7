"""The chunked gated delta rule in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 pytest tests/interpreter

No bf16: the interpreter's is broken.
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
import triton_cases_rule as cases

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rule(case):
    # A bf16 state is only stored and loaded as such, which the interpreter does.
    state = torch.float32 if cases.CASES.index(case) % 4 else torch.float16
    cases.check_rule(case, torch.float16, "cpu", state)


@pytest.mark.parametrize("segment", [0, 1])
def test_same_bits_among_others(segment):
    rows = ((3, True, 0, 0), (64 * 4 + 7, True, 1, 1), (65, False, 2, 3))
    cases.check_same_bits(rows, (1, 1, 16, 16), segment, torch.float16, "cpu")


@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED, ids=str)
def test_survives_malformed_cu_seqlens(cu_seqlens):
    cases.check_malformed(cu_seqlens, 1, torch.float16, "cpu")
