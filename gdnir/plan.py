"""A lowered graph bound to weights: everything is chosen and packed here, once; a call only runs.

A call checks the plan's own inputs by their signature (remembered), then goes through prebound calls. No
predicate is asked, nothing is compiled or chosen, inner values are not checked, and states are updated in place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdnir.bind import bind
from gdnir.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    LayoutError,
    LoweringError,
    SeqError,
    ShapeError,
)
from gdnir.ir import DTYPE_NAMES, Graph, Node, SeqType, StateType, TensorType, Type, Value
from gdnir.lowering import find
from gdnir.lowering.eager import check_distinct, check_no_grad
from gdnir.op import infer_node
from gdnir.passes import Lowered
from gdnir.plan_code import Run, signature_of, straight_line
from gdnir.platforms import detect
from gdnir.pool import LayerState
from gdnir.seq import Seq
from gdnir.weights import Weights

MAX_SIGNATURES = 1024


class Plan:
    """Run a lowered graph: `out = plan(x, pool.layer(i), seq)`.

    Arguments are the graph's tensor inputs in order, then the layer's states, then the batch. Results are the
    graph's outputs other than states (one tensor, or a tuple); the states are updated in place.
    """

    def __init__(
        self, lowered: Lowered | Graph, weights: Mapping[str, Tensor], *, batch_invariant: bool = False
    ) -> None:
        """Bind `weights` by name, prepacking them once (plans given the same `Weights` share the result).

        With `batch_invariant`, a sequence's bits never depend on its neighbours: lowerings that promise it run
        the batch whole, otherwise sequences run one at a time. Raises LoweringError if the plan cannot run on
        this machine, WeightsError for a missing or misshapen weight.
        """
        lowered = lowered if isinstance(lowered, Lowered) else Lowered.of(lowered)
        self.lowered, self.graph = lowered, lowered.graph
        self.device = _device(lowered)
        self.weights = weights if isinstance(weights, Weights) else Weights(weights)
        self._tensors = [v for v in self.graph.inputs if isinstance(v.type, TensorType)]
        self._states = [v for v in self.graph.inputs if isinstance(v.type, StateType)]
        self._seqs = [v for v in self.graph.inputs if isinstance(v.type, SeqType)]
        lowerings = [
            (n, find(n.op, n.provider or "").chosen(batch_invariant)) for n in self.graph.nodes if not n.folded
        ]
        self.batch_invariant = batch_invariant
        self._by_row = batch_invariant and not all(low.batch_invariant for _, low in lowerings)
        self._where = f"plan @{self.graph.name}"
        self._signatures: dict[tuple[Any, ...], int] = {}
        self.bound = bind(self.graph, self.weights, self.device)
        self._lowerings = lowerings
        self._inputs = (*self._tensors, *self._states, *self._seqs)
        self._count = len(self._tensors)
        self._arity = self._count + bool(self._states) + len(self._seqs)
        self._run, self.source = straight_line(self.graph, self._inputs, lowerings, self.bound)
        self._signature = signature_of(self.graph, self._inputs)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(self._run, arguments)

    def timed(self, *arguments: Any) -> tuple[Any, list[tuple[Node, float]]]:
        """One call, and the seconds that each node took (the device is waited for after every node)."""
        stamps: list[float] = []

        def tick() -> None:
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            stamps.append(time.perf_counter())

        run, _ = straight_line(self.graph, self._inputs, self._lowerings, self.bound, tick)
        nodes = [n for n, _ in self._lowerings]
        totals = [0.0] * len(nodes)

        def stamped(*inputs: Any) -> Any:
            stamps.clear()
            tick()
            out = run(*inputs)
            for i in range(len(nodes)):
                totals[i] += stamps[i + 1] - stamps[i]
            return out

        return self._call(stamped, arguments), list(zip(nodes, totals, strict=True))

    def __str__(self) -> str:
        return str(self.graph)

    def dump(self) -> str:
        """The graph's text, with the platform, what was bound and what `batch_invariant` changes, as comments that `parse` skips."""
        lines = [
            f"# platform {self.lowered.platform}, batch_invariant {str(self.batch_invariant).lower()}, hash {self.hash}"
        ]
        for value, tensor in self.bound.items():
            lines.append(
                f"# bound {value}: {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)} on {tensor.device}"
            )
        return "\n".join([*lines, *self._for_invariance()]) + "\n" + str(self.graph)

    def _for_invariance(self) -> list[str]:
        """A line for each lowering that runs something else for `batch_invariant`, or has sequences run one at a time."""
        lines = {}
        for node, low in self._lowerings if self.batch_invariant else ():
            name = f"{node.op}@{low.provider}"
            if callable(low.batch_invariant):
                called = getattr(low.run, "__qualname__", repr(low.run))
                lines[name] = f"# {name} by {low.run.__module__}.{called}, which is batch-invariant"
            elif not low.batch_invariant:
                lines[name] = f"# {name} promises no batch invariance: sequences run one at a time"
        return list(lines.values())

    @property
    def hash(self) -> str:
        """The same for the same graph, providers and platform, in every process (weights' values do not enter)."""
        return hashlib.sha256(f"{self.graph}|{self.lowered.platform.name}|{self.batch_invariant}".encode()).hexdigest()[
            :16
        ]

    # ---- running ----

    def _call(self, run: Run, arguments: tuple[Any, ...]) -> Any:
        """Every call passes here, so it asks as little as it can: see benchmarks/plan_overhead.py."""
        if len(arguments) != self._arity:
            raise self._wrong_count(len(arguments))
        seq = arguments[-1] if self._seqs else None
        layer = arguments[self._count] if self._states else None
        tensors = arguments[: self._count]
        try:
            slots = self._signatures.get(self._signature(*arguments), -1)
        except (AttributeError, IndexError, TypeError):  # not the objects that it should be: the full check says what
            slots = -1
        if slots < 0:
            slots = self._check(arguments, tensors, layer, seq)
        states = (layer.conv, layer.ssm) if type(layer) is LayerState else tuple(layer or ())
        if seq is None:
            return run(*tensors, *states)
        for x in tensors:
            if x.shape[0] != seq.num_tokens:
                raise self._wrong_tokens(tensors, seq)
        if states and seq.max_slot is not None and seq.max_slot >= slots:
            raise self._wrong_slot(seq, slots)
        if type(layer) is LayerState and layer.null_slot >= 0:
            seq = seq.without(layer.null_slot)
        return self._run_rows(run, tensors, states, seq) if self._by_row else run(*tensors, *states, seq)

    def _run_rows(self, run: Run, tensors: Sequence[Tensor], states: Sequence[Tensor], seq: Seq) -> Any:
        """One sequence at a time; writes never name another row's read slot, so the order does not matter."""
        rows = seq.once("rows", seq.rows)
        outs, start = [], 0
        for row in rows:
            # cloned, so that every row starts at an aligned address: vector code may round by alignment
            pieces = [x[start : start + row.num_tokens].clone() for x in tensors]
            part = row if seq.phase != "mixed" else Seq.mixed(**{row.phase: row})
            outs.append(run(*pieces, *states, part))
            start += row.num_tokens
        if not outs:
            return run(*tensors, *states, seq)
        if isinstance(outs[0], Tensor):
            return torch.cat(outs)
        return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))

    # ---- checking ----

    def _check(self, arguments: tuple[Any, ...], tensors: Sequence[Any], layer: Any, seq: Any) -> int:
        """Everything about one signature, remembered; returns the number of slots (0 without states)."""
        states = tuple(layer) if layer is not None else ()
        if len(states) != len(self._states):
            raise ArgumentError(
                self._where,
                "states",
                expected=f"{len(self._states)} states ({', '.join(v.name for v in self._states)})",
                got=str(len(states)),
                hint="Pass pool.layer(i).",
            )
        declared_layouts = tuple(v.type.layout for v in self._states if isinstance(v.type, StateType))
        layouts = layer.layouts if isinstance(layer, LayerState) else declared_layouts
        hint = "Plans are inference only; run under torch.no_grad(), or use the ops eagerly with native."
        for value, x in (*zip(self._tensors, tensors, strict=True), *zip(self._states, states, strict=False)):
            if not isinstance(x, Tensor):
                raise ArgumentError(self._where, value.name, expected=str(value.type), got=type(x).__name__)
            if x.device != self.device:
                raise DeviceError(self._where, value.name, expected=f"a tensor on {self.device}", got=str(x.device))
            if torch.is_grad_enabled():
                check_no_grad(self._where, value.name, x, hint)
            name = DTYPE_NAMES.get(x.dtype)
            wanted = value.type.dtype if isinstance(value.type, TensorType | StateType) else ""
            if name != wanted:
                raise DTypeError(
                    self._where,
                    value.name,
                    expected=wanted,
                    got=str(x.dtype),
                    hint="Nothing is cast silently; trace with this dtype.",
                )
        types: dict[Value, Type] = {}
        for value, x in zip(self._tensors, tensors, strict=True):
            declared = value.type
            assert isinstance(declared, TensorType)
            if x.dim() != len(declared.shape) or any(
                isinstance(d, int) and d != n for d, n in zip(declared.shape, x.shape, strict=True)
            ):
                raise ShapeError(self._where, value.name, expected=str(declared), got=f"{list(x.shape)}")
            types[value] = declared
        for value, x, layout in zip(self._states, states, layouts, strict=True):
            declared = value.type
            assert isinstance(declared, StateType)
            if layout != declared.layout:
                raise LayoutError(
                    self._where,
                    value.name,
                    expected=f'layout "{declared.layout}"',
                    got=f'"{layout}"',
                    hint="Trace with the pool's layout (state_layout=, conv_layout=); a state is never copied.",
                )
            check_distinct(self._where, value.name, x)
            types[value] = StateType(declared.dtype, tuple(x.shape), layout)
        for value in self._seqs:
            assert isinstance(value.type, SeqType)
            if not isinstance(seq, Seq):
                raise SeqError(self._where, value.name, expected="a gdnir.Seq", got=type(seq).__name__)
            if seq.phase != value.type.phase:
                raise SeqError(
                    self._where,
                    value.name,
                    expected=f"a {value.type.phase} batch",
                    got=f"a {seq.phase} batch",
                    hint=f'Plans are made for one phase; trace(config, phase="{seq.phase}") makes the other.',
                )
            if seq.device != self.device:
                raise DeviceError(self._where, value.name, expected=f"a batch on {self.device}", got=str(seq.device))
            types[value] = value.type
        # The contracts see the real state shapes: widths, heads and slots are checked op by op.
        for node in self.graph.nodes:
            operands = tuple(v if v is None else Value(v.name, types.get(v, v.type), v.weight) for v in node.operands)
            results = infer_node(Node(node.op, operands, node.results, node.attrs))
            types.update(zip(node.results, results, strict=True))
        slots = states[0].shape[0] if states else 0
        if layer is None or isinstance(layer, LayerState):  # others have no signature, and are checked every time
            if len(self._signatures) >= MAX_SIGNATURES:
                self._signatures.clear()
            self._signatures[self._signature(*arguments)] = slots
        return slots

    def _wrong_count(self, got: int) -> ArgumentError:
        wanted = [v.name for v in self._tensors] + ["states"] * bool(self._states) + [v.name for v in self._seqs]
        return ArgumentError(
            self._where,
            "arguments",
            expected=f"({', '.join(wanted)})",
            got=f"{got} arguments",
            hint="States come as pool.layer(i).",
        )

    def _wrong_tokens(self, tensors: Sequence[Tensor], seq: Seq) -> ShapeError:
        name, count = next(
            (v.name, x.shape[0]) for v, x in zip(self._tensors, tensors, strict=True) if x.shape[0] != seq.num_tokens
        )
        return ShapeError(self._where, name, expected=f"{seq.num_tokens} tokens, like seq", got=str(count))

    def _wrong_slot(self, seq: Seq, slots: int) -> SeqError:
        return SeqError(
            self._where,
            "seq",
            expected=f"slots below the pool's {slots}",
            got=f"slot {seq.max_slot}",
            hint="Use slots that pool.allocate() gave.",
        )


def _device(lowered: Lowered) -> torch.device:
    """The device this plan runs on; LoweringError if this machine is not the plan's platform."""
    platform = lowered.platform
    here = detect(platform.device if platform.device == "cpu" else None)
    if here.device != platform.device or (platform.arch and here.arch and platform.arch != here.arch):
        raise LoweringError(
            f"plan @{lowered.graph.name}: lowered for {platform}, but this machine is {here}. "
            "Lower it for this machine: gdnir.lower(graph) without platform."
        )
    for node in lowered.graph.nodes:
        lowering = find(node.op, node.provider or "")
        reason = lowering.available(here) if lowering.available is not None else None
        if reason is not None:
            raise LoweringError(
                f"plan @{lowered.graph.name}: {node.op}@{node.provider} cannot run on this machine: {reason}"
            )
    return (
        torch.device(here.device, torch.cuda.current_device()) if here.device == "cuda" else torch.device(here.device)
    )
