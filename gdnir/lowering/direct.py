"""The C function under Triton's launcher of a kernel compiled for CUDA, called directly.

The launcher cares for hooks, scratch memory and descriptors at each launch, and its C function asks the driver about each tensor,
but takes an address as it is. What is handed to C depends on Triton's version; one probe of the launcher shows it. Known are
3.6, where the kernel's arguments come one by one, and 3.7, where they are one tuple.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any, TypeAlias

from gdnir.lowering.descriptors import agree

Again: TypeAlias = Callable[[int, int, tuple[Any, ...]], None]
"""Launches a compiled kernel: (programs, stream, all arguments as C takes them)."""
_PROBE = 2, 3, 5, 7  # a grid and a stream


def direct(compiled: Any, values: Sequence[Any]) -> Again | None:
    """Launches `compiled` with arguments like `values`, all of its own; None if Triton's launcher is unlike those known.

    C takes addresses instead of tensors, and instead of a descriptor the values that `descriptors.encode` gives.
    """
    try:
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None  # memory that is allocated for each launch
        given = _probe(launcher, compiled, values)
        entry, described = launcher.launch, [x for x in values if type(x).__name__ == "TensorDescriptor"]
        if described:
            entry = inspect.getclosurevars(entry).nonlocals["launcher"]
            make = sys.modules[type(launcher).__module__].make_tensordesc_arg
            wanted = compiled.metadata.tensordesc_meta or [None] * len(described)
            if not all(agree(x, how, make) for x, how in zip(described, wanted, strict=True)):
                return None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not isinstance(entry, BuiltinFunctionType) or given[:5] != (*_PROBE, compiled.function):
        return None
    if _same(given[-1], values):
        head = given[4:-1]
        return lambda programs, stream, values: entry(programs, 1, 1, stream, *head, values)
    if _same(given[-len(values) :], values):
        head = given[4 : -len(values)]
        return lambda programs, stream, values: entry(programs, 1, 1, stream, *head, *values)
    return None


def _probe(launcher: Any, compiled: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """What the launcher hands to C where no hook is set, with descriptors still as they came."""
    probe, seen = copy.copy(launcher), []
    probe.launch = lambda *given: seen.append(given)
    probe(*_PROBE, compiled.function, compiled.packed_metadata, None, None, None, *values)
    return tuple(*seen)


def _same(given: Any, values: Sequence[Any]) -> bool:
    return isinstance(given, tuple) and len(given) == len(values) and all(map(lambda a, b: a is b, given, values))
