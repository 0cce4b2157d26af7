"""The command line: what is in a graph, who runs it, why, and whether it is right."""

from __future__ import annotations

import json
import platform as machine
import sys
from collections.abc import Callable
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gdnir
from gdnir import cli_run, plugins, show
from gdnir.errors import GdnirError, LoweringError, closest
from gdnir.ir import DTYPES, Graph
from gdnir.lowering import LOWERINGS, providers
from gdnir.models import builtins, config, trace
from gdnir.models.config import ALIASES
from gdnir.op import OPS
from gdnir.passes import DEFAULT_PIPELINE, Lowered, lower
from gdnir.passes.base import PASSES, Step
from gdnir.platforms import PLATFORMS, detect, get_platform

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="gdnir: a kernel IR for Gated Delta Net layers. Start with: gdnir dump qwen3-next",
)
MODEL_HELP = "A built-in name (see `gdnir models`), a config.json, a checkpoint folder, or a file of IR text."


class Format(str, Enum):
    text = "text"
    json = "json"
    dot = "dot"
    mermaid = "mermaid"
    svg = "svg"


class Phase(str, Enum):
    prefill = "prefill"
    decode = "decode"
    verify = "verify"
    mixed = "mixed"


class Region(str, Enum):
    layer = "layer"
    core = "core"


Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", help="What to lower for, such as cuda:sm_90. Default: this machine.")
]
PhaseOption = Annotated[Phase | None, typer.Option(help="Default: prefill.")]
RegionOption = Annotated[Region | None, typer.Option(help="layer, or core: without the projections. Default: layer.")]
DtypeOption = Annotated[str, typer.Option(help="Activations: bf16, f16 or f32.")]
StateOption = Annotated[str, typer.Option("--state-dtype", help="Recurrent state: f32 or bf16.")]
LayoutOption = Annotated[str, typer.Option("--state-layout", help="vk or kv.")]
PipelineOption = Annotated[
    str, typer.Option("-p", "--pipeline", help="Passes to run, such as fold-weights,fuse{op=conv_prep},lower.")
]
ProviderOption = Annotated[
    list[str] | None, typer.Option("--provider", help="op=first,second: the exhaustive list for an op. Repeatable.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse native on anything but a CPU.")]
PluginOption = Annotated[
    list[str] | None, typer.Option("--plugin", help="Load this installed plugin first. Repeatable.")
]


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
        table[op] = names.split(",")
    return table


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise GdnirError(f"--dtype {name}: {closest(name, ('bf16', 'f16', 'f32'))}")
    return DTYPES[name]


def _graph(model: str, phase: Phase | None, region: Region | None, dtype: str, state_dtype: str, layout: str) -> Graph:
    """The traced graph of a model, or the graph in a file of IR text."""
    path = Path(model)
    if path.is_file() and path.suffix != ".json":
        if phase or region:
            raise GdnirError(f"{model} is IR text: its phase and region are what it says. Drop --phase and --region.")
        graph = gdnir.parse(path.read_text(encoding="utf-8"))
        gdnir.verify(graph)
        return graph
    return trace(
        config(model),
        phase=(phase or Phase.prefill).value,
        region=(region or Region.layer).value,
        dtype=_dtype(dtype),
        state_dtype=_dtype(state_dtype),
        state_layout=layout,  # type: ignore[arg-type]
    )


def _lowered(
    graph: Graph,
    platform: str | None,
    given: list[str] | None,
    strict: bool,
    pipeline: str,
    observe: Callable[[Step], None] | None = None,
) -> Lowered:
    if graph.nodes and all(n.provider for n in graph.nodes):
        return Lowered.of(graph, platform)
    return lower(graph, platform, providers=_requests(given), strict=strict, pipeline=pipeline, observe=observe)


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
    dtype: DtypeOption = "bf16",
    state_dtype: StateOption = "f32",
    state_layout: LayoutOption = "vk",
    pipeline: PipelineOption = DEFAULT_PIPELINE,
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
    else:
        output.write_text(text, encoding="utf-8")


@app.command()
def why(
    model: Model,
    platform: PlatformOption = None,
    phase: PhaseOption = None,
    region: RegionOption = None,
    dtype: DtypeOption = "bf16",
    state_dtype: StateOption = "f32",
    state_layout: LayoutOption = "vk",
    pipeline: PipelineOption = DEFAULT_PIPELINE,
    provider: ProviderOption = None,
    strict: StrictOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="The choices as JSON.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Say, op by op, which provider was chosen, and every refusal's sentence. Exit 1 if a request cannot be met.

    Example: gdnir why qwen3-next --platform cuda:sm_90 --strict
    """
    gdnir.load_plugins(plugin or [])
    graph = _graph(model, phase, region, dtype, state_dtype, state_layout)
    lowered = _lowered(graph, platform, provider, strict, pipeline)
    if as_json:
        sys.stdout.write(show.to_json(lowered, gdnir.__version__))
        return
    print(f"@{graph.name} on {lowered.platform}")
    if not lowered.choices:
        print("The text names its providers itself; nothing was chosen.")
    for node, choice in zip(lowered.graph.nodes, lowered.choices, strict=False):
        print(f"\n{', '.join(map(str, node.results))} = {choice.op}\n  {choice.provider}: chosen, {choice.reason}")
        for refusal in choice.refusals:
            print(f"  {refusal.provider}: refused, {refusal.reason}")
    print("\npasses")
    for name, note in lowered.notes:
        print(f"  {name}: {note}")


@app.command()
def run(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of prefill.")] = 512,
    decode: Annotated[int, typer.Option(min=0, help="Steps of decode after it.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="Default: f32 on a CPU, bf16 on a GPU.")] = None,
    state_dtype: StateOption = "f32",
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
    folder = Path(model) if Path(model).is_dir() else None
    name = dtype or ("f32" if detect().device == "cpu" else "bf16")
    passed = cli_run.run_layer(
        Console(), config(model), folder, tokens=tokens, decode=decode, dtype=_dtype(name), state_dtype=_dtype(state_dtype),
        layer=layer, seed=seed, providers=_requests(provider), check=check,
    )  # fmt: skip
    if not passed:
        raise _fail("the layer does not agree with the float64 oracle.", 1)


@app.command()
def ops(
    name: Annotated[str | None, typer.Argument(help="One op, in full.")] = None, plugin: PluginOption = None
) -> None:
    """List the ops, or explain one."""
    gdnir.load_plugins(plugin or [])
    if name is None:
        for op in OPS.values():
            print(f"{op.name:18} {'fused ' if op.fused else ''}{op.doc.splitlines()[0] if op.doc else ''}")
        return
    if name not in OPS:
        raise GdnirError(f"unknown op `{name}`. {closest(name, OPS)}")
    op = OPS[name]
    print(
        f"{op.name}   ({'fused op' if op.fused else 'op'} of {op.origin})\n\n{op.contract.text}\n\n{op.doc}\n\nattributes"
    )
    for spec in op.attrs:
        print(
            f"  {spec.name}: {getattr(spec.annotation, '__name__', spec.annotation)}"
            + ("" if spec.required else f" = {spec.default!r}")
        )
    print("providers\n  " + ", ".join(LOWERINGS.get(name, {}) or ["native (its body)"]))


@app.command("providers")
def list_providers(platform: PlatformOption = None, plugin: PluginOption = None) -> None:
    """List who can run what, where each lowering comes from, and which plugins are installed."""
    gdnir.load_plugins(plugin or [])
    target = get_platform(platform)
    print(f"on {target}")
    for provider in providers():
        print(f"\n{provider}")
        for op, known in LOWERINGS.items():
            if provider in known:
                lowering = known[provider]
                reason = lowering.available(target) if lowering.available else None
                print(f"  {op:18} {lowering.origin}" + (f"\n    not here: {reason}" if reason else ""))
    print("\nplugins")
    for p in plugins.installed():
        print(
            f"  {p.name} ({p.distribution} {p.version}, {p.group}): {'loaded' if p.loaded else 'installed, not loaded'}"
        )
    if not plugins.installed():
        print("  none installed")


@app.command("platforms")
def list_platforms(plugin: PluginOption = None) -> None:
    """List the platforms and their facts."""
    gdnir.load_plugins(plugin or [])
    table = Table(box=None)
    for name in ("platform", "GB/s", "bf16 TFLOP/s", "KB shared", "cores", "order", "source"):
        table.add_column(name, overflow="fold")

    def number(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:,.0f}"

    for p in PLATFORMS.values():
        table.add_row(
            p.name,
            number(p.bandwidth, 1e9),
            number(p.matrix_rate, 1e12),
            number(p.shared_memory, 1024),
            number(p.cores, 1),
            ", ".join((*p.order, "native")),
            p.source,
        )
    Console().print(table)
    print(f"this machine: {detect()}")


@app.command("passes")
def list_passes() -> None:
    """List the passes and the default pipeline."""
    for name, cls in PASSES.items():
        print(f"{name}\n  {' '.join((cls.__doc__ or '').split())}\n")
    print(f"default pipeline: {DEFAULT_PIPELINE}")


@app.command("models")
def list_models() -> None:
    """List the built-in models and where their sizes come from."""
    for name, c in builtins().items():
        aliases = [a for a, target in ALIASES.items() if target == name]
        h, hv, k, v = c.heads
        print(f"{name}" + (f" ({', '.join(aliases)})" if aliases else ""))
        print(
            f"  D {c.hidden_size}, H {h}, HV {hv}, K {k}, V {v}, W {c.conv_width}; {len(c.layers)} of {c.num_layers} layers are GDN"
        )
        print(f"  from {c.source}")


@app.command("collect-env")
def collect_env() -> None:
    """Print what a bug report needs."""
    print(f"gdnir {gdnir.__version__}\npython {machine.python_version()} on {machine.platform()}")
    for name in ("torch", "triton", "transformers", "safetensors", "networkx", "numpy"):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")
    here = detect()
    print(f"platform {here}, software: {', '.join(sorted(here.software)) or 'none'}, threads {torch.get_num_threads()}")
    if here.device == "cuda":
        print(f"gpu {torch.cuda.get_device_name()}, driver CUDA {torch.version.cuda or torch.version.hip}")
    print("plugins " + json.dumps([f"{p.name} {p.version}" for p in plugins.installed()]))


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
