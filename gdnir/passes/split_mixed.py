"""Cut the core of a mixed batch into its decode, verify and prefill parts, so that no kernel has to know mixing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gdnir.ir import Graph, Node, SeqType, StateType, TensorType, Type, Value
from gdnir.lowering.choose import Target
from gdnir.op import lookup
from gdnir.passes.base import Pass, PassResult, register_pass
from gdnir.seq import PARTS


@register_pass
@dataclass(frozen=True)
class SplitMixed(Pass):
    """`%o, %s.1 = rule(%q, %s, %seq)`  ->  one `rule` per part on `slice_tokens`, states threaded through, then
    `concat_tokens`. Ops named in `whole` (the projections) run once over all tokens."""

    name = "split-mixed"
    whole: tuple[str, ...] = ("in_proj", "in_proj_merged", "out_proj")

    def run(self, graph: Graph, target: Target) -> PassResult:
        seqs = [v for v in graph.inputs if isinstance(v.type, SeqType) and v.type.phase == "mixed"]
        if not seqs:
            return PassResult(graph, ("the batch is not mixed",))
        core = [n for n in graph.nodes if not n.folded and n.op not in self.whole]
        if any(n.op == "seq_part" for n in core):
            return PassResult(graph, ("already split",))
        return PassResult(_Split(graph, seqs[0], core).result(), (f"{len(core)} nodes became {len(PARTS)} parts",))


class _Split:
    def __init__(self, graph: Graph, seq: Value, core: list[Node]) -> None:
        self.graph, self.seq, self.core = graph, seq, core
        self.made = {r for n in core for r in n.results}
        self.nodes: list[Node] = []
        self.here: dict[tuple[str, Value], Value] = {}  # (part, whole value) -> that part of it
        self.state: dict[Value, Value] = {}  # a state of the whole graph -> its newest version

    def result(self) -> Graph:
        """Projections before the core, the parts one after the other, then everything that needs their results."""
        waiting = [n for n in self.graph.nodes if n not in self.core]
        inside = set(self.made)
        behind = []
        for node in waiting:
            if any(v in inside for v in node.operands):
                inside.update(node.results)
                behind.append(node)
            else:
                self.nodes.append(node)
        for part in PARTS:
            for node in self.core:
                self._clone(node, part)
        joined = {v: self._join(v) for v in dict.fromkeys(self._escaping(behind)) if not isinstance(v.type, StateType)}
        joined.update({v: self.state[v] for v in self.made if v in self.state})
        graph = replace(self.graph, nodes=(*self.nodes, *behind))
        return graph.replaced({k: v for k, v in joined.items() if k != v})

    def _escaping(self, behind: list[Node]) -> list[Value]:
        used = [v for n in behind for v in n.operands if v is not None]
        return [v for v in (*used, *self.graph.outputs) if v in self.made]

    def _clone(self, node: Node, part: str) -> None:
        operands = tuple(v if v is None else self._operand(v, part) for v in node.operands)
        results = []
        for result in node.results:
            fresh = Value(f"{result.name}.{part}", _narrow(result.type, part))
            if isinstance(result.type, StateType):
                self.state[result] = fresh
            self.here[part, result] = fresh
            results.append(fresh)
        # a state result carries the state operand of its contract on to the next part
        op = lookup(node.op)
        names = [slot.name for slot in op.slots(len(node.operands))]
        for position, slot in op.contract.state_results():
            source = node.operands[names.index(slot.name)]
            if source is not None:
                self.state[self._root(source)] = results[position]
        self.nodes.append(replace(node, operands=operands, results=tuple(results)))

    def _root(self, state: Value) -> Value:
        """The version of a state with which the core begins, in every part."""
        for node in reversed(self.core):
            if state in node.results:
                op = lookup(node.op)
                names = [slot.name for slot in op.slots(len(node.operands))]
                for position, slot in op.contract.state_results():
                    source = node.operands[names.index(slot.name)]
                    if node.results[position] == state and source is not None:
                        return self._root(source)
        return state

    def _operand(self, value: Value, part: str) -> Value:
        if isinstance(value.type, StateType):
            root = self._root(value)
            return self.state.get(root, root)
        if value.weight or (part, value) in self.here:
            return self.here.get((part, value), value)
        node: tuple[str, tuple[Value, ...]]
        if isinstance(value.type, SeqType):
            node = ("seq_part", (value,))
        elif isinstance(value.type, TensorType) and value.type.shape[:1] == (_tokens(self.seq),):
            node = ("slice_tokens", (value, self.seq))
        else:
            return value
        piece = Value(f"{value.name}.{part}", _narrow(value.type, part))
        self.nodes.append(Node(node[0], node[1], (piece,), (("part", part),)))
        self.here[part, value] = piece
        return piece

    def _join(self, value: Value) -> Value:
        whole = Value(f"{value.name}.joined", value.type)
        self.nodes.append(Node("concat_tokens", tuple(self.here[part, value] for part in PARTS), (whole,)))
        return whole


def _tokens(seq: Value) -> object:
    return seq.type.tokens if isinstance(seq.type, SeqType) else None


def _narrow(type_: Type, part: str) -> Type:
    """The type of one part of a value: T becomes T.part."""
    tokens = f"T.{part}"
    if isinstance(type_, SeqType):
        return SeqType(part, tokens)
    if isinstance(type_, TensorType) and type_.shape[:1] == ("T",):
        return TensorType(type_.dtype, (tokens, *type_.shape[1:]))
    return type_
