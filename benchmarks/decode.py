"""gdn_step, the whole core of a decode step in one kernel, beside the peers' chains: `python benchmarks/decode.py [--out FOLDER]`.

16 key and 32 value heads of 128, bf16 activations, paged states of B + 1 slots; several pools take turns where they
fit into the L2 cache. State TB/s counts the recurrent state read and written. The peer's times are published ones; where
fla-core is installed, its chain for one sequence is measured in the same run.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu import HERE, ceilings, peer, replay_ms, report

import gdnir
from gdnir.lowering import find

H, HV, K, V, C = 16, 32, 128, 128, 8192
OPTIONS = dict(activation="silu", conv_layout="cw", heads=(H, HV, K, V), l2norm_eps=1e-6, allow_neg_eigval=False,
               scale=K**-0.5, state_layout="vk", eps=1e-6, gate="silu")  # fmt: skip


def calls(batch, state_dtype, drafts=1):
    """The step on as many pools as it takes to exceed the L2 cache twice."""
    step = find("gdn_step", "triton").run
    slots = batch * (1 if drafts == 1 else 1 + drafts) + 1
    size = slots * HV * K * V * state_dtype.itemsize
    tokens = batch * drafts
    order = torch.randperm(slots - 1).tolist()
    if drafts == 1:
        seq = gdnir.Seq.decode(order[:batch], device="cuda")
    else:
        writes = [order[batch + n * drafts : batch + (n + 1) * drafts] for n in range(batch)]
        seq = gdnir.Seq.verify([drafts] * batch, read_slots=order[:batch], write_slots=writes, device="cuda")

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    fixed = rand(C, 4), None
    small = rand(HV, dtype=torch.float32), rand(HV, dtype=torch.float32), rand(V)
    acts = rand(tokens, C), rand(tokens, HV, V), rand(tokens, HV), rand(tokens, HV)
    found = []
    for _ in range(max(1, math.ceil(120e6 / size))):
        conv, state = rand(slots, C, 3), rand(slots, HV, V, K, dtype=torch.float32).mul_(0.1).to(state_dtype)
        found.append(lambda c=conv, s=state: step(*acts, *fixed, c, s, *small, seq, **OPTIONS))
    return found


def fla_calls():
    """One sequence through fla-core's convolution update, recurrent rule and gated norm; the rule writes a new state."""
    from fla.modules import FusedRMSNormGated
    from fla.modules.convolution import causal_conv1d_update
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    norm = FusedRMSNormGated(V, eps=1e-6, activation="swish", device="cuda", dtype=torch.bfloat16)
    weight, rate, shift = rand(C, 4), rand(HV, dtype=torch.float32), rand(HV, dtype=torch.float32)
    x, z, a, b = rand(1, C), rand(1, 1, HV, V), rand(1, 1, HV), rand(1, 1, HV)

    @torch.no_grad()
    def chain(cache, state):
        qkv, _ = causal_conv1d_update(x, cache, weight=weight, activation="silu")
        q, k, v = (part.view(1, 1, -1, K) for part in qkv.split([H * K, H * K, HV * V], -1))
        o, _ = fused_recurrent_gated_delta_rule(
            q, k, v, g=a, beta=b, A_log=rate, dt_bias=shift, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
        return norm(o, z)

    pools = [(rand(1, C, 4), rand(1, HV, K, V, dtype=torch.float32).mul_(0.1)) for _ in range(30)]
    return [lambda p=pool: chain(*p) for pool in pools]


def fla_us():
    """Microseconds of fla-core's chain here and now; None without fla-core."""
    try:
        found = fla_calls()
    except ImportError:
        return None
    return replay_ms(*found, replays=60) * 1e3


def main(out: Annotated[Path, typer.Option()] = HERE / "results"):
    copy, _ = ceilings()
    fla = fla_us()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for batch in (1, 8, 32, 128, 256, 512):
            ms = replay_ms(*calls(batch, dtype), replays=60)
            one = HV * K * V * dtype.itemsize
            state = 2 * batch * one
            moved = state + batch * (2 * 3 * C * 2 + C * 2 + 2 * HV * V * 2 + 4 * HV)
            theirs = peer("decode", f"(16,32) B={batch} {name}", "vllm conv+gdr+norm")
            rows.append({"phase": "decode", "state": name, "B": batch, "us": ms * 1e3, "state TB/s": state / ms / 1e9,
                         "of copy": moved / ms / 1e9 / copy, "peer us": theirs * 1e3, "ours/peer": ms / theirs,
                         "fla us": fla if (batch, dtype) == (1, torch.float32) else None})  # fmt: skip
    for batch in (32, 128):
        ms = replay_ms(*calls(batch, torch.float32, drafts=4))
        state = 5 * batch * HV * K * V * 4
        rows.append({"phase": "verify L=4", "state": "float32", "B": batch, "us": ms * 1e3, "state TB/s": state / ms / 1e9,
                     "of copy": state / ms / 1e9 / copy, "peer us": None, "ours/peer": None, "fla us": None})  # fmt: skip
    report(
        "decode",
        rows,
        [
            f"copy {copy:.2f} TB/s; the peer is vLLM's chain of convolution, rule and norm, three kernels",
            "fla us: fla-core's chain in this run",
        ],
        out,
    )


if __name__ == "__main__":
    typer.run(main)
