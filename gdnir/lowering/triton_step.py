"""Launch the Triton kernels of decode and verify, and the small ops next to them. As in `triton_launch`: no checks, no
sync, no tuning at run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdnir.lowering import tables
from gdnir.lowering.relaunch import relaunched
from gdnir.lowering.tables import pick
from gdnir.lowering.triton_launch import _cdiv, _next_power_of_2, _on, _row_stride, _unit_last

if TYPE_CHECKING:
    from gdnir.seq import Seq

# TILE: elements of the state in a tile of BV rows. AHEAD: tiles of a program in flight (decode). One choice for each
# type of state whatever the batch: the order of sums follows from it, and with it a row's bits. No eviction hints: the
# code that makes them costs more than they give.
_TILES, _WARPS = (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)
_STEP = {"TILE": _TILES, "AHEAD": (1, 2, 3, 4), "num_warps": _WARPS}
_VERIFY = {"TILE": _TILES, "num_warps": _WARPS}
_TABLES = tables.load(
    "triton_step",
    {
        # by bits of an element of the state
        "step_32": _STEP,
        "step_16": _STEP,
        "verify_32": _VERIFY,
        "verify_16": _VERIFY,
        "rule": _VERIFY,
        "norm": {"ELEMENTS": _TILES},
        "gate": {"BLOCK": (128, 256, 512, 1024, 2048), "num_warps": _WARPS},
    },
)
STEP, VERIFY = ({size: _TABLES[f"{name}_{8 * size}"] for size in (4, 2)} for name in ("step", "verify"))
RULE = _TABLES["rule"]
VERIFY_ELEMENTS = 128
"""Of the state in one thread: about half of its registers."""
KV_AHEAD = 2
"""At most for a state [K, V], which takes more registers: two programs an SM are worth more than a third tile."""


def tiles(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Tiles of the state that one program of `gdn_step` goes through; of verify, its code is written out for each of a head."""
    rows = [c["TILE"] // _next_power_of_2(key_dim) for t in (STEP, VERIFY) for s in t.values() for c in s.values()]
    return value_heads // key_heads * _cdiv(value_dim, min(*rows, _next_power_of_2(value_dim)))


def gdn_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state: Tensor,
    A_log: Tensor,  # noqa: N803
    dt_bias: Tensor,
    norm_weight: Tensor,
    seq: Seq,
    *,
    activation: str,
    conv_layout: str,
    heads: tuple[int, int, int, int],
    l2norm_eps: float,
    allow_neg_eigval: bool,
    scale: float,
    state_layout: str,
    eps: float,
    gate: str,
) -> Tensor:
    """All between the projections for one (decode) or a few (verify) tokens a row; both states updated in place.

    qkv [T, C], z [T, HV, V], a, b [T, HV]: any strides (a last stride other than 1 costs a copy). conv_state
    [S, C, P] ("cw") or [S, P, C] ("wc"), state [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"): any strides. f32 inside,
    rounded once. Padding rows and tokens of nobody are exactly 0; a slot >= S sets seq.error. Returns y [T, HV, V],
    contiguous.
    """
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    h, hv, k, v = heads
    if seq.num_seqs == 0 or y.shape[1:].numel() == 0:
        return y.zero_()  # no row owns a token
    from gdnir.kernels import gdn_step as kernels

    verify = seq.phase == "verify"
    blocks = pick((VERIFY if verify else STEP)[state.element_size()], state.device)
    constants = _step_constants(tuple(blocks.items()), (h, hv, k, v), weight.shape[1], state_layout, verify)
    x, z, a, b = _unit_last(qkv), _unit_last(z), _unit_last(a), _unit_last(b)
    c_dim, p_dim = (1, 2) if conv_layout == "cw" else (2, 1)
    v_dim, k_dim = (2, 3) if state_layout == "vk" else (3, 2)
    conv_strides, strides = conv_state.stride(), state.stride()
    with _on(qkv.device):
        relaunched(kernels.gdn_step_kernel)[(seq.num_seqs * h,)](
            x,
            z,
            a,
            b,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            conv_state,
            state,
            A_log.contiguous(),
            dt_bias.contiguous(),
            norm_weight.contiguous(),
            y,
            **_metadata(seq),
            T=qkv.shape[0],
            N=seq.num_seqs,
            S=state.shape[0],
            P=conv_state.shape[p_dim],
            L=seq.write_slots.shape[1],
            stride_xt=_row_stride(x),
            stride_zt=_row_stride(z),
            stride_zh=z.stride(1),
            stride_at=_row_stride(a),
            stride_bt=_row_stride(b),
            stride_cs=conv_strides[0],
            stride_cc=conv_strides[c_dim],
            stride_cp=conv_strides[p_dim],
            stride_s=strides[0],
            stride_h=strides[1],
            stride_wn=seq.write_slots.stride(0),
            stride_wl=seq.write_slots.stride(1),
            l2norm_eps=l2norm_eps,
            scale=scale,
            eps=eps,
            STRIDE_V=strides[v_dim],
            STRIDE_K=strides[k_dim],
            ACTIVATION=activation,
            ALLOW_NEG_EIGVAL=allow_neg_eigval,
            GATE=gate,
            **constants,
        )
    return y


@functools.lru_cache(maxsize=256)
def _step_constants(
    blocks: tuple[tuple[str, Any], ...], heads: tuple[int, int, int, int], width: int, state_layout: str, verify: bool
) -> dict[str, Any]:
    """What `gdn_step` is compiled for: all that follows from sizes and the table's choice."""
    (h, hv, k, v), options = heads, dict(blocks)
    block_v = _block_v(options.pop("TILE"), k, v)
    count = _cdiv(v, block_v)
    tiles = hv // h * count
    columns = _next_power_of_2(count) * (1 if verify else _next_power_of_2(hv // h))
    k_pow2 = max(_next_power_of_2(k), columns)
    if verify:  # a head's whole state stays in registers
        elements = _next_power_of_2(count * block_v * k_pow2)
        options["num_warps"] = max(options["num_warps"], elements // (32 * VERIFY_ELEMENTS))
    return {
        "W": width,
        "W_POW2": _next_power_of_2(width),
        "H": h,
        "R": hv // h,
        "K": k,
        "V": v,
        "K_POW2": k_pow2,
        "R_POW2": _next_power_of_2(hv // h),
        "RV_POW2": _next_power_of_2(hv // h * v),
        "PARTS": columns,
        "BV": block_v,
        "AHEAD": 0 if verify else min(options.pop("AHEAD"), tiles, KV_AHEAD if state_layout == "kv" else tiles),
        "SHARED": block_v * k_pow2 < 64 * options["num_warps"],
        "VERIFY": verify,
        **options,
    }


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    seq: Seq,
    *,
    scale: float,
    state_layout: str,
) -> Tensor:
    """The gated delta rule for one (decode) or a few (verify) tokens a row; state updated in place.

    q, k [T, H, K], v [T, HV, V], g, beta [T, HV]: any strides (a last stride other than 1 costs a copy); state
    [S, HV, V, K] ("vk") or [S, HV, K, V] ("kv"), any strides. f32 inside, rounded once. Tokens of padding rows and of
    nobody are exactly 0; a slot >= S sets seq.error. Returns o [T, HV, V], contiguous.
    """
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    (_, h, key_dim), (tokens, hv, value_dim) = k.shape, v.shape
    if seq.num_seqs == 0 or o.shape[1:].numel() == 0:
        return o.zero_()  # no row owns a token
    from gdnir.kernels import delta_rule_step as kernels

    q, k, v, g, beta = _unit_last(q), _unit_last(k), _unit_last(v), _unit_last(g), _unit_last(beta)
    v_dim, k_dim = (2, 3) if state_layout == "vk" else (3, 2)
    blocks = pick(RULE, state.device)
    block_v = _block_v(blocks["TILE"], key_dim, value_dim)
    with _on(v.device):
        relaunched(kernels.delta_rule_step_kernel)[(seq.num_seqs * hv * _cdiv(value_dim, block_v),)](
            q,
            k,
            v,
            g,
            beta,
            state,
            o,
            **_metadata(seq),
            T=tokens,
            N=seq.num_seqs,
            S=state.shape[0],
            L=seq.write_slots.shape[1],
            stride_qt=_row_stride(q),
            stride_qh=q.stride(1),
            stride_kt=_row_stride(k),
            stride_kh=k.stride(1),
            stride_vt=_row_stride(v),
            stride_vh=v.stride(1),
            stride_gt=_row_stride(g),
            stride_bt=_row_stride(beta),
            stride_s=state.stride(0),
            stride_h=state.stride(1),
            stride_wn=seq.write_slots.stride(0),
            stride_wl=seq.write_slots.stride(1),
            scale=scale,
            STRIDE_V=state.stride(v_dim),
            STRIDE_K=state.stride(k_dim),
            R=hv // h,
            HV=hv,
            V=value_dim,
            K=key_dim,
            K_POW2=_next_power_of_2(key_dim),
            BV=block_v,
            VERIFY=seq.phase == "verify",
            num_warps=blocks["num_warps"],
        )
    return o


def l2norm(x: Tensor, *, eps: float) -> Tensor:
    """x * rsqrt(sum(x^2, -1) + eps); f32 inside, rounded once to x's dtype.

    x: [..., K], any strides for [T, H, K] (a last stride other than 1, or more dimensions, may cost a copy). Returns a
    contiguous tensor of x's shape.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    from gdnir.kernels import l2norm as kernels

    width = x.shape[-1]
    x = _unit_last(x if x.dim() == 3 else x.reshape(-1, 1, width))
    padded = _next_power_of_2(width)
    per_program = max(1, pick(_TABLES["norm"], x.device)["ELEMENTS"] // padded)
    rows = x.shape[0] * x.shape[1]
    with _on(x.device):
        relaunched(kernels.l2norm_kernel)[(_cdiv(rows, per_program),)](
            x,
            y,
            rows,
            _row_stride(x),
            x.stride(1),
            eps,
            H=x.shape[1],
            K=width,
            K_POW2=padded,
            ROWS=per_program,
            num_warps=4,
        )
    return y


def gdn_gate(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, allow_neg_eigval: bool) -> tuple[Tensor, Tensor]:  # noqa: N803
    """(g, beta) [T, HV] f32 of a, b [T, HV], any strides (a last stride other than 1 costs a copy)."""
    g = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    beta = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    if g.numel() == 0:
        return g, beta
    from gdnir.kernels import gdn_gate as kernels

    a, b = _unit_last(a), _unit_last(b)
    blocks = pick(_TABLES["gate"], a.device)
    with _on(a.device):
        relaunched(kernels.gdn_gate_kernel)[(_cdiv(g.numel(), blocks["BLOCK"]),)](
            a,
            b,
            A_log.contiguous(),
            dt_bias.contiguous(),
            g,
            beta,
            g.numel(),
            _row_stride(a),
            _row_stride(b),
            HV=a.shape[1],
            ALLOW_NEG_EIGVAL=allow_neg_eigval,
            **blocks,
        )
    return g, beta


def _metadata(seq: Seq) -> dict[str, Tensor]:
    return {
        "cu_seqlens": _unit_last(seq.cu_seqlens),
        "read_slots": _unit_last(seq.read_slots),  # perhaps a column of the last step's write_slots
        "write_slots": seq.write_slots,
        "has_state": _unit_last(seq.has_state),
        "error": seq.error,
    }


def _block_v(elements: int, key_dim: int, value_dim: int) -> int:
    return max(1, min(elements // _next_power_of_2(key_dim), _next_power_of_2(value_dim)))
