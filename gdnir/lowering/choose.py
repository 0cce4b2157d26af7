"""The one place where a provider is chosen for an op, and where every refusal gets its sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gdnir.errors import LoweringError, RegistryError, closest
from gdnir.ir import Attr, Type
from gdnir.lowering import LOWERINGS, NATIVE, providers
from gdnir.op import OPS, Op
from gdnir.platforms import Platform


@dataclass(frozen=True)
class Target:
    """What to lower for: a platform, the user's explicit provider lists by op, and strictness.

    An explicit list is exhaustive and in order of preference. It covers the regions that contain the op.
    """

    platform: Platform
    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        known = set(providers())
        for op, names in self.providers.items():
            if op not in OPS:
                raise RegistryError(f"providers: unknown op `{op}`. {closest(op, OPS)}")
            if isinstance(names, str) or not names:
                raise RegistryError(
                    f'providers: `{op}` needs a list of provider names, such as ["triton", "native"], got {names!r}.'
                )
            for name in names:
                if name not in known:
                    raise RegistryError(f"providers: unknown provider `{name}` for `{op}`. {closest(name, known)}")


@dataclass(frozen=True)
class Refusal:
    """Why a provider did not take an op: a sentence."""

    provider: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What was chosen for one node, and why: `refusals` are the providers that came before it."""

    op: str
    provider: str
    reason: str
    refusals: tuple[Refusal, ...] = ()


def candidates(op: Op, target: Target) -> tuple[str, ...]:
    """Providers in the order they are tried: the user's list, or the platform's, then the rest, then native."""
    if op.name in target.providers:
        return tuple(target.providers[op.name])
    if op.plain and not set(LOWERINGS.get(op.name, {})) - {NATIVE}:
        return (NATIVE,)
    known = providers()
    order = [p for p in target.platform.order if p in known] + [p for p in known if p in LOWERINGS.get(op.name, {})]
    return (*dict.fromkeys(p for p in order if p != NATIVE), NATIVE)


def refusal(
    op: Op, provider: str, types: Sequence[Type | None], attrs: Mapping[str, Attr], target: Target
) -> str | None:
    """None if `provider` takes the op here, else the sentence that says why not."""
    if provider == NATIVE and target.strict and target.platform.kind != "cpu" and not op.plain:
        return f"strict lowering refuses native on {target.platform}."
    if provider == NATIVE and op.fused:
        return None  # its body
    lowering = LOWERINGS.get(op.name, {}).get(provider)
    if lowering is None:
        return f"{provider} has no lowering of {op.name}."
    if lowering.available is not None and (reason := lowering.available(target.platform)) is not None:
        return reason
    return None if lowering.accepts is None else lowering.accepts(*types, **attrs)


def choose(op: Op, types: Sequence[Type | None], attrs: Mapping[str, Attr], target: Target) -> Choice:
    """The first candidate that takes the op; raises LoweringError with every refusal if none does."""
    refusals: list[Refusal] = []
    explicit = op.name in target.providers
    for provider in candidates(op, target):
        reason = refusal(op, provider, types, attrs, target)
        if reason is None:
            return Choice(op.name, provider, _why(op, provider, explicit, bool(refusals), target), tuple(refusals))
        refusals.append(Refusal(provider, reason))
    raise LoweringError(no_provider(op.name, refusals, explicit, target))


def no_provider(op: str, refusals: Sequence[Refusal], explicit: bool, target: Target) -> str:
    """The message of a request that cannot be met."""
    asked = " of the requested list" if explicit else ""
    said = "\n".join(f"  {r.provider}: {r.reason}" for r in refusals)
    fix = (
        "Add `native` to the list, or drop the request."
        if explicit
        else "Register a lowering, or lower without strict."
    )
    return f"{op}: no provider{asked} takes it on {target.platform}.\n{said}\n{fix}"


def _why(op: Op, provider: str, explicit: bool, second: bool, target: Target) -> str:
    if explicit:
        return "second choice of the requested list" if second else "requested"
    if second:
        return "the providers before it refused"
    if provider == NATIVE:
        return "a torch op on every platform" if op.plain else f"{target.platform} names no other provider"
    return f"first in the order of {target.platform}" if provider in target.platform.order else "registered for this op"
