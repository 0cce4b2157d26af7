"""Bind weights: put them where and as the graph wants them, and do the folded work once for all plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gdnir.errors import WeightsError
from gdnir.ir import DTYPES, Graph, Node, TensorType, Value, attr_text
from gdnir.lowering import find
from gdnir.lowering.eager import call
from gdnir.weights import Weights


def bind(graph: Graph, weights: Weights, device: torch.device) -> dict[Value, Tensor]:
    """Weights on the device in the graph's dtypes, folded nodes computed; only what unfolded nodes read is kept."""
    key: dict[Value, str] = {}
    made: dict[Value, Callable[[], Tensor]] = {}
    for value in graph.weights:
        if value.name not in weights:
            raise WeightsError(
                f"plan @{graph.name}",
                value.name,
                expected=str(value.type),
                got=f"no such weight in {weights.source}",
                hint=f"It has: {', '.join(weights)}.",
            )
        tensor, declared = weights[value.name], value.type
        if (
            not isinstance(declared, TensorType)
            or tuple(tensor.shape) != declared.shape
            or not tensor.is_floating_point()
        ):
            raise WeightsError(
                f"plan @{graph.name}", value.name, expected=str(declared), got=f"{tensor.dtype} {list(tensor.shape)}"
            )
        key[value] = f"{value}:{declared.dtype}:{device}"
        made[value] = partial(_place, tensor, DTYPES[declared.dtype], device)
    for node in graph.nodes:
        if not node.folded:
            continue
        attrs = ",".join(f"{name}={attr_text(value)}" for name, value in node.attrs)
        text = f"{node.op}({','.join('none' if v is None else key[v] for v in node.operands)}){{{attrs}}}"
        for position, value in enumerate(node.results):
            key[value] = f"{text}#{position}"
            operands = [None if v is None else made[v] for v in node.operands]
            made[value] = partial(_fold, node, operands, position)
    used = {v for n in graph.nodes if not n.folded for v in n.operands if v is not None} | set(graph.outputs)
    return {v: weights.once(key[v], made[v]) for v in made if v in used}


def _place(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=dtype).contiguous()


def _fold(node: Node, operands: Sequence[Callable[[], Tensor] | None], position: int) -> Tensor:
    with torch.no_grad():
        results = call(
            find(node.op, node.provider or ""),
            [None if make is None else make() for make in operands],
            dict(node.attrs),
        )
    result: Tensor = results[position]
    return result.contiguous()
