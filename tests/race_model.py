"""A race detector for shared memory as Hopper has it: vector clocks of partitions and of asynchronous copies.

compute-sanitizer does not follow mbarriers that one thread arrives at for others, nor what TMA and wgmma do; this does, on the
traces of tests/gluon_on_cpu.py. Two accesses of which one writes must be ordered: by a partition itself, through an mbarrier
(arrive releases, wait acquires), or by waiting for what was asynchronous. What was written by ordinary stores and is read or
overwritten by TMA or wgmma, the async proxy, needs a fence.proxy.async between, by whichever of the two sides.

Not modelled: races of warps inside a partition, and global memory.
"""

from __future__ import annotations

import collections
import itertools
import threading

CELL = 256  # bytes that are looked at as one; every tile is a multiple

_copies = itertools.count()


class Race(AssertionError):
    pass


class Clock:
    """What a partition, or a copy in flight, knows to have happened: by whom, up to which tick; and what of it was fenced."""

    def __init__(self, name, known=(), fenced=()):
        self.name, self.known, self.fenced = name, dict(known), dict(fenced)
        self.known[name] = self.known.get(name, 0) + 1

    @property
    def now(self):
        return self.known[self.name]

    def tick(self):
        self.known[self.name] += 1

    def release(self):
        """What somebody who acquires it may rely on. What this one does later is not part of it."""
        given = dict(self.known), dict(self.fenced)
        self.tick()
        return given

    def acquire(self, given):
        for mine, theirs in zip((self.known, self.fenced), given, strict=True):
            for who, when in theirs.items():
                mine[who] = max(mine.get(who, 0), when)

    def fence(self):
        for who, when in self.known.items():
            self.fenced[who] = max(self.fenced.get(who, 0), when)
        self.tick()

    def copy_starts(self):
        """The clock of an asynchronous copy that this one starts."""
        return Clock(f"copy {next(_copies)} of {self.name}", *self.release())

    def saw(self, event, fenced=False):
        who, when = event[:2]
        return when <= (self.fenced if fenced else self.known).get(who, 0)


class Memory:
    """The accesses to one allocation, by cells. An event is (who, tick), of a write also whether by the async proxy."""

    def __init__(self, name):
        self.name, self.lock = name, threading.Lock()
        self.writes, self.reads, self.open = {}, {}, collections.Counter()

    def read(self, span, clock):
        """An ordinary read."""
        with self.lock:
            for cell in _cells(span):
                self._after(self.writes.get(cell), clock, False, cell, "read")
                self.reads.setdefault(cell, {})[clock.name] = (clock.name, clock.now)

    def read_starts(self, span, clock):
        """One by TMA or wgmma, that lasts until it is waited for."""
        with self.lock:
            for cell in _cells(span):
                self._after(self.writes.get(cell), clock, True, cell, "read")
                self.open[cell] += 1

    def read_is_over(self, span, clock):
        with self.lock:
            for cell in _cells(span):
                self.open[cell] -= 1
                self.reads.setdefault(cell, {})[clock.name] = (clock.name, clock.now)

    def write(self, span, clock, proxy):
        with self.lock:
            for cell in _cells(span):
                self._after(self.writes.get(cell), clock, proxy, cell, "write")
                if self.open[cell]:
                    raise Race(f"{self._at(cell)}: {clock.name} writes, and an async read was not waited for")
                for event in self.reads.pop(cell, {}).values():
                    if not clock.saw(event):
                        raise Race(f"{self._at(cell)}: {clock.name} writes, and {event[0]} may still be reading")
                self.writes[cell] = (clock.name, clock.now, proxy)

    def _after(self, event, clock, proxy, cell, what):
        if event is None:
            return
        if not clock.saw(event):
            raise Race(f"{self._at(cell)}: the {what} by {clock.name} is not ordered behind the write by {event[0]}")
        if proxy and not event[2] and not clock.saw(event, fenced=True):
            raise Race(
                f"{self._at(cell)}: no fence between the write by {event[0]} and the async {what} by {clock.name}"
            )

    def _at(self, cell):
        return f"{self.name} + {cell * CELL}"


def _cells(span):
    start, stop = span
    return range(start // CELL, -(-stop // CELL))
