"""A graph as other tools want it: JSON, DOT, mermaid, SVG. Names are data here, never markup."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from gdnir.errors import GdnirError
from gdnir.ir import Attr, Graph, Node, Value
from gdnir.passes import Lowered

SCHEMA = 1
"""Version of the JSON form; it grows when a field changes its meaning."""


def to_json(lowered: Lowered, version: str) -> str:
    """The graph and its choices as strict JSON. Attributes JSON cannot hold (inf, nan) are {"float": "inf"}."""
    graph = lowered.graph
    choices: list[Any] = [
        {
            "op": c.op,
            "provider": c.provider,
            "reason": c.reason,
            "refusals": [{"provider": r.provider, "reason": r.reason} for r in c.refusals],
        }
        for c in lowered.choices
    ]
    nodes = [
        {
            "op": n.op,
            "provider": n.provider,
            "folded": n.folded,
            "operands": [None if v is None else str(v) for v in n.operands],
            "results": [_value(v) for v in n.results],
            "attrs": {name: _attr(value) for name, value in n.attrs},
        }
        for n in graph.nodes
    ]
    document = {
        "schema": SCHEMA,
        "gdnir": version,
        "platform": str(lowered.platform),
        "graph": {
            "name": graph.name,
            "inputs": [_value(v) for v in graph.inputs],
            "weights": [_value(v) for v in graph.weights],
            "nodes": nodes,
            "outputs": [str(v) for v in graph.outputs],
        },
        "choices": choices,
        "notes": [{"pass": name, "note": note} for name, note in lowered.notes],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _value(value: Value) -> dict[str, str]:
    return {"name": str(value), "type": str(value.type)}


def _attr(value: Attr) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return [_attr(v) for v in value] if isinstance(value, tuple) else value


def _label(node: Node) -> str:
    return node.op + (f" @{node.provider}" if node.provider else "")


def _edges(graph: Graph) -> list[tuple[str, str, Value]]:
    """(from, to, value): vertices are `i0` (inputs), `w0` (weights), `n0` (nodes) and `return`."""
    source = {v: f"i{i}" for i, v in enumerate(graph.inputs)} | {v: f"w{i}" for i, v in enumerate(graph.weights)}
    edges = []
    for index, node in enumerate(graph.nodes):
        edges += [(source[v], f"n{index}", v) for v in node.operands if v is not None]
        source.update(dict.fromkeys(node.results, f"n{index}"))
    return edges + [(source[v], "return", v) for v in graph.outputs]


def _vertices(graph: Graph) -> list[tuple[str, str, str]]:
    """(id, label, kind)."""
    return [
        *((f"i{i}", v.typed(), "input") for i, v in enumerate(graph.inputs)),
        *((f"w{i}", v.typed(), "weight") for i, v in enumerate(graph.weights)),
        *((f"n{i}", _label(n), "fold" if n.folded else n.provider or "op") for i, n in enumerate(graph.nodes)),
        ("return", "return", "return"),
    ]


_FILL = {
    "input": "#e8f0fe",
    "weight": "#eeeeee",
    "fold": "#eeeeee",
    "return": "#e8f0fe",
    "native": "#fff4d6",
    "op": "#ffffff",
}
_OTHER = "#d9f2d9"  # any provider that is not native


def to_dot(graph: Graph) -> str:
    """Graphviz DOT: one box an op, its provider in the label, values on the edges."""

    def quoted(text: str) -> str:
        safe = "".join(c if c.isprintable() else " " for c in text)
        return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = [
        f"digraph {quoted(graph.name)} {{",
        '  rankdir=TB; node [shape=box, style="rounded,filled", fontname="Helvetica"];',
    ]
    for name, label, kind in _vertices(graph):
        lines.append(f'  {name} [label={quoted(label)}, fillcolor="{_FILL.get(kind, _OTHER)}"];')
    lines += [f"  {a} -> {b} [label={quoted(str(v))}, fontsize=10];" for a, b, v in _edges(graph)]
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(graph: Graph) -> str:
    """A mermaid flowchart, for documents that draw it themselves."""

    def quoted(text: str) -> str:
        # All that mermaid, Markdown or HTML could read as markup becomes an entity: `#60;` and `%%{init}%%` in a
        # name would be decoded, or obeyed. A `%` before a letter stays, for a legible `%x`.
        return '"' + re.sub(r"(?!%[A-Za-z_])[^A-Za-z0-9 .,:=+()\[\]/@_-]", lambda m: f"#{ord(m[0])};", text) + '"'

    lines = ["flowchart TD"]
    lines += [f"  {'ret' if name == 'return' else name}[{quoted(label)}]" for name, label, _ in _vertices(graph)]
    lines += [f"  {a} -->|{quoted(str(v))}| {'ret' if b == 'return' else b}" for a, b, v in _edges(graph)]
    return "\n".join(lines) + "\n"


def to_svg(graph: Graph) -> str:
    """An SVG drawn by Graphviz; GdnirError says what to install if it is missing."""
    try:
        import pygraphviz
    except ImportError:
        raise GdnirError(
            "SVG needs pygraphviz: install Graphviz with its headers (apt-get install graphviz libgraphviz-dev), "
            "then `pip install gdnir[viz]`. `--format dot` needs neither."
        ) from None
    try:
        drawn: bytes = pygraphviz.AGraph(string=to_dot(graph)).draw(format="svg", prog="dot")
    except (OSError, ValueError) as error:
        raise GdnirError(f"Graphviz could not draw the graph: {error}. Is `dot` on the PATH?") from error
    return drawn.decode()
