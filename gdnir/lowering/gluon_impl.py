"""The provider `gluon`: ops in Triton's Gluon, each for one GPU architecture. Kernels are in `gdnir/kernels/*_gluon.py`.

Importing this file imports no Triton: without it the lowerings are registered all the same, and say what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdnir import ops
from gdnir.errors import ShapeError
from gdnir.ir import StateType
from gdnir.lowering import lowers
from gdnir.lowering.triton_launch import _on, _row_stride, _unit_last
from gdnir.platforms import Platform
from gdnir.seq import Seq

HEAD = 128
CHUNK = 64
# NWG: warpgroups that share a program's tiles, 64 rows of V each. NSTG: chunks in flight. RC, RP: registers of a thread in
# the second of these warpgroups and in the one that computes P; the first gets what is left of maxnreg for each thread.
SINGLE = {"NWG": 1, "NSTG": 4, "RC": 0, "RP": 104, "EARLY": True, "num_warps": 4, "maxnreg": 168}
PAIR = {"NWG": 2, "NSTG": 3, "RC": 208, "RP": 72, "EARLY": False, "num_warps": 4, "maxnreg": 128}
PREP = {"BK": 64, "num_warps": 1}


def on_hopper(platform: Platform) -> str | None:
    """None on NVIDIA sm_90 (wgmma and TMA as Hopper has them), with a Triton that has Gluon."""
    if platform.kind != "cuda" or platform.arch != "sm_90":
        return f"the Gluon kernel is written for Hopper's wgmma and TMA, cuda:sm_90; this platform is {platform}."
    if "triton" not in platform.software:
        return "Triton is not installed on this machine; `pip install gdnir[cuda]` brings it."
    if platform.detected and not _gluon_is_installed():
        return "the installed Triton has no Gluon for Hopper; Triton 3.6 has it."
    return None


@functools.cache
def _gluon_is_installed() -> bool:
    """Looks for the files: importing Triton takes long, and a platform may be asked for without running on it."""
    found = importlib.util.find_spec("triton")
    folders = [] if found is None else found.submodule_search_locations or []
    return any((Path(folder) / "experimental/gluon/nvidia/hopper.py").exists() for folder in folders)


def _fits(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: StateType, seq: Any, *, scale: float, state_layout: str
) -> str | None:
    if seq.phase != "prefill":
        return f"the batch's phase is {seq.phase}, want prefill."
    if v.dtype != "bf16" or q.dtype != "bf16":
        return f"q is {q.dtype} and v is {v.dtype}, want bf16."
    if (q.shape[-1], v.shape[-1]) != (HEAD, HEAD):
        return f"K is {q.shape[-1]} and V is {v.shape[-1]}, want {HEAD} and {HEAD}."
    if state_layout != "vk":
        return f"the state's layout is {state_layout}, want vk."
    if scale <= 0:
        return f"scale is {scale}, want a positive number: the kernel uses its logarithm."
    return None


# The bits of both schedules are not proven equal, and a batch's size chooses between them.
@lowers(ops.gated_delta_rule, "gluon", available=on_hopper, accepts=_fits, batch_invariant=False)
def gated_delta_rule(
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
    """S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = scale S_t q_t   [arXiv:2412.06464, eq. 10]

    q, k [T, H, 128], v [T, HV, 128] bf16: token strides that TMA takes (multiples of 16 bytes, heads side by side), others
    cost a copy. g, beta [T, HV] f32, state [S, HV, 128, 128] f32 or bf16, any strides, updated in place. f32 inside, the
    operands of products are rounded to bf16. Returns o [T, HV, 128], contiguous. A slot >= S sets seq.error. Raises
    ShapeError beyond 2^23 heads x chunks.
    """
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tokens, heads = v.shape[:2]
    count = seq.num_seqs
    if count == 0 or heads == 0:
        return o.zero_()  # no row owns a token
    numbers = tokens // CHUNK + count
    if numbers * heads >= 1 << 23:
        raise ShapeError(
            "gated_delta_rule",
            "v, seq",
            expected="fewer than 2^23 chunks x heads on provider gluon",
            got=f"{numbers} chunks x {heads} heads",
            hint="Cut the batch, or take provider triton.",
        )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from gdnir.kernels import delta_rule_gluon as kernels

    def tiles(x: Tensor) -> Any:
        """A descriptor of x [T, heads, 128] as a matrix; it may not be empty."""
        x = x if tokens else x.new_empty(1, *x.shape[1:])
        return TensorDescriptor(x, [x.shape[0], x.shape[1] * HEAD], [_row_stride(x), 1], [CHUNK, 64], kernels.TILE)

    q, k, v = (_for_tma(x) for x in (q, k, v))
    g, beta = _unit_last(g), _unit_last(beta)
    transform = torch.empty((numbers * heads * CHUNK, CHUNK), dtype=v.dtype, device=v.device)
    gates = torch.empty((numbers * heads * 4 * CHUNK,), dtype=torch.float32, device=v.device)
    cu_seqlens, read_slots = _unit_last(seq.cu_seqlens), _unit_last(seq.read_slots)
    with _on(v.device):
        kernels.delta_rule_gluon_prep_kernel[((numbers + 1) * heads,)](
            k,
            g,
            beta,
            transform,
            gates,
            o,
            cu_seqlens,
            read_slots,
            seq.write_slots,
            seq.error,
            tokens,
            count,
            state.shape[0],
            _row_stride(k),
            _row_stride(g),
            _row_stride(beta),
            seq.write_slots.stride(0),
            H=k.shape[1],
            HV=heads,
            **PREP,
        )
        schedule = SINGLE if 2 * count * heads <= _cores(v.device) else PAIR
        kernels.delta_rule_gluon_kernel[(count * heads * (2 // schedule["NWG"]),)](
            tiles(q),
            tiles(k),
            tiles(v),
            TensorDescriptor(transform, list(transform.shape), [CHUNK, 1], [CHUNK, CHUNK], kernels.TILE),
            TensorDescriptor(gates, list(gates.shape), [1], [4 * CHUNK], kernels.LINE),
            tiles(o),
            o,
            state,
            cu_seqlens,
            read_slots,
            seq.write_slots,
            _unit_last(seq.has_state),
            tokens,
            state.shape[0],
            state.stride(0),
            state.stride(1),
            seq.write_slots.stride(0),
            scale,
            math.log2(scale),
            H=k.shape[1],
            HV=heads,
            VS=state.stride(2),
            KS=state.stride(3),
            **schedule,
        )
    return o


def _for_tma(x: Tensor) -> Tensor:
    """x [T, heads, 128], copied if TMA cannot read it: its rows begin at multiples of 16 bytes, heads side by side."""
    rows = x.shape[0] == 1 or (x.stride(0) >= x.shape[1] * HEAD and x.stride(0) * x.element_size() % 16 == 0)
    heads = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == HEAD)
    return x if rows and heads and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _cores(device: torch.device) -> int:
    """Streaming multiprocessors, of which each holds one program of either schedule."""
    if device.type == "cpu":  # tests without a GPU
        return 132
    cores: int = torch.cuda.get_device_properties(device).multi_processor_count
    return cores
