"""The kernels of decode and verify, and the small ops, on a GPU: the interpreter's cases, then what only a GPU can show."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases as base
import triton_cases_step as cases
from triton_cases import HOPPER, ON_GPU

from gdnir.lowering import triton_step

pytestmark = ON_GPU
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STATES = [torch.float32, torch.bfloat16]
PHASES = ["decode", "verify"]
ON_HOPPER = pytest.mark.skipif(not HOPPER, reason="needs sm_90")
BY = ["", *(pytest.param(by, marks=ON_HOPPER) for by in ("clusters", "tiles"))]
KERNELS = pytest.mark.parametrize("by", BY, ids=["triton", "clusters", "tiles"])
SHAPES = [
    (16, 32, 128, 128),
    (2, 8, 128, 128),
    (1, 8, 128, 128),
    (4, 12, 128, 128),
    (3, 3, 96, 192),
    (2, 4, 192, 96),
    (1, 1, 256, 256),
]


def _rows(phase, count):
    """Ragged rows: fresh, padding, in place and elsewhere; a slot for each row and draft, some never named."""
    if phase == "decode":
        return tuple((n % 11 != 7, n % 5 != 0, n if n % 7 else -1, n if n % 3 else count + n) for n in range(count))
    return tuple(
        (n % 5, n % 4 != 0, 5 * n, (5 * n, 5 * n + 1, 5 * n + 2, -1 if n % 6 else 5 * n + 3)) for n in range(count)
    )


def _case(phase, heads, count=12, **options):
    return cases.Case("", phase, _rows(phase, count), heads=heads, slots=5 * count, tail=3, bias=True, **options)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@KERNELS
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_cases(case, by, dtype, state_dtype):
    cases.check_step(dataclasses.replace(case, by=by), dtype, "cuda", state_dtype)
    if not by:
        cases.check_rule(case, dtype, "cuda", state_dtype)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize(
    "heads",
    [(2, 4, 128, 128), (1, 1, 128, 192), (1, 4, 64, 64), (1, 4, 64, 128), (1, 3, 64, 128), (1, 3, 64, 96)],
    ids=str,
)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
@pytest.mark.skipif(not HOPPER, reason="needs sm_90")
def test_cases_by_bulk_copies(case, heads, state_dtype):
    """States whose tiles come and go by bulk copies, as one that is strided or `kv` does not."""
    for each in cases.by_bulk_copies(case, heads, state_dtype):
        cases.check_step(each, torch.bfloat16, "cuda", state_dtype)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize(("state_layout", "conv_layout"), [("vk", "cw"), ("kv", "wc")])
@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_real_shapes(by, phase, heads, state_layout, conv_layout, state_dtype):
    case = _case(phase, heads, state_layout=state_layout, conv_layout=conv_layout, by=by)
    cases.check_step(case, torch.bfloat16, "cuda", state_dtype)
    if not by:
        cases.check_rule(case, torch.bfloat16, "cuda", state_dtype)


@pytest.mark.parametrize("keys", ["correlated", "identical"])
@pytest.mark.parametrize("gates", [0.0, -20.0, "resets"], ids=str)
@KERNELS
def test_hard_keys(by, keys, gates):
    case = cases.Case("", "verify", cases.LONG, heads=(2, 4, 128, 128), keys=keys, gates=gates, betas=1.0, by=by)
    cases.check_step(case, torch.bfloat16, "cuda")
    if not by:
        cases.check_rule(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_neighbours_change_no_bits(by, phase, state_dtype):
    cases.check_step_neighbours(phase, torch.bfloat16, "cuda", state_dtype, heads=(4, 8, 128, 128), by=by)


@pytest.mark.parametrize("heads", [(1, 2, 8, 8), (2, 4, 128, 128)], ids=str)
@pytest.mark.parametrize("cu_seqlens", base.MALFORMED, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_survives_malformed_cu_seqlens(by, cu_seqlens, phase, heads):
    cases.check_step_malformed(cu_seqlens, phase, torch.bfloat16, "cuda", by, heads)


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_200_launches_bitwise_equal(by, phase, state_dtype):
    case = _case(phase, (16, 32, 128, 128), count=40, by=by)
    given = cases.make_step(case, torch.bfloat16, "cuda", state_dtype)
    start = [pool.clone() for pool in given.storages]

    def launch():
        for pool, old in zip(given.storages, start, strict=True):
            pool.copy_(old)
        return cases.run_step(given), *given.storages

    base.check_repeats(launch)


METADATA = ("cu_seqlens", "read_slots", "write_slots", "has_state")


@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_cuda_graph_replays_with_new_contents_and_nothing_waits(by, phase):
    """Metadata is refilled between replays: other lengths, slots and flags, and fewer tokens than were captured."""
    batches = {
        "decode": [
            ((1, True, 0, 0), (1, False, 1, 1)),
            ((1, True, 5, 4), (1, True, -1, -1)),
            ((1, False, 3, 3), (0, True, 2, 2)),
        ],
        "verify": [
            ((2, True, 0, (1, 2)), (2, False, 3, (4, 5))),
            ((1, True, 2, (0, 1)), (2, True, 5, (5, 6))),
            ((0, True, 0, (1, 2)), (1, True, -1, (3, 4))),
        ],
    }[phase]
    case = cases.Case("", phase, batches[0], heads=(4, 8, 128, 128), slots=8, by=by)
    given = cases.make_step(case, torch.bfloat16, "cuda", torch.float32)
    given.conv.normal_()
    given.state.normal_()
    static = given.seq
    start = [pool.clone() for pool in given.storages]
    cases.run_step(given)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.run_step(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cases.run_step(given)
    for rows in batches:
        seq = base.make_seq(dataclasses.replace(case, rows=rows), "cuda")
        for name in METADATA:
            getattr(static, name).copy_(getattr(seq, name))
        for pool, old in zip(given.storages, start, strict=True):
            pool.copy_(old)
        y.fill_(float("nan"))
        judge = base.make_seq(dataclasses.replace(case, rows=rows), "cpu")
        owned = base.owned_tokens(judge, case.slots)
        owned = torch.cat([owned, owned.new_zeros(y.shape[0] - len(owned))]).cuda()
        want, conv, state = cases.oracle_step(dataclasses.replace(given, owned=owned), judge)
        graph.replay()
        cases.assert_rows(y, want, torch.bfloat16, "y")
        assert (y[~owned] == 0).all()
        cases.assert_pool(given.storages[0], start[0], given.conv, conv, torch.bfloat16, "conv")
        cases.assert_pool(given.storages[1], start[1], given.state, state, torch.float32, "state")


@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_states_beyond_2_to_31_elements(by, phase, much_memory):
    """The last slot of a pool lies beyond what 32 bits can address."""
    h, hv, k, v = heads = (1, 1, 128, 128)
    stride = 2**30 + 64
    numel = 2 * stride + v * k
    much_memory(2 * numel)
    state = torch.empty(numel, dtype=torch.bfloat16, device="cuda").as_strided((3, hv, v, k), (stride, v * k, k, 1))
    case = cases.Case(
        "",
        phase,
        ((1, True, 2, (1,) if phase == "verify" else 1), (1, True, 0, (0,) if phase == "verify" else 0)),
        heads=heads,
        slots=3,
        by=by,
    )
    given = cases.make_step(case, torch.bfloat16, "cuda", torch.bfloat16)
    state.copy_(given.state)
    far = dataclasses.replace(given, state=state, conv=given.conv.clone())
    assert torch.equal(cases.run_step(far), cases.run_step(given))
    assert torch.equal(base.bits(state[:2].contiguous()), base.bits(given.state[:2]))


@pytest.mark.parametrize("phase", PHASES)
@KERNELS
def test_columns_of_a_conv_state_far_apart(by, phase, much_memory):
    """A multiple of the stride from one column to the next is more than 32 bits hold."""
    stride, channels = 2**30 + 64, 3 * 128
    much_memory(2 * (2 * stride + 3 * channels))
    rows = ((1, True, 2, (1,) if phase == "verify" else 1), (1, True, 0, (0,) if phase == "verify" else 0))
    case = cases.Case("", phase, rows, heads=(1, 1, 128, 128), slots=3, by=by)
    given = cases.make_step(case, torch.bfloat16, "cuda", torch.float32)
    storage = torch.empty(2 * stride + 3 * channels, dtype=torch.bfloat16, device="cuda")
    conv = storage.as_strided((3, channels, 3), (channels, 1, stride))
    conv.copy_(given.conv)
    far = dataclasses.replace(given, conv=conv, state=given.state.clone())
    assert torch.equal(cases.run_step(far), cases.run_step(given))
    assert torch.equal(base.bits(conv.contiguous()), base.bits(given.conv))
    assert torch.equal(base.bits(far.state), base.bits(given.state))


def test_more_than_65535_rows():
    count = 70_001
    seq = base.make_seq(base.Case("", "decode", base.cont(*[1] * count)), "cuda")
    q, key, value = torch.randn(3, count, 1, 8, device="cuda")
    g, beta = -torch.rand(count, 1, device="cuda"), torch.rand(count, 1, device="cuda")
    state = torch.randn(count, 1, 8, 8, device="cuda")
    old = state.double() * g.double().exp()[..., None, None]
    u = beta[..., None] * (value - (old * key[:, :, None]).sum(-1))
    new = old + u[..., None] * key[:, :, None]
    o = triton_step.delta_rule_step(q, key, value, g, beta, state, seq, scale=1.0, state_layout="vk")
    torch.testing.assert_close(state.double(), new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.double(), (new * q[:, :, None]).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "wide", "last"])
@pytest.mark.parametrize("shape", [*cases.SHAPES, (8192, 16, 128), (4097, 30, 96)], ids=str)
def test_l2norm(shape, memory, dtype):
    cases.check_l2norm(shape, memory, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "neg"), [(7, 6, False), (1, 1, True), (0, 4, False), (8192, 32, True)])
def test_gate(tokens, heads, neg, dtype):
    cases.check_gate(tokens, heads, neg, dtype, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_current():
    cases.check_step(cases.CASES[0], torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
