"""Models with GDN layers: configs, weights, and the layer's graph."""

from gdnir.models.config import builtins, config, register_family
from gdnir.models.family import Family, GdnConfig, WeightSpec
from gdnir.models.gdn_layer import trace
from gdnir.models.weights import load_weights, random_weights

__all__ = [
    "Family",
    "GdnConfig",
    "WeightSpec",
    "builtins",
    "config",
    "load_weights",
    "random_weights",
    "register_family",
    "trace",
]
