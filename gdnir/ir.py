"""The IR: types, values, nodes, graphs, and what makes a graph legal.

Everything is a frozen dataclass; a graph is SSA: each value is defined once, before its uses, and recurrent
states are linear (each version of a state is used exactly once). `str()` of any of them is its text, which
`gdnir.parse` reads back to an equal object.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from gdnir.errors import InputError, VerifyError, closest

if TYPE_CHECKING:
    import networkx as nx

VERSION = 1
"""Version of the text format, printed in the header of every graph."""

Dim: TypeAlias = int | str
Attr: TypeAlias = "None | bool | int | float | str | tuple[Attr, ...]"

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "i64": torch.int64, "i32": torch.int32, "bool": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
_NAN = math.nan  # the one nan of all attributes, so that equality (which tests identity first) holds


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16`, and so on; the plain torch name for a dtype the IR has no word for."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def quote(name: str) -> str:
    """A name as text: bare if it is an identifier (dots allowed), else a JSON string."""
    return name if IDENTIFIER.fullmatch(name) else json.dumps(name)


def numberless(name: str) -> str:
    """A value's name without the numbers that made it unique: `conv` for `conv.1`."""
    return re.sub(r"(\.\d+)+$", "", name)


def dim_text(dim: Dim) -> str:
    """A dimension as text: a number, or a symbol's name."""
    return quote(dim) if isinstance(dim, str) else str(dim)


def _shaped(dtype: str, shape: tuple[Dim, ...]) -> str:
    return f"{dtype}[{','.join(map(dim_text, shape))}]"


def _check(dtype: str, shape: tuple[Dim, ...]) -> None:
    if dtype not in DTYPES:
        raise VerifyError(f"`{dtype}` is no element type. {closest(dtype, DTYPES)}")
    for dim in shape:
        if isinstance(dim, int) and dim < 0:
            raise VerifyError(f"a dimension is at least 0, got {dim} in {_shaped(dtype, shape)}.")


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dense tensor: element type and shape, whose dimensions are sizes or symbols (`T`, `S`)."""

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        _check(self.dtype, self.shape)

    def __str__(self) -> str:
        return _shaped(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class StateType:
    """A pool of recurrent states. The layout is part of the type and is never guessed from the shape."""

    dtype: str
    shape: tuple[Dim, ...]
    layout: str

    def __post_init__(self) -> None:
        _check(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"state<{_shaped(self.dtype, self.shape)}, {quote(self.layout)}>"


@dataclass(frozen=True, slots=True)
class SeqType:
    """The batch's metadata (`gdnir.Seq`): its phase, and the symbol that counts its tokens."""

    phase: str
    tokens: Dim = "T"

    def __str__(self) -> str:
        return (
            f"seq<{quote(self.phase)}>" if self.tokens == "T" else f"seq<{quote(self.phase)}, {dim_text(self.tokens)}>"
        )


Type: TypeAlias = TensorType | StateType | SeqType


@dataclass(frozen=True, slots=True)
class Value:
    """A named, typed value. Weights print as `@name`, everything else as `%name`."""

    name: str
    type: Type
    weight: bool = False

    def __str__(self) -> str:
        return f"{'@' if self.weight else '%'}{quote(self.name)}"

    def typed(self) -> str:
        """The declaration form, `%x: bf16[T,2048]`."""
        return f"{self}: {self.type}"


def normal_attr(value: object, where: str) -> Attr:
    """`value` as an attribute: lists become tuples, every nan the same object; anything else is refused."""
    if isinstance(value, float):
        return _NAN if math.isnan(value) else float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(normal_attr(v, where) for v in value)
    raise VerifyError(f"{where}: an attribute is none, a bool, an int, a float, a string or a list of these, "
                      f"got {type(value).__name__}. Pass plain Python values.")  # fmt: skip


def attr_text(value: Attr) -> str:
    """An attribute as text: JSON-like, with bare `inf`, `-inf`, `nan` and `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(attr_text(v) for v in value)}]"
    return repr(value)


@dataclass(frozen=True, slots=True)
class Node:
    """One application of an op. `provider` is set by lowering; `folded` marks work on weights, done at binding."""

    op: str
    operands: tuple[Value | None, ...]
    results: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    provider: str | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        attrs = ((name, normal_attr(value, f"{self.op}, attribute `{name}`")) for name, value in self.attrs)
        object.__setattr__(self, "attrs", tuple(sorted(attrs, key=lambda item: item[0])))

    def __str__(self) -> str:
        results = ", ".join(r.typed() for r in self.results)
        op = quote(self.op) + (f"@{quote(self.provider)}" if self.provider is not None else "")
        operands = ", ".join("none" if v is None else str(v) for v in self.operands)
        attrs = ", ".join(f"{quote(name)}={attr_text(value)}" for name, value in self.attrs)
        return f"{'fold ' if self.folded else ''}{results} = {op}({operands})" + (f" {{{attrs}}}" if attrs else "")


@dataclass(frozen=True)
class Graph:
    """A named SSA graph: typed inputs and weights, nodes in order, outputs.

    Equality is structural, names included. `str(graph)` is the whole truth: `gdnir.parse(str(graph)) == graph`.
    """

    name: str
    inputs: tuple[Value, ...] = ()
    weights: tuple[Value, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Value, ...] = ()
    _users: dict[Value, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        inputs = ",\n  ".join(v.typed() for v in self.inputs)
        weights = ",\n  ".join(v.typed() for v in self.weights)
        lines = [f"gdnir {VERSION}", f"graph @{quote(self.name)} (" + (f"\n  {inputs}\n)" if inputs else ")")]
        lines[-1] += " weights {" + (f"\n  {weights}\n}} {{" if weights else "} {")
        lines += [f"  {node}" for node in self.nodes]
        lines += [f"  return {', '.join(map(str, self.outputs))}".rstrip(), "}"]
        return "\n".join(lines) + "\n"

    def users(self, value: Value) -> tuple[int, ...]:
        """Indices of the nodes that use `value`, once per use; `len(nodes)` stands for the graph's outputs."""
        if not self._users:
            table: dict[Value, list[int]] = {}
            for index, node in enumerate(self.nodes):
                for operand in node.operands:
                    if operand is not None:
                        table.setdefault(operand, []).append(index)
            for output in self.outputs:
                table.setdefault(output, []).append(len(self.nodes))
            self._users.update({v: tuple(u) for v, u in table.items()})
        return self._users.get(value, ())

    def values(self) -> Iterator[Value]:
        """Every value the graph defines: inputs, weights, results in order."""
        yield from self.inputs
        yield from self.weights
        for node in self.nodes:
            yield from node.results

    def replaced(self, table: dict[Value, Value], **changes: object) -> Graph:
        """The same graph with every use of a key of `table` turned into its value (chains are followed)."""

        def final(value: Value) -> Value:
            while value in table and table[value] != value:
                value = table[value]
            return value

        nodes = tuple(replace(n, operands=tuple(v if v is None else final(v) for v in n.operands)) for n in self.nodes)
        graph = replace(self, nodes=nodes, outputs=tuple(final(v) for v in self.outputs))
        return replace(graph, **changes) if changes else graph  # type: ignore[arg-type]

    def renumbered(self) -> Graph:
        """Result names made minimal and in order (`%conv`, `%conv.1`, ...), so that dumps of two passes compare."""
        taken = Counter(v.name for v in self.inputs)
        table: dict[Value, Value] = {v: v for v in (*self.inputs, *self.weights)}
        nodes = []
        for node in self.nodes:
            results = []
            for value in node.results:
                stem = numberless(value.name)
                name = stem if not taken[stem] else f"{stem}.{taken[stem]}"
                while taken[name]:
                    taken[stem] += 1
                    name = f"{stem}.{taken[stem]}"
                taken[name] += 1
                if name != stem:
                    taken[stem] += 1
                table[value] = replace(value, name=name)
                results.append(table[value])
            operands = tuple(v if v is None else table.get(v, v) for v in node.operands)
            nodes.append(replace(node, operands=operands, results=tuple(results)))
        return replace(self, nodes=tuple(nodes), outputs=tuple(table.get(v, v) for v in self.outputs))


Infer: TypeAlias = Callable[[Node], Sequence[Type]]


def verify(graph: Graph, infer: Infer | None = None) -> None:
    """Check the rules of the IR; `infer(node)` gives the types a node's results must have (and knows the ops).

    Raises VerifyError for an undefined or doubly defined value, a value used with another type than it was
    defined with, a contradiction of types or shapes, an unknown op, a state that is not used exactly once, and
    a folded node that reads something other than weights.
    """
    where = f"graph @{quote(graph.name)}"
    defined: dict[str, Value] = {}
    bound: set[Value] = set(graph.weights)

    def define(value: Value, place: str) -> None:
        if str(value) in defined:
            raise VerifyError(f"{place}: {value} is defined twice. Give each result a name of its own.")
        defined[str(value)] = value

    def use(value: Value, place: str) -> None:
        known = defined.get(str(value))
        if known is None:
            raise VerifyError(f"{place}: {value} is not defined before this use. Define it first, or correct the name.")
        if known != value:
            raise VerifyError(f"{place}: {value} is used as {value.type} but was defined as {known.type}.")

    for value in (*graph.inputs, *graph.weights):
        define(value, f"{where}, inputs")
        if value.weight != (value in bound):
            raise VerifyError(f"{where}, inputs: {value.typed()} stands among the wrong kind. "
                              "Weights (`@`) belong in the weights block, inputs (`%`) in the argument list.")  # fmt: skip
    for index, node in enumerate(graph.nodes):
        place = f"{where}, node {index} ({node.op})"
        for operand in node.operands:
            if operand is not None:
                use(operand, place)
        if node.folded:
            loose = [v for v in node.operands if v is not None and v not in bound]
            if loose:
                raise VerifyError(
                    f"{place}: a folded node reads weights only, but {loose[0]} is known only at run time."
                )
            bound.update(node.results)
        if infer is not None:
            try:
                expected = tuple(infer(node))
            except (InputError, VerifyError) as error:
                raise VerifyError(f"{place}: {error}") from error
            if expected != tuple(r.type for r in node.results):
                shown = ", ".join(map(str, expected))
                got = ", ".join(str(r.type) for r in node.results)
                raise VerifyError(f"{place}: the op's results are ({shown}), but the graph says ({got}).")
        for result in node.results:
            define(result, place)
    for output in graph.outputs:
        use(output, f"{where}, return")
    for value in graph.values():
        if isinstance(value.type, StateType) and len(graph.users(value)) != 1:
            count = len(graph.users(value))
            fault = "never used, so its update would be lost" if count == 0 else f"used {count} times"
            raise VerifyError(f"{where}: state {value} is {fault}. States are linear: each version goes to "
                              "exactly one op, or is returned.")  # fmt: skip


def to_networkx(graph: Graph) -> nx.MultiDiGraph[str]:
    """The graph for networkx's algorithms: vertices are inputs, weights, nodes (`n0`, ...) and `return`.

    An edge's key is the operand's position, so `mul(x, x)` keeps both of its edges; its `value` is the Value.
    """
    import networkx as nx  # here, because a program that only runs plans never needs it

    view: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=graph.name)
    source: dict[Value, str] = {}
    for value in (*graph.inputs, *graph.weights):
        kind: Literal["weight", "input"] = "weight" if value.weight else "input"
        view.add_node(str(value), kind=kind, value=value)
        source[value] = str(value)
    for index, node in enumerate(graph.nodes):
        view.add_node(f"n{index}", kind="node", node=node)
        for position, operand in enumerate(node.operands):
            if operand is not None:
                view.add_edge(source[operand], f"n{index}", key=position, value=operand)
        source.update(dict.fromkeys(node.results, f"n{index}"))
    view.add_node("return", kind="return")
    for position, output in enumerate(graph.outputs):
        view.add_edge(source[output], "return", key=position, value=output)
    return view
