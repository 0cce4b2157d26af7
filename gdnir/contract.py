"""The one-line contract of an op: which operands it takes, which results it gives, and how their types relate.

    "heads=H.HV.K.V; y:T.2*H*K+HV*V -> q:T.H.K like y, k:T.H.K like y, v:T.HV.V like y"

    contract  = [bindings ";"] operands "->" results ["where" condition ("," condition)*]
    bindings  = attribute "=" letter ("." letter)*        an integer-list attribute gives these letters their values
    operand   = ["*"] name ["?"] [":" shape] [dtype]      `*`: any number of operands; `?`: may be none
    state     = name "[" attribute "]" ":" layout "=" shape ("|" layout "=" shape)* [dtype]
    dtype     = "f32" | "f32/bf16" | ... | "like" operand     default: any floating type
    shape     = dim ("." dim)*; a dim is a letter, a number, an expression (`2*H*K`), `_` (any size) or `*` (any rest)

`seq` alone is the batch's metadata and gives T its value. A result with an operand's name keeps that value's
name in graphs; if the operand is a state, the result is that state, updated. Conditions (`P >= W - 1`,
`eps > 0`) may use letters and attributes. The same contract checks the symbolic types of a graph and the real
sizes of tensors.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdnir.errors import ArgumentError, DTypeError, LayoutError, RegistryError, SeqError, ShapeError
from gdnir.ir import Attr, Dim, SeqType, StateType, TensorType, Type

FLOATS = ("bf16", "f16", "f32", "f64")
_LETTER = re.compile(r"[A-Z][A-Za-z0-9]*|T")
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.GtE: operator.ge, ast.Gt: operator.gt, ast.LtE: operator.le, ast.Lt: operator.lt,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_CALLS: dict[str, Callable[..., object]] = {"sum": sum, "abs": abs, "len": len, "min": min}


class _Unknown(Exception):
    """An expression over a symbol has no number yet."""


def _evaluate(tree: ast.AST, names: Mapping[str, object]) -> object:
    """Arithmetic and one comparison over `names`; contracts are written by programmers, but nothing is eval'ed."""
    match tree:
        case ast.Expression(body=body):
            return _evaluate(body, names)
        case ast.Constant(value=constant):
            return constant
        case ast.Name(id=name):
            value = names.get(name, name)
            if isinstance(value, str):
                raise _Unknown
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, names), _evaluate(right, names))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_evaluate(a, names) for a in args))
    raise RegistryError(f"a contract cannot compute `{ast.unparse(tree)}`. Use + - * %, one comparison, sum or abs.")


def _expression(text: str) -> ast.AST:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise RegistryError(f"`{text}` in a contract is not an expression.") from None


@dataclass(frozen=True)
class Slot:
    """One operand or result of a contract."""

    name: str
    shapes: tuple[tuple[str, tuple[str, ...]], ...]  # (layout, dims); one with layout "" for an ordinary tensor
    dtypes: tuple[str, ...]
    like: str | None
    optional: bool = False
    variadic: bool = False
    layout_attr: str | None = None

    @property
    def is_state(self) -> bool:
        return self.layout_attr is not None

    @property
    def is_seq(self) -> bool:
        return not self.shapes and self.name == "seq"

    def dims(self, layout: str) -> tuple[str, ...]:
        return dict(self.shapes)[layout]


_SLOT = re.compile(
    r"(?P<star>\*?)(?P<name>[A-Za-z_]\w*)(?P<opt>\??)(?:\[(?P<attr>\w+)\])?(?::(?P<shape>\S+))?"
    r"(?:\s+(?:like\s+(?P<like>\w+)|(?P<dtype>[a-z0-9/]+)))?"
)


def _slot(text: str) -> Slot:
    match = _SLOT.fullmatch(text.strip())
    if match is None:
        raise RegistryError(f"cannot read `{text.strip()}` in a contract. An operand looks like `q:T.H.K like x`.")
    shapes = []
    for part in match["shape"].split("|") if match["shape"] else ():
        layout, _, dims = part.rpartition("=")
        shapes.append((layout, tuple(dims.split("."))))
    dtypes = tuple(match["dtype"].split("/")) if match["dtype"] else FLOATS
    return Slot(
        match["name"], tuple(shapes), dtypes, match["like"], bool(match["opt"]), bool(match["star"]), match["attr"]
    )


@dataclass(frozen=True)
class Contract:
    """A parsed contract: `check` validates operands, `results` gives the types of what the op returns."""

    text: str
    bindings: tuple[tuple[str, tuple[str, ...]], ...]
    operands: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    conditions: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Contract:
        """Read a contract's line; RegistryError says what cannot be read."""
        head, _, rest = text.rpartition(";")
        bindings = []
        for part in filter(None, (p.strip() for p in head.split(","))):
            attribute, _, letters = part.partition("=")
            bindings.append((attribute.strip(), tuple(letters.strip().split("."))))
        body, _, where = rest.partition(" where ")
        left, arrow, right = body.partition("->")
        if not arrow:
            raise RegistryError(f"contract `{text}` has no `->`.")
        operands = tuple(_slot(part) for part in left.split(",") if part.strip())
        outputs = tuple(_slot(part) for part in right.split(",") if part.strip())
        conditions = tuple(c.strip() for c in where.split(",") if c.strip())
        for condition in conditions:
            _expression(condition)
        return cls(text, tuple(bindings), operands, outputs, conditions)

    def state_results(self) -> tuple[tuple[int, Slot], ...]:
        """(position, slot) of the results that are updated states."""
        states = {slot.name for slot in self.operands if slot.is_state}
        return tuple((i, slot) for i, slot in enumerate(self.outputs) if slot.name in states)

    def check(self, op: str, types: Sequence[tuple[Slot, Type | None]], attrs: Mapping[str, Attr]) -> dict[str, object]:
        """Check operand types and attributes against the contract; returns the letters' values.

        Raises ArgumentError, DTypeError, ShapeError, LayoutError or SeqError, naming op, argument, expected, got.
        """
        letters: dict[str, object] = {}
        origin: dict[str, str] = {}
        for attribute, names in self.bindings:
            values = attrs[attribute]
            if not (
                isinstance(values, tuple)
                and len(values) == len(names)
                and all(type(v) is int and v > 0 for v in values)
            ):
                raise ArgumentError(
                    op, attribute, expected=f"{len(names)} positive integers ({', '.join(names)})", got=f"{values!r}"
                )
            letters.update(zip(names, values, strict=True))
            origin.update(dict.fromkeys(names, attribute))
        dtypes: dict[str, str] = {}
        checks: list[tuple[Slot, int, str, Dim]] = []
        for slot, type_ in sorted(types, key=lambda item: not item[0].is_seq):  # T comes from seq before others
            if type_ is None:
                if not slot.optional:
                    raise ArgumentError(
                        op, slot.name, expected="a value", got="none", hint="Only operands marked `?` may be none."
                    )
                continue
            self._check_kind(op, slot, type_, attrs)
            if isinstance(type_, SeqType):
                letters["T"], origin["T"] = type_.tokens, "seq"
                continue
            self._check_dtype(op, slot, type_.dtype, dtypes)
            if not slot.shapes:
                continue  # a fused op's body checks the shapes of its states
            dims = slot.dims(type_.layout if isinstance(type_, StateType) else "")
            if dims[-1] == "*":
                fits, dims = len(type_.shape) >= len(dims) - 1, dims[:-1]
            else:
                fits = len(type_.shape) == len(dims)
            if not fits:
                raise ShapeError(
                    op,
                    slot.name,
                    expected=f"shape [{', '.join(slot.dims(getattr(type_, 'layout', '')))}]",
                    got=f"{type_}",
                )
            for axis, (dim, size) in enumerate(zip(dims, type_.shape, strict=False)):
                if _LETTER.fullmatch(dim) and dim not in letters:
                    letters[dim], origin[dim] = size, slot.name
                elif dim != "_":
                    checks.append((slot, axis, dim, size))
        named = {**dict(attrs), **letters}
        for slot, axis, dim, size in checks:
            self._check_dim(op, slot, axis, dim, size, named, origin)
        for condition in self.conditions:
            try:
                holds = _evaluate(_expression(condition), {"inf": math.inf, **named})
            except (_Unknown, TypeError):
                continue  # not a number yet: the plan's own check of real sizes comes back to it
            if not holds:
                used = {n: named[n] for n in re.findall(r"[A-Za-z_]\w*", condition) if n in named}
                shown = ", ".join(f"{n} = {v}" for n, v in used.items())
                raise ShapeError(op, origin.get(next(iter(used)), next(iter(used))), expected=condition, got=shown)
        return letters

    def results(
        self, op: str, types: Sequence[tuple[Slot, Type | None]], attrs: Mapping[str, Attr]
    ) -> tuple[Type, ...]:
        """The result types, after `check`."""
        letters = self.check(op, types, attrs)
        given = {slot.name: type_ for slot, type_ in types if type_ is not None}
        results: list[Type] = []
        for slot in self.outputs:
            same = given.get(slot.name)
            if isinstance(same, StateType):
                results.append(same)
                continue
            like = given.get(slot.like) if slot.like else None
            dtype = like.dtype if isinstance(like, TensorType | StateType) else slot.dtypes[0]
            shape: list[Dim] = []
            for dim in slot.dims(""):
                if dim == "*" and isinstance(like, TensorType):
                    shape.extend(like.shape[len(shape) :])
                else:
                    shape.append(self._size(dim, {**dict(attrs), **letters}))
            results.append(TensorType(dtype, tuple(shape)))
        return tuple(results)

    @staticmethod
    def _size(dim: str, names: Mapping[str, object]) -> Dim:
        if _LETTER.fullmatch(dim):
            size = names[dim]
            return size if isinstance(size, int | str) else str(size)
        value = _evaluate(_expression(dim), names)
        return int(value) if isinstance(value, int) else str(value)

    def _check_kind(self, op: str, slot: Slot, type_: Type, attrs: Mapping[str, Attr]) -> None:
        if slot.is_seq:
            if not isinstance(type_, SeqType):
                raise SeqError(op, slot.name, expected="the batch's metadata (gdnir.Seq)", got=f"{type_}")
        elif slot.layout_attr is not None:
            layouts = [layout for layout, _ in slot.shapes]
            wanted = attrs[slot.layout_attr]
            if layouts and wanted not in layouts:
                raise LayoutError(
                    op, slot.layout_attr, expected=" or ".join(f'"{x}"' for x in layouts), got=f"{wanted!r}"
                )
            if not isinstance(type_, StateType):
                raise LayoutError(
                    op, slot.name, expected="a state", got=f"{type_}", hint="States carry their layout in their type."
                )
            if type_.layout != wanted:
                raise LayoutError(op, slot.name, expected=f'layout "{wanted}" (attribute {slot.layout_attr})', got=f'"{type_.layout}"',
                                  hint="Pass the layout the pool really has; it is never guessed.")  # fmt: skip
        elif not isinstance(type_, TensorType):
            raise ArgumentError(op, slot.name, expected="a tensor", got=f"{type_}")

    @staticmethod
    def _check_dtype(op: str, slot: Slot, dtype: str, seen: dict[str, str]) -> None:
        seen.setdefault(slot.name, dtype)
        wanted: tuple[str, ...] = (seen[slot.like],) if slot.like in seen and slot.like is not None else slot.dtypes
        if dtype not in wanted:
            because = f" (like `{slot.like}`)" if slot.like in seen else ""
            raise DTypeError(
                op,
                slot.name,
                expected=" or ".join(wanted) + because,
                got=dtype,
                hint="Convert it: nothing is cast silently.",
            )

    def _check_dim(
        self,
        op: str,
        slot: Slot,
        axis: int,
        dim: str,
        size: Dim,
        named: Mapping[str, object],
        origin: Mapping[str, str],
    ) -> None:
        try:
            wanted: object = named.get(dim, dim) if _LETTER.fullmatch(dim) else _evaluate(_expression(dim), named)
        except _Unknown:
            return
        if wanted != size:
            source = f" (from `{origin[dim]}`)" if dim in origin else ""
            raise ShapeError(op, slot.name, expected=f"{dim} = {wanted} in dimension {axis}{source}", got=f"{size}")
