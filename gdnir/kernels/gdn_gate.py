"""The gates of the delta rule: log decay g = -exp(A_log) softplus(a + dt_bias), write strength beta = sigmoid(b)."""

import triton
import triton.language as tl


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], as 2 artanh(e / (2 + e)): a GPU's fast logarithm is off by 2^-22 near 1, which is most
    of a weak decay. The terms left out are below 2^-26 of the sum."""
    s = e / (2.0 + e)
    z = s * s
    series = 1.0 / 13
    series = series * z + 1.0 / 11
    series = series * z + 1.0 / 9
    series = series * z + 1.0 / 7
    series = series * z + 1.0 / 5
    series = series * z + 1.0 / 3
    return 2.0 * s * (series * z + 1.0)


@triton.jit
def gate(a, b, A_log, dt_bias, ALLOW_NEG_EIGVAL: tl.constexpr):
    """(g, beta) of f32 values; softplus(x) = max(x, 0) + log(1 + exp(-|x|))."""
    x = a + dt_bias
    g = -tl.exp(A_log) * (tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    beta = tl.sigmoid(b)
    if ALLOW_NEG_EIGVAL:
        beta = 2.0 * beta
    return g, beta


# The size changes with every batch, and a part of a batch is a slice at any alignment: neither may recompile.
@triton.jit(do_not_specialize=["size", "stride_at", "stride_bt"], do_not_specialize_on_alignment=["a", "b"])
def gdn_gate_kernel(
    a,  # [T, HV], any row stride
    b,  # [T, HV], any row stride
    A_log,  # [HV]
    dt_bias,  # [HV]
    g,  # [T, HV] f32, contiguous
    beta,  # [T, HV] f32, contiguous
    size,  # T * HV
    stride_at,
    stride_bt,
    HV: tl.constexpr,
    BLOCK: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    t = at // HV
    h = (at - t * HV).to(tl.int32)
    a_row = tl.load(a + t * stride_at + h, mask=inside, other=0.0).to(tl.float32)
    b_row = tl.load(b + t * stride_bt + h, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A_log + h, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(dt_bias + h, mask=inside, other=0.0).to(tl.float32)
    g_row, beta_row = gate(a_row, b_row, rate, shift, ALLOW_NEG_EIGVAL)
    tl.store(g + at, g_row, mask=inside)
    tl.store(beta + at, beta_row, mask=inside)
