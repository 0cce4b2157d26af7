"""Reads the SASS of a Hopper kernel for registers that are used while an asynchronous wgmma may still use them.

A wgmma (HGMMA) reads its register operand A and updates its accumulators some time after it was issued, until a wait
(WARPGROUP.DEPBAR.LE gsb0, n: all but the newest n groups are done; an HGMMA with `gsb0` ends a group). Some versions of
ptxas give such a register to another value before the wait, and the product is then wrong now and then. Until the wait,
no instruction may write a register of A, or read or write an accumulator; products follow each other in order, so that
they may share accumulators.

    hazards(kernel.asm["sass"]) -> sentences, none if all is well

Every path is followed, from the start of every block, as far as it brings new products in flight. Predicates are not
understood: both ways of a branch are taken, and an instruction under a predicate counts as executed; such a wait does not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ENDS = ("EXIT", "BRX", "RET", "JMP", "BPT")  # after these, the next line is not what follows
MOST_GROUPS = 16


class Product(NamedTuple):
    text: str
    given: frozenset[int]  # A, if it lies in registers
    result: frozenset[int]  # accumulators


Groups = tuple[tuple[Product, ...], ...]


class Instruction(NamedTuple):
    text: str
    op: str
    guarded: bool
    target: str | None  # of a branch
    reads: frozenset[int]
    writes: frozenset[int]
    product: Product | None  # of an HGMMA; A and accumulators are then its reads and writes


def _span(operand: str, width: int) -> frozenset[int]:
    """The registers of the operand, `width` of them from its first one; of an address, those that it names."""
    found: set[int] = set()
    for number, pair in re.findall(r"(?<![A-Za-z])R(\d+)(?:\.reuse)?(\.64)?", operand):
        found.update(
            range(int(number), int(number) + (1 if "[" in operand and not pair else max(width, 2 * bool(pair))))
        )
    return frozenset(found)


def _size(op: str) -> int:
    """Registers of what a load gives, a store takes, or a result of more than one register."""
    parts = op.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1])
    if parts[0].startswith(("LD", "ST", "ATOM", "RED")):
        return 4 if "128" in parts else 2 if "64" in parts else 1
    if parts[0] == "HMMA":
        return 4
    wide = "WIDE" in parts or parts[0] in ("DADD", "DMUL", "DFMA") or (parts[0] == "CS2R" and "32" not in parts)
    return 2 if wide else 1


def parse(line: str) -> Instruction:
    text = line.split("\t")[-1].strip().rstrip(";").strip()
    guarded = text.startswith("@")
    op, _, rest = (text.split(" ", 1)[1] if guarded else text).partition(" ")
    operands = [part.strip() for part in rest.split(",")] if rest else []
    if op.startswith("HGMMA"):
        columns, kind = re.match(r"HGMMA\.64x(\d+)x\d+\.(\w+)", op).groups()  # type: ignore[union-attr]
        result = _span(operands[0], int(columns) // (2 if kind in ("F32", "S32") else 4))
        given = _span(operands[1], 4) if operands[1].startswith("R") else frozenset()
        return Instruction(text, op, guarded, None, given, result, Product(text, given, result))
    target = re.search(r"\bLBB\d+", rest) if op.startswith("BRA") else None
    at = 1 if op.startswith("SHFL") else 0  # SHFL gives a predicate first
    gives = len(operands) > at and operands[at].startswith("R") and not op.startswith(("ST", "RED", "BRX", "RET"))
    writes = _span(operands[at], _size(op)) if gives else frozenset()
    sources = operands[at + 1 :] if gives else operands
    size = _size(op) if not gives or op.startswith(("HMMA", "D")) else 1
    reads = frozenset().union(*(_span(x, size) for x in sources), *[_span(x, 2) for x in sources[2:3] if "WIDE" in op])
    return Instruction(text, op, guarded, target and target[0], reads, writes, None)


def blocks(sass: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Straight pieces of code, and which may follow each."""
    code: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.fullmatch(r"\s*(LBB\d+):\s*", line):
            if code[-1]:
                code.append([])
            labels[label[1]] = len(code) - 1
        elif line.strip() and not line.startswith("Function:"):
            code[-1].append(parse(line))
            if code[-1][-1].op.split(".")[0] in (*ENDS, "BRA"):
                code.append([])
    follow = []
    for n, block in enumerate(code):
        last = block[-1] if block else None
        leaves = (
            last is not None and not last.guarded and last.op.split(".")[0] in (*ENDS, "BRA") and "," not in last.text
        )
        after = [] if leaves or n + 1 == len(code) else [n + 1]
        follow.append(after + ([labels[last.target]] if last is not None and last.target else []))
    return code, follow


def hazards(sass: str) -> list[str]:
    """One sentence for each use of a register that a product in flight may still use."""
    code, follow = blocks(sass)
    found: dict[str, None] = {}
    # What is in flight: groups, oldest first, each a tuple of products; the last group is not ended yet.
    todo: list[tuple[int, Groups]] = [(n, ((),)) for n in range(len(code))]
    seen = set(todo)
    while todo:
        n, groups = todo.pop()
        for step in code[n]:
            groups = _after(step, groups, found)
        if len(groups) > MOST_GROUPS:
            found[f"Over {MOST_GROUPS} groups are in flight: a loop does not wait for its products."] = None
            continue
        new = {(to, groups) for to in follow[n]} - seen
        seen |= new
        todo += new
    return list(found)


def _after(step: Instruction, groups: Groups, found: dict[str, None]) -> Groups:
    """What is in flight after the step; what it may not touch is told to `found`."""
    for product in (product for group in groups for product in group):
        wrong = {"writes": step.writes & product.given, "reads": step.reads & product.result}
        if step.product is None:  # products update accumulators one after the other
            wrong["writes"] |= step.writes & product.result
        for what, registers in wrong.items():
            if registers:
                found[f"`{step.text}` {what} R{min(registers)} while `{product.text}` is in flight."] = None
    if step.product is not None:
        groups = (*groups[:-1], (*groups[-1], step.product))
        if "gsb0" in step.text:
            groups = (*groups, ())
    if step.op.startswith("WARPGROUP.DEPBAR") and not step.guarded:
        ended, newest = groups[:-1], int(step.text.rsplit(",", 1)[1], 0)
        groups = (*ended[max(0, len(ended) - newest) :], groups[-1])
    return groups
