"""A row's bits under `batch_invariant`, in 200 batches each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases_invariant as cases
from triton_cases import HOPPER, ON_GPU

pytestmark = ON_GPU


@pytest.mark.parametrize("heads", [(1, 4, 128, 128), (2, 8, 128, 128), (16, 32, 128, 128)], ids=str)
@pytest.mark.parametrize("provider", ["triton", "gluon"])
def test_200_compositions(provider, heads):
    if provider == "gluon" and not HOPPER:
        pytest.skip("needs a GPU with sm_90")
    cases.check_compositions(provider, heads, "cuda")
