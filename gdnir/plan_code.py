"""A plan's nodes as one straight-line Python function: what a call costs beyond its kernels is what Python costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdnir.ir import Graph, Node, SeqType, StateType, TensorType, Value
from gdnir.lowering import Lowering
from gdnir.lowering.eager import prepared
from gdnir.op import lookup

Run = Callable[..., Any]


def straight_line(
    graph: Graph,
    inputs: Sequence[Value],
    lowerings: Sequence[tuple[Node, Lowering]],
    bound: Mapping[Value, Tensor],
    tick: Callable[[], None] | None = None,
) -> tuple[Run, str]:
    """The function of `inputs` (in that order) that calls the lowerings and returns the graph's outputs other than
    states, one bare or several as a tuple, and its source.

    Weights are bound by name, a value is dropped at its last use, a state stays where it is: its new version is the
    tensor that came in. `tick`, if given, is called after every node.
    """
    names: dict[Value, str] = {value: f"in{i}" for i, value in enumerate(inputs)}
    names |= {value: f"w{i}" for i, value in enumerate(bound)}
    scope: dict[str, Any] = {names[value]: tensor for value, tensor in bound.items()}
    kept = {*names.values(), "None"}
    last = {v: i for i, (node, _) in enumerate(lowerings) for v in node.operands if v is not None}
    final = [v for v in graph.outputs if not isinstance(v.type, StateType)]
    lines = [f"def run({', '.join(names[v] for v in inputs)}):"]
    for index, (node, lowering) in enumerate(lowerings):
        given = [("None" if v is None else names[v]) for v in node.operands]
        fresh = _name_results(node, names, index)
        scope[f"op{index}"] = partial(lowering.run, **dict(node.attrs)) if node.attrs else lowering.run
        arguments = list(given)
        if lowering.prepare is not None:
            scope[f"prepare_{index}"] = partial(prepared, lowering)
            slots = [slot.name for slot in lookup(node.op).slots(len(node.operands))]
            arguments.append(f"prepared=prepare_{index}({given[slots.index('seq')]})")
        targets = f"{', '.join(fresh)} = " if fresh else ""
        lines.append(f"    {targets}op{index}({', '.join(arguments)})")
        dead = [names[v] for v, i in last.items() if i == index and v not in final and names[v] not in kept]
        dead += [name for v, name in zip(node.results, (names[r] for r in node.results), strict=True)
                 if v not in last and v not in final and name in fresh]  # fmt: skip
        if dead:
            lines.append(f"    del {', '.join(sorted(set(dead)))}")
        if tick is not None:
            scope["tick"] = tick
            lines.append("    tick()")
    lines.append(f"    return {', '.join(names[v] for v in final) or 'None'}")
    source = "\n".join(lines) + "\n"
    exec(compile(source, f"<plan @{graph.name}>", "exec"), scope)  # noqa: S102 - built above, of our own names only
    run: Run = scope["run"]
    return run, source


def signature_of(graph: Graph, inputs: Sequence[Value]) -> Run:
    """The function of (tensors.., layer, seq) that gives what decides whether a call is right, but for token counts
    and slots: every tensor's dtype, device, strides and sizes after the first, the layer's own signature, the phase.

    Raises AttributeError or IndexError for what is no tensor, or has too few dimensions.
    """
    parts, names = ["grad()"], []
    for i, value in enumerate(inputs):
        name = f"in{i}"
        if isinstance(value.type, TensorType):
            parts += [f"{name}.{fact}" for fact in ("dtype", "device", "dim()", "stride()", "requires_grad")]
            parts += [f"{name}.size({d})" for d in range(1, len(value.type.shape))]  # shape[1:] costs as much as all
        elif isinstance(value.type, SeqType):
            parts += [f"{name}.phase", f"{name}.cu_seqlens.device"]
        elif "layer" in names:
            continue  # one layer object holds all states
        else:
            name = "layer"
            parts.append("layer.signature")
        names.append(name)
    scope: dict[str, Any] = {"grad": torch.is_grad_enabled}
    source = f"def signature({', '.join(names)}):\n    return ({', '.join(parts)},)\n"
    exec(compile(source, f"<signature of @{graph.name}>", "exec"), scope)  # noqa: S102 - as above
    run: Run = scope["signature"]
    return run


def _name_results(node: Node, names: dict[Value, str], index: int) -> list[str]:
    """Names for a node's results; a state's new version is the operand it came from. Gives those that are new."""
    op = lookup(node.op)
    slots = [slot.name for slot in op.slots(len(node.operands))]
    states = dict(op.contract.state_results())
    fresh = []
    for position, value in enumerate(node.results):
        if position in states:
            source = node.operands[slots.index(states[position].name)]
            names[value] = "None" if source is None else names[source]
        else:
            names[value] = f"v{index}_{position}"
            fresh.append(names[value])
    return fresh
