"""Give every node a provider."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdnir.errors import LoweringError
from gdnir.ir import Graph, Node, Value, quote
from gdnir.lowering import NATIVE
from gdnir.lowering.choose import Choice, Target, choose
from gdnir.op import lookup
from gdnir.passes.base import Pass, PassResult, register_pass


@register_pass
@dataclass(frozen=True)
class Lower(Pass):
    """`%y = f(%x)`  ->  `%y = f@provider(%x)`; a fused op that falls to native becomes the ops of its body.

    The provider is `gdnir.lowering.choose`'s, with its reasons. Folded nodes run once, in torch.
    """

    name = "lower"

    def run(self, graph: Graph, target: Target) -> PassResult:
        missing = [
            op for op in target.providers if not lookup(op).fused and not any(_contains(n, op) for n in graph.nodes)
        ]
        if missing:
            raise LoweringError(
                f"{missing[0]}: providers were requested for it, but graph @{quote(graph.name)} has no such node. "
                f"Its ops: {', '.join(sorted({n.op for n in graph.nodes}))}."
            )
        nodes: list[Node] = []
        choices: list[Choice] = []
        table: dict[Value, Value] = {}
        for node in graph.nodes:
            _lower(
                replace(node, operands=tuple(v if v is None else table.get(v, v) for v in node.operands)),
                target,
                nodes,
                choices,
                table,
            )
        outputs = tuple(table.get(v, v) for v in graph.outputs)
        return PassResult(replace(graph, nodes=tuple(nodes), outputs=outputs), (), tuple(choices))


def _contains(node: Node, op: str) -> bool:
    """Whether the node is `op`, or a region that holds it."""
    outer = lookup(node.op)
    if node.op == op or not outer.fused:
        return node.op == op
    return any(
        n.op == op for n in outer.expand([v if v is None else v.type for v in node.operands], dict(node.attrs)).nodes
    )


def _lower(node: Node, target: Target, nodes: list[Node], choices: list[Choice], table: dict[Value, Value]) -> None:
    op = lookup(node.op)
    types = [v if v is None else v.type for v in node.operands]
    if node.folded:
        nodes.append(replace(node, provider=NATIVE))
        choices.append(Choice(node.op, NATIVE, "runs once, when weights are bound"))
        return
    choice = choose(op, types, dict(node.attrs), target)
    if not (op.fused and choice.provider == NATIVE):
        nodes.append(replace(node, provider=choice.provider))
        choices.append(choice)
        return
    body = op.expand(types, dict(node.attrs))
    given = iter(v for v in node.operands if v is not None)
    inner: dict[Value, Value] = {v: next(given) for v in body.inputs}
    for step in body.nodes:
        results = tuple(replace(r, name=f"{node.results[0].name}.{op.name}.{r.name}") for r in step.results)
        inner.update(zip(step.results, results, strict=True))
        _lower(
            replace(step, operands=tuple(v if v is None else inner[v] for v in step.operands), results=results),
            target,
            nodes,
            choices,
            inner,
        )
    table.update(zip(node.results, (inner[v] for v in body.outputs), strict=True))
