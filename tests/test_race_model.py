"""The race detector finds races, in traces by hand and in the Gluon kernels with something taken out."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_cases_gluon as cases
from gluon_on_cpu import Deadlock, Mbarrier, Tma, gluon_on_cpu
from race_model import Clock, Memory, Race

TILE = (0, 512)


def test_what_a_barrier_orders_is_no_race():
    one, other, memory = Clock("one"), Clock("other"), Memory("tile")
    memory.write(TILE, one, proxy=False)
    other.acquire(one.release())
    memory.read(TILE, other)
    one.acquire(other.release())
    memory.write(TILE, one, proxy=False)


def test_nothing_between_a_write_and_a_read():
    one, other, memory = Clock("one"), Clock("other"), Memory("tile")
    given = one.release()
    memory.write(TILE, one, proxy=False)
    other.acquire(given)  # of before the write
    with pytest.raises(Race, match="the read by other is not ordered behind the write by one"):
        memory.read((256, 260), other)


def test_a_read_that_the_writer_knows_nothing_of():
    one, other, memory = Clock("one"), Clock("other"), Memory("tile")
    memory.write(TILE, one, proxy=True)
    other.acquire(one.release())
    memory.read(TILE, other)
    with pytest.raises(Race, match="one writes, and other may still be reading"):
        memory.write(TILE, one, proxy=True)


def test_an_async_read_lasts_until_it_is_waited_for():
    one, memory = Clock("one"), Memory("tile")
    memory.write(TILE, one, proxy=True)
    memory.read_starts(TILE, one)
    with pytest.raises(Race, match="one writes, and an async read was not waited for"):
        memory.write(TILE, one, proxy=False)
    memory.read_is_over(TILE, one)
    memory.write(TILE, one, proxy=False)


@pytest.mark.parametrize("side", ["writer", "reader", "nobody"])
def test_a_fence_on_either_side(side):
    one, other, memory = Clock("one"), Clock("other"), Memory("tile")
    memory.write(TILE, one, proxy=False)
    if side == "writer":
        one.fence()
    other.acquire(one.release())
    if side == "reader":
        other.fence()
    if side == "nobody":
        with pytest.raises(Race, match="no fence between the write by one and the async read by other"):
            memory.read_starts(TILE, other)
    else:
        memory.read_starts(TILE, other)


def test_a_fence_covers_no_later_write():
    one, memory = Clock("one"), Memory("tile")
    one.fence()
    memory.write(TILE, one, proxy=False)
    with pytest.raises(Race, match="no fence"):
        memory.read_starts(TILE, one)


def test_a_copy_is_over_when_its_barrier_says_so():
    one, memory = Clock("one"), Memory("tile")
    copy = one.copy_starts()
    memory.write(TILE, copy, proxy=True)
    with pytest.raises(Race, match="the read by one is not ordered behind the write by copy"):
        memory.read(TILE, one)
    one.acquire(copy.release())
    memory.read(TILE, one)


class Deaf(Mbarrier):
    """Who waits for one of a kernel's arrays of barriers goes on as if it were done."""

    def __init__(self, number):
        self.number = number

    def wait(self, barrier, parity, pred=True):
        if barrier.number != self.number:
            Mbarrier.wait(barrier, parity, pred)


class Hasty(Tma):
    """Goes on while one store more than it says is still reading."""

    @staticmethod
    def store_wait(pending):
        Tma.store_wait(pending + 1)


# Kernel, and what it lacks. The barriers of carry: a stage is full, is empty, P is there, a step is given, is taken; of summary: full, empty.
MUTANTS = {
    "carry-fence": ("delta_rule_gluon_kernel", {"fence_async_shared": lambda: None}),
    "carry-full": ("delta_rule_gluon_kernel", {"mbarrier": Deaf(0)}),
    "carry-empty": ("delta_rule_gluon_kernel", {"mbarrier": Deaf(1)}),
    "carry-p": ("delta_rule_gluon_kernel", {"mbarrier": Deaf(2)}),
    "carry-given": ("delta_rule_gluon_kernel", {"mbarrier": Deaf(3)}),
    "carry-taken": ("delta_rule_gluon_kernel", {"mbarrier": Deaf(4)}),
    "carry-store": ("delta_rule_gluon_kernel", {"tma": Hasty}),
    "summary-fence": ("summary", {"fence_async_shared": lambda: None}),
    "summary-full": ("summary", {"mbarrier": Deaf(0)}),
    "summary-empty": ("summary", {"mbarrier": Deaf(1)}),
    "prep-fence": ("prep", {"fence_async_shared": lambda: None}),
    "prep-full": ("prep", {"mbarrier": Deaf(0)}),
}


def run(schedule, monkeypatch, **mutant):
    """Whole, with many segments, and with long ones: all stages come round, and the last chunk is not whole."""
    cases.only(schedule, monkeypatch)
    for chunks, segment in (6, 0), (6, 1), (9, 4):
        with gluon_on_cpu(**mutant):
            cases.check(cases.Case("", cases.cont(64 * chunks + 30), heads=(1, 1), segment=segment), "cpu")


@pytest.mark.parametrize("schedule", cases.SCHEDULES)
def test_the_kernels_have_none(schedule, monkeypatch):
    run(schedule, monkeypatch)


@pytest.mark.parametrize(
    ("schedule", "mutant"),
    [(s, m) for m in MUTANTS for s in (cases.SCHEDULES if m.startswith("carry") else cases.SCHEDULES[:1])],
)
def test_a_kernel_that_lacks_something(schedule, mutant, monkeypatch):
    kernel, without = MUTANTS[mutant]
    # Who does not wait may be two phases ahead of one who does.
    with pytest.raises((Race, Deadlock) if "mbarrier" in without else Race):
        run(schedule, monkeypatch, of=kernel, **without)
