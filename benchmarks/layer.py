"""A whole Qwen3-Next layer through a plan beside its peers: `python benchmarks/layer.py [--out FOLDER] [--provider OP=NAME]`.

Hidden 2048, 16 key and 32 value heads of 128, bf16, f32 states: prefill of one sequence, decode of B sequences; the
matrix products alone beside it; and what the first calls of a process cost with an empty and with a filled cache.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, chain_ms, chain_note, is_h200, peer, replay_ms, report

import gdnir

PHASES = "prefill", "decode"
SIZES = [("prefill", t) for t in (2048, 8192, 32768)] + [("decode", b) for b in (1, 32, 128, 256)]
BARS = {("prefill", 2048): 0.40, ("prefill", 8192): 1.40, ("prefill", 32768): 5.4,
        ("decode", 32): 0.077, ("decode", 128): 0.176, ("decode", 256): 0.313}  # fmt: skip


def batch(phase, count):
    """One sequence of `count` tokens, or `count` sequences of one."""
    if phase == "prefill":
        return gdnir.Seq.prefill([count], slots=[0], device="cuda")
    return gdnir.Seq.decode(list(range(count)), device="cuda")


def build(phase, providers):
    """(plan, the providers of its kernels) on random weights, and the state of 257 slots."""
    config = gdnir.models.config("qwen3-next-80b-a3b")
    graph = gdnir.models.trace(config, phase=phase)
    inside = {n.op for n in gdnir.lower(graph).graph.nodes}
    asked = {op: names for op, names in providers.items() if op in inside}  # each phase has ops of its own
    plan = gdnir.Plan(gdnir.lower(graph, providers=asked), gdnir.models.random_weights(config))
    used = ", ".join(f"{n.op}@{n.provider}" for n in plan.graph.nodes if not n.folded and n.provider != "native")
    return plan, used, gdnir.StatePool(config, slots=257, layers=[0], device="cuda").layer(0)


def first_calls(providers):
    """Seconds of the first prefill and the first decode call of this process, after imports and the start of CUDA."""
    torch.zeros(1, device="cuda").add_(1)
    seconds = {}
    with torch.no_grad():
        for phase in PHASES:
            plan, _, state = build(phase, providers)
            seq = batch(phase, 64 if phase == "prefill" else 1)
            x = torch.randn(seq.num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
            torch.nn.functional.linear(x, x)  # cuBLAS
            torch.cuda.synchronize()
            start = time.perf_counter()
            plan(x, state, seq)
            torch.cuda.synchronize()
            seconds[phase] = time.perf_counter() - start
    return seconds


def fresh_processes(provider):
    """first_calls of a process with an empty Triton cache, then of one with the cache that it left."""
    found = []
    asked = [word for item in provider for word in ("--provider", item)]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, __file__, "--first", *asked],
                env={**os.environ, "TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise SystemExit(f"a fresh process failed:\n{run.stderr[-2000:]}")
            found.append(json.loads(run.stdout.splitlines()[-1]))
    return found


def main(
    out: Annotated[Path, typer.Option()] = HERE / "results",
    provider: Annotated[list[str] | None, typer.Option(help="OP=NAME,NAME as gdnir takes it; repeatable")] = None,
    name: Annotated[str, typer.Option(help="of the results")] = "layer",
    first: Annotated[bool, typer.Option("--first", hidden=True)] = False,
):
    providers = {op: names.split(",") for op, _, names in (item.partition("=") for item in provider or [])}
    if first:
        print(json.dumps(first_calls(providers)))
        return
    rows, notes = [], []
    cold, warm = fresh_processes(provider or [])
    with torch.no_grad():
        w_in, w_out = (torch.randn(*s, device="cuda").bfloat16() for s in ((12352, 2048), (2048, 4096)))
        plans = {phase: build(phase, providers) for phase in PHASES}
        for phase, count in SIZES:
            plan, _, state = plans[phase]
            seq = batch(phase, count)
            x = torch.randn(seq.num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
            core = torch.randn(seq.num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
            run = lambda p=plan, x=x, s=seq, t=state: p(x, t, s)
            ms, chained = replay_ms(run), chain_ms(run)
            products = replay_ms(
                lambda x=x, c=core: (torch.nn.functional.linear(x, w_in), torch.nn.functional.linear(c, w_out))
            )
            start = time.perf_counter()
            for _ in range(50):
                plan(x, state, seq)
            host = (time.perf_counter() - start) / 50 * 1e6
            torch.cuda.synchronize()
            part, case = ("layer", f"T={count}") if phase == "prefill" else ("layerdec", f"B={count}")
            vllm = peer(part, f"H=2048 (16,32) {case}", "vllm")
            rows.append({"phase": phase, "tokens": count, "ms": ms, "chain ms": chained, "products alone ms": products, "core ms": ms - products,
                         "bar ms": BARS.get((phase, count)) if is_h200() else None, "H200 vllm ms": vllm,
                         "vllm/ours": vllm / ms if is_h200() else None, "host us a call": host})  # fmt: skip
    for phase in PHASES:
        notes.append(f"{phase}: {plans[phase][1]}")
        notes.append(
            f"first {phase} call: {cold[phase]:.2f} s with an empty cache, {warm[phase]:.2f} s with a filled one"
        )
    notes.append(chain_note())
    notes.append(
        "prefill is one sequence of `tokens`, decode `tokens` sequences of one; host time while the device lags behind"
        + ("" if is_h200() else "; vLLM's times and the bars are an H200's, no ratio uses them here")
    )
    report(name, rows, notes, out)


if __name__ == "__main__":
    typer.run(main)
