"""An op called with tensors: checked, functional, and run by what `lower` would choose on that device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdnir.contract import Slot
from gdnir.errors import ArgumentError, DeviceError, DTypeError, GradError, LayoutError, SeqError
from gdnir.ir import DTYPE_NAMES, Attr, StateType, TensorType, Type
from gdnir.lowering import NATIVE, Lowering, find
from gdnir.lowering.choose import Target, choose
from gdnir.op import Op
from gdnir.platforms import detect
from gdnir.seq import Seq


def run_eager(op: Op, operands: Sequence[Any], attrs: Mapping[str, Attr], provider: str | None) -> Any:
    """Run `op` on tensors; arguments stay untouched, updated states are new tensors.

    Raises the InputError that says which argument does not fit, or LoweringError if `provider` cannot take it.
    """
    slots = op.slots(len(operands))
    types = [operand_type(op.name, slot, x, attrs) for slot, x in zip(slots, operands, strict=True)]
    op.infer(types, attrs)
    device = check_devices(op.name, slots, operands)
    target = Target(detect(device.type), {op.name: (provider,)} if provider is not None else {})
    chosen = choose(op, types, attrs, target).provider
    if op.body is not None and chosen == NATIVE:
        return op.body(*operands, **attrs)
    if chosen != NATIVE and torch.is_grad_enabled():
        for slot, x in zip(slots, operands, strict=True):
            check_no_grad(op.name, slot.name, x, f"{chosen} has no backward; use provider='native' or torch.no_grad().")
    inputs = [x.clone() if slot.is_state else x for slot, x in zip(slots, operands, strict=True)]
    results = call(find(op.name, chosen), inputs, attrs)
    states = {slot.name: x for slot, x in zip(slots, inputs, strict=True) if slot.is_state}
    fresh = iter(results)
    merged = tuple(states[slot.name] if slot.name in states else next(fresh) for slot in op.contract.outputs)
    return merged[0] if len(merged) == 1 else merged


def call(lowering: Lowering, operands: Sequence[Any], attrs: Mapping[str, Attr]) -> tuple[Any, ...]:
    """The lowering's results other than states, always as a tuple; states among `operands` are updated in place."""
    extra = {}
    if lowering.prepare is not None:
        seq = next(x for x in operands if isinstance(x, Seq))
        extra["prepared"] = prepared(lowering, seq)
    results = lowering.run(*operands, **attrs, **extra)
    return results if isinstance(results, tuple) else () if results is None else (results,)


def prepared(lowering: Lowering, seq: Seq) -> Any:
    """What the lowering wants to know about the batch, computed once per batch."""
    make = lowering.prepare
    return None if make is None else seq.once(f"{lowering.provider}.{lowering.op}", lambda: make(seq))


def operand_type(op: str, slot: Slot, value: Any, attrs: Mapping[str, Attr]) -> Type | None:
    """The IR type of an argument; raises DTypeError or ArgumentError for what is no tensor of the IR."""
    if value is None:
        return None
    if slot.is_seq:
        if not isinstance(value, Seq):
            raise SeqError(
                op,
                slot.name,
                expected="a gdnir.Seq",
                got=type(value).__name__,
                hint="Build one with Seq.prefill, .decode, .verify or .mixed.",
            )
        return value.type
    if not isinstance(value, Tensor):
        raise ArgumentError(op, slot.name, expected="a tensor", got=type(value).__name__)
    dtype = DTYPE_NAMES.get(value.dtype)
    if dtype is None:
        raise DTypeError(
            op,
            slot.name,
            expected=" or ".join(slot.dtypes),
            got=str(value.dtype),
            hint="Convert it: nothing is cast silently.",
        )
    if slot.layout_attr is not None:
        check_distinct(op, slot.name, value)
        return StateType(dtype, tuple(value.shape), str(attrs[slot.layout_attr]))
    return TensorType(dtype, tuple(value.shape))


def check_distinct(op: str, argument: str, state: Tensor) -> None:
    """A state is written in place: raise LayoutError if two of its elements share memory."""
    reach = 0
    for stride, size in sorted((st, n) for st, n in zip(state.stride(), state.shape, strict=True) if n > 1):
        if stride <= reach:
            raise LayoutError(
                op,
                argument,
                expected="a state whose elements lie apart",
                got=f"strides {state.stride()} for shape {list(state.shape)}",
                hint="An expanded or overlapping tensor cannot be updated in place; call .contiguous() on it once.",
            )
        reach += stride * (size - 1)


def check_no_grad(op: str, argument: str, value: Any, hint: str) -> None:
    """Raise GradError if `value` is a tensor that requires grad."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise GradError(
            op, argument, expected="a tensor that does not require grad", got="requires_grad=True", hint=hint
        )


def check_devices(op: str, slots: Sequence[Slot], operands: Sequence[Any]) -> torch.device:
    """The one device of all tensors; raises DeviceError naming the odd one."""
    first: tuple[str, torch.device] | None = None
    for slot, value in zip(slots, operands, strict=True):
        if isinstance(value, Tensor | Seq):
            if first is None:
                first = (slot.name, value.device)
            elif value.device != first[1]:
                raise DeviceError(
                    op, slot.name, expected=f"device {first[1]}, like `{first[0]}`", got=str(value.device)
                )
    return first[1] if first else torch.device("cpu")
