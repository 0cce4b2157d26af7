"""State pools: the recurrent states of all GDN layers, in slots that sequences are given and give back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gdnir.errors import DTypeError, LayoutError, PoolError, ShapeError

CONV_LAYOUTS = ("cw", "wc")
STATE_LAYOUTS = ("vk", "kv")


class Sizes(Protocol):
    """What a pool needs to know of a model; `gdnir.models.GdnConfig` has it."""

    @property
    def heads(self) -> tuple[int, int, int, int]: ...
    @property
    def channels(self) -> int: ...
    @property
    def conv_width(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...]: ...


_SIGNATURES: dict[Any, int] = {}


@dataclass(frozen=True)
class LayerState:
    """One layer's states, as a plan takes them: conv [S, C, P] or [S, P, C], ssm [S, HV, V, K] or [S, HV, K, V].

    `signature` is a number that layers alike in dtypes, shapes, strides, devices and layouts share: a plan checks
    it instead of the tensors, which therefore keep these as long as the layer is in use.
    """

    conv: Tensor
    ssm: Tensor
    layouts: tuple[str, str] = ("cw", "vk")
    null_slot: int = -1
    signature: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        facts = (*((x.dtype, x.shape, x.stride(), x.device) for x in self), self.layouts, self.null_slot)
        object.__setattr__(self, "signature", _SIGNATURES.setdefault(facts, len(_SIGNATURES)))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.conv, self.ssm))


class StatePool:
    """The states of every GDN layer of a model, `slots` of each, on one device.

    `StatePool(config, slots=8)` owns its tensors and hands out slots; `StatePool.wrap(...)` serves tensors that
    somebody else owns, in place, without a copy. `pool.layer(i)` takes the model's own layer index.
    """

    def __init__(
        self,
        config: Sizes,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        conv_dtype: torch.dtype = torch.bfloat16,
        layout: str = "vk",
        conv_layout: str = "cw",
        conv_width: int | None = None,
        layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`dtype` f32 or bf16 holds the recurrent state, `conv_dtype` the last inputs (the activations' dtype).

        `conv_width` is P, at least W-1 (the default). `layers` limits the pool to some of the model's GDN
        layers. Raises PoolError, LayoutError, DTypeError.
        """
        if type(slots) is not int or slots < 1:
            raise PoolError("StatePool", "slots", expected="a positive integer", got=repr(slots))
        if dtype not in (torch.float32, torch.bfloat16):
            raise DTypeError("StatePool", "dtype", expected="torch.float32 or torch.bfloat16", got=str(dtype))
        if conv_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DTypeError(
                "StatePool",
                "conv_dtype",
                expected="torch.bfloat16, torch.float16 or torch.float32",
                got=str(conv_dtype),
            )
        layouts = _layouts("StatePool", (conv_layout, layout))
        p = config.conv_width - 1 if conv_width is None else conv_width
        if type(p) is not int or p < config.conv_width - 1:
            raise PoolError(
                "StatePool", "conv_width", expected=f"at least W - 1 = {config.conv_width - 1}", got=repr(p)
            )
        chosen = config.layers if layers is None else tuple(layers)
        for i in chosen:
            if i not in config.layers:
                raise PoolError(
                    "StatePool",
                    "layers",
                    expected="GDN layers of the model",
                    got=str(i),
                    hint="Its other layers are full attention.",
                )
        _, hv, k, v = config.heads
        conv_shape = (slots, config.channels, p) if conv_layout == "cw" else (slots, p, config.channels)
        ssm_shape = (slots, hv, v, k) if layout == "vk" else (slots, hv, k, v)
        self._layers = {
            i: LayerState(
                torch.zeros(conv_shape, dtype=conv_dtype, device=device),
                torch.zeros(ssm_shape, dtype=dtype, device=device),
                layouts,
            )
            for i in chosen
        }
        self.slots = slots
        self._free: list[int] | None = list(range(slots - 1, -1, -1))
        self._taken: set[int] = set()

    @classmethod
    def wrap(
        cls,
        conv: Tensor | Sequence[Tensor] | Mapping[int, Tensor],
        ssm: Tensor | Sequence[Tensor] | Mapping[int, Tensor],
        layouts: tuple[str, str] = ("cw", "vk"),
        null_slot: int = -1,
    ) -> StatePool:
        """A pool over a caller's tensors (an engine's paged cache, a transformers cache), any strides, in place.

        One tensor each for one layer, a list for layers 0, 1, ..., or a mapping by layer index. `layouts` is
        (conv order, state layout): "cw" or "wc", "vk" or "kv". `null_slot` is the caller's slot that means
        padding (vLLM: 0). The caller keeps allocating. Raises PoolError, LayoutError, ShapeError, DTypeError.
        """
        convs, ssms = _by_layer("conv", conv), _by_layer("ssm", ssm)
        if set(convs) != set(ssms):
            raise PoolError(
                "StatePool.wrap", "ssm", expected=f"the layers of conv, {sorted(convs)}", got=str(sorted(ssms))
            )
        layouts = _layouts("StatePool.wrap", layouts)
        counts = set()
        for i, c in convs.items():
            s = ssms[i]
            for name, tensor, rank in (("conv", c, 3), ("ssm", s, 4)):
                if tensor.dim() != rank:
                    raise ShapeError(
                        "StatePool.wrap",
                        f"{name}[{i}]",
                        expected=f"{rank} dimensions, slots first",
                        got=str(list(tensor.shape)),
                    )
            if c.device != s.device:
                raise PoolError(
                    "StatePool.wrap", f"ssm[{i}]", expected=f"device {c.device}, like conv", got=str(s.device)
                )
            counts |= {c.shape[0], s.shape[0]}
        if len(counts) != 1:
            raise ShapeError(
                "StatePool.wrap", "conv, ssm", expected="as many slots in every tensor", got=str(sorted(counts))
            )
        pool = cls.__new__(cls)
        pool._layers = {i: LayerState(c, ssms[i], layouts, null_slot) for i, c in convs.items()}
        pool.slots = counts.pop()
        pool._free, pool._taken = None, set()
        return pool

    def layer(self, index: int) -> LayerState:
        """The states of one layer, by the model's own layer index; PoolError if it has none here."""
        if index not in self._layers:
            raise PoolError(
                "StatePool.layer",
                "index",
                expected=f"one of {sorted(self._layers)}",
                got=repr(index),
                hint="Layers count as in the model; full-attention layers have no state here.",
            )
        return self._layers[index]

    def allocate(self, count: int = 1) -> list[int]:
        """`count` free slots, their states reset to zero in every layer. Raises PoolError if there are too few."""
        free = self._owned("allocate")
        if type(count) is not int or count < 0:
            raise PoolError("StatePool.allocate", "count", expected="an integer of at least 0", got=repr(count))
        if count > len(free):
            raise PoolError(
                "StatePool.allocate",
                "count",
                expected=f"at most {len(free)} free slots",
                got=str(count),
                hint="Free the slots of finished sequences, or make a larger pool.",
            )
        slots = [free.pop() for _ in range(count)]
        self._taken.update(slots)
        self.reset(slots)
        return slots

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back. Raises PoolError, without changing anything, for a slot that is not allocated."""
        free = self._owned("free")
        for slot in slots:
            if slot not in self._taken or list(slots).count(slot) > 1:
                raise PoolError("StatePool.free", "slots", expected="allocated slots, each once", got=repr(slot))
        self._taken.difference_update(slots)
        free.extend(slots)

    def reset(self, slots: Sequence[int]) -> None:
        """Zero these slots in every layer (bits too: what lay there may be NaN)."""
        for slot in slots:
            if type(slot) is not int or not 0 <= slot < self.slots:
                raise PoolError(
                    "StatePool.reset", "slots", expected=f"slots from 0 to {self.slots - 1}", got=repr(slot)
                )
        for state in self._layers.values():
            for tensor in state:
                for slot in slots:
                    tensor[slot].zero_()

    @property
    def free_slots(self) -> int:
        """How many slots `allocate` can still give."""
        return len(self._owned("free_slots"))

    def _owned(self, what: str) -> list[int]:
        if self._free is None:
            raise PoolError(
                f"StatePool.{what}",
                "pool",
                expected="a pool that owns its slots",
                got="a wrapped one",
                hint="The owner of wrapped tensors allocates their slots.",
            )
        return self._free


def _layouts(op: str, layouts: Any) -> tuple[str, str]:
    if (
        not isinstance(layouts, tuple)
        or len(layouts) != 2
        or layouts[0] not in CONV_LAYOUTS
        or layouts[1] not in STATE_LAYOUTS
    ):
        raise LayoutError(
            op,
            "layouts",
            expected='("cw" or "wc", "vk" or "kv")',
            got=repr(layouts),
            hint="A layout is stated, never guessed.",
        )
    return layouts


def _by_layer(name: str, given: Any) -> dict[int, Tensor]:
    if isinstance(given, Tensor):
        given = [given]
    table = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    for i, tensor in table.items():
        if not isinstance(tensor, Tensor):
            raise PoolError("StatePool.wrap", f"{name}[{i}]", expected="a tensor", got=type(tensor).__name__)
    return table
