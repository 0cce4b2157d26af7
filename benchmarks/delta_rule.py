"""The delta rule over prefill beside its peers: `python benchmarks/delta_rule.py [--out FOLDER] [--provider triton]`.

Conditions and peers' times: peers_h200.json. fla-core is measured in the same run where it is installed.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, ceilings, peer, replay_ms, report

import gdnir
from gdnir.lowering import find

HEADS = ((2, 8), (16, 32), (16, 64))
BATCHES = {"1x2048": [2048], "1x8192": [8192], "1x32768": [32768], "4096x8": [4096] * 8, "1024x8": [1024] * 8}


def inputs(heads, lengths, k=128, v=128, beta_max=1.0):
    """(q, k, v, g, beta, state), batch: random, a quarter of the heads without decay."""
    (h, hv), total = heads, sum(lengths)
    gen = torch.Generator("cuda").manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, device="cuda", generator=gen)

    q, key = (torch.nn.functional.normalize(rand(total, h, k), dim=-1).bfloat16() for _ in range(2))
    g = torch.nn.functional.logsigmoid(rand(total, hv)) / 16
    g[:, : hv // 4] = 0
    operands = (
        q,
        key,
        rand(total, hv, v).bfloat16(),
        g,
        torch.sigmoid(rand(total, hv)) * beta_max,
        rand(len(lengths), hv, v, k),
    )
    return operands, gdnir.Seq.prefill(lengths, slots=list(range(len(lengths))), has_state=True, device="cuda")


def fla(operands, seq, heads, k):
    """fla-core's chunk_gated_delta_rule on the same operands as a function of no arguments; None if not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    q, key, v, g, beta, state = operands
    start = state.transpose(-1, -2).contiguous()
    cu = seq.cu_seqlens.long()
    many = seq.num_seqs > 1

    @torch.inference_mode()
    def run():
        return chunk_gated_delta_rule(
            q[None], key[None], v[None], g[None], beta[None], scale=k**-0.5, initial_state=start,
            output_final_state=True, cu_seqlens=cu if many else None,
        )  # fmt: skip

    return run


def eager_ms(run, repeats=20):
    """Median of CUDA events around calls, for what syncs with the host and cannot be captured."""
    for _ in range(3):
        run()
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return sorted(spans)[len(spans) // 2]


def main(out: Annotated[Path, typer.Option()] = HERE / "results", provider: Annotated[str, typer.Option()] = "triton"):
    rule = find("gated_delta_rule", provider).run
    copy, rate = ceilings()
    rows, ratios = [], []
    for heads in HEADS:
        for name, lengths in BATCHES.items():
            operands, seq = inputs(heads, lengths)
            ms = replay_ms(lambda o=operands, s=seq: rule(*o, s, scale=128**-0.5, state_layout="vk"))
            case = f"({heads[0]},{heads[1]}) {name}"
            vllm, best = peer("prefill", case, "vllm-triton"), peer("prefill", case)
            total = sum(lengths)
            moved = total * (512 * heads[0] + 512 * heads[1] + 8 * heads[1]) + len(lengths) * heads[1] * 131072
            flops = total * (heads[1] * 131072 + heads[0] * 32768)
            floor = max(moved / copy / 1e9, flops / rate / 1e9)
            ratios.append((vllm / ms, best / ms))
            rows.append({"case": case, "ms": ms, "floor": floor, "vllm-triton": vllm, "vllm/ours": vllm / ms,
                         "fastest peer": best, "peer/ours": best / ms})  # fmt: skip
    mean = [math.exp(sum(math.log(r[i]) for r in ratios) / len(ratios)) for i in (0, 1)]
    olmo, seq = inputs((30, 30), [8192], 96, 192, 2.0)
    ours = replay_ms(lambda: rule(*olmo, seq, scale=96**-0.5, state_layout="vk"))
    theirs = fla(olmo, seq, (30, 30), 96)
    fla_ms = None if theirs is None else eager_ms(theirs)
    notes = [
        f"copy {copy:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s",
        f"geometric mean: {mean[0]:.2f}x vllm-triton (bar 1.7), {mean[1]:.2f}x the fastest peer; "
        f"slowest row {min(r[0] for r in ratios):.2f}x vllm-triton (bar 1), {min(r[1] for r in ratios):.2f}x the fastest peer",
        f"OLMo-hybrid, 30 heads, K 96, V 192, 8192 tokens: {ours:.3f} ms, fla-core {fla_ms} ms (same run, events)",
    ]
    report(f"delta_rule_{provider}", rows, notes, out)


if __name__ == "__main__":
    typer.run(main)
