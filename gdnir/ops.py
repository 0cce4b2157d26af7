"""The vocabulary: the steps of a Gated Delta Net layer as IR ops.

Letters: T tokens of the batch (packed), N sequences, D hidden size, H key heads, HV value heads, K key head
dim, V value head dim, C = 2*H*K + HV*V conv channels, W conv width, P conv-state width, S pool slots.

`native` (plain torch, `gdnir/lowering/native_impl.py`) is the meaning of each op. Arithmetic is in f32 and is
rounded once, on the way to the result; a state is rounded once, when it is written. Every op that takes `seq`
gives exactly 0 in the rows of padding sequences and touches no slot but those the batch writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gdnir.errors import ArgumentError
from gdnir.ir import Attr, Dim, SeqType, TensorType, Type
from gdnir.op import fused, op

Heads = tuple[int, int, int, int]
"""(H, HV, K, V)."""
StateLayout = Literal["vk", "kv"]
ConvLayout = Literal["cw", "wc"]
Activation = Literal["silu", "none"]
Gate = Literal["silu", "sigmoid"]
Part = Literal["decode", "verify", "prefill"]


@op(
    "heads=H.HV.K.V; x:T.D, w_qkvz:2*H*K+2*HV*V.D like x, w_ba:2*HV.D like x"
    " -> qkv:T.2*H*K+HV*V like x, z:T.HV.V like x, b:T.HV like x, a:T.HV like x",
    plain=True,
)
def in_proj(x: Any, w_qkvz: Any, w_ba: Any, *, heads: Heads) -> None:
    """The input projections: [q|k|v|z] = x w_qkvz^T and [b|a] = x w_ba^T, rows flat (all q, all k, all v, all z).

    How a checkpoint's rows become flat is said with `permute_rows` and `concat_rows` on the weights.
    """


@op(
    "heads=H.HV.K.V; x:T.D, weight:2*H*K+2*HV*V+2*HV.D like x"
    " -> qkv:T.2*H*K+HV*V like x, z:T.HV.V like x, b:T.HV like x, a:T.HV like x",
    plain=True,
)
def in_proj_merged(x: Any, weight: Any, *, heads: Heads) -> None:
    """in_proj as one product: weight's rows are w_qkvz's, then w_ba's, and the results are views of one tensor."""


@op(
    "qkv:T.C, weight:C.W, bias?:C, conv_state[conv_layout]:cw=S.C.P|wc=S.P.C bf16/f16/f32, seq"
    " -> y:T.C like qkv, conv_state where P >= W - 1"
)
def causal_conv1d(
    qkv: Any,
    weight: Any,
    bias: Any,
    conv_state: Any,
    seq: Any,
    *,
    activation: Activation,
    conv_layout: ConvLayout = "cw",
) -> None:
    """y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W-1) + w, c]), x being the sequence's inputs, state first.

    The state holds a sequence's last W-1 inputs in its last W-1 columns; earlier columns are left alone.
    """


@op("heads=H.HV.K.V; y:T.2*H*K+HV*V -> q:T.H.K like y, k:T.H.K like y, v:T.HV.V like y", plain=True)
def split_qkv(y: Any, *, heads: Heads) -> None:
    """Views of y's columns as heads: q, then k, then v."""


@op("x:* -> x:* like x where eps > 0")
def l2norm(x: Any, *, eps: float = 1e-6) -> None:
    """x * rsqrt(sum(x^2) + eps) over the last dimension (eps inside the sum, as in FLA and transformers)."""


@op("a:T.HV, b:T.HV like a, A_log:HV, dt_bias:HV -> g:T.HV f32, beta:T.HV f32")
def gdn_gate(a: Any, b: Any, A_log: Any, dt_bias: Any, *, allow_neg_eigval: bool = False) -> None:  # noqa: N803
    """Log decay g = -exp(A_log) softplus(a + dt_bias) and write strength beta = sigmoid(b), both f32.

    `allow_neg_eigval` doubles beta, so that I - beta k k^T may reflect (OLMo-hybrid). [arXiv:2412.06464]
    """


@op(
    "q:T.H.K, k:T.H.K like q, v:T.HV.V like q, g:T.HV f32, beta:T.HV f32,"
    " state[state_layout]:vk=S.HV.V.K|kv=S.HV.K.V f32/bf16, seq -> o:T.HV.V like v, state"
    " where HV % H == 0, abs(scale) < inf"
)
def gated_delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, seq: Any, *, scale: float, state_layout: StateLayout = "vk"
) -> None:
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t.  [arXiv:2412.06464, eq. 10]

    S is V x K per value head; value head h reads key head h // (HV/H). g = -inf is an exact reset.
    """


@op("z:T.*, seq -> z:T.* like z", plain=True)
def zero_padding(z: Any, seq: Any) -> None:
    """z with exact zeros in the rows of padding sequences (z itself when the batch has none)."""


@op("o:T.HV.V, z:T.HV.V like o, weight:V -> y:T.HV.V like o where eps > 0")
def gated_rmsnorm(o: Any, z: Any, weight: Any, *, eps: float = 1e-6, activation: Gate = "silu") -> None:
    """y = o rsqrt(mean(o^2) + eps) weight act(z): the norm comes before the gate."""


@op("y:T.HV.V, weight:D.HV*V like y -> out:T.D like y", plain=True)
def out_proj(y: Any, weight: Any) -> None:
    """The output projection, out = y w^T with y's heads side by side."""


@op("weight:R.D -> weight:R.D like weight where groups > 0, groups * sum(splits) == R", plain=True)
def permute_rows(weight: Any, *, groups: int, splits: tuple[int, ...]) -> None:
    """Rows [groups, sum(splits)] reordered piece by piece: the first split of every group, then the second, ...

    Qwen3-Next stores [q k v z] per key head: groups = H, splits = (K, K, HV/H*V, HV/H*V) makes them flat.
    """


def _concat_rows(types: Sequence[Type | None], attrs: Mapping[str, Attr]) -> Sequence[Type]:
    given = [t for t in types if isinstance(t, TensorType)]
    rows = [t.shape[0] for t in given]
    if len({(t.dtype, t.shape[1:]) for t in given}) != 1 or not all(isinstance(r, int) for r in rows):
        raise ArgumentError(
            "concat_rows", "weights", expected="weights that agree but for their rows", got=", ".join(map(str, given))
        )
    return [TensorType(given[0].dtype, (sum(r for r in rows if isinstance(r, int)), *given[0].shape[1:]))]


@op("*weights:_.* -> weights", results=_concat_rows, plain=True)
def concat_rows(*weights: Any) -> None:
    """The weights' rows, one weight after the other."""


def _part_tokens(part: object) -> Dim:
    return f"T.{part}"


@op("seq -> seq", results=lambda types, attrs: [SeqType(str(attrs["part"]), _part_tokens(attrs["part"]))], plain=True)
def seq_part(seq: Any, *, part: Part) -> None:
    """One part of a mixed batch's metadata."""


def _slice_tokens(types: Sequence[Type | None], attrs: Mapping[str, Attr]) -> Sequence[Type]:
    x = types[0]
    assert isinstance(x, TensorType)
    return [TensorType(x.dtype, (_part_tokens(attrs["part"]), *x.shape[1:]))]


@op("x:T.*, seq -> x", results=_slice_tokens, plain=True)
def slice_tokens(x: Any, seq: Any, *, part: Part) -> None:
    """The rows of x that belong to one part of a mixed batch (a view)."""


def _concat_tokens(types: Sequence[Type | None], attrs: Mapping[str, Attr]) -> Sequence[Type]:
    given = [t for t in types if isinstance(t, TensorType)]
    if len({(t.dtype, t.shape[1:]) for t in given}) != 1:
        raise ArgumentError(
            "concat_tokens", "parts", expected="parts that agree but for their tokens", got=", ".join(map(str, given))
        )
    return [TensorType(given[0].dtype, ("T", *given[0].shape[1:]))]


@op("decode:_.*, verify:_.*, prefill:_.* -> whole", results=_concat_tokens, plain=True)
def concat_tokens(decode: Any, verify: Any, prefill: Any) -> None:
    """The parts of a mixed batch as one batch again, in that order."""


@fused(
    "qkv:T.C, a:T.HV, b:T.HV, weight:C.W, bias?:C, conv_state[conv_layout], A_log:HV, dt_bias:HV, seq"
    " -> q, k, v, g, beta, conv_state"
)
def conv_prep(
    qkv: Any, a: Any, b: Any, weight: Any, bias: Any, conv_state: Any, A_log: Any, dt_bias: Any, seq: Any, *,  # noqa: N803
    activation: Activation, conv_layout: ConvLayout = "cw", heads: Heads, eps: float = 1e-6, allow_neg_eigval: bool = False,
) -> Any:  # fmt: skip
    """causal_conv1d, split, l2norm of q and k, gates: one read of the activations instead of four."""
    y, conv_state = causal_conv1d(qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout)
    q, k, v = split_qkv(y, heads=heads)
    g, beta = gdn_gate(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    return l2norm(q, eps=eps), l2norm(k, eps=eps), v, g, beta, conv_state


@fused(
    "qkv:T.C, z:T.HV.V, a:T.HV, b:T.HV, weight:C.W, bias?:C, conv_state[conv_layout], state[state_layout],"
    " A_log:HV, dt_bias:HV, norm_weight:V, seq"
    " -> y, conv_state, state"
)
def gdn_step(
    qkv: Any, z: Any, a: Any, b: Any, weight: Any, bias: Any, conv_state: Any, state: Any, A_log: Any, dt_bias: Any,  # noqa: N803
    norm_weight: Any, seq: Any, *, activation: Activation, conv_layout: ConvLayout = "cw", heads: Heads,
    l2norm_eps: float = 1e-6, allow_neg_eigval: bool = False, scale: float, state_layout: StateLayout = "vk",
    eps: float = 1e-6, gate: Gate = "silu",
) -> Any:  # fmt: skip
    """Everything between the projections: for decode and verify, one pass over the state in one kernel."""
    y, conv_state = causal_conv1d(qkv, weight, bias, conv_state, seq, activation=activation, conv_layout=conv_layout)
    q, k, v = split_qkv(y, heads=heads)
    g, beta = gdn_gate(a, b, A_log, dt_bias, allow_neg_eigval=allow_neg_eigval)
    q, k = l2norm(q, eps=l2norm_eps), l2norm(k, eps=l2norm_eps)
    o, state = gated_delta_rule(q, k, v, g, beta, state, seq, scale=scale, state_layout=state_layout)
    return gated_rmsnorm(o, zero_padding(z, seq), norm_weight, eps=eps, activation=gate), conv_state, state
