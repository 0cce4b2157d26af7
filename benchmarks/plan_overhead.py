"""What a plan adds to calling the lowerings by hand, per node: `python benchmarks/plan_overhead.py`.

A tiny decode step, so that Python is what is measured; both sides run the same lowerings on the same tensors.
"""

import statistics
import time

import torch
from rich.console import Console

import gdnir
from gdnir.lowering import native_impl as native

PAIRS = 3000


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fields = dict(model_type="qwen3_next", hidden_size=16, num_hidden_layers=4, linear_num_key_heads=1, linear_num_value_heads=2,
                  linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip
    config = gdnir.models.config(fields)
    plan = gdnir.Plan(
        gdnir.lower(gdnir.models.trace(config, phase="decode", dtype=torch.float32), "cpu"),
        gdnir.models.random_weights(config),
    )
    state = gdnir.StatePool(config, slots=2, conv_dtype=torch.float32, layers=[0]).layer(0)
    seq, x = gdnir.Seq.decode([0]), torch.randn(1, 16)
    w = {value.name: tensor for value, tensor in plan.bound.items()}

    def by_hand():
        qkv, z, b, a = native.in_proj_merged(x, w["in_proj_merged"], heads=config.heads)
        y = native.causal_conv1d(qkv, w["conv1d"], None, state.conv, seq, activation="silu", conv_layout="cw")
        q, k, v = native.split_qkv(y, heads=config.heads)
        g, beta = native.gdn_gate(a, b, w["A_log"], w["dt_bias"], allow_neg_eigval=False)
        q, k = native.l2norm(q, eps=1e-6), native.l2norm(k, eps=1e-6)
        o = native.gated_delta_rule(q, k, v, g, beta, state.ssm, seq, scale=8**-0.5, state_layout="vk")
        y = native.gated_rmsnorm(o, native.zero_padding(z, seq), w["norm"], eps=1e-6, activation="silu")
        return native.out_proj(y, w["out_proj"])

    nodes = sum(not n.folded for n in plan.graph.nodes)
    runs = {"by hand": by_hand, "plan": lambda: plan(x, state, seq)}
    spans = {name: [] for name in runs}
    with torch.no_grad():
        for pair in range(PAIRS):
            # One call of each, in turns: what else the machine does then falls on both alike.
            for name in sorted(runs, reverse=pair % 2 == 0):
                start = time.perf_counter()
                runs[name]()
                spans[name].append((time.perf_counter() - start) * 1e6)
    differences = [p - h for h, p in zip(spans["by hand"], spans["plan"], strict=True)]
    Console().print(
        f"by hand {statistics.median(spans['by hand']):.1f} us, plan {statistics.median(spans['plan']):.1f} us, {nodes} nodes: "
        f"{statistics.median(differences) / nodes:.2f} us a node (bar 5)"
    )


if __name__ == "__main__":
    main()
