"""Tiles of a large tensor through shared memory by bulk copies, where a warp waits for its own part of a tile and for no other warp.

A tile's rows lie one after the other, in memory as in shared memory, and warp i of a CTA has the ith part of them. The ring has
`stages` tiles on their way in and one on its way out: `fetch` asks for a tile, `arrived` waits for it, `take` reads it into
registers; `put` and `send` write one back, `sent` waits until its place is free. Copies wait neither for loads nor for stores of
their warp: `fence` stands between what was taken and put and the copies that use these places next.
One lane of each warp copies; a copy needs addresses and sizes that are multiples of 16 bytes.

PTX, since Gluon has no bulk copy without a descriptor, none that tells L2 what to keep, and no address of shared memory. The ring's
memory is Gluon's all the same, as much of it as Hopper has: it is the largest that the kernel allocates, and Triton puts the
largest first. `open_ring` stops the kernel if it is not there.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.runtime.jit import constexpr_function

from .delta_rule_step import KEEP_IN_L2

ROW = gl.constexpr(256)
"""Integers in a row of the memory of a ring, one for each thread."""


# A function, since Triton's cache of compiled kernels looks at functions, and at no string that one of them names.
@constexpr_function
def _head():
    """Registers of a block of PTX: `one` is a warp's copying lane, w the warp, and what it copies begins w times `part` bytes on."""
    return """.reg .pred one, some; .reg .u32 w, at, bar; .reg .u64 there, policy;
mov.u32 w, %tid.x; and.b32 at, w, 31; setp.eq.u32 one, at, 0; shr.u32 w, w, 5;"""


@constexpr_function
def ring_shape(stages, warps, tile_bytes):
    """(stages, warps, bytes of a warp's part of a tile): what all functions here are given as RING."""
    if 8 * stages * warps > 4 * ROW.value:
        raise ValueError(
            f"{stages} stages of {warps} warps have more barriers than a row of {4 * ROW.value} bytes holds"
        )
    return stages, warps, tile_bytes // warps


@constexpr_function
def _stages(ring):
    return ring[0]


@constexpr_function
def _tile_bytes(ring):
    return ring[1] * ring[2]


@constexpr_function
def _barriers(ring):
    """Where they begin, one of each warp for each stage."""
    stages, warps, part = ring
    return (stages + 1) * warps * part


@constexpr_function
def _rows(ring):
    """Of ROW integers: those of the tiles, one of barriers, one of marks."""
    return _barriers(ring) // (4 * ROW) + 2


@constexpr_function
def _layouts(warps):
    return gl.SwizzledSharedLayout(1, 1, 1, [0]), gl.BlockedLayout([1], [32], [warps], [0])


@constexpr_function
def _open_ptx(ring):
    stages, warps, _ = ring
    first = _barriers(ring)
    starts = [f"@one mbarrier.init.shared::cta.b64 [bar+{first + 8 * i}], 1;" for i in range(stages)]
    return "\n".join(
        [
            "{ .reg .u32 mark;",
            _head(),
            "mov.u32 $0, global_smem; mov.u32 at, %tid.x; mad.lo.u32 bar, at, 4, $0;",
            f"ld.shared.u32 mark, [bar+{first + 4 * ROW.value}]; setp.ne.u32 some, mark, at; @some trap;",
            f"mad.lo.u32 bar, w, {8 * stages}, $0;",
            *starts,
            "@one fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff; }",
        ]
    )


@constexpr_function
def _fetch_ptx(ring):
    stages, warps, part = ring
    first = _barriers(ring)
    return f"""{{ {_head()}
setp.ne.and.s32 some, $4, 0, one;
mad.lo.u32 bar, w, {stages}, $2; mad.lo.u32 bar, bar, 8, $1;
mad.lo.u32 at, $2, {warps}, w; mad.lo.u32 at, at, {part}, $1; mad.wide.u32 there, w, {part}, $3;
createpolicy.fractional.L2::{KEEP_IN_L2.value}.b64 policy, 1.0;
@some mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar+{first}], {part};
@some cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
  [at], [there], {part}, [bar+{first}], policy;
mov.b32 $0, 0; }}"""


@constexpr_function
def _arrived_ptx(ring):
    stages = ring[0]
    return f"""{{ {_head()}
mad.lo.u32 bar, w, {stages}, $2; mad.lo.u32 bar, bar, 8, $1; setp.eq.s32 some, $4, 0;
@some bra OVER;
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 some, [bar+{_barriers(ring)}], $3;
@!some bra AGAIN;
OVER: mov.b32 $0, 0; }}"""


@constexpr_function
def _send_ptx(ring, priority):
    stages, warps, part = ring
    return f"""{{ {_head()}
setp.ne.and.s32 some, $3, 0, one;
createpolicy.fractional.L2::{priority}.b64 policy, 1.0;
add.u32 at, w, {stages * warps}; mad.lo.u32 at, at, {part}, $1; mad.wide.u32 there, w, {part}, $2;
@some cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [there], [at], {part}, policy;
@one cp.async.bulk.commit_group;
mov.b32 $0, 0; }}"""


@constexpr_function
def _fence_ptx():
    return "fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff; mov.b32 $0, 0;"


@constexpr_function
def _sent_ptx():
    return f"{{ {_head()} @one cp.async.bulk.wait_group.read 0; bar.warp.sync 0xffffffff; mov.b32 $0, 0; }}"


@constexpr_function
def _put_ptx(vector):
    values = ", ".join(f"${2 * vector + i}" for i in range(4))
    return f"st.shared.v4.b32 [${vector}], {{{values}}}; " + " ".join(f"mov.b32 ${i}, 0;" for i in range(vector))


# PTX for `vector` elements at a time, in four registers, whose addresses are the same.
@constexpr_function
def _registers(vector):
    return ["f" if vector == 4 else "r"] * 4


@constexpr_function
def _of_take(vector):
    return ",".join([f"={r}" for r in _registers(vector)] + ["r"] * vector)


@constexpr_function
def _of_put(vector):
    return ",".join(["=r"] * vector + ["r"] * vector + _registers(vector))


@constexpr_function
def _only(dtype):
    return [dtype]


@gluon.jit
def open_ring(RING: gl.constexpr):
    """(the ring: its address in shared memory, its memory, for `close_ring`). Once in a kernel, of at most 8 warps."""
    ROWS: gl.constexpr = _rows(RING)
    WARPS: gl.constexpr = gl.num_warps()
    SHARED: gl.constexpr = _layouts(WARPS)[0]
    MARKS: gl.constexpr = _layouts(WARPS)[1]
    PTX: gl.constexpr = _open_ptx(RING)
    memory = gl.allocate_shared_memory(gl.int32, [ROWS, ROW], SHARED)
    memory.index(ROWS - 1).store(gl.arange(0, ROW, MARKS))  # each thread finds its own where it takes the memory to be
    return gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1), memory


@gluon.jit
def close_ring(memory):
    """Nothing is on its way. Up to here no other allocation of the kernel gets this memory."""
    memory._keep_alive()


@gluon.jit
def fetch(ring, i, source, some, RING: gl.constexpr):
    """Ask for the ith tile, which begins at `source`, if there is `some`, after a `fence` that came after tile i - stages was taken."""
    PTX: gl.constexpr = _fetch_ptx(RING)
    STAGES: gl.constexpr = _stages(RING)
    args = [ring, i % STAGES, source.to(gl.int64), some.to(gl.int32)]
    gl.inline_asm_elementwise(PTX, "=r,r,r,l,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrived(ring, i, some, RING: gl.constexpr):
    PTX: gl.constexpr = _arrived_ptx(RING)
    STAGES: gl.constexpr = _stages(RING)
    args = [ring, i % STAGES, i // STAGES % 2, some.to(gl.int32)]
    gl.inline_asm_elementwise(PTX, "=r,r,r,r,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def places(row, column, K: gl.constexpr, VECTOR: gl.constexpr):
    """Where elements lie in a tile of K columns, in bytes; VECTOR of them, 16 bytes, are in one place."""
    return (row[:, None] * K + (column // VECTOR * VECTOR)[None, :]) * (16 // VECTOR)


@gluon.jit
def take(ring, i, place, TYPE: gl.constexpr, VECTOR: gl.constexpr, RING: gl.constexpr):
    """The ith tile, in the layout of `place`."""
    STAGES: gl.constexpr = _stages(RING)
    SIZE: gl.constexpr = _tile_bytes(RING)
    REGISTERS: gl.constexpr = _of_take(VECTOR)
    TYPES: gl.constexpr = _only(TYPE)
    at = ring + i % STAGES * SIZE + place
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", REGISTERS, [at], dtype=TYPES, is_pure=False, pack=VECTOR
    )[0]


@gluon.jit
def _write(at, tile, VECTOR: gl.constexpr):
    PTX: gl.constexpr = _put_ptx(VECTOR)
    REGISTERS: gl.constexpr = _of_put(VECTOR)
    gl.inline_asm_elementwise(PTX, REGISTERS, [at, tile], dtype=gl.int32, is_pure=False, pack=VECTOR)


@gluon.jit
def fill(ring, place, tile, VECTOR: gl.constexpr, RING: gl.constexpr):
    """Every tile that is taken is this one, and none is asked for."""
    STAGES: gl.constexpr = _stages(RING)
    SIZE: gl.constexpr = _tile_bytes(RING)
    for i in gl.static_range(STAGES):
        _write(ring + i * SIZE + place, tile, VECTOR)


@gluon.jit
def put(ring, place, tile, VECTOR: gl.constexpr, RING: gl.constexpr):
    """A tile that is to be sent after a `fence`; the last one was `sent`."""
    STAGES: gl.constexpr = _stages(RING)
    SIZE: gl.constexpr = _tile_bytes(RING)
    _write(ring + STAGES * SIZE + place, tile, VECTOR)


@gluon.jit
def fence():
    """What the warp has taken and put comes before the copies that follow."""
    PTX: gl.constexpr = _fence_ptx()
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send(ring, to, some, PRIORITY: gl.constexpr, RING: gl.constexpr):
    """Copy what was put to `to`, if there is `some`, with this PRIORITY in L2: without any, a line keeps the one of its `fetch`."""
    PTX: gl.constexpr = _send_ptx(RING, PRIORITY)
    args = [ring, to.to(gl.int64), some.to(gl.int32)]
    gl.inline_asm_elementwise(PTX, "=r,r,l,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sent():
    """What was sent has been read: another tile may be put, or the kernel end."""
    PTX: gl.constexpr = _sent_ptx()
    gl.inline_asm_elementwise(PTX, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
