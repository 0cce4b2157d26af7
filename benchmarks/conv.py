"""The convolution, conv_prep and the gated norm beside their peers: `python benchmarks/conv.py [--out FOLDER]`.

16 key and 32 value heads of 128 (8192 channels), width 4, bf16. TB/s of the bytes that must move, read and written once.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, ceilings, chain_ms, chain_note, is_h200, peer, replay_ms, report
from peers import fla_conv, fla_norm, measure

import gdnir
from gdnir.lowering import find

HEADS, C = (16, 32, 128, 128), 8192


def main(out: Annotated[Path, typer.Option()] = HERE / "results"):
    conv, prep, norm = (find(op, "triton").run for op in ("causal_conv1d", "conv_prep", "gated_rmsnorm"))
    copy, _ = ceilings()
    rows, notes = [], [chain_note()]
    for tokens in (2048, 8192, 32768):
        x = torch.randn(tokens, C, device="cuda").bfloat16()
        weight, a, b = (torch.randn(*s, device="cuda").bfloat16() for s in ((C, 4), (tokens, 32), (tokens, 32)))
        A_log, dt_bias = torch.randn(32, device="cuda"), torch.randn(32, device="cuda")
        state = torch.zeros(2, C, 3, device="cuda", dtype=torch.bfloat16)
        seq = gdnir.Seq.prefill([tokens], slots=[1], device="cuda")
        o, z = (torch.randn(tokens, 32, 128, device="cuda").bfloat16() for _ in range(2))
        w = torch.randn(128, device="cuda").bfloat16()
        each = 2 * tokens * C * 2
        case = f"D={C} T={tokens}"

        def ours_conv():
            return conv(x, weight, None, state, seq, activation="silu", conv_layout="cw")

        def ours_norm():
            return norm(o, z, w, eps=1e-6, activation="silu")

        def ours_prep():
            return prep(x, a, b, weight, None, state, A_log, dt_bias, seq, activation="silu", conv_layout="cw",
                        heads=HEADS, eps=1e-6, allow_neg_eigval=False)  # fmt: skip

        fla, fla_n = fla_conv(x, weight), fla_norm(o, z, w)
        fla_ms = measure(f"convolution T={tokens}, fla-core", fla and [fla], ours_conv(), notes)
        norm_ms = measure(f"norm T={tokens}, fla-core", fla_n and [fla_n], ours_norm(), notes)
        published = {
            "causal_conv1d": peer("conv", case, "fla"),
            "conv_prep": peer("conv", case, "fla") + peer("postconv", case),
            "gated_rmsnorm": peer("norm", f"T={tokens} hv=32"),
        }
        work = {
            "causal_conv1d": (ours_conv, each, fla_ms, 3.6),
            "conv_prep": (ours_prep, each + tokens * 32 * 12, fla_ms, 3.5),
            "gated_rmsnorm": (ours_norm, 3 * o.nbytes, norm_ms, 3.9),
        }
        for op, (run, moved, theirs, bar) in work.items():
            ms = replay_ms(run)
            speed = moved / ms / 1e9
            chained = chain_ms(run) if moved > 120e6 else None  # else from the L2 cache
            rows.append({"op": op, "tokens": tokens, "ms": ms, "TB/s": speed, "of copy": speed / copy,
                         "chain TB/s": chained and moved / chained / 1e9,
                         "bar TB/s": bar if tokens >= 8192 and is_h200() else None, "fla-core ms": theirs,
                         "fla-core of copy": theirs and (3 * o.nbytes if op == "gated_rmsnorm" else each) / theirs / 1e9 / copy,
                         "fla-core/ours": theirs and theirs / ms, "H200 fastest ms": published[op],
                         "fastest/ours": published[op] / ms if is_h200() else None})  # fmt: skip
    report(
        "conv",
        rows,
        [
            f"copy {copy:.2f} TB/s. fla-core of this run; beside conv_prep its convolution alone, which does less",
            "published for an H200: of conv_prep, FLA's convolution and vLLM's preparation, two kernels"
            + ("" if is_h200() else "; this card is no H200, no ratio uses them"),
            *notes,
        ],
        out,
        copy,
    )


if __name__ == "__main__":
    typer.run(main)
