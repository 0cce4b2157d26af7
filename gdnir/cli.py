"""The command line: `gdnir dump | why | run | ops | providers | platforms | passes | models | collect-env`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from gdnir import __version__, cli_list, cli_run, show
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
)
from gdnir.cli_text import echo_ir, json_text, write
from gdnir.cli_why import why
from gdnir.errors import ArgumentError, GdnirError, LoweringError
from gdnir.ir import Graph
from gdnir.passes import Lowered
from gdnir.passes.base import Step

UNMET, WRONG = 1, 2
"""Exit codes: a request that cannot be met (a lowering, a check), and a request that is wrong."""


class _Group(TyperGroup):
    """Every GdnirError is one message on stderr and an exit code; a reader that goes away ends the program quietly."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except GdnirError as error:
            sys.stdout.flush()
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)
            sys.exit(UNMET if isinstance(error, LoweringError) else WRONG)
        except BrokenPipeError:
            # What is still buffered goes nowhere, so that the interpreter's last flush has nothing to complain about.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(UNMET)


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"gdnir {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gdnir(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    plugin: PluginOption = None,
) -> None:
    """A kernel IR for Gated Delta Net layers: see a layer's graph, which kernel runs each op on a platform, and why.

    \b
      gdnir dump qwen3-next --platform cuda:sm_90 --phase decode
      gdnir why qwen3-next --platform cuda:sm_90 --strict
      gdnir run qwen3-next --tokens 512 --decode 16

    Exit codes: 0; 1 if a request cannot be met or a check fails; 2 if the request itself is wrong.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def dump(
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
    no_lower: Annotated[
        bool, typer.Option("--no-lower", help="The graph as traced (or as read), before any pass.")
    ] = False,
    print_ir_after_all: Annotated[
        bool,
        typer.Option(
            "--print-ir-after-all",
            help="Print the graph after each pass to stderr: its time, its notes, nodes before and after.",
        ),
    ] = False,
    format: Annotated[
        Literal["text", "json", "dot", "mermaid", "svg"], typer.Option("--format", help="How to write the graph.")
    ] = "text",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to this file.", show_default=False)
    ] = None,
    plugin: PluginOption = None,
) -> None:
    """Print a layer's graph, lowered for a platform.

    The text reads back with `gdnir.parse`, and as MODEL of this command.

    \b
      gdnir dump qwen3-next --platform cuda:sm_90 --phase decode
      gdnir dump qwen3.5-9b --no-lower -o layer.gdnir
      gdnir dump layer.gdnir --platform rocm:gfx942 -p fold-weights,lower
      gdnir dump qwen3-next --format svg -o layer.svg
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
    result: Graph | Lowered = graph
    if no_lower:
        _refuse_with_no_lower(
            platform=platform,
            pipeline=pipeline,
            provider=provider,
            strict=strict,
            print_ir_after_all=print_ir_after_all,
        )
    else:
        result = request.lower(graph, _print_step if print_ir_after_all else None)
    if format == "text" and output is None:
        echo_ir(str(result))
        return
    text = {
        "text": str,
        "dot": show.to_dot,
        "mermaid": show.to_mermaid,
        "svg": show.to_svg,
        "json": lambda g: json_text(show.to_json(g)),
    }[format](result)
    write(text, output)


def _refuse_with_no_lower(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ArgumentError(
                "dump",
                f"--{name.replace('_', '-')}",
                expected="no option of the lowering beside --no-lower",
                got=str(value),
                hint="Drop one of the two.",
            )


def _print_step(step: Step) -> None:
    """One pass as IR text whose comments say what it did."""
    graph = step.result.graph
    lines = [f"# after {step.text}: {step.seconds * 1e3:.2f} ms, {step.nodes_before} -> {len(graph.nodes)} nodes"]
    lines += [f"#   {line}" for note in step.result.notes for line in note.splitlines()]
    echo_ir("\n".join([*lines, str(graph)]) + "\n", error=True)


app.command()(why)
app.command()(cli_run.run)
app.command()(cli_list.ops)
app.command()(cli_list.providers)
app.command()(cli_list.platforms)
app.command()(cli_list.passes)
app.command()(cli_list.models)
app.command("collect-env")(cli_list.collect_env)


def main() -> None:
    """The console entry point."""
    app(prog_name="gdnir")


if __name__ == "__main__":
    main()
