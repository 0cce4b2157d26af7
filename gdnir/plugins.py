"""Other packages' ops, lowerings and platforms, loaded from entry points, and only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from gdnir.errors import RegistryError, closest

GROUPS = ("gdnir.lowerings", "gdnir.platforms")
_loaded: dict[str, str] = {}


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: its name, the distribution and version it comes from, and whether it was loaded."""

    name: str
    group: str
    distribution: str
    version: str
    loaded: bool


def _found() -> dict[str, list[EntryPoint]]:
    table: dict[str, list[EntryPoint]] = {}
    for group in GROUPS:
        for point in entry_points(group=group):
            table.setdefault(point.name, []).append(point)
    return table


def installed() -> list[Plugin]:
    """Every plugin that is installed; nothing is imported to find out."""
    return [
        Plugin(p.name, p.group, p.dist.name if p.dist else "?", p.dist.version if p.dist else "?", p.name in _loaded)
        for points in _found().values()
        for p in points
    ]


def load_plugins(names: Sequence[str]) -> None:
    """Import these plugins; importing them registers what they bring. Loading twice does nothing.

    Raises RegistryError for a name that no installed package offers, or whose import fails.
    """
    if isinstance(names, str):
        raise RegistryError(f'load_plugins takes a list of names, got the string {names!r}. Write ["{names}"].')
    found = _found()
    for name in names:
        if name not in found:
            raise RegistryError(
                f"no installed package offers plugin `{name}` (groups {', '.join(GROUPS)}). {closest(name, found)}"
            )
    for name in names:
        for point in found[name]:
            if name not in _loaded:
                try:
                    point.load()
                except RegistryError:
                    raise
                except Exception as error:
                    raise RegistryError(f"plugin `{name}` ({point.value}) failed to load: {error!r}.") from error
        _loaded[name] = found[name][0].value
