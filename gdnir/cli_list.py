"""The commands that list what gdnir knows: ops, providers, platforms, passes, models, and this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform as machine
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gdnir import __version__
from gdnir.cli_request import PlatformOption, PluginOption, find_platform
from gdnir.cli_text import show
from gdnir.errors import RegistryError, closest
from gdnir.ir import attr_text, normal_attr
from gdnir.lowering import LOWERINGS, NATIVE
from gdnir.lowering import providers as known_providers
from gdnir.models import builtins
from gdnir.models.config import ALIASES
from gdnir.op import OPS, AttrSpec, Op
from gdnir.passes import DEFAULT_PIPELINE
from gdnir.passes.base import PASSES
from gdnir.platforms import PLATFORMS, Platform, detect
from gdnir.plugins import GROUPS, installed


def _grid(*columns: str, header: bool = True) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            justify="right" if name.startswith(">") else "left", no_wrap=not name.endswith("~"), overflow="fold"
        )
    if header:
        table.add_row(*(Text(name.strip(">~"), style="bold") for name in columns))
    return table


# ---- ops ----


def ops(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Everything about this op.", show_default=False)
    ] = None,
    platform: PlatformOption = None,
    plugin: PluginOption = None,
) -> None:
    """List the ops, or print all there is to know of one: its maths, contract, attributes and providers.

    \b
      gdnir ops
      gdnir ops gated_delta_rule
    """
    if name is None:
        for op in OPS.values():
            show(
                Text.assemble((op.name, "bold"), f"  {_kind(op)}" if _kind(op) else ""),
                Padding(Text(op.doc.partition("\n")[0]), (0, 0, 0, 4)),
                Padding(Text(op.contract.text, style="dim"), (0, 0, 0, 4)),
            )
        return
    if name not in OPS:
        raise RegistryError(
            f"ops: unknown op `{name}`. {closest(name, OPS)} `gdnir ops` lists them all; plugins bring more (--plugin)."
        )
    _describe(OPS[name], find_platform(platform))


def _kind(op: Op) -> str:
    return "fused" if op.fused else "best left to torch" if op.plain else ""


def _describe(op: Op, platform: Platform) -> None:
    shown: list[Any] = [Text.assemble((op.name, "bold"), f"  ({_kind(op)})" if _kind(op) else ""), "", Text(op.doc), ""]
    shown += [Text("contract", style="bold"), Padding(Text(op.contract.text), (0, 0, 0, 2)), ""]
    if op.attrs:
        table = _grid("", "~", header=False)
        for spec in op.attrs:
            table.add_row(spec.name, _attribute(spec))
        shown += [Text("attributes", style="bold"), Padding(table, (0, 0, 0, 2)), ""]
    table = _grid("", "~", header=False)
    for provider, (answer, origin) in _lowerings(op, platform).items():
        table.add_row(provider, f"{'available' if answer is None else answer} ({origin})")
    shown += [
        Text(f"providers on {platform}", style="bold"),
        Padding(table, (0, 0, 0, 2)),
        "",
        f"declared by {op.origin}",
    ]
    show(*shown)


def _attribute(spec: AttrSpec) -> str:
    choices = typing.get_args(spec.annotation) if typing.get_origin(spec.annotation) is typing.Literal else ()
    name = " | ".join(map(repr, choices)) or _type_name(spec.annotation)
    return f"{name}, required" if spec.required else f"{name} = {attr_text(normal_attr(spec.default, spec.name))}"


def _type_name(annotation: Any) -> str:
    return (
        annotation.__name__
        if isinstance(annotation, type) and not typing.get_args(annotation)
        else str(annotation).replace("typing.", "")
    )


def _lowerings(op: Op, platform: Platform) -> dict[str, tuple[str | None, str]]:
    """By provider, native last: None or the sentence why it is not available, and where it comes from."""
    found = {
        low.provider: (None if low.available is None else low.available(platform), low.origin)
        for low in sorted(LOWERINGS.get(op.name, {}).values(), key=lambda low: low.provider == NATIVE)
    }
    if op.fused:
        found[NATIVE] = (None, f"its body, {op.origin}")
    return found


# ---- providers ----


def providers(platform: PlatformOption = None, plugin: PluginOption = None) -> None:
    """List which provider has which op on a platform, the sentence where one is unavailable, and plugins.

    `accepts` (types, sizes) is asked node by node: `gdnir why MODEL`.

    \b
      gdnir providers --platform cuda:sm_90
    """
    where = find_platform(platform)
    names = known_providers()
    table = _grid("op", *names)
    refused: dict[tuple[str, str], list[str]] = {}
    origins: dict[str, dict[str, None]] = {name: {} for name in names}
    for op in OPS.values():
        found = _lowerings(op, where)
        cells = []
        for name in names:
            answer, origin = found.get(name, (None, ""))
            if name not in found:
                cells.append(Text("-", style="dim"))
                continue
            origins[name][origin.rpartition(", ")[2] if op.fused and name == NATIVE else origin] = None
            body = op.fused and name == NATIVE
            cells.append(
                Text("body") if body else Text("yes", style="green") if answer is None else Text("no", style="yellow")
            )
            if answer is not None:
                refused.setdefault((name, answer), []).append(op.name)
        table.add_row(op.name, *cells)
    shown: list[Any] = [
        Text(f"providers on {where}{' (this machine)' if where.detected else ''}", style="bold"),
        "",
        table,
        "",
    ]
    if refused:
        reasons = _grid("", "~", header=False)
        for (name, answer), which in refused.items():
            reasons.add_row(name, f"{answer} [{', '.join(which)}]")
        shown += [Text("not available", style="bold"), reasons, ""]
    sources = _grid("", "~", header=False)
    for name in names:
        sources.add_row(name, ", ".join(origins[name]))
    show(*shown, Text("registered by", style="bold"), sources, "", *_plugins())


def _plugins() -> list[Any]:
    found = installed()
    if not found:
        return [Text("plugins", style="bold"), f"none installed (entry points of {', '.join(GROUPS)})"]
    table = _grid("plugin", "from", "kind", "state~")
    for item in found:
        state = "loaded" if item.loaded else f"installed, not loaded (--plugin {item.name})"
        table.add_row(item.name, f"{item.distribution} {item.version}", item.group.removeprefix("gdnir."), state)
    return [table]


# ---- platforms, passes, models ----


def platforms(plugin: PluginOption = None) -> None:
    """List the platforms with what is known of them, and which one this machine is.

    Any cuda:sm_NN or rocm:gfxNNN may be named; those without facts are lowered by the provider order alone.
    """
    here = detect()
    rows = {**PLATFORMS, here.name: here}
    table = _grid("", "platform", ">copy TB/s", ">bf16 TFLOP/s", ">smem KiB", ">cores", "order", "facts from~")
    for name, item in rows.items():
        table.add_row(
            "*" if name == here.name else "",
            Text(name, style="bold green" if name == here.name else "bold"),
            _fact(item.bandwidth, 1e12, "{:.2f}"),
            _fact(item.matrix_rate, 1e12, "{:.0f}"),
            _fact(item.shared_memory, 1024, "{:.0f}"),
            _fact(item.cores, 1, "{:.0f}"),
            ",".join((*item.order, NATIVE)),
            item.source,
        )
    show(
        table,
        "",
        f"* this machine: {here}, device {here.device}, software: {', '.join(sorted(here.software)) or 'none'}",
        "copy: read + write of a large copy; bf16: dense products; smem: shared memory a block may use; -: nobody has said",
    )


def _fact(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else form.format(value / unit)


def passes(plugin: PluginOption = None) -> None:
    """List the passes with their options, and the default pipeline.

    \b
      gdnir dump qwen3-next -p 'fold-weights,fuse{op=conv_prep},lower'
    """
    for name, kind in PASSES.items():
        options = [f"{f.name}={attr_text(normal_attr(f.default, f.name))}" for f in dataclasses.fields(kind)]
        head = Text.assemble((name, "bold"), f"{{{', '.join(options)}}}" if options else "")
        doc = " ".join((kind.__doc__ or "").split())
        show(head, Padding(Text(doc), (0, 0, 0, 4)))
    show("", f"default pipeline: {DEFAULT_PIPELINE}")


def models(plugin: PluginOption = None) -> None:
    """List the built-in models: the sizes of their GDN layers, aliases, and where the numbers were read.

    A config.json or a checkpoint folder serves as well.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    table = _grid("model", ">D", ">H", ">HV", ">K", ">V", ">W", ">layers", "alias", "source~")
    for name, item in builtins().items():
        layers = f"{len(item.layers)}/{item.num_layers}"
        sizes = (item.hidden_size, *item.heads, item.conv_width)
        table.add_row(Text(name, style="bold"), *map(str, sizes), layers, ", ".join(aliases.get(name, ())), item.source)
    show(
        table,
        "",
        "D hidden size, H key heads, HV value heads, K and V their dimensions, W convolution width; layers: GDN/all",
    )


# ---- collect-env ----


def collect_env(plugin: PluginOption = None) -> None:
    """Print versions, platform, devices and plugins, as plain text for a bug report."""
    here = detect()
    lines = [
        ("gdnir", f"{__version__} ({Path(__file__).parent})"),
        ("python", f"{machine.python_version()} ({sys.executable})"),
    ]
    lines += [
        (name, _version(name))
        for name in (
            "torch",
            "triton",
            "transformers",
            "safetensors",
            "typer",
            "rich",
            "networkx",
            "numpy",
            "pygraphviz",
        )
    ]
    lines += [
        ("platform", f"{here}, software: {', '.join(sorted(here.software)) or 'none'}"),
        ("cuda", f"{torch.version.cuda or 'no'}; hip: {torch.version.hip or 'no'}"),
        *(("gpu", f"{i}: {_gpu(i)}") for i in range(torch.cuda.device_count())),
        ("cpu", f"{_cpu()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("system", machine.platform()),
        *((name, os.environ[name]) for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES") if name in os.environ),
        *(
            ("plugin", f"{p.name}, {p.distribution} {p.version}, {p.group}, {'loaded' if p.loaded else 'not loaded'}")
            for p in installed()
        ),
        ("providers", ", ".join(known_providers())),
    ]
    typer.echo(_aligned(lines))


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} cores"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        machine.processor() or machine.machine(),
    )
