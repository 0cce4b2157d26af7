"""The command line, as a person meets it."""

import json
import subprocess
import sys

import pytest

import gdnir
from gdnir import show
from gdnir.cli import main
from gdnir.ir import Graph, Node, TensorType, Value
from gdnir.passes import Lowered
from gdnir.platforms import PLATFORMS

SMALL = dict(model_type="qwen3_next", hidden_size=64, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4,
             linear_key_head_dim=16, linear_value_head_dim=16)  # fmt: skip


def run(capsys, *arguments):
    try:
        main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


def test_dump_is_the_graph(capsys):
    code, out, _ = run(capsys, "dump", "qwen3-next", "--platform", "cuda:sm_90")
    graph = gdnir.parse(out)
    assert code == 0
    assert str(graph) == out
    assert {n.provider for n in graph.nodes} == {"native", "triton"}
    code, out, _ = run(
        capsys, "dump", "olmo-hybrid", "--no-lower", "--phase", "mixed", "--region", "core", "--state-layout", "kv"
    )
    assert gdnir.parse(out).inputs[-2].type.layout == "kv"


def test_print_after_all_keeps_stdout_clean(capsys):
    code, out, err = run(capsys, "dump", "qwen3.5", "--print-ir-after-all", "--platform", "cpu")
    assert gdnir.parse(out)
    for name in ("fold-weights", "canonicalize", "split-mixed", "fuse", "lower"):
        assert f"# after {name}:" in err


def test_formats(capsys, tmp_path):
    _, out, _ = run(capsys, "dump", "qwen3-next", "--format", "json", "--platform", "cuda:sm_90")
    document = json.loads(out)
    assert document["schema"] == show.SCHEMA
    assert len(document["choices"]) == len(document["graph"]["nodes"]) == 12
    _, out, _ = run(capsys, "dump", "qwen3-next", "--format", "dot")
    assert out.startswith('digraph "qwen3_next.gdn"')
    _, out, _ = run(capsys, "dump", "qwen3-next", "--format", "mermaid")
    assert out.startswith("flowchart TD")
    path = tmp_path / "g.gdnir"
    run(capsys, "dump", "qwen3-next", "-o", str(path), "--platform", "cpu")
    code, out, _ = run(capsys, "dump", str(path), "--platform", "cpu")
    assert (code, out) == (0, path.read_text())
    code, _, err = run(capsys, "dump", str(path), "--phase", "decode")
    assert code == 2
    assert "Drop --phase" in err


def test_svg(capsys):
    pytest.importorskip("pygraphviz")
    _, out, _ = run(capsys, "dump", "qwen3-next", "--format", "svg")
    assert "<svg" in out


def test_hostile_names_stay_data():
    evil = '"];x<script>alert(1)</script>`\n'
    value = Value(evil, TensorType("f32", ("T",)))
    graph = Graph(evil, (value,), (), (Node(evil, (value,), (Value("y", value.type),), ((evil, float("inf")),)),), ())
    dot, mermaid = show.to_dot(graph), show.to_mermaid(graph)
    assert "<script>" not in mermaid
    assert all(line.count('"') % 2 == 0 for line in mermaid.splitlines())
    assert '"\\"];' in dot.replace('\\\\"', "") or '\\"];x' in dot
    document = json.loads(show.to_json(Lowered(graph, PLATFORMS["cpu"]), "0"))
    assert document["graph"]["nodes"][0]["attrs"][evil] == {"float": "inf"}


def test_why(capsys):
    code, out, _ = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90")
    assert code == 0
    assert "triton: chosen, first in the order of cuda:sm_90" in out
    assert "triton: refused, triton has no lowering of gated_delta_rule." in out
    assert "fuse: conv_prep: no provider other than native takes it" in out
    code, _, err = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90", "--strict")
    assert code == 1
    assert "strict lowering refuses native on cuda:sm_90." in err
    code, _, err = run(capsys, "why", "qwen3-next", "--platform", "cpu", "--provider", "gated_rmsnorm=triton")
    assert code == 1
    assert "Triton kernels run on CUDA and ROCm; this platform is cpu." in err


def test_run_checks(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    code, out, _ = run(capsys, "run", str(path), "--tokens", "70", "--decode", "3", "--check")
    assert code == 0
    assert out.count("pass") == 4
    assert "gated_delta_rule" in out


def test_run_can_fail(capsys, tmp_path, monkeypatch):
    from gdnir import cli_run

    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    monkeypatch.setattr(cli_run, "TOLERANCE", dict.fromkeys(cli_run.TOLERANCE, 1e-12))
    code, out, err = run(capsys, "run", str(path), "--tokens", "5", "--decode", "1", "--check")
    assert code == 1
    assert "FAIL" in out
    assert "does not agree" in err


@pytest.mark.parametrize(("arguments", "says"), [
    (["ops"], "gated_delta_rule"), (["ops", "conv_prep"], "one read of the activations"), (["providers"], "native"),
    (["passes"], "default pipeline: fold-weights"), (["models"], "qwen3.5-27b"), (["collect-env"], "torch 2."),
    (["platforms"], "this machine: "), (["--version"], gdnir.__version__),
])  # fmt: skip
def test_lists(capsys, arguments, says):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert says in out


@pytest.mark.parametrize(("arguments", "says"), [
    (["dump", "qwen3-nxt"], "Did you mean `qwen3-next`"), (["ops", "l2nrm"], "Did you mean `l2norm`"),
    (["dump", "qwen3-next", "-p", "fuze"], "Did you mean `fuse`"), (["dump", "qwen3-next", "--platform", "gpu"], "unknown platform"),
    (["dump", "qwen3-next", "--provider", "l2norm"], "op=provider"), (["--plugin", "x", "ops"], "no installed package offers"),
])  # fmt: skip
def test_mistakes_get_one_message(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert says in " ".join(err.split())
    assert "Traceback" not in err


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "gdnir.cli", "dump", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
