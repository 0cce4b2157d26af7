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
    assert {n.provider for n in graph.nodes} == {"native", "triton", "gluon"}
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
    assert len(document["choices"]) == len(document["graph"]["nodes"]) == 9
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
    code, out, _ = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90", "--dtype", "f32")
    assert code == 0
    assert (
        "triton: chosen, the providers before it refused\n  gluon: refused, gluon has no lowering of conv_prep." in out
    )
    assert "gluon: refused, q is f32 and v is f32, want bf16 or f16, both the same." in out
    assert "triton: refused, q, k and v are f32, want bf16 or f16." in out
    assert "fuse: conv_prep: 5 nodes became one" in out
    code, _, err = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90", "--dtype", "f32", "--strict")
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
    (["ops"], "gated_delta_rule"), (["ops", "conv_prep"], "one read of the activations"), (["providers"], "native"), (["providers"], "triton_rule: default, "),
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


@pytest.fixture
def text(capsys, tmp_path):
    """A lowered and an unlowered file of IR text."""
    lowered, traced = tmp_path / "lowered.gdnir", tmp_path / "traced.gdnir"
    assert run(capsys, "dump", "qwen3-next", "--platform", "cuda:sm_90", "-o", str(lowered))[0] == 0
    assert run(capsys, "dump", "qwen3-next", "--no-lower", "-o", str(traced))[0] == 0
    return {"lowered": str(lowered), "traced": str(traced)}


@pytest.mark.parametrize(("which", "options"), [
    ("traced", ["--dtype", "f32"]), ("traced", ["--state-dtype", "bf16"]), ("traced", ["--state-layout", "kv"]),
    ("traced", ["--phase", "decode", "--region", "core"]), ("traced", ["--no-lower", "--strict"]),
    ("traced", ["--no-lower", "-p", "lower"]), ("lowered", ["--strict"]), ("lowered", ["--provider", "l2norm=native"]),
    ("lowered", ["-p", "canonicalize"]),
])  # fmt: skip
def test_no_option_is_ignored_silently(capsys, text, which, options):
    code, out, err = run(capsys, "dump", text[which], *options)
    assert (code, out) == (2, "")
    named = {"-p": "--pipeline"}
    for option in (o for o in options if o.startswith("-") and o != "--no-lower"):
        assert named.get(option, option) in err.split("Drop")[1]


def test_why_names_every_node_that_is_unmet(capsys):
    code, _, err = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90", "--strict")
    assert (code, err) == (0, "")
    unmet = ["--dtype", "f32", "--provider", "gdn_gate=native"]  # a type, and a request, that strict cannot meet
    code, out, err = run(capsys, "why", "qwen3-next", "--platform", "cuda:sm_90", "--strict", *unmet)
    assert code == 1
    assert "= gdn_gate" in out
    assert "= gated_delta_rule" in out
    assert "triton: refused, q, k and v are f32, want bf16 or f16." in out
    assert "in_proj(" not in out
    assert err.startswith("error: gdn_gate")
    code, out, _ = run(capsys, "why", "qwen3-next", "--format", "json")
    assert len(json.loads(out)["choices"]) == 13


def test_files_that_cannot_be_used(capsys, tmp_path, text):
    binary, bad = tmp_path / "b.gdnir", tmp_path / "bad.gdnir"
    binary.write_bytes(b"\xdd\xff")
    bad.write_text("gdnir 1\nnonsense")
    for arguments, says in (
        (["dump", str(binary)], "b.gdnir"), (["dump", str(bad)], "bad.gdnir: line 2, column 1"),
        (["dump", "qwen3-next", "-o", str(tmp_path / "no" / "x")], "cannot be written"),
        (["run", text["traced"]], "is IR text"),
        (["dump", "qwen3-next", "--provider", "l2norm=triton", "--provider", "l2norm=native"], "two lists for l2norm"),
    ):  # fmt: skip
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert says in err
        assert "Traceback" not in err


def test_mermaid_names_are_no_directives():
    evil = Value('%%{init: {"theme": "dark"}}%% #60;img src=x#62; `x`', TensorType("f32", ("T",)))
    drawn = show.to_mermaid(Graph("g", (evil,), (), (), (evil,)))
    assert "%%" not in drawn
    assert "#60;img" not in drawn
    assert "{" not in drawn
    assert "#35;60#59;img" in drawn


def test_passes_show_their_options(capsys):
    _, out, _ = run(capsys, "passes")
    assert "fuse{op=none}" in out
