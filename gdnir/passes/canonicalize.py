"""Remove what is computed twice and what nobody uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdnir.ir import Graph, Node, StateType, Value
from gdnir.lowering.choose import Target
from gdnir.passes.base import Pass, PassResult, register_pass


def _touches_state(node: Node) -> bool:
    return any(isinstance(v.type, StateType) for v in node.operands if v is not None)


@register_pass
@dataclass(frozen=True)
class Canonicalize(Pass):
    """`%a = f(%x); %b = f(%x); g(%a, %b)`  ->  `%a = f(%x); g(%a, %a)`; nodes without users go.

    A node that takes a state stays: states are linear, so it cannot be a duplicate, and its update is a use.
    """

    name = "canonicalize"

    def run(self, graph: Graph, target: Target) -> PassResult:
        first: dict[tuple[object, ...], Node] = {}
        table: dict[Value, Value] = {}
        kept: list[Node] = []
        for node in graph.nodes:
            node = replace(node, operands=tuple(v if v is None else table.get(v, v) for v in node.operands))
            key = (node.op, node.operands, repr(node.attrs), node.provider, node.folded)
            if key in first and not _touches_state(node):
                table.update(zip(node.results, first[key].results, strict=True))
            else:
                first[key] = node
                kept.append(node)
        outputs = tuple(table.get(v, v) for v in graph.outputs)
        used = set(outputs)
        alive: list[Node] = []
        for node in reversed(kept):
            if _touches_state(node) or any(r in used for r in node.results):
                used.update(v for v in node.operands if v is not None)
                alive.append(node)
        result = replace(graph, nodes=tuple(reversed(alive)), outputs=outputs)
        same, dead = len(graph.nodes) - len(kept), len(kept) - len(alive)
        return PassResult(result, (f"{same} duplicates merged, {dead} dead nodes removed",))
