"""Every launcher on a GPU: one compilation for all batches, and nothing on the host that a CUDA graph could not capture."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton_cases as base
import triton_cases_gluon as gluon
from triton_cases import HOPPER, ON_GPU

import gdnir
import gdnir.kernels
from gdnir.lowering import gluon_step, relaunch, triton_launch, triton_rule, triton_step

pytestmark = ON_GPU
HEADS = (2, 4, 128, 128)
CHANNELS = 2 * 2 * 128 + 4 * 128
SLOTS = 200
COUNTS = 3, 1, 16, 33, 64  # rows of a batch


def batch(phase, count, long=False):
    """Rows of many lengths, the first one of one token, or all of at least five chunks; perhaps tokens of nobody after them."""
    rows = {
        "prefill": tuple((320 * long + 1 + n * 37 % 90, n % 3 != 1, n, n) for n in range(count)),
        "decode": base.cont(*[1] * count),
        "verify": tuple((1 + n % 2, True, n, (n, 100 + n)) for n in range(count)),
    }[phase]
    return base.make_seq(base.Case("", phase, rows, tail=(count - 1) % 3), "cuda")


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


# Each makes a batch of `count` rows and gives (launch, the states that it updates).


def conv(phase, layout, count):
    seq = batch(phase, count)
    x, weight = randn(seq.num_tokens, CHANNELS), randn(CHANNELS, 4)
    pool = randn(SLOTS, CHANNELS, 3) if layout == "cw" else randn(SLOTS, 3, CHANNELS)
    run = functools.partial(triton_launch.causal_conv1d, activation="silu", conv_layout=layout)
    return lambda: (run(x, weight, None, pool, seq),), [pool]


def prep(count):
    seq = batch("prefill", count)
    x, a, b, _ = randn(seq.num_tokens, CHANNELS + 16).split([CHANNELS, 4, 4, 8], 1)
    weight, rate, pool = randn(CHANNELS, 4), randn(4, dtype=torch.float32), randn(SLOTS, CHANNELS, 3)
    options = dict(activation="silu", conv_layout="cw", heads=HEADS, eps=1e-6, allow_neg_eigval=False)
    return lambda: triton_launch.conv_prep(x, a, b, weight, None, pool, rate, rate, seq, **options), [pool]


def rule_inputs(seq):
    h, hv, k, v = HEADS
    tokens = seq.num_tokens
    q, key = (torch.nn.functional.normalize(randn(tokens, h, k), dim=-1) for _ in range(2))
    g, beta = -torch.rand(tokens, hv, device="cuda"), torch.rand(tokens, hv, device="cuda")
    return (q, key, randn(tokens, hv, v), g, beta), randn(SLOTS, hv, v, k, dtype=torch.float32)


def rule(segment, count):
    seq = batch("prefill", count, long=segment > 0)
    inputs, pool = rule_inputs(seq)
    run = functools.partial(triton_rule.delta_rule_prefill, scale=0.1, state_layout="vk", segment=segment)
    return lambda: (run(*inputs, pool, seq),), [pool]


def wgmma(segment, count):
    seq = batch("prefill", count, long=segment > 0)
    inputs, pool = rule_inputs(seq)
    return lambda: (gluon.gluon_rule.delta_rule_prefill(*inputs, pool, seq, scale=0.1, segment=segment),), [pool]


def rule_step(phase, count):
    seq = batch(phase, count)
    inputs, pool = rule_inputs(seq)
    return lambda: (triton_step.delta_rule_step(*inputs, pool, seq, scale=0.1, state_layout="vk"),), [pool]


def step(phase, count, run=triton_step.gdn_step, state=torch.float32):
    seq = batch(phase, count)
    qkv, z, b, a, _ = randn(seq.num_tokens, CHANNELS + 4 * 128 + 16).split([CHANNELS, 4 * 128, 4, 4, 8], 1)
    pools = randn(SLOTS, CHANNELS, 3), randn(SLOTS, 4, 128, 128, dtype=state)
    rate, norm = randn(4, dtype=torch.float32), randn(128, dtype=torch.float32)
    operands = qkv, z.unflatten(1, (4, 128)), a, b, randn(CHANNELS, 4), None, *pools, rate, rate, norm, seq
    options = dict(
        activation="silu", conv_layout="cw", heads=HEADS, l2norm_eps=1e-6, allow_neg_eigval=False, scale=0.1,
        state_layout="vk", eps=1e-6, gate="silu",
    )  # fmt: skip
    return lambda: (run(*operands, **options),), list(pools)


def norm(count):
    o, z = randn(2, count, 4, 128)
    weight = randn(128)
    return lambda: (triton_launch.gated_rmsnorm(o, z, weight, eps=1e-6, activation="silu"),), []


def l2norm(count):
    x = randn(count, 2, 128)
    return lambda: (triton_step.l2norm(x, eps=1e-6),), []


def gate(count):
    b, a, _ = randn(count, 16).split([4, 4, 8], 1)
    rate = randn(4, dtype=torch.float32)
    return lambda: triton_step.gdn_gate(a, b, rate, rate, allow_neg_eigval=False), []


BUILD = {  # how a batch is made, and how many outputs and workspaces a launch may allocate
    **{f"conv-{p}-{lay}": (functools.partial(conv, p, lay), 1) for p in ("prefill", "decode", "verify") for lay in ("cw", "wc")},
    "prep": (prep, 4),
    "rule": (functools.partial(rule, 0), 4),
    "rule-cut": (functools.partial(rule, 1), 6),
    **{f"rule-{phase}": (functools.partial(rule_step, phase), 1) for phase in ("decode", "verify")},
    **{f"step-{phase}": (functools.partial(step, phase), 1) for phase in ("decode", "verify")},
    **{
        f"gluon-step-{by}-{phase}-{8 * state.itemsize}": (
            functools.partial(step, phase, run=functools.partial(gluon_step.gdn_step, by=by), state=state), 1
        )
        for by, phase, state in (
            ("clusters", "decode", torch.float32), ("tiles", "verify", torch.float32),
            *((way, "decode", torch.float32) for way in range(2)), *((way, "decode", torch.bfloat16) for way in range(3)),
        )
    },
    "norm": (norm, 1),
    "l2norm": (l2norm, 1),
    "gate": (gate, 2),
    "gluon-single": (functools.partial(wgmma, 0), 2),
    "gluon-pair": (functools.partial(wgmma, 0), 2),
    "gluon-single-cut": (functools.partial(wgmma, 2), 4),
    "gluon-pair-cut": (functools.partial(wgmma, 2), 4),
}  # fmt: skip


@pytest.fixture(params=BUILD)
def built(request, monkeypatch):
    """(make a batch, allocations of a launch)"""
    if request.param.startswith("gluon"):
        if not HOPPER:
            pytest.skip("needs a GPU with sm_90")
        if not request.param.startswith("gluon-step"):
            gluon.only(request.param.split("-")[1], monkeypatch)
        monkeypatch.setattr(gluon.gluon_rule, "_shared_heads", lambda *_: 1)  # which also follows from the batch's size
    return BUILD[request.param]


def compiled():
    """Names of the kernels that this process has compiled, one for each time."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(gdnir.kernels.__path__, "gdnir.kernels.")]
    kernels = {id(x): x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")}
    return sorted(
        kernel.__name__ for kernel in kernels.values() for cache in kernel.device_caches.values() for _ in cache[0]
    )


def test_nothing_is_compiled_again_when_only_the_batch_changes(built):
    make, _ = built
    make(COUNTS[0])[0]()
    once = compiled()
    assert once
    for count in COUNTS[1:]:
        make(count)[0]()
        assert compiled() == once, count


def test_a_batchs_first_launch_can_be_captured(built):
    """Warm from another batch, the first launch waits for nothing, gives the bits of an eager one, and allocates no more
    than its outputs and workspaces."""
    make, most = built
    make(COUNTS[0])[0]()  # compiles
    launch, states = make(17)
    start = [x.clone() for x in states]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        captured = launch()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    graph.replay()
    replayed = [x.clone() for x in (*captured, *states)]
    for state, old in zip(states, start, strict=True):
        state.copy_(old)
    eager = launch()
    for mine, theirs in zip(replayed, (*eager, *states), strict=True):
        assert torch.equal(base.bits(mine), base.bits(theirs))
    assert allocated <= most


def test_launches_again_give_the_bits_of_triton_s(built, monkeypatch):
    make, _ = built
    launch, states = make(17)
    start = [x.clone() for x in states]

    def run():
        for state, old in zip(states, start, strict=True):
            state.copy_(old)
        return [base.bits(x).clone() for x in (*launch(), *states)]

    ours = [run() for _ in range(3)]
    for module in (triton_launch, triton_rule, triton_step, gluon_step):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, args, named: kernel[(programs,)](*args, **named))
    monkeypatch.setattr(gluon.gluon_rule, "launch_all", lambda steps, *given: relaunch.by_triton(steps.steps, *given))
    theirs = run()
    for one in ours:
        assert all(map(torch.equal, one, theirs))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_layer_under_torch_compile_has_the_same_bits(phase):
    config = gdnir.models.config("qwen3-next-80b-a3b")
    plan = gdnir.Plan(gdnir.lower(gdnir.models.trace(config, phase=phase)), gdnir.models.random_weights(config))
    seq = (
        gdnir.Seq.prefill([70, 5], slots=[0, 1], device="cuda")
        if phase == "prefill"
        else gdnir.Seq.decode([1, 0], device="cuda")
    )
    mine, theirs = (gdnir.StatePool(config, slots=2, layers=[0], device="cuda").layer(0) for _ in range(2))
    x = randn(seq.num_tokens, 2048)
    with torch.no_grad():
        want = plan(x, mine, seq)
        got = torch.compile(plan, backend="aot_eager")(x, theirs, seq)
    assert torch.equal(got, want)
    assert torch.equal(theirs.ssm, mine.ssm)
    assert torch.equal(theirs.conv, mine.conv)
