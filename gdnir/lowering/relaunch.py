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

from gdnir.lowering.descriptors import encode
from gdnir.lowering.direct import Again, direct

MOST = 1024
"""Constants of one kernel, and keys of one kind, that are remembered; then all are forgotten, and Triton asked again."""

_launchers: dict[int, tuple[Any, Callable[[int, Sequence[Any], dict[str, Any]], None]]] = {}


def launch(kernel: Any, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    """`kernel[(programs,)](*args, **constants)`, on the arguments' device and its current stream.

    `args` are the kernel's first arguments, all that are not constexpr. `constants` are the others, and options, in a dict that
    the caller keeps and never changes: it is known by its identity. Launches with the same one have tensors, and None, in the
    same places. Only what CUDA runs is relaunched: interpreted kernels, those on ROCm (where Triton also looks at the sizes of
    tensors), under torch.compile, which knows Triton's kernels, and all while a profiler hooks into launches are launched by
    Triton. Raises KeyError or TypeError for arguments that are missing or of an unknown type.
    """
    if torch.compiler.is_compiling():
        kernel[(programs,)](*args, **constants)
        return
    found = _launchers.get(id(kernel))
    if found is None:
        found = _launchers[id(kernel)] = kernel, _launcher(kernel)  # the kernel too, or another one might get its id
    found[1](programs, args, constants)


def _launcher(kernel: Any) -> Callable[[int, Sequence[Any], dict[str, Any]], None]:
    from triton.runtime.jit import JITFunction

    if isinstance(kernel, JITFunction) and torch.version.hip is None and torch.cuda.is_available():
        return Relaunch(kernel)

    def plainly(programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
        with _on(args):
            kernel[(programs,)](*args, **constants)

    return plainly


def _on(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


class Relaunch:
    """A kernel, and what Triton has shown of it."""

    def __init__(self, kernel: Any) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.kernel, self.knobs = kernel, knobs.runtime
        self.kinds: dict[int, _Kind] = {}
        self.current_device = driver.active.get_current_device
        self.current_stream = driver.active.get_current_stream

    def __call__(self, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
        kind = self.kinds.get(id(constants)) or self.kind(args, constants)
        device, key, values = kind.split(*args)
        if device != self.current_device():
            if device < 0:  # on the CPU: Triton says what is wrong with it
                self.kernel[(programs,)](*args, **constants)
                return
            with _on(args):
                self(programs, args, constants)
        elif (again := kind.known.get(key)) is not None and not self.watched():
            again(programs, self.current_stream(device), values)
        else:
            compiled = self.kernel[(programs,)](*args, **constants)
            if key not in kind.known:
                if len(kind.known) >= MOST:
                    kind.known.clear()
                kind.known[key] = direct(compiled, (*args, *kind.tail))

    def watched(self) -> bool:
        """Whether somebody wants to know of launches."""
        enter, leave = self.knobs.launch_enter_hook, self.knobs.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self.kernel.pre_run_hooks)

    def kind(self, args: Sequence[Any], constants: dict[str, Any]) -> _Kind:
        """What launches with these constants have in common, remembered."""
        if len(self.kinds) >= MOST:
            self.kinds.clear()
        params = self.kernel.params
        tail = tuple([constants[p.name] for p in params[len(args) :]])
        found = self.kinds[id(constants)] = _Kind(_splitter(params, args, tail), {}, constants, tail)
        return found


class _Kind(NamedTuple):
    split: Callable[..., tuple[int, Any, tuple[Any, ...]]]
    known: dict[Any, Again | None]  # None: Triton launches it
    constants: dict[str, Any]  # kept, or others might get its id
    tail: tuple[Any, ...]  # the constexpr arguments


def _splitter(params: Sequence[Any], args: Sequence[Any], tail: tuple[Any, ...]) -> Callable[..., Any]:
    """A function of arguments like these: (device, key, what C takes). With equal keys Triton takes the same compiled kernel.

    Its text is written here, as Triton writes its binder: a loop over 40 arguments takes as long as that.
    """
    device, key, values = "", [], []
    for i, (x, p) in enumerate(zip(args, params, strict=False)):
        a = value = f"a{i}"
        if p.is_constexpr:
            raise TypeError(f"{p.name} is constexpr, and belongs to the constants")
        if isinstance(x, Tensor):
            device, value = device or f"{a}.get_device()", f"p{i}"
            aligned = not p.do_not_specialize and not p.do_not_specialize_on_alignment
            key += [f"{a}.dtype", *[f"p{i} % 16"] * aligned]
        elif type(x).__name__ == "TensorDescriptor":
            value = f"*({a}.encoded or encode({a}))"
            key.append(f"{a}.kind")
        elif type(x) is int:
            # Triton asks for 1 and multiples of 16. What it asks that of is strides: their values are as few.
            key.append(f"-0x80000000 <= {a} < 0x80000000" if p.do_not_specialize else a)
        elif x is None:
            key.append(f"{a} is None")
        elif type(x) is float:
            key.append(f"{a}.__class__")
        else:
            raise TypeError(f"{p.name} is a {type(x).__name__}")
        values.append(value)
    names = [f"a{i}" for i in range(len(args))]
    addresses = [f"    {value} = a{value[1:]}.data_ptr()\n" for value in values if value[0] == "p"]
    source = (
        f"def split({', '.join(names)}):\n{''.join(addresses)}    device = {device}\n"
        f"    return device, (device, {', '.join(key)}), ({', '.join(values)}, *tail)\n"
    )
    scope: dict[str, Any] = {"encode": encode, "tail": tail}
    exec(compile(source, "<split>", "exec"), scope)  # noqa: S102 - built above, of our own names only
    split: Callable[..., Any] = scope["split"]
    return split
