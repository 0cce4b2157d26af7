"""The delta rule over prefill beside its peers: `python benchmarks/delta_rule.py [--out FOLDER] [--provider gluon]`.

fla-core and FlashInfer are measured in the same run where they are installed; peers_h200.json has more peers, measured on
an H200, and its conditions, which are kept here. Published times are compared with on an H200 only.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, asked, ceilings, chosen, is_h200, peer, replay_ms, report
from peers import fla_rule, flashinfer_rule, measure

import gdnir

HEADS = ((2, 8), (16, 32), (16, 64))
BATCHES = {"1x2048": [2048], "1x8192": [8192], "1x32768": [32768], "4096x8": [4096] * 8, "1024x8": [1024] * 8}
OLMO = {"1x8192": [8192], "4096x8": [4096] * 8}  # 30 heads, K 96, V 192, beta up to 2


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


def floor_ms(heads, lengths, k, v, copy, rate):
    """What the bytes (read and written once) or the products take at the ceilings of this run, whichever is longer."""
    (h, hv), total = heads, sum(lengths)
    moved = total * (4 * h * k + 4 * hv * v + 8 * hv) + len(lengths) * hv * v * k * 8
    flops = total * (hv * (6 * k * v + 4 * 64 * v) + h * 4 * 64 * k)
    return max(moved / copy, flops / rate) / 1e9


def row(case, heads, lengths, k, v, beta_max, provider, wanted, ceiling, notes):
    operands, seq = inputs(heads, lengths, k, v, beta_max)
    attrs = {"scale": k**-0.5, "state_layout": "vk"}
    lowering = chosen("gated_delta_rule", (*operands, seq), attrs, provider)
    calls = {"fla-core": fla_rule(operands, seq) if "fla-core" in wanted else None}
    calls |= flashinfer_rule(operands, seq) if "flashinfer" in wanted else {}
    want = lowering.run(*operands[:5], operands[5].clone(), seq, **attrs)
    theirs = {name: measure(f"{case}, {name}", call and [call], want, notes) for name, call in calls.items()}
    ms = replay_ms(lambda: lowering.run(*operands, seq, **attrs))
    beside = {name: time for name, time in theirs.items() if time is not None}
    vllm, published = peer("prefill", case, "vllm-triton"), peer("prefill", case)
    if is_h200() and published is not None:
        beside["published"] = published
    best = min(beside, key=beside.get, default=None)
    floor = floor_ms(heads, lengths, k, v, *ceiling)
    return {
        "case": case,
        "provider": lowering.provider,
        "ms": ms,
        "floor ms": floor,
        "floor/ours": floor / ms,
        "fla-core ms": theirs.get("fla-core"),
        "flashinfer ms": min((t for n, t in theirs.items() if t and n != "fla-core"), default=None),
        "H200 vllm-triton ms": vllm,
        "H200 fastest ms": published,
        "fastest": best,
        "fastest/ours": beside[best] / ms if best else None,
        "fla-core/ours": beside["fla-core"] / ms if "fla-core" in beside else None,
        "vllm/ours": vllm / ms if is_h200() and vllm else None,
    }


def mean(values):
    """Geometric mean and least of those that are there, as text."""
    found = [value for value in values if value is not None]
    if not found:
        return "not measured"
    return f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}x (least {min(found):.2f}x, {len(found)} rows)"


def main(
    out: Annotated[Path, typer.Option()] = HERE / "results",
    provider: Annotated[str, typer.Option(help="default: what the lowering chooses on this device")] = "default",
    peers: Annotated[str, typer.Option(help="peers to measure in this run")] = "fla-core,flashinfer",
    only: Annotated[str, typer.Option(help="cases whose names have this in them")] = "",
):
    copy, rate = ceilings()
    name, provider = asked("delta_rule", provider)
    wanted, notes, rows, skipped = peers.split(","), [], [], []
    cases = [(f"({h[0]},{h[1]}) {b}", h, lengths, 128, 128, 1.0) for h in HEADS for b, lengths in BATCHES.items()]
    cases += [(f"OLMo (30,30) {b}", (30, 30), lengths, 96, 192, 2.0) for b, lengths in OLMO.items()]
    for case in (c for c in cases if only in c[0]):
        try:
            rows.append(row(*case, provider, wanted, (copy, rate), notes))
        except gdnir.GdnirError as refusal:
            skipped.append(f"{case[0]}: left out. {' '.join(str(refusal).split())}")
        torch.cuda.empty_cache()
    if not rows:
        raise SystemExit("\n".join(skipped))
    main_rows = [r for r in rows if not r["case"].startswith("OLMo")]
    used = sorted({r["fastest"] for r in main_rows if r["fastest"]})
    notes = [
        f"copy {copy:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s; ratios are the peer's time over ours",
        f"geometric mean over the rows of K = V = 128, fastest of {', '.join(used) or 'no peer'}: "
        f"{mean(r['fastest/ours'] for r in main_rows)}",
        f"fla-core of this run: {mean(r['fla-core/ours'] for r in main_rows)}; "
        f"vllm-triton as published for an H200 (bar 1.7, least 1): {mean(r['vllm/ours'] for r in main_rows)}",
        "published times are part of these ratios"
        if is_h200()
        else "this card is no H200: published times are printed, no ratio uses them",
        *skipped,
        *notes,
    ]
    report(name, rows, notes, out, copy)


if __name__ == "__main__":
    typer.run(main)
