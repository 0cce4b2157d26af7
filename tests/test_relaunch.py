"""What is launched again is what Triton would have launched: whatever Triton's key tells apart, ours does."""

import itertools
import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
import triton.language as tl  # noqa: E402

from gdnir.lowering.relaunch import Relaunch, relaunched  # noqa: E402


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["sliced"])
def kernel_(x, sliced, bias, count, stride, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    pass


class Driver:
    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 77


@pytest.fixture
def binder():
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    yield kernel_.create_binder()[-1]
    triton.runtime.driver._active = before


FLAT = torch.empty(64)
POINTERS = (FLAT, FLAT[1:], FLAT[4:], FLAT.half(), FLAT.bfloat16())
INTS = (0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**32, 2**40 + 1, -1, -16, -(2**31), -(2**31) - 1)


def test_what_triton_tells_apart_has_another_key(binder):
    launcher = Relaunch(kernel_)
    seen = {}
    for x, sliced, bias in itertools.product(POINTERS, POINTERS, (None, FLAT, FLAT[1:])):
        for count, stride in itertools.product(INTS, INTS[:8]):
            named = {"bias": bias, "count": count, "stride": stride, "scale": 0.5, "BLOCK": 32, "FLAG": count > 3}
            key, values = launcher.key((x, sliced), {**named, "num_warps": 4})
            assert len(values) == 8
            _, specialization, _ = binder(x, sliced, **named, num_warps=4)
            theirs = str(specialization)
            assert seen.setdefault(key, theirs) == theirs
    assert len(set(seen.values())) > 500


def test_options_are_part_of_the_key():
    launcher = Relaunch(kernel_)
    named = {"bias": None, "count": 3, "stride": 3, "scale": 0.5, "BLOCK": 32, "FLAG": False}
    keys = {launcher.key((FLAT, FLAT), {**named, "num_warps": warps})[0] for warps in (1, 2, 4)}
    assert len(keys) == 3


@pytest.mark.parametrize("named", [{}, {"bias": object()}], ids=["missing", "unknown"])
def test_arguments_that_are_missing_or_unknown(named):
    rest = {"count": 3, "stride": 3, "scale": 0.5, "BLOCK": 32, "FLAG": False}
    with pytest.raises((KeyError, TypeError)):
        Relaunch(kernel_).key((FLAT, FLAT), {**rest, **named})


def test_without_a_gpu_a_kernel_is_itself():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert relaunched(kernel_) is kernel_
