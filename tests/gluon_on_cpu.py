"""Runs the kernels of gdnir/kernels/*_gluon*.py on a CPU, which Triton's interpreter cannot: partitions are threads,
barriers and TMA behave as on the device, layouts mean nothing. It shows what the kernel computes, that every barrier is
signalled as often as it is waited for, that nothing is read before it is there, and by tests/race_model.py that accesses to shared
memory are ordered, whatever the timing.

    with gluon_on_cpu(seed): gluon_impl.gated_delta_rule(...)
    with gluon_on_cpu(of="summary", fence_async_shared=lambda: None): ...  # what this kernel without fences would do

A number that a kernel is given is a tensor here: `x -= 1` would change the argument too.

Where the hardware may do something early or late, it is done as late as the kernel's waits allow: a wgmma computes when it
is waited for, a TMA store reads shared memory when store_wait says so. Shared memory begins as NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
import threading
import types

import torch
from race_model import Clock, Memory

NAN = float("nan")
local = threading.local()


class Pointer:
    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.at + offset)


def pointer(tensor):
    flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return Pointer(flat, tensor.storage_offset())


def load(p, mask=True, other=None, eviction_policy=""):
    at, mask = torch.broadcast_tensors(torch.as_tensor(p.at), torch.as_tensor(mask))
    assert bool((~mask | ((at >= 0) & (at < p.memory.numel()))).all()), "a bad address"
    values = p.memory[torch.where(mask, at, 0)]
    return torch.where(mask, values, other) if other is not None else values


def store(p, value, mask=True):
    at, mask = torch.broadcast_tensors(torch.as_tensor(p.at), torch.as_tensor(mask))
    assert bool((~mask | ((at >= 0) & (at < p.memory.numel()))).all()), "a bad address"
    value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=p.memory.dtype)
    assert value.dtype == p.memory.dtype
    p.memory[at[mask]] = value.expand(at.shape)[mask]


class Shared:
    """A tile of shared memory: `get` looks at it when it is used, not when it is named. `span`: its bytes in `memory`."""

    def __init__(self, get, memory, span, layout=None):
        self.get, self.memory, self.span, self.layout = get, memory, span, layout

    @property
    def dtype(self):
        return self.get().dtype

    def part(self, get, first, last, of):
        """What `get` gives, from the first to the last of `of` equal pieces of the bytes."""
        start, stop = self.span
        size = (stop - start) // of
        return Shared(get, self.memory, (start + first * size, start + last * size))

    def index(self, i):
        i = int(i)
        return self.part(lambda: self.get()[i], i, i + 1, len(self.get()))

    def slice(self, start, length, dim=0):
        get = lambda: self.get().narrow(dim, start, length)
        return self.part(get, start, start + length, len(self.get())) if dim == 0 else self.part(get, 0, 1, 1)

    def permute(self, order):
        return self.part(lambda: self.get().permute(order), 0, 1, 1)

    def load(self, layout=None):
        self.memory.read(self.span, local.clock)
        return self.get().clone()

    def store(self, value):
        tile = self.get()
        assert value.dtype == tile.dtype
        self.memory.write(self.span, local.clock, proxy=False)
        tile.copy_(value)

    def _reinterpret(self, dtype, shape, layout):
        if len(shape) == 2:  # other pieces of the same bytes
            return self.part(lambda: self.get().view(shape), 0, 1, 1)
        count, rows, columns = shape
        if columns == 64:  # tiles of other elements in the same place
            get = lambda: self.get().view(-1).view(dtype)[: count * rows * columns].view(shape)
            start, size = self.span[0], count * rows * columns * dtype.itemsize
            return Shared(get, self.memory, (start, start + size))
        # Tiles of 64 columns lie one after the other; read only.
        return self.part(lambda: self.get().view(count, -1, rows, 64).permute(0, 2, 1, 3).reshape(shape), 0, 1, 1)


class Ring:
    """What bulk_ring.py does, for all warps of a program at once: a tile is copied in when it is taken, out when it is known to be."""

    def __init__(self, shape):
        self.asked, self.filled, self.leaving, self.loading, self.fenced = [None] * shape[0], None, None, None, True
        self.closed = False

    def fetch(self, i, source, some, shape):
        stage = int(i) % len(self.asked)
        assert self.asked[stage] is None, "asked for a tile in the place of one that has not been taken"
        assert self.loading != stage, "asked for a tile in the place of one that may still be loaded into registers"
        self.asked[stage] = source if bool(some) else None

    def arrived(self, i, some, shape):
        assert not bool(some) or self.asked[int(i) % len(self.asked)] is not None, (
            "waits for a tile that nobody asked for"
        )

    def take(self, i, place, dtype, vector, shape):
        stage = int(i) % len(self.asked)
        source, self.asked[stage], self.loading = self.asked[stage], None, stage
        element = torch.arange(place.numel()).view(place.shape)
        assert bool((place == element // vector * 16).all()) and place.numel() * 16 == shape[1] * shape[2] * vector
        return self.filled if source is None else load(source + element)

    def fill(self, place, tile, vector, shape):
        assert not any(self.asked), "fills the place of a tile that is on its way"
        self.filled = tile

    def put(self, place, tile, vector, shape):
        assert self.leaving is None, "a tile in the place of one that has not been sent"
        self.tile, self.fenced = tile, False

    def fence(self):
        self.loading, self.fenced = None, True

    def send(self, to, some, priority, shape):
        assert self.fenced, "sent before it is known to be put"
        self.leaving = to if bool(some) else None

    def sent(self):
        if self.leaving is not None:
            store(self.leaving + torch.arange(self.tile.numel()).view(self.tile.shape), self.tile)
        self.leaving = None

    def close(self):
        assert not (any(self.asked) or self.leaving), "a copy left in flight"
        self.closed = True


class Deadlock(AssertionError):
    pass


class Barrier:
    def __init__(self):
        self.changed = threading.Condition()

    def start(self, count):
        self.count, self.left, self.bytes, self.phase = count, count, 0, 0
        self.known = Clock("a barrier")  # by who has arrived
        self.phases = []  # what it knew when a phase was complete

    def update(self, clock, arrivals=0, size=0):
        with self.changed:
            self.known.acquire(clock.release())
            self.left -= arrivals
            self.bytes += size
            assert self.left >= 0, "arrived more often than the barrier counts"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase + 1
                self.phases.append(self.known.release())
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            for _ in range(100):
                if self.changed.wait_for(lambda: self.phase & 1 != int(parity), timeout=0.2):
                    break
                assert not local.errors, "another partition failed"
            else:
                raise Deadlock
            if self.phase:  # a wait that is over before anything arrived
                local.clock.acquire(self.phases[-1])


class Barriers:
    """`number`: of the kernel's arrays of barriers, in the order of their allocation."""

    def __init__(self, count, number):
        self.all = [Barrier() for _ in range(count)]
        for barrier in self.all:
            barrier.number = number

    def index(self, i):
        return self.all[int(i)]


def pause():
    """Let another partition run now, or not: each seed is another interleaving."""
    if local.random.random() < 0.3:
        threading.Event().wait(0.0003)


class Mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier, count):
        barrier.start(count)

    @staticmethod
    def expect(barrier, size):
        barrier.update(local.clock, arrivals=1, size=size)

    @staticmethod
    def arrive(barrier, count):
        pause()
        barrier.update(local.clock, arrivals=count)

    @staticmethod
    def wait(barrier, parity, pred=True):
        pause()
        if pred:
            barrier.wait(parity)


class Tma:
    @staticmethod
    def box(descriptor, coordinates):
        """(tensor, slices of it, slices of the box): both clipped to the tensor."""
        inside, box = [], []
        for at, size, limit in zip(coordinates, descriptor.block_shape, descriptor.shape, strict=True):
            at = int(at)
            low, high = min(max(at, 0), limit), min(max(at + size, 0), limit)
            inside.append(slice(low, high))
            box.append(slice(low - at, high - at))
        return Tma.matrix(descriptor), tuple(inside), tuple(box)

    @staticmethod
    def matrix(descriptor):
        """The memory that a descriptor has the address of."""
        shape, strides, dtype = descriptor.shape, descriptor.strides, descriptor.base.dtype
        size = (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(descriptor.base.data_ptr())
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)

    @staticmethod
    def async_copy_global_to_shared(descriptor, coordinates, barrier, tile):
        whole, inside, box = Tma.box(descriptor, coordinates)
        target, clock = tile.get(), local.clock.copy_starts()
        tile.memory.write(tile.span, clock, proxy=True)
        target.zero_()
        target[box] = whole[inside]
        barrier.update(clock, size=-target.numel() * target.element_size())

    @staticmethod
    def async_copy_shared_to_global(descriptor, coordinates, tile):
        tile.memory.read_starts(tile.span, local.clock)
        local.stores.append((descriptor, [int(c) for c in coordinates], tile))

    @staticmethod
    def store_wait(pending):
        while len(local.stores) > pending:
            descriptor, coordinates, tile = local.stores.pop(0)
            whole, inside, box = Tma.box(descriptor, coordinates)
            whole[inside] = tile.get()[box]
            tile.memory.read_is_over(tile.span, local.clock)


class Wgmma:
    """A product in flight."""

    def __init__(self, a, b, acc):
        self.a, self.b, self.acc, self.value = a, b, acc, None
        self.shared = [x for x in (a, b) if isinstance(x, Shared)]
        for x in self.shared:
            x.memory.read_starts(x.span, local.clock)

    def run(self):
        for x in self.shared:
            x.memory.read_is_over(x.span, local.clock)
        a = self.a.get() if isinstance(self.a, Shared) else self.a
        assert a.dtype == self.b.get().dtype in (torch.bfloat16, torch.float16)
        acc = self.acc.value if isinstance(self.acc, Wgmma) else self.acc
        product = a.float() @ self.b.get().float()
        self.value = product if acc is None else acc + product


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async):
    assert is_async
    found = Wgmma(a if isinstance(a, Shared) else a.clone(), b, acc if use_acc else None)
    local.wgmmas.append(found)
    return found


def warpgroup_mma_wait(pending, deps):
    while len(local.wgmmas) > pending:
        local.wgmmas.pop(0).run()
    done = []
    for dep in deps:
        assert not isinstance(dep, Wgmma) or dep.value is not None, "read before it was waited for"
        done.append(dep.value if isinstance(dep, Wgmma) else dep)
    return done[0] if len(done) == 1 else tuple(done)


def start(clock, seed, errors):
    local.clock, local.wgmmas, local.stores, local.random = clock, [], [], random.Random(seed)
    local.errors = errors


def run_partition(function, args, clock, seed, errors):
    start(clock, seed, errors)
    try:
        function(*args)
        assert not local.wgmmas and not local.stores, "work left in flight"
    except BaseException as error:
        errors.append(error)


class Cpu:
    """What the kernel finds as `gl`."""

    constexpr = object
    int32, int64, float32, float16, bfloat16 = torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16
    load, store = staticmethod(load), staticmethod(store)
    exp, exp2, rsqrt, sigmoid, abs = map(staticmethod, (torch.exp, torch.exp2, torch.rsqrt, torch.sigmoid, torch.abs))
    sum, static_range = staticmethod(torch.sum), range
    reshape, expand_dims = staticmethod(torch.reshape), staticmethod(torch.unsqueeze)
    cast = staticmethod(lambda x, dtype: torch.as_tensor(x, dtype=dtype))
    broadcast, num_warps = staticmethod(torch.broadcast_tensors), staticmethod(lambda: 4)
    max = staticmethod(lambda x, axis: x.amax(axis))
    join, static_assert = staticmethod(lambda a, b: torch.stack([a, b], -1)), staticmethod(lambda *said: None)
    associative_scan = staticmethod(lambda x, axis, combine: torch.cumsum(x, axis))  # every scan here is a sum
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    maximum = staticmethod(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)))

    def __init__(self, pid, seed):
        self.pid, self.seed, self.allocations, self.barriers = pid, seed, 0, 0

    def __getattr__(self, name):
        assert name.endswith("Layout"), name
        return lambda *args, **kwargs: None

    def program_id(self, axis=0):
        return torch.tensor(self.pid, dtype=torch.int32)

    def where(self, condition, a, b):
        if isinstance(a, Pointer):
            return a if condition else b
        return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))

    def arange(self, start, stop, layout):
        return torch.arange(start, stop, dtype=torch.int32)

    def zeros(self, shape, dtype, layout):
        return torch.zeros(shape, dtype=dtype)

    def convert_layout(self, x, layout, assert_trivial=False):
        return x

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == torch.int64:
            self.barriers += 1
            return Barriers(shape[0], self.barriers - 1)
        memory = torch.full(shape, NAN, dtype=dtype)
        self.allocations += 1
        name = f"{str(dtype).removeprefix('torch.')}{shape}, number {self.allocations}"
        return Shared(lambda: memory, Memory(name), (0, memory.numel() * memory.element_size()), layout)

    def warp_specialize(self, parts, warps, registers):
        errors, known = [], local.clock.release()
        threads = [
            threading.Thread(
                target=run_partition,
                args=(*part, Clock(f"partition {i}", *known), f"{self.seed} {self.pid} {i}", errors),
                daemon=True,
            )
            for i, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def plain(function, language):
    """A function of Triton's, and those it calls, with `language` as its `tl`."""
    code, names = function.fn.__code__, {"tl": language}
    for name in set(code.co_names) & set(function.fn.__globals__) - {"tl"}:
        value = function.fn.__globals__[name]
        names[name] = plain(value, language) if type(value).__name__ == "JITFunction" else value.value
    return types.FunctionType(code, names)


class Launched:
    """Stands for a Gluon kernel: `kernel[grid](...)` runs it."""

    def __init__(self, kernels, name, helpers, seed, instead):
        self.kernels, self.name, self.helpers, self.seed, self.instead = kernels, name, helpers, seed, instead

    def __getitem__(self, grid):
        return lambda *args, **kwargs: [self.run(pid, args, kwargs) for pid in range(grid[0])]

    def run(self, pid, args, kwargs):
        module, ring = self.kernels, None

        def open_ring(shape):
            nonlocal ring
            ring = Ring(shape)
            return ring, ring

        names = {
            **vars(module),
            "gl": Cpu(pid, self.seed),
            "tma": Tma,
            "mbarrier": Mbarrier,
            "fence_async_shared": lambda: local.clock.fence(),
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "mma_v2": lambda a, b, acc: acc + a.float() @ b.float(),
        }
        for name, value in {**self.helpers, **vars(module)}.items():
            if type(value).__name__ == "GluonJITFunction" and name not in ("_launch_dependents", "_wait_for_primary"):
                function = value.fn
                names[name] = types.FunctionType(function.__code__, names, name, function.__defaults__)
        names |= {
            name: plain(value, names["gl"]) for name, value in names.items() if type(value).__name__ == "JITFunction"
        }
        names |= {
            "_barrier": lambda: None,
            "_launch_dependents": lambda: None,
            "_wait_for_primary": lambda: None,
            "_opaque_zero": lambda c: 0,
            "_after": lambda x, zero: x,
            "_power_of_two": lambda x: torch.where(x > 0, torch.exp2(torch.floor(torch.log2(x))), 1.0),
            "_after_16": lambda x, zero: x,
            "_arrive": lambda: None,
            "_wait": lambda: None,
            "_over_groups": lambda sums, ctas, group: [x.view(-1, group).sum(1).repeat_interleave(group) for x in sums],
            "open_ring": open_ring,
            **{name: getattr(Ring, name) for name in ("fetch", "arrived", "take", "fill", "put", "send")},
            **{name: lambda name=name: getattr(ring, name)() for name in ("fence", "sent")},
            "close_ring": Ring.close,
            **self.instead,
        }
        arguments = [self.argument(x) for x in args]
        options = {k: v for k, v in kwargs.items() if k not in ("num_warps", "num_ctas", "maxnreg", "launch_pdl")}
        start(Clock("the program"), self.seed, [])
        names[self.name](*arguments, **options)
        assert not local.stores, "work left in flight"
        assert ring is None or ring.closed, "a ring left open"

    def argument(self, x):
        if x is None:
            return x
        if isinstance(x, torch.Tensor):
            return pointer(x)
        if hasattr(x, "block_shape"):
            x.dtype = x.base.dtype
            return x
        return torch.tensor(x, dtype=torch.int64 if isinstance(x, int) else torch.float32)


@contextlib.contextmanager
def gluon_on_cpu(seed=0, of="", **instead):
    from gdnir.kernels import (
        delta_rule_gluon,
        delta_rule_gluon_prep,
        delta_rule_gluon_segments,
        delta_rule_gluon_starts,
        gdn_step_gluon,
    )
    from gdnir.lowering import gluon_rule

    modules = delta_rule_gluon, delta_rule_gluon_prep, delta_rule_gluon_segments, gdn_step_gluon
    found = [(m, name) for m in modules for name in vars(m) if name.endswith("_kernel")]
    originals = [getattr(module, name) for module, name in found]
    interval = sys.getswitchinterval()
    for module, name in found:
        changed = instead if of in name else {}
        setattr(
            module,
            name,
            Launched(types.SimpleNamespace(**vars(module)), name, vars(delta_rule_gluon_starts), seed, changed),
        )
    sys.setswitchinterval(1e-4)
    gluon_rule._plan.cache_clear()  # plans know kernels
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gluon_rule._plan.cache_clear()
        for (module, name), original in zip(found, originals, strict=True):
            setattr(module, name, original)
