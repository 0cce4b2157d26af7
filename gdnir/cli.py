"""The command line: what is in a graph, who runs it, why, and whether it is right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

import gdnir
from gdnir import cli_list, cli_run, show
from gdnir.cli_list import PlatformOption, PluginOption
from gdnir.errors import GdnirError, LoweringError, ParseError, VerifyError, closest
from gdnir.ir import DTYPES, Graph
from gdnir.lowering.choose import Target, candidates, refusal
from gdnir.models import config, trace
from gdnir.op import OPS
from gdnir.passes import DEFAULT_PIPELINE, Lowered, lower
from gdnir.passes.base import Step
from gdnir.platforms import detect, get_platform

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="gdnir: a kernel IR for Gated Delta Net layers. Start with: gdnir dump qwen3-next",
)
app.add_typer(cli_list.app)
MODEL_HELP = "A built-in name (see `gdnir models`), a config.json, a checkpoint folder, or a file of IR text."


class Format(str, Enum):
    text = "text"
    json = "json"
    dot = "dot"
    mermaid = "mermaid"
    svg = "svg"


class WhyFormat(str, Enum):
    text = "text"
    json = "json"


class Phase(str, Enum):
    prefill = "prefill"
    decode = "decode"
    verify = "verify"
    mixed = "mixed"


class Region(str, Enum):
    layer = "layer"
    core = "core"


Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
PhaseOption = Annotated[Phase | None, typer.Option(help="Default: prefill.")]
RegionOption = Annotated[Region | None, typer.Option(help="layer, or core: without the projections. Default: layer.")]
DtypeOption = Annotated[str | None, typer.Option(help="Activations: bf16, f16 or f32. Default: bf16.")]
StateOption = Annotated[str | None, typer.Option("--state-dtype", help="Recurrent state: f32 or bf16. Default: f32.")]
LayoutOption = Annotated[str | None, typer.Option("--state-layout", help="vk or kv. Default: vk.")]
PipelineOption = Annotated[
    str | None,
    typer.Option("-p", "--pipeline", help=f"Passes to run, with options. Default: {DEFAULT_PIPELINE}."),
]
ProviderOption = Annotated[
    list[str] | None, typer.Option("--provider", help="op=first,second: the exhaustive list for an op. Repeatable.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse native on anything but a CPU.")]


def _fail(error: Exception | str, code: int = 2) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}")
    return typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gdnir {gdnir.__version__}")
        raise typer.Exit


@app.callback()
def root(
    plugin: PluginOption = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    gdnir.load_plugins(plugin or [])


def _requests(given: list[str] | None) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for item in given or []:
        op, equals, names = item.partition("=")
        if not equals or not names:
            raise GdnirError(
                f"--provider {item}: expected op=provider,provider, such as gated_delta_rule=triton,native."
            )
        if op in table:
            raise GdnirError(f"--provider: two lists for {op}; a list is exhaustive. Write --provider {op}=a,b once.")
        table[op] = [name.strip() for name in names.split(",")]
    return table


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise GdnirError(f"--dtype {name}: {closest(name, ('bf16', 'f16', 'f32'))}")
    return DTYPES[name]


def _is_text(model: str) -> bool:
    """Whether MODEL is a file of IR text."""
    return Path(model).is_file() and Path(model).suffix != ".json"


def _graph(
    model: str,
    phase: Phase | None,
    region: Region | None,
    dtype: str | None,
    state_dtype: str | None,
    state_layout: str | None,
) -> Graph:
    """The traced graph of a model, or the graph in a file of IR text."""
    if _is_text(model):
        given = dict(phase=phase, region=region, dtype=dtype, state_dtype=state_dtype, state_layout=state_layout)
        _refuse(given, f"{model} is IR text, which says these itself.")
        try:
            graph = gdnir.parse(Path(model).read_text(encoding="utf-8"))
            gdnir.verify(graph)
        except (OSError, UnicodeDecodeError, ParseError, VerifyError) as error:
            raise GdnirError(f"{model}: {error}") from error
        return graph
    return trace(
        config(model),
        phase=(phase or Phase.prefill).value,
        region=(region or Region.layer).value,
        dtype=_dtype(dtype or "bf16"),
        state_dtype=_dtype(state_dtype or "f32"),
        state_layout=state_layout or "vk",  # type: ignore[arg-type]
    )


def _refuse(given: Mapping[str, object], why: str) -> None:
    """GdnirError if any of these options was given where it would have no effect: nothing is ignored silently."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if names:
        raise GdnirError(f"{why} Drop {' and '.join(names)}.")


def _lowered(
    graph: Graph,
    platform: str | None,
    given: list[str] | None,
    strict: bool,
    pipeline: str | None,
    observe: Callable[[Step], None] | None = None,
) -> Lowered:
    if graph.nodes and all(n.provider for n in graph.nodes):
        _refuse(dict(provider=given, strict=strict, pipeline=pipeline), "The text is lowered already: no pass runs.")
        return Lowered.of(graph, platform)
    passes = DEFAULT_PIPELINE if pipeline is None else pipeline
    return lower(graph, platform, providers=_requests(given), strict=strict, pipeline=passes, observe=observe)


def _print_step(step: Step) -> None:
    """A pass's result on stderr, so that stdout stays one graph."""
    print(
        f"# after {step.text}: {step.nodes_before} -> {len(step.result.graph.nodes)} nodes, {step.seconds * 1e3:.2f} ms",
        file=sys.stderr,
    )
    for note in step.result.notes:
        print(f"# {note}", file=sys.stderr)
    print(step.result.graph, file=sys.stderr)


@app.command()
def dump(
    model: Model,
    platform: PlatformOption = None,
    phase: PhaseOption = None,
    region: RegionOption = None,
    dtype: DtypeOption = None,
    state_dtype: StateOption = None,
    state_layout: LayoutOption = None,
    pipeline: PipelineOption = None,
    provider: ProviderOption = None,
    strict: StrictOption = False,
    no_lower: Annotated[bool, typer.Option("--no-lower", help="The traced graph, before any pass.")] = False,
    print_ir_after_all: Annotated[
        bool, typer.Option("--print-ir-after-all", help="The graph after each pass, on stderr.")
    ] = False,
    format: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.text,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of stdout.")] = None,
    plugin: PluginOption = None,
) -> None:
    """Print a layer's graph, lowered for a platform.

    Example: gdnir dump qwen3-next --platform cuda:sm_90 --phase decode
    """
    gdnir.load_plugins(plugin or [])
    graph = _graph(model, phase, region, dtype, state_dtype, state_layout)
    observe = _print_step if print_ir_after_all else None
    if no_lower:
        passes = dict(provider=provider, strict=strict, pipeline=pipeline, print_ir_after_all=print_ir_after_all)
        _refuse(passes, "--no-lower runs no pass.")
    lowered = (
        Lowered(graph, get_platform(platform))
        if no_lower
        else _lowered(graph, platform, provider, strict, pipeline, observe)
    )
    writers: dict[Format, Callable[[], str]] = {
        Format.text: lambda: str(lowered),
        Format.json: lambda: show.to_json(lowered, gdnir.__version__),
        Format.dot: lambda: show.to_dot(lowered.graph),
        Format.mermaid: lambda: show.to_mermaid(lowered.graph),
        Format.svg: lambda: show.to_svg(lowered.graph),
    }
    text = writers[format]()
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GdnirError(f"-o {output}: cannot be written ({error.strerror}).") from error


@app.command()
def why(
    model: Model,
    platform: PlatformOption = None,
    phase: PhaseOption = None,
    region: RegionOption = None,
    dtype: DtypeOption = None,
    state_dtype: StateOption = None,
    state_layout: LayoutOption = None,
    pipeline: PipelineOption = None,
    provider: ProviderOption = None,
    strict: StrictOption = False,
    format: Annotated[WhyFormat, typer.Option("--format", help="How to print it.")] = WhyFormat.text,
    plugin: PluginOption = None,
) -> None:
    """Say, op by op, which provider was chosen, and every refusal's sentence. Exit 1 if a request cannot be met.

    Example: gdnir why qwen3-next --platform cuda:sm_90 --strict
    """
    gdnir.load_plugins(plugin or [])
    graph = _graph(model, phase, region, dtype, state_dtype, state_layout)
    steps: list[Step] = []
    try:
        lowered = _lowered(graph, platform, provider, strict, pipeline, steps.append)
    except LoweringError:
        if format == WhyFormat.text:
            _print_unmet(steps[-1].result.graph if steps else graph, platform, provider, strict)
        raise
    if format == WhyFormat.json:
        sys.stdout.write(show.to_json(lowered, gdnir.__version__))
        return
    print(f"@{graph.name} on {lowered.platform}")
    if not lowered.choices and all(n.provider for n in graph.nodes):
        print("The text names its providers itself; nothing was chosen.")
    for node, choice in zip(lowered.graph.nodes, lowered.choices, strict=False):
        print(f"\n{', '.join(map(str, node.results))} = {choice.op}\n  {choice.provider}: chosen, {choice.reason}")
        for said in choice.refusals:
            print(f"  {said.provider}: refused, {said.reason}")
    print("\npasses")
    for name, note in lowered.notes:
        print(f"  {name}: {note}")


def _print_unmet(graph: Graph, platform: str | None, given: list[str] | None, strict: bool) -> None:
    """Every node that no provider takes, not only the first, with each refusal."""
    requests = {op: tuple(names) for op, names in _requests(given).items()}
    target = Target(get_platform(platform), requests, strict)
    print(f"@{graph.name} on {target.platform}: cannot be met")
    for node in graph.nodes:
        op, types = OPS[node.op], [v if v is None else v.type for v in node.operands]
        said = [(p, refusal(op, p, types, dict(node.attrs), target)) for p in candidates(op, target)]
        if not node.folded and all(reason is not None for _, reason in said):
            print(f"\n{', '.join(map(str, node.results))} = {node.op}")
            for provider, reason in said:
                print(f"  {provider}: refused, {reason}")


@app.command()
def run(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of prefill.")] = 512,
    decode: Annotated[int, typer.Option(min=0, help="Steps of decode after it.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="Default: f32 on a CPU, bf16 on a GPU.")] = None,
    state_dtype: StateOption = None,
    layer: Annotated[
        int | None, typer.Option(help="The model's own layer index. Default: its first GDN layer.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the input, and of the weights if there is no checkpoint.")] = 0,
    provider: ProviderOption = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare with the float64 oracle; exit 1 if it fails.")
    ] = False,
    plugin: PluginOption = None,
) -> None:
    """Run one layer on this machine: prefill, then decode, in place on a state pool.

    Example: gdnir run qwen3-next --tokens 512 --decode 16 --check
    """
    gdnir.load_plugins(plugin or [])
    if _is_text(model):
        raise GdnirError(f"run needs a model, which has weights and states; {model} is IR text.")
    folder = Path(model) if Path(model).is_dir() else None
    name = dtype or ("f32" if detect().device == "cpu" else "bf16")
    passed = cli_run.run_layer(
        Console(), config(model), folder, tokens=tokens, decode=decode, dtype=_dtype(name), state_dtype=_dtype(state_dtype or "f32"),
        layer=layer, seed=seed, providers=_requests(provider), check=check,
    )  # fmt: skip
    if not passed:
        raise _fail("the layer does not agree with the float64 oracle.", 1)


def main(arguments: list[str] | None = None) -> Any:
    """The console entry point: gdnir's own errors become one message and an exit code."""
    try:
        app(arguments, standalone_mode=True)
    except LoweringError as error:
        sys.exit(_fail(error, 1).exit_code)
    except GdnirError as error:
        sys.exit(_fail(error).exit_code)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
