"""Beside transformers' own layers: same checkpoint (written by save_pretrained), same input, both against float64."""

import copy

import pytest
import torch

import gdnir
from gdnir import oracle
from gdnir.models import load_weights, trace

transformers = pytest.importorskip("transformers")
LENGTHS = (1, 3, 63, 64, 65, 200)
BASE = dict(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    intermediate_size=64,
    max_position_embeddings=512,
)
GDN = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=48)
MOE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)


def _model(name):
    if name == "qwen3_next":
        return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**BASE, **GDN, **MOE))
    if name == "qwen3_5":
        return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**BASE, **GDN))
    if name == "qwen3_5_moe":
        return transformers.Qwen3_5MoeForCausalLM(transformers.Qwen3_5MoeTextConfig(**BASE, **GDN, **MOE))
    olmo = {k: v for k, v in BASE.items() if k != "head_dim"} | dict(
        num_key_value_heads=4, pad_token_id=0, eos_token_id=1
    )
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**olmo))


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"])
def case(request, tmp_path_factory):
    """(transformers' layer, our plans, pool maker, oracle) over one checkpoint folder; layer 1, to test the index."""
    torch.manual_seed(0)
    model = _model(request.param).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attn" in name and parameter.dim() == 1 and "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "linear_attn" in name and parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    config = gdnir.models.config(folder)
    weights = load_weights(folder, layer=1)
    graphs = {p: trace(config, phase=p, dtype=torch.float32) for p in ("prefill", "decode")}
    plans = {p: gdnir.Plan(gdnir.lower(g, "cpu"), weights) for p, g in graphs.items()}
    layers = model.model.layers if hasattr(model.model, "layers") else model.model.language_model.layers
    return model, layers[1].linear_attn, config, weights, graphs, plans


def _pool(config, slots=1):
    return gdnir.StatePool(config, slots=slots, conv_dtype=torch.float32, layers=[1])


def _reference(config, weights, graph, x):
    pool = _pool(config)
    return oracle.run(graph, weights, [x], list(pool.layer(1)), gdnir.Seq.prefill([x.shape[0]], slots=[0]))[0][0]


def _worst(out, reference):
    return float(oracle.row_error(out, reference).max())


def _bar(theirs):
    return max(1e-5, 1.5 * theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill(case, length):
    model, layer, config, weights, graphs, plans = case
    torch.manual_seed(length)
    x = torch.randn(length, config.hidden_size)
    reference = _reference(config, weights, graphs["prefill"], x)
    with torch.no_grad():
        theirs = layer(x[None])[0]
        ours = plans["prefill"](x, _pool(config).layer(1), gdnir.Seq.prefill([length], slots=[0]))
    assert _worst(theirs, reference) < 1e-3, "the oracle and transformers compute different functions"
    assert _worst(ours, reference) <= _bar(_worst(theirs, reference))


@pytest.mark.parametrize("length", [3, 64, 65])
def test_decode_continues_prefill(case, length):
    model, layer, config, weights, graphs, plans = case
    torch.manual_seed(length)
    x, pool, steps = torch.randn(length + 5, config.hidden_size), _pool(config), 5
    reference = _reference(config, weights, graphs["prefill"], x)
    cache = transformers.DynamicCache(config=copy.deepcopy(model.config))
    with torch.no_grad():
        theirs, ours = (
            [layer(x[None, :length], cache_params=cache)[0]],
            [plans["prefill"](x[:length], pool.layer(1), gdnir.Seq.prefill([length], slots=[0]))],
        )
        for t in range(length, length + steps):
            theirs.append(layer(x[None, t : t + 1], cache_params=cache)[0])
            ours.append(plans["decode"](x[t : t + 1], pool.layer(1), gdnir.Seq.decode([0])))
    assert _worst(torch.cat(theirs), reference) < 1e-3
    assert _worst(torch.cat(ours), reference) <= _bar(_worst(torch.cat(theirs), reference))


def test_packed_equals_one_by_one(case):
    model, layer, config, weights, graphs, plans = case
    torch.manual_seed(7)
    x, pool = torch.randn(sum(LENGTHS), config.hidden_size), _pool(config, slots=len(LENGTHS))
    ours = plans["prefill"](x, pool.layer(1), gdnir.Seq.prefill(list(LENGTHS), slots=list(range(len(LENGTHS)))))
    start = 0
    for length in LENGTHS:
        piece = x[start : start + length]
        reference = _reference(config, weights, graphs["prefill"], piece)
        with torch.no_grad():
            theirs = _worst(layer(piece[None])[0], reference)
        assert _worst(ours[start : start + length], reference) <= _bar(theirs)
        start += length


def test_config_of_the_checkpoint(case):
    model, layer, config, *_ = case
    assert config.channels == layer.conv1d.weight.shape[0]
    assert 1 in config.layers and 3 not in config.layers


def test_full_attention_layer_is_refused(case, tmp_path):
    model, *_ = case
    model.save_pretrained(tmp_path)
    with pytest.raises(gdnir.GdnirError, match="expected a GDN layer"):
        load_weights(tmp_path, layer=3)
