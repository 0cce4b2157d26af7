"""conv_prep in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter"""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton_cases_prep as cases

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", cases.CASES[::2], ids=lambda case: case.id)
def test_prep(case):
    odd = cases.CASES.index(case) // 2 % 2
    cases.check_prep(case, cases.HEADS[odd], (torch.float32, torch.float16)[odd], "cpu", neg=bool(odd))


def test_prep_same_bits_alone_and_in_a_batch():
    cases.check_same_bits(torch.float32, "cpu", (1, 2, 4, 4), lengths=(9, 2, 12))
