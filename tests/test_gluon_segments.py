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
# The schedule is the one that the launcher chose.
H200 = {
    ((2, 8), 1, 2048): (49.2, 55.1, 47.1, 43.7, 43.6, 44.5, 50.1),
    ((2, 8), 1, 8192): (164, 169, 126, 104, 93.6, 87.6, 81.6, 100, 103),
    ((2, 8), 1, 32768): (607, 613, 426, 332, 280, 246, 208, 250, 219),
    ((2, 8), 8, 4096): (114, 159, 195),
    ((2, 8), 8, 1024): (40.3, 67.8, 82.6),
    ((16, 32), 1, 2048): (57.1, 68.0, 66.0, 76.7, 84.4, 94.6, 99.0),
    ((16, 32), 1, 8192): (183, 196, 178, 199, 226, 236, 227, 244, 272),
    ((16, 32), 1, 32768): (672, 709, 615, 676, 754, 761, 700, 722, 731),
    ((16, 32), 8, 4096): (368, 505, 626),
    ((16, 32), 8, 1024): (118, 196, 262),
    ((16, 64), 1, 2048): (62.7, 82.7, 112, 118, 135, 140, 159),
    ((16, 64), 1, 8192): (209, 257, 339, 324, 366, 360, 382, 424, 456),
    ((16, 64), 1, 32768): (779, 965, 1223, 1150, 1266, 1225, 1324, 1438, 1455),
    ((16, 64), 8, 4096): (700, 937, 1190),
    ((16, 64), 8, 1024): (213, 352, 496),
    ((16, 32), 1, 4096): (97.1, 107, 102, 113, 130, 135, 137, 156, 188),
    ((16, 32), 1, 16384): (345, 367, 325, 359, 400, 408, 383, 414, 424),
    ((16, 16), 1, 8192): (171, 176, 136, 121, 123, 141, 133, 161, 171),
    ((16, 16), 1, 32768): (633, 641, 465, 394, 389, 449, 390, 440, 430),
    ((16, 48), 1, 8192): (190, 246, 327, 270, 271, 310, 292, 336, 362),
    ((4, 8), 1, 4096): (87.7, 93.0, 74.8, 65.0, 61.0, 59.4, 60.4, 70.5, 81.2),
    ((8, 16), 1, 16384): (322, 328, 243, 200, 206, 237, 207, 250, 246),
    ((16, 32), 2, 8192): (218, 273, 348, 335, 371, 368, 392, 433, 474),
    ((2, 8), 4, 8192): (174, 193, 170, 189, 214, 222, 214, 236, 258),
    ((16, 64), 1, 4096): (111, 139, 188, 184, 209, 210, 230, 261, 308),
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
