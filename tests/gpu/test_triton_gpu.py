"""The Triton kernels on a GPU: the interpreter's cases in bf16, f16 and f32, then what only a GPU can show."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases as cases
from triton_cases import ON_GPU

from gdnir import oracle_ops
from gdnir.lowering.triton_launch import causal_conv1d, gated_rmsnorm

pytestmark = ON_GPU
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SILU = {"activation": "silu", "conv_layout": "cw"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_conv(case, dtype):
    cases.check_conv(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1024, 6144, 8192, 11520])
@pytest.mark.parametrize(
    ("phase", "layout"), [("prefill", "cw"), ("prefill", "wc"), ("decode", "cw"), ("verify", "wc")]
)
def test_conv_real_channels(phase, layout, channels, dtype):
    if phase == "prefill":
        rows = tuple((n, n % 3 != 0, slot, slot) for slot, n in enumerate((1, 64, 0, 131, 16, 35, 2, 200)))
    elif phase == "decode":
        rows = tuple((1, n % 5 != 0, n if n % 7 else -1, n) for n in range(130))
    else:
        rows = tuple((n % 5, True, 5 * n, tuple(range(5 * n + 1, 5 * n + 5))) for n in range(33))
    case = cases.Case("", phase, rows, tail=5, slots=170, channels=channels, layout=layout, bias=True)
    cases.check_conv(case, dtype, "cuda")


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_with_a_wider_state(phase, dtype):
    rows = ((1, True, 0, 0), (1, False, 1, 1))
    cases.check_conv(cases.Case("", phase, rows, bias=True), dtype, "cuda", state_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["cw", "wc"])
def test_conv_same_bits_however_it_is_cut(layout, dtype):
    cases.check_same_bits(dtype, "cuda", layout, lengths=(100, 64, 37, 300), channels=1032)


@pytest.mark.parametrize("cu_seqlens", cases.MALFORMED, ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
def test_conv_survives_malformed_cu_seqlens(cu_seqlens, phase):
    cases.check_malformed(cu_seqlens, phase, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", cases.NORMS, ids=str)
def test_norm(norm, dtype):
    cases.check_norm(*norm, dtype, "cuda", weight_dtype=torch.float32 if norm[0] % 2 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8192, 32, 128), (4097, 48, 128), (1000, 30, 192), (70_001, 1, 96)], ids=str)
def test_norm_large(shape, dtype):
    cases.check_norm(*shape, "silu", "wide", dtype, "cuda")


def test_conv_8192_tokens_of_8192_channels():
    """Against the same sums in torch; the loops of the oracle would take minutes."""
    lengths = [3000, 1, 0, 2, 5000, 189]
    seq = cases.make_seq(cases.Case("", "prefill", cases.cont(*lengths)), "cuda")
    torch.manual_seed(0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8192, 4, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(len(lengths), 8192, 3, device="cuda", dtype=torch.bfloat16)
    old, at = pool.double(), 0
    with cases.poisoned():
        y = causal_conv1d(x, weight, None, pool, seq, **SILU)
    for n, length in enumerate(lengths):
        taps = torch.cat([old[n].T, x[at : at + length].double()])
        total = sum(taps[w : w + length] * weight[:, w].double() for w in range(4))
        cases.assert_rounded_once(y[at : at + length], total * torch.sigmoid(total), y.dtype, f"sequence {n}")
        assert torch.equal(pool[n].double(), taps[-3:].T), n
        at += length


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
@pytest.mark.parametrize("far", ["slot", "channel", "column"])
def test_conv_state_beyond_2_to_31_elements(phase, far, much_memory):
    slots, channels, keep = 3, 8, 3
    stride = {"slot": 2**30 + 64, "channel": 2**29 + 64, "column": 2**30 + 64}[far]
    strides = {"slot": (stride, 3, 1), "channel": (24, stride, 1), "column": (8, 24, stride)}[far]
    ends = [(size - 1) * by for size, by in zip((slots, channels, keep), strides, strict=True)]
    assert sum(ends) >= 2**31
    much_memory(2 * sum(ends))
    pool = torch.empty(sum(ends) + 1, dtype=torch.bfloat16, device="cuda").as_strided((slots, channels, keep), strides)
    pool.copy_(torch.randn(slots, channels, keep))
    small = pool.double()
    seq = cases.make_seq(cases.Case("", phase, ((1, True, 2, 1), (1, True, 0, 0))), "cuda")
    x = torch.randn(2, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    want = oracle_ops.causal_conv1d(x, weight, None, small, seq, **SILU)
    y = causal_conv1d(x, weight, None, pool, seq, **SILU)
    cases.assert_rounded_once(y, want, y.dtype, "y")
    assert torch.equal(pool.double(), small)


@pytest.mark.parametrize("phase", ["prefill", "verify"])
def test_conv_rows_beyond_2_to_31_elements(phase, much_memory):
    stride = 2**30 + 64
    much_memory(2 * 2 * stride)
    x = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device="cuda").as_strided((3, 8), (stride, 1))
    x.copy_(torch.randn(3, 8))
    rows = ((3, True, 0, (1, 2, 3) if phase == "verify" else 1),)
    seq = cases.make_seq(cases.Case("", phase, rows), "cuda")
    pool = torch.randn(4, 8, 3, device="cuda", dtype=torch.bfloat16)
    small = pool.double()
    weight = torch.randn(8, 4, device="cuda", dtype=torch.bfloat16)
    want = oracle_ops.causal_conv1d(x, weight, None, small, seq, **SILU)
    y = causal_conv1d(x, weight, None, pool, seq, **SILU)
    cases.assert_rounded_once(y, want, y.dtype, "y")
    assert torch.equal(pool.double(), small)


def test_conv_outputs_beyond_2_to_31_elements(much_memory):
    tokens, channels = 2**18 + 37, 8192
    much_memory(4 * tokens * channels)  # x and y
    x = torch.zeros(tokens, channels, device="cuda", dtype=torch.bfloat16)
    x[-300:] = torch.randn(300, channels, device="cuda")
    seq = cases.make_seq(cases.Case("", "prefill", cases.fresh(tokens - 100, 100)), "cuda")
    pool = torch.full((2, channels, 3), float("nan"), device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    y = causal_conv1d(x, weight, None, pool, seq, **SILU)
    end = cases.make_seq(cases.Case("", "prefill", cases.fresh(200, 100)), "cpu")
    small = torch.zeros(2, channels, 3, dtype=torch.float64, device="cuda")
    want = oracle_ops.causal_conv1d(x[-300:], weight, None, small, end, **SILU)
    cases.assert_rounded_once(y[-300:], want, y.dtype, "y")
    assert not y[:-300].any()
    assert torch.equal(pool.double(), small)


def test_norm_beyond_2_to_31_elements(much_memory):
    tokens, heads, width = 2**19 + 37, 32, 128
    much_memory(6 * tokens * heads * width)
    o = torch.ones(tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    z = torch.zeros_like(o)
    o[-300:], z[-300:] = torch.randn(2, 300, heads, width, device="cuda").bfloat16()
    weight = torch.randn(width, device="cuda")
    y = gated_rmsnorm(o, z, weight, eps=1e-6, activation="silu")
    want = oracle_ops.gated_rmsnorm(o[-300:], z[-300:], weight, eps=1e-6, activation="silu")
    cases.assert_rounded_once(y[-300:], want, y.dtype, "y")
    assert not y[:-300].any()


def test_more_than_65535_rows_and_sequences():
    count = 70_001
    seq = cases.make_seq(cases.Case("", "decode", cases.cont(*[1] * count)), "cuda")
    for phase in ("decode", "prefill", "verify"):
        pool = torch.randn(count, 8, 3, device="cuda")
        x, weight = torch.randn(count, 8, device="cuda"), torch.randn(8, 4, device="cuda")
        taps = torch.cat([pool, x[:, :, None]], dim=2)
        y = causal_conv1d(
            x, weight, None, pool, dataclasses.replace(seq, phase=phase), activation="none", conv_layout="cw"
        )
        cases.assert_rounded_once(y, (taps.double() * weight.double()).sum(2), y.dtype, phase)
        assert torch.equal(pool, taps[:, :, 1:])


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
def test_conv_200_launches_bitwise_equal(phase):
    count, channels = 40, 8192
    rows = {
        "prefill": tuple((n % 23 * 3, n % 2 == 0, n, n) for n in range(count)),
        "decode": cases.cont(*[1] * count),
        "verify": tuple((n % 3, True, n, (n, count + n)) for n in range(count)),
    }[phase]
    seq = cases.make_seq(cases.Case("", phase, rows), "cuda")
    x = torch.randn(seq.num_tokens, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    start = torch.randn(2 * count, channels, 3, device="cuda", dtype=torch.bfloat16)

    def launch():
        pool = start.clone()
        return causal_conv1d(x, weight, weight[:, 0], pool, seq, **SILU), pool

    cases.check_repeats(launch)


def test_norm_200_launches_bitwise_equal():
    o, z = torch.randn(2, 1001, 32, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, device="cuda")
    cases.check_repeats(lambda: (gated_rmsnorm(o, z, weight, eps=1e-6, activation="silu"),))


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify"])
def test_cuda_graph_replays_with_new_contents_and_nothing_waits(phase):
    """Metadata is refilled between replays: other lengths, slots and flags, and fewer tokens than were captured."""
    channels = 1024
    batches = {
        "prefill": [
            ((20, True, 0, 0), (20, False, 1, 1)),
            ((3, False, 4, 5), (1, True, 2, 2)),
            ((0, True, -1, 0), (33, True, 1, 3)),
        ],
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
    seqs = [cases.make_seq(cases.Case("", phase, rows), "cuda") for rows in batches]
    tokens = seqs[0].num_tokens
    static = dataclasses.replace(
        seqs[0], **{k: getattr(seqs[0], k).clone() for k in ("cu_seqlens", "read_slots", "write_slots", "has_state")}
    )
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(8, channels, 3, device="cuda", dtype=torch.bfloat16)
    start = pool.clone()
    causal_conv1d(x, weight, None, pool, static, **SILU)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        causal_conv1d(x, weight, None, pool, static, **SILU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv1d(x, weight, None, pool, static, **SILU)
    for rows, seq in zip(batches, seqs, strict=True):
        for name in ("cu_seqlens", "read_slots", "write_slots", "has_state"):
            getattr(static, name).copy_(getattr(seq, name))
        pool.copy_(start)
        y.fill_(float("nan"))
        small, judge = start.double(), cases.make_seq(cases.Case("", phase, rows), "cpu")
        want = oracle_ops.causal_conv1d(x, weight, None, small, judge, **SILU)
        graph.replay()
        cases.assert_rounded_once(y, want, y.dtype, "y")
        assert torch.equal(pool.double(), small)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_current():
    device = "cuda:1"
    cases.check_conv(cases.Case("", "prefill", cases.cont(5, 20)), torch.bfloat16, device)
    cases.check_norm(7, 4, 128, "silu", "wide", torch.bfloat16, device)
    assert torch.cuda.current_device() == 0
