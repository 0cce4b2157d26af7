"""How ops and fused ops are declared, recorded into graphs, and called.

An op is one decorated function: the decorator's line is its contract, its keyword-only parameters are its
attributes, its docstring is the maths. Called with traced values it records a node; called with tensors it runs.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from gdnir.contract import Contract, Slot
from gdnir.errors import ArgumentError, RegistryError, VerifyError, closest
from gdnir.ir import Attr, Graph, Node, Type, Value, normal_attr, numberless, verify

ResultTypes: TypeAlias = Callable[[Sequence[Type | None], Mapping[str, Attr]], Sequence[Type]]
OPS: dict[str, Op] = {}
"""Every declared op by name. Third-party packages add to it by declaring ops."""

_REQUIRED: Any = object()
_eager: Callable[[Op, Sequence[Any], Mapping[str, Attr], str | None], Any] | None = None


@dataclass(frozen=True)
class AttrSpec:
    """One attribute of an op: its name, its type, its default."""

    name: str
    annotation: Any
    default: Any = _REQUIRED

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    def accept(self, op: str, value: object) -> Attr:
        """`value` as this attribute; ArgumentError if it is of another type or not among the choices."""
        if isinstance(value, Param):
            return value
        value = normal_attr(value, f"{op}, attribute `{self.name}`")
        if not _is(value, self.annotation):
            if self.annotation is float and type(value) is int:
                return float(value)
            choices = typing.get_args(self.annotation) if typing.get_origin(self.annotation) is Literal else ()
            expected = " or ".join(repr(c) for c in choices) or getattr(
                self.annotation, "__name__", str(self.annotation)
            )
            raise ArgumentError(op, self.name, expected=expected, got=repr(value))
        return value


def _is(value: object, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return any(value == c and type(value) is type(c) for c in typing.get_args(annotation))
    if origin is tuple:
        args = typing.get_args(annotation)
        if not isinstance(value, tuple):
            return False
        items = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        return len(items) == len(value) and all(_is(v, a) for v, a in zip(value, items, strict=True))
    if annotation in (int, float, str, bool):
        return type(value) is annotation
    return True


class Param(str):
    """An attribute of a fused op standing for itself inside the body's pattern, until a match binds it."""


class Traced:
    """A value of a graph being traced. It has no tensor methods: layers are written in ops only."""

    __slots__ = ("recorder", "value")

    def __init__(self, value: Value, recorder: Recorder) -> None:
        self.value, self.recorder = value, recorder

    def __repr__(self) -> str:
        return self.value.typed()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ArgumentError("trace", f".{name}", expected="a gdnir op", got=f"a method of the traced value {self!r}",
                            hint="Traced values have no tensor methods; write the step as an op of gdnir.ops.")  # fmt: skip


@dataclass
class Recorder:
    """Collects the nodes of a graph while ops are called with traced values.

    With `typed=False` (patterns of fused ops) results get no types and attributes may be parameters.
    """

    typed: bool = True
    nodes: list[Node] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)

    def value(self, name: str, type_: Type, *, weight: bool = False) -> Traced:
        """A new value; its name gets a number if it is taken."""
        count = self._names.get(f"{weight}{name}", 0)
        self._names[f"{weight}{name}"] = count + 1
        return Traced(Value(name if not count else f"{name}.{count}", type_, weight), self)

    def record(self, op: Op, operands: Sequence[Any], attrs: Mapping[str, Attr]) -> Any:
        """Append a node and return its results: one traced value, or a tuple of them."""
        values: list[Value | None] = []
        for slot, operand in zip(op.slots(len(operands)), operands, strict=True):
            if operand is not None and not isinstance(operand, Traced):
                raise ArgumentError(op.name, slot.name, expected="a traced value", got=type(operand).__name__,
                                    hint="Tensors and traced values do not mix; make the tensor a weight or an input.")  # fmt: skip
            values.append(None if operand is None else operand.value)
        given = {s.name: v.name for s, v in zip(op.slots(len(values)), values, strict=True) if v is not None}
        names = [given.get(slot.name, slot.name) for slot in op.contract.outputs]
        types: Sequence[Type] = ()
        if self.typed:
            types = op.infer([v if v is None else v.type for v in values], attrs)
        else:
            blank = next(v.type for v in values if v is not None)
            types = [blank] * len(names)
        results = tuple(self.value(numberless(name), type_) for name, type_ in zip(names, types, strict=True))
        self.nodes.append(Node(op.name, tuple(values), tuple(r.value for r in results), tuple(attrs.items())))
        return results[0] if len(results) == 1 else results


@dataclass(frozen=True, eq=False)
class Op:
    """A declared op. `body` is set for fused ops: pattern, fallback and oracle in one.

    `plain` ops are best left to torch on every platform: views, work on weights, and the products that torch
    hands to the vendor's library. `strict` lowering leaves them alone.
    """

    name: str
    contract: Contract
    attrs: tuple[AttrSpec, ...]
    signature: inspect.Signature
    doc: str
    origin: str
    body: Callable[..., Any] | None = None
    result_types: ResultTypes | None = None
    plain: bool = False

    @property
    def fused(self) -> bool:
        return self.body is not None

    def slots(self, count: int) -> list[Slot]:
        """The contract's slot for each of `count` operands (a variadic slot repeats)."""
        slots = list(self.contract.operands)
        if slots and slots[-1].variadic:
            slots[-1:] = [slots[-1]] * (count - len(slots) + 1)
        if len(slots) != count:
            raise VerifyError(
                f"{self.name} takes {len(slots)} operands ({', '.join(s.name for s in slots)}), got {count}."
            )
        return slots

    def normal(self, attrs: Mapping[str, object]) -> dict[str, Attr]:
        """Attributes checked and completed with defaults; ArgumentError for an unknown, missing or mistyped one."""
        known = {spec.name: spec for spec in self.attrs}
        for name in attrs:
            if name not in known:
                raise ArgumentError(
                    self.name,
                    name,
                    expected="an attribute of this op",
                    got="an unknown name",
                    hint=closest(name, known),
                )
        values: dict[str, Attr] = {}
        for spec in self.attrs:
            if spec.name not in attrs and spec.required:
                raise ArgumentError(
                    self.name, spec.name, expected=f"`{spec.name}=...`", got="nothing", hint="It has no default."
                )
            values[spec.name] = spec.accept(self.name, attrs.get(spec.name, spec.default))
        return values

    def infer(self, types: Sequence[Type | None], attrs: Mapping[str, Attr]) -> tuple[Type, ...]:
        """Result types for operand types; raises the InputError that says what does not fit."""
        attrs = self.normal(attrs)
        pairs = list(zip(self.slots(len(types)), types, strict=True))
        if self.body is not None:
            self.contract.check(self.name, pairs, attrs)
            return tuple(v.type for v in self.expand(types, attrs).outputs)
        if self.result_types is not None:
            self.contract.check(self.name, pairs, attrs)
            return tuple(self.result_types(types, attrs))
        return self.contract.results(self.name, pairs, attrs)

    def expand(self, types: Sequence[Type | None], attrs: Mapping[str, Attr]) -> Graph:
        """A fused op's body as a graph of single ops over inputs of these types (None: operand not given); a
        single op is its own body."""
        with tracing() as recorder:
            operands = [
                None if t is None else recorder.value(s.name, t)
                for s, t in zip(self.slots(len(types)), types, strict=True)
            ]
            results = (
                self.body(*operands, **attrs) if self.body is not None else self(*operands, **dict[str, Any](attrs))
            )
        results = results if isinstance(results, tuple) else (results,)
        inputs = tuple(x.value for x in operands if x is not None)
        return Graph(self.name, inputs, (), tuple(recorder.nodes), tuple(r.value for r in results))

    def __call__(self, *args: Any, provider: str | None = None, **kwargs: Any) -> Any:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            names = set(self.signature.parameters)
            odd = next((k for k in kwargs if k not in names), None)
            argument = odd or next((s.name for s in self.contract.operands if f"'{s.name}'" in str(error)), "arguments")
            hint = closest(odd, names) if odd else f"Signature: {self.name}{self.signature}."
            raise ArgumentError(
                self.name, argument, expected="the op's own parameters", got=str(error), hint=hint
            ) from None
        bound.apply_defaults()
        operands: list[Any] = []
        for slot in self.contract.operands:
            value = bound.arguments[slot.name]
            operands.extend(value) if slot.variadic else operands.append(value)
        attrs = self.normal({s.name: v for s in self.attrs if (v := bound.arguments[s.name]) is not _REQUIRED})
        traced = next((x for x in operands if isinstance(x, Traced)), None)
        if traced is not None:
            if provider is not None:
                raise ArgumentError(self.name, "provider", expected="no provider while tracing", got=repr(provider),
                                    hint="Providers are chosen by gdnir.lower(graph, providers=...).")  # fmt: skip
            return traced.recorder.record(self, operands, attrs)
        if _eager is None:
            raise RegistryError(f"{self.name}: nothing can run it yet. Import `gdnir`, not `gdnir.op` alone.")
        return _eager(self, operands, attrs, provider)


@contextmanager
def tracing(*, typed: bool = True) -> Iterator[Recorder]:
    """A recorder for `recorder.value(...)` inputs and the ops called on them."""
    yield Recorder(typed)


def set_eager(run: Callable[[Op, Sequence[Any], Mapping[str, Attr], str | None], Any]) -> None:
    """Install what runs an op on tensors (done once, by `gdnir.lowering`, which sits above this module)."""
    global _eager
    _eager = run


def _register(op: Op) -> Op:
    if op.name in OPS and OPS[op.name].origin != op.origin:
        raise RegistryError(
            f"op `{op.name}` is already declared by {OPS[op.name].origin}. Choose another name, such as `mypackage.{op.name}`."
        )
    OPS[op.name] = op
    return op


def _attr_specs(function: Callable[..., Any]) -> tuple[AttrSpec, ...]:
    hints = typing.get_type_hints(function)
    return tuple(
        AttrSpec(p.name, hints.get(p.name, Any), _REQUIRED if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    )


def _operand_names(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def op(
    contract: str, *, name: str | None = None, results: ResultTypes | None = None, plain: bool = False
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op: `@op("x:T.D, weight:D -> y:T.D like x") def scale_rows(x, weight, *, eps: float): ...`.

    The function's body stays empty but for its docstring (the maths and its source): what an op means is its
    `native` lowering. `results` computes result types where a contract's line cannot; `plain` says that torch
    is the way to run it on every platform. Raises RegistryError if the parameters are not the contract's operands, or the name is taken.
    """

    def declare(function: Callable[..., Any]) -> Op:
        parsed = Contract.parse(contract)
        operands = _operand_names(function)
        if operands != [slot.name for slot in parsed.operands]:
            raise RegistryError(
                f"op `{function.__name__}`: its parameters {operands} are not the operands of `{contract}`."
            )
        return _register(Op(name or function.__name__, parsed, _attr_specs(function), inspect.signature(function),
                            inspect.getdoc(function) or "", function.__module__, None, results, plain))  # fmt: skip

    return declare


def fused(contract: str, *, name: str | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Declare a fused op: a function whose body calls other ops.

    `contract` names operands and results (`"x, bias?, state, seq -> y, state"`); their types follow from the
    body. The body is what the op means, the pattern that `fuse` looks for, and the fallback when no provider
    takes the region.
    """

    def declare(function: Callable[..., Any]) -> Op:
        parsed = Contract.parse(contract)
        if _operand_names(function) != [slot.name for slot in parsed.operands]:
            raise RegistryError(f"fused op `{function.__name__}`: its parameters are not the operands of `{contract}`.")
        return _register(Op(name or function.__name__, parsed, _attr_specs(function), inspect.signature(function),
                            inspect.getdoc(function) or "", function.__module__, function))  # fmt: skip

    return declare


def lookup(name: str) -> Op:
    """The op called `name`; VerifyError with a suggestion if there is none."""
    if name not in OPS:
        raise VerifyError(f"unknown op `{name}`. {closest(name, OPS)}")
    return OPS[name]


def infer_node(node: Node) -> Sequence[Type]:
    """The types that a node's results must have."""
    return lookup(node.op).infer([v if v is None else v.type for v in node.operands], dict(node.attrs))


def verify_graph(graph: Graph) -> None:
    """Check every rule of the IR, and every node against its op's contract (`gdnir.verify`)."""
    verify(graph, infer_node)
