"""Find where a graph computes a fused op's body: unification, node by node, with backtracking.

Argument order is meaning, so this is unification and not subgraph isomorphism. The body's attributes and
operands are parameters that the match binds; an optional operand may bind to none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gdnir.errors import InputError
from gdnir.ir import Attr, Graph, Node, TensorType, Value
from gdnir.op import Op, Param, Recorder, Traced


@dataclass(frozen=True)
class Match:
    """A region that equals a fused op's body: node indices, and what each operand, attribute and result is."""

    op: Op
    region: frozenset[int]
    operands: tuple[Value | None, ...]
    attrs: dict[str, Attr]
    results: tuple[Value, ...]

    def blocked(self, graph: Graph) -> str | None:
        """None if the region can become one node, else the sentence that says what is in the way."""
        inner = [r for i in sorted(self.region) for r in graph.nodes[i].results if r not in self.results]
        for value in inner:
            for user in graph.users(value):
                if user not in self.region:
                    name = graph.nodes[user].op if user < len(graph.nodes) else "the graph's return"
                    return f"{value} is also used by {name}, outside the region."
        after = descendants(graph, self.region)
        for index in self.region:
            for operand in graph.nodes[index].operands:
                maker = _maker(graph, operand)
                if maker in after and maker not in self.region:
                    return f"{operand} comes from outside the region but depends on it."
        return None


def descendants(graph: Graph, region: frozenset[int]) -> set[int]:
    """Indices of nodes outside `region` that depend on it."""
    values = {r for i in region for r in graph.nodes[i].results}
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if index not in region and any(v in values for v in node.operands):
            found.add(index)
            values.update(node.results)
    return found


def _maker(graph: Graph, value: Value | None) -> int | None:
    return next((i for i, n in enumerate(graph.nodes) if value in n.results), None)


@dataclass(frozen=True)
class Pattern:
    """A fused op's body to be matched."""

    inputs: dict[Value, int]  # the body's operands and their positions
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]


@functools.cache
def body_pattern(op: Op) -> Pattern:
    """The body, traced without types, its attributes standing for themselves."""
    recorder = Recorder(typed=False)
    slots = op.contract.operands
    operands = [recorder.value(slot.name, TensorType("f32", ())) for slot in slots]
    results = (op.body or op)(*operands, **{spec.name: Param(spec.name) for spec in op.attrs})
    outputs: tuple[Traced, ...] = results if isinstance(results, tuple) else (results,)
    return Pattern({x.value: i for i, x in enumerate(operands)}, tuple(recorder.nodes), tuple(r.value for r in outputs))


@dataclass(frozen=True)
class _Bound:
    values: Mapping[Value, Value | None]
    attrs: Mapping[str, Attr]
    region: frozenset[int]


def matches(op: Op, graph: Graph) -> Iterator[Match]:
    """Every place where `graph` computes the body of `op`, first come first; types must fit the contract."""
    pattern = body_pattern(op)
    for bound in _search(pattern, 0, op, graph, _Bound({}, {}, frozenset())):
        given = {spec.name: bound.attrs.get(spec.name, spec.default) for spec in op.attrs}
        operands: list[Value | None] = [None] * len(pattern.inputs)
        for value, position in pattern.inputs.items():
            operands[position] = bound.values.get(value)
        results = tuple(v for o in pattern.outputs if (v := bound.values[o]) is not None)
        attrs = op.normal(given)
        try:
            types = op.infer([v if v is None else v.type for v in operands], attrs)
        except InputError:
            continue  # parts of the body that share no value must still agree, in their tokens for one
        if types == tuple(v.type for v in results):
            yield Match(op, bound.region, tuple(operands), attrs, results)


def _search(pattern: Pattern, at: int, op: Op, graph: Graph, bound: _Bound) -> Iterator[_Bound]:
    if at == len(pattern.nodes):
        yield bound
        return
    wanted = pattern.nodes[at]
    known = [
        v
        for p in wanted.operands
        if p is not None and p not in pattern.inputs and (v := bound.values.get(p)) is not None
    ]
    places = graph.users(known[0]) if known else range(len(graph.nodes))
    for index in dict.fromkeys(places):
        if index < len(graph.nodes) and index not in bound.region:
            further = _unify(wanted, graph.nodes[index], index, pattern, op, bound)
            if further is not None:
                yield from _search(pattern, at + 1, op, graph, further)


def _unify(wanted: Node, node: Node, index: int, pattern: Pattern, op: Op, bound: _Bound) -> _Bound | None:
    if wanted.op != node.op or len(wanted.operands) != len(node.operands) or node.folded or node.provider is not None:
        return None
    values, attrs = dict(bound.values), dict(bound.attrs)
    for expected, actual in zip(wanted.operands, node.operands, strict=True):
        if expected is None:
            if actual is not None:
                return None
        elif expected in values:
            if values[expected] != actual:
                return None
        elif expected in pattern.inputs:
            if actual is None and not op.contract.operands[pattern.inputs[expected]].optional:
                return None
            values[expected] = actual
        else:
            return None
    given = dict(node.attrs)
    for name, value in wanted.attrs:
        if isinstance(value, Param):
            if attrs.setdefault(value, given[name]) != given[name]:
                return None
        elif repr(given.get(name)) != repr(value):
            return None
    values.update(zip(wanted.results, node.results, strict=True))
    return _Bound(values, attrs, bound.region | {index})
