"""What a pass is, and the pipeline that runs passes: only it prints, times and verifies between them.

A pass is a frozen dataclass whose fields are its options, and `run(graph, target)` returns a new graph with
what the pass has to say. A pipeline is a list of passes that round-trips with its text:
`fold-weights,canonicalize,split-mixed,fuse{op=conv_prep},lower`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gdnir.errors import RegistryError, VerifyError, closest
from gdnir.ir import IDENTIFIER, Attr, Graph, attr_text, quote
from gdnir.lowering.choose import Choice, Target
from gdnir.op import verify_graph
from gdnir.text import Reader


@dataclass(frozen=True)
class PassResult:
    """A pass's graph, `notes` on what it did and declined (sentences), and the providers it chose, node by node."""

    graph: Graph
    notes: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Graph -> Graph. Subclasses set `name`, are frozen dataclasses, and register with `@register_pass`."""

    name: ClassVar[str] = ""

    def run(self, graph: Graph, target: Target) -> PassResult:
        """The rewritten graph; the argument is never changed."""
        raise TypeError(f"pass `{self.name}` has no run method")

    def __str__(self) -> str:
        options = []
        for field in dataclasses.fields(self):
            value: Attr = getattr(self, field.name)
            if value != field.default:
                text = value if isinstance(value, str) and IDENTIFIER.fullmatch(value) else attr_text(value)
                options.append(f"{field.name}={text}")
        return self.name + (f"{{{', '.join(options)}}}" if options else "")


PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known to pipelines by its `name`. RegistryError if the name is taken."""
    if not cls.name or PASSES.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise RegistryError(f"pass name `{cls.name}` is empty or taken by {PASSES.get(cls.name)}. Choose another name.")
    PASSES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Step:
    """What the pipeline saw of one pass: its text, its result, its time, and how many nodes there were."""

    text: str
    result: PassResult
    seconds: float
    nodes_before: int


@dataclass(frozen=True)
class Pipeline:
    """A list of passes. `Pipeline.parse(str(p)) == p`."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read `pass,pass{option=value},...`; raises ParseError or RegistryError."""
        reader = Reader(text)
        passes: list[Pass] = []
        if reader.tokens[0].kind != "end":
            passes.append(_read_pass(reader))
            while reader.take(","):
                passes.append(_read_pass(reader))
        if reader.tokens[reader.at].kind != "end":
            raise reader.error("expected `,` between passes.")
        return cls(tuple(passes))

    def run(self, graph: Graph, target: Target, observe: Callable[[Step], None] | None = None) -> Sequence[Step]:
        """Run every pass, verifying before the first and after each; `observe` sees each step as it ends.

        Raises VerifyError that names the pass which broke the graph.
        """
        verify_graph(graph)
        steps: list[Step] = []
        for item in self.passes:
            start = time.perf_counter()
            result = item.run(graph, target)
            before, graph = len(graph.nodes), result.graph.renumbered()
            result = dataclasses.replace(result, graph=graph)
            step = Step(str(item), result, time.perf_counter() - start, before)
            try:
                verify_graph(graph)
            except VerifyError as error:
                raise VerifyError(f"pass `{item}` broke the graph: {error}\n{graph}") from error
            steps.append(step)
            if observe is not None:
                observe(step)
        return steps


def _read_pass(reader: Reader) -> Pass:
    start = reader.at
    name = reader.name("a pass")
    if name not in PASSES:
        raise reader.error(f"unknown pass {quote(name)}. {closest(name, PASSES)}", reader.tokens[start].start)
    fields = {f.name: f for f in dataclasses.fields(PASSES[name])}
    options: dict[str, Attr] = {}
    if reader.take("{") and not reader.take("}"):
        while True:
            at = reader.at
            option = reader.name("an option")
            if option not in fields:
                raise reader.error(
                    f"pass `{name}` has no option `{option}`. {closest(option, fields)}", reader.tokens[at].start
                )
            reader.need("=")
            token = reader.tokens[reader.at]
            bare = token.kind == "name" and token.text not in ("none", "true", "false", "inf", "nan")
            options[option] = reader.name() if bare else reader.attr()
            if reader.take("}"):
                break
            reader.need(",")
    return PASSES[name](**options)
