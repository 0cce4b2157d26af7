"""Launch a Triton or Gluon kernel again without repeating what its first launch has shown.

`kernel[grid](...)` binds, specialises and looks up each argument by way of dictionaries and strings: for the 60 arguments of
`gdn_step` 35 us before the launch itself, where this takes 17. It returns the compiled kernel, which can be launched again by
whatever has the same key; the key tells apart all that Triton's own does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
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
    """Which of a launch's arguments say what, for arguments of these types; the getters give them all at once."""

    constants: Callable[[Any], Any]
    specialised: Callable[[Any], Any]  # integers of which some values are compiled in, and divisors
    others: list[int]  # integers of which only the width is
    tensors: list[int]
    aligned: list[int]
    descriptors: list[int]
    options: Callable[[Any], Any]


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
        kind = tuple(map(type, values)), tuple(named)
        places = self.places.get(kind)
        if places is None:
            places = self.places[kind] = self._sort(kind[0], named)
        key = (
            kind,
            places.constants(values),
            # Triton asks for 1 and multiples of 16. These are strides: their values are as few.
            places.specialised(values),
            tuple([-(2**31) <= values[i] < 2**31 for i in places.others]),
            tuple([values[i].dtype for i in places.tensors]),
            tuple([values[i].data_ptr() % 16 for i in places.aligned]),
            # Layouts are constants of the kernels' modules, so that each is one object.
            tuple([(x.base.dtype, *x.block_shape, id(x.layout)) for x in [values[i] for i in places.descriptors]]),
            places.options(named),
        )
        return key, values

    def _sort(self, types: tuple[type, ...], named: dict[str, Any]) -> _Places:
        constants: list[int] = []
        specialised: list[int] = []
        places = _Places(_none, _none, [], [], [], [], _getter([name for name in named if name not in self.names]))
        for i, (kind, p) in enumerate(zip(types, self.kernel.params, strict=True)):
            if p.is_constexpr or kind is bool:
                constants.append(i)
            elif kind is int:
                (places.others if p.do_not_specialize else specialised).append(i)
            elif issubclass(kind, Tensor):
                places.tensors.append(i)
                places.aligned.extend([i] * (not p.do_not_specialize and not p.do_not_specialize_on_alignment))
            elif kind.__name__ == "TensorDescriptor":
                places.descriptors.append(i)
            elif kind not in (float, type(None)):
                raise TypeError(f"{self.names[i]} is a {kind.__name__}")
        return places._replace(constants=_getter(constants), specialised=_getter(specialised))


def _none(_: Any) -> None:
    return None


def _getter(items: list[Any]) -> Callable[[Any], Any]:
    return itemgetter(*items) if items else _none
