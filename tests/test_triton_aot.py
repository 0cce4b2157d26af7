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

from gdnir.ir import SeqType, StateType, TensorType  # noqa: E402
from gdnir.kernels import causal_conv1d as conv_kernels  # noqa: E402
from gdnir.kernels import conv_prep as prep_kernels  # noqa: E402
from gdnir.kernels import delta_rule as rule_kernels  # noqa: E402
from gdnir.kernels import delta_rule_step as rule_step_kernels  # noqa: E402
from gdnir.kernels import gated_rmsnorm as norm_kernels  # noqa: E402
from gdnir.kernels import gdn_gate as gate_kernels  # noqa: E402
from gdnir.kernels import gdn_step as step_kernels  # noqa: E402
from gdnir.kernels import l2norm as l2norm_kernels  # noqa: E402
from gdnir.lowering import find, triton_impl, triton_launch, triton_rule, triton_step  # noqa: E402, F401

TARGETS = {  # target, shared memory of a block in KB
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
KERNELS = {
    conv_kernels: ("conv_prefill_kernel", "conv_update_kernel"),
    norm_kernels: ("gated_rmsnorm_kernel",),
    prep_kernels: ("conv_prep_kernel",),
    step_kernels: ("gdn_step_kernel",),
    rule_step_kernels: ("delta_rule_step_kernel",),
    l2norm_kernels: ("l2norm_kernel",),
    gate_kernels: ("gdn_gate_kernel",),
    rule_kernels: (
        "delta_rule_prep_kernel",
        "delta_rule_kernel",
        "delta_rule_starts_kernel",
        "delta_rule_segments_kernel",
    ),
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


def launch_rule(dtype, *, heads=(16, 32, 128, 128), layout="vk", tokens=192, rows=2, slots=4, segment=0):
    h, hv, key_dim, value_dim = heads
    seq = make_seq(Case("", "prefill", cont(*([tokens // max(rows, 1)] * rows))), "cpu")
    tokens = seq.num_tokens
    flat = torch.empty(tokens, 2 * h * key_dim + hv * value_dim, dtype=dtype)
    q, k, v = flat.split([h * key_dim, h * key_dim, hv * value_dim], dim=1)
    inner = (value_dim, key_dim) if layout == "vk" else (key_dim, value_dim)
    triton_rule.delta_rule_prefill(
        q.unflatten(1, (h, key_dim)),
        k.unflatten(1, (h, key_dim)),
        v.unflatten(1, (hv, value_dim)),
        torch.empty(tokens, hv),
        torch.empty(tokens, hv),
        torch.empty(slots, hv, *inner),
        seq,
        scale=0.1,
        state_layout=layout,
        segment=segment,
    )


# Bytes of stack that are borne where a target has no better choice of blocks.
RULE_STACK = {("gfx942", launch): 96 for launch in ("vk", "kv", "64", "olmo", "segments")} | {("sm_90", "olmo"): 8}
HEADS = {
    "qwen": (16, 32, 128, 128),
    "r1": (16, 16, 128, 128),
    "r3": (16, 48, 128, 128),
    "r4": (2, 8, 128, 128),
    "olmo": (30, 30, 96, 192),
}


def step_batch(phase, rows, shift=0, drafts=2):
    """Metadata as slices at any alignment."""
    batch = tuple(
        (1, True, n, (n, *[-1] * (drafts - 1))) if phase == "verify" else (1, True, n, n) for n in range(rows + shift)
    )
    seq = make_seq(Case("", phase, batch), "cpu")
    cut = {key: getattr(seq, key)[shift:] for key in ("cu_seqlens", "read_slots", "write_slots", "has_state")}
    return type(seq)(
        phase, **cut, error=torch.zeros(2, dtype=torch.int32)[1:], num_tokens=rows, num_seqs=rows, max_len=1
    )


def launch_step(
    phase, dtype, state_dtype, *, heads="qwen", layout="vk", rows=2, slots=4, shift=0, bias=False, drafts=2,
    step=triton_step.gdn_step,
):  # fmt: skip
    h, hv, k, v = HEADS[heads]
    c = 2 * h * k + hv * v
    merged = torch.empty(rows + shift, c + hv * v + 2 * hv, dtype=dtype)[shift:]
    qkv, z, b, a = merged.split([c, hv * v, hv, hv], 1)
    state = torch.empty((slots, hv, v, k) if layout == "vk" else (slots, hv, k, v), dtype=state_dtype)
    conv = torch.empty((slots, c, 3) if layout == "vk" else (slots, 3, c), dtype=dtype)
    rate = torch.empty(hv)
    step(
        qkv, z.unflatten(1, (hv, v)), a, b, torch.empty(c, 4, dtype=dtype), torch.empty(c, dtype=dtype) if bias else None,
        conv, state, rate, rate, torch.empty(v), step_batch(phase, rows, shift, drafts), activation="silu",
        conv_layout="cw" if layout == "vk" else "wc", heads=HEADS[heads], l2norm_eps=1e-6, allow_neg_eigval=False,
        scale=0.1, state_layout=layout, eps=1e-6, gate="silu",
    )  # fmt: skip


def launch_rule_step(phase, dtype, state_dtype, *, heads="qwen", layout="vk", rows=2, slots=4, shift=0):
    h, hv, k, v = HEADS[heads]
    q, key = torch.empty(rows + shift, 2 * h, k, dtype=dtype)[shift:].split([h, h], 1)
    g = torch.empty(rows + shift, hv)[shift:]
    state = torch.empty((slots, hv, v, k) if layout == "vk" else (slots, hv, k, v), dtype=state_dtype)
    triton_step.delta_rule_step(
        q, key, torch.empty(rows, hv, v, dtype=dtype), g, g, state, step_batch(phase, rows, shift),
        scale=0.1, state_layout=layout,
    )  # fmt: skip


def launch_prep(dtype, *, heads="qwen", layout="cw", tokens=48, rows=2, slots=4):
    h, hv, k, v = HEADS[heads]
    c = 2 * h * k + hv * v
    seq = make_seq(Case("", "prefill", cont(*([tokens // rows] * rows))), "cpu")
    merged = torch.empty(seq.num_tokens, c + hv * v + 2 * hv, dtype=dtype)
    qkv, _, b, a = merged.split([c, hv * v, hv, hv], 1)
    pool = torch.empty((slots, c, 3) if layout == "cw" else (slots, 3, c), dtype=dtype)
    rate = torch.empty(hv)
    triton_launch.conv_prep(
        qkv, a, b, torch.empty(c, 4, dtype=dtype), None, pool, rate, rate, seq, activation="silu", conv_layout=layout,
        heads=HEADS[heads], eps=1e-6, allow_neg_eigval=False,
    )  # fmt: skip


# A minute of compiling on two cores, for kernels in f32 on GPUs other than Hopper's.
NIGHTLY = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="runs in `make nightly`")

LAUNCHES = {
    "l2norm": lambda dtype: triton_step.l2norm(torch.empty(7, 16, 128, dtype=dtype), eps=1e-6),
    "gate": lambda dtype: triton_step.gdn_gate(
        *torch.empty(7, 64, dtype=dtype).split([32, 32], 1), torch.empty(32), torch.empty(32), allow_neg_eigval=False
    ),
    "prefill-prep": lambda dtype: launch_prep(dtype),
    "prefill-prep-olmo": lambda dtype: launch_prep(dtype, heads="olmo", layout="wc"),
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
    [
        *((target, torch.bfloat16) for target in TARGETS),
        *(("sm_90", dtype) for dtype in (torch.float16, torch.float32)),
        *(pytest.param(target, torch.float32, marks=NIGHTLY) for target in TARGETS if target != "sm_90"),
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles_within_limits(compile_for, tmp_path, target, launch, dtype):
    kernels = compile_for(target)
    LAUNCHES[launch](dtype)
    assert len(kernels) == 1
    for kernel in kernels:
        registers, stack = resources(kernel, tmp_path)
        shared = kernel.metadata.shared
        print(kernel.metadata.name, f"{registers} registers, {stack} B stack, {shared} B shared")
        assert stack == 0, f"{kernel.metadata.name} spills: {registers} registers, {stack} bytes of stack"
        assert shared <= TARGETS[target][1] * 1024


RULES = {
    "vk": (2, {}),
    "kv": (2, {"layout": "kv"}),
    "64": (2, {"heads": (16, 32, 64, 64)}),
    "olmo": (2, {"heads": (30, 30, 96, 192)}),
    "segments": (4, {"heads": (2, 8, 128, 128), "tokens": 640, "rows": 1, "segment": 1}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", RULES)
def test_rule_compiles_within_limits(compile_for, tmp_path, target, launch):
    kernels = compile_for(target)
    count, options = RULES[launch]
    launch_rule(torch.bfloat16, **options)
    assert len(kernels) == count
    for kernel in kernels:
        registers, stack = resources(kernel, tmp_path)
        shared = kernel.metadata.shared
        print(kernel.metadata.name, f"{registers} registers, {stack} B stack, {shared} B shared")
        assert stack <= RULE_STACK.get((target, launch), 0), f"{kernel.metadata.name} spills {stack} bytes"
        assert shared <= TARGETS[target][1] * 1024


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"phase": "decode"}, None),
        ({"phase": "verify", "dtype": "f32"}, None),
        ({"phase": "decode", "key_dim": 512}, "K is 512, want at most 256"),
        ({"phase": "mixed"}, "mixed; split-mixed cuts it into parts"),
        ({"dtype": "f32"}, "f32, want bf16 or f16"),
        ({"key_dim": 256}, "K is 256, want a multiple of 16 up to 128"),
        ({"key_dim": 100}, "K is 100"),
        ({"value_dim": 256}, "V is 256"),
        ({"value_dim": "V"}, "V is V"),
    ],
)
def test_rule_refuses_in_sentences(change, reason):
    given = {"phase": "prefill", "dtype": "bf16", "key_dim": 128, "value_dim": 128, **change}
    keys = TensorType(given["dtype"], ("T", 2, given["key_dim"]))
    values = TensorType(given["dtype"], ("T", 4, given["value_dim"]))
    gate = TensorType("f32", ("T", 4))
    state = StateType("f32", ("S", 4, given["value_dim"], given["key_dim"]), "vk")
    types = (keys, keys, values, gate, gate, state, SeqType(given["phase"], "T"))
    got = find("gated_delta_rule", "triton").accepts(*types, scale=1.0, state_layout="vk")
    assert got is None if reason is None else reason in got


def test_rule_compiles_in_f16(compile_for):
    compile_for("sm_90")
    launch_rule(torch.float16)


def test_the_state_of_the_rule_stays_in_registers(compile_for):
    """On Hopper the state and what is made of it enter the products from registers, and no product is serialised."""
    kernels = compile_for("sm_90")
    launch_rule(torch.bfloat16)
    code = kernels[1].asm["ttgir"]
    assert code.count("warp_group_dot ") == 6
    operands = re.findall(r"warp_group_dot .* : (\S+)", code)
    assert sum("tensor" in operand for operand in operands) == 5  # all but V^T T^T
    assert "mma.sync" not in kernels[1].asm["ptx"]


STATES = [torch.float32, torch.bfloat16]
STEPS = {"step": launch_step, "rule": launch_rule_step}


# Bytes of stack, at most; none where nothing is said. Verify fills the registers with a head's state; on AMD scalars are spilled.
SPILLED = {("sm_90", "verify"): 8, ("sm_80", "verify"): 96, ("sm_100", "verify"): 96, ("gfx942", "verify"): 96}


@pytest.mark.parametrize("phase", ["decode", "verify"])
@pytest.mark.parametrize(
    ("target", "launch", "heads", "layout", "state_dtype"),
    [
        *((target, "step", "qwen", "vk", dtype) for target in TARGETS for dtype in STATES),
        *((target, "rule", "qwen", "vk", torch.float32) for target in TARGETS),
        *((target, "step", "olmo", "vk", torch.float32) for target in TARGETS),
        *(("sm_90", "step", heads, "vk", torch.float32) for heads in ("r1", "r3", "r4")),
        *(("sm_90", launch, "qwen", "kv", torch.bfloat16) for launch in STEPS),
    ],
    ids=str,
)
def test_step_compiles_within_limits(compile_for, tmp_path, target, launch, heads, layout, state_dtype, phase):
    kernels = compile_for(target)
    STEPS[launch](phase, torch.bfloat16, state_dtype, heads=heads, layout=layout)
    registers, stack = resources(kernels[0], tmp_path)
    loads, stores = wide(kernels[0])
    print(f"{registers} registers, {stack} B stack, {kernels[0].metadata.shared} B shared, {loads} + {stores} wide")
    assert kernels[0].metadata.shared <= 4096  # so registers alone say how many programs an SM holds
    assert stack <= SPILLED.get((target, phase), 0) * (launch == "step"), f"{registers} registers, {stack} B spilled"
    # The whole of a head's state in 16 bytes a thread; of decode's loop, the tiles that are in flight and the one it stores.
    h, hv, k, v = HEADS[heads]
    threads = TARGETS[target][0].warp_size * kernels[0].metadata.num_warps
    padded = v * (1 << (k - 1).bit_length()) * state_dtype.itemsize // 16 // threads
    if launch == "rule":
        padded = triton_step.RULE["default"]["TILE"] * state_dtype.itemsize // 16 // threads
    elif phase == "decode":
        table = triton_step.STEP[state_dtype.itemsize]["default"]
        padded = table["TILE"] * state_dtype.itemsize // 16 // threads
        assert loads >= table["AHEAD"] * padded
    assert min(loads, stores) >= padded


def wide(kernel, least=16):
    """(vector loads, vector stores) in the code: at least 16 or 8 bytes, on AMD half (its warps are twice as wide)."""
    form = "ptx" if "ptx" in kernel.asm else "amdgcn"
    forms = r"v4\.b32|v2\.b64|b128" + (r"|v2\.b32|b64" if least == 8 else "")
    pairs = "(x[24])?" if least == 8 else "x[24]"
    size = {"ptx": rf"global\S*\.({forms})\b", "amdgcn": rf"(global|buffer)_%s_dword{pairs}\b"}[form]
    names = {"ptx": ("ld", "st"), "amdgcn": ("load", "store")}[form]
    patterns = [size % name if form == "amdgcn" else rf"\b{name}\.{size}" for name in names]
    return tuple(len(re.findall(pattern, kernel.asm[form])) for pattern in patterns)


@pytest.mark.parametrize("target", TARGETS)
def test_memory_is_accessed_in_vectors(compile_for, target):
    kernels = compile_for(target)
    launch_conv("prefill", torch.bfloat16)
    # Every row of a step, of its halo and of the next step is one load, every output row one store.
    loads, stores = wide(kernels[0], 8)
    assert loads >= 16 + 3 + 16
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
        per_thread = max(1, 4096 // (16 * TARGETS[target][0].warp_size * 8))
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
            assert len({id(kernel) for kernel in kernels}) == 1, (phase, layout)
    kernels.clear()
    for tokens, rows, slots in ((48, 2, 4), (1, 1, 1), (16, 16, 16), (640, 1, 32)):
        launch_prep(torch.bfloat16, heads="r4", tokens=tokens, rows=rows, slots=slots)
    assert len({id(kernel) for kernel in kernels}) == 1
    for options in ({}, {"segment": 1}):
        kernels.clear()
        for tokens, rows, slots in ((640, 1, 1), (962, 1, 16), (336, 1, 3), (4096, 8, 32)):
            launch_rule(torch.bfloat16, heads=(1, 2, 64, 64), tokens=tokens, rows=rows, slots=slots, **options)
        assert len({id(kernel) for kernel in kernels}) == (4 if options else 2)
    kernels.clear()
    for tokens in (1, 2, 16, 17, 65536):
        launch_norm(torch.bfloat16, tokens=tokens, heads=2)
    assert len({id(kernel) for kernel in kernels}) == 1


@pytest.mark.parametrize("phase", ["decode", "verify"])
@pytest.mark.parametrize("launch", STEPS)
def test_no_recompilation_of_a_step(compile_for, launch, phase):
    kernels = compile_for("sm_90")
    for rows, slots, shift in ((2, 4, 0), (1, 1, 1), (16, 16, 4), (33, 32, 3)):
        STEPS[launch](phase, torch.bfloat16, torch.float32, heads="olmo", rows=rows, slots=slots, shift=shift)
    assert len({id(kernel) for kernel in kernels}) == 1


@pytest.mark.parametrize(("heads", "width"), [(30, 60), (8, 32)])  # 8: one token has no stride that is a multiple of 16
def test_no_recompilation_of_the_small_ops(compile_for, heads, width):
    kernels = compile_for("sm_90")
    for tokens in (1, 2, 16, 17, 4096):
        triton_step.l2norm(torch.empty(tokens, 16, 128, dtype=torch.bfloat16), eps=1e-6)
        a, b = torch.empty(tokens, width, dtype=torch.bfloat16)[:, : 2 * heads].split([heads, heads], 1)
        triton_step.gdn_gate(a, b, torch.empty(heads), torch.empty(heads), allow_neg_eigval=False)
    assert len({id(kernel) for kernel in kernels}) == 2


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
