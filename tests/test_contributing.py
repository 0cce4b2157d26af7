"""Every example of CONTRIBUTING.md, run in order in one namespace."""

import subprocess
import sys
from pathlib import Path

CHECKS = """
import torch
graph = gdnir.parse('gdnir 1\\ngraph @g (%x: f32[T,4]) weights { @w: f32[4] } { %y: f32[T,4] = guide.scale(%x, @w) {limit=2.0} return %y }')
gdnir.verify(graph)
lowered = gdnir.lower(graph, "cpu", pipeline="guide-rename{to=other},lower")
assert lowered.graph.name == "other" and lowered.graph.nodes[0].provider == "guide"
x = torch.randn(3, 4)
assert torch.equal(gdnir.Plan(lowered, {"w": torch.ones(4)})(x), x.clamp(-2, 2))
from gdnir.testing import prove_native
assert prove_native("guide.scale", (x, torch.ones(4)), (x + 1, torch.ones(4)), {"limit": 1.0})
config = gdnir.models.config(dict(model_type="guide_model", hidden_size=16, num_hidden_layers=4, linear_num_key_heads=1,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8))
gdnir.verify(gdnir.models.trace(config))
"""


def test_examples_run(tmp_path):
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 4
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks) + CHECKS)
    subprocess.run([sys.executable, str(script)], check=True)
