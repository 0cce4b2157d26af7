"""Block sizes by kind of GPU, as data: `tables/NAME.json` holds them, the launcher's code says what they may be.

A file maps kinds of GPU to sections of choices. `default` has every section; another kind (`sm_90`, `gfx942`, or a group,
below) those in which it differs, each as a whole. It can only pick among the launcher's options: it holds no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gdnir.errors import TableError, closest

FOLDER = Path(__file__).parent / "tables"
_KIND = re.compile(r"default|hip|sm_\d{2,3}|gfx[0-9a-f]{3,4}")
Section: TypeAlias = dict[str, dict[str, Any]]  # choices by kind of GPU


def load(path: str | Path, schema: Mapping[str, Mapping[str, Collection[Any]]]) -> dict[str, Section]:
    """The sections of a file (a bare name: one of the package's), each with every kind that the file names.

    `schema` gives the options of every choice of every section. Raises TableError for text that is no such table: an
    unknown kind, section or choice, a missing one, or a value that is not among the options.
    """
    path = FOLDER / f"{path}.json" if isinstance(path, str) else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError) as error:
        raise TableError(f"{path.name}: cannot be read as JSON, {error}. Restore the file of the package.") from error
    if not isinstance(found, dict) or "default" not in found:
        raise TableError(f"{path.name}: expected kinds of GPU with `default` among them. Add `default`.")
    for kind, sections in found.items():
        if not _KIND.fullmatch(kind):
            raise TableError(f"{path.name}: `{kind}` is no kind of GPU. Write default, hip, sm_NN or gfxNNN.")
        _check_names(f"{path.name}: {kind}", sections, schema, exact=kind == "default")
        for name, choices in sections.items():
            where = f"{path.name}: {kind}.{name}"
            _check_names(where, choices, schema[name], exact=True)
            for key, value in choices.items():
                # Types must agree too: true is no number, 4.0 no integer.
                if not any(type(value) is type(option) and value == option for option in schema[name][key]):
                    options = ", ".join(map(json.dumps, schema[name][key]))
                    raise TableError(f"{where}.{key} is {json.dumps(value)}. Choose one of {options}.")
    return {name: {kind: found[kind].get(name, found["default"][name]) for kind in found} for name in schema}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a name comes twice among {[name for name, _ in pairs]}")
    return found


def _check_names(where: str, got: Any, want: Collection[str], *, exact: bool) -> None:
    if not isinstance(got, dict):
        raise TableError(f"{where} is {json.dumps(got)}. Write an object with {', '.join(want)}.")
    for name in got:
        if name not in want:
            raise TableError(f"{where}: unknown name `{name}`. {closest(name, want)}")
    if exact and (missing := [name for name in want if name not in got]):
        raise TableError(f"{where}: {', '.join(missing)} missing. Add what is missing; nothing is filled in.")


def pick(section: Section, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The section's choices for a GPU of these `kinds`: of its own kind, else of the group it belongs to, else the default."""
    return next(section[kind] for kind in (*kinds, "default") if kind in section)


_known: dict[torch.device, tuple[str, ...]] = {}


def kinds(device: torch.device) -> tuple[str, ...]:
    """The names that a table may have for this GPU, closest first; on the CPU, of what Triton interprets or compiles for."""
    return _known.get(device) or _of(device)


def _of(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return _active()
    with torch.get_device_module(device).device(device):
        return _known.setdefault(device, _active())


def _active() -> tuple[str, ...]:
    import triton

    if triton.knobs.runtime.interpret:
        return ("sm_90",)
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return str(target.arch), target.backend
    arch = int(target.arch)
    # sm_86 stands for all with 99 KB of shared memory.
    group = 86 if arch in (86, 89) or arch >= 120 else 100 if arch >= 100 else 90 if arch >= 90 else 80
    return f"sm_{arch}", f"sm_{group}"
