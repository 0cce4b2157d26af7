"""`gdnir run`: one layer, prefill then decode, with times per op and the error against the float64 oracle."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from gdnir import oracle
from gdnir.ir import Graph, Node
from gdnir.models import GdnConfig, load_weights, random_weights, trace
from gdnir.passes import lower
from gdnir.plan import Plan
from gdnir.platforms import detect
from gdnir.pool import StatePool
from gdnir.seq import Seq

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""The largest row error that passes, by the activations' dtype."""


def run_layer(
    console: Console,
    config: GdnConfig,
    folder: Path | None,
    *,
    tokens: int,
    decode: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    layer: int | None,
    seed: int,
    providers: Mapping[str, Sequence[str]],
    check: bool,
) -> bool:
    """Run and report; False if the check fails."""
    here = detect()
    device = torch.device(here.device)
    layer = config.layers[0] if layer is None else layer
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("weights", total=None)
        weights = (
            load_weights(folder, layer, config=config, device=device)
            if folder
            else random_weights(config, seed, device=device)
        )
        graphs: dict[str, Graph] = {
            p: trace(config, phase=p, dtype=dtype, state_dtype=state_dtype) for p in ("prefill", "decode")
        }
        plans = {p: Plan(lower(g, here, providers=providers), weights) for p, g in graphs.items()}
        pool = StatePool(config, slots=2, dtype=state_dtype, conv_dtype=dtype, layers=[layer], device=device)
        random = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(tokens + decode, config.hidden_size, generator=random).to(device=device, dtype=dtype)
        slot = pool.allocate(1)
        first, step = Seq.prefill([tokens], slots=slot, device=device), Seq.decode(slot, device=device)
        with torch.no_grad():
            bar.update(task, description=f"prefill, {tokens} tokens")
            plans["prefill"](x[:tokens], pool.layer(layer), first)  # warm: thread pools and compilers start here
            pool.reset(slot)
            out, prefill_spans = plans["prefill"].timed(x[:tokens], pool.layer(layer), first)
            outs: list[Tensor] = [out]
            decode_spans: list[list[tuple[Node, float]]] = []
            for i in range(decode):
                bar.update(task, description=f"decode, step {i + 1} of {decode}")
                out, spans = plans["decode"].timed(x[tokens + i : tokens + i + 1], pool.layer(layer), step)
                outs.append(out)
                decode_spans.append(spans)
        errors = None
        if check:
            bar.update(task, description=f"float64 oracle, {tokens + decode} tokens, token by token")
            errors = _errors(graphs, weights, x, outs, pool, layer, slot, tokens, decode)
    _times(console, config, here.name, dtype, tokens, prefill_spans, decode_spans)
    return _verdict(console, errors, TOLERANCE[dtype], state_dtype) if errors is not None else True


def _errors(
    graphs: dict[str, Graph],
    weights: Mapping[str, Tensor],
    x: Tensor,
    outs: list[Tensor],
    pool: StatePool,
    layer: int,
    slot: list[int],
    tokens: int,
    decode: int,
) -> dict[str, float]:
    """Largest row errors: prefill outputs, decode outputs, and the two final states."""
    states = [torch.zeros_like(s) for s in pool.layer(layer)]
    whole = Seq.prefill([tokens + decode], slots=slot)
    reference, finals = oracle.run(graphs["prefill"], weights, [x], states, whole)
    found = {"prefill outputs": oracle.row_error(outs[0], reference[0][:tokens])}
    if decode:
        found["decode outputs"] = oracle.row_error(torch.cat(outs[1:]), reference[0][tokens:])
    # A row of the convolution's state is one past input over its channels; of the recurrent state, one head.
    conv, ssm = pool.layer(layer)
    found["conv state"] = oracle.row_error(conv[slot].mT, finals[0][slot].mT)
    found["recurrent state"] = oracle.row_error(ssm[slot].flatten(-2), finals[1][slot].flatten(-2))
    return {name: float(e.max()) if e.numel() else 0.0 for name, e in found.items()}


def _times(
    console: Console,
    config: GdnConfig,
    platform: str,
    dtype: torch.dtype,
    tokens: int,
    prefill: list[tuple[Node, float]],
    decode: list[list[tuple[Node, float]]],
) -> None:
    """A section for each phase: their graphs need not have the same nodes."""
    table = Table(title=f"{config.name}: one GDN layer on {platform}, {str(dtype).removeprefix('torch.')}")
    for name in ("op", "provider", "ms"):
        table.add_column(name, justify="right" if name == "ms" else "left")
    sections = [(f"prefill of {tokens} tokens", prefill, tokens)]
    if decode:
        steps = [(node, statistics.median(spans[i][1] for spans in decode)) for i, (node, _) in enumerate(decode[0])]
        sections.append((f"decode step, median of {len(decode)}", steps, 1))
    for title, rows, count in sections:
        table.add_row(f"[bold]{title}[/]")
        for node, seconds in rows:
            table.add_row(f"  {node.op}", node.provider or "", f"{seconds * 1e3:.3f}")
        total = sum(seconds for _, seconds in rows)
        table.add_row("  all", "", f"{total * 1e3:.3f}")
        table.add_row("  tokens/s", "", f"{count / total:,.0f}" if total else "-")
        table.add_section()
    console.print(table)


def _verdict(console: Console, errors: dict[str, float], tolerance: float, state_dtype: torch.dtype) -> bool:
    table = Table(title="Against the float64 oracle, token by token")
    for name in ("what", "largest row error", "allowed", ""):
        table.add_column(name, justify="right" if name in ("largest row error", "allowed") else "left")
    good = True
    for name, error in errors.items():
        allowed = max(tolerance, 3e-2) if name == "recurrent state" and state_dtype == torch.bfloat16 else tolerance
        passed = error <= allowed  # a nan is no pass
        good &= passed
        table.add_row(name, f"{error:.2e}", f"{allowed:.0e}", "[green]pass[/]" if passed else "[red]FAIL[/]")
    console.print(table)
    return good
