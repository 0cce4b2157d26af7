"""What a model family says about its GDN layers: sizes, weights, and how its weights become the op's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gdnir.errors import ConfigError


@dataclass(frozen=True)
class GdnConfig:
    """The GDN layers of one model, and nothing else of it.

    Sizes are those of the shape letters: hidden size D, `heads` = (H, HV, K, V), conv width W. `layers` are the
    model's own indices of its GDN layers. `source` says where the numbers come from.
    """

    name: str
    family: str
    hidden_size: int
    heads: tuple[int, int, int, int]
    conv_width: int
    num_layers: int
    layers: tuple[int, ...]
    eps: float
    activation: Literal["silu", "none"]
    gate: Literal["silu", "sigmoid"]
    allow_neg_eigval: bool
    source: str

    @property
    def channels(self) -> int:
        """C, the channels of the convolution: 2*H*K + HV*V."""
        h, hv, k, v = self.heads
        return 2 * h * k + hv * v


@dataclass(frozen=True)
class WeightSpec:
    """One weight as the graph declares it: shape, whether it stays f32, and its tensor's name in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    f32: bool = False
    key: str = ""

    @property
    def checkpoint_key(self) -> str:
        return self.key or f"{self.name}.weight"


@dataclass(frozen=True)
class Family:
    """`specs(config)` lists the weights; `flat(config, w)` calls weight ops on traced weights and returns
    (w_qkvz, w_ba, conv weight, norm weight, out weight) as the ops want them."""

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], GdnConfig]
    specs: Callable[[GdnConfig], tuple[WeightSpec, ...]]
    flat: Callable[[GdnConfig, Mapping[str, Any]], tuple[Any, Any, Any, Any, Any]]
    builtins: Mapping[str, tuple[Mapping[str, Any], str]]
    """Built-in name -> (its config.json fields, where they were read)."""


def integer(config: Mapping[str, Any], name: str, source: str, default: int | None = None) -> int:
    """A positive integer field of a config.json; ConfigError if it is missing or something else."""
    value = config.get(name, default)
    if type(value) is not int or value <= 0:
        raise ConfigError(
            source, name, expected="a positive integer", got=repr(value), hint="Is this the config.json of a GDN model?"
        )
    return value


def number(config: Mapping[str, Any], name: str, source: str, default: float) -> float:
    """A positive number."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(source, name, expected="a positive number", got=repr(value))
    return float(value)


def silu(config: Mapping[str, Any], name: str, source: str) -> Literal["silu"]:
    """The convolution's activation; configs write silu as `silu` or `swish`."""
    value = config.get(name, "silu")
    if value not in ("silu", "swish"):
        raise ConfigError(source, name, expected="silu (or swish, its other name)", got=repr(value))
    return "silu"


def gdn_layers(config: Mapping[str, Any], source: str, num_layers: int) -> tuple[int, ...]:
    """Indices of the linear-attention layers: from `layer_types`, else every layer but each fourth."""
    types = config.get("layer_types")
    if types is None:
        interval = integer(config, "full_attention_interval", source, 4)
        return tuple(i for i in range(num_layers) if (i + 1) % interval)
    if not isinstance(types, list) or len(types) != num_layers:
        raise ConfigError(source, "layer_types", expected=f"{num_layers} names", got=repr(types)[:80])
    layers = tuple(i for i, t in enumerate(types) if t == "linear_attention")
    if not layers:
        raise ConfigError(source, "layer_types", expected="at least one linear_attention layer", got="none")
    return layers


def read_qwen(family: str, default_eps: float = 1e-6) -> Callable[[Mapping[str, Any], str], GdnConfig]:
    """The reader of the Qwen families, whose config.json fields are the same."""

    def read(config: Mapping[str, Any], source: str) -> GdnConfig:
        num_layers = integer(config, "num_hidden_layers", source)
        heads = tuple(
            integer(config, f"linear_{name}", source)
            for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        )
        return make_config(
            family, config, source, heads, num_layers, number(config, "rms_norm_eps", source, default_eps), False
        )

    return read


def make_config(
    family: str, config: Mapping[str, Any], source: str, heads: tuple[int, ...], num_layers: int, eps: float, neg: bool
) -> GdnConfig:
    """A GdnConfig from checked fields; ConfigError if the head counts do not divide."""
    h, hv, k, v = heads
    if hv % h:
        raise ConfigError(
            source, "linear_num_value_heads", expected=f"a multiple of linear_num_key_heads = {h}", got=str(hv)
        )
    return GdnConfig(
        name=str(config.get("_name_or_path") or config.get("model_type") or family), family=family,
        hidden_size=integer(config, "hidden_size", source), heads=(h, hv, k, v),
        conv_width=integer(config, "linear_conv_kernel_dim", source, 4), num_layers=num_layers,
        layers=gdn_layers(config, source, num_layers), eps=eps, activation=silu(config, "hidden_act", source), gate="silu",
        allow_neg_eigval=neg, source=source,
    )  # fmt: skip
