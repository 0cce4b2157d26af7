"""A whole Qwen3-Next layer through a plan beside its peers: `python benchmarks/layer.py [--out FOLDER]`.

Hidden 2048, 16 key and 32 value heads of 128, bf16, f32 states: prefill of one sequence, decode of B sequences; the
matrix products alone beside it; and what the first call of a process costs.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, peer, replay_ms, report

import gdnir


def main(out: Annotated[Path, typer.Option()] = HERE / "results"):
    config = gdnir.models.config("qwen3-next-80b-a3b")
    weights = gdnir.models.random_weights(config)
    torch.empty(1, device="cuda")
    rows, notes, plans = [], [], {}
    pool = gdnir.StatePool(config, slots=257, layers=[0], device="cuda")
    layer = pool.layer(0)
    with torch.no_grad():
        for phase in ("prefill", "decode"):
            plans[phase] = gdnir.Plan(gdnir.lower(gdnir.models.trace(config, phase=phase)), weights)
            seq = gdnir.Seq.prefill([64], slots=[0], device="cuda") if phase == "prefill" else gdnir.Seq.decode([0], device="cuda")  # fmt: skip
            x = torch.randn(seq.num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
            torch.cuda.synchronize()
            start = time.perf_counter()
            plans[phase](x, layer, seq)
            torch.cuda.synchronize()
            notes.append(f"first {phase} call: {time.perf_counter() - start:.2f} s (with whatever Triton's cache held)")
        w_in, w_out = (torch.randn(*s, device="cuda").bfloat16() for s in ((12352, 2048), (2048, 4096)))
        sizes = [("prefill", t, 1) for t in (2048, 8192, 32768)] + [("decode", 1, b) for b in (1, 32, 128, 256)]
        bars = {("prefill", 2048): 0.40, ("prefill", 8192): 1.40, ("prefill", 32768): 5.4,
                ("decode", 32): 0.077, ("decode", 128): 0.176, ("decode", 256): 0.313}  # fmt: skip
        for phase, tokens, batch in sizes:
            seq = (gdnir.Seq.prefill([tokens], slots=[0], device="cuda") if phase == "prefill"
                   else gdnir.Seq.decode(list(range(batch)), device="cuda"))  # fmt: skip
            x = torch.randn(seq.num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
            core = torch.randn(seq.num_tokens, 4096, device="cuda", dtype=torch.bfloat16)
            plan = plans[phase]
            ms = replay_ms(lambda p=plan, x=x, s=seq: p(x, layer, s))
            products = replay_ms(
                lambda x=x, c=core: (torch.nn.functional.linear(x, w_in), torch.nn.functional.linear(c, w_out))
            )
            start = time.perf_counter()
            for _ in range(50):
                plan(x, layer, seq)
            host = (time.perf_counter() - start) / 50 * 1e6
            torch.cuda.synchronize()
            count = tokens if phase == "prefill" else batch
            part, case = ("layer", f"H=2048 (16,32) T={count}") if phase == "prefill" else ("layerdec", f"H=2048 (16,32) B={count}")  # fmt: skip
            vllm = peer(part, case, "vllm")
            rows.append({"phase": phase, "tokens": count, "ms": ms, "bar": bars.get((phase, count)), "products alone": products,
                         "vllm": vllm, "vllm/ours": vllm / ms, "host us a call": host})  # fmt: skip
    notes.append(
        "prefill is one sequence of `tokens`, decode `tokens` sequences of one; host time while the device lags behind"
    )
    report("layer", rows, notes, out)


if __name__ == "__main__":
    typer.run(main)
