"""The kernels of the provider gluon compiled ahead of time for sm_90 on any machine, as tests/test_triton_aot.py does it."""

from __future__ import annotations

import os
import re
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

import sass_lint  # noqa: E402
import triton_cases_gluon as cases  # noqa: E402
import triton_cases_step  # noqa: E402
from test_triton_aot import TARGETS, Compiling, StubDriver, launch_step, resources  # noqa: E402

from gdnir.kernels import bulk_ring, delta_rule_gluon, delta_rule_gluon_prep, delta_rule_gluon_segments, gdn_step_gluon  # noqa: E402
from gdnir.lowering import gluon_rule  # noqa: E402

KERNELS = {
    "prep": (delta_rule_gluon_prep, "delta_rule_gluon_prep_kernel"),
    "summary": (delta_rule_gluon_segments, "delta_rule_gluon_summary_kernel"),
    "rule": (delta_rule_gluon, "delta_rule_gluon_kernel"),
}
STEP = gdn_step_gluon, "gdn_step_gluon_kernel"
ORIGINALS = {name: getattr(*where) for name, where in {**KERNELS, "step": STEP}.items()}
NAMES = {kernel: name for name, (_, kernel) in KERNELS.items()}


@pytest.fixture
def compiled(monkeypatch):
    """The kernels compiled by launches from now on."""
    active = triton.runtime.driver._active  # None on a machine with no GPU
    triton.runtime.driver.set_active(StubDriver(TARGETS["sm_90"][0], 190))
    found = []
    disasm = triton.tools.disasm  # its pattern ends at 64 KB of code
    monkeypatch.setattr(disasm, "FLINE_RE", re.compile(disasm.FLINE_RE.pattern.replace(r"\w{4}\*", r"\w{4,}\*")))
    for name, (module, kernel) in {**KERNELS, "step": STEP}.items():
        monkeypatch.setattr(module, kernel, Compiling(ORIGINALS[name], found))
    gluon_rule._plan.cache_clear()  # plans know kernels
    yield found
    gluon_rule._plan.cache_clear()
    triton.runtime.driver._active = active


def launch(case):
    seq = cases.make_seq(case, "cpu")
    inputs, _, _ = cases.make_inputs(case, seq, "cpu")
    cases.run(case, seq, inputs, torch.empty(case.slots, case.heads[1], 128, 128, dtype=case.state_dtype))


# (registers, bytes of stack) at most. With more registers than maxnreg a program's warps would not fit.
LIMITS = {
    "prep": (200, 0),
    "summary": (128, 0),
    "single": (168, 8),
    "pair": (128, 64),
}


@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize(
    ("state", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_compiles_within_limits(compiled, tmp_path, monkeypatch, schedule, state, dtype, segment):
    cases.only(schedule, monkeypatch)
    launch(cases.Case("", cases.cont(230, 3), heads=(2, 4), state_dtype=state, segment=segment, dtype=dtype))
    assert [NAMES[kernel.metadata.name] for kernel in compiled] == (list(KERNELS) if segment else ["prep", "rule"])
    for kernel in compiled:
        name = NAMES[kernel.metadata.name]
        registers, stack = resources(kernel, tmp_path)
        print(f"{name}: {registers} registers, {stack} B stack, {kernel.metadata.shared} B shared")
        assert (registers, stack) <= LIMITS[schedule if name == "rule" else name]
        assert stack <= LIMITS[schedule if name == "rule" else name][1]
        assert kernel.metadata.shared <= TARGETS["sm_90"][1] * 1024
        if name != "prep":
            assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert "C75" not in ptxas_says(kernel, tmp_path)


# Every schedule with and without segments, and with either type of state.
@pytest.mark.parametrize(
    ("schedule", "state", "segment", "dtype"),
    [
        ("single", torch.float32, 0, torch.bfloat16),
        ("single", torch.bfloat16, 1, torch.bfloat16),
        ("pair", torch.bfloat16, 0, torch.bfloat16),
        ("pair", torch.float32, 1, torch.bfloat16),
        ("pair", torch.float32, 1, torch.float16),
    ],
    ids=str,
)
def test_no_register_is_reused_while_a_product_is_in_flight(compiled, monkeypatch, schedule, state, segment, dtype):
    cases.only(schedule, monkeypatch)
    launch(cases.Case("", cases.cont(230, 3), heads=(2, 4), state_dtype=state, segment=segment, dtype=dtype))
    for kernel in compiled[1:]:  # prep has no asynchronous products
        sass = kernel.asm["sass"]
        assert "HGMMA" in sass
        assert sass_lint.hazards(sass) == [], kernel.metadata.name
        # Without its first wait the same code must be found wrong, or the lint sees nothing.
        lines = sass.splitlines()
        lines.pop(next(n for n, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line))
        assert sass_lint.hazards("\n".join(lines)), kernel.metadata.name


@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_no_barrier_lies_where_warp_specialize_hands_over(compiled, monkeypatch, schedule, segment):
    """Triton gives the memory of barriers that nothing waits for to captured values; their first values may come later."""
    cases.only(schedule, monkeypatch)
    launch(cases.Case("", cases.cont(230, 3), heads=(2, 4), segment=segment))
    for kernel in compiled[1:]:  # prep has no partitions
        ptx = kernel.asm["ptx"]
        made = re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx)
        barriers = {int(at) for register in made for at in re.findall(rf"add\.s32 \t{register}, %r\d+, (\d+);", ptx)}
        assert len(barriers) >= 2 * 3
        handed = [
            (int(at), int(count or 1) * int(bits) // 8)
            for count, bits, at in re.findall(r"st\.shared(?:\.v(\d))?\.b(\d+) \t\[global_smem\+(\d+)\]", ptx)
        ]
        assert handed
        assert not [(b, h) for b in barriers for h in handed if b < sum(h) and h[0] < b + 8], kernel.metadata.name


def ptxas_says(kernel, tmp_path):
    """What ptxas prints: C7510 to C7519 where it has to wait for each wgmma, which halves the speed."""
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def test_no_recompilation_when_only_the_batch_changes(compiled, monkeypatch):
    cases.only("pair", monkeypatch)
    for lengths, slots in (((200, 3), 4), ((300,), 1), ((16,) * 14 + (130, 129), 16), ((192,), 32), ((321, 0, 4), 5)):
        launch(cases.Case("", cases.cont(*lengths), heads=(1, 2), slots=slots, segment=1))
    assert len({id(kernel) for kernel in compiled}) == len(KERNELS)


WAYS = {by: triton_cases_step.step_of(by) for by in ("clusters", "tiles", 1, 2)}


# Registers at most: as many CTAs have room on a multiprocessor as were measured.
@pytest.mark.parametrize(
    ("phase", "drafts", "by", "heads", "state", "most"),
    [
        ("decode", 1, "clusters", "qwen", torch.float32, 128),
        ("decode", 1, "clusters", "qwen", torch.bfloat16, 128),
        ("decode", 1, "clusters", "r3", torch.float32, 128),
        ("decode", 1, "clusters", "olmo", torch.float32, 128),
        ("verify", 2, "clusters", "qwen", torch.float32, 168),
        ("verify", 2, "clusters", "r4", torch.bfloat16, 168),
        ("verify", 4, "clusters", "qwen", torch.float32, 224),
        ("verify", 4, "clusters", "r4", torch.bfloat16, 224),
        ("decode", 1, "tiles", "qwen", torch.float32, 128),
        ("decode", 1, 1, "r4", torch.float32, 128),
        *(
            ("decode", 1, by, heads, torch.bfloat16, most)
            for by, most in (("tiles", 128), (1, 128), (2, 168))
            for heads in ("qwen", "r3", "r4")
        ),
        ("decode", 1, "tiles", "olmo", torch.bfloat16, 128),
        ("verify", 4, "tiles", "qwen", torch.float32, 248),
        ("verify", 4, "tiles", "qwen", torch.bfloat16, 128),
        ("verify", 4, "tiles", "r4", torch.float32, 248),
        ("verify", 2, "tiles", "olmo", torch.float32, 255),
        ("verify", 4, "tiles", "olmo", torch.float32, 255),
    ],
    ids=str,
)
def test_a_step_compiles_within_limits(compiled, tmp_path, phase, drafts, by, heads, state, most):
    launch_step(phase, torch.bfloat16, state, heads=heads, step=WAYS[by], drafts=drafts)
    (kernel,) = compiled
    registers, stack = resources(kernel, tmp_path)
    print(f"{registers} registers, {stack} B stack, {kernel.metadata.shared} B shared")
    assert registers <= most
    assert stack == 0
    assert kernel.metadata.num_ctas == ({"qwen": 4, "r3": 8, "r4": 8, "olmo": 4}[heads] if by == "clusters" else 1)
    assert kernel.metadata.shared <= TARGETS["sm_90"][1] * 1024


@pytest.mark.parametrize("heads", ["qwen", "r3", "r4"])
@pytest.mark.parametrize(
    ("phase", "state", "way"),
    [
        *(("decode", torch.float32, way) for way in ("tiles", 1)),
        *(("decode", torch.bfloat16, way) for way in ("tiles", 1, 2)),
        ("verify", torch.float32, "tiles"),
        ("verify", torch.bfloat16, "tiles"),
    ],
    ids=str,
)
def test_bulk_copies(compiled, phase, heads, state, way):
    """The ring comes first in shared memory; a fence stands between what is taken and put and the copies that follow."""
    launch_step(phase, torch.bfloat16, state, heads=heads, step=WAYS[way])
    (kernel,) = compiled
    (marks,) = map(int, re.findall(r"ld\.shared\.u32 \S+, \[\S+\+(\d+)\]", kernel.asm["ptx"]))
    others = [int(x) for x in re.findall(r"@global_smem, i\d+ (\d+)", kernel.asm["llir"])]
    assert min(others) == marks < max(others)
    assert len(re.findall("@global_smem[^,]", kernel.asm["llir"])) == 1  # its declaration
    sass = kernel.asm["sass"]
    tiles = sass[sass.index("PHASECHK") : sass.rindex("UBLKCP.G.S") + len("UBLKCP.G.S")]
    loop = re.findall(r"UBLKCP\.[SG]\.[SG]|STS\.128|FENCE", tiles)
    if "UBLKCP.S.G" in loop:  # or all tiles were asked for at first
        assert loop.index("FENCE") < loop.index("UBLKCP.S.G") < loop.index("UBLKCP.G.S")
    order = [x for x, after in zip(loop, [*loop[1:], ""], strict=True) if x != after and x != "UBLKCP.S.G"]
    assert order == ["STS.128", "FENCE", "UBLKCP.G.S"] * max(1, len(order) // 3)


def test_a_ring_has_no_more_barriers_than_room():
    assert bulk_ring.ring_shape(16, 8, 8192) == (16, 8, 1024)
    with pytest.raises(ValueError, match="17 stages of 8 warps"):
        bulk_ring.ring_shape(17, 8, 8192)


def test_what_compiled_kernels_are_kept_by_sees_all_that_they_are_made_of():
    """Triton's cache follows functions and constexprs that a constexpr function names, but no other value."""
    checked = 0
    for module in (bulk_ring, delta_rule_gluon, delta_rule_gluon_prep, delta_rule_gluon_segments, gdn_step_gluon):
        for name, function in vars(module).items():
            if type(function).__name__ == "ConstexprFunction":
                named = {n: function.fn.__globals__.get(n) for n in function.fn.__code__.co_names}
                unseen = [n for n, v in named.items() if isinstance(v, str | int | float | list | tuple | dict)]
                assert not unseen, (module.__name__, name)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("by", ["clusters", "tiles"])
@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_no_recompilation_of_a_step(compiled, phase, by):
    for rows, slots, shift in ((2, 4, 0), (1, 1, 1), (16, 16, 4), (33, 32, 3)):
        launch_step(
            phase, torch.bfloat16, torch.float32, heads="r4", rows=rows, slots=slots, shift=shift, step=WAYS[by]
        )
    assert len({id(kernel) for kernel in compiled}) == 1


def test_importing_the_lowering_imports_no_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import gdnir.lowering.gluon_impl; "
        "assert before or 'triton' not in sys.modules; assert 'gdnir.kernels.delta_rule_gluon' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
