"""What the chunked gated delta rule on Hopper needs of a chunk's keys and gates: T and the sums of the gates.

T = (A * D) diag(beta), A = (I + tril(diag(beta) K K^T, -1))^-1, D_ij = exp(g_{j+1} + .. + g_i) for i >= j, else 0
[arXiv:2412.06464, arXiv:2406.06484]. The decay is applied to the inverse, whose entries are bounded for unit keys.

One warp per chunk and a few value heads. Blocks of 16 x 16 stay in the registers of mma.sync from the first product to T: an
accumulator, rounded to f16, is as it lies a left operand, and the transpose of a right one. So all products are a b^T, and
of what is needed on the right the transpose is computed beside it. No barrier waits for another warp.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Everything that varies from batch to batch. Specialising on it (== 1, divisible by 16) would recompile mid-serving.
_VARYING = ["T", "N", "S", "stride_wn"]
# A part of a batch is a slice of these, at any alignment.
_SLICED = ["cu_seqlens", "read_slots", "write_slots", "error"]

BLOCK = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=BLOCK.value, k_width=2))
RIGHT = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=BLOCK.value, k_width=2))
ROWS = gl.constexpr(gl.SliceLayout(1, BLOCK.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, BLOCK.value))
TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
TILE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PRODUCTS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

# Triton 3.7 renamed it.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def _launch_dependents():
    """The next kernel, if launched with launch_pdl, may start once all programs of this one have; it waits where it must."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_primary():
    """Until the kernel before this one has ended, and all that it stored can be read. Every program of a kernel launched
    with launch_pdl does so once: or the kernel could end, and the one after it start, before the one before it has ended."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _find_chunk(cu_seqlens, number, T, N):
    """(n, c): the chunk of this number. Tokens behind the last sequence are sequence N. c may lie outside the sequence."""
    n = number * 0
    left = N + 1
    while left > 1:
        half = left // 2
        start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + half), 0), T)
        n += gl.where(start // 64 + n + half <= number, half, 0)
        left = left - half
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    return n, number - start // 64 - n


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _turned(x):
    """x [16,16] as the right operand x^T."""
    return gl.convert_layout(x.permute((1, 0)), RIGHT, assert_trivial=True)


@gluon.jit
def _times(a, b, acc):
    """acc + a b^T; a and b rounded to f16: 11 bits, where bf16 would lose a factor of 8."""
    left = gl.convert_layout(a.to(gl.float16), LEFT, assert_trivial=True)
    return mma_v2(left, _turned(b.to(gl.float16)), acc)


@gluon.jit
def _merge(x, xt, minus, row, column, zero, WIDTH: gl.constexpr):
    """The inverse's diagonal blocks of WIDTH / 2 rows made blocks of WIDTH: [[P, 0], [Q, R]]^-1 = X - X Q X, where
    X = [[P^-1, 0], [0, R^-1]]; and its transpose. `minus` is -L."""
    HALF: gl.constexpr = WIDTH // 2
    Q = gl.where((row // WIDTH == column // WIDTH) & (row // HALF > column // HALF), minus, 0.0)
    product = _times(xt, Q, zero)
    return _times(x, product, x), _times(product, x, xt)


@gluon.jit
def _invert_block(gram, beta_row, beta_column, row, column, zero):
    """(A, A^T) of 16 rows. Every entry on the way is one of an inverse: bounded, where the powers of a Neumann series grow
    without limit for keys that resemble each other."""
    minus = gl.where(row > column, -gram * beta_row, 0.0)
    minus_t = gl.where(row < column, -gram * beta_column, 0.0)
    x = gl.where(row // 2 == column // 2, gl.where(row == column, 1.0, minus), 0.0)
    xt = gl.where(row // 2 == column // 2, gl.where(row == column, 1.0, minus_t), 0.0)
    x, xt = _merge(x, xt, minus, row, column, zero, 4)
    x, xt = _merge(x, xt, minus, row, column, zero, 8)
    return _merge(x, xt, minus, row, column, zero, 16)


@gluon.jit
def _clear_rows(tile, left, LAYOUT: gl.constexpr):
    """Zeros in the tile's rows behind `left`: they are the next sequence's, of which even a NaN must not matter."""
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    tile.store(gl.where(row < left, tile.load(LAYOUT), gl.zeros([64, 64], tile.dtype, LAYOUT)))


@gluon.jit
def _gram(keys, kept):
    """K K^T: its blocks (a, b), a <= b, at b (b + 1) / 2 + a of `kept`, in f16. keys: two tiles of 64 channels."""
    zero = gl.zeros([16, 16], gl.float32, BLOCK)
    gram = ()
    for _ in gl.static_range(10):
        gram = gram + (zero,)
    for k0 in gl.static_range(0, 128, 16):
        channels = keys.index(k0 // 64).slice(k0 % 64, 16, dim=1)
        left = ()
        right = ()
        for a in gl.static_range(4):
            left = left + (channels.slice(a * 16, 16, dim=0).load(LEFT),)
            right = right + (_turned(left[a]),)
        sums = ()
        for b in gl.static_range(4):
            for a in gl.static_range(b + 1):
                sums = sums + (mma_v2(left[a], right[b], gram[b * (b + 1) // 2 + a]),)
        gram = sums
    for i in gl.static_range(10):
        kept.index(i).store(gram[i].to(gl.float16))


@gluon.jit
def _store_gates(line, total, i):
    """The four rows of a chunk's gates, `total` being the sums."""
    last = gl.sum(gl.where(i == 63, total, 0.0), 0)
    place = 16 * (i % 8 // 2) + 2 * (i // 8) + i % 2
    gl.store(line + place, total)
    gl.store(line + 64 + place, gl.exp2(total))
    gl.store(line + 128 + place, gl.exp2(last - total))
    gl.store(line + 192 + i, total)


@gluon.jit
def _scaled(gram, i: gl.constexpr, beta_column):
    return -gram.index(i).load(BLOCK).to(gl.float32) * beta_column


@gluon.jit
def _store_transform(gram, vectors, out):
    """T, of K K^T and the sums of the gates and beta in `vectors`."""
    zero = gl.zeros([16, 16], gl.float32, BLOCK)
    row = gl.arange(0, 16, ROWS)[:, None]
    column = gl.arange(0, 16, COLUMNS)[None, :]
    beta_column = ()
    sum_row = ()
    sum_column = ()
    A = ()
    At = ()
    for a in gl.static_range(4):
        sum16, beta16 = vectors.index(0).slice(a * 16, 16), vectors.index(1).slice(a * 16, 16)
        beta_column = beta_column + (beta16.load(COLUMNS)[None, :],)
        sum_row = sum_row + (sum16.load(ROWS)[:, None],)
        sum_column = sum_column + (sum16.load(COLUMNS)[None, :],)
        block = gram.index(a * (a + 1) // 2 + a).load(BLOCK).to(gl.float32)
        x, xt = _invert_block(block, beta16.load(ROWS)[:, None], beta_column[a], row, column, zero)
        A = A + (x,)
        At = At + (xt,)

    # 16 -> 32 -> 64 by [[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]. Below, Aij and Mij are blocks of the inverse and
    # of -L, ending in t if transposed.
    M10t, M32t = _scaled(gram, 1, beta_column[1]), _scaled(gram, 8, beta_column[3])
    M20t, M21t = _scaled(gram, 3, beta_column[2]), _scaled(gram, 4, beta_column[2])
    M30t, M31t = _scaled(gram, 6, beta_column[3]), _scaled(gram, 7, beta_column[3])
    product = _times(A[1], M10t, zero)
    A10, A10t = _times(product, At[0], zero), _times(At[0], product, zero)
    A32 = _times(_times(A[3], M32t, zero), At[2], zero)
    Y20, Y21 = _times(A[2], M20t, zero), _times(A[2], M21t, zero)
    Y30 = _times(A32, M20t, _times(A[3], M30t, zero))
    Y31 = _times(A32, M21t, _times(A[3], M31t, zero))
    A20, A21 = _times(Y20, At[0], _times(Y21, A10t, zero)), _times(Y21, At[1], zero)
    A30, A31 = _times(Y30, At[0], _times(Y31, A10t, zero)), _times(Y31, At[1], zero)
    inverse = (A[0], A10, A[1], A20, A21, A[2], A30, A31, A32, A[3])
    tma.store_wait(0)  # of the head before
    _barrier()
    for a in gl.static_range(4):
        for b in gl.static_range(4):
            tile = gl.zeros([16, 16], out.dtype, BLOCK)
            if a >= b:
                decay = gl.exp2(sum_row[a] - sum_column[b])
                if a == b:
                    decay = gl.where(row >= column, decay, 0.0)
                tile = (inverse[a * (a + 1) // 2 + b] * (decay * beta_column[b])).to(out.dtype)
            out.slice(a * 16, 16, dim=0).slice(b * 16, 16, dim=1).store(tile)


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICED)
def delta_rule_gluon_prep_kernel(
    k_d,
    t_d,
    g,
    beta,
    gates,
    o,
    cu_seqlens,
    read_slots,
    write_slots,
    error,
    T,
    N,
    S,
    stride_gt,
    stride_gh,
    stride_bt,
    stride_bh,
    stride_wn,
    H: gl.constexpr,
    HV: gl.constexpr,
    HEADS: gl.constexpr,
):
    """T and gates of one chunk and HEADS value heads of one key head; zeros in o where a chunk has no live sequence.
    (T // 64 + N + 1) HV / HEADS programs.

    k_d and t_d: descriptors with boxes of 64 x 64 over k [T, H 128] and T; g, beta [T,HV] f32 through their strides, o
    [T,HV,128] contiguous; T and gates as in delta_rule_gluon.py.
    """
    _launch_dependents()
    pid = gl.program_id(0)
    GROUPS: gl.constexpr = HV // HEADS
    number = pid // GROUPS  # heads vary fastest: neighbours read the same rows of memory
    h0 = pid % GROUPS * HEADS
    n, c = _find_chunk(cu_seqlens, number, T, N)
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens + n), 0), T)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + n + 1, mask=n < N, other=T), start), T)
    read = gl.load(read_slots + n, mask=n < N, other=-1)
    write = gl.load(write_slots + n.to(gl.int64) * stride_wn, mask=n < N, other=-1)
    gl.store(error, 1, mask=(c == 0) & (h0 == 0) & ((read >= S) | (write >= S)))
    t0 = start + c * 64
    left = end - t0
    if (c >= 0) & (left > 0):
        if (read >= 0) & (read < S):
            keys = gl.allocate_shared_memory(k_d.dtype, [2, 64, 64], k_d.layout)
            transform = keys.index(0)  # all that is needed of the keys by then is their products
            loaded = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
            mbarrier.init(loaded, count=1)
            fence_async_shared()
            mbarrier.expect(loaded, 2 * 64 * 64 * 2)
            for j in gl.static_range(2):
                tma.async_copy_global_to_shared(k_d, [t0, h0 // (HV // H) * 128 + 64 * j], loaded, keys.index(j))
            gram = gl.allocate_shared_memory(gl.float16, [10, 16, 16], PRODUCTS)
            vectors = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
            i = gl.arange(0, 64, TOKENS)
            g_at = g + (t0 + i).to(gl.int64) * stride_gt + h0 * stride_gh
            beta_at = beta + (t0 + i).to(gl.int64) * stride_bt + h0 * stride_bh
            log2 = gl.load(g_at, mask=i < left, other=0.0) * 1.4426950408889634
            strength = gl.load(beta_at, mask=i < left, other=0.0)
            mbarrier.wait(loaded, 0)
            if left < 64:
                for j in gl.static_range(2):
                    _clear_rows(keys.index(j), left, TILE)
                _barrier()
            _gram(keys, gram)
            for j in range(HEADS):
                tile = number * HV + h0 + j
                total = gl.associative_scan(gl.maximum(log2, -160.0), 0, _add)
                _store_gates(gates + tile.to(gl.int64) * 256, total, i)
                vectors.index(0).store(total)
                vectors.index(1).store(strength)
                if HEADS > 1:
                    log2 = gl.load(g_at + (j + 1) * stride_gh, mask=(i < left) & (j + 1 < HEADS), other=0.0)
                    log2 = log2 * 1.4426950408889634
                    strength = gl.load(beta_at + (j + 1) * stride_bh, mask=(i < left) & (j + 1 < HEADS), other=0.0)
                _barrier()
                _store_transform(gram, vectors, transform)
                fence_async_shared()
                _barrier()
                tma.async_copy_shared_to_global(t_d, [tile * 64, 0], transform)
            tma.store_wait(0)
        else:
            token = t0 + gl.arange(0, 64, gl.SliceLayout(1, TILE))
            channel = gl.arange(0, 64, gl.SliceLayout(0, TILE))
            at_o = o + (token.to(gl.int64)[:, None] * HV + h0) * 128 + channel[None, :]
            zeros = gl.zeros([64, 64], o.dtype.element_ty, TILE)
            for j in range(2 * HEADS):
                gl.store(at_o + 64 * j, zeros, mask=(token < end)[:, None])
