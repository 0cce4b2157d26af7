"""Lowerings that torch.compile calls and does not look into.

A launcher asks for addresses and strides and keeps what it finds, which a trace of symbols cannot follow; Dynamo knows Triton's
kernels, but not Gluon's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(run: Callable[P, R]) -> Callable[P, R]:
    """`run`, and a break in the graph where torch.compile meets it."""

    @functools.wraps(run)
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            outside: Callable[P, R] = torch.compiler.disable(run)  # only here, for it imports Dynamo
            return outside(*args, **kwargs)
        return run(*args, **kwargs)

    return either
