"""For whoever registers ops and lowerings: inputs for every op, the proof of `native`, a provider against native."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gdnir.errors import PurityError
from gdnir.lowering import NATIVE, find
from gdnir.op import lookup
from gdnir.seq import Seq

HEADS = (2, 4, 8, 12)
_BATCH = ("cu_seqlens", "read_slots", "write_slots", "has_state", "error")


def batches(seed: int) -> list[Seq]:
    """Batches of every phase whose contents depend on `seed` and whose host facts do not."""
    shift = seed % 3

    def turn(items: list[Any]) -> list[Any]:
        return items[shift:] + items[:shift]

    return [
        _unknown(Seq.prefill(turn([70, 3, 0]), slots=turn([0, 4, 2]), has_state=turn([True, False, True])), 70),
        _unknown(Seq.prefill(turn([65, 1, 64]), slots=turn([3, -1, 5]), has_state=turn([True, True, False])), 65),
        _unknown(Seq.decode(turn([6, 1, -1])), 1),
        _unknown(
            Seq.verify(
                turn([3, 1, 0]), read_slots=turn([0, 1, 2]), write_slots=turn([[3, 4, 5], [6, 7, -1], [8, 9, 10]])
            ),
            3,
        ),
    ]


def _unknown(seq: Seq, max_len: int) -> Seq:
    """The batch with only those host facts that an engine's buffers would have."""
    return dataclasses.replace(seq, dense=False, max_slot=None, lengths=None, slots=None, max_len=max_len)


def samples(op: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(operands, attributes) for an op of the core vocabulary, in several shapes and batches. Same host facts for every seed."""
    random = torch.Generator().manual_seed(seed)
    h, hv, k, v = HEADS
    c, d, tokens = 2 * h * k + hv * v, 20, 7

    def rand(*shape: int, as_: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random).to(as_)

    def gates(n: int) -> tuple[Tensor, Tensor]:
        return -torch.rand(n, hv, generator=random), torch.rand(n, hv, generator=random)

    pool = 12
    if op == "causal_conv1d":
        return [
            (
                (rand(s.num_tokens, c), rand(c, 4), bias, rand(*((pool, c, 4) if layout == "cw" else (pool, 3, c))), s),
                dict(activation=act, conv_layout=layout),
            )
            for s in batches(seed)
            for layout, act, bias in (("cw", "silu", None), ("wc", "none", rand(c)))
        ]
    if op == "gated_delta_rule":
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for s in batches(seed):
            for layout in ("vk", "kv"):
                n = s.num_tokens
                q, key = (torch.nn.functional.normalize(rand(n, h, k), dim=-1) for _ in range(2))
                state = rand(pool, hv, *((v, k) if layout == "vk" else (k, v)), as_=torch.float32)
                found.append(
                    (
                        (q.to(dtype), key.to(dtype), rand(n, hv, v), *gates(n), state, s),
                        dict(scale=k**-0.5, state_layout=layout),
                    )
                )
        return found
    if op == "zero_padding":
        return [((rand(s.num_tokens, hv, v), s), {}) for s in batches(seed)]
    simple: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "in_proj": [((rand(tokens, d), rand(c + hv * v, d), rand(2 * hv, d)), dict(heads=HEADS))],
        "in_proj_merged": [((rand(tokens, d), rand(c + hv * v + 2 * hv, d)), dict(heads=HEADS))],
        "split_qkv": [((rand(tokens, c),), dict(heads=HEADS))],
        "l2norm": [
            ((rand(tokens, h, k),), dict(eps=1e-6)),
            ((torch.zeros(tokens, h, k, dtype=dtype),), dict(eps=1e-6)),
        ],
        "gdn_gate": [
            ((rand(tokens, hv), rand(tokens, hv), rand(hv), rand(hv)), dict(allow_neg_eigval=neg))
            for neg in (False, True)
        ],
        "gated_rmsnorm": [
            ((rand(tokens, hv, v), rand(tokens, hv, v), rand(v)), dict(eps=1e-6, activation=a))
            for a in ("silu", "sigmoid")
        ],
        "out_proj": [((rand(tokens, hv, v), rand(d, hv * v)), {})],
        "permute_rows": [((rand(24, 5),), dict(groups=2, splits=(3, 4, 5)))],
        "concat_rows": [((rand(3, 5), rand(4, 5)), {})],
        "concat_tokens": [((rand(1, 5), rand(0, 5), rand(3, 5)), {})],
    }
    return simple[op]


def prove_native(op: str, first: Sequence[Any], second: Sequence[Any], attrs: dict[str, Any]) -> int:
    """Prove that an op's native lowering is plain torch, and return how many aten calls it makes.

    Its aten graph is recorded on the operands `first` and replayed on `second` (same shapes, other contents, the
    batch's device tensors included): the replay must give bitwise what native itself gives. Anything that reads
    a tensor on the host, or works outside aten, such as a Triton kernel, fails. Raises PurityError.
    """
    run = find(op, NATIVE).run
    states = [i for i, slot in enumerate(lookup(op).slots(len(first))) if slot.is_state]

    def function(seq: Seq | None, places: list[int]) -> Callable[..., list[Tensor]]:
        def flat(*tensors: Tensor) -> list[Tensor]:
            given = list(tensors)
            operands: list[Any] = [None] * len(first)
            for place in places:
                operands[place] = given.pop(0)
            for place in states:
                operands[place] = operands[place].clone()
            if seq is not None:
                operands[next(i for i, x in enumerate(first) if isinstance(x, Seq))] = dataclasses.replace(
                    seq, **dict[str, Any](zip(_BATCH, given, strict=True)), prepared={}
                )
            out = run(*operands, **attrs)
            return [*(out if isinstance(out, tuple) else (out,)), *(operands[i] for i in states)]

        return flat

    def tensors(operands: Sequence[Any]) -> list[Tensor]:
        seq = next((x for x in operands if isinstance(x, Seq)), None)
        batch = [] if seq is None else [getattr(seq, name).clone() for name in _BATCH]
        return [x for x in operands if isinstance(x, Tensor)] + batch

    places = [i for i, x in enumerate(first) if isinstance(x, Tensor)]
    flat = function(next((x for x in first if isinstance(x, Seq)), None), places)
    try:
        with torch.no_grad():
            recorded = make_fx(flat)(*tensors(first))
    except RuntimeError as error:
        raise PurityError(f"native {op} reads tensors on the host: {error}") from error
    calls = [n for n in recorded.graph.nodes if n.op == "call_function"]
    alien = [str(n.target) for n in calls if getattr(n.target, "namespace", "") not in ("aten", "prims")]
    if [a for a in alien if "getitem" not in a]:
        raise PurityError(f"native {op} calls something other than aten: {', '.join(alien)}.")
    with torch.no_grad():
        replayed, direct = recorded(*tensors(second)), flat(*tensors(second))
    for i, (a, b) in enumerate(zip(replayed, direct, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(bits(a), bits(b)):
            raise PurityError(
                f"native {op}: result {i} of the recorded aten graph is not what native gives; it works outside aten."
            )
    return len(calls)


def bits(x: Tensor) -> Tensor:
    """A tensor's bits as integers, so that NaN compares equal to itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])
