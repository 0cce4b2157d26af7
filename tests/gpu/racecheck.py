"""compute-sanitizer's racecheck over tests/gpu/sanitizer_smoke.py, and what of its findings is Triton's own:

    python tests/gpu/racecheck.py [WORD ...]      # cases whose names have a word

Before and after its partitions run, a kernel with `warp_specialize` passes words through shared memory: which partition a warp
runs, and the values that it captured. Triton 3.6 orders both by `barrier.sync 1`, which all warps take; racecheck (2025.3) loses
some of these barriers, and calls the words a race now and then, in a kernel that does next to nothing else as well (`handover`). In the
debug information these words have the line of the kernel's definition, or are written at that of `warp_specialize` or of the `if`
before it. Every other finding is an error here.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

SMOKE = Path(__file__).with_name("sanitizer_smoke.py")
KERNELS = {path.name: path for path in (SMOKE, *(SMOKE.parents[2] / "gdnir/kernels").glob("*.py"))}
ACCESS = re.compile(r"(Read|Write) Thread .* at (\w+)\+0x\w+ in (\S+):(\d+)")


def hazards(text: str) -> collections.Counter:
    """How often each pair of accesses was found: (kernel, (Write or Read, file, line), the other)."""
    found, before = collections.Counter(), None
    for line in text.splitlines():
        access = ACCESS.search(line)
        if access is None:
            before = None
            continue
        how, kernel, file, number = access.groups()
        here = how, file, int(number)
        if before is not None:
            found[kernel, before, here] += 1
            here = None
        before = here
    return found


def handed_over(kernel: str, accesses: tuple) -> bool:
    """Whether both accesses are what Triton adds to the kernel: no access to shared memory is written at these lines."""
    for how, file, number in accesses:
        lines = KERNELS[file].read_text().splitlines() if file in KERNELS else []
        definition = next((i for i, line in enumerate(lines, 1) if line.startswith(f"def {kernel}(")), None)
        if definition is None:
            return False
        head = next(i for i in range(definition, 0, -1) if not lines[i - 2].startswith("@"))
        specialize = how == "Write" and any("gl.warp_specialize(" in line for line in lines[number - 1 : number + 1])
        if not (head <= number <= definition or specialize):
            return False
    return True


def main(words: list[str]) -> int:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    subprocess.run([sys.executable, SMOKE, *words], check=True, stdout=subprocess.DEVNULL)  # compiles
    command = [tool, "--tool", "racecheck", "--racecheck-report", "hazard", "--print-limit", "1000000"]
    run = subprocess.run(
        [*command, "--show-backtrace", "no", sys.executable, SMOKE, *words], capture_output=True, text=True
    )
    print("\n".join(line for line in run.stdout.splitlines() if not line.startswith("=========")))
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards?", run.stdout)
    if run.returncode or summary is None:
        print(f"racecheck did not end as it should:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return 1
    found = hazards(run.stdout)
    if int(summary[1]) != found.total():
        print(f"racecheck tells of {summary[1]} hazards, and {found.total()} were understood.")
        return 1
    own = collections.Counter()
    for (kernel, *accesses), n in found.items():
        if handed_over(kernel, tuple(accesses)):
            own[kernel] += n
        else:
            print(f"{kernel}: {n} times " + " and ".join(f"{how} in {file}:{line}" for how, file, line in accesses))
    for kernel, n in own.items():
        print(f"{kernel}: {n} times what warp_specialize hands over")
    print(f"{found.total()} hazards, of which {own.total()} are Triton's own hand-over.")
    return 0 if own.total() == found.total() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
