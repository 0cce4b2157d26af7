"""Every kernel once or twice on small shapes, to be run under compute-sanitizer, which tells of bad accesses and races:

    compute-sanitizer --tool memcheck python tests/gpu/sanitizer_smoke.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitizer_smoke.py decode verify   # cases whose names have a word
    python tests/gpu/sanitizer_smoke.py --list

compute-sanitizer 2026.4 or newer (`nvidia-cuda-sanitizer-api` on PyPI): racecheck of 2025.3 knows no bulk copies, and completes a
barrier with arrivals at another, so it calls the words a race through which Triton's `warp_specialize` starts its partitions.

A first run without the tool compiles the kernels, so that only their execution is slow under it. Each tensor is an
allocation of its own, so that an access beyond its end is seen. Only what is wrong with memory is looked for here:
outputs are not compared, but a case whose outputs are not finite fails.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import triton_cases as base
import triton_cases_gluon as gluon
import triton_cases_rule as rule
import triton_cases_step as step

from gdnir.lowering import triton_launch, triton_step

DEVICE = "cuda"
BF16, F32 = torch.bfloat16, torch.float32
# A row shorter than a tile, one that ends in the next, an empty one, a padding one, and tokens of nobody.
PREFILL = ((5, True, 1, 1), (66, False, 0, 0), (0, True, 2, 2), (3, True, -1, 3), (1, True, 3, 4))
HEADS = (2, 4, 128, 128)
ODD = (1, 2, 24, 48)  # no powers of two: masked lanes


def tensor(*shape, dtype=BF16):
    return torch.randn(shape).to(DEVICE, dtype)


def conv(phase, layout="cw", channels=72):
    rows = {"prefill": PREFILL, "decode": base.DECODE, "verify": base.VERIFY}[phase]
    case = base.Case("", phase, rows, tail=3, slots=22, channels=channels, layout=layout)
    seq = base.make_seq(case, DEVICE)
    pool = tensor(22, channels, 3) if layout == "cw" else tensor(22, 3, channels)
    x, weight, bias = tensor(seq.num_tokens, channels), tensor(channels, 4), tensor(channels)
    y = triton_launch.causal_conv1d(x, weight, bias, pool, seq, activation="silu", conv_layout=layout)
    return y, pool


def prep(heads):
    h, hv, k, v = heads
    seq = base.make_seq(base.Case("", "prefill", PREFILL, tail=3), DEVICE)
    channels = 2 * h * k + hv * v
    pool, shift = tensor(8, channels, 3), tensor(hv, dtype=F32)
    x, a, b = tensor(seq.num_tokens, channels + 2 * hv).split([channels, hv, hv], 1)
    return *triton_launch.conv_prep(
        x, a, b, tensor(channels, 4), None, pool, shift, shift, seq, activation="silu", conv_layout="cw", heads=heads,
        eps=1e-6, allow_neg_eigval=False,
    ), pool  # fmt: skip


def prefill(heads, rows=PREFILL, segment=0, layout="vk"):
    case = rule.Case("", rows, heads, tail=3, segment=segment, layout=layout)
    seq = base.make_seq(case, DEVICE)
    inputs = rule.make_inputs(case, seq, BF16, DEVICE, torch.Generator().manual_seed(0))
    pool = tensor(8, heads[1], heads[3], heads[2], dtype=F32)
    pool = pool if layout == "vk" else pool.transpose(2, 3).contiguous()
    return rule.run(case, inputs, pool, seq, 0.1), pool


def fused(phase, heads, state=F32, by=""):
    case = step.Case("", phase, step.ROWS[phase], heads=heads, slots=22, tail=1, bias=True, by=by)
    given = step.make_step(case, BF16, DEVICE, state)
    for x in (*given.operands[:4], *given.storages):
        x.nan_to_num_()
    return step.run_step(given), *given.storages


def rule_step(phase, heads):
    h, hv, k, v = heads
    seq = base.make_seq(base.Case("", phase, step.ROWS[phase], tail=1), DEVICE)
    tokens, state = seq.num_tokens, tensor(22, hv, v, k, dtype=F32)
    g, beta = -tensor(tokens, hv, dtype=F32).abs(), tensor(tokens, hv, dtype=F32).sigmoid()
    q, key = (torch.nn.functional.normalize(tensor(tokens, h, k), dim=-1) for _ in range(2))
    o = triton_step.delta_rule_step(
        q, key, tensor(tokens, hv, v), g, beta, state, seq, scale=0.1, state_layout="vk"
    )  # fmt: skip
    return o, state


def wgmma(schedule, segment):
    rows = ((200, True, 0, 0), (0, True, 1, 2), (3, False, 3, 3), (70, True, -1, 4)) if segment else PREFILL
    case = gluon.Case("", rows, tail=3, heads=(1, 2), segment=segment)
    seq = gluon.make_seq(case, DEVICE)
    inputs = [x.nan_to_num() for x in gluon.make_inputs(case, gluon.make_seq(case, "cpu"), DEVICE)[0]]
    pool = tensor(case.slots, 2, 128, 128, dtype=F32)
    with pytest.MonkeyPatch.context() as patch:
        gluon.only(schedule, patch)
        return gluon.run(case, seq, inputs, pool), pool


CASES = {
    "conv-prefill": lambda: conv("prefill"),
    "conv-prefill-wc": lambda: conv("prefill", "wc"),
    "conv-decode": lambda: conv("decode"),
    "conv-verify": lambda: conv("verify", "wc"),
    "prep": lambda: prep(HEADS),
    "prep-odd": lambda: prep(ODD),
    "rule-prefill": lambda: prefill(HEADS),
    "rule-prefill-small-kv": lambda: prefill((1, 2, 16, 48), layout="kv"),
    "rule-prefill-segments": lambda: prefill((1, 2, 64, 64), rows=((64 * 5 + 9, True, 0, 0), *PREFILL[1:]), segment=1),
    "rule-decode": lambda: rule_step("decode", HEADS),
    "rule-verify": lambda: rule_step("verify", ODD),
    "step-decode": lambda: fused("decode", HEADS),
    "step-decode-odd": lambda: fused("decode", ODD, BF16),
    "step-verify": lambda: fused("verify", HEADS),
    "step-verify-odd": lambda: fused("verify", ODD, BF16),
    "norm": lambda: (
        triton_launch.gated_rmsnorm(
            tensor(17, 3, 96), tensor(17, 3, 96), tensor(96, dtype=F32), eps=1e-6, activation="silu"
        ),
    ),
    "l2norm": lambda: (triton_step.l2norm(tensor(17, 3, 96), eps=1e-6),),
    "gate": lambda: triton_step.gdn_gate(
        tensor(17, 6), tensor(17, 6), tensor(6, dtype=F32), tensor(6, dtype=F32), allow_neg_eigval=True
    ),
    "gluon-step-clusters": lambda: fused("decode", HEADS, by="clusters"),
    "gluon-step-clusters-verify": lambda: fused("verify", (1, 3, 96, 192), BF16, by="clusters"),
    "gluon-step-tiles": lambda: fused("decode", (1, 3, 96, 192), by="tiles"),
    "gluon-step-tiles-verify": lambda: fused("verify", (1, 3, 96, 192), by="tiles"),
    "gluon-step-bulk": lambda: fused("decode", HEADS, by="tiles"),
    "gluon-step-bulk-more": lambda: fused("decode", HEADS, by=1),
    "gluon-step-bulk-16": lambda: fused("decode", HEADS, BF16, by="tiles"),
    "gluon-step-bulk-16-more": lambda: fused("decode", HEADS, BF16, by=1),
    "gluon-step-bulk-16-many": lambda: fused("decode", HEADS, BF16, by=2),
    "gluon-step-bulk-verify": lambda: fused("verify", HEADS, by="tiles"),
    "gluon-step-bulk-verify-16": lambda: fused("verify", (1, 4, 128, 128), BF16, by="tiles"),
    "gluon-single": lambda: wgmma("single", 0),
    "gluon-pair": lambda: wgmma("pair", 0),
    "gluon-single-segments": lambda: wgmma("single", 1),
    "gluon-pair-segments": lambda: wgmma("pair", 1),
}


def main(words: list[str]) -> int:
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    if words == ["--list"]:
        print("\n".join(CASES))
        return 0
    if not chosen:
        print(f"No case has any of {', '.join(words)} in its name: {', '.join(CASES)}.")
        return 2
    failed = []
    for name in chosen:
        if name.startswith("gluon") and torch.cuda.get_device_capability() != (9, 0):
            print(f"{name}: left out, needs sm_90", flush=True)
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        outputs = CASES[name]()
        torch.cuda.synchronize()
        finite = all(bool(x.isfinite().all()) for x in outputs)
        failed += [] if finite else [name]
        said = "finite" if finite else "NOT FINITE"
        print(f"{name}: {said}, {time.monotonic() - start:.1f} s", flush=True)
        del outputs
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} cases are fine{': not ' + ', '.join(failed) if failed else ''}."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
