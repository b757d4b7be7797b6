"""Side-by-side measurements that hold on a machine with other people's work on it.

Contestants run in turn, one pass each, round after round, so that whatever else the machine does meets all of
them; the medians of a pass are compared. The first measure is the CPU time of this process, which other
processes disturb only through the caches; the wall time stands beside it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.files import write_text

PACKAGES = ("torch", "timm", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Timing:
    """Medians of one pass, in seconds, and how many passes they come from."""

    cpu: float
    wall: float
    rounds: int
    spread: float  # half the distance between the quartiles of the CPU time, as a share of the median


@dataclass
class Report:
    """What a benchmark hands back: rows of plain values under column names, and notes about the whole."""

    name: str
    command: str
    tables: dict[str, list[dict[str, Any]]]
    notes: list[str]


def measure(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    seconds: float | None = None,
    synchronise: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Run every contestant once a round and return the medians.

    Args:
        contestants: a pass without arguments each, by name.
        rounds: passes that count.
        warmup: passes before them.
        seconds: stop after this much wall time, but not before 5 rounds.
        synchronise: waits for an accelerator, before either clock is read.
    """
    for run in contestants.values():
        for _ in range(warmup):
            run()
    synchronise()
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= 5 and time.perf_counter() - began > seconds:
            break
        for name, run in contestants.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            synchronise()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    return {name: _timing(cpu[name], wall[name]) for name in contestants}


def _timing(cpu: Sequence[float], wall: Sequence[float]) -> Timing:
    median = statistics.median(cpu)
    low, _, high = statistics.quantiles(cpu, n=4) if len(cpu) > 1 else (median,) * 3
    return Timing(median, statistics.median(wall), len(cpu), (high - low) / 2 / median if median else 0.0)


def peak_memory(build: Callable[..., Callable[[], object]], *arguments: Any, passes: int = 3) -> int | None:
    """Bytes that a pass takes beyond what its process holds between passes, in a process of its own.

    `build(*arguments)` must be importable by name; it returns the pass, which runs once before anything is
    counted. None where the kernel cannot count a peak anew.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender, build, arguments, passes))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured the memory of {arguments} ended early") from None
    finally:
        process.join()


def _peak(sender: Any, build: Callable[..., Callable[[], object]], arguments: Sequence[Any], passes: int) -> None:
    run = build(*arguments)
    run()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system, or it would count as held
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    except (OSError, AttributeError):
        sender.send(None)
        return
    before = _status("VmRSS")
    for _ in range(passes):
        run()
    sender.send(max(_status("VmHWM") - before, 0))


def _status(field: str) -> int:
    """A size of this process in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) * 1024


def set_threads(count: int) -> None:
    """Let torch use `count` threads; other runtimes are given the number where they are made."""
    import torch

    torch.set_num_threads(count)


def machine() -> dict[str, str]:
    """The processor, what of it matters here, the accelerator, and the versions of the libraries."""
    import torch

    facts = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count())}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text().splitlines())
        )
        family = f"family {fields.get('cpu family')}, model {fields.get('model')}"
        facts["processor"] = f"{fields.get('model name', facts['processor'])} ({family})"
        flags = fields.get("flags", "").split()
        wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
        facts["instructions"] = " ".join(f for f in wanted if f in flags) or "none of AVX2, AVX-512, AMX"
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    facts["python"] = platform.python_version()
    return facts | {p: importlib.metadata.version(p) for p in PACKAGES}


def matrix_rate(size: int = 1024) -> float:
    """Measured GFLOP/s of one float32 matrix product, the ceiling of what follows on these threads."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / measure({"product": lambda: a @ b}, rounds=9)["product"].cpu / 1e9


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; numbers to three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value and abs(value) < 1e-3:
            return f"{value:.0e}"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def render(report: Report, facts: Mapping[str, str]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {report.name}", f"`{report.command}`", ", ".join(f"{k} {v}" for k, v in facts.items())]
    parts += [f"- {note}" for note in report.notes]
    for title, rows in report.tables.items():
        parts += [f"## {title}", markdown(rows)]
    return "\n\n".join(parts) + "\n"


def save(report: Report, folder: Path) -> str:
    """Write `<name>.md` and `<name>.json` into the folder; returns the Markdown."""
    facts = machine()
    text = render(report, facts)
    write_text(folder / f"{report.name}.md", text)
    content = {"command": report.command, "machine": facts, "notes": report.notes, "tables": report.tables}
    write_text(folder / f"{report.name}.json", json.dumps(content, indent=1) + "\n")
    return text
