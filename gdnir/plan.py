"""A lowered graph bound to weights: everything is chosen and packed here, once; a call only runs.

A call checks the plan's own inputs by their signature (remembered), then goes through prebound calls. No
predicate is asked, nothing is compiled or chosen, inner values are not checked, and states are updated in place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

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
from gdnir.lowering import Lowering, find
from gdnir.lowering.eager import check_distinct, check_no_grad, prepared
from gdnir.op import infer_node, lookup
from gdnir.passes import Lowered
from gdnir.platforms import detect
from gdnir.pool import LayerState
from gdnir.seq import Seq
from gdnir.weights import Weights

MAX_SIGNATURES = 1024


class _Step(NamedTuple):
    run: Callable[..., Any]
    operands: Callable[[list[Any]], Any]
    single: bool  # one operand: itemgetter gives it bare
    result: int  # where the only result goes, or -1
    results: tuple[int, ...]  # where several go
    drops: tuple[int, ...]  # values whose last use this is


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
        lowerings = [(n, find(n.op, n.provider or "")) for n in self.graph.nodes if not n.folded]
        self.batch_invariant = batch_invariant
        self._by_row = batch_invariant and not all(low.batch_invariant for _, low in lowerings)
        self._where = f"plan @{self.graph.name}"
        self._signatures: dict[tuple[Any, ...], int] = {}
        self.bound = bind(self.graph, self.weights, self.device)
        self._build(lowerings)

    def __call__(self, *arguments: Any) -> Any:
        tensors, states, seq = self._take(arguments)
        return self._call(tensors, states, seq, None)

    def timed(self, *arguments: Any) -> tuple[Any, list[tuple[Node, float]]]:
        """One call, and the seconds that each node took (the device is waited for after every node)."""
        tensors, states, seq = self._take(arguments)
        spans: list[float] = []
        out = self._call(tensors, states, seq, spans)
        nodes = [n for n in self.graph.nodes if not n.folded]
        totals = [sum(spans[i :: len(nodes)]) for i in range(len(nodes))]
        return out, list(zip(nodes, totals, strict=True))

    def __str__(self) -> str:
        return str(self.graph)

    def dump(self) -> str:
        """The graph's text, with the platform and what was bound, as comments that `parse` skips."""
        lines = [
            f"# platform {self.lowered.platform}, batch_invariant {str(self.batch_invariant).lower()}, hash {self.hash}"
        ]
        for value, tensor in self.bound.items():
            lines.append(
                f"# bound {value}: {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)} on {tensor.device}"
            )
        return "\n".join(lines) + "\n" + str(self.graph)

    @property
    def hash(self) -> str:
        """The same for the same graph, providers and platform, in every process (weights' values do not enter)."""
        return hashlib.sha256(f"{self.graph}|{self.lowered.platform.name}|{self.batch_invariant}".encode()).hexdigest()[
            :16
        ]

    # ---- building ----

    def _build(self, lowerings: Sequence[tuple[Node, Lowering]]) -> None:
        place: dict[Value, int] = {}
        template: list[Any] = [None]  # index 0 stays None: operands that are not given
        for value in self.graph.inputs:
            place[value] = len(template)
            template.append(None)
        for value, tensor in self.bound.items():
            place[value] = len(template)
            template.append(tensor)
        inputs = frozenset(place.values()) - {place[v] for v in self.graph.inputs}
        last = {v: i for i, (node, _) in enumerate(lowerings) for v in node.operands if v is not None}
        steps = []
        for index, (node, lowering) in enumerate(lowerings):
            op = lookup(node.op)
            states = dict(op.contract.state_results())
            names = [slot.name for slot in op.slots(len(node.operands))]
            fresh = []
            for position, value in enumerate(node.results):
                if position in states:  # updated in place: the new version lives where the old one does
                    source = node.operands[names.index(states[position].name)]
                    place[value] = 0 if source is None else place[source]
                else:
                    place[value] = len(template)
                    fresh.append(len(template))
                    template.append(None)
            operands = tuple(0 if v is None else place[v] for v in node.operands)
            drops = {
                place[v]
                for v, i in last.items()
                if i == index and v not in self.graph.outputs and not isinstance(v.type, StateType)
            }
            run = partial(lowering.run, **dict(node.attrs)) if node.attrs else lowering.run
            if lowering.prepare is not None:
                run = _with_prepared(run, lowering, names.index("seq"))
            steps.append(
                _Step(
                    run,
                    itemgetter(*operands),
                    len(operands) == 1,
                    fresh[0] if len(fresh) == 1 else -1,
                    tuple(fresh),
                    tuple(sorted(drops - inputs)),
                )
            )
        self._template, self._steps = template, steps
        self._entry = tuple(place[v] for v in (*self._tensors, *self._states, *self._seqs))
        self._exit = tuple(place[v] for v in self.graph.outputs if not isinstance(v.type, StateType))

    # ---- running ----

    def _take(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Any, Any]:
        """Split a call's arguments into tensors, states and batch."""
        count = len(self._tensors) + bool(self._states) + len(self._seqs)
        if len(arguments) != count:
            wanted = [v.name for v in self._tensors] + ["states"] * bool(self._states) + [v.name for v in self._seqs]
            raise ArgumentError(
                self._where,
                "arguments",
                expected=f"({', '.join(wanted)})",
                got=f"{len(arguments)} arguments",
                hint="States come as pool.layer(i).",
            )
        tensors = arguments[: len(self._tensors)]
        states = arguments[len(self._tensors)] if self._states else None
        return tensors, states, arguments[-1] if self._seqs else None

    def _call(self, tensors: Sequence[Any], layer: Any, seq: Any, spans: list[float] | None) -> Any:
        states = () if layer is None else tuple(layer)
        key: tuple[Any, ...] = (torch.is_grad_enabled(), getattr(layer, "layouts", None))
        try:
            for x in tensors:
                key += (x.dtype, x.shape[1:], x.stride(), x.device, x.requires_grad)
            for x in states:
                key += (x.dtype, x.shape, x.stride(), x.device, x.requires_grad)
            if seq is not None:
                key += (seq.phase, seq.device)
        except AttributeError:
            key = ()  # something is no tensor: the full check says what
        slots = self._signatures.get(key, -1)
        if slots < 0:
            slots = self._check(tensors, states, layer, seq)
            if len(self._signatures) >= MAX_SIGNATURES:
                self._signatures.clear()
            self._signatures[key] = slots
        if seq is not None:
            self._check_batch(tensors, seq, slots)
            if isinstance(layer, LayerState) and layer.null_slot >= 0:
                seq = seq.without(layer.null_slot)
            if self._by_row:
                return self._run_rows(tensors, states, seq, spans)
        return self._run((*tensors, *states) if seq is None else (*tensors, *states, seq), spans)

    def _run(self, inputs: Sequence[Any], spans: list[float] | None = None) -> Any:
        env = self._template.copy()
        for place, value in zip(self._entry, inputs, strict=True):
            env[place] = value
        for run, operands, single, result, results, drops in self._steps:
            start = time.perf_counter() if spans is not None else 0.0
            out = run(operands(env)) if single else run(*operands(env))
            if result >= 0:
                env[result] = out
            else:
                for place, value in zip(results, out or (), strict=True):
                    env[place] = value
            for place in drops:
                env[place] = None
            if spans is not None:
                if self.device.type != "cpu":
                    torch.accelerator.synchronize()
                spans.append(time.perf_counter() - start)
        if len(self._exit) == 1:
            return env[self._exit[0]]
        return tuple(env[place] for place in self._exit)

    def _run_rows(
        self, tensors: Sequence[Tensor], states: Sequence[Tensor], seq: Seq, spans: list[float] | None
    ) -> Any:
        """One sequence at a time; writes never name another row's read slot, so the order does not matter."""
        rows = seq.once("rows", seq.rows)
        outs, start = [], 0
        for row in rows:
            # cloned, so that every row starts at an aligned address: vector code may round by alignment
            pieces = [x[start : start + row.num_tokens].clone() for x in tensors]
            part = row if seq.phase != "mixed" else Seq.mixed(**{row.phase: row})
            outs.append(self._run((*pieces, *states, part), spans))
            start += row.num_tokens
        if not outs:
            return self._run((*tensors, *states, seq), spans)
        if len(self._exit) == 1:
            return torch.cat(outs)
        return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))

    # ---- checking ----

    def _check(self, tensors: Sequence[Any], states: Sequence[Any], layer: Any, seq: Any) -> int:
        """Everything about one signature; returns the number of slots (0 without states)."""
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
        if len(states) != len(self._states):
            raise ArgumentError(
                self._where,
                "states",
                expected=f"{len(self._states)} states ({', '.join(v.name for v in self._states)})",
                got=str(len(states)),
                hint="Pass pool.layer(i).",
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
        layouts = (
            layer.layouts
            if isinstance(layer, LayerState)
            else tuple(v.type.layout for v in self._states if isinstance(v.type, StateType))
        )
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
        return states[0].shape[0] if states else 0

    def _check_batch(self, tensors: Sequence[Tensor], seq: Seq, slots: int) -> None:
        """What may change while the signature stays: token counts, and slots that the host knows."""
        for value, x in zip(self._tensors, tensors, strict=True):
            if x.shape[0] != seq.num_tokens:
                raise ShapeError(
                    self._where, value.name, expected=f"{seq.num_tokens} tokens, like seq", got=str(x.shape[0])
                )
        if self._states and seq.max_slot is not None and seq.max_slot >= slots:
            raise SeqError(
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


def _with_prepared(run: Callable[..., Any], lowering: Lowering, seq_at: int) -> Callable[..., Any]:
    def prepared_run(*operands: Any) -> Any:
        return run(*operands, prepared=prepared(lowering, operands[seq_at]))

    return prepared_run
