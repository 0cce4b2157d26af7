"""What is there to choose from: `gdnir ops | providers | platforms | passes | models | collect-env`."""

from __future__ import annotations

import dataclasses
import json
import platform as machine
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import gdnir
from gdnir import plugins
from gdnir.errors import GdnirError, closest
from gdnir.ir import attr_text, normal_attr
from gdnir.lowering import LOWERINGS, providers, tables
from gdnir.models import builtins
from gdnir.models.config import ALIASES
from gdnir.op import OPS
from gdnir.passes import DEFAULT_PIPELINE
from gdnir.passes.base import PASSES
from gdnir.platforms import PLATFORMS, detect, get_platform

app = typer.Typer()

PlatformOption = Annotated[
    str | None, typer.Option("--platform", help="What to lower for, such as cuda:sm_90. Default: this machine.")
]
PluginOption = Annotated[
    list[str] | None, typer.Option("--plugin", help="Load this installed plugin first. Repeatable.")
]


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
    print("\nblock sizes by kind of GPU, gdnir/lowering/tables")
    for path in sorted(tables.FOLDER.glob("*.json")):
        print(f"  {path.stem}: {', '.join(json.loads(path.read_text()))}")
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
    for name in ("platform", "GB/s", "bf16 TFLOP/s", "KiB shared", "cores", "order"):
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
            ",".join((*p.order, "native")),
        )
    Console().print(table)
    print()
    for p in PLATFORMS.values():
        print(f"{p.name}: {p.source}")
    print()
    print(f"this machine: {detect()}")


@app.command("passes")
def list_passes() -> None:
    """List the passes and the default pipeline."""
    for name, cls in PASSES.items():
        options = ", ".join(f"{f.name}={attr_text(normal_attr(f.default, f.name))}" for f in dataclasses.fields(cls))
        print(f"{name}{f'{{{options}}}' if options else ''}\n  {' '.join((cls.__doc__ or '').split())}\n")
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
