"""The one registry of lowerings: which provider can run which op, where, and on what.

    @lowers(ops.gated_rmsnorm, "triton", available=on_gpu, accepts=fits)
    def gated_rmsnorm(o, z, weight, *, eps, activation): ...

A lowering takes the op's operands, then its attributes by name; it returns the op's results other than states,
and updates state operands in place. It allocates what it returns, never changes an operand that is not a
state, and handles any strides the graph's inputs may have. `native` is plain torch: gdnir's own for gdnir's
ops, an op's author's for a third-party op; `gdnir.testing.prove_native` proves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from gdnir.errors import RegistryError
from gdnir.op import OPS, Op
from gdnir.platforms import Platform

NATIVE = "native"
Available: TypeAlias = Callable[[Platform], str | None]
Accepts: TypeAlias = Callable[..., str | None]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Lowering:
    """One implementation of one op by one provider.

    `available(platform)` and `accepts(operand types, attributes)` answer None, or a sentence that says why not.
    `prepare(seq)` computes, once per batch and shared by all layers, what `run` then gets as `prepared`.
    `batch_invariant` promises that a sequence's bits never depend on its neighbours in the batch: of `run`, or if it is a
    function, of that one, which plans that ask for it call instead.
    """

    op: str
    provider: str
    run: Callable[..., Any]
    available: Available | None
    accepts: Accepts | None
    prepare: Callable[[Any], Any] | None
    batch_invariant: bool | Callable[..., Any]
    origin: str

    def chosen(self, batch_invariant: bool) -> Lowering:
        """This lowering as a plan calls it."""
        if batch_invariant and callable(self.batch_invariant):
            return replace(self, run=self.batch_invariant)
        return self


LOWERINGS: dict[str, dict[str, Lowering]] = {}
"""LOWERINGS[op][provider]"""


def lowers(
    op: Op | str,
    provider: str,
    *,
    available: Available | None = None,
    accepts: Accepts | None = None,
    prepare: Callable[[Any], Any] | None = None,
    batch_invariant: bool | Callable[..., Any] = False,
) -> Callable[[_F], _F]:
    """Register the decorated function as `provider`'s lowering of `op`.

    Raises RegistryError if the op is unknown, the function's parameters (or those of `accepts`) are not the
    op's operands and attributes, the provider already has a lowering of the op, or the name `native` is
    claimed by a package that does not own the op.
    """
    name = op if isinstance(op, str) else op.name

    def register(function: _F) -> _F:
        if name not in OPS:
            raise RegistryError(f"lowering `{provider}` of `{name}`: no such op. Declare it first with @gdnir.op.")
        target = OPS[name]
        where = f"lowering `{provider}` of `{name}`"
        _check_parameters(where, target, function, ("prepared",) if prepare else ())
        if callable(batch_invariant):
            _check_parameters(f"{where}, batch_invariant", target, batch_invariant, ("prepared",) if prepare else ())
        if accepts is not None:
            _check_parameters(f"{where}, accepts", target, accepts, ())
        if provider == NATIVE and function.__module__.partition(".")[0] != target.origin.partition(".")[0]:
            raise RegistryError(
                f"{where}: `native` is reserved for the plain torch of the op's own package "
                f"({target.origin.partition('.')[0]}). Give your provider its own name."
            )
        if provider == NATIVE and target.fused:
            raise RegistryError(f"{where}: a fused op's native form is its body. Lower the ops of the body instead.")
        known = LOWERINGS.setdefault(name, {})
        if provider in known and known[provider].origin != function.__module__:
            raise RegistryError(
                f"{where} is already registered by {known[provider].origin}. Choose another provider name."
            )
        known[provider] = Lowering(
            name, provider, function, available, accepts, prepare, batch_invariant, function.__module__
        )
        return function

    return register


def _check_parameters(where: str, op: Op, function: Callable[..., Any], extra: tuple[str, ...]) -> None:
    """The function must be callable as f(*operands by position, **attributes by name) under the op's own names."""
    operands = [slot.name for slot in op.contract.operands]
    attrs = [spec.name for spec in op.attrs]
    parameters = inspect.signature(function).parameters.values()
    got_operands = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    got_attrs = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if got_operands != operands or sorted(got_attrs) != sorted([*attrs, *extra]):
        wanted = f"({', '.join(operands)}, *, {', '.join([*attrs, *extra])})"
        raise RegistryError(
            f"{where}: its parameters are {inspect.signature(function)}, the op's are {wanted}. Use the op's names, "
            "operands first, attributes keyword-only."
        )


def find(op: str, provider: str) -> Lowering:
    """The registered lowering; RegistryError if there is none."""
    found = LOWERINGS.get(op, {}).get(provider)
    if found is None:
        raise RegistryError(
            f"`{provider}` has no lowering of `{op}`. Registered for it: {', '.join(LOWERINGS.get(op, {})) or 'none'}."
        )
    return found


def providers() -> list[str]:
    """Every provider that has a lowering of anything, `native` last."""
    names = dict.fromkeys(p for by_provider in LOWERINGS.values() for p in by_provider)
    names.pop(NATIVE, None)
    return [*names, NATIVE]
