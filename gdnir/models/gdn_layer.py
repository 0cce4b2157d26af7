"""The Gated Delta Net layer, written once, in ops."""

from __future__ import annotations

from typing import Any, Literal

import torch

from gdnir import ops
from gdnir.errors import ArgumentError, DTypeError
from gdnir.ir import Graph, SeqType, StateType, TensorType, dtype_name
from gdnir.models.config import family
from gdnir.models.family import GdnConfig
from gdnir.op import tracing

PHASES = ("prefill", "decode", "verify", "mixed")


def trace(
    config: GdnConfig,
    *,
    phase: Literal["prefill", "decode", "verify", "mixed"] = "prefill",
    region: Literal["layer", "core"] = "layer",
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    state_layout: ops.StateLayout = "vk",
    conv_layout: ops.ConvLayout = "cw",
) -> Graph:
    """The graph of one GDN layer of `config`.

    `region="layer"` takes x[T, D]; `"core"` begins after the input projections (qkv, z, b, a) and ends before
    the output projection, for whoever keeps those. Symbols: T tokens, S pool slots. Weights that stay f32
    whatever `dtype` is: A_log, dt_bias. Raises ArgumentError or DTypeError.
    """
    for name, value, known in (("phase", phase, PHASES), ("region", region, ("layer", "core")),
                               ("state_layout", state_layout, ("vk", "kv")), ("conv_layout", conv_layout, ("cw", "wc"))):  # fmt: skip
        if value not in known:
            raise ArgumentError("trace", name, expected=" or ".join(map(repr, known)), got=repr(value))
    for name, given, allowed in (("dtype", dtype, (torch.bfloat16, torch.float16, torch.float32)),
                                 ("state_dtype", state_dtype, (torch.float32, torch.bfloat16))):  # fmt: skip
        if given not in allowed:
            raise DTypeError("trace", name, expected=" or ".join(map(str, allowed)), got=str(given))
    h, hv, k, v = config.heads
    d, c, w = config.hidden_size, config.channels, config.conv_width
    act = dtype_name(dtype)
    with tracing() as recorder:

        def tensor(name: str, *shape: int | str) -> Any:
            return recorder.value(name, TensorType(act, shape))

        acts = [tensor("x", "T", d)] if region == "layer" else [
            tensor("qkv", "T", c), tensor("z", "T", hv, v), tensor("b", "T", hv), tensor("a", "T", hv)]  # fmt: skip
        conv = recorder.value(
            "conv", StateType(act, ("S", c, w - 1) if conv_layout == "cw" else ("S", w - 1, c), conv_layout)
        )
        ssm = recorder.value(
            "ssm",
            StateType(
                dtype_name(state_dtype), ("S", hv, v, k) if state_layout == "vk" else ("S", hv, k, v), state_layout
            ),
        )
        seq = recorder.value("seq", SeqType(phase))
        kind = family(config)
        weights = {
            spec.name: recorder.value(spec.name, TensorType("f32" if spec.f32 else act, spec.shape), weight=True)
            for spec in kind.specs(config)
        }
        w_qkvz, w_ba, w_conv, w_norm, w_out = kind.flat(config, weights)
        qkv, z, b, a = acts if region == "core" else ops.in_proj(acts[0], w_qkvz, w_ba, heads=config.heads)
        y, conv_out = ops.causal_conv1d(
            qkv, w_conv, None, conv, seq, activation=config.activation, conv_layout=conv_layout
        )
        q, key, value = ops.split_qkv(y, heads=config.heads)
        g, beta = ops.gdn_gate(a, b, weights["A_log"], weights["dt_bias"], allow_neg_eigval=config.allow_neg_eigval)
        o, ssm_out = ops.gated_delta_rule(
            ops.l2norm(q), ops.l2norm(key), value, g, beta, ssm, seq, scale=k**-0.5, state_layout=state_layout
        )
        out = ops.gated_rmsnorm(o, ops.zero_padding(z, seq), w_norm, eps=config.eps, activation=config.gate)
        if region == "layer":
            out = ops.out_proj(out, w_out)
    inputs = (*acts, conv, ssm, seq)
    nodes = tuple(recorder.nodes)
    used = {v for n in nodes for v in n.operands}
    bound = tuple(t.value for t in weights.values())
    if region == "core":  # the projections' weights, and what only prepares them, belong to the caller
        wanted = {x.value for x in (w_conv, w_norm)}
        nodes = tuple(n for n in nodes if n.op not in ("permute_rows", "concat_rows") or set(n.results) & wanted)
        used = {v for n in nodes for v in n.operands}
        bound = tuple(v for v in bound if v in used)
    name = f"{config.family}.gdn" if region == "layer" else f"{config.family}.gdn.core"
    return Graph(name, tuple(x.value for x in inputs), bound, nodes, (out.value, conv_out.value, ssm_out.value))
