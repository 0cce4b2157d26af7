"""docs/performance.md says what benchmarks/results says, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
ENVIRONMENT = {"gpu": "GPU", "driver": "1", "torch": "2", "triton": "3", "gdnir": "0"}


@pytest.fixture(scope="module")
def plots():
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks/plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document(name, rows, copy=4.0):
    return {"name": name, "environment": ENVIRONMENT, "copy TB/s": copy, "notes": ["a note"], "rows": rows}


RULE = {"case": "(2,8) 1x64", "ms": 0.25, "floor ms": 0.125, "fla-core ms": 1234.5, "flashinfer ms": None}
STEP = {"phase": "decode", "state": "float32", "B": 8, "us": 10.0, "state TB/s": 2.0, "fla-core us": 20.0}


def test_the_page_is_what_the_results_give(plots):
    page = DOCS / "performance.md"
    documents = plots.load(RESULTS)
    assert page.exists() == bool(documents), "run benchmarks/plots.py"
    if documents:
        assert page.read_text() == plots.page(documents), "run benchmarks/plots.py"
        drawn = {f"{key}.svg" for key, one in documents.items() if plots.draws(one)}
        assert drawn <= {path.name for path in (DOCS / "img").iterdir()}


def test_tables_and_figures(plots, tmp_path):
    (tmp_path / "h100").mkdir()
    for folder, name, rows in ((".", "decode", [STEP]), ("h100", "delta_rule_gluon", [RULE, {**RULE, "ms": 0.5}])):
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(document(name, rows)))
    documents = plots.load(tmp_path)
    assert list(documents) == ["h100-delta_rule_gluon", "decode"]
    text = plots.page(documents)
    assert "| case | ms | floor ms | fla-core ms |\n| :--- | ---: | ---: | ---: |" in text  # no empty column
    assert "| (2,8) 1x64 | 0.25 | 0.125 | 1234 |" in text
    assert "## The delta rule, prefill, gluon, on GPU" in text
    assert "- a note" in text
    _, bars, _, line, _ = plots.draws(documents["h100-delta_rule_gluon"])
    assert bars["gdnir"] == [0.5, 0.25]
    assert bars["FlashInfer"] == [None, None]
    assert line == 1
    _, bars, _, line, _ = plots.draws(documents["decode"])
    assert (bars["gdnir"], bars["fla-core"], bars["bf16 state"], line) == ([2.0], [1.0], [None], 4.0)


def test_drawing_twice_gives_the_same_file(plots, tmp_path):
    pytest.importorskip("matplotlib")
    drawing = plots.draws(document("decode", [STEP]))
    for name in ("a.svg", "b.svg"):
        plots.figure(tmp_path / name, "Title", *drawing)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
