"""tests/gpu/racecheck.py tells Triton's hand-over from other findings of racecheck; what the tool prints is as it was on an H200."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import racecheck

KERNEL, FILE = "delta_rule_gluon_kernel", "delta_rule_gluon.py"
LINES = racecheck.KERNELS[FILE].read_text().splitlines()


def line(text, nth=0):
    return [i for i, x in enumerate(LINES, 1) if text in x][nth]


def said(write, read, file=FILE):
    return (
        "========= Error: Potential RAW hazard detected at __shared__ 0x3757c in block (4,0,0) :\n"
        f"=========     Write Thread (31,0,0) at {KERNEL}+0x57a0 in {file}:{write}\n"
        f"=========     Read Thread (256,0,0) at {KERNEL}+0xf0 in {FILE}:{read}\n"
        "=========     Current Value : 2\n========= \n"
    )


def others(text):
    return [pair for pair in racecheck.hazards(text) if not racecheck.handed_over(pair[0], pair[1:])]


def test_the_hand_over_is_known():
    kernel = line(f"def {KERNEL}")
    texts = [said(kernel, kernel), said(kernel - 1, kernel), *[said(line("gl.warp_specialize(", i), kernel) for i in (0, 1)],
             said(line("gl.warp_specialize(") - 1, kernel)]  # fmt: skip
    assert racecheck.hazards("".join([texts[0], *texts])).total() == 6
    assert others("".join(texts)) == []


def test_everything_else_is_not():
    kernel = line(f"def {KERNEL}")
    for text in (
        said(line("tile.store"), kernel),
        said(kernel, line("gl.warp_specialize(")),
        said(kernel, line("v = sV.index(WG)")),
        said(109, kernel, "delta_rule_gluon_prep.py"),
        said(kernel, kernel, "elsewhere.py"),
    ):
        assert racecheck.hazards(text).total() == len(others(text)) == 1
