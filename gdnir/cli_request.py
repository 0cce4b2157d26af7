"""What the user of a command asked for: the model, the options that say how to trace and lower it, the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from gdnir.errors import ArgumentError, ConfigError, GdnirError, ParseError, RegistryError, closest
from gdnir.ir import DTYPES, Graph
from gdnir.lowering import providers as known_providers
from gdnir.models import GdnConfig, builtins, config, trace
from gdnir.models.config import ALIASES
from gdnir.op import OPS, verify_graph
from gdnir.passes import DEFAULT_PIPELINE, Lowered, lower
from gdnir.passes.base import Step
from gdnir.platforms import PLATFORMS, Platform, get_platform
from gdnir.plugins import load_plugins
from gdnir.text import parse

Phase: TypeAlias = Literal["prefill", "decode", "verify", "mixed"]
Region: TypeAlias = Literal["layer", "core"]
DType: TypeAlias = Literal["bf16", "f16", "f32"]
StateDType: TypeAlias = Literal["f32", "bf16"]
StateLayout: TypeAlias = Literal["vk", "kv"]


def _load(names: list[str] | None) -> list[str] | None:
    load_plugins(names or [])
    return names


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A built-in name (see `gdnir models`), a config.json, a checkpoint folder, a file of IR text, or - for IR text on stdin.",
        show_default=False,
    ),
]
PlatformOption = Annotated[
    str | None,
    typer.Option(
        "--platform", help="Lower for this platform, such as cuda:sm_90. Default: this machine.", show_default=False
    ),
]
PhaseOption = Annotated[
    Phase | None, typer.Option("--phase", help="The batch to trace for. Default: prefill.", show_default=False)
]
RegionOption = Annotated[
    Region | None,
    typer.Option(
        "--region", help="The whole layer, or the core between its projections. Default: layer.", show_default=False
    ),
]
DTypeOption = Annotated[
    DType | None,
    typer.Option("--dtype", help="Element type of activations and weights. Default: bf16.", show_default=False),
]
StateDTypeOption = Annotated[
    StateDType | None,
    typer.Option("--state-dtype", help="Element type of the recurrent state. Default: f32.", show_default=False),
]
StateLayoutOption = Annotated[
    StateLayout | None,
    typer.Option(
        "--state-layout",
        help="vk: [S,HV,V,K] as in vLLM; kv: [S,HV,K,V] as in transformers. Default: vk.",
        show_default=False,
    ),
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        "--pipeline", "-p", metavar="TEXT", help=f"The passes to run. Default: {DEFAULT_PIPELINE}.", show_default=False
    ),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        metavar="OP=A,B",
        help="All the providers that OP may use, best first. Repeatable; overrides the platform's order.",
        show_default=False,
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse native on anything but a CPU, except for ops that torch does best.")
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="NAME",
        help="Load this installed plugin first. Repeatable.",
        callback=_load,
        is_eager=True,
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Request:
    """A model and how to trace and lower it. None is the default of an option that was not given."""

    model: str
    platform: str | None = None
    pipeline: str | None = None
    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strict: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of `trace` that were given, by the option's name."""

    @classmethod
    def of(
        cls,
        model: str,
        platform: str | None,
        pipeline: str | None,
        provider: list[str] | None,
        strict: bool,
        **options: Any,
    ) -> Request:
        given = {name: value for name, value in options.items() if value is not None}
        return cls(model, platform, pipeline, parse_providers(provider), strict, given)

    def where(self) -> Platform:
        """The platform asked for; RegistryError that lists the known ones."""
        return find_platform(self.platform)

    def graph(self) -> Graph:
        """The graph before lowering: traced from a model, or read from IR text as it stands (and not yet verified)."""
        found = read_model(self.model)
        if isinstance(found, GdnConfig):
            arguments = {
                name: DTYPES[value] if name.endswith("dtype") else value for name, value in self.options.items()
            }
            return trace(found, **arguments)
        for name in self.options:
            raise ArgumentError(
                "gdnir",
                f"--{name.replace('_', '-')}",
                expected="no such option",
                got=f"{self.options[name]} for IR text, which fixes it",
                hint="Drop the option, or name a model to trace another graph.",
            )
        return found

    def lower(self, graph: Graph, observe: Callable[[Step], None] | None = None) -> Lowered:
        """The graph lowered as asked; one whose nodes all have a provider stays as it is, unless -p asks for passes."""
        if is_lowered(graph) and self.pipeline is None:
            if self.providers or self.strict:
                raise ArgumentError(
                    "gdnir",
                    "--provider" if self.providers else "--strict",
                    expected="a graph without providers",
                    got="IR text that is lowered already",
                    hint="Its providers are fixed; lower it again with -p, or dump the model anew.",
                )
            verify_graph(graph)
            return Lowered.of(graph, self.where())
        return lower(
            graph, self.where(), providers=self.providers, strict=self.strict, pipeline=self.passes, observe=observe
        )

    @property
    def passes(self) -> str:
        return DEFAULT_PIPELINE if self.pipeline is None else self.pipeline


def is_lowered(graph: Graph) -> bool:
    """Whether every node has a provider."""
    return bool(graph.nodes) and all(node.provider is not None for node in graph.nodes)


def read_model(model: str) -> GdnConfig | Graph:
    """A built-in name, config.json or checkpoint folder as a config, IR text (a file, or `-`) as a graph."""
    path = Path(model)
    names = builtins()
    if model == "-" or (path.is_file() and path.suffix != ".json" and model not in names):
        try:
            return parse(sys.stdin.read() if model == "-" else path.read_text(encoding="utf-8"))
        except ParseError as error:
            raise GdnirError(f"{model}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise GdnirError(f"{model}: cannot be read as IR text ({error}).") from error
    if not path.exists() and ALIASES.get(model.lower(), model.lower()) not in names:
        raise ConfigError(
            "gdnir",
            "MODEL",
            expected="a built-in model, a config.json, a checkpoint folder or a file of IR text",
            got=f"`{model}`, which is none",
            hint=_with_list(model, [*names, *ALIASES]),
        )
    return config(model)


def find_platform(name: str | None) -> Platform:
    """The platform of that name, None being this machine; RegistryError that lists the known ones."""
    try:
        return get_platform(name)
    except RegistryError as error:
        raise RegistryError(f"{error} Platforms: {', '.join(PLATFORMS)}.") from error


def parse_providers(texts: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
    """`op=a,b` options as lists by op; raises an error that lists the known ops or providers."""
    table: dict[str, tuple[str, ...]] = {}
    for text in texts or ():
        op, equals, names = text.partition("=")
        chosen = tuple(name.strip() for name in names.split(",") if name.strip())
        if not equals or not op.strip() or not chosen:
            raise ArgumentError(
                "gdnir",
                "--provider",
                expected="OP=PROVIDER[,PROVIDER]",
                got=repr(text),
                hint="Example: --provider l2norm=triton,native.",
            )
        op = op.strip()
        if op in table:
            raise ArgumentError(
                "gdnir", "--provider", expected=f"one list for {op}", got="two", hint=f"Write --provider {op}=a,b."
            )
        if op not in OPS:
            raise RegistryError(f"--provider: unknown op `{op}`. {_with_list(op, OPS)}")
        for name in chosen:
            if name not in known_providers():
                raise RegistryError(
                    f"--provider: unknown provider `{name}` for `{op}`. {_with_list(name, known_providers())} Plugins bring more (--plugin)."
                )
        table[op] = chosen
    return table


def _with_list(name: str, known: Iterable[str]) -> str:
    hint = closest(name, known)
    return hint if hint.startswith("Known:") else f"{hint} Known: {', '.join(sorted(known))}."
