"""What a traced graph should give, in float64 and token by token: the judge of every provider.

The ops are `gdnir/oracle_ops.py`'s, which share no code with the native lowerings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdnir import oracle_ops
from gdnir.errors import LoweringError
from gdnir.ir import DTYPES, Graph, SeqType, StateType, TensorType, Value
from gdnir.op import lookup
from gdnir.seq import Seq


def _permute_rows(weight: Tensor, *, groups: int, splits: Sequence[int]) -> Tensor:
    """Row by row: piece p of every group, then piece p + 1."""
    rows, size = [], sum(splits)
    for start, count in zip([sum(splits[:p]) for p in range(len(splits))], splits, strict=True):
        rows += [weight[group * size + start + i] for group in range(groups) for i in range(count)]
    return torch.stack(rows)


def _zero_padding(z: Tensor, seq: Seq) -> Tensor:
    out = torch.zeros_like(z)
    bounds = seq.cu_seqlens.tolist()
    for n, slot in enumerate(seq.read_slots.tolist()):
        if slot >= 0:
            out[bounds[n] : bounds[n + 1]] = z[bounds[n] : bounds[n + 1]]
    return out


_ORACLES: dict[str, Callable[..., Any]] = {
    "permute_rows": _permute_rows,
    "concat_rows": lambda *weights: torch.cat(weights),
    "zero_padding": _zero_padding,
}


def run(
    graph: Graph, weights: Mapping[str, Tensor], tensors: Sequence[Tensor], states: Sequence[Tensor], seq: Seq | None
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, states) of a traced, unlowered graph in float64 on the CPU; the arguments stay untouched.

    `tensors` and `states` are the graph's tensor and state inputs in order. Weights are first rounded to the
    graph's dtypes, as a plan rounds them. Raises LoweringError for an op that has no oracle.
    """
    given = {"tensor": iter(tensors), "state": iter(states)}
    env: dict[Value, Any] = {}
    for value in graph.inputs:
        if isinstance(value.type, SeqType):
            env[value] = seq
        else:
            env[value] = (
                next(given["state" if isinstance(value.type, StateType) else "tensor"]).detach().cpu().double().clone()
            )
    for value in graph.weights:
        assert isinstance(value.type, TensorType)
        env[value] = weights[value.name].detach().cpu().to(DTYPES[value.type.dtype]).double()
    for node in graph.nodes:
        op = lookup(node.op)
        oracle = _ORACLES.get(node.op, getattr(oracle_ops, node.op, None))
        if oracle is None or node.provider is not None:
            raise LoweringError(f"{node.op}: the oracle takes traced graphs of the core vocabulary, before lowering.")
        names = [slot.name for slot in op.slots(len(node.operands))]
        operands = [None if v is None else env[v] for v in node.operands]
        results = _over_parts(oracle, operands, names, dict(node.attrs))
        fresh = iter(results if isinstance(results, tuple) else (results,))
        kept = {position: operands[names.index(slot.name)] for position, slot in op.contract.state_results()}
        for position, value in enumerate(node.results):
            env[value] = kept[position] if position in kept else next(fresh)
    outputs = [env[v] for v in graph.outputs if not isinstance(v.type, StateType)]
    return outputs, [env[v] for v in graph.outputs if isinstance(v.type, StateType)]


def _over_parts(oracle: Callable[..., Any], operands: list[Any], names: list[str], attrs: Mapping[str, Any]) -> Any:
    """The oracle on each part of a mixed batch, results joined."""
    batch = next((x for x in operands if isinstance(x, Seq)), None)
    if batch is None or batch.phase != "mixed":
        return oracle(*operands, **attrs)
    pieces = []
    for part in batch.parts:
        at = batch.part_tokens(part.phase)
        cut = [
            part if isinstance(x, Seq) else x[at] if n in ("qkv", "q", "k", "v", "g", "beta", "z") else x
            for n, x in zip(names, operands, strict=True)
        ]
        pieces.append(oracle(*cut, **attrs))
    return torch.cat(pieces)


def row_error(out: Tensor, reference: Tensor) -> Tensor:
    """||out - reference|| / ||reference|| over the last dimension, row by row; rows of norm 0 count absolutely.

    NaN where only one of the two is finite. A norm over everything would hide a wrong row.
    """
    reference = reference.double()
    difference = torch.linalg.vector_norm(out.double().to(reference.device) - reference, dim=-1)
    norm = torch.linalg.vector_norm(reference, dim=-1)
    error: Tensor = difference / torch.where(norm > 0, norm, 1)
    return error
