"""The convolution, conv_prep and the gated norm beside their peers: `python benchmarks/conv.py [--out FOLDER]`.

16 key and 32 value heads of 128 (8192 channels), width 4, bf16. TB/s of the bytes that must move, read and written once.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, ceilings, peer, replay_ms, report

import gdnir
from gdnir.lowering import find

HEADS, C = (16, 32, 128, 128), 8192


def main(out: Annotated[Path, typer.Option()] = HERE / "results"):
    conv, prep, norm = (find(op, "triton").run for op in ("causal_conv1d", "conv_prep", "gated_rmsnorm"))
    copy, _ = ceilings()
    rows = []
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
        fla, prep_peer = peer("conv", case, "fla"), peer("postconv", case)
        work = {
            "causal_conv1d": (lambda: conv(x, weight, None, state, seq, activation="silu", conv_layout="cw"), each, fla, 3.6),
            "conv_prep": (
                lambda: prep(x, a, b, weight, None, state, A_log, dt_bias, seq, activation="silu", conv_layout="cw",
                             heads=HEADS, eps=1e-6, allow_neg_eigval=False),
                each + tokens * 32 * 12, fla + prep_peer, 3.5,
            ),
            "gated_rmsnorm": (lambda: norm(o, z, w, eps=1e-6, activation="silu"), 3 * o.nbytes,
                              peer("norm", f"T={tokens} hv=32"), 3.9),
        }  # fmt: skip
        for op, (run, moved, theirs, bar) in work.items():
            ms = replay_ms(run)
            rows.append({"op": op, "tokens": tokens, "ms": ms, "TB/s": moved / ms / 1e9, "of copy": moved / ms / 1e9 / copy,
                         "bar TB/s": bar if tokens >= 8192 else None, "fastest peer ms": theirs, "peer/ours": theirs / ms})  # fmt: skip
    report(
        "conv",
        rows,
        [f"copy {copy:.2f} TB/s; conv_prep's peer is FLA's convolution and vLLM's preparation, two kernels"],
        out,
    )


if __name__ == "__main__":
    typer.run(main)
