"""x * rsqrt(sum(x^2) + eps) over the last axis, arithmetic in f32."""

import triton
import triton.language as tl


# The row count changes with every batch: specialising on it (== 1, divisible by 16) would recompile mid-serving.
@triton.jit(do_not_specialize=["rows"])
def l2norm_kernel(
    x,  # [T, H, K], any strides but the last
    y,  # [T, H, K] contiguous
    rows,  # T * H
    stride_xt,
    stride_xh,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, K_POW2)[None, :]
    inside = (row < rows) & (k < K)
    # rows < 2^31 although their elements may not be: a 32-bit division, then 64-bit offsets.
    t = (row.to(tl.int32) // H).to(tl.int64)
    h = row - t * H
    tile = tl.load(x + t * stride_xt + h * stride_xh + k, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(tile * tile, axis=1) + eps)
    tl.store(y + row * K + k, (tile * norm[:, None]).to(y.dtype.element_ty), mask=inside)
