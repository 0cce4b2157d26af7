"""docs/performance.md and its figures from results/*.json: `python benchmarks/plots.py [--check] [--results FOLDER]`.

Every figure of the page comes from a results file; the page changes only when a file does. Drawing needs matplotlib,
the page does not. `--check` writes nothing and fails where the page differs from what it would write.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
# Okabe and Ito's colours, told apart by all; the published times of another run are grey.
COLOURS = {
    "gdnir": "#0072B2",
    "fla-core": "#E69F00",
    "FlashInfer": "#009E73",
    "bf16 state": "#56B4E9",
    "vLLM": "#999999",
}
TITLES = {
    "delta_rule": "The delta rule, prefill",
    "decode": "A step of decode",
    "conv": "Convolution, preparation, norm",
    "layer": "A whole layer",
}
WHAT = {
    "delta_rule": "`gated_delta_rule` alone; K = V = 128 but for OLMo (K 96, V 192, beta up to 2), bf16, f32 states. The floor is what "
    "the bytes or the products take at this run's ceilings, whichever is longer. Case: (key heads, value heads), tokens x sequences.",
    "decode": "`gdn_step`: convolution, gates, rule and norm of one token for each of B sequences, in one kernel.",
    "conv": "The kernels between the products, 8192 channels, beside what a copy of this run moves.",
    "layer": "Both products and all between them through a plan; Qwen3-Next's sizes, hidden 2048, 16 and 32 heads.",
}


def load(folder):
    """The documents of a folder and its subfolders (one a machine, say), by name, in the order of the page."""
    found = {}
    for path in sorted(Path(folder).rglob("*.json")):
        key = "-".join(path.relative_to(folder).with_suffix("").parts)
        found[key] = json.loads(path.read_text())
    kinds = list(TITLES)
    return dict(sorted(found.items(), key=lambda item: (kinds.index(kind(item[1])), item[0])))


def kind(document):
    """Which of the benchmarks wrote it: `delta_rule_gluon` is one of delta_rule."""
    return next(name for name in TITLES if document["name"].startswith(name))


def page(documents):
    """The text of docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Written by `benchmarks/plots.py` from `benchmarks/results/`; do not edit. Times are medians of CUDA-graph replays; for the H100 each",
        "was waited for, which adds 1 to 10 us of its host's. `fla-core` and `FlashInfer` were measured in the same run; columns that begin",
        "with H200 were published for that card, and ratios use them on that card only.",
    ]
    for key, document in documents.items():
        env = document["environment"]
        name = document["name"].removeprefix(kind(document)).strip("_")
        lines += ["", f"## {TITLES[kind(document)]}{f', {name}' if name else ''}, on {env['gpu']}", ""]
        lines += [WHAT[kind(document)], ""]
        if draws(document):
            lines += [f"![{TITLES[kind(document)]}](img/{key}.svg)", ""]
        lines += table(document["rows"])
        lines += ["", *(f"- {note}" for note in document["notes"])]
        lines += [f"- torch {env['torch']}, triton {env['triton']}, driver {env['driver']}, gdnir {env['gdnir']}"]
    return "\n".join(lines) + "\n"


def table(rows):
    """A Markdown table without the columns that are empty in every row."""
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    marks = [":---" if any(isinstance(row[key], str) for row in rows) else "---:" for key in keys]
    body = [[cell(row[key]) for key in keys] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (keys, marks, *body)]


def cell(value):
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def draws(document):
    """(groups, bars by name, axis, line, its label) of the document's figure; None if there is nothing to draw."""
    return {"delta_rule": _rule, "decode": _decode, "conv": _conv, "layer": _layer}[kind(document)](document)


def _rule(document):
    rows = document["rows"]
    names = {"gdnir": "ms", "fla-core": "fla-core ms", "FlashInfer": "flashinfer ms"}
    bars = {who: [row[key] and row["floor ms"] / row[key] for row in rows] for who, key in names.items()}
    return [row["case"].replace(" ", "\n") for row in rows], bars, "speed, of what the floor allows", 1, "floor"


def _decode(document):
    rows = [row for row in document["rows"] if row["phase"] == "decode"]
    batches = sorted({row["B"] for row in rows})
    by = {(row["state"], row["B"]): row for row in rows}

    def speeds(state, us):
        found = [by.get((state, batch)) for batch in batches]
        return [row and row[us] and row["state TB/s"] * row["us"] / row[us] for row in found]

    bars = {
        "gdnir": speeds("float32", "us"),
        "fla-core": speeds("float32", "fla-core us"),
        "bf16 state": speeds("bfloat16", "us"),
    }
    return [f"B = {b}" for b in batches], bars, "TB/s of the state, read and written", document["copy TB/s"], "copy"


def _conv(document):
    rows, copy = document["rows"], document["copy TB/s"]
    theirs = [row["fla-core of copy"] and row["fla-core of copy"] * copy for row in rows]
    groups = [f"{row['op'].replace('_', '_' + chr(10), 1)}\n{row['tokens']}" for row in rows]
    return groups, {"gdnir": [row["TB/s"] for row in rows], "fla-core": theirs}, "TB/s", copy, "copy"


def _layer(document):
    rows = document["rows"]
    bars = {"gdnir": [row["products alone ms"] / row["ms"] for row in rows]}
    if any(row["vllm/ours"] for row in rows):
        bars["vLLM"] = [row["products alone ms"] / row["H200 vllm ms"] for row in rows]
    groups = [f"{row['phase']}\n{row['tokens']}" for row in rows]
    return groups, bars, "speed, of the products alone", 1, "the products alone"


def figure(path, title, groups, bars, axis, line, label):
    """Grouped bars with their values, and a dashed line for the floor or the ceiling."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same data gives the same file.
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "gdnir", "font.size": 9, "font.family": "sans-serif"}
    )
    from matplotlib import pyplot

    bars = {who: values for who, values in bars.items() if any(v is not None for v in values)}
    figure_, axes = pyplot.subplots(figsize=(max(6.5, 0.62 * len(groups) + 1.2), 3.4), layout="constrained")
    width = 0.82 / len(bars)
    top = max([line or 0, *(v for values in bars.values() for v in values if v is not None)])
    for i, (who, values) in enumerate(bars.items()):
        places = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, [v or 0 for v in values], width * 0.92, label=who, color=COLOURS[who], zorder=2)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                text = f"{value:.2f}"
                axes.text(place, value + 0.01 * top, text, ha="center", va="bottom", fontsize=6)
    if line:
        axes.axhline(line, color="black", linewidth=1, linestyle=(0, (4, 3)), label=label, zorder=3)
    axes.set_xticks(range(len(groups)), groups, fontsize=7)
    axes.margins(x=0.01)
    axes.set(ylabel=axis, ylim=(0, top * 1.08))
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure_.legend(frameon=False, fontsize=8, ncols=len(bars) + 1, loc="outside lower center")
    figure_.savefig(path, metadata={"Date": None})
    pyplot.close(figure_)


def main(
    results: Annotated[Path, typer.Option(help="folder of the JSON files")] = HERE / "results",
    docs: Annotated[Path, typer.Option(help="where performance.md and img/ go")] = DOCS,
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail if the page is out of date")] = False,
):
    documents = load(results)
    text, target = page(documents), docs / "performance.md"
    if check:
        if not target.exists() or target.read_text() != text:
            sys.exit(f"{target} is not what {results} gives. Run benchmarks/plots.py.")
        return
    (docs / "img").mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    for key, document in documents.items():
        if drawing := draws(document):
            name = document["name"].removeprefix(kind(document)).strip("_")
            title = f"{TITLES[kind(document)]}{f', {name}' if name else ''} ({document['environment']['gpu']})"
            figure(docs / "img" / f"{key}.svg", title, *drawing)


if __name__ == "__main__":
    typer.run(main)
