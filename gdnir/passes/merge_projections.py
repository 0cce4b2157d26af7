"""One matrix product for a layer's inputs instead of two."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdnir.ir import Graph, Node, TensorType, Value
from gdnir.lowering import NATIVE
from gdnir.lowering.choose import Target, choose
from gdnir.op import infer_node, lookup
from gdnir.passes.base import Pass, PassResult, register_pass


@register_pass
@dataclass(frozen=True)
class MergeProjections(Pass):
    """`in_proj(%x, @w_qkvz, @w_ba)`  ->  `fold %w = concat_rows(@w_qkvz, @w_ba); in_proj_merged(%x, %w)`.

    The second product has 2 HV rows: it reads x again and costs a launch. An in_proj that a provider other than native
    takes, or that the user names a provider for, stays as it is.
    """

    name = "merge-projections"

    def run(self, graph: Graph, target: Target) -> PassResult:
        bound = {*graph.weights, *(r for n in graph.nodes if n.folded for r in n.results)}
        nodes: list[Node] = []
        notes: list[str] = []
        for node in graph.nodes:
            reason = _declined(node, bound, target) if node.op == "in_proj" else "another op"
            if reason is None:
                nodes += _merged(node)
                notes.append("in_proj: two products became one")
            else:
                nodes.append(node)
                notes += [f"in_proj: {reason}"] if node.op == "in_proj" else []
        return PassResult(replace(graph, nodes=tuple(nodes)), tuple(notes))


def _declined(node: Node, bound: set[Value], target: Target) -> str | None:
    """None if the node may be merged, else why not."""
    if "in_proj" in target.providers:
        return "left alone, since a provider is requested for it."
    types = [v if v is None else v.type for v in node.operands]
    taken = choose(lookup("in_proj"), types, dict(node.attrs), target).provider
    if taken != NATIVE:
        return f"left to {taken}."
    if not all(v in bound for v in node.operands[1:]):
        return "its weights are not known when weights are bound."
    return None


def _merged(node: Node) -> list[Node]:
    x, *weights = node.operands
    draft = Node("concat_rows", tuple(weights), (Value("in_proj_merged", TensorType("f32", ())),), folded=True)
    packed = Value("in_proj_merged", infer_node(draft)[0])
    return [
        replace(draft, results=(packed,)),
        Node("in_proj_merged", (x, packed), node.results, node.attrs),
    ]
