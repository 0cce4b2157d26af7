"""The printed text of every built-in model, phase and platform is a golden file; `make golden` rewrites them."""

from pathlib import Path

import pytest

import gdnir
from gdnir.platforms import PLATFORMS

FOLDER = Path(__file__).parent / "golden"
NAMED = ("cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "rocm:gfx942", "xpu")


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "mixed"])
@pytest.mark.parametrize("model", sorted(gdnir.models.builtins()))
def test_text(model, phase, request):
    graph = gdnir.models.trace(gdnir.models.config(model), phase=phase)
    parts = [f"# traced\n{graph}"]
    for name in NAMED:
        lowered = gdnir.lower(graph, PLATFORMS[name])
        assert gdnir.parse(str(lowered)) == lowered.graph
        parts.append(f"# {name}\n{lowered}")
    text, path = "\n".join(parts), FOLDER / f"{model}.{phase}.gdnir"
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, "the lowered graphs changed; read the difference, then `make golden`"
