"""Turn regions that equal a fused op's body into that one op, where a provider other than native takes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from gdnir.errors import LoweringError
from gdnir.ir import Graph, Node
from gdnir.lowering import NATIVE
from gdnir.lowering.choose import Refusal, Target, candidates, no_provider, refusal
from gdnir.op import OPS, Op, lookup
from gdnir.passes.base import Pass, PassResult, register_pass
from gdnir.passes.match import Match, body_pattern, descendants, matches


@register_pass
@dataclass(frozen=True)
class Fuse(Pass):
    """`%y = f(%x); %z = g(%y)`  ->  `%z = fg(%x)`. `op` limits the pass to one fused op; largest bodies go first.

    A region stays as it is if an inner value has a user outside, if it is not convex, if only native would
    take it, or if the user's list for one of its ops prefers another provider. Each decline is a note.
    """

    name = "fuse"
    op: str | None = None

    def run(self, graph: Graph, target: Target) -> PassResult:
        ops = [lookup(self.op)] if self.op is not None else [op for op in OPS.values() if op.fused]
        found = [(op, len(_body_ops(op))) for op in ops if op.fused]
        notes: list[str] = []
        for op, _ in sorted(found, key=lambda item: -item[1]):
            graph = _fuse_all(op, graph, target, notes)
        counts = Counter(notes)
        return PassResult(graph, tuple(note if n == 1 else f"{note} ({n} regions)" for note, n in counts.items()))


def _body_ops(op: Op) -> list[str]:
    return [node.op for node in body_pattern(op).nodes]


def _fuse_all(op: Op, graph: Graph, target: Target, notes: list[str]) -> Graph:
    declined: set[frozenset[int]] = set()
    while True:
        match = next((m for m in matches(op, graph) if m.region not in declined), None)
        if match is None:
            if not declined and op.name in target.providers and not any(n.op == op.name for n in graph.nodes):
                raise LoweringError(
                    f"{op.name}: requested from {', '.join(target.providers[op.name])}, but graph @{graph.name} has no "
                    f"region that equals its body ({', '.join(_body_ops(op))}). Drop the request."
                )
            return graph
        reason = match.blocked(graph) or _untaken(match, graph, target)
        if reason is None:
            fused = _replace(graph, match)
            notes.append(f"{op.name}: {len(match.region)} nodes became one")
            graph, declined = fused, set()
        else:
            declined.add(match.region)
            notes.append(f"{op.name}: {reason}")
            if op.name in target.providers and NATIVE not in target.providers[op.name]:
                raise LoweringError(
                    f"{op.name}: requested from {', '.join(target.providers[op.name])}, but {reason} Drop the request."
                )


def _untaken(match: Match, graph: Graph, target: Target) -> str | None:
    """None if a provider takes the region, else why none does."""
    types = [v if v is None else v.type for v in match.operands]
    inner = [graph.nodes[i] for i in sorted(match.region)]
    refusals = []
    for provider in candidates(match.op, target):
        if provider == NATIVE:
            continue
        reason = refusal(match.op, provider, types, match.attrs, target) or _overruled(provider, inner, target)
        if reason is None:
            return None
        refusals.append(Refusal(provider, reason))
    if match.op.name in target.providers and refusals:
        return no_provider(match.op.name, refusals, True, target)
    return (
        "no provider other than native takes it"
        + "".join(f"; {r.provider}: {r.reason.rstrip('.')}" for r in refusals)
        + "."
    )


def _overruled(provider: str, inner: list[Node], target: Target) -> str | None:
    """The sentence if a user's list for an op inside the region rules the provider out or prefers another."""
    for node in inner:
        wanted = target.providers.get(node.op)
        if wanted is None:
            continue
        if provider not in wanted:
            return f"the request for {node.op} ({', '.join(wanted)}) leaves {provider} out."
        for better in wanted[: wanted.index(provider)]:
            types = [v if v is None else v.type for v in node.operands]
            if refusal(lookup(node.op), better, types, dict(node.attrs), target) is None:
                return f"the request for {node.op} prefers {better}."
    return None


def _replace(graph: Graph, match: Match) -> Graph:
    """One node in place of the region: what feeds it goes before, what depends on it after."""
    node = Node(match.op.name, match.operands, match.results, tuple(match.attrs.items()))
    last, after = max(match.region), descendants(graph, match.region)
    rest = [(i, n) for i, n in enumerate(graph.nodes) if i not in match.region]
    before = [n for i, n in rest if i < last and i not in after]
    behind = [n for i, n in rest if i > last or i in after]
    return replace(graph, nodes=(*before, node, *behind))
