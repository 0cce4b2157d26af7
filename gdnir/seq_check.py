"""What the host can check of a batch: lists of integers, slots that do not collide, tensors of the right kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdnir.errors import DeviceError, DTypeError, SeqError, ShapeError


def sized_list(op: str, argument: str, values: Any, count: int | None) -> list[Any]:
    if isinstance(values, Tensor):
        raise DTypeError(
            op,
            argument,
            expected="a list of Python integers",
            got="a tensor",
            hint="Use Seq.from_tensors for what lies on a device, or pass .tolist().",
        )
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise DTypeError(op, argument, expected="a list", got=type(values).__name__)
    if count is not None and len(values) != count:
        raise SeqError(op, argument, expected=f"{count} entries, one a sequence", got=f"{len(values)}")
    return list(values)


def ints(op: str, argument: str, values: Any, *, count: int | None = None, least: int = -(2**31)) -> list[int]:
    items = sized_list(op, argument, values, count)
    for n, item in enumerate(items):
        if type(item) is not int:
            raise DTypeError(op, f"{argument}[{n}]", expected="a Python integer", got=f"{item!r}")
        if not least <= item < 2**31:
            raise SeqError(op, f"{argument}[{n}]", expected=f"an integer from {least} to 2^31 - 1", got=str(item))
    return items


def flags(op: str, values: Any, count: int) -> list[bool]:
    if isinstance(values, bool):
        return [values] * count
    items = sized_list(op, "has_state", values, count)
    for n, item in enumerate(items):
        if not isinstance(item, bool):
            raise DTypeError(op, f"has_state[{n}]", expected="True or False", got=f"{item!r}")
    return items


def slot_lists(op: str, count: int, slots: Any, read: Any, write: Any) -> tuple[list[int], list[int]]:
    if slots is None and (read is None or write is None):
        raise SeqError(op, "slots", expected="slots, or both read_slots and write_slots", got="neither")
    if slots is not None and read is not None and write is not None:
        raise SeqError(op, "slots", expected="slots, or read_slots with write_slots", got="all three")
    return (
        ints(op, "read_slots" if read is not None else "slots", slots if read is None else read, count=count),
        ints(op, "write_slots" if write is not None else "slots", slots if write is None else write, count=count),
    )


def check_slots(op: str, read: Sequence[int], write: Sequence[Sequence[int]]) -> None:
    """Writes are pairwise distinct and never name another row's read slot."""
    readers: dict[int, set[int]] = {}
    for n, slot in enumerate(read):
        readers.setdefault(slot, set()).add(n)
    writer: dict[int, int] = {}
    for n, row in enumerate(write):
        if n < len(read) and read[n] < 0:
            continue  # a padding row writes nothing
        for slot in row:
            if slot < 0:
                continue
            if slot in writer:
                raise SeqError(
                    op,
                    f"write_slots[{n}]",
                    expected="slots that no other write names",
                    got=f"slot {slot}, also written by row {writer[slot]}",
                )
            writer[slot] = n
            others = readers.get(slot, set()) - {n}
            if others:
                raise SeqError(
                    op,
                    f"write_slots[{n}]",
                    expected="slots that no other row reads",
                    got=f"slot {slot}, read by row {min(others)}",
                    hint="A row may overwrite its own read slot only.",
                )


def check_tensors(
    phase: str,
    cu_seqlens: Any,
    read_slots: Any,
    write_slots: Any,
    has_state: Any,
    num_tokens: Any,
    max_len: Any,
) -> None:
    """Shapes, dtypes and devices of metadata whose contents only the device knows."""
    name = "Seq.from_tensors"
    if phase not in ("decode", "verify", "prefill"):
        raise SeqError(name, "phase", expected="decode, verify or prefill", got=repr(phase))
    tensors = {
        "cu_seqlens": cu_seqlens,
        "read_slots": read_slots,
        "write_slots": write_slots,
        "has_state": has_state,
    }
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DTypeError(
                name,
                key,
                expected="a tensor",
                got=type(tensor).__name__,
                hint="Lists go to Seq.prefill, .decode or .verify.",
            )
        wanted = (torch.bool,) if key == "has_state" else (torch.int32, torch.int64)
        if tensor.dtype not in wanted:
            raise DTypeError(name, key, expected=" or ".join(map(str, wanted)), got=str(tensor.dtype))
        if tensor.dim() != (2 if key == "write_slots" else 1):
            raise ShapeError(
                name,
                key,
                expected="[N, L]" if key == "write_slots" else "one dimension",
                got=str(list(tensor.shape)),
            )
        if tensor.device != cu_seqlens.device:
            raise DeviceError(
                name, key, expected=f"device {cu_seqlens.device}, like cu_seqlens", got=str(tensor.device)
            )
    count = cu_seqlens.shape[0] - 1
    if count < 0:
        raise ShapeError(name, "cu_seqlens", expected="[N + 1]", got="[0]")
    for key in ("read_slots", "write_slots", "has_state"):
        if tensors[key].shape[0] != count:
            raise ShapeError(
                name, key, expected=f"N = {count} rows (cu_seqlens has N + 1)", got=str(tensors[key].shape[0])
            )
    width = write_slots.shape[1]
    if phase != "verify" and width != 1:
        raise ShapeError(name, "write_slots", expected=f"[N, 1] for {phase}", got=str(list(write_slots.shape)))
    for key, host in (("num_tokens", num_tokens), ("max_len", max_len)):
        if type(host) is not int or host < 0:
            raise SeqError(name, key, expected="an integer of at least 0", got=repr(host))
    if phase == "decode" and (num_tokens != count or max_len > 1):
        raise SeqError(
            name,
            "num_tokens",
            expected=f"one token for each of the {count} sequences",
            got=f"{num_tokens}, max_len {max_len}",
        )
    if phase == "verify" and max_len > width:
        raise SeqError(name, "max_len", expected=f"at most L = {width}, the columns of write_slots", got=str(max_len))
    if max_len > num_tokens:
        raise SeqError(name, "max_len", expected=f"at most num_tokens = {num_tokens}", got=str(max_len))
