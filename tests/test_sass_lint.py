"""The lint of tests/sass_lint.py finds what is wrong in listings made so by hand, and nothing in those that are right."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sass_lint

FIRST = (
    "HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR8], RZ, !UPT;",
    "HGMMA.64x64x16.F32.BF16 R24, R124, gdesc[UR4], R24, gsb0;",
)
SECOND = ("HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56, gsb0;",)
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0;"
RIGHT = {
    "waits": [*FIRST, WAIT, "FADD R120, R24, R55;"],
    "others": [*FIRST, "FADD R23, R120, R56;", "MOV R128, R127;", "IADD3 R57, R119, 0x1, RZ;", WAIT],
    "older-group": [*FIRST, *SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1;", "MOV R124, R55;", WAIT, "MOV R56, R87;"],
    "same-accumulators": [*FIRST, *FIRST, WAIT],
    "loop": ["LBB0:", *FIRST, WAIT, "MOV R120, R24;", "@P0 BRA LBB0;", "EXIT;"],
    "in-shared-memory": [*SECOND, "STS.128 [R4+UR5], R88;", "LDS.128 R52, [R3];", WAIT],
    "not-reached": [*FIRST, "EXIT;", "MOV R120, R24;"],
    "uniform": [*FIRST, "UMOV UR24, UR120;", "R2UR UR25, R120;", WAIT],
}
WRONG = {  # listing, how the sentence begins
    "a-overwritten": ([*FIRST, "FMUL R127, R1, R2;", WAIT], "`FMUL R127, R1, R2` writes R127 while `HGMMA"),
    "a-under-a-predicate": ([*FIRST, "@P0 MOV R120, R1;", WAIT], "`@P0 MOV R120, R1` writes R120"),
    "a-before-its-group-ends": ([FIRST[0], "MOV R120, R1;", FIRST[1], WAIT], "`MOV R120, R1` writes R120"),
    "a-by-a-wide-load": ([*FIRST, "LDS.128 R117, [R4];", WAIT], "`LDS.128 R117, [R4]` writes R120"),
    "a-by-a-pair": ([*FIRST, "IMAD.WIDE.U32 R119, R1, R2, R4;", WAIT], "`IMAD.WIDE.U32 R119, R1, R2, R4` writes R120"),
    "a-by-a-shuffle": (
        [*FIRST, "SHFL.BFLY PT, R120, R5, 0x1, 0x1f;", WAIT],
        "`SHFL.BFLY PT, R120, R5, 0x1, 0x1f` writes",
    ),
    "a-by-a-product": ([*FIRST, SECOND[0].replace("R56", "R100"), WAIT], "`HGMMA.64x64x16.F32.BF16 R100, gdesc"),
    "accumulator-read": ([*FIRST, "FADD R1, R55, R2;", WAIT], "`FADD R1, R55, R2` reads R55"),
    "accumulator-read-as-a": ([*SECOND, FIRST[0].replace("R120", "R84"), WAIT], "`HGMMA.64x64x16.F32.BF16 R24, R84"),
    "accumulator-stored": (
        [*FIRST, "STG.E.128 desc[UR4][R2.64], R21;", WAIT],
        "`STG.E.128 desc[UR4][R2.64], R21` reads R24",
    ),
    "accumulator-in-an-address": ([*FIRST, "LDG.E R1, desc[UR4][R23.64];"], "`LDG.E R1, desc[UR4][R23.64]` reads R24"),
    "accumulator-written": ([*FIRST, "CS2R R54, SRZ;", WAIT], "`CS2R R54, SRZ` writes R54"),
    "waits-for-too-few": (
        [*FIRST, *SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1;", "MOV R1, R56;"],
        "`MOV R1, R56` reads R56",
    ),
    "wait-is-jumped-over": ([*FIRST, "@P0 BRA LBB1;", WAIT, "LBB1:", "MOV R1, R24;"], "`MOV R1, R24` reads R24"),
    "wait-under-a-predicate": ([*FIRST, "@P0 " + WAIT, "MOV R1, R24;"], "`MOV R1, R24` reads R24"),
    "over-the-back-edge": (
        ["LBB0:", "MOV R121, R1;", WAIT, *FIRST, "@P0 BRA LBB0;", "EXIT;"],
        "`MOV R121, R1` writes R121",
    ),
    "behind-a-jump-table": (["BRX R2 -0x1d0;", *FIRST, "MOV R24, R1;"], "`MOV R24, R1` writes R24"),
}


@pytest.mark.parametrize("listing", RIGHT.values(), ids=RIGHT)
def test_finds_nothing_wrong(listing):
    assert sass_lint.hazards("\n".join(listing)) == []


@pytest.mark.parametrize(("listing", "sentence"), WRONG.values(), ids=WRONG)
def test_finds_what_is_wrong(listing, sentence):
    found = sass_lint.hazards("\n".join(listing))
    assert found
    assert all(said.startswith(sentence) and said.endswith("is in flight.") for said in found)


def test_a_loop_that_never_waits_is_named():
    (said,) = sass_lint.hazards("\n".join(["LBB0:", *FIRST, "BRA LBB0;"]))
    assert "a loop does not wait" in said
