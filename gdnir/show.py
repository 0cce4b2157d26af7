"""A graph for other programs and for people's eyes: JSON, DOT, Mermaid and SVG.

The JSON (`schema` 1) is strict and holds the whole graph, so that a program need not read IR text:

    {"schema": 1, "gdnir": version, "platform": name or null, "name": ...,
     "inputs": [value], "weights": [value], "nodes": [node], "outputs": ["%out", ...],
     "choices": [{"node": index, "op", "provider", "reason", "refusals": [{"provider", "reason"}]}],
     "notes": [{"pass", "note"}]}
    value = {"name": "%x", "type": type}
    type  = {"kind": "tensor", "dtype", "shape", "text"} | {"kind": "state", ..., "layout"} | {"kind": "seq", "phase", "tokens", "text"}
    node  = {"op", "provider" (null before lowering), "folded", "operands": ["%x", "@w", null, ...], "results": [value], "attrs": {...}}

A dimension is a number or a symbol's name. Numbers that JSON does not have are {"float": "inf"}, {"float": "-inf"}
and {"float": "nan"}; an attribute is never an object otherwise. `platform` is null for a graph that is not lowered.

Names may be any string. In DOT and Mermaid they appear in labels only, escaped; vertices have names of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from gdnir.errors import GdnirError
from gdnir.ir import Attr, Graph, Node, SeqType, StateType, Type, Value, attr_text, quote
from gdnir.lowering import NATIVE
from gdnir.passes import Lowered

SCHEMA = 1
LONGEST = 72
"""Characters of one line of a label; the rest of a longer one is cut (the JSON and the text hold everything)."""
PALETTE = ("#cfe8cf", "#cfe0f5", "#f5e0c0", "#ead0ea", "#f5cfcf", "#d0eaea")
"""Fill colours of providers other than native, in order of appearance; native is white, folded work grey."""


def to_json(graph: Graph | Lowered) -> dict[str, Any]:
    """The graph as plain dicts and lists, ready for `json.dumps(..., allow_nan=False)`; see the module for the schema."""
    from gdnir import __version__

    lowered = graph if isinstance(graph, Lowered) else None
    plain = graph.graph if isinstance(graph, Lowered) else graph
    choices = lowered.choices if lowered else ()
    return {
        "schema": SCHEMA,
        "gdnir": __version__,
        "platform": lowered.platform.name if lowered else None,
        "name": plain.name,
        "inputs": [_value(v) for v in plain.inputs],
        "weights": [_value(v) for v in plain.weights],
        "nodes": [_node(n) for n in plain.nodes],
        "outputs": [str(v) for v in plain.outputs],
        "choices": [
            {
                "node": index,
                "op": c.op,
                "provider": c.provider,
                "reason": c.reason,
                "refusals": [{"provider": r.provider, "reason": r.reason} for r in c.refusals],
            }
            for index, c in enumerate(choices)
        ],
        "notes": [{"pass": name, "note": note} for name, note in (lowered.notes if lowered else ())],
    }


def _value(value: Value) -> dict[str, Any]:
    return {"name": str(value), "type": _type(value.type)}


def _type(type_: Type) -> dict[str, Any]:
    if isinstance(type_, SeqType):
        return {"kind": "seq", "phase": type_.phase, "tokens": type_.tokens, "text": str(type_)}
    shaped = {"dtype": type_.dtype, "shape": list(type_.shape), "text": str(type_)}
    if isinstance(type_, StateType):
        return {"kind": "state", "layout": type_.layout, **shaped}
    return {"kind": "tensor", **shaped}


def _node(node: Node) -> dict[str, Any]:
    return {
        "op": node.op,
        "provider": node.provider,
        "folded": node.folded,
        "operands": [None if v is None else str(v) for v in node.operands],
        "results": [_value(v) for v in node.results],
        "attrs": {name: _attr(value) for name, value in node.attrs},
    }


def _attr(value: Attr) -> Any:
    if isinstance(value, tuple):
        return [_attr(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": attr_text(value)}
    return value


# ---- drawings ----


def to_dot(graph: Graph | Lowered) -> str:
    """The graph in Graphviz's language: `dot -Tsvg`. States are thick edges, the batch a dotted one."""
    plain, title = _titled(graph)
    colour = _colours(plain)
    label = _label(_dot_escape, "\\n")
    lines = [
        "digraph gdnir {",
        f'  graph [rankdir=TB, labelloc=t, fontname="Helvetica", label="{label([title])}"]',
        '  node [shape=box, style="filled,rounded", fillcolor=white, fontname="Helvetica", fontsize=11]',
        '  edge [fontname="Helvetica", fontsize=9, color="#555555"]',
    ]
    for name, kind, text, provider in _vertices(plain):
        style = {"input": ', shape=ellipse, fillcolor="#eeeeee"', "return": ', shape=ellipse, fillcolor="#eeeeee"'}
        extra = style.get(
            kind,
            f', fillcolor="{colour[provider]}"'
            if kind == "node"
            else ', shape=note, style=filled, fillcolor="#f7f7e8"',
        )
        lines.append(f'  {name} [label="{label(text)}"{extra}]')
    for source, target, value in _edges(plain):
        look = f'label="{label([str(value), str(value.type)])}"' if not value.weight else 'color="#aaaaaa"'
        if isinstance(value.type, StateType):
            look += ", penwidth=2.5"
        elif isinstance(value.type, SeqType):
            look = "style=dotted, arrowhead=none"
        lines.append(f"  {source} -> {target} [{look}]")
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(graph: Graph | Lowered) -> str:
    """The graph as a Mermaid flowchart, as GitHub renders it; states are thick arrows, the batch a dotted one."""
    plain, title = _titled(graph)
    colour = _colours(plain)
    label = _label(_mermaid_escape, "<br/>")
    lines = ["flowchart TD", f'  title["{label([title])}"]:::title']
    classes = {provider: f"p{i}" for i, provider in enumerate(colour)}
    for name, kind, text, provider in _vertices(plain):
        left, right = ('["', '"]') if kind in ("node", "weight") else ('(["', '"])')
        lines.append(f"  {name}{left}{label(text)}{right}:::{classes[provider] if kind == 'node' else 'data'}")
    for source, target, value in _edges(plain):
        text = label([str(value), str(value.type)])
        if isinstance(value.type, SeqType):
            lines.append(f"  {source} -.- {target}")
        elif isinstance(value.type, StateType):
            lines.append(f'  {source} == "{text}" ==> {target}')
        else:
            lines.append(f"  {source} --> {target}" if value.weight else f'  {source} -- "{text}" --> {target}')
    lines += [f"  classDef {classes[provider]} fill:{fill},stroke:#555,color:#111" for provider, fill in colour.items()]
    lines += ["  classDef data fill:#f7f7e8,stroke:#999,color:#111", "  classDef title fill:none,stroke:none"]
    return "\n".join(lines) + "\n"


def to_svg(graph: Graph | Lowered) -> str:
    """The DOT drawing as SVG text, laid out by Graphviz. Raises GdnirError that says what to install."""
    try:
        import pygraphviz
    except ImportError as error:
        raise GdnirError(
            f"svg: pygraphviz cannot be imported ({error}). `pip install 'gdnir[viz]'` brings it; without it, "
            "--format dot writes text that `dot -Tsvg` or an online viewer draws."
        ) from error
    try:
        drawn: bytes = pygraphviz.AGraph(string=to_dot(graph)).draw(format="svg", prog="dot")
    except (OSError, ValueError) as error:  # what pygraphviz raises where the program `dot` is missing or fails
        raise GdnirError(
            f"svg: Graphviz could not draw the graph ({error}). Install Graphviz, whose program `dot` must be "
            "on PATH (`apt install graphviz`, `brew install graphviz`), or use --format dot."
        ) from error
    return drawn.decode()


def _titled(graph: Graph | Lowered) -> tuple[Graph, str]:
    if isinstance(graph, Lowered):
        return graph.graph, f"{quote(graph.graph.name)} for {graph.platform}"
    return graph, quote(graph.name)


def _colours(graph: Graph) -> dict[str, str]:
    """Fill by `_vertices`' provider key."""
    providers = dict.fromkeys(n.provider for n in graph.nodes if n.provider not in (None, NATIVE) and not n.folded)
    return {"": "white", "fold": "#e4e4e4", **{f"@{p}": PALETTE[i % len(PALETTE)] for i, p in enumerate(providers)}}


def _vertices(graph: Graph) -> Iterator[tuple[str, str, list[str], str]]:
    """(id, kind, lines of the label, key of `_colours`) of every vertex; ids are ours, never the graph's names."""
    for i, value in enumerate(graph.inputs):
        yield f"i{i}", "input", [str(value), str(value.type)], ""
    for i, value in enumerate(graph.weights):
        yield f"w{i}", "weight", [str(value), str(value.type)], ""
    for i, node in enumerate(graph.nodes):
        provider = "" if node.provider is None else f"@{quote(node.provider)}"
        attrs = [f"{quote(name)}={attr_text(value)}" for name, value in node.attrs]
        key = "fold" if node.folded else "" if node.provider in (None, NATIVE) else f"@{node.provider}"
        yield f"n{i}", "node", [("fold " if node.folded else "") + quote(node.op) + provider, *attrs], key
    yield "ret", "return", ["return"], ""


def _edges(graph: Graph) -> Iterator[tuple[str, str, Value]]:
    source = {value: f"i{i}" for i, value in enumerate(graph.inputs)} | {
        value: f"w{i}" for i, value in enumerate(graph.weights)
    }
    for i, node in enumerate(graph.nodes):
        for operand in node.operands:
            if operand is not None and operand in source:
                yield source[operand], f"n{i}", operand
        source.update(dict.fromkeys(node.results, f"n{i}"))
    for output in graph.outputs:
        if output in source:
            yield source[output], "ret", output


def _label(escape: Callable[[str], str], newline: str) -> Callable[[list[str]], str]:
    def label(lines: list[str]) -> str:
        return newline.join(escape(line if len(line) <= LONGEST else line[: LONGEST - 3] + "...") for line in lines)

    return label


def _dot_escape(text: str) -> str:
    """Text inside a DOT string: no quote ends it, no backslash or entity means anything, no control character."""
    text = re.sub(r"[^\x20-\x7e]", lambda m: f"\\u{ord(m[0]):04x}", text)
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")


def _mermaid_escape(text: str) -> str:
    """Text inside a Mermaid label: everything that Mermaid, Markdown or HTML could read as markup is an entity.

    A `%` stays before a letter, for legible `%x`: comments and directives begin with two.
    """
    return re.sub(r"(?!%[A-Za-z_])[^A-Za-z0-9 .,:=+()\[\]/@_-]", lambda m: f"#{ord(m[0])};", text)
