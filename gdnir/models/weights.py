"""Weights of one GDN layer: from safetensors, or random ones of the right kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gdnir.errors import WeightsError
from gdnir.models.config import config as read_config
from gdnir.models.config import family
from gdnir.models.family import GdnConfig, WeightSpec
from gdnir.weights import Weights

CONV_PARTS = ("q_conv1d", "k_conv1d", "v_conv1d")


def load_weights(
    folder: str | Path, layer: int = 0, *, config: GdnConfig | None = None, device: torch.device | str = "cpu"
) -> Weights:
    """The weights of one GDN layer of a checkpoint folder, by the model's own layer index.

    Reads safetensors files only (one file, or shards with an index) and only the tensors it needs, in the
    dtype they are stored in. Raises WeightsError for a layer that is no GDN layer, a missing tensor, or a
    shape that is not the config's; ConfigError for the config.json.
    """
    from safetensors import safe_open

    folder = Path(folder)
    config = config or read_config(folder)
    if layer not in config.layers:
        raise WeightsError(
            "load_weights",
            "layer",
            expected=f"a GDN layer ({_ranges(config.layers)})",
            got=str(layer),
            hint="Other layers of this model are full attention.",
        )
    where = _index(folder)
    tensors: dict[str, Tensor] = {}
    tail = f"layers.{layer}.linear_attn."

    def read(name: str) -> tuple[str, Tensor] | None:
        key = next((k for k in where if k.endswith(tail + name)), None)
        if key is None:
            return None
        try:
            with safe_open(where[key], framework="pt", device=str(device)) as file:
                tensor: Tensor = file.get_tensor(key)
        except Exception as error:  # safetensors raises its own types; the file is the user's
            raise WeightsError(
                "load_weights", key, expected="a readable safetensors file", got=f"{where[key].name}: {error}"
            ) from error
        return key, tensor.squeeze(1) if tensor.dim() == 3 else tensor  # conv1d.weight is stored [C, 1, W]

    for spec in family(config).specs(config):
        found = _conv_part(read, spec, config) if spec.name in CONV_PARTS else read(spec.checkpoint_key)
        if found is None:
            near = sorted(key for key in where if tail in key)
            raise WeightsError(
                "load_weights",
                spec.name,
                expected=f"...{tail}{spec.checkpoint_key}",
                got="no such tensor",
                hint=f"This layer has: {', '.join(near) or 'nothing'}.",
            )
        key, tensor = found
        if tuple(tensor.shape) != spec.shape or not tensor.is_floating_point():
            raise WeightsError(
                "load_weights",
                key,
                expected=f"floating-point {list(spec.shape)}",
                got=f"{tensor.dtype} {list(tensor.shape)}",
                hint="Does this config.json belong to this checkpoint? Quantised weights are not read.",
            )
        tensors[spec.name] = tensor
    return Weights(tensors, source=f"{folder.name}, layer {layer}")


def _index(folder: Path) -> dict[str, Path]:
    """Where each tensor of the checkpoint lies."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(key): folder / Path(str(file)).name for key, file in table.items()}
        found: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
    except Exception as error:
        raise WeightsError("load_weights", str(folder), expected="safetensors files", got=str(error)) from error
    if not found:
        raise WeightsError(
            "load_weights",
            str(folder),
            expected="*.safetensors",
            got="none",
            hint="Pickled checkpoints are never read.",
        )
    return found


def _conv_part(
    read: Callable[[str], tuple[str, Tensor] | None], spec: WeightSpec, config: GdnConfig
) -> tuple[str, Tensor] | None:
    """The rows of q, k or v in a convolution that a checkpoint holds in one piece or in three.

    transformers joins the three when it loads, and cuts them into thirds when it saves, whatever q, k and v
    measure; joined again they are right either way.
    """
    pieces = [read("conv1d.weight")] if read("conv1d.weight") else [read(f"{name}.weight") for name in CONV_PARTS]
    given = [piece for piece in pieces if piece is not None]
    if not given or len(given) != len(pieces):
        return None
    h, hv, k, v = config.heads
    start = sum((h * k, h * k, hv * v)[: CONV_PARTS.index(spec.name)])
    return given[0][0], torch.cat([tensor for _, tensor in given])[start : start + spec.shape[0]]


def _ranges(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")


def random_weights(
    config: GdnConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Weights:
    """Weights drawn like the models' initialisation: matrices ~ N(0, 1/fan_in), A in (0, 16), dt in (1e-3, 0.1).

    The same seed gives the same weights on every machine (they are drawn on the CPU in f32).
    """
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for spec in family(config).specs(config):
        if spec.name == "A_log":
            drawn = torch.empty(spec.shape).uniform_(1e-2, 16, generator=random).log()
        elif spec.name == "dt_bias":
            dt = torch.exp(torch.empty(spec.shape).uniform_(math.log(1e-3), math.log(0.1), generator=random))
            drawn = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        elif len(spec.shape) == 1:
            drawn = 1 + 0.1 * torch.randn(spec.shape, generator=random)
        else:
            drawn = torch.randn(spec.shape, generator=random) * spec.shape[1] ** -0.5
        tensors[spec.name] = drawn.to(device=device, dtype=torch.float32 if spec.f32 else dtype)
    return Weights(tensors, source=f"random_weights({config.name!r}, seed={seed})")
