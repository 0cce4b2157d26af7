"""What is launched again is what Triton would have launched: whatever Triton's key tells apart, ours does, and what reaches the
driver is the same to the last bit.
"""

import itertools
import os
import sys
import types
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parent))
import test_gluon_aot as gluon_aot  # noqa: E402
import test_triton_aot as aot  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_cases_gluon as gluon  # noqa: E402
from cuda_stand_in import cuda_stand_in  # noqa: E402

from gdnir.lowering import descriptors, gluon_rule, gluon_step, relaunch, triton_launch, triton_rule, triton_step  # noqa: E402
from gdnir.lowering.direct import direct  # noqa: E402
from gdnir.lowering.relaunch import Relaunch, Step, Steps, launch  # noqa: E402


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["sliced"])
def kernel_(x, sliced, bias, count, stride, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    pass


class Driver:
    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 77

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


@pytest.fixture
def binder(driver):
    return kernel_.create_binder()[-1]


def splitter(args):
    """A function of arguments like these: (key, what C takes), as a launch has them."""
    seen, relaunch_ = [], Relaunch([Step(kernel_, {"BLOCK": 32, "FLAG": True}, range(len(args)))], args)
    known = types.SimpleNamespace(get=lambda key: seen.append(key) or [lambda *launched: seen.append(launched[-1])])
    relaunch_.launch.__globals__.update(known=known, current_device=lambda: -1)

    def split(*args):
        seen.clear()
        relaunch_.launch([1], *args)
        return seen

    return split


FLAT = torch.empty(64)
POINTERS = (FLAT, FLAT[1:], FLAT[4:], FLAT.half(), FLAT.bfloat16())
INTS = (0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**32, 2**40 + 1, 2**63, -1, -16, -(2**31), -(2**31) - 1)


def test_what_triton_tells_apart_has_another_key(binder):
    seen = {}
    for bias in (None, FLAT):
        split = splitter((FLAT, FLAT, bias, 3, 3, 0.5))
        for x, sliced, shift in itertools.product(POINTERS, POINTERS, (0, 1, 4)):
            third = None if bias is None else bias[shift:]
            for count, stride in itertools.product(INTS, INTS[:8]):
                args = x, sliced, third, count, stride, 0.5
                key, values = split(*args)
                addresses = [v if v is None else v.data_ptr() for v in args[:3]]
                assert values == (*addresses, count, stride, 0.5, 32, True)
                theirs = str(binder(*args, BLOCK=32, FLAG=True, num_warps=4)[1])
                assert seen.setdefault((bias is None, key), theirs) == theirs
    assert len(set(seen.values())) > 250


def test_another_type_of_number_or_a_tensor_for_none_has_another_key(driver):
    split = splitter((FLAT, FLAT, None, 3, 3, 0.5))
    keys = {split(FLAT, FLAT, *rest)[0] for rest in ((None, 3, 3, 0.5), (None, 3, 3, 1), (FLAT, 3, 3, 0.5))}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("args", "constants", "error"),
    [
        ((FLAT, FLAT, None, 3, 3, 0.5), {"BLOCK": 32}, KeyError),
        ((FLAT, FLAT, object(), 3, 3, 0.5), {"BLOCK": 32, "FLAG": True}, TypeError),
        ((FLAT, FLAT, None, 3, 3, 0.5, 32), {"FLAG": True}, TypeError),
    ],
    ids=["missing", "unknown", "constexpr"],
)
def test_arguments_that_are_missing_or_unknown(binder, args, constants, error):
    with pytest.raises(error):
        Relaunch([Step(kernel_, constants, range(len(args)))], args)


def test_without_a_gpu_triton_launches():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **named: seen.append((grid, args, named))

    launch(Kernel(), 3, (FLAT, 2), {"BLOCK": 32})
    (grid, args, named), = seen  # fmt: skip
    assert grid == (3,)
    assert args[0] is FLAT
    assert named == {"BLOCK": 32}


# ---- as far as the driver ----


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    with cuda_stand_in(tmp_path_factory.mktemp("libcuda")) as found:
        yield found
    relaunch._launchers.clear()


@pytest.fixture
def both(cuda, monkeypatch):
    """Every launch is made twice, by us and by Triton, and must reach the driver as the same. A list of the kernels' names, with
    whether Triton was spared."""
    relaunch._launchers.clear()
    spared = []

    def twice(steps, programs, args):
        runs, kernels = [], [step.kernel for step in steps.steps]
        with pytest.MonkeyPatch.context() as patch:
            plain = type(kernels[0]).run
            patch.setattr(type(kernels[0]), "run", lambda self, *a, **k: runs.append(self) or plain(self, *a, **k))
            relaunch.launch_all(steps, programs, args)
        relaunch.by_triton(steps.steps, programs, args)
        theirs = cuda.launches[-len(kernels) :]
        assert cuda.launches[-2 * len(kernels) : -len(kernels)] == theirs, kernels
        spared.extend((kernel.__name__, kernel not in runs) for kernel in kernels)

    monkeypatch.setattr(gluon_rule, "launch_all", twice)
    for module in (triton_launch, triton_rule, triton_step, gluon_step):
        monkeypatch.setattr(
            module, "launch", lambda kernel, programs, args, constants: twice(
                Steps(Step(kernel, constants, range(len(args)))), (programs,), args
            ),
        )  # fmt: skip
    return spared


def run_step(phase):
    for bias in (False, True):  # and then without one again
        for rows, slots, shift in ((2, 4, 0), (1, 1, 1), (16, 16, 4), (33, 32, 3)):
            aot.launch_step(phase, torch.bfloat16, torch.float32, rows=rows, slots=slots, shift=shift, bias=bias)
    aot.launch_step(phase, torch.bfloat16, torch.float32)
    aot.launch_step(phase, torch.bfloat16, torch.bfloat16, layout="kv")


def run_gluon_step():
    for by, phase in (("clusters", "decode"), ("tiles", "verify")):
        for rows, slots, shift in ((2, 4, 0), (1, 1, 1), (16, 16, 4)):
            aot.launch_step(
                phase, torch.bfloat16, torch.float32, heads="r4", rows=rows, slots=slots, shift=shift,
                step=gluon_aot.WAYS[by],
            )  # fmt: skip


def run_rule_step():
    for rows, shift in ((2, 0), (1, 1), (33, 3)):
        aot.launch_rule_step("decode", torch.bfloat16, torch.float32, rows=rows, shift=shift)


def run_conv(phase):
    for tokens, rows, channels in ((48, 2, 8192), (1, 1, 8192), (21, 3, 8192), (48, 2, 1000)):
        for bias in (False, True):
            aot.launch_conv(phase, torch.bfloat16, tokens=tokens, rows=rows, channels=channels, bias=bias)


def run_prep():
    for tokens, rows in ((48, 2), (1, 1), (640, 1)):
        aot.launch_prep(torch.bfloat16, tokens=tokens, rows=rows)


def run_small():
    for tokens in (7, 1, 4096):
        aot.launch_norm(torch.bfloat16, tokens=tokens)
        triton_step.l2norm(torch.empty(tokens, 16, 128, dtype=torch.bfloat16), eps=1e-6)
        a, b = torch.empty(tokens, 64, dtype=torch.bfloat16).split([32, 32], 1)
        triton_step.gdn_gate(a, b, torch.empty(32), torch.empty(32), allow_neg_eigval=False)


def run_triton_rule():
    for tokens, rows in ((640, 1), (336, 1), (4096, 8)):
        aot.launch_rule(torch.bfloat16, heads=(1, 2, 64, 64), tokens=tokens, rows=rows, segment=1)


def run_gluon():
    for lengths, slots in (((200, 3), 4), ((300,), 1), ((16,) * 14 + (130, 129), 16), ((321, 0, 4), 5)):
        gluon_aot.launch(gluon.Case("", gluon.cont(*lengths), heads=(1, 2), slots=slots, segment=1))
    gluon_aot.launch(gluon.Case("", gluon.cont(200, 3), heads=(1, 2), segment=0, views=True))


@pytest.mark.parametrize(
    "run",
    [
        lambda: run_step("decode"),
        lambda: run_step("verify"),
        run_gluon_step,
        run_rule_step,
        lambda: run_conv("prefill"),
        lambda: run_conv("decode"),
        run_prep,
        run_small,
        run_triton_rule,
        run_gluon,
    ],
    ids=["step", "verify", "gluon_step", "rule_step", "conv", "update", "prep", "small", "triton_rule", "gluon"],
)
def test_the_driver_is_told_the_same(both, run):
    run()
    first = len(both)
    assert any(spared for _, spared in both)  # when only the batch changes
    run()
    assert all(spared for _, spared in both[first:])


def test_a_descriptor_is_encoded_once(cuda, monkeypatch):
    relaunch._launchers.clear()
    kept = torch.empty(10**7, dtype=torch.uint8)  # the same memory for each call, as an allocator gives it

    def new_empty(x, *shape, dtype=None):
        dtype = dtype or x.dtype
        first, size = used[0], torch.Size(shape).numel() * dtype.itemsize
        used[0] += -(-size // 256) * 256
        return kept[first : first + size].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    seq = gluon.make_seq(case := gluon.Case("", gluon.cont(200, 3), heads=(1, 2)), "cpu")
    inputs, _, _ = gluon.make_inputs(case, seq, "cpu")
    state, counts = torch.empty(8, 2, 128, 128), []
    for _ in range(4):
        used = [0]
        gluon.run(case, seq, inputs, state)
        counts.append(cuda.encodes)
    assert counts[0] > 0
    assert counts[1] == counts[2] == counts[3]  # the first call's are Triton's own


def test_hooks_are_called(both):
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    aot.launch_norm(torch.bfloat16)
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        aot.launch_norm(torch.bfloat16, tokens=9)
    finally:
        hooks.remove(hook)
    aot.launch_norm(torch.bfloat16, tokens=9)
    assert seen == ["gated_rmsnorm_kernel"] * 2  # by both
    assert [spared for _, spared in both] == [False, False, True]


def test_a_hook_in_the_place_of_triton_s_is_called(both, monkeypatch):
    aot.launch_norm(torch.bfloat16)
    seen = []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, name, lambda metadata: seen.append(metadata.get()["name"]))
            aot.launch_norm(torch.bfloat16, tokens=9)
    aot.launch_norm(torch.bfloat16, tokens=9)
    assert seen == ["gated_rmsnorm_kernel"] * 4  # by both
    assert [spared for _, spared in both] == [False, False, False, True]


# ---- a Triton whose launcher is not one of those that are known ----


class Launcher:
    """As Triton 3.7's where no attribute of it is replaced; what it hands to C is `max`'s, a function of C."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, **replaced):
        self.launch = max
        for name, value in replaced.items():
            setattr(self, name, value)

    def __call__(self, x, y, z, stream, function, metadata, launched, enter, leave, *args):
        self.launch(*self.hand(x, y, z, stream, function, args))

    def hand(self, *given):
        return given


def compiled(**replaced):
    return types.SimpleNamespace(
        run=Launcher(**replaced), function=9, packed_metadata=(), metadata=types.SimpleNamespace()
    )


def test_both_forms_of_what_c_takes_are_known():
    values = FLAT, 2, "constant"
    assert direct(compiled(), values) is not None
    assert direct(compiled(hand=lambda *given: (*given[:5], None, *given[5])), values) is not None


@pytest.mark.parametrize(
    "replaced",
    [
        {"launch": lambda *_: None},
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"hand": lambda x, y, z, *rest: (z, y, x, *rest)},
        {"hand": lambda *given: (*given[:5], list(given[5]))},
        {"hand": lambda *given: (*given[:5], *reversed(given[5]))},
        {"hand": lambda: ()},
    ],
    ids=["python", "scratch", "profile", "grid", "list", "order", "arguments"],
)
def test_what_is_unlike_is_left_to_triton(replaced):
    assert direct(compiled(**replaced), (FLAT, 2, "constant")) is None


def test_a_launcher_without_what_is_asked_for_is_left_to_triton():
    assert direct(types.SimpleNamespace(run=lambda *_: None), (FLAT, 2)) is None


def test_then_every_launch_is_triton_s(both, monkeypatch):
    monkeypatch.setattr(relaunch, "direct", lambda *_: None)
    for tokens in (7, 9, 9):
        aot.launch_norm(torch.bfloat16, tokens=tokens)
    assert not any(spared for _, spared in both)


# ---- descriptors ----


def test_descriptors_know_an_address_and_what_tma_cannot_read():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    tile = gluon_rule._kernels()[3]

    def make(pointer, *shape, strides=(128, 1)):
        return descriptors.describe(pointer, torch.bfloat16, shape, strides, tile)

    assert make(4096, 64, 128) is make(4096, 64, 128)
    assert make(4096, 64, 128) is not make(4096, 65, 128)
    assert make(8192, 64, 128).base.data_ptr() == 8192
    for heads, strides in ((2, (256, 128, 1)), (2, (512, 128, 1)), (1, (128, 7, 1))):
        made = make(4096, 64, heads, 128, strides=strides)
        assert (made.shape, made.strides) == ([64, heads * 128], [strides[0], 1])
    assert make(4096, 1, 2, 128, strides=(3, 128, 1)).strides == [256, 1]
    assert make(4100, 64, 128) is None
    assert make(4096, 0, 128) is None
    assert make(4096, 64, 128, strides=(132, 1)) is None
    assert make(4096, 64, 128, strides=(1, 64)) is None
    for strides in ((128, 128, 1), (512, 256, 1), (256, 128, 2), (260, 128, 1)):
        assert make(4096, 64, 2, 128, strides=strides) is None


def test_kernels_that_want_another_encoding_do_not_agree():
    descriptor = types.SimpleNamespace(kind=object())
    assert descriptors.agree(descriptor, {"swizzle": 3}, max)
    assert descriptors.agree(descriptor, {"swizzle": 3}, max)
    assert not descriptors.agree(descriptor, {"swizzle": 2}, max)


def test_a_descriptor_is_encoded_once_for_all_that_take_it():
    made, kind = [], object()
    x, y = (types.SimpleNamespace(kind=kind, encoded=None, name=name) for name in "xy")
    assert descriptors.agree(x, None, lambda d, how: made.append(d.name) or [d.name, 2])
    first, second = descriptors.Descriptors(x, y), descriptors.Descriptors(y, x)
    assert first.encode() == first.encoded == ("x", 2, "y", 2)
    assert second.encode() == ("y", 2, "x", 2)
    assert made == ["x", "y"]
    assert first.kind is second.kind
