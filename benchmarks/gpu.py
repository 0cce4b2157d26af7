"""Timing on a GPU: medians of CUDA-graph replays, the ceilings of the same run, results as JSON with their environment."""

import json
import statistics
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gdnir
from gdnir.lowering import Lowering, find
from gdnir.lowering.choose import Target, choose
from gdnir.lowering.eager import operand_type
from gdnir.op import lookup
from gdnir.platforms import detect

HERE = Path(__file__).parent
PEERS = json.loads((HERE / "peers_h200.json").read_text())["rows"]


def replay_ms(*calls, replays=40):
    """Median milliseconds of one call. Several calls (the same work on other buffers) take turns, so that what is
    larger than the L2 cache in use is not served from it in the measurement."""
    graphs = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            for _ in range(2):
                call()
    torch.cuda.current_stream().wait_stream(stream)
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    for graph in graphs:
        graph.replay()
    return events_ms([graph.replay for graph in graphs], replays)


def chain_ms(*calls, replays=15):
    """Median milliseconds of one call among many in one graph, which take turns: what it takes in a model's step, without what
    events and the graph's own launch add to `replay_ms` (a kernel of one element reads 3.2 us there, 1.2 here)."""
    count = max(len(calls), 8, min(40, int(4 / replay_ms(*calls, replays=5))))

    def chain():
        for i in range(count):
            calls[i % len(calls)]()

    return replay_ms(chain, replays=replays) / count


def events_ms(calls, repeats):
    """Median milliseconds between CUDA events around one of the calls, which take turns.

    The device waits at first, until the host has asked for most of them: where it catches up with the host, the time between two
    events is the host's (10 to 19 us for a graph of one element, instead of 3.2).
    """
    count = max(repeats, len(calls))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000 * count)  # cycles: 50 us for each
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings():
    """(copy in TB/s, read and written; bf16 product of 8192^3 in TFLOP/s), here and now."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # A kernel, not copy_: the copy engine behind it is slower in a graph.
    copy = 2 * source.nbytes / replay_ms(lambda: torch.neg(source, out=target)) / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / replay_ms(lambda: torch.mm(a, b)) / 1e9


def chain_note():
    """What a chain is, and what a kernel of one element reads in one and by itself."""
    one = torch.zeros(1, device="cuda")
    alone, chained = replay_ms(lambda: one.add_(1), replays=200) * 1e3, chain_ms(lambda: one.add_(1)) * 1e3
    return f"chain: of one call among many in one graph; a kernel of one element reads {alone:.1f} us by itself, {chained:.1f} in a chain"


def peer(part, case, *names):
    """The smallest published time, in ms, of the named peers (all if none is named) for this case; None if there is none."""
    found = [r["ms"] for r in PEERS if r["part"] == part and r["case"] == case and (not names or r["peer"] in names)]
    return min(found, default=None)


def is_h200():
    """Whether this card is the one that peers_h200.json was measured on."""
    return "H200" in torch.cuda.get_device_name()


def chosen(name, operands, attrs, provider=None) -> Lowering:
    """The lowering of an op that gdnir chooses for these tensors on this device, or `provider`'s; LoweringError if it
    refuses them."""
    op = lookup(name)
    types = [operand_type(name, slot, x, attrs) for slot, x in zip(op.slots(len(operands)), operands, strict=True)]
    target = Target(detect("cuda"), {name: (provider,)} if provider else {})
    return find(name, choose(op, types, attrs, target).provider)


def asked(name, provider):
    """(the name of a benchmark's results, the provider that `chosen` is told) for what its option says"""
    return (name, None) if provider == "default" else (f"{name}_{provider}", provider)


def environment():
    """What a figure depends on."""
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gdnir": gdnir.__version__,
    }


def report(name, rows, notes=(), out=HERE / "results", copy=None):
    """Print the rows (dicts with the same keys) as a table and write them, with the copy's TB/s, as `out`/`name`.json."""
    table = Table(title=name)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=200)
    console.print(table)
    for note in notes:
        console.print(note)
    Path(out).mkdir(parents=True, exist_ok=True)
    document = {"name": name, "environment": environment(), "copy TB/s": copy, "notes": list(notes), "rows": rows}
    (Path(out) / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
