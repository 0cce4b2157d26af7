"""Tables of block sizes: what the package ships is sound, and a bad file is an error that says what to do."""

import json

import pytest
import torch

from gdnir.errors import TableError
from gdnir.lowering import tables, triton_launch, triton_rule

SCHEMA = {
    "rule": {"BV": (16, 32), "PRECISION": ("f16", "bf16x3"), "EARLY": (True, False)},
    "norm": {"num_warps": (1, 2, 4)},
}
GOOD = {"rule": {"BV": 16, "PRECISION": "f16", "EARLY": True}, "norm": {"num_warps": 4}}


def load(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tables.load(path, SCHEMA)


def with_rule(**changes):
    return {"default": {**GOOD, "rule": {**GOOD["rule"], **changes}}}


def test_a_kind_has_its_own_sections_and_the_default_ones(tmp_path):
    other = {"BV": 32, "PRECISION": "bf16x3", "EARLY": False}
    found = load(tmp_path, {"default": GOOD, "sm_90": {"rule": other}, "gfx942": {}})
    assert found["rule"] == {"default": GOOD["rule"], "sm_90": other, "gfx942": GOOD["rule"]}
    assert found["norm"]["sm_90"] == {"num_warps": 4}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ('{"default": {}, "default": {}}', "comes twice"),
        ("[1]", "`default` among them"),
        ({"sm_90": GOOD}, "Add `default`"),
        ({"default": GOOD, "volta": {}}, "`volta` is no kind of GPU"),
        ({"default": GOOD, "sm_90; import os": {}}, "is no kind of GPU"),
        ({"default": GOOD, "sm_90": 3}, "sm_90 is 3. Write an object with rule, norm"),
        ({"default": {"rule": GOOD["rule"]}}, "norm missing"),
        ({"default": {**GOOD, "rules": {}}}, "unknown name `rules`. Did you mean `rule`?"),
        ({"default": {**GOOD, "norm": {}}}, "default.norm: num_warps missing"),
        ({"default": {**GOOD, "norm": [4]}}, r"default.norm is \[4\]"),
        (with_rule(NEW=1), "unknown name `NEW`"),
        (with_rule(BV=64), "default.rule.BV is 64. Choose one of 16, 32"),
        (with_rule(BV=-16), "BV is -16"),
        (with_rule(BV=16.0), "BV is 16.0"),
        (with_rule(BV="16"), 'BV is "16"'),
        (with_rule(BV=[16]), r"BV is \[16\]"),
        (with_rule(BV=None), "BV is null"),
        (with_rule(PRECISION="__import__('os')"), 'Choose one of "f16", "bf16x3"'),
        (with_rule(EARLY=1), "EARLY is 1. Choose one of true, false"),
        ({"default": {**GOOD, "norm": {"num_warps": True}}}, "num_warps is true"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, said):
    with pytest.raises(TableError, match=said):
        load(tmp_path, content)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TableError, match="Restore the file"):
        tables.load(tmp_path / "none.json", SCHEMA)


def test_every_file_of_the_package_is_one_that_a_launcher_reads():
    text = "".join(path.read_text() for path in tables.FOLDER.parent.glob("*.py"))
    names = [path.stem for path in tables.FOLDER.iterdir()]
    assert names and all(f'"{name}"' in text for name in names)
    assert set(triton_rule.RULE) >= {"default", "sm_90", "hip"}
    assert set(triton_launch._TABLES["norm"]["default"]) == {"ELEMENTS", "num_warps"}


@pytest.mark.parametrize(
    ("backend", "arch", "kinds"),
    [
        ("cuda", 80, ("sm_80", "sm_80")),
        ("cuda", 89, ("sm_89", "sm_86")),
        ("cuda", 90, ("sm_90", "sm_90")),
        ("cuda", 103, ("sm_103", "sm_100")),
        ("cuda", 120, ("sm_120", "sm_86")),
        ("hip", "gfx942", ("gfx942", "hip")),
    ],
)
def test_pick_takes_the_closest_kind(monkeypatch, backend, arch, kinds):
    triton = pytest.importorskip("triton")

    class Driver:
        active = type(
            "Active", (), {"get_current_target": lambda self: type("Target", (), {"backend": backend, "arch": arch})}
        )()

    monkeypatch.setattr(triton.runtime, "driver", Driver)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert tables.kinds(torch.device("cpu")) == kinds
    section = {"default": {"BV": 0}}
    assert tables.pick(section, kinds) == {"BV": 0}
    assert tables.pick({**section, kinds[1]: {"BV": 1}}, kinds) == {"BV": 1}
    assert tables.pick({**section, kinds[1]: {"BV": 1}, kinds[0]: {"BV": 2}}, kinds) == {"BV": 2}
