"""The kernels of the provider gluon compiled ahead of time for sm_90 on any machine, as tests/test_triton_aot.py does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_cases_gluon as cases  # noqa: E402
from test_triton_aot import TARGETS, Compiling, StubDriver, resources  # noqa: E402

from gdnir.kernels import delta_rule_gluon as kernels  # noqa: E402

PREP, RULE = "delta_rule_gluon_prep_kernel", "delta_rule_gluon_kernel"
ORIGINALS = {name: getattr(kernels, name) for name in (PREP, RULE)}


@pytest.fixture
def compiled(monkeypatch):
    """The kernels compiled by launches from now on."""
    active = triton.runtime.driver._active  # None on a machine with no GPU
    triton.runtime.driver.set_active(StubDriver(TARGETS["sm_90"][0], 190))
    found = []
    for name, kernel in ORIGINALS.items():
        monkeypatch.setattr(kernels, name, Compiling(kernel, found))
    yield found
    triton.runtime.driver._active = active


def launch(case):
    seq = cases.make_seq(case, "cpu")
    inputs, _, _ = cases.make_inputs(case, seq, "cpu")
    cases.run(case, seq, inputs, torch.empty(case.slots, case.heads[1], 128, 128, dtype=case.state_dtype))


# (registers, bytes of stack at most): without maxnreg as given a program's warps would not fit.
LIMITS = {"single": (168, 8), "pair": (128, 64)}


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_rule_compiles_within_limits(compiled, tmp_path, monkeypatch, schedule, state):
    cases.only(schedule, monkeypatch)
    launch(cases.Case("", cases.cont(70, 3), heads=(2, 4), state_dtype=state))
    prep, rule = compiled
    registers, stack = resources(rule, tmp_path)
    print(schedule, f"{registers} registers, {stack} B stack, {rule.metadata.shared} B shared")
    assert registers == LIMITS[schedule][0]
    assert stack <= LIMITS[schedule][1]
    assert rule.metadata.shared <= TARGETS["sm_90"][1] * 1024
    assert rule.asm["ptx"].count("wgmma.mma_async") >= 64
    # ptxas warns (C7510 to C7519) where it has to wait for each wgmma, which halves the speed.
    source = tmp_path / "kernel.ptx"
    source.write_text(rule.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    said = subprocess.run(
        [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True
    )
    assert said.returncode == 0
    assert "C75" not in said.stdout + said.stderr
    assert "serializ" not in said.stdout + said.stderr

    registers, stack = resources(prep, tmp_path)
    print("prep", f"{registers} registers, {stack} B stack, {prep.metadata.shared} B shared")
    assert stack <= PREP_STACK


PREP_STACK = 128


def test_no_recompilation_when_only_the_batch_changes(compiled, monkeypatch):
    cases.only("pair", monkeypatch)
    for lengths, slots in (((70, 3), 4), ((1,), 1), ((16,) * 16, 16), ((64,), 32), ((21, 0, 4), 5)):
        launch(cases.Case("", cases.cont(*lengths), heads=(1, 2), slots=slots))
    assert len({id(kernel) for kernel in compiled}) == 2


def test_importing_the_lowering_imports_no_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import gdnir.lowering.gluon_impl; "
        "assert before or 'triton' not in sys.modules; assert 'gdnir.kernels.delta_rule_gluon' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
