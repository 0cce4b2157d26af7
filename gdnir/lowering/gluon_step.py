"""Launch the Gluon kernel of `gdn_step` on Hopper, for batches too small to fill the device with Triton's. As in `triton_launch`: no
checks, no sync, no tuning at run time, and nothing is compiled again when only the batch changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gdnir.lowering import tables, triton_step
from gdnir.lowering.gluon_rule import device_facts
from gdnir.lowering.relaunch import launch
from gdnir.lowering.triton_launch import _kernels, _next_power_of_2

if TYPE_CHECKING:
    from gdnir.seq import Seq

# TILE: elements of the state in one CTA, unless its cluster would have too many of them. FILL: sequences and key heads for each
# multiprocessor up to which clusters are faster than Triton's kernel, which has one program for each.
_CHOICES = {"TILE": (4096, 8192, 16384), "FILL": (0.5, 1.0, 1.5, 2.0)}
# by bits of an element of the state
_TABLES = tables.load("gluon_step", {f"{name}_{bits}": _CHOICES for name in ("step", "verify") for bits in (32, 16)})
STEP, VERIFY = ({size: _TABLES[f"{name}_{8 * size}"]["default"] for size in (4, 2)} for name in ("step", "verify"))
MOST_CTAS = 8
"""Of a cluster that every device can run. Each has rows of one value head."""
ELEMENTS = 64
"""Of the state in one thread."""


class Cluster(NamedTuple):
    rows: int  # of one CTA
    ctas: int
    warps: int


@functools.cache
def cluster(tile: int, heads: tuple[int, int, int, int]) -> Cluster:
    """How the states of a key head, which has at most MOST_CTAS value heads, are spread over CTAs of about `tile` elements."""
    h, hv, k, v = heads
    rows, columns = _next_power_of_2(hv // h) * _next_power_of_2(v), _next_power_of_2(k)
    each = min(max(1, tile // columns, rows // MOST_CTAS), _next_power_of_2(v))
    return Cluster(each, rows // each, max(4, each * columns // (32 * ELEMENTS)))


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
    clusters: bool | None = None,
) -> Tensor:
    """`triton_step.gdn_step` for a state [S, HV, V, K] and at most MOST_CTAS value heads of a key head.

    `clusters`: a cluster of CTAs for each sequence and key head, or Triton's kernel, which has one program for them; None: the
    faster one, by how many there are.
    """
    verify = seq.phase == "verify"
    choices = (VERIFY if verify else STEP)[state.element_size()]
    programs = seq.num_seqs * heads[0]
    if clusters is None:
        clusters = programs <= choices["FILL"] * device_facts(state.device)[0]
    if not clusters or programs == 0 or heads[1] * heads[3] == 0:
        return triton_step.gdn_step(
            qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, seq, activation=activation,
            conv_layout=conv_layout, heads=heads, l2norm_eps=l2norm_eps, allow_neg_eigval=allow_neg_eigval, scale=scale,
            state_layout=state_layout, eps=eps, gate=gate,
        )  # fmt: skip
    y = z.new_empty(z.shape[0], *heads[1::2])
    args = triton_step.step_arguments(
        qkv, z, a, b, weight, bias, conv_state, state, A_log, dt_bias, norm_weight, y, seq, conv_layout, l2norm_eps,
        scale, eps,
    )  # fmt: skip
    constants = _constants(
        cluster(choices["TILE"], heads), state.element_size(), heads, weight.shape[1], state_layout, state.stride()[2:], verify, activation,
        allow_neg_eigval, gate, bias is None,
    )  # fmt: skip
    launch(_kernels("gdn_step_gluon").gdn_step_gluon_kernel, programs, args, constants)
    return y


# `plain`: without a bias. Launches with the same constants have tensors in the same places.
@functools.lru_cache(maxsize=256)
def _constants(
    spread: Cluster,
    element_size: int,
    heads: tuple[int, int, int, int],
    width: int,
    state_layout: str,
    strides: tuple[int, ...],
    verify: bool,
    activation: str,
    allow_neg_eigval: bool,
    gate: str,
    plain: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for. `strides`: the state's last two."""
    h, hv, k, v = heads
    return {
        **triton_step.state_strides(state_layout, strides),
        "W": width,
        "W_POW2": _next_power_of_2(width),
        "H": h,
        "R": hv // h,
        "K": k,
        "V": v,
        "K_POW2": _next_power_of_2(k),
        "V_POW2": _next_power_of_2(v),
        "BV": spread.rows,
        "CTAS": spread.ctas,
        "VECTOR": 16 // element_size,
        "VERIFY": verify,
        "ACTIVATION": activation,
        "ALLOW_NEG_EIGVAL": allow_neg_eigval,
        "GATE": gate,
        "num_warps": spread.warps,
        "num_ctas": spread.ctas,
    }
