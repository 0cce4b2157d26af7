"""What a plan is beyond its results: one Python function, the same under torch.compile, open to any states."""

from dataclasses import replace

import pytest
import torch

import gdnir
from gdnir.lowering import LOWERINGS

CONFIG = gdnir.models.config(
    dict(model_type="qwen3_next", hidden_size=32, num_hidden_layers=4, linear_num_key_heads=1, linear_num_value_heads=2,
         linear_key_head_dim=16, linear_value_head_dim=16)
)  # fmt: skip
WEIGHTS = gdnir.models.random_weights(CONFIG)
SEQ = {"prefill": gdnir.Seq.prefill([5, 3], slots=[0, 1]), "decode": gdnir.Seq.decode([1, 0])}
RULE = """gdnir 1
graph @rule (
  %q: f32[T,1,4], %k: f32[T,1,4], %v: f32[T,2,4], %g: f32[T,2], %beta: f32[T,2], %s: state<f32[S,2,4,4], vk>, %seq: seq<decode>
) weights {} {
  %o: f32[T,2,4], %s.1: state<f32[S,2,4,4], vk> = gated_delta_rule(%q, %k, %v, %g, %beta, %s, %seq) {scale=0.5, state_layout="vk"}
  return %o, %s.1
}
"""


def _plan(phase):
    return gdnir.Plan(gdnir.lower(gdnir.models.trace(CONFIG, phase=phase, dtype=torch.float32), "cpu"), WEIGHTS)


def _layer():
    return gdnir.StatePool(CONFIG, slots=2, conv_dtype=torch.float32, layers=[0]).layer(0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_torch_compile_changes_no_bit(phase):
    plan, seq, mine, theirs = _plan(phase), SEQ[phase], _layer(), _layer()
    x = torch.randn(seq.num_tokens, CONFIG.hidden_size)
    with torch.no_grad():
        want = plan(x, mine, seq)
        got = torch.compile(plan, backend="aot_eager")(x, theirs, seq)
    assert torch.equal(got, want)
    assert torch.equal(theirs.ssm, mine.ssm) and torch.equal(theirs.conv, mine.conv)


def test_source_is_a_line_a_node_and_drops_values_at_their_last_use():
    plan = _plan("prefill")
    calls = [line for line in plan.source.splitlines() if "(" in line and not line.startswith("def ")]
    assert len(calls) == sum(not n.folded for n in plan.graph.nodes)
    names = {word for line in calls for word in line.partition("=")[0].replace(",", " ").split()}
    dropped = {w for line in plan.source.splitlines() if "del " in line for w in line.replace(",", " ").split()[1:]}
    returned = set(plan.source.splitlines()[-1].replace(",", " ").split()[1:])
    assert names - returned == dropped


def test_dump_says_what_batch_invariance_changes(monkeypatch):
    def alone(q, k, v, g, beta, state, seq, *, scale, state_layout):
        raise NotImplementedError

    def dump(promise, asked=True):
        monkeypatch.setitem(LOWERINGS["gated_delta_rule"], "native", replace(native, batch_invariant=promise))
        plan = gdnir.Plan(gdnir.lower(gdnir.parse(RULE), "cpu"), {}, batch_invariant=asked)
        assert str(gdnir.parse(plan.dump())) == str(plan.graph)
        return [line for line in plan.dump().splitlines()[1:] if line.startswith("#")]

    native = LOWERINGS["gated_delta_rule"]["native"]
    by = f"{__name__}.{alone.__qualname__}"
    assert dump(alone) == [f"# gated_delta_rule@native by {by}, which is batch-invariant"]
    assert dump(False) == ["# gated_delta_rule@native promises no batch invariance: sequences run one at a time"]
    assert dump(True) == dump(alone, asked=False) == dump(False, asked=False) == []


def test_timed_gives_the_same_and_a_time_for_every_node():
    plan, seq, one, other = _plan("decode"), SEQ["decode"], _layer(), _layer()
    x = torch.randn(2, CONFIG.hidden_size)
    with torch.no_grad():
        out, spans = plan.timed(x, one, seq)
        assert torch.equal(out, plan(x, other, seq))
    assert [n.op for n, _ in spans] == [n.op for n in plan.graph.nodes if not n.folded]
    assert all(seconds > 0 for _, seconds in spans)


def test_a_graph_with_one_state_takes_a_tuple_of_one():
    plan = gdnir.Plan(gdnir.lower(gdnir.parse(RULE), "cpu"), {})
    tensors = [torch.randn(2, *tail) for tail in ((1, 4), (1, 4), (2, 4), (2,), (2,))]
    state = torch.randn(3, 2, 4, 4)
    want, new = gdnir.ops.gated_delta_rule(*tensors, state, SEQ["decode"], scale=0.5)
    for _ in range(2):  # nothing of the first call's check is trusted by the second
        fresh = state.clone()
        assert torch.equal(plan(*tensors, (fresh,), SEQ["decode"]), want)
        assert torch.equal(fresh, new)
    with pytest.raises(gdnir.GdnirError, match="expected 1 states"):
        plan(*tensors, (state, state), SEQ["decode"])
    with pytest.raises(gdnir.GdnirError):
        plan(*tensors, (state[..., :3],), SEQ["decode"])


def test_more_than_one_call_shape_is_remembered_and_each_is_checked():
    plan, layer = _plan("decode"), _layer()
    with torch.no_grad():
        for count in (1, 2, 1, 2):
            assert plan(torch.randn(count, 32), layer, gdnir.Seq.decode(list(range(count)))).shape == (count, 32)
        for wrong in (torch.randn(2, 31), torch.randn(2, 32).double(), torch.randn(2, 1, 32), torch.randn(32), None, 3):
            with pytest.raises(gdnir.GdnirError):
                plan(wrong, layer, SEQ["decode"])
        with pytest.raises(gdnir.GdnirError, match="decode batch"):
            plan(torch.randn(8, 32), layer, SEQ["prefill"])
