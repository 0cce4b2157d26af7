"""Passes one by one: what each does to a graph, and what it declines with which words."""

import pytest
import torch

import gdnir
from gdnir.models import builtins, config, trace
from gdnir.passes.base import Pipeline

SMALL = gdnir.models.config(
    dict(model_type="qwen3_next", hidden_size=32, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4,
         linear_key_head_dim=16, linear_value_head_dim=16)
)  # fmt: skip


def _ops(lowered):
    return [n.op for n in lowered.graph.nodes]


@pytest.mark.parametrize("model", sorted(builtins()))
def test_merge_projections_makes_one_product(model):
    lowered = gdnir.lower(trace(config(model)), "cuda:sm_90")
    assert _ops(lowered).count("in_proj_merged") == 1 and "in_proj" not in _ops(lowered)
    merged = next(n for n in lowered.graph.nodes if n.op == "in_proj_merged")
    source = next(n for n in lowered.graph.nodes if merged.operands[1] in n.results)
    assert source.op == "concat_rows" and source.folded


def test_merged_projections_compute_the_same():
    weights, seq = gdnir.models.random_weights(SMALL), gdnir.Seq.prefill([5, 7], slots=[0, 1])
    graph, outs = trace(SMALL, dtype=torch.float32), []
    x = torch.randn(12, 32)
    for pipeline in ("fold-weights,lower", "fold-weights,merge-projections,lower"):
        layer = gdnir.StatePool(SMALL, slots=2, conv_dtype=torch.float32, layers=[0]).layer(0)
        outs.append(gdnir.Plan(gdnir.lower(graph, "cpu", pipeline=pipeline), weights)(x, layer, seq))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pipeline", "providers", "reason"),
    [
        ("fold-weights,merge-projections,lower", {"in_proj": ["native"]}, "a provider is requested"),
        ("merge-projections,fold-weights,lower", {}, "not known when weights are bound"),
    ],
)
def test_merge_projections_declines(pipeline, providers, reason):
    lowered = gdnir.lower(trace(SMALL), "cuda:sm_90", pipeline=pipeline, providers=providers)
    assert "in_proj" in _ops(lowered) and "in_proj_merged" not in _ops(lowered)
    assert any(reason in note for _, note in lowered.notes)


def test_the_core_has_nothing_to_merge():
    lowered = gdnir.lower(trace(SMALL, region="core"), "cuda:sm_90")
    assert "in_proj_merged" not in _ops(lowered)
    assert Pipeline.parse("merge-projections") == Pipeline.parse(str(Pipeline.parse("merge-projections")))
