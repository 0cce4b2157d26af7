"""Launch a Triton or Gluon kernel again without repeating what its first launch has shown.

`kernel[grid](...)` binds, specialises and looks up each argument by way of dictionaries and strings: 40 to 90 us of a host's time
for a kernel of 50 arguments, as much as a decode step takes on the GPU. It returns the compiled kernel, which can be
launched again by whatever has the same key; the key is all that Triton's own depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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


class Relaunch:
    """A kernel, and what has been compiled of it, by device and key."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: list[str] = kernel.arg_names
        self.parameters = frozenset(self.names)
        self.kinds = [
            (p.is_constexpr, not p.do_not_specialize, not (p.do_not_specialize or p.do_not_specialize_on_alignment))
            for p in kernel.params
        ]
        self.compiled: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def key(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """(key, all arguments in order). Raises KeyError if one is missing, TypeError for what this file does not know."""
        values = [*args, *[named[name] for name in self.names[len(args) :]]]
        key: list[Any] = []
        for x, (constant, by_value, by_alignment) in zip(values, self.kinds, strict=True):
            kind = type(x)
            if constant or x is None or kind is bool:
                key.append(x)
            elif kind is int:
                key.append((by_value and x == 1, by_alignment and x % 16 == 0, -(2**31) <= x < 2**31, x < 2**63))
            elif kind is float:
                key.append(float)
            elif isinstance(x, Tensor):
                key.append((x.dtype, by_alignment and x.data_ptr() % 16 == 0))
            elif kind.__name__ == "TensorDescriptor":
                key.append(
                    (x.base.dtype, *x.block_shape, id(x.layout))
                )  # layouts are constants of the kernels' modules
            else:
                raise TypeError(kind)
        key += [option for option in named.items() if option[0] not in self.parameters]
        return tuple(key), values

    def launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        device = torch.cuda.current_device()
        key, values = self.key(args, named)
        compiled = self.compiled.get((device, key))
        if compiled is None:
            self.compiled[device, key] = self.kernel[grid](*args, **named)
        else:
            compiled[(*grid, 1, 1)](*values, stream=torch._C._cuda_getCurrentRawStream(device))
