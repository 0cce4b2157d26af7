"""Every exception of gdnir.

A message names the op, the argument, what was expected, what came, and what to do next. Each class also
derives from the built-in exception a Python programmer would expect (`ValueError`, `TypeError`, ...).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GdnirError(Exception):
    """Base of all errors that gdnir raises on purpose."""


class InputError(GdnirError):
    """An argument of an op, a plan or a constructor is wrong.

    The parts of the message stay readable as attributes: `op`, `argument`, `expected`, `got`, `hint`.
    """

    def __init__(self, op: str, argument: str, *, expected: str, got: str, hint: str = "") -> None:
        self.op, self.argument, self.expected, self.got, self.hint = op, argument, expected, got, hint
        text = f"{op}: argument `{argument}`: expected {expected}, got {got}."
        super().__init__(f"{text} {hint}" if hint else text)


class ShapeError(InputError, ValueError):
    """A rank, a size, or a relation between sizes does not fit the contract."""


class DTypeError(InputError, TypeError):
    """An element type the contract does not take. Nothing is cast silently."""


class DeviceError(InputError, ValueError):
    """Tensors of one call live on different devices, or not where the plan was made to run."""


class LayoutError(InputError, ValueError):
    """A memory layout that cannot be served: an overlapping state, an unknown state order."""


class ArgumentError(InputError, TypeError):
    """A missing, unknown or mistyped argument or attribute."""


class SeqError(InputError, ValueError):
    """The batch metadata contradicts itself, or does not fit the tensors it comes with."""


class GradError(InputError, RuntimeError):
    """A plan or a provider without a backward was given an input that requires grad."""


class PoolError(InputError, ValueError):
    """A state pool was asked for slots or layers that it does not have."""


class WeightsError(InputError, ValueError):
    """A weight is missing, misshapen or unreadable."""


class ConfigError(InputError, ValueError):
    """A model configuration is unknown or does not describe a GDN layer."""


class VerifyError(GdnirError, ValueError):
    """A graph breaks a rule of the IR."""


class ParseError(GdnirError, ValueError):
    """IR text or pipeline text cannot be read; `line` and `column` say where (1-based)."""

    def __init__(self, message: str, line: int, column: int) -> None:
        self.line, self.column = line, column
        super().__init__(f"line {line}, column {column}: {message}")


class RegistryError(GdnirError, ValueError):
    """An op, a lowering, a pass or a platform cannot be registered as asked."""


class TableError(GdnirError, ValueError):
    """A table of block sizes says what the kernels have no code for."""


class LoweringError(GdnirError, RuntimeError):
    """No provider may take a node, or an explicit request for one cannot be met."""


class PurityError(GdnirError, RuntimeError):
    """A lowering called `native` is not plain torch."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names the likely meaning of a misspelt `name`, and the known ones while they fit on a line."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    every = f"Known: {', '.join(known) or 'none'}."
    if not near:
        return every
    meant = f"Did you mean {' or '.join(f'`{n}`' for n in near)}?"
    return f"{meant} {every}" if len(every) <= 100 else meant
