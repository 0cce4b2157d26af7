"""The Triton kernels compiled ahead of time on any machine, with the specialisation that a real launch would get.

A stub driver names the target; the launchers run as they are on CPU tensors, but kernels compile instead of launching.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent))

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_cases import Case, cont, make_seq  # noqa: E402

from gdnir.kernels import causal_conv1d as conv_kernels  # noqa: E402
from gdnir.kernels import gated_rmsnorm as norm_kernels  # noqa: E402
from gdnir.lowering import triton_launch  # noqa: E402

TARGETS = {  # target, shared memory of a block in KB
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
KERNELS = {
    conv_kernels: ("conv_prefill_kernel", "conv_prefill_state_kernel", "conv_update_kernel"),
    norm_kernels: ("gated_rmsnorm_kernel",),
}


class Compiling:
    """Stands for a kernel: `kernel[grid](...)` compiles."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


class StubDriver:
    def __init__(self, target, device):
        self.target, self.device = target, device

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device  # one for each target: Triton keeps a cache of kernels per device

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(target name) -> the list that the kernels compiled by launches from then on are added to."""
    active = triton.runtime.driver._active  # None on a machine with no GPU

    def start(name):
        triton.runtime.driver.set_active(StubDriver(TARGETS[name][0], 100 + list(TARGETS).index(name)))
        compiled = []
        for module, names in KERNELS.items():
            for kernel_name in names:
                monkeypatch.setattr(module, kernel_name, Compiling(original(module, kernel_name), compiled))
        return compiled

    yield start
    triton.runtime.driver._active = active


ORIGINALS = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}


def original(module, name):
    return ORIGINALS[module, name]


def launch_conv(phase, dtype, *, layout="cw", width=4, bias=False, channels=8192, tokens=48, rows=2, slots=4):
    if phase == "prefill":
        batch = cont(*([tokens // max(rows, 1)] * rows))
    else:
        batch = tuple((1, True, n, (n, -1)) if phase == "verify" else (1, True, n, n) for n in range(rows))
    seq = make_seq(Case("", phase, batch), "cpu")
    shape = (slots, channels, width - 1) if layout == "cw" else (slots, width - 1, channels)
    x = torch.empty(seq.num_tokens, channels + 64, dtype=dtype)[:, :channels]
    weight = torch.empty(channels, width, dtype=dtype)
    pool = torch.empty(shape, dtype=dtype)
    triton_launch.causal_conv1d(
        x, weight, weight[:, 0].contiguous() if bias else None, pool, seq, activation="silu", conv_layout=layout
    )


def launch_norm(dtype, *, tokens=7, heads=32, width=128, activation="silu"):
    o = torch.empty(tokens, heads, width, dtype=dtype)
    z = torch.empty(tokens, heads * width + 64, dtype=dtype)[:, : heads * width].view(o.shape)
    triton_launch.gated_rmsnorm(o, z, torch.empty(width), eps=1e-6, activation=activation)


LAUNCHES = {
    **{
        f"{phase}-{layout}": lambda dtype, phase=phase, layout=layout: launch_conv(
            phase, dtype, layout=layout, bias=True
        )
        for phase in ("prefill", "decode", "verify")
        for layout in ("cw", "wc")
    },
    "norm-128": lambda dtype: launch_norm(dtype),
    "norm-192": lambda dtype: launch_norm(dtype, width=192, activation="sigmoid"),
}


def resources(kernel, folder):
    """What the assembler says: registers, bytes of stack (spills), shared memory."""
    if "amdgcn" in kernel.asm:
        said = dict(
            re.findall(
                r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)",
                kernel.asm["amdgcn"],
            )
        )
        stack = sum(int(said[key]) for key in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"))
        return int(said["vgpr_count"]), stack
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


# f16 compiles to almost the code of bf16: one target is enough.
@pytest.mark.parametrize(
    ("target", "dtype"),
    [(target, dtype) for target in TARGETS for dtype in (torch.bfloat16, torch.float32)] + [("sm_90", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles_within_limits(compile_for, tmp_path, target, launch, dtype):
    kernels = compile_for(target)
    LAUNCHES[launch](dtype)
    assert len(kernels) == (2 if launch.startswith("prefill") else 1)
    for kernel in kernels:
        registers, stack = resources(kernel, tmp_path)
        shared = kernel.metadata.shared
        print(kernel.metadata.name, f"{registers} registers, {stack} B stack, {shared} B shared")
        assert stack == 0, f"{kernel.metadata.name} spills: {registers} registers, {stack} bytes of stack"
        assert shared <= TARGETS[target][1] * 1024


def wide(kernel):
    """(vector loads, vector stores) in the code: 16 bytes, on AMD 8 or 16 (its warps are twice as wide)."""
    form = "ptx" if "ptx" in kernel.asm else "amdgcn"
    size = {"ptx": r"global\S*\.(v4\.b32|v2\.b64|b128)\b", "amdgcn": r"(global|buffer)_%s_dwordx[24]\b"}[form]
    names = {"ptx": ("ld", "st"), "amdgcn": ("load", "store")}[form]
    patterns = [size % name if form == "amdgcn" else rf"\b{name}\.{size}" for name in names]
    return tuple(len(re.findall(pattern, kernel.asm[form])) for pattern in patterns)


@pytest.mark.parametrize("target", TARGETS)
def test_memory_is_accessed_in_vectors(compile_for, target):
    kernels = compile_for(target)
    launch_conv("prefill", torch.bfloat16)
    # Every row of a tile and of its halo is one load, every output row one store (more are in the other path).
    loads, stores = wide(kernels[0])
    assert loads >= 16 + 3
    assert stores >= 16
    kernels.clear()
    launch_conv("decode", torch.bfloat16, layout="wc")
    loads, stores = wide(kernels[0])
    assert loads >= 1 + 3  # x, the state's columns
    assert stores >= 1 + 3
    for width in (96, 128, 192):
        kernels.clear()
        launch_norm(torch.bfloat16, width=width)
        loads, stores = wide(kernels[0])
        per_thread = 2048 // (4 * TARGETS[target][0].warp_size * 8)
        assert loads >= 2 * per_thread, width  # o and z
        assert stores >= per_thread, width


def test_no_recompilation_when_only_the_batch_changes(compile_for):
    kernels = compile_for("sm_90")
    batches = [
        {"tokens": t, "rows": n, "slots": s}
        for t, n, s in ((48, 2, 4), (1, 1, 1), (16, 16, 16), (64, 1, 32), (21, 3, 5))
    ]
    for phase in ("prefill", "decode", "verify"):
        for layout in ("cw", "wc"):
            kernels.clear()
            for batch in batches:
                launch_conv(phase, torch.bfloat16, layout=layout, channels=1024, **batch)
            assert len({id(kernel) for kernel in kernels}) == (2 if phase == "prefill" else 1), (phase, layout)
    kernels.clear()
    for tokens in (1, 2, 16, 17, 65536):
        launch_norm(torch.bfloat16, tokens=tokens, heads=2)
    assert len({id(kernel) for kernel in kernels}) == 1


def test_no_recompilation_when_metadata_are_slices(compile_for):
    """The parts of a mixed batch are slices at any alignment; write_slots may have any strides."""
    kernels = compile_for("sm_90")
    from gdnir.lowering.triton_launch import causal_conv1d

    for shift in (0, 1, 4):
        whole = make_seq(Case("", "decode", cont(*[1] * (4 + shift))), "cpu")
        part = type(whole)(
            "decode",
            torch.zeros(8 + shift, dtype=torch.int32)[shift : shift + 5],
            torch.zeros(8 + shift, dtype=torch.int32)[shift : shift + 4],
            torch.zeros(8 + shift, 1 + shift, dtype=torch.int32)[shift : shift + 4, shift:],
            torch.zeros(8 + shift, dtype=torch.bool)[shift : shift + 4],
            torch.zeros(2, dtype=torch.int32)[1:] if shift else torch.zeros(1, dtype=torch.int32),
            4,
            4,
            1,
        )
        x = torch.empty(8, 1024, dtype=torch.bfloat16)[shift : shift + 4]
        weight, pool = torch.empty(1024, 4, dtype=torch.bfloat16), torch.empty(4, 1024, 3, dtype=torch.bfloat16)
        causal_conv1d(x, weight, None, pool, part, activation="silu", conv_layout="cw")
    assert len({id(kernel) for kernel in kernels}) == 1


def test_importing_the_launchers_imports_no_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import gdnir.lowering.triton_launch; "
        "assert before or 'triton' not in sys.modules; assert 'gdnir.kernels.causal_conv1d' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
