"""Lowerings that torch.compile calls and does not look into."""

import subprocess
import sys

import torch

from gdnir.lowering import LOWERINGS
from gdnir.lowering.opaque import opaque

ADDRESSES = []


@opaque
def double_in_place(x, *, by):
    assert not torch.compiler.is_compiling()
    assert type(x) is torch.Tensor
    ADDRESSES.append(x.data_ptr())
    x.mul_(by)
    return x + 1


def whole(x):
    return double_in_place(x * 2, by=3.0) * 5


def test_torch_compile_runs_it_on_tensors():
    ADDRESSES.clear()
    compiled = torch.compile(whole, backend="aot_eager")
    for size in (4, 5, 6):
        x = torch.randn(size)
        assert torch.equal(compiled(x), whole(x))
    assert len(ADDRESSES) == 6


def test_every_kernel_is_opaque_and_dynamo_is_not_imported_for_it():
    for op, found in LOWERINGS.items():
        for provider in ("triton", "gluon"):
            if provider in found:
                assert found[provider].run.__wrapped__, f"{op}@{provider}"
    code = (
        "import gdnir.lowering.triton_impl, gdnir.lowering.gluon_impl, sys; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
