"""The weights of one layer: named tensors that several plans share, and what binding made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from gdnir.errors import WeightsError, closest


class Weights(Mapping[str, Tensor]):
    """An immutable mapping from a weight's name in the graph to its tensor.

    Plans of the same layer that are given the same `Weights` share one prepacked copy: what binding computes
    (folded nodes, casts, moves to a device) is kept here by what was computed, so the second plan finds it.
    Load the checkpoint again to see changed values; tensors must not be modified in place.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str = "the caller") -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise WeightsError("Weights", name, expected="a tensor", got=type(tensor).__name__)
        self._tensors = dict(tensors)
        self._bound: dict[str, Tensor] = {}
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise WeightsError(
                "Weights",
                name,
                expected=f"a weight of {self.source}",
                got="no such name",
                hint=closest(name, self._tensors),
            )
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors from {self.source}: {', '.join(self)})"

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()` the first time this key is asked for; the same tensor for every later plan."""
        if key not in self._bound:
            self._bound[key] = make()
        return self._bound[key]
