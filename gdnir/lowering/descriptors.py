"""TMA descriptors, each made once for the memory that it describes, and encoded once.

Checks and the driver's encoding of a 128-byte tensor map take microseconds. Both are functions of an address and a few numbers, so
what is kept cannot become wrong. It keeps no memory alive: a descriptor knows the address alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_ways: dict[Any, tuple[Any, Callable[[Any, Any], list[Any]]]] = {}


class Box:
    """What one copy moves: its shape, and how it lies in shared memory. One object for each, known by its identity."""

    def __init__(self, shape: list[int], layout: Any) -> None:
        self.shape, self.layout = shape, layout


class _Address:
    """What Triton asks of a descriptor's base."""

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self.pointer, self.dtype = pointer, dtype

    def data_ptr(self) -> int:
        return self.pointer


@functools.lru_cache(maxsize=4096)  # a layer takes 8, and an allocator gives the same addresses again
def describe(pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: Box) -> Any:
    """Gluon's TensorDescriptor of the memory at `pointer`, which the caller keeps until it is launched with; None if TMA cannot
    read it: it is not empty (at 0), all begins at multiples of 16 bytes. Strides are in elements. [T, H, K] is a matrix [T, H K].

    `kind` is equal for those that kernels are compiled for alike; `encoded` is for `Descriptors`.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    sizes, steps = list(shape), list(strides)
    if len(shape) == 3:
        (rows, heads, width), (row, head, unit) = shape, strides
        sizes, steps = [rows, heads * width], [row if rows > 1 else heads * width, unit]
        if (head != width and heads > 1) or steps[0] < sizes[1]:
            return None
    if (
        0 in sizes
        or not pointer
        or steps[-1] != 1
        or pointer % 16
        or any(step * dtype.itemsize % 16 for step in steps[:-1])
    ):
        return None
    made = TensorDescriptor(_Address(pointer, dtype), sizes, steps, box.shape, box.layout)
    made.kind, made.encoded = (dtype, box), None
    return made


@functools.cache
def _kind(*kinds: tuple[torch.dtype, Box]) -> object:
    """One object for each, known by its identity: a launch's key is found sooner by that than by what it stands for."""
    return object()


class Descriptors:
    """Those that a kernel takes one after the other, as one argument of `relaunch.launch`."""

    def __init__(self, *members: Any) -> None:
        self.members, self.kind, self.encoded = members, _kind(*[x.kind for x in members]), ()

    def encode(self) -> tuple[Any, ...]:
        """What Triton's launcher hands to C for them: of each a tensor map, shape and strides. Only after `agree`."""
        for x in self.members:
            if x.encoded is None:
                how, make = _ways[x.kind]
                x.encoded = make(x, how)
        self.encoded = tuple([value for x in self.members for value in x.encoded])
        return self.encoded


def agree(descriptor: Any, how: Any, make: Callable[[Any, Any], list[Any]]) -> bool:
    """Whether `make(descriptor, how)`, which a compiled kernel wants, is what other kernels want of this kind."""
    return _ways.setdefault(descriptor.kind, (how, make)) == (how, make)
