"""gdn_step, the whole core of a decode step in one kernel, beside the peers' chains: `python benchmarks/decode.py [--out FOLDER]
[--provider triton]`.

16 key and 32 value heads of 128 (OLMo-hybrid: 30 heads, K 96, V 192, beta up to 2), bf16 activations, paged states of
B + 1 slots, which sequences have in random order ("in order": as they come); several pools take turns where they fit into
the L2 cache, as layers do ("one pool": only one, part of which is still there, as in the published times). State TB/s
counts the recurrent state read and written. fla-core's chain is measured in the same run where it is installed.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, asked, ceilings, chain_ms, chain_note, chosen, is_h200, peer, replay_ms, report
from peers import fla_chain, measure, peer_chain_ms

import gdnir

QWEN, OLMO = (16, 32, 128, 128), (30, 30, 96, 192)
BATCHES = 1, 8, 32, 128, 256, 512


def rand(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def calls(batch, state_dtype, provider, heads=QWEN, drafts=1, beside=False, in_order=False, one_pool=False):
    """(ours, fla-core's chain, torch's multiplication in place of as many bytes of state): each on as many pools as it takes to
    exceed the L2 cache twice, or on one; our first result, and the provider of our kernel."""
    h, hv, k, v = heads
    slots = batch * (1 if drafts == 1 else 1 + drafts) + 1
    tokens, channels = batch * drafts, 2 * h * k + hv * v
    order = list(range(slots - 1)) if in_order else torch.randperm(slots - 1).tolist()
    if drafts == 1:
        seq = gdnir.Seq.decode(order[:batch], device="cuda")
    else:
        writes = [order[batch + n * drafts : batch + (n + 1) * drafts] for n in range(batch)]
        seq = gdnir.Seq.verify([drafts] * batch, read_slots=order[:batch], write_slots=writes, device="cuda")
    options = dict(activation="silu", conv_layout="cw", heads=heads, l2norm_eps=1e-6, allow_neg_eigval=heads == OLMO,
                   scale=k**-0.5, state_layout="vk", eps=1e-6, gate="silu")  # fmt: skip
    weight = rand(channels, 4)
    small = rand(hv, dtype=torch.float32), rand(hv, dtype=torch.float32), rand(v)
    acts = rand(tokens, channels), rand(tokens, hv, v), rand(tokens, hv), rand(tokens, hv)
    ours, chains, plain, lowering = [], [], [], None
    for _ in range(1 if one_pool else max(1, math.ceil(120e6 / (slots * hv * k * v * state_dtype.itemsize)))):
        conv, state = rand(slots, channels, 3), rand(slots, hv, v, k, dtype=torch.float32).mul_(0.1).to(state_dtype)
        if beside and (chain := fla_chain(acts, weight, small, conv, state, order[:batch], heads, heads == OLMO)):
            chains.append(chain)
        operands = *acts, weight, None, conv, state, *small, seq
        lowering = lowering or chosen("gdn_step", operands, options, provider)
        plain.append(lambda s=state[:batch]: s.mul_(0.999))
        ours.append(lambda operands=operands: lowering.run(*operands, **options))
    return ours, chains, plain, ours[0](), lowering.provider


def row(phase, batch, dtype, heads, provider, copy, notes, drafts=1, published=False, in_order=False, one_pool=False):
    hv, k, v = heads[1:]
    name = str(dtype).removeprefix("torch.")
    beside = drafts == 1 and dtype == torch.float32 and not (in_order or one_pool)  # fla-core's states are f32
    ours, chains, plain, first, used = calls(batch, dtype, provider, heads, drafts, beside, in_order, one_pool)
    vllm = peer("decode", f"(16,32) B={batch} {name}", "vllm conv+gdr+norm") if published else None
    theirs = measure(f"{phase} B={batch}, fla-core", chains, first, notes)
    ms, chained = replay_ms(*ours, replays=60), chain_ms(*ours)
    beside_chained = theirs and measure(
        f"{phase} B={batch}, fla-core in a chain", chains, None, notes, timed=peer_chain_ms
    )
    plain_ms = chain_ms(*plain) if drafts == 1 else None
    state = (1 + drafts) * batch * hv * k * v * dtype.itemsize
    moved = state + batch * drafts * (2 * (2 * heads[0] * k + hv * v) + 4 * hv * v + 4 * hv)
    moved += (1 + drafts) * batch * 3 * 2 * (2 * heads[0] * k + hv * v)
    return {
        "phase": phase,
        "provider": used,
        "state": name,
        "B": batch,
        "us": ms * 1e3,
        "state TB/s": state / ms / 1e9,
        "of copy": moved / ms / 1e9 / copy,
        "fla-core us": theirs and theirs * 1e3,
        "ours/fla-core": theirs and ms / theirs,
        "chain us": chained * 1e3,
        "chain of copy": moved / chained / 1e9 / copy,
        "fla-core chain us": beside_chained and beside_chained * 1e3,
        "mul_ chain us": plain_ms and plain_ms * 1e3,
        "H200 vllm us": vllm and vllm * 1e3,
        "ours/vllm": ms / vllm if vllm and is_h200() else None,
    }


def main(
    out: Annotated[Path, typer.Option()] = HERE / "results",
    provider: Annotated[str, typer.Option(help="default: what the lowering chooses on this device")] = "default",
):
    name, provider = asked("decode", provider)
    copy, _ = ceilings()
    rows, notes = [], [chain_note()]
    for dtype in (torch.float32, torch.bfloat16):
        for batch in BATCHES:
            rows.append(row("decode", batch, dtype, QWEN, provider, copy, notes, published=True))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 32, 128):
            rows.append(row("verify L=4", batch, dtype, QWEN, provider, copy, notes, drafts=4))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (32, 128, 512):
            rows.append(row("decode, slots in order", batch, dtype, QWEN, provider, copy, notes, in_order=True))
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8, 32):  # larger ones have one pool in any case
            rows.append(
                row("decode, one pool", batch, dtype, QWEN, provider, copy, notes, published=True, one_pool=True)
            )
    for batch in (1, 32, 128):
        rows.append(row("decode OLMo", batch, torch.float32, OLMO, provider, copy, notes))
    report(
        name,
        rows,
        [
            f"copy {copy:.2f} TB/s; both peers take three kernels, convolution, rule and norm, fla-core's of this run",
            "mul_: torch's, in place, on as much state and nothing else",
            "bars: B = 1 at most 0.65 of the three kernels, OLMo at most 1; vLLM's are published for an H200"
            + ("" if is_h200() else ", which this card is not: no ratio uses it"),
            *notes,
        ],
        out,
        copy,
    )


if __name__ == "__main__":
    typer.run(main)
