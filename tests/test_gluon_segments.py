"""The model that cuts sequences into segments, held to what was measured: benchmarks/segments.py, one H100."""

import pytest

from gdnir.lowering.gluon_rule import _segment

COUNTS = (0, 2, 3, 4, 5, 6, 8, 11, 16, 24)
# Microseconds by the number of segments, the better of both schedules; ((H, HV), sequences, tokens of each).
MEASURED = {
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


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_choice_is_near_the_best_that_was_measured(case):
    (key_heads, heads), rows, tokens = case
    chunks = tokens // 64
    segment = _segment(rows, key_heads, heads, chunks, 132, 2.95e12)
    count = -(-chunks // segment) if segment else 0
    times = dict(zip(COUNTS, MEASURED[case], strict=False))
    # A count between two that were measured costs at most the dearer one.
    chosen = max(times[max(c for c in times if c <= count)], times[min(c for c in times if c >= count)])
    assert chosen <= 1.08 * min(times.values())
