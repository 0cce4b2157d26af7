"""Mark the work that depends on weights alone, so that binding does it once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdnir.ir import Graph
from gdnir.lowering.choose import Target
from gdnir.passes.base import Pass, PassResult, register_pass


@register_pass
@dataclass(frozen=True)
class FoldWeights(Pass):
    """`%w = permute_rows(@w0)`  ->  `fold %w = permute_rows(@w0)`, run when the plan binds its weights."""

    name = "fold-weights"

    def run(self, graph: Graph, target: Target) -> PassResult:
        bound = set(graph.weights)
        nodes = []
        for node in graph.nodes:
            operands = [v for v in node.operands if v is not None]
            folded = bool(operands) and all(v in bound for v in operands)
            if folded:
                bound.update(node.results)
            nodes.append(replace(node, folded=folded))
        count = sum(n.folded for n in nodes)
        return PassResult(
            replace(graph, nodes=tuple(nodes)), (f"{count} of {len(nodes)} nodes run when weights are bound",)
        )
