"""Native on a CPU beside transformers' torch functions, in one run: `python benchmarks/cpu_speed.py`.

Prefill: the delta rule at T = 1024, 16/32 heads of 128, f32. Decode: one step of 32 sequences, the plan's whole
core in place on a pool, beside transformers' recurrent function alone. Medians; the bars are ratios.
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers.models.qwen3_next import modeling_qwen3_next as hf

import gdnir
from gdnir.lowering.native_impl import gated_delta_rule

H, HV, K, V, T, B = 16, 32, 128, 128, 1024, 32


def median(*runs, rounds=15):
    """Medians of several functions, called in turn so that noise falls on all alike."""
    spans = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for run, seen in zip(runs, spans, strict=True):
            start = time.perf_counter()
            run()
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in spans]


def prefill():
    normal = torch.nn.functional.normalize
    q, k, v = normal(torch.randn(T, H, K), dim=-1), normal(torch.randn(T, H, K), dim=-1), torch.randn(T, HV, V)
    g, beta = torch.nn.functional.logsigmoid(torch.randn(T, HV)) / 16, torch.rand(T, HV)
    seq, pool = gdnir.Seq.prefill([T], slots=[0]), torch.zeros(1, HV, V, K)
    wide = [x.repeat_interleave(HV // H, 1)[None] for x in (q, k)]
    return median(
        lambda: hf.torch_chunk_gated_delta_rule(*wide, v[None], g=g[None], beta=beta[None], output_final_state=True),
        lambda: gated_delta_rule(q, k, v, g, beta, pool, seq, scale=K**-0.5, state_layout="vk"),
    )


def decode():
    config = gdnir.models.config("qwen3-next")
    graph = gdnir.models.trace(config, phase="decode", region="core", dtype=torch.float32)
    plan = gdnir.Plan(gdnir.lower(graph, "cpu"), gdnir.models.random_weights(config))
    pool = gdnir.StatePool(config, slots=B + 1, conv_dtype=torch.float32, layers=[0])
    seq = gdnir.Seq.decode(torch.randperm(B + 1)[:B].tolist())
    acts = torch.randn(B, config.channels), torch.randn(B, HV, V), torch.randn(B, HV), torch.randn(B, HV)
    q, k, v, g, beta = (
        torch.randn(B, 1, HV, K),
        torch.randn(B, 1, HV, K),
        torch.randn(B, 1, HV, V),
        -torch.rand(B, 1, HV),
        torch.rand(B, 1, HV),
    )
    state = torch.randn(B, HV, K, V)
    return median(
        lambda: hf.torch_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        ),
        lambda: plan(*acts, pool.layer(0), seq),
    )


def main():
    torch.manual_seed(0)
    table = Table(title=f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of 15")
    for name in ("what", "transformers, ms", "gdnir native, ms", "ratio", "bar"):
        table.add_column(name, justify="left" if name == "what" else "right")
    with torch.no_grad():
        for name, (theirs, ours), bar in (
            ("prefill 1024, rule", prefill(), 1.8),
            ("decode 32, whole core", decode(), 3.0),
        ):
            table.add_row(name, f"{theirs * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{theirs / ours:.2f}", f">= {bar}")
    Console().print(table)


if __name__ == "__main__":
    main()
