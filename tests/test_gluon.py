"""Where and on what the provider gluon takes gated_delta_rule, and what it says otherwise."""

import dataclasses

import pytest
import torch

import gdnir
from gdnir.ir import SeqType, StateType, TensorType
from gdnir.lowering import find, gluon_impl
from gdnir.platforms import get_platform

RULE = find("gated_delta_rule", "gluon")


def says(dtype="bf16", k=128, v=128, phase="prefill", layout="vk", scale=0.1, state="f32"):
    shape = ("S", 4, v, k) if layout == "vk" else ("S", 4, k, v)
    gate = TensorType("f32", ("T", 4))
    return RULE.accepts(
        TensorType(dtype, ("T", 2, k)), TensorType(dtype, ("T", 2, k)), TensorType(dtype, ("T", 4, v)), gate, gate,
        StateType(state, shape, layout), SeqType(phase, "T"), scale=scale, state_layout=layout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"state": "bf16"}, None),
        ({"phase": "decode"}, "the batch's phase is decode, want prefill."),
        ({"phase": "mixed"}, "the batch's phase is mixed, want prefill."),
        ({"dtype": "f16"}, None),
        ({"dtype": "f32"}, "q is f32 and v is f32, want bf16 or f16, both the same."),
        ({"k": 96}, "K is 96 and V is 128, want 128 and 128."),
        ({"v": 192}, "K is 128 and V is 192, want 128 and 128."),
        ({"layout": "kv"}, "the state's layout is kv, want vk."),
        ({"scale": -1.0}, "scale is -1.0, want a positive number: the kernel uses its logarithm."),
    ],
    ids=str,
)
def test_accepts(change, sentence):
    assert says(**change) == sentence


def test_available(monkeypatch):
    hopper = get_platform("cuda:sm_90")
    assert RULE.available(hopper) is None
    for name in ("cuda:sm_80", "cuda:sm_100", "rocm:gfx942", "cpu"):
        assert RULE.available(get_platform(name)).endswith(f"cuda:sm_90; this platform is {name}.")
    assert "pip install" in RULE.available(dataclasses.replace(hopper, software=frozenset()))
    here = dataclasses.replace(hopper, detected=True)
    monkeypatch.setattr(gluon_impl, "_gluon_is_installed", lambda: False)
    assert RULE.available(here) == "the installed Triton has no Gluon for Hopper; Triton 3.6 has it."


def test_a_batch_that_is_too_large_is_refused():
    count = 2**19
    seq = gdnir.Seq.from_tensors(
        "prefill",
        torch.zeros(count + 1, dtype=torch.int32),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, 1, dtype=torch.int32),
        torch.zeros(count, dtype=torch.bool),
        num_tokens=0,
        max_len=0,
    )
    q, v = torch.empty(0, 16, 128, dtype=torch.bfloat16), torch.empty(0, 16, 128, dtype=torch.bfloat16)
    g = torch.empty(0, 16)
    with pytest.raises(gdnir.errors.ShapeError, match="2\\^23 chunks x heads"):
        RULE.run(q, q, v, g, g, torch.empty(1, 16, 128, 128), seq, scale=0.1, state_layout="vk")
