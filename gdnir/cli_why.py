"""`gdnir why`: which provider runs each node, the reason, and what every other provider said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from gdnir.cli_request import (
    DTypeOption,
    ModelArgument,
    PhaseOption,
    PipelineOption,
    PlatformOption,
    PluginOption,
    ProviderOption,
    RegionOption,
    Request,
    StateDTypeOption,
    StateLayoutOption,
    StrictOption,
    is_lowered,
)
from gdnir.cli_text import json_text, show, write
from gdnir.errors import LoweringError
from gdnir.ir import Graph, Node, SeqType, quote
from gdnir.lowering import NATIVE
from gdnir.lowering.choose import Choice, Refusal, Target, candidates, choose, refusal
from gdnir.op import OPS, lookup
from gdnir.passes import Lowered
from gdnir.passes.base import Pipeline, Step
from gdnir.show import to_json

NONE = ""
"""The provider of a node that nobody takes."""


def why(
    model: ModelArgument,
    platform: PlatformOption = None,
    phase: PhaseOption = None,
    region: RegionOption = None,
    dtype: DTypeOption = None,
    state_dtype: StateDTypeOption = None,
    state_layout: StateLayoutOption = None,
    pipeline: PipelineOption = None,
    provider: ProviderOption = None,
    strict: StrictOption = False,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="How to write the answer.")] = "text",
    plugin: PluginOption = None,
) -> None:
    """Say who runs each op, and why the others do not.

    For each node of the lowered graph: its provider, the reason, and the sentence of every provider that refused.
    A request that cannot be met is shown node by node, and exits with 1.

    \b
      gdnir why qwen3-next --platform cuda:sm_90
      gdnir why qwen3-next --platform rocm:gfx942 --strict
      gdnir why qwen3-next --provider gated_delta_rule=triton
    """
    options = {
        "phase": phase,
        "region": region,
        "dtype": dtype,
        "state_dtype": state_dtype,
        "state_layout": state_layout,
    }
    request = Request.of(model, platform, pipeline, provider, strict, **options)
    graph = request.graph()
    fixed = is_lowered(graph) and pipeline is None
    steps: list[Step] = []
    error: LoweringError | None = None
    try:
        lowered = request.lower(graph, steps.append)
        if fixed:
            lowered = Lowered(
                graph,
                lowered.platform,
                tuple(Choice(n.op, n.provider or NONE, "fixed by the text") for n in graph.nodes),
            )
    except LoweringError as unmet:
        if fixed:
            raise
        error, lowered = unmet, _attempt(request, graph, steps)
    if format == "json":
        write(json_text(_json(lowered, error)), None)
    else:
        _print(lowered, fixed)
    if error is not None:
        raise error


def _attempt(request: Request, graph: Graph, steps: Sequence[Step]) -> Lowered:
    """How far lowering came, with what would be chosen for each node that can be served."""
    target = Target(request.where(), request.providers, request.strict)
    graph = steps[-1].result.graph if steps else graph
    failed = Pipeline.parse(request.passes).passes[len(steps)]
    choices = tuple(_choice(node, target) for node in graph.nodes) if failed.name == "lower" else ()
    notes = tuple((s.text, note) for s in steps for note in s.result.notes)
    return Lowered(graph, target.platform, choices, notes)


def _choice(node: Node, target: Target) -> Choice:
    if node.folded:
        return Choice(node.op, NATIVE, "runs once, when weights are bound")
    op, types, attrs = lookup(node.op), [v if v is None else v.type for v in node.operands], dict(node.attrs)
    try:
        return choose(op, types, attrs, target)
    except LoweringError:
        said = [(p, refusal(op, p, types, attrs, target)) for p in candidates(op, target)]
        return Choice(
            node.op, NONE, "no provider takes it", tuple(Refusal(p, reason) for p, reason in said if reason is not None)
        )


def _json(lowered: Lowered, error: LoweringError | None) -> dict[str, Any]:
    document = to_json(lowered)
    for choice in document["choices"]:
        choice["provider"] = choice["provider"] or None
    return document if error is None else {**document, "error": str(error)}


def _print(lowered: Lowered, fixed: bool) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True)
    for _ in range(3):
        table.add_column(overflow="fold")
    table.add_column(overflow="fold", min_width=24)
    table.add_row("", *(Text(name, style="bold") for name in ("op", "result", "provider", "why")))
    for index, (node, choice) in enumerate(zip(lowered.graph.nodes, lowered.choices, strict=False)):
        reason = Text(choice.reason)
        for item in choice.refusals:
            reason.append(f"\n{item.provider}: ", style="yellow").append(item.reason)
        result = str(node.results[0]) if node.results else ""
        table.add_row(str(index), quote(node.op), result, _provider(node, choice), reason)
    parts: list[Any] = [Text(_title(lowered), style="bold"), Text(_counts(lowered))]
    if lowered.choices:
        parts += ["", table]
    if fixed:
        parts += ["", "This text is lowered already: its providers are fixed, and no pass ran."]
    if lowered.notes:
        notes = Table.grid(padding=(0, 2, 0, 0))
        notes.add_column(no_wrap=True)
        notes.add_column(overflow="fold")
        for name, note in lowered.notes:
            notes.add_row(name, note)
        parts += ["", Text("what the passes said", style="bold"), notes]
    show(*parts)


def _provider(node: Node, choice: Choice) -> Text:
    if choice.provider == NONE:
        return Text("NONE", style="bold red")
    if choice.provider != NATIVE:
        return Text(choice.provider, style="bold green")
    return Text(choice.provider, style="dim" if node.folded or _plain(node) else "yellow")


def _plain(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].plain


def _title(lowered: Lowered) -> str:
    phases = [v.type.phase for v in lowered.graph.inputs if isinstance(v.type, SeqType)]
    return f"{quote(lowered.graph.name)}{''.join(f', {p}' for p in phases)}, for {lowered.platform}"


def _counts(lowered: Lowered) -> str:
    """What a reader wants first: who runs how much, and how much of native is no loss."""
    pairs = list(zip(lowered.graph.nodes, lowered.choices, strict=False))
    counts = Counter(c.provider or "without a provider" for n, c in pairs if not n.folded)
    torch_best = sum(c.provider == NATIVE and not n.folded and _plain(n) for n, c in pairs)
    said = []
    for provider, count in sorted(counts.items(), key=lambda item: (item[0] == NATIVE, item[0])):
        said.append(
            f"{count} {provider}" + (f" ({torch_best} best left to torch)" if provider == NATIVE and torch_best else "")
        )
    folded = sum(n.folded for n, _ in pairs)
    if folded:
        said.append(f"{folded} run once, at binding")
    return f"{len(lowered.graph.nodes)} nodes: {', '.join(said)}" if said else f"{len(lowered.graph.nodes)} nodes"
