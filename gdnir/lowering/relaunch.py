"""Launch a Triton or Gluon kernel again without repeating what its first launch has shown.

`kernel[grid](...)` binds, specialises and looks up each argument by way of dictionaries and strings: 40 to 90 us of a host's time
for a kernel of 50 arguments, as much as a decode step takes on the GPU. It returns the compiled kernel, which can be
launched again by whatever has the same key; the key is all that Triton's own depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_launchers: dict[int, tuple[Any, Any]] = {}


def relaunched(kernel: Any) -> Any:
    """`relaunched(kernel)[grid](...)` is `kernel[grid](...)`. What is no compiled kernel of CUDA (interpreted ones; on ROCm
    Triton also looks at the sizes of tensors) is returned as it is, and under torch.compile, which knows Triton's kernels."""
    if torch.compiler.is_compiling():
        return kernel
    if found := _launchers.get(id(kernel)):
        return found[1]
    from triton.runtime.jit import JITFunction

    compiled = isinstance(kernel, JITFunction) and torch.version.hip is None and torch.cuda.is_available()
    launcher = Relaunch(kernel) if compiled else kernel
    _launchers[id(kernel)] = kernel, launcher  # the kernel too, or another one might get its id
    return launcher


class _Places(NamedTuple):
    """Which arguments of a launch say what, for arguments of these types."""

    constants: list[int]
    tensors: list[int]
    aligned: list[int]
    integers: list[int]
    ones: list[int]  # 1 is compiled in
    sixteens: list[int]
    descriptors: list[int]
    options: list[str]


class Relaunch:
    """A kernel, and what has been compiled of it, by device and key."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: list[str] = kernel.arg_names
        self.places: dict[Any, _Places] = {}
        self.compiled: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        device = torch.cuda.current_device()
        key, values = self.key(args, named)
        compiled = self.compiled.get((device, key))
        if compiled is None:
            self.compiled[device, key] = self.kernel[grid](*args, **named)
        else:
            compiled[(*grid, 1, 1)](*values, stream=torch._C._cuda_getCurrentRawStream(device))

    def key(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, list[Any]]:
        """(key, all arguments in order). Raises KeyError if one is missing, TypeError for what this file does not know."""
        values = [*args, *[named[name] for name in self.names[len(args) :]]]
        kind = tuple(map(type, values)), len(args), tuple(named)
        places = self.places.get(kind)
        if places is None:
            places = self.places[kind] = self._sort(kind[0], named)
        x = values
        key = (
            kind,
            tuple([x[i] for i in places.constants]),
            tuple([x[i].dtype for i in places.tensors]),
            tuple([x[i].data_ptr() % 16 == 0 for i in places.aligned]),
            tuple([-(2**31) <= x[i] < 2**31 for i in places.integers]),
            tuple([x[i] == 1 for i in places.ones]),
            tuple([x[i] % 16 == 0 for i in places.sixteens]),
            # Layouts are constants of the kernels' modules, so that each is one object.
            tuple([(x[i].base.dtype, *x[i].block_shape, id(x[i].layout)) for i in places.descriptors]),
            tuple([named[name] for name in places.options]),
        )
        return key, values

    def _sort(self, types: tuple[type, ...], named: dict[str, Any]) -> _Places:
        places = _Places([], [], [], [], [], [], [], [name for name in named if name not in self.names])
        for i, (kind, p) in enumerate(zip(types, self.kernel.params, strict=True)):
            by_value = not p.do_not_specialize
            by_alignment = by_value and not p.do_not_specialize_on_alignment
            if p.is_constexpr or kind is bool:
                places.constants.append(i)
            elif kind is int:
                places.integers.append(i)
                places.ones.extend([i] * by_value)
                places.sixteens.extend([i] * by_alignment)
            elif issubclass(kind, Tensor):
                places.tensors.append(i)
                places.aligned.extend([i] * by_alignment)
            elif kind.__name__ == "TensorDescriptor":
                places.descriptors.append(i)
            elif kind not in (float, type(None)):
                raise TypeError(f"{self.names[i]} is a {kind.__name__}")
        return places
