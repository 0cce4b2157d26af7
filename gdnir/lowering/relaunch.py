"""Launch a Triton or Gluon kernel again without repeating what its first launch has shown.

`kernel[grid](...)` binds, specialises and looks up each argument by way of dictionaries and strings: for the 60 arguments of
`gdn_step` that takes a host longer than all else. Here Triton makes the first launch of a key, and later ones go to its C
function with their own addresses and numbers. The key tells apart all that Triton's own does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdnir.lowering.descriptors import Descriptors
from gdnir.lowering.direct import Again, direct

MOST = 1024
"""Kernels with their constants, and keys of one, that are remembered; then all are forgotten, and Triton asked again."""

_launchers: dict[tuple[int, ...], tuple[Steps, Callable[..., None]]] = {}


class Step(NamedTuple):
    """A kernel with its constants, as `launch` takes them, and which of the arguments it takes."""

    kernel: Any
    constants: dict[str, Any]
    takes: Sequence[int]


class Steps:
    """Launches that follow one another and share their arguments."""

    def __init__(self, *steps: Step) -> None:
        self.steps, self.names = steps, tuple([id(x) for step in steps for x in step[:2]])


def launch(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """`kernel[(programs,)](*args, **constants)`, on the arguments' device and its current stream.

    `args` are the kernel's first arguments, all that are not constexpr; TMA descriptors as `Descriptors`. `constants` are the
    others, and options, in a dict that the caller keeps and never changes: it is known by its identity. Launches with the same
    one have tensors, and None, in the same places. Only what CUDA runs is relaunched: interpreted kernels, those on ROCm (where
    Triton also looks at the sizes of tensors), and all while a profiler hooks into launches are launched by Triton. Raises KeyError
    or TypeError for arguments that are missing or of an unknown type.
    """
    found = _launchers.get((id(kernel), id(constants)))
    if found is None:
        found = _remember(Steps(Step(kernel, constants, range(len(args)))), args)
    found[1]((programs,), *args)


def launch_all(steps: Steps, programs: Sequence[int], args: Sequence[Any]) -> None:
    """`launch` of each step on its part of `args`: what is asked of an argument is asked once."""
    found = _launchers.get(steps.names)
    if found is None:
        found = _remember(steps, args)
    found[1](programs, *args)


def _remember(steps: Steps, args: Sequence[Any]) -> tuple[Steps, Callable[..., None]]:
    if len(_launchers) >= MOST:
        _launchers.clear()
    # the kernels and the constants too, or others might get their ids
    found = _launchers[steps.names] = steps, _launcher(steps.steps, args)
    return found


def _launcher(steps: Sequence[Step], args: Sequence[Any]) -> Callable[..., None]:
    """A function of the programs and arguments like `args`."""
    from triton.runtime.jit import JITFunction

    of_triton = all(isinstance(step.kernel, JITFunction) for step in steps)
    if of_triton and torch.version.hip is None and torch.cuda.is_available():
        return Relaunch(steps, args).launch

    def plainly(programs: Sequence[int], *args: Any) -> None:
        with _on(args):
            by_triton(steps, programs, args)

    return plainly


def by_triton(steps: Sequence[Step], programs: Sequence[int], args: Sequence[Any]) -> list[Any]:
    """What Triton's launches give: the compiled kernels."""
    return [
        step.kernel[(count,)](*_singly(step, args), **step.constants)
        for step, count in zip(steps, programs, strict=True)
    ]


def _singly(step: Step, args: Sequence[Any]) -> list[Any]:
    """What a kernel takes, descriptors one by one."""
    taken = [args[i] for i in step.takes]
    return [x for given in taken for x in (given.members if type(given) is Descriptors else (given,))]


def _on(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


class Relaunch:
    """Kernels with some constants, and what Triton has shown of them by `known` keys."""

    def __init__(self, steps: Sequence[Step], args: Sequence[Any]) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.steps, self.runtime = steps, knobs.runtime
        # Whoever wants to know of launches adds to one of these, or puts something else in the place of enter or leave.
        self.enter, self.leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        self.entering, self.leaving = (getattr(hook, "calls", hook) for hook in (self.enter, self.leave))
        self.before = [step.kernel.pre_run_hooks for step in steps]
        self.tails = [
            tuple([step.constants[p.name] for p in step.kernel.params[len(_singly(step, args)) :]]) for step in steps
        ]
        self.known: dict[Any, Sequence[Again] | None] = {}  # None: Triton launches them
        self.current_device = driver.active.get_current_device
        if self.current_device is torch.cuda.current_device:  # which first asks whether CUDA is initialised
            self.current_device = torch._C._cuda_getDevice
        self.current_stream = driver.active.get_current_stream
        self.launch = _written(self, args)

    def anew(self, programs: Sequence[int], args: Sequence[Any], device: int, key: Any) -> None:
        """By Triton. On another device than the current one: the same there, and on none, a CPU's, Triton says what is wrong."""
        elsewhere = device != self.current_device()
        if elsewhere and device >= 0:
            with _on(args):
                self.launch(programs, *args)
            return
        compiled = by_triton(self.steps, programs, args)
        if key not in self.known and not elsewhere:
            if len(self.known) >= MOST:
                self.known.clear()
            shown = zip(compiled, self.steps, self.tails, strict=True)
            found = [direct(kernel, (*_singly(step, args), *tail)) for kernel, step, tail in shown]
            again = [x for x in found if x is not None]
            self.known[key] = again if len(again) == len(found) else None


def _written(to: Relaunch, args: Sequence[Any]) -> Callable[..., None]:
    """A function of the programs and arguments like `args`: it launches what is known under their key, with what C takes. With
    equal keys Triton takes the same compiled kernels.

    Its text is written here, as Triton writes its binder: a loop over 40 arguments takes as long as that.
    """
    asked: dict[int, list[Any]] = {}  # the parameters that an argument is given to
    for step in to.steps:
        params = iter(step.kernel.params)
        for i in step.takes:
            taken = [next(params) for _ in (args[i].members if type(args[i]) is Descriptors else "1")]
            asked.setdefault(i, []).extend(taken)
    device, key, values = "", [], {}
    for i, params in sorted(asked.items()):
        x, a = args[i], f"a{i}"
        values[i] = a
        if type(x) is Descriptors:
            key.append(f"{a}.kind")
            values[i] = f"*({a}.encoded or {a}.encode())"
            continue
        for p in params:
            if p.is_constexpr:
                raise TypeError(f"{p.name} is constexpr, and belongs to the constants")
        if isinstance(x, Tensor):
            device, values[i] = device or f"{a}.get_device()", f"p{i}"
            aligned = any(not p.do_not_specialize and not p.do_not_specialize_on_alignment for p in params)
            key += [f"{a}.dtype", *[f"p{i} % 16"] * aligned]
        elif type(x) is int:
            # Triton asks for 1 and multiples of 16. What it asks that of is strides: their values are as few.
            key.append(f"{a} >> 31" if all(p.do_not_specialize for p in params) else a)
        elif x is None:
            key.append(f"{a} is None")
        elif type(x) is float:
            key.append(f"{a}.__class__")
        else:
            raise TypeError(f"{params[0].name} is a {type(x).__name__}")
    names = ", ".join(f"a{i}" for i in range(len(args)))
    addresses = "".join(f"    p{i} = a{i}.data_ptr()\n" for i, value in values.items() if value[0] == "p")
    before = " or ".join(f"before[{n}]" for n in range(len(to.steps)))
    watched = f"entering or leaving or {before} or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave"
    launches = "".join(
        f"        again[{n}](programs[{n}], stream, ({', '.join(values[i] for i in step.takes)}, *tails[{n}]))\n"
        for n, step in enumerate(to.steps)
    )
    source = (
        f"def launch(programs, {names}):\n{addresses}"
        f"    device = {device}\n"
        f"    key = device, {', '.join(key)}\n"
        f"    again = known.get(key)\n"
        f"    if again is None or device != current_device() or {watched}:\n"
        f"        anew(programs, ({names},), device, key)\n"
        f"    else:\n"
        f"        stream = current_stream(device)\n{launches}"
    )
    scope: dict[str, Any] = {"anew": to.anew, **vars(to)}
    exec(compile(source, "<launch>", "exec"), scope)  # noqa: S102 - built above, of our own names only
    launch: Callable[..., None] = scope["launch"]
    return launch
