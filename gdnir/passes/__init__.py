"""Passes and the pipeline from a traced graph to a lowered one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gdnir.errors import LoweringError
from gdnir.ir import Graph, quote
from gdnir.lowering import find
from gdnir.lowering.choose import Choice, Target
from gdnir.passes import canonicalize, fold_weights, fuse, merge_projections, split_mixed  # noqa: F401  (each registers its pass)
from gdnir.passes import lower as _lower_pass  # noqa: F401
from gdnir.passes.base import Pipeline, Step
from gdnir.platforms import Platform, get_platform

DEFAULT_PIPELINE = "fold-weights,merge-projections,canonicalize,split-mixed,fuse,lower"


@dataclass(frozen=True)
class Lowered:
    """A graph in which every node has a provider, the platform it is for, and why each provider was chosen.

    `choices` has one Choice for each node of the graph, in order; `notes` pairs each pass with what it said. `str()` is
    the graph's text.
    """

    graph: Graph
    platform: Platform
    choices: tuple[Choice, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return str(self.graph)

    @classmethod
    def of(cls, graph: Graph, platform: str | Platform | None = None) -> Lowered:
        """A graph that is lowered already (read back from text, say), for a platform.

        Raises LoweringError for a node without a provider, RegistryError for a provider that is not registered.
        """
        for node in graph.nodes:
            if node.provider is None:
                raise LoweringError(
                    f"graph @{quote(graph.name)}: {node.op} has no provider. Lower the graph first: gdnir.lower(graph)."
                )
            find(node.op, node.provider)
        return cls(graph, get_platform(platform))


def lower(
    graph: Graph,
    platform: str | Platform | None = None,
    *,
    providers: Mapping[str, Sequence[str]] | None = None,
    strict: bool = False,
    pipeline: str | Pipeline = DEFAULT_PIPELINE,
    observe: Callable[[Step], None] | None = None,
) -> Lowered:
    """Choose a kernel for every op of `graph` on `platform` (None: this machine).

    `providers` maps an op to the exhaustive list of providers it may use, best first; an explicit request that
    cannot be met raises LoweringError with every refusal. `strict` refuses native on anything but a CPU.
    `pipeline` is the text of the passes to run, `observe` sees each of them end. Raises VerifyError,
    LoweringError, RegistryError, ParseError.
    """
    target = Target(get_platform(platform), {op: _names(names) for op, names in (providers or {}).items()}, strict)
    steps = (pipeline if isinstance(pipeline, Pipeline) else Pipeline.parse(pipeline)).run(graph, target, observe)
    choices = next((s.result.choices for s in reversed(steps) if s.result.choices), ())
    notes = tuple((s.text, note) for s in steps for note in s.result.notes)
    return Lowered(steps[-1].result.graph if steps else graph, target.platform, choices, notes)


def _names(names: Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
