"""Bad input: each case is a typed error that names the op, the argument, what was expected and what came."""

import dataclasses

import pytest
import torch

import gdnir
from gdnir import ops
from gdnir.errors import (
    ArgumentError,
    ConfigError,
    DeviceError,
    DTypeError,
    GdnirError,
    GradError,
    InputError,
    LayoutError,
    LoweringError,
    PoolError,
    RegistryError,
    SeqError,
    ShapeError,
    VerifyError,
    WeightsError,
)  # fmt: skip

T, H, HV, K, V, C = 6, 2, 4, 8, 12, 80
S = gdnir.Seq
seq = S.prefill([4, 2], slots=[0, 1])


def rule(**changes):
    a = dict(
        q=torch.randn(T, H, K),
        k=torch.randn(T, H, K),
        v=torch.randn(T, HV, V),
        g=-torch.rand(T, HV),
        beta=torch.rand(T, HV),
        state=torch.zeros(3, HV, V, K),
        seq=seq,
        scale=1.0,
    )
    return ops.gated_delta_rule(**{**a, **changes})


def conv(**changes):
    a = dict(
        qkv=torch.randn(T, C),
        weight=torch.randn(C, 4),
        bias=None,
        conv_state=torch.zeros(3, C, 3),
        seq=seq,
        activation="silu",
    )
    return ops.causal_conv1d(**{**a, **changes})


def norm(**changes):
    a = dict(o=torch.randn(T, HV, V), z=torch.randn(T, HV, V), weight=torch.randn(V))
    return ops.gated_rmsnorm(**{**a, **changes})


def proj(**changes):
    a = dict(
        x=torch.randn(T, 10), w_qkvz=torch.randn(C + HV * V, 10), w_ba=torch.randn(2 * HV, 10), heads=(H, HV, K, V)
    )
    return ops.in_proj(**{**a, **changes})


R = torch.randn
OP_CASES = {
    "q rank": (rule, dict(q=R(T, K)), ShapeError, "q"),
    "k shorter": (rule, dict(k=R(T - 1, H, K)), ShapeError, "k"),
    "k heads": (rule, dict(k=R(T, HV, K)), ShapeError, "k"),
    "k dim": (rule, dict(k=R(T, H, K + 1)), ShapeError, "k"),
    "g heads": (rule, dict(g=R(T, H)), ShapeError, "g"),
    "beta shape": (rule, dict(beta=R(T, 1)), ShapeError, "beta"),
    "beta rank": (rule, dict(beta=R(T)), ShapeError, "beta"),
    "g bf16": (rule, dict(g=R(T, HV).bfloat16()), DTypeError, "g"),
    "head first": (rule, dict(q=R(H, T, K), k=R(H, T, K)), ShapeError, "q"),
    "HV not a multiple of H": (rule, dict(q=R(T, 3, K), k=R(T, 3, K)), ShapeError, None),
    "q int": (
        rule,
        dict(q=torch.ones(T, H, K, dtype=torch.int64), k=torch.ones(T, H, K, dtype=torch.int64)),
        DTypeError,
        "q",
    ),
    "q bf16, v f16": (
        rule,
        dict(q=R(T, H, K).bfloat16(), k=R(T, H, K).bfloat16(), v=R(T, HV, V).half()),
        DTypeError,
        "v",
    ),
    "fp8": (rule, dict(q=R(T, H, K).to(torch.float8_e4m3fn)), DTypeError, "q"),
    "state heads 1": (rule, dict(state=torch.zeros(3, 1, V, K)), ShapeError, "state"),
    "state transposed": (rule, dict(state=torch.zeros(3, HV, K, V)), ShapeError, "state"),
    "state f16": (rule, dict(state=torch.zeros(3, HV, V, K).half()), DTypeError, "state"),
    "state expanded": (rule, dict(state=torch.zeros(1, HV, V, K).expand(3, HV, V, K)), LayoutError, "state"),
    "state layout": (rule, dict(state_layout="kw"), ArgumentError, "state_layout"),
    "seq a tensor": (rule, dict(seq=torch.tensor([0, 4, 6])), SeqError, "seq"),
    "seq of other length": (rule, dict(seq=S.prefill([4], slots=[0])), ShapeError, "q"),
    "scale None": (rule, dict(scale=None), ArgumentError, "scale"),
    "scale nan": (rule, dict(scale=float("nan")), ShapeError, "scale"),
    "typo": (rule, dict(initial_states=None), ArgumentError, "initial_states"),
    "unknown provider": (rule, dict(provider="tritn"), RegistryError, None),
    "provider unavailable": (norm, dict(provider="triton"), LoweringError, None),
    "numpy": (rule, dict(q=R(T, H, K).numpy()), ArgumentError, "q"),
    "q None": (rule, dict(q=None), ArgumentError, "q"),
    "other device": (rule, dict(v=torch.empty(T, HV, V, device="meta")), DeviceError, "v"),
    "conv state short": (conv, dict(conv_state=torch.zeros(3, C, 2)), ShapeError, None),
    "conv state channels": (conv, dict(conv_state=torch.zeros(3, C + 1, 3)), ShapeError, "conv_state"),
    "conv state order": (conv, dict(conv_layout="wc"), ShapeError, "conv_state"),
    "conv weight": (conv, dict(weight=R(C, 1, 4)), ShapeError, "weight"),
    "conv bias": (conv, dict(bias=R(C + 1)), ShapeError, "bias"),
    "conv activation": (conv, dict(activation="gelu"), ArgumentError, "activation"),
    "eps 0": (norm, dict(eps=0.0), ShapeError, "eps"),
    "norm weight": (norm, dict(weight=R(V + 1)), ShapeError, "weight"),
    "gate dtype": (norm, dict(z=R(T, HV, V).bfloat16()), DTypeError, "z"),
    "split sizes": (proj, dict(w_qkvz=R(C + HV * V + 1, 10)), ShapeError, "w_qkvz"),
    "hidden size": (proj, dict(w_ba=R(2 * HV, 11)), ShapeError, "w_ba"),
    "heads 3": (proj, dict(heads=(H, HV, K)), ArgumentError, "heads"),
    "heads 0": (proj, dict(heads=(0, HV, K, V)), ArgumentError, "heads"),
    "rows do not split": (lambda **c: ops.permute_rows(R(10, 3), groups=3, splits=(1, 2)), {}, ShapeError, None),
}


@pytest.mark.parametrize("case", OP_CASES)
def test_ops(case):
    call, changes, error, argument = OP_CASES[case]
    with pytest.raises(error) as caught:
        call(**changes)
    _explains(caught.value, argument)


def _explains(error, argument):
    assert isinstance(error, GdnirError)
    if isinstance(error, InputError):
        assert error.op
        assert error.expected and error.got
        if argument is not None:
            assert error.argument == argument
        assert error.argument in str(error) and "expected" in str(error) and "got" in str(error)
    else:
        assert len(str(error)) > 30


i32 = torch.int32


def tensors(**changes):
    a = dict(
        phase="prefill",
        cu_seqlens=torch.tensor([0, 4, 6]),
        read_slots=torch.tensor([0, 1]),
        write_slots=torch.tensor([[0], [1]]),
        has_state=torch.tensor([True, False]),
        num_tokens=6,
        max_len=4,
    )
    return S.from_tensors(**{**a, **changes})


SEQ_CASES = {
    "negative length": lambda: S.prefill([-1], slots=[0]),
    "float length": lambda: S.prefill([1.5], slots=[0]),
    "bool length": lambda: S.prefill([True], slots=[0]),
    "tensor lengths": lambda: S.prefill(torch.tensor([3]), slots=[0]),
    "string": lambda: S.prefill("3", slots=[0]),
    "too few slots": lambda: S.prefill([1, 2], slots=[0]),
    "no slots": lambda: S.prefill([1]),
    "both slots": lambda: S.prefill([1], slots=[0], read_slots=[0], write_slots=[0]),
    "same write twice": lambda: S.decode([3, 3]),
    "writes what another reads": lambda: S.decode(read_slots=[0, 1], write_slots=[1, 2]),
    "flags": lambda: S.prefill([1], slots=[0], has_state=[1]),
    "flag count": lambda: S.prefill([1], slots=[0], has_state=[True, True]),
    "verify too long": lambda: S.verify([3], read_slots=[0], write_slots=[[1, 2]]),
    "verify ragged": lambda: S.verify([1, 1], read_slots=[0, 1], write_slots=[[2, 3], [4]]),
    "mixed phases": lambda: S.mixed(decode=S.prefill([1], slots=[0])),
    "mixed slots": lambda: S.mixed(S.decode([0]), None, S.prefill([1], slots=[0])),
    "slot too large": lambda: S.decode([2**31]),
    "float cu_seqlens": lambda: tensors(cu_seqlens=torch.tensor([0.0, 4, 6])),
    "list cu_seqlens": lambda: tensors(cu_seqlens=[0, 4, 6]),
    "cu_seqlens rank": lambda: tensors(cu_seqlens=torch.zeros(2, 2, dtype=i32)),
    "empty cu_seqlens": lambda: tensors(cu_seqlens=torch.zeros(0, dtype=i32)),
    "count": lambda: tensors(read_slots=torch.tensor([0])),
    "write rank": lambda: tensors(write_slots=torch.tensor([0, 1])),
    "has_state int": lambda: tensors(has_state=torch.tensor([1, 0])),
    "device": lambda: tensors(read_slots=torch.empty(2, dtype=i32, device="meta")),
    "max_len": lambda: tensors(max_len=7),
    "num_tokens": lambda: tensors(num_tokens=-1),
    "decode tokens": lambda: tensors(phase="decode"),
    "phase": lambda: tensors(phase="extend"),
}


@pytest.mark.parametrize("case", SEQ_CASES)
def test_seq(case):
    with pytest.raises(InputError) as caught:
        SEQ_CASES[case]()
    _explains(caught.value, None)


CONFIG = gdnir.models.config(dict(model_type="qwen3_next", hidden_size=16, num_hidden_layers=4, linear_num_key_heads=H,
                                  linear_num_value_heads=HV, linear_key_head_dim=K, linear_value_head_dim=V))  # fmt: skip
GRAPH = gdnir.models.trace(CONFIG, dtype=torch.float32)
WEIGHTS = gdnir.models.random_weights(CONFIG)
PLAN = gdnir.Plan(gdnir.lower(GRAPH, "cpu"), WEIGHTS)


def pool(**kwargs):
    return gdnir.StatePool(CONFIG, **{**dict(slots=3, conv_dtype=torch.float32), **kwargs})


def plan_call(x=None, layer=None, batch=seq):
    return PLAN(R(T, 16) if x is None else x, layer if layer is not None else pool().layer(0), batch)


def wrapped(conv_shape=(3, C, 3), ssm_shape=(3, HV, V, K), layouts=("cw", "vk")):
    return gdnir.StatePool.wrap(torch.zeros(conv_shape), torch.zeros(ssm_shape), layouts).layer(0)


PLAN_CASES = {
    "x dtype": (lambda: plan_call(R(T, 16).bfloat16()), DTypeError),
    "x size": (lambda: plan_call(R(T, 17)), ShapeError),
    "x tokens": (lambda: plan_call(R(T + 1, 16)), ShapeError),
    "x batch dimension": (lambda: plan_call(R(1, T, 16)), ShapeError),
    "x None": (lambda: PLAN(None, pool().layer(0), seq), ArgumentError),
    "x device": (lambda: plan_call(torch.empty(T, 16, device="meta")), DeviceError),
    "grad": (lambda: plan_call(R(T, 16).requires_grad_()), GradError),
    "phase": (lambda: plan_call(R(2, 16), batch=S.decode([0, 1])), SeqError),
    "slot outside": (lambda: plan_call(batch=S.prefill([4, 2], slots=[0, 3])), SeqError),
    "arguments": (lambda: PLAN(R(T, 16), seq), ArgumentError),
    "pool layout": (lambda: plan_call(layer=pool(layout="kv").layer(0)), LayoutError),
    "pool dtype": (lambda: plan_call(layer=pool(dtype=torch.bfloat16).layer(0)), DTypeError),
    "wrapped heads": (lambda: plan_call(layer=wrapped(ssm_shape=(3, 1, V, K))), ShapeError),
    "wrapped conv": (lambda: plan_call(layer=wrapped(conv_shape=(3, C, 2))), ShapeError),
    "wrapped ranks": (lambda: wrapped(ssm_shape=(3, V, K)), ShapeError),
    "wrapped slots": (lambda: wrapped(conv_shape=(4, C, 3)), ShapeError),
    "wrapped layouts": (lambda: wrapped(layouts="vk"), LayoutError),
    "no slots": (lambda: pool(slots=0), PoolError),
    "pool conv width": (lambda: pool(conv_width=2), PoolError),
    "pool float16 state": (lambda: pool(dtype=torch.float16), DTypeError),
    "full attention layer": (lambda: pool().layer(3), PoolError),
    "too many": (lambda: pool().allocate(4), PoolError),
    "free twice": (lambda: pool().free([0]), PoolError),
    "missing weight": (
        lambda: gdnir.Plan(gdnir.lower(GRAPH, "cpu"), {k: v for k, v in WEIGHTS.items() if k != "norm"}),
        WeightsError,
    ),
    "weight shape": (lambda: gdnir.Plan(gdnir.lower(GRAPH, "cpu"), {**WEIGHTS, "norm": R(3)}), WeightsError),
    "not lowered": (lambda: gdnir.Plan(GRAPH, WEIGHTS), LoweringError),
    "other platform": (lambda: gdnir.Plan(gdnir.lower(GRAPH, "rocm:gfx942"), WEIGHTS), LoweringError),
    "trace dtype": (lambda: gdnir.models.trace(CONFIG, dtype=torch.float64), DTypeError),
    "trace phase": (lambda: gdnir.models.trace(CONFIG, phase="extend"), ArgumentError),
    "model": (lambda: gdnir.models.config("qwen3-nxt"), ConfigError),
    "model type": (lambda: gdnir.models.config(dict(model_type="llama")), ConfigError),
    "config field": (lambda: gdnir.models.config(dict(model_type="qwen3_next", hidden_size="16")), ConfigError),
    "platform": (lambda: gdnir.lower(GRAPH, "cuda:90"), RegistryError),
    "providers string": (lambda: gdnir.lower(GRAPH, "cpu", providers={"l2nrm": ["native"]}), RegistryError),
    "request": (lambda: gdnir.lower(GRAPH, "cpu", providers={"l2norm": ["triton"]}), LoweringError),
    "strict": (lambda: gdnir.lower(GRAPH, "cuda:sm_90", strict=True), LoweringError),
    "plugin": (lambda: gdnir.load_plugins(["nobody"]), RegistryError),
}


@pytest.mark.parametrize("case", PLAN_CASES)
def test_plans_pools_models(case):
    call, error = PLAN_CASES[case]
    with pytest.raises(error) as caught:
        call()
    _explains(caught.value, None)


def test_bad_input_never_changes_state():
    owned = pool()
    state = owned.layer(0)
    for tensor in state:
        tensor.normal_()
    kept = [t.clone() for t in state]
    for call, _ in list(PLAN_CASES.values())[:9]:
        with pytest.raises(GdnirError):
            call()
    for batch in (S.prefill([4, 2], slots=[0, 3]), S.decode([0])):
        with pytest.raises(GdnirError):
            plan_call(layer=state, batch=batch)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_verifier_catches_each_fault():
    node = GRAPH.nodes[-1]
    faults = {
        "defined twice": dataclasses.replace(GRAPH, nodes=(*GRAPH.nodes, node)),
        "not defined before": dataclasses.replace(GRAPH, nodes=GRAPH.nodes[::-1]),
        "never used": dataclasses.replace(GRAPH, outputs=GRAPH.outputs[:1]),
        "used 2 times": dataclasses.replace(GRAPH, outputs=(*GRAPH.outputs, GRAPH.outputs[1])),
        "unknown op": dataclasses.replace(GRAPH, nodes=(*GRAPH.nodes[:-1], dataclasses.replace(node, op="out_prj"))),
        "the op's results are": gdnir.parse(str(GRAPH).replace("%out: f32[T,16]", "%out: f32[T,15]")),
        "was defined as": dataclasses.replace(GRAPH, outputs=(dataclasses.replace(GRAPH.outputs[0], type=gdnir.TensorType("f16", ("T",))), *GRAPH.outputs[1:])),
        "reads weights only": gdnir.parse(str(GRAPH).replace("  %out:", "  fold %out:")),
        "expected": gdnir.parse(str(GRAPH).replace("eps=1e-06}\n  %k", "eps=-1.0}\n  %k")),
    }  # fmt: skip
    for says, graph in faults.items():
        with pytest.raises(VerifyError, match=says):
            gdnir.verify(graph)


def test_enough_cases():
    assert len(OP_CASES) + len(SEQ_CASES) + len(PLAN_CASES) >= 80


def test_slot_outside_a_device_batch_is_padding_and_raises_a_flag():
    batch = dataclasses.replace(S.prefill([4, 2], slots=[0, 9]), max_slot=None, dense=False)
    owned = pool()
    out = PLAN(R(T, 16), owned.layer(0), batch)
    assert torch.equal(out[4:], torch.zeros(2, 16))
    assert out[:4].abs().sum() > 0
    with pytest.raises(SeqError, match="a slot >= S"):
        batch.raise_if_error()
