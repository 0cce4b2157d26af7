"""`gdnir run`: one layer on this machine, prefill then decode, timed op by op and judged by the float64 oracle."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdnir import __version__, oracle
from gdnir.cli_request import DType, PluginOption, ProviderOption, StateDTypeOption, parse_providers, read_model
from gdnir.cli_text import json_text, show, write
from gdnir.errors import ArgumentError
from gdnir.ir import DTYPES, Graph, Node, dtype_name, quote
from gdnir.models import GdnConfig, load_weights, random_weights, trace
from gdnir.passes import Lowered, lower
from gdnir.passes.base import Step
from gdnir.plan import Plan
from gdnir.platforms import detect
from gdnir.pool import StatePool
from gdnir.seq import Seq
from gdnir.weights import Weights

TOLERANCE = {"f32": 1e-5, "bf16": 3e-2, "f16": 3e-2}
"""The largest relative error of any row, by the least precise dtype of the run."""
ENOUGH = 2.0
"""Seconds: prefill is repeated until this is spent, and only what takes longer shows a progress bar."""
REPEATS = 5


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A built-in name, a config.json (random weights), or a checkpoint folder.",
            show_default=False,
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the prefill.")] = 512,
    decode: Annotated[int, typer.Option("--decode", min=0, help="Decode steps after it.")] = 16,
    dtype: Annotated[
        Literal["bf16", "f16", "f32"] | None,
        typer.Option(
            "--dtype",
            help="Element type of activations and weights. Default: f32 on a CPU, bf16 on a GPU.",
            show_default=False,
        ),
    ] = None,
    state_dtype: StateDTypeOption = None,
    seed: Annotated[
        int, typer.Option("--seed", help="For the inputs, and for weights that are not read from a checkpoint.")
    ] = 0,
    provider: ProviderOption = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare outputs and states with the float64 oracle.")
    ] = True,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="The model's own index of the layer. Default: its first GDN layer.", show_default=False
        ),
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option("--format", help="How to write the results.")] = "text",
    plugin: PluginOption = None,
) -> None:
    """Run one layer on this machine: a prefill, then decode steps in place on the state it left.

    Prints the time of each op, tokens per second, and the largest row error against the float64 oracle; exits
    with 1 if an error is above the tolerance (f32: 1e-5; with bf16 or f16 anywhere: 3e-2).

    \b
      gdnir run qwen3-next --tokens 512 --decode 16
      gdnir run ./Qwen3.5-9B --layer 4 --dtype bf16
      gdnir run qwen3.5-9b --provider causal_conv1d=triton --no-check
    """
    config = read_model(model)
    if isinstance(config, Graph):
        raise ArgumentError(
            "run",
            "MODEL",
            expected="a model, which has weights and states",
            got=f"IR text ({model})",
            hint="Name a built-in model, a config.json or a checkpoint folder.",
        )
    device = detect().device
    job = Job(
        config,
        config.layers[0] if layer is None else layer,
        tokens,
        decode,
        dtype or ("f32" if device == "cpu" else "bf16"),
        state_dtype or "f32",
        seed,
        device,
    )
    with torch.no_grad(), _bar() as step:
        weights = job.weights(Path(model))
        result = _measure(job, weights, parse_providers(provider), step)
        errors = _judge(job, weights, result, step) if check else {}
    passed = all(error <= job.tolerance for error in errors.values())  # a NaN fails
    if format == "json":
        write(json_text(_json(job, weights, result, errors, passed)), None)
    else:
        _print(job, weights, result, errors)
    if not passed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Job:
    """What is run."""

    config: GdnConfig
    layer: int
    tokens: int
    steps: int
    dtype: DType
    state_dtype: str
    seed: int
    device: str

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[self.dtype], TOLERANCE[self.state_dtype])

    def graph(self, phase: Literal["prefill", "decode"]) -> Graph:
        return trace(self.config, phase=phase, dtype=DTYPES[self.dtype], state_dtype=DTYPES[self.state_dtype])

    def weights(self, source: Path) -> Weights:
        """The layer's own weights from a checkpoint folder, else random ones."""
        if source.is_dir():
            return load_weights(source, self.layer, config=self.config)
        if self.layer not in self.config.layers:
            raise ArgumentError(
                "run",
                "--layer",
                expected=f"a GDN layer of {self.config.name}: {', '.join(map(str, self.config.layers))}",
                got=str(self.layer),
            )
        return random_weights(self.config, self.seed)

    def inputs(self) -> Tensor:
        """x[tokens + steps, D] ~ N(0, 1), in the run's dtype; the same on every machine."""
        random = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.tokens + self.steps, self.config.hidden_size, generator=random).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Phase:
    """One phase's times in seconds (medians): of each node, waiting for the device after each, and of a whole call."""

    nodes: tuple[tuple[Node, float], ...]
    call: float
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.call


@dataclass(frozen=True)
class Result:
    phases: Mapping[str, Phase]
    prefill: Tensor
    decode: Tensor
    conv: Tensor
    ssm: Tensor


def _measure(job: Job, weights: Weights, providers: Mapping[str, tuple[str, ...]], bar: Progress) -> Result:
    """Run everything twice, each in a slot of its own: timed node by node, and as plain calls, whose results count."""
    task = bar.add_task("prefill and decode", total=None)
    plans = {phase: Plan(lower(job.graph(phase), providers=providers), weights) for phase in ("prefill", "decode")}
    pool = StatePool(
        job.config,
        2,
        dtype=DTYPES[job.state_dtype],
        conv_dtype=DTYPES[job.dtype],
        layers=[job.layer],
        device=job.device,
    )
    state, (timed_slot, slot) = pool.layer(job.layer), pool.allocate(2)
    x = job.inputs().to(job.device)
    prompt, rest = x[: job.tokens], x[job.tokens :].split(1)

    def batch(where: int) -> tuple[Seq, Seq]:
        return Seq.prefill([job.tokens], slots=[where], device=job.device), Seq.decode([where], device=job.device)

    def call(plan: Plan, x: Tensor, seq: Seq) -> tuple[Any, float]:
        start = time.perf_counter()
        out = plan(x, state, seq)
        if job.device != "cpu":
            torch.accelerator.synchronize()
        return out, time.perf_counter() - start

    bar.update(task, total=2 * len(rest) + 2, completed=0)
    prefill, decode = batch(timed_slot)
    spans = _repeat(lambda: plans["prefill"].timed(prompt, state, prefill))  # from zero each time: it may be repeated
    bar.advance(task)
    steps = []
    for token in rest:
        steps.append(plans["decode"].timed(token, state, decode))
        bar.advance(task)
    prefill, decode = batch(slot)
    calls = _repeat(lambda: call(plans["prefill"], prompt, prefill))
    bar.advance(task)
    outs = []
    for token in rest:
        outs.append(call(plans["decode"], token, decode))
        bar.advance(task)
    phases = {"prefill": _phase([s for _, s in spans], [s for _, s in calls], job.tokens)}
    if outs:
        phases["decode"] = _phase([s for _, s in steps], [s for _, s in outs], 1)
    return Result(
        phases, calls[-1][0], torch.cat([o for o, _ in outs]) if outs else x[:0], state.conv[slot], state.ssm[slot]
    )


def _repeat(call: Callable[[], tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Calls until there are enough or time is up; the first, which warms up, is dropped if others follow."""
    start, results = time.perf_counter(), [call()]
    while len(results) <= REPEATS and time.perf_counter() - start < ENOUGH:
        results.append(call())
    return results[1:] or results


def _phase(spans: list[list[tuple[Node, float]]], calls: list[float], tokens: int) -> Phase:
    nodes = tuple((node, statistics.median(s[i][1] for s in spans)) for i, (node, _) in enumerate(spans[0]))
    return Phase(nodes, statistics.median(calls), tokens)


def _judge(job: Job, weights: Weights, result: Result, bar: Progress) -> dict[str, float]:
    """The largest row error of outputs and final states.

    One oracle run over all tokens judges both phases: in exact arithmetic decoding is the same recurrence.
    """
    task = bar.add_task("float64 oracle, token by token", total=None)
    h, hv, k, v = job.config.heads
    zeros = [torch.zeros(1, job.config.channels, job.config.conv_width - 1), torch.zeros(1, hv, v, k)]
    total = job.tokens + job.steps
    outs, (conv, ssm) = oracle.run(
        job.graph("prefill"), weights, [job.inputs()], zeros, Seq.prefill([total], slots=[0])
    )
    bar.update(task, total=1, completed=1)
    pairs = {
        "prefill output": (result.prefill, outs[0][: job.tokens]),
        "decode output": (result.decode, outs[0][job.tokens :]),
        "final ssm state": (result.ssm, ssm[0]),
        "final conv state": (result.conv, conv[0]),
    }
    return {
        name: oracle.row_error(out, reference).max().item() for name, (out, reference) in pairs.items() if out.numel()
    }


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on stderr that appears once the work has taken a while, and leaves nothing behind."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    late = threading.Timer(ENOUGH, progress.start)
    late.daemon = True
    late.start()
    try:
        yield progress
    finally:
        late.cancel()
        late.join()
        progress.stop()


# ---- what is printed ----


def _rows(phases: Mapping[str, Phase]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Seconds by (op, provider, occurrence) and phase, in the order they run."""
    table: dict[tuple[str, str, int], dict[str, float]] = {}
    for name, phase in phases.items():
        seen: dict[tuple[str, str], int] = {}
        for node, seconds in phase.nodes:
            key = (node.op, node.provider or "")
            seen[key] = seen.get(key, 0) + 1
            table.setdefault((*key, seen[key]), {})[name] = seconds
    return table


def _print(job: Job, weights: Weights, result: Result, errors: Mapping[str, float]) -> None:
    columns = list(result.phases)
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "left", *(("right", "right") * len(columns))):
        table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_row(
        *(
            Text(name, style="bold")
            for name in ("op", "provider", *(c for name in columns for c in (f"{name} ms", "%")))
        )
    )
    sums = {name: sum(s for _, s in phase.nodes) for name, phase in result.phases.items()}
    for (op, provider, _), seconds in _rows(result.phases).items():
        cells = [
            c
            for n in columns
            for c in ((_ms(seconds[n]), f"{100 * seconds[n] / sums[n]:.0f}") if n in seconds else ("", ""))
        ]
        table.add_row(quote(op), quote(provider), *cells)
    table.add_row("all ops, one by one", "", *(c for n in columns for c in (_ms(sums[n]), "")))
    table.add_row(
        Text("whole call", style="bold"),
        "",
        *(c for n in columns for c in (Text(_ms(result.phases[n].call), style="bold"), "")),
    )
    table.add_row(
        Text("tokens/s", style="bold"),
        "",
        *(c for n in columns for c in (Text(f"{result.phases[n].rate:,.0f}", style="bold"), "")),
    )
    title = f"{job.config.name}, layer {job.layer}, on {detect()}: {job.dtype}, state {job.state_dtype}"
    work = f"one sequence: {job.tokens} tokens of prefill, {job.steps} decode steps; medians; {weights.source}"
    shown: list[Any] = [Text(title, style="bold"), work, "", table, ""]
    if not errors:
        return show(*shown, "not checked (--no-check)")
    checks = Table.grid(padding=(0, 2, 0, 0))
    for name, error in errors.items():
        good = error <= job.tolerance
        checks.add_row(
            name, f"{error:.2e}", Text("PASS" if good else "FAIL", style="bold green" if good else "bold red")
        )
    return show(
        *shown, Text(f"largest row error against the float64 oracle, tolerance {job.tolerance:g}", style="bold"), checks
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _json(job: Job, weights: Weights, result: Result, errors: Mapping[str, float], passed: bool) -> dict[str, Any]:
    """Seconds throughout; an error that is no finite number is a string."""
    return {
        "schema": 1,
        "gdnir": __version__,
        "model": job.config.name,
        "layer": job.layer,
        "platform": detect().name,
        "dtype": job.dtype,
        "state_dtype": job.state_dtype,
        "tokens": job.tokens,
        "decode": job.steps,
        "seed": job.seed,
        "weights": weights.source,
        "phases": {
            name: {
                "call": phase.call,
                "tokens_per_second": phase.rate,
                "nodes": [{"op": n.op, "provider": n.provider, "seconds": s} for n, s in phase.nodes],
            }
            for name, phase in result.phases.items()
        },
        "check": {
            "tolerance": job.tolerance,
            "passed": passed if errors else None,
            "errors": {name: error if error < float("inf") else repr(error) for name, error in errors.items()},
        },
    }
