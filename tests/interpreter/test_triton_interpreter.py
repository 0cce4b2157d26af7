"""The Triton kernels in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 pytest tests/interpreter

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
import triton_cases as cases

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_conv(case):
    # Every other case in each type: the interpreter is slow.
    cases.check_conv(case, (torch.float32, torch.float16)[cases.CASES.index(case) % 2], "cpu")


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
def test_conv_with_a_wider_state(phase):
    rows = ((1, True, 0, 0), (1, False, 1, 1))
    cases.check_conv(cases.Case("", phase, rows, bias=True), torch.float16, "cpu", state_dtype=torch.float32)


@pytest.mark.parametrize("layout", ["cw", "wc"])
def test_conv_same_bits_however_it_is_cut(layout):
    cases.check_same_bits(torch.float32, "cpu", layout, lengths=(23, 5, 17), channels=8)


@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED, ids=str)
@pytest.mark.parametrize("phase", ["prefill", "verify"])
def test_conv_survives_malformed_cu_seqlens(cu_seqlens, phase):
    cases.check_malformed(cu_seqlens, phase, torch.float32, "cpu")


def test_conv_error_flag_is_sticky():
    case = cases.Case("", "decode", ((1, True, 0, 0),))
    seq = cases.make_seq(case, "cpu")
    seq.error.fill_(5)
    pool = torch.zeros(8, 24, 3)
    x, weight = torch.ones(1, 24), torch.ones(24, 4)
    cases.triton_launch.causal_conv1d(x, weight, None, pool, seq, activation="silu", conv_layout="cw")
    assert seq.error.item() == 5


def test_conv_takes_strided_metadata():
    """read_slots may be a column of the last step's write_slots."""
    case = cases.Case("", "decode", cases.cont(1, 1, 1))
    plain = cases.make_seq(case, "cpu")
    apart = {
        name: torch.stack([getattr(plain, name), torch.full_like(getattr(plain, name), 99)], dim=1)[:, 0]
        for name in ("cu_seqlens", "read_slots", "has_state")
    }
    pools = [torch.randn(8, 24, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    x, weight = torch.randn(3, 24), torch.randn(24, 4)
    ys = [
        cases.triton_launch.causal_conv1d(x, weight, None, pool, seq, activation="silu", conv_layout="cw")
        for pool, seq in zip(pools, (plain, cases.dataclasses.replace(plain, **apart)), strict=True)
    ]
    assert torch.equal(*ys)
    assert torch.equal(*pools)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_norm(norm, dtype):
    cases.check_norm(*norm, dtype, "cpu", weight_dtype=torch.float32 if norm[0] % 2 else dtype)
