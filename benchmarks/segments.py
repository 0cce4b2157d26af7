"""Into how many segments to cut the Gluon rule's sequences: `python benchmarks/segments.py [--out FOLDER]`.

Each row is a batch, each column its microseconds cut into that many segments (0: not at all), and what `_segment` chooses. The
model in gdnir/lowering/gluon_rule.py is fitted to these; tests/test_gluon_segments.py holds it to them.
"""

from pathlib import Path
from typing import Annotated

import typer
from delta_rule import BATCHES, HEADS, inputs
from gpu import HERE, ceilings, replay_ms, report

from gdnir.lowering import gluon_rule

COUNTS = (0, 2, 3, 4, 5, 6, 8, 12, 16)
MORE = (((16, 32), [4096]), ((16, 32), [16384]), ((16, 16), [8192]), ((16, 16), [32768]), ((16, 48), [8192]),
        ((4, 8), [4096]), ((8, 16), [16384]), ((16, 32), [8192] * 2), ((2, 8), [8192] * 4), ((16, 64), [4096]))  # fmt: skip


def main(out: Annotated[Path, typer.Option()] = HERE / "results"):
    copy, _ = ceilings()
    rows = []
    for heads, lengths in [*((h, b) for h in HEADS for b in BATCHES.values()), *MORE]:
        operands, seq = inputs(heads, lengths)
        chunks = -(-max(lengths) // 64)

        def us(segment, operands=operands, seq=seq):
            run = lambda: gluon_rule.delta_rule_prefill(*operands, seq, scale=128**-0.5, segment=segment)
            return replay_ms(run, replays=11) * 1e3

        times = {
            str(n): us(-(-chunks // n) if n else 0) if n <= chunks // 4 and (n < 4 or len(lengths) < 8) else None
            for n in COUNTS
        }
        chosen = us(None)
        best = min(t for t in times.values() if t is not None)
        batch = f"1x{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]}x{len(lengths)}"
        rows.append({"case": f"({heads[0]},{heads[1]}) {batch}", "H": heads[0], "HV": heads[1], "rows": len(lengths), "tokens": lengths[0],
                     **times, "chosen": chosen, "best/chosen": best / chosen})  # fmt: skip
    report("segments", rows, [f"copy {copy:.2f} TB/s; microseconds"], out, copy)


if __name__ == "__main__":
    typer.run(main)
