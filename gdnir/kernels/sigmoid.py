"""sigmoid and SiLU in six instructions: a GPU's exp2 and rsqrt are one each, where exp and a division are nine."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _root(x):
    """r with r * r = sigmoid(x); 0 where exp(-x) overflows."""
    return tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit
def sigmoid(x):
    r = _root(x)
    return r * r


@triton.jit
def silu(x):
    r = _root(x)
    return x * r * r
