"""Launch a Triton or Gluon kernel again without repeating what its first launch has shown.

`kernel[grid](...)` binds, specialises and looks up each argument by way of dictionaries and strings: for the 60 arguments of
`gdn_step` that takes a host longer than all else. Here Triton makes the first launch of a key, and later ones go to its C
function with their own addresses and numbers. The key tells apart all that Triton's own does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gdnir.lowering.descriptors import Descriptors
from gdnir.lowering.direct import Again, direct

MOST = 1024
"""Kernels with their constants, and keys of one, that are remembered; then all are forgotten, and Triton asked again."""

_launchers: dict[tuple[int, int], tuple[Any, dict[str, Any], Callable[..., None]]] = {}


def launch(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """`kernel[(programs,)](*args, **constants)`, on the arguments' device and its current stream.

    `args` are the kernel's first arguments, all that are not constexpr; TMA descriptors as `Descriptors`. `constants` are the others, and options, in a dict that
    the caller keeps and never changes: it is known by its identity. Launches with the same one have tensors, and None, in the
    same places. Only what CUDA runs is relaunched: interpreted kernels, those on ROCm (where Triton also looks at the sizes of
    tensors), and all while a profiler hooks into launches are launched by Triton. Raises KeyError or TypeError for arguments that
    are missing or of an unknown type.
    """
    names = id(kernel), id(constants)
    found = _launchers.get(names)
    if found is None:
        if len(_launchers) >= MOST:
            _launchers.clear()
        # the kernel and the constants too, or others might get their ids
        found = _launchers[names] = kernel, constants, _launcher(kernel, args, constants)
    found[2](programs, *args)


def _launcher(kernel: Any, args: Sequence[Any], constants: dict[str, Any]) -> Callable[..., None]:
    """A function of the programs and arguments like `args`."""
    from triton.runtime.jit import JITFunction

    if isinstance(kernel, JITFunction) and torch.version.hip is None and torch.cuda.is_available():
        return Relaunch(kernel, args, constants).launch

    def plainly(programs: int, *args: Any) -> None:
        with _on(args):
            kernel[(programs,)](*_singly(args), **constants)

    return plainly


def _singly(args: Sequence[Any]) -> list[Any]:
    """As the kernel takes them."""
    return [x for given in args for x in (given.members if type(given) is Descriptors else (given,))]


def _on(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


class Relaunch:
    """A kernel with some constants, and what Triton has shown of it by `known` keys."""

    def __init__(self, kernel: Any, args: Sequence[Any], constants: dict[str, Any]) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.kernel, self.constants, self.runtime = kernel, constants, knobs.runtime
        # Whoever wants to know of launches adds to one of these, or puts something else in the place of enter or leave.
        self.enter, self.leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        self.entering, self.leaving = (getattr(hook, "calls", hook) for hook in (self.enter, self.leave))
        self.before = kernel.pre_run_hooks
        self.tail = tuple([constants[p.name] for p in kernel.params[len(_singly(args)) :]])
        self.known: dict[Any, Again | None] = {}  # None: Triton launches it
        self.current_device = driver.active.get_current_device
        if self.current_device is torch.cuda.current_device:  # which first asks whether CUDA is initialised
            self.current_device = torch._C._cuda_getDevice
        self.current_stream = driver.active.get_current_stream
        self.launch = _written(self, args)

    def anew(self, programs: int, args: Sequence[Any], device: int, key: Any) -> None:
        """By Triton. On another device than the current one: the same there, and on none, a CPU's, Triton says what is wrong."""
        elsewhere = device != self.current_device()
        if elsewhere and device >= 0:
            with _on(args):
                self.launch(programs, *args)
            return
        args = _singly(args)
        compiled = self.kernel[(programs,)](*args, **self.constants)
        if key not in self.known and not elsewhere:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[key] = direct(compiled, (*args, *self.tail))


_WATCHED = (
    "entering or leaving or before or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave"
)
"""Whether somebody wants to know of launches."""


def _written(to: Relaunch, args: Sequence[Any]) -> Callable[..., None]:
    """A function of the programs and arguments like `args`: it launches what is known under their key, with what C takes. With
    equal keys Triton takes the same compiled kernel.

    Its text is written here, as Triton writes its binder: a loop over 40 arguments takes as long as that.
    """
    device, key, values, params = "", [], [], iter(to.kernel.params)
    for i, x in enumerate(args):
        a = value = f"a{i}"
        if type(x) is Descriptors:
            key.append(f"{a}.kind")
            values.append(f"*({a}.encoded or {a}.encode())")
            for _ in x.members:
                next(params)
            continue
        p = next(params)
        if p.is_constexpr:
            raise TypeError(f"{p.name} is constexpr, and belongs to the constants")
        if isinstance(x, Tensor):
            device, value = device or f"{a}.get_device()", f"p{i}"
            aligned = not p.do_not_specialize and not p.do_not_specialize_on_alignment
            key += [f"{a}.dtype", *[f"p{i} % 16"] * aligned]
        elif type(x) is int:
            # Triton asks for 1 and multiples of 16. What it asks that of is strides: their values are as few.
            key.append(f"{a} >> 31" if p.do_not_specialize else a)
        elif x is None:
            key.append(f"{a} is None")
        elif type(x) is float:
            key.append(f"{a}.__class__")
        else:
            raise TypeError(f"{p.name} is a {type(x).__name__}")
        values.append(value)
    names = ", ".join(f"a{i}" for i in range(len(args)))
    addresses = "".join(f"    {value} = a{value[1:]}.data_ptr()\n" for value in values if value[0] == "p")
    source = (
        f"def launch(programs, {names}):\n{addresses}"
        f"    device = {device}\n"
        f"    key = device, {', '.join(key)}\n"
        f"    again = known.get(key)\n"
        f"    if again is None or device != current_device() or {_WATCHED}:\n"
        f"        anew(programs, ({names},), device, key)\n"
        f"    else:\n"
        f"        again(programs, current_stream(device), ({', '.join(values)}, *tail))\n"
    )
    scope: dict[str, Any] = {"anew": to.anew, **vars(to)}
    exec(compile(source, "<launch>", "exec"), scope)  # noqa: S102 - built above, of our own names only
    launch: Callable[..., None] = scope["launch"]
    return launch
