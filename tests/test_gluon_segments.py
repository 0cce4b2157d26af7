"""The model that cuts sequences into segments, held to what was measured: benchmarks/segments.py, an H100 and an H200."""

import pytest

from gdnir.lowering.gluon_rule import _output_us, _segment

# Bandwidth as the launcher takes it, 88 % of the memory's rate. On the H200 it was 4.2 to 4.3 TB/s: (16,32) 1x32768 took as
# long as by two segments and 1x16384 as long as by none, which the model of that day chose in that range alone.
BANDWIDTH = {"H100": 2.95e12, "H200": 4.25e12}
COUNTS = {"H100": (0, 2, 3, 4, 5, 6, 8, 11, 16, 24), "H200": (0, 2, 3, 4, 5, 6, 8, 12, 16)}
# Microseconds by the number of segments, the better of both schedules; ((H, HV), sequences, tokens of each).
H100 = {
    ((2, 8), 1, 2048): (51, 57, 49, 46, 46, 47, 50),
    ((2, 8), 1, 8192): (162, 166, 126, 103, 92, 86, 83, 99, 102, 133),
    ((2, 8), 1, 32768): (606, 612, 425, 333, 281, 248, 212, 262, 232, 278),
    ((2, 8), 8, 4096): (119, 171),
    ((2, 8), 8, 1024): (42, 71),
    ((2, 8), 4, 8192): (175, 199, 174, 202, 219, 229, 230, 264, 276, 312),
    ((4, 8), 1, 4096): (86, 91, 73, 63, 59, 58, 58, 73, 82),
    ((8, 16), 1, 16384): (331, 334, 250, 214, 218, 251, 236, 274, 271, 306),
    ((16, 16), 1, 8192): (177, 183, 145, 137, 136, 163, 157, 177, 194, 219),
    ((16, 16), 1, 32768): (659, 671, 508, 478, 437, 532, 487, 515, 521, 559),
    ((16, 32), 1, 2048): (59, 72, 69, 83, 88, 99, 106),
    ((16, 32), 1, 4096): (98, 112, 106, 122, 136, 142, 149, 167, 199),
    ((16, 32), 1, 8192): (194, 211, 197, 231, 245, 251, 257, 273, 305, 337),
    ((16, 32), 1, 16384): (363, 394, 357, 420, 425, 437, 441, 455, 484, 528),
    ((16, 32), 1, 32768): (718, 776, 761, 802, 810, 819, 818, 822, 857, 902),
    ((16, 32), 2, 8192): (278, 337, 378, 397, 423, 427, 454, 486, 539, 596),
    ((16, 48), 1, 8192): (213, 257, 348, 292, 298, 342, 330, 359, 402, 441),
    ((16, 48), 1, 32768): (818, 995, 1129, 1066, 1066, 1164, 1140, 1164, 1227, 1313),
    ((16, 64), 1, 8192): (248, 295, 366, 368, 408, 406, 428, 462, 503, 566),
    ((16, 64), 8, 1024): (267, 395),
}
# The schedule is the one that the launcher chose. Measured with steps in carry, the H100's with a kernel between for them.
H200 = {
    ((2, 8), 1, 2048): (46.2, 52.2, 41.2, 37.6, 35.1, 34.7, 36.0),
    ((2, 8), 1, 8192): (158, 166, 118, 95.7, 81.8, 74.8, 67.5, 94.0, 102),
    ((2, 8), 1, 32768): (599, 607, 418, 323, 267, 230, 188, 240, 216),
    ((2, 8), 8, 4096): (107, 155, 183),
    ((2, 8), 8, 1024): (36.3, 66.4, 71.6),
    ((16, 32), 1, 2048): (53.1, 62.5, 59.9, 65.9, 80.4, 85.9, 94.0),
    ((16, 32), 1, 8192): (178, 190, 172, 189, 218, 222, 215, 243, 297),
    ((16, 32), 1, 32768): (663, 694, 609, 662, 743, 747, 685, 721, 781),
    ((16, 32), 8, 4096): (370, 497, 592),
    ((16, 32), 8, 1024): (114, 195, 235),
    ((16, 64), 1, 2048): (59.5, 82.8, 108, 111, 130, 134, 163),
    ((16, 64), 1, 8192): (203, 257, 334, 315, 358, 348, 378, 450, 548),
    ((16, 64), 1, 32768): (763, 958, 1222, 1136, 1265, 1215, 1260, 1354, 1466),
    ((16, 64), 8, 4096): (689, 920, 1105),
    ((16, 64), 8, 1024): (206, 343, 443),
    ((16, 32), 1, 4096): (93.9, 103, 96.8, 105, 126, 129, 133, 160, 221),
    ((16, 32), 1, 16384): (345, 364, 322, 353, 399, 402, 377, 408, 454),
    ((16, 16), 1, 8192): (169, 175, 130, 110, 116, 134, 129, 154, 175),
    ((16, 16), 1, 32768): (633, 646, 459, 375, 381, 441, 384, 430, 434),
    ((16, 48), 1, 8192): (189, 242, 324, 265, 261, 308, 290, 366, 424),
    ((4, 8), 1, 4096): (83.1, 89.2, 66.6, 56.2, 49.9, 46.5, 46.0, 66.1, 80.0),
    ((8, 16), 1, 16384): (318, 326, 233, 190, 200, 230, 200, 242, 249),
    ((16, 32), 2, 8192): (214, 271, 342, 325, 364, 358, 394, 471, 577),
    ((2, 8), 4, 8192): (171, 192, 167, 184, 209, 213, 215, 252, 300),
    ((16, 64), 1, 4096): (107, 140, 182, 178, 205, 204, 232, 299, 402),
}


def regret(times, counts, segment, chunks):
    """The time of this choice over the best one. A count between two that were measured costs at most the dearer one."""
    count = -(-chunks // segment) if segment else 0
    known = dict(zip(counts, times, strict=False))
    return max(known[max(c for c in known if c <= count)], known[min(c for c in known if c >= count)]) / min(times)


@pytest.mark.parametrize(("card", "case"), [(c, s) for c, t in (("H100", H100), ("H200", H200)) for s in t], ids=str)
def test_the_choice_is_near_the_best_that_was_measured(card, case):
    (key_heads, heads), rows, tokens = case
    times = {"H100": H100, "H200": H200}[card][case]
    chunks = tokens // 64
    segment = _segment((rows,), key_heads, heads, chunks, 132, BANDWIDTH[card])
    assert regret(times, COUNTS[card], segment, chunks) <= 1.02


@pytest.mark.parametrize("case", H200, ids=str)
@pytest.mark.parametrize("bandwidth", [4.15e12, 4.45e12])
def test_the_choice_does_not_hang_on_the_last_percents_of_bandwidth(case, bandwidth):
    (key_heads, heads), rows, tokens = case
    chunks = tokens // 64
    segment = _segment((rows,), key_heads, heads, chunks, 132, bandwidth)
    assert regret(H200[case], COUNTS["H200"], segment, chunks) <= 1.02


@pytest.mark.parametrize("card", BANDWIDTH)
def test_rows_that_must_not_know_of_each_other_are_cut_only_if_that_does_for_two(card):
    """One row of (16,32) saves 3 % by three segments on an H200, eight rows lose a third."""
    of = lambda *heads: _segment((1, 2), *heads, 128, 132, BANDWIDTH[card])
    assert of(16, 32) == of(16, 64) == 0
    assert of(2, 8) == 16


def test_nothing_is_cut_where_there_is_nothing_to_cut():
    assert [_segment((1,), 2, 8, chunks, 132, 4.25e12) for chunks in range(4)] == [0] * 4
    assert _segment((0,), 2, 8, 128, 132, 4.25e12) == 0


@pytest.mark.parametrize("card", BANDWIDTH)
def test_a_head_takes_both_halves_of_the_chip_while_that_is_faster(card):
    for units, faster in ((8, 0), (64, 0), (67, 1), (256, 1)):
        single, pair = _output_us(units, 2, 132, BANDWIDTH[card])
        assert (pair < single) == bool(faster)
