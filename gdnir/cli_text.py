"""How commands write: text that other programs read stays as it is, what people read fits their terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.highlighter import RegexHighlighter
from rich.text import Text
from rich.theme import Theme

from gdnir.errors import GdnirError

UNBROKEN = 4096
"""Columns where output is no terminal: a sentence stays one line, for grep."""


class _IrHighlighter(RegexHighlighter):
    base_style = "ir."
    highlights = [
        r"(?P<value>[%@](?:[A-Za-z_][\w.]*|\"[^\"]*\"))",
        r"(?P<type>\b(?:bf16|f16|f32|f64|i32|i64|bool|state|seq)(?=[\[<]))",
        r"(?P<op>[A-Za-z_][\w.]*)(?P<provider>@[A-Za-z_][\w-]*)?(?=\()",
        r"(?P<key>^(?:gdnir \d+|graph)|^  (?:fold|return)\b|\bweights(?= \{))",
        r"(?P<comment>^\#.*)",
    ]


_THEME = Theme(
    {
        "ir.value": "cyan",
        "ir.type": "green",
        "ir.op": "bold",
        "ir.provider": "bold magenta",
        "ir.key": "blue",
        "ir.comment": "dim",
    }
)


def echo_ir(text: str, *, error: bool = False) -> None:
    """IR text, byte for byte; coloured on a terminal, where lines stay whole too."""
    stream = sys.stderr if error else sys.stdout
    if not stream.isatty():
        stream.write(text)
        return
    console = Console(file=stream, theme=_THEME, highlight=False)
    for line in text.splitlines():
        console.print(_IrHighlighter()(Text(line)), soft_wrap=True)


def write(text: str, output: Path | None) -> None:
    """Text into a file, or as it is on stdout."""
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GdnirError(f"{output}: cannot be written ({error.strerror}).") from error


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def show(*renderables: RenderableType) -> None:
    """Tables and lines for people: wrapped to a terminal; elsewhere nothing is wrapped, padded or coloured."""
    if sys.stdout.isatty():
        console = Console(highlight=False, markup=False, emoji=False)
        for item in renderables:
            console.print(item)
        return
    console = Console(file=sys.stdout, width=UNBROKEN, highlight=False, markup=False, emoji=False, color_system=None)
    with console.capture() as captured:
        for item in renderables:
            console.print(item)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().removesuffix("\n").split("\n")))
