"""Gated RMSNorm over the last axis: y = o * rsqrt(mean(o^2) + eps) * weight * act(z), arithmetic in f32."""

import triton
import triton.language as tl

from .sigmoid import sigmoid, silu


# The row count changes with every batch: specialising on it (== 1, divisible by 16) would recompile mid-serving.
@triton.jit(do_not_specialize=["rows"])
def gated_rmsnorm_kernel(
    o,  # [T, HV, V], any strides but the last
    z,  # [T, HV, V], any strides but the last
    weight,  # [V]
    y,  # [T, HV, V] contiguous
    rows,  # T * HV
    stride_ot,
    stride_oh,
    stride_zt,
    stride_zh,
    eps,
    HV: tl.constexpr,
    V: tl.constexpr,
    V_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    v = tl.arange(0, V_POW2)[None, :]
    inside = (row < rows) & (v < V)
    # rows < 2^31 although their elements may not be: a 32-bit division, then 64-bit offsets.
    t = (row.to(tl.int32) // HV).to(tl.int64)
    h = row - t * HV

    # All loads first, so that they are in flight together.
    o_tile = tl.load(o + t * stride_ot + h * stride_oh + v, mask=inside, other=0.0).to(tl.float32)
    z_tile = tl.load(z + t * stride_zt + h * stride_zh + v, mask=inside, other=0.0).to(tl.float32)
    w_tile = tl.load(weight + v, mask=v < V, other=0.0).to(tl.float32)

    mean = tl.sum(o_tile * o_tile, axis=1)[:, None] / V
    if ACTIVATION == "silu":
        gate = silu(z_tile)
    else:
        gate = sigmoid(z_tile)
    out = o_tile * tl.rsqrt(mean + eps) * w_tile * gate
    tl.store(y + row * V + v, out.to(y.dtype.element_ty), mask=inside)
