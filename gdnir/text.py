"""Read IR text back into a graph. Printing is `str()` of the parts, in `ir.py`; the two are exact inverses.

    graph    = "gdnir" INT "graph" "@"NAME "(" [typed ("," typed)*] ")"
               "weights" "{" [typed ("," typed)*] "}" "{" node* "return" [value ("," value)*] "}"
    typed    = value ":" type
    value    = ("%" | "@") NAME
    type     = DTYPE "[" [dim ("," dim)*] "]"
             | "state" "<" DTYPE "[" dims "]" "," NAME ">"
             | "seq" "<" NAME ["," dim] ">"
    node     = ["fold"] typed ("," typed)* "=" NAME ["@" NAME] "(" [operand ("," operand)*] ")" ["{" attrs "}"]
    operand  = value | "none"
    attrs    = NAME "=" attr ("," NAME "=" attr)*
    attr     = "none" | "true" | "false" | "nan" | ["-"] "inf" | number | STRING | "[" [attr ("," attr)*] "]"

NAME is an identifier (dots allowed) or a JSON string. White space is free; `#` starts a comment to the end of
the line. Ops need not be known: an unknown op parses, and fails in `verify`. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gdnir.errors import ParseError, closest
from gdnir.ir import (
    DTYPES,
    VERSION,
    Attr,
    Dim,
    Graph,
    Node,
    SeqType,
    StateType,
    TensorType,
    Type,
    Value,
)

MAX_NESTING = 64
_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r\n]+|\#[^\n]*)+)
      | (?P<string>"(?:[^"\\\x00-\x1f]|\\.)*")
      | (?P<number>-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+(?:e[+-]?\d+)?|inf\b))
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:[.-][A-Za-z0-9_]+)*)
      | (?P<mark>[@%(){}\[\]<>,:=])""",
    re.VERBOSE,
)
_LITERALS: dict[str, Attr] = {"none": None, "true": True, "false": False, "nan": float("nan"), "inf": float("inf")}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int


class Reader:
    """A cursor over the tokens of a text, shared by graph text and pipeline text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        self.at = 0
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise self.error(f"unexpected character {text[place]!r}. Quote odd names as JSON strings.", place)
            if match.lastgroup != "space":
                self.tokens.append(_Token(str(match.lastgroup), match.group(), place))
            place = match.end()
        self.tokens.append(_Token("end", "end of text", len(text)))

    def error(self, message: str, start: int | None = None) -> ParseError:
        """A ParseError at `start`, or at the current token."""
        start = self.tokens[self.at].start if start is None else start
        line = self.text.count("\n", 0, start) + 1
        return ParseError(message, line, start - (self.text.rfind("\n", 0, start) + 1) + 1)

    def peek(self, text: str) -> bool:
        """Whether the current token is the mark or bare word `text`."""
        token = self.tokens[self.at]
        return token.text == text and token.kind in ("mark", "name")

    def take(self, text: str) -> bool:
        """Step over `text` if it is the current token."""
        if found := self.peek(text):
            self.at += 1
        return found

    def need(self, text: str) -> None:
        """Step over `text`, or raise."""
        if not self.take(text):
            raise self.error(f"expected `{text}`, got `{self.tokens[self.at].text}`.")

    def name(self, what: str = "a name") -> str:
        """An identifier or a JSON string."""
        token = self.tokens[self.at]
        if token.kind not in ("name", "string"):
            raise self.error(f"expected {what}, got `{token.text}`.")
        self.at += 1
        return token.text if token.kind == "name" else self._string(token)

    def _string(self, token: _Token) -> str:
        try:
            return str(json.loads(token.text))
        except ValueError as error:
            raise self.error(f"not a JSON string: {error}.", token.start) from None

    def integer(self) -> int:
        """A non-negative integer."""
        token = self.tokens[self.at]
        if token.kind != "number" or not token.text.isdigit():
            raise self.error(f"expected an integer, got `{token.text}`.")
        self.at += 1
        return int(token.text)

    def several(self, item: Callable[[], _T], end: str) -> list[_T]:
        """Comma-separated items up to the mark `end`, which is stepped over."""
        items: list[_T] = []
        if self.take(end):
            return items
        while True:
            items.append(item())
            if self.take(end):
                return items
            self.need(",")

    def attr(self, depth: int = 0) -> Attr:
        """An attribute value."""
        token = self.tokens[self.at]
        if self.peek("["):
            if depth >= MAX_NESTING:
                raise self.error(f"lists nest deeper than {MAX_NESTING}.")
            self.at += 1
            return tuple(self.several(lambda: self.attr(depth + 1), "]"))
        self.at += 1
        if token.kind == "string":
            return self._string(token)
        if token.kind == "number":
            return int(token.text) if token.text.lstrip("-").isdigit() else float(token.text)
        if token.kind == "name" and token.text in _LITERALS:
            return _LITERALS[token.text]
        self.at -= 1
        raise self.error(f"expected an attribute value, got `{token.text}`. Put strings in double quotes.")

    def attrs(self) -> tuple[tuple[str, Attr], ...]:
        """`{name=value, ...}`, or nothing."""
        if not self.take("{"):
            return ()

        def item() -> tuple[str, Attr]:
            name = self.name("an attribute's name")
            self.need("=")
            return name, self.attr()

        start = self.at
        items = self.several(item, "}")
        names = [name for name, _ in items]
        for name in names:
            if names.count(name) > 1:
                raise self.error(f"attribute `{name}` is given twice.", self.tokens[start].start)
        return tuple(items)


class _GraphReader(Reader):
    def dim(self) -> Dim:
        return self.integer() if self.tokens[self.at].kind == "number" else self.name("a dimension")

    def _shaped(self) -> tuple[str, tuple[Dim, ...]]:
        dtype = self.name("an element type")
        if dtype not in DTYPES:
            self.at -= 1
            raise self.error(f"unknown element type `{dtype}`. {closest(dtype, DTYPES)}")
        self.need("[")
        return dtype, tuple(self.several(self.dim, "]"))

    def type(self) -> Type:
        if self.take("state"):
            self.need("<")
            dtype, shape = self._shaped()
            self.need(",")
            layout = self.name("a layout")
            self.need(">")
            return StateType(dtype, shape, layout)
        if self.take("seq"):
            self.need("<")
            phase = self.name("a phase")
            tokens: Dim = self.dim() if self.take(",") else "T"
            self.need(">")
            return SeqType(phase, tokens)
        return TensorType(*self._shaped())

    def key(self) -> tuple[str, bool]:
        weight = self.peek("@")
        if not weight and not self.peek("%"):
            raise self.error(f"expected a value (`%name` or `@name`), got `{self.tokens[self.at].text}`.")
        self.at += 1
        return self.name(), weight

    def typed(self) -> Value:
        name, weight = self.key()
        self.need(":")
        return Value(name, self.type(), weight)

    def use(self, defined: dict[tuple[str, bool], Value]) -> Value:
        start = self.at
        key = self.key()
        if key not in defined:
            self.at = start
            mark = "@" if key[1] else "%"
            raise self.error(
                f"{mark}{key[0]} is not defined. {closest(key[0], (n for n, w in defined if w == key[1]))}"
            )
        return defined[key]

    def node(self, defined: dict[tuple[str, bool], Value]) -> Node:
        folded = self.take("fold")
        results = [self.typed()]
        while self.take(","):
            results.append(self.typed())
        self.need("=")
        op = self.name("an op")
        provider = self.name("a provider") if self.take("@") else None
        self.need("(")
        operands = self.several(lambda: None if self.take("none") else self.use(defined), ")")
        return Node(op, tuple(operands), tuple(results), self.attrs(), provider, folded)

    def graph(self) -> Graph:
        self.need("gdnir")
        version = self.integer()
        if version != VERSION:
            self.at -= 1
            raise self.error(f"this text has format {version}; this gdnir reads format {VERSION}.")
        self.need("graph")
        self.need("@")
        name = self.name()
        self.need("(")
        inputs = self.several(self.typed, ")")
        self.need("weights")
        self.need("{")
        weights = self.several(self.typed, "}")
        defined = {(v.name, v.weight): v for v in (*inputs, *weights)}
        self.need("{")
        nodes: list[Node] = []
        while not self.take("return"):
            node = self.node(defined)
            defined.update({(v.name, v.weight): v for v in node.results})
            nodes.append(node)
        outputs = self.several(lambda: self.use(defined), "}")
        if self.tokens[self.at].kind != "end":
            raise self.error("text after the end of the graph.")
        return Graph(name, tuple(inputs), tuple(weights), tuple(nodes), tuple(outputs))


def parse(text: str) -> Graph:
    """The graph whose text this is; `parse(str(graph)) == graph`.

    Raises ParseError, with line and column, for text that is not a graph. The graph's rules are not checked
    here: call `gdnir.verify`.
    """
    return _GraphReader(text).graph()
