"""conv_prep on a GPU: the interpreter's cases in every type, then real head counts, repeats and graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases as base
import triton_cases_prep as cases
from triton_cases import ON_GPU

pytestmark = ON_GPU
REAL = [(2, 8, 128, 128), (16, 32, 128, 128), (16, 64, 128, 128), (30, 30, 96, 192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", cases.HEADS, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_prep(case, heads, dtype):
    cases.check_prep(case, heads, dtype, "cuda", neg=dtype == torch.float16)


@pytest.mark.parametrize("layout", ["cw", "wc"])
@pytest.mark.parametrize("heads", REAL, ids=str)
def test_prep_real_heads(heads, layout):
    rows = tuple((n, n % 3 != 0, slot, slot) for slot, n in enumerate((1, 64, 0, 131, 16, 35, 2, 200)))
    cases.check_prep(base.Case("", "prefill", rows, tail=5, slots=9, layout=layout), heads, torch.bfloat16, "cuda")


@pytest.mark.parametrize("heads", REAL, ids=str)
def test_prep_same_bits_alone_and_in_a_batch(heads):
    cases.check_same_bits(torch.bfloat16, "cuda", heads)


def test_prep_same_bits_200_times():
    heads, lengths = REAL[1], (65, 3, 200)
    h, hv, k, v = heads
    channels, total = 2 * h * k + hv * v, sum(lengths)
    x, a, b = (torch.randn(total, n, device="cuda").bfloat16() for n in (channels, hv, hv))
    weight, shift = torch.randn(channels, 4, device="cuda").bfloat16(), torch.randn(hv, device="cuda")
    start = torch.randn(3, channels, 3, device="cuda").bfloat16()
    seq = base.make_seq(base.Case("", "prefill", base.cont(*lengths)), "cuda")

    def launch():
        pool = start.clone()
        got = cases.triton_launch.conv_prep(
            x, a, b, weight, None, pool, shift, shift, seq, activation="silu", conv_layout="cw", heads=heads, eps=1e-6,
            allow_neg_eigval=False,
        )  # fmt: skip
        return *got, pool

    base.check_repeats(launch)
