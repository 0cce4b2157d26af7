"""`batch_invariant`: a row's bits are those that it has alone, whatever lies around it in the batch."""

from __future__ import annotations

import random

import torch
from triton_cases import bits

import gdnir
from gdnir.lowering import find

LENGTHS = (0, 1, 3, 63, 64, 65, 200, 700, 1500)


def _row(length, heads, device, gen):
    """(q, k, v, g, beta), state of one row."""
    h, hv, key_dim, value_dim = heads

    def rand(*shape):
        return torch.randn(*shape, generator=gen)

    q, k = (torch.nn.functional.normalize(rand(length, h, key_dim), dim=-1).bfloat16() for _ in range(2))
    g = torch.nn.functional.logsigmoid(rand(length, hv)) / 16
    operands = q, k, rand(length, hv, value_dim).bfloat16(), g, rand(length, hv).sigmoid()
    return [x.to(device) for x in operands], rand(hv, value_dim, key_dim).to(device)


def check_compositions(provider, heads, device, count=200, lengths=LENGTHS, neighbours=6):
    """One row among `count` random sets of others, at random places and slots."""
    run = find("gated_delta_rule", provider).chosen(True).run
    gen, choose = torch.Generator().manual_seed(0), random.Random(0)

    def rule(rows, slots):
        seq = gdnir.Seq.prefill([len(row[0][0]) for row in rows], slots=slots, has_state=True, device=device)
        pool = torch.full((16, *rows[0][1].shape), float("nan"), device=device)
        pool[slots] = torch.stack([state for _, state in rows])
        operands = [torch.cat(parts) for parts in zip(*(row[0] for row in rows), strict=True)]
        return run(*operands, pool, seq, scale=heads[2] ** -0.5, state_layout="vk"), pool

    alone = {}
    others = [_row(n, heads, device, gen) for n in lengths for _ in range(3)]
    differ = []
    for _ in range(count):
        length = choose.choice(lengths)
        if length not in alone:
            row = _row(length, heads, device, gen)
            o, pool = rule([row], [5])
            alone[length] = row, o.clone(), pool[5].clone()
        row, own_o, own_state = alone[length]
        rows = choose.sample(others, choose.randrange(neighbours))
        place = choose.randrange(len(rows) + 1)
        rows.insert(place, row)
        slots = choose.sample(range(16), len(rows))
        o, pool = rule(rows, slots)
        start = sum(len(x[0][0]) for x in rows[:place])
        same = (
            torch.equal(bits(o[start : start + length]), bits(own_o)),
            torch.equal(bits(pool[slots[place]]), bits(own_state)),
        )
        if not all(same):
            differ.append(([len(x[0][0]) for x in rows], place, same))
    assert not differ, f"other bits than alone in {len(differ)} of {count}: lengths, place, (o, state) {differ[:3]}"
