"""A package outside gdnir adds an op, a lowering, a fused op and a platform; nothing of it is loaded until asked for."""

import subprocess
import sys

import pytest

pytest.importorskip("gdnir_example")
GRAPH = """gdnir 1
graph @clipped (%o: f32[T,2,8], %z: f32[T,2,8]) weights { @w: f32[8] } {
  %y: f32[T,2,8] = gated_rmsnorm(%o, %z, @w) {activation="silu", eps=1e-06}
  %x: f32[T,2,8] = example.clip(%y) {limit=0.5}
  return %x
}
"""


def gdnir(*arguments):
    done = subprocess.run([sys.executable, "-m", "gdnir.cli", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_listed_but_not_loaded():
    code, out, _ = gdnir("providers")
    assert code == 0
    assert "example (gdnir-example 0.1.0, gdnir.lowerings): installed, not loaded" in out
    assert "gdnir_example.lowerings\n" not in out
    code, _, err = gdnir("why", "qwen3-next", "--provider", "gated_rmsnorm=example")
    assert code == 2
    assert "unknown provider `example`" in err


def test_loaded_on_request():
    code, out, _ = gdnir("--plugin", "example", "providers")
    assert code == 0
    assert "example.clipped_norm gdnir_example.lowerings" in out
    assert ": loaded" in out
    code, out, _ = gdnir("--plugin", "example-npu", "platforms")
    assert code == 0
    assert "npu:example" in out


def test_why_and_fusion(tmp_path):
    path = tmp_path / "clipped.gdnir"
    path.write_text(GRAPH)
    code, out, err = gdnir("--plugin", "example", "why", str(path), "--platform", "cpu")
    assert (code, err) == (0, "")
    assert "= example.clipped_norm\n  example: chosen" in out
    code, out, _ = gdnir(
        "--plugin", "example", "dump", str(path), "--platform", "cpu", "--provider", "gated_rmsnorm=native"
    )
    assert code == 0
    assert "gated_rmsnorm@native" in out
    assert "example.clip@native" in out
    code, out, _ = gdnir(
        "--plugin", "example", "why", "qwen3-next", "--platform", "cpu", "--provider", "gated_rmsnorm=example,native"
    )
    assert code == 0
    assert "example: chosen, requested" in out


def test_runs_and_is_proven():
    code = (
        """
import torch, gdnir
gdnir.load_plugins(["example"])
graph = gdnir.parse('''%s''')
gdnir.verify(graph)
assert gdnir.parse(str(graph)) == graph
plan = gdnir.Plan(gdnir.lower(graph, "cpu"), {"w": torch.ones(8)})
assert [n.provider for n in plan.graph.nodes] == ["example"]
o, z = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
plain = gdnir.Plan(gdnir.lower(graph, "cpu", providers={"gated_rmsnorm": ["native"]}), {"w": torch.ones(8)})
torch.testing.assert_close(plan(o, z), plain(o, z))
assert plan(o, z).abs().max() <= 0.5
from gdnir.testing import prove_native
assert prove_native("example.clip", (o,), (z,), {"limit": 0.5}) > 0
"""
        % GRAPH
    )
    subprocess.run([sys.executable, "-c", code], check=True)
