"""From a name, a config.json or a checkpoint folder to a GdnConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdnir.errors import ConfigError, closest
from gdnir.models.family import Family, GdnConfig
from gdnir.models.olmo_hybrid import OLMO_HYBRID
from gdnir.models.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from gdnir.models.qwen3_next import QWEN3_NEXT

FAMILIES: dict[str, Family] = {f.name: f for f in (QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, OLMO_HYBRID)}
ALIASES = {
    "qwen3-next": "qwen3-next-80b-a3b",
    "qwen3.5": "qwen3.5-9b",
    "qwen3.5-moe": "qwen3.5-35b-a3b",
    "olmo-hybrid": "olmo-hybrid-7b",
}


def register_family(family: Family) -> Family:
    """Make a model family known; ConfigError if its name or one of its model types is taken."""
    for known in FAMILIES.values():
        if known is not family and (known.name == family.name or set(known.model_types) & set(family.model_types)):
            raise ConfigError(
                "register_family",
                family.name,
                expected="a name and model types of its own",
                got=f"those of {known.name}",
            )
    FAMILIES[family.name] = family
    return family


def family(config: GdnConfig) -> Family:
    """The family of a config."""
    if config.family not in FAMILIES:
        raise ConfigError(
            "family",
            config.family,
            expected="a registered family",
            got="an unknown one",
            hint=closest(config.family, FAMILIES),
        )
    return FAMILIES[config.family]


def builtins() -> dict[str, GdnConfig]:
    """Every built-in model."""
    return {
        name: dataclasses.replace(f.read(dict(fields), source), name=name)
        for f in FAMILIES.values()
        for name, (fields, source) in f.builtins.items()
    }


def config(source: str | Path | Mapping[str, Any]) -> GdnConfig:
    """The GDN layers of a model: a built-in name or alias, a Hugging Face config.json, a checkpoint folder, or
    the fields of a config.json as a mapping. Raises ConfigError; nothing is downloaded and no code is run.
    """
    if isinstance(source, Mapping):
        return _from_fields(source, "config")
    text = str(source)
    known = builtins()
    if ALIASES.get(text.lower(), text.lower()) in known:
        return known[ALIASES.get(text.lower(), text.lower())]
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            "config",
            text,
            expected="a built-in model, a config.json or a checkpoint folder",
            got="neither",
            hint=closest(text, [*known, *ALIASES]),
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError("config", str(path), expected="JSON", got=str(error)) from None
    if not isinstance(fields, dict):
        raise ConfigError("config", str(path), expected="a JSON object", got=type(fields).__name__)
    named = _from_fields(fields, str(path))
    return dataclasses.replace(named, name=path.parent.name or named.name)


def _from_fields(fields: Mapping[str, Any], source: str) -> GdnConfig:
    inner = fields.get("text_config")
    fields = inner if isinstance(inner, Mapping) else fields
    kind = fields.get("model_type")
    types = {t: f for f in FAMILIES.values() for t in f.model_types}
    if kind not in types:
        raise ConfigError(
            source, "model_type", expected="a model with GDN layers", got=repr(kind), hint=closest(str(kind), types)
        )
    return types[kind].read(fields, source)
