"""The measuring protocol of every benchmark: interleaved calls, CPU time before wall time, memory in fresh processes.

Comes in: candidates as callables without arguments. Goes out: medians, ratios, peak memory, a table on standard error
and one JSON line on standard output. Imports nothing heavy, so that :func:`wait_passively` can run before torch does.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What keeps idle threads from spinning.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def wait_passively() -> None:
    """Keep idle threads from spinning, which would count as CPU time. Call before torch is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("wait_passively() must run before torch is imported")
    os.environ.update(PASSIVE)


@dataclass
class Timing:
    """Seconds of each repetition of one candidate: CPU of all threads, and wall."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    @property
    def cpu_per_wall(self) -> float:
        """Cores in use; near 1.0 on two threads means that the wall ratio says nothing about scaling."""
        return sum(self.cpu_s) / max(sum(self.wall_s), 1e-12)


def cpu_seconds() -> float:
    """Return the CPU time of this process, all its threads, and its child processes that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def interleave(candidates: Mapping[str, Callable[[], object]], repetitions: int, loops: int = 1) -> dict[str, Timing]:
    """Call every candidate once in turn, ``repetitions`` times, after one unmeasured round.

    Args:
        candidates: Name -> call. Worker processes are counted if they end within the call.
        repetitions: At least 5; 9 for anything under 0.2 s; 3 only for the largest sizes.
        loops: Calls inside one measurement, for short operations (about 10 ms a measurement).
    """
    timings = {name: Timing() for name in candidates}
    for repetition in range(repetitions + 1):
        for name, call in candidates.items():
            gc.collect()
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(loops):
                call()
            cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
            if repetition:
                timings[name].cpu_s.append(cpu / loops)
                timings[name].wall_s.append(wall / loops)
    return timings


def ratio(base: Timing, ours: Timing) -> dict[str, float]:
    """Return base ÷ ours: bigger means that ours is faster."""
    paired = [b / o for b, o in zip(base.wall_s, ours.wall_s, strict=True)]
    return {
        "cpu": round(statistics.median(base.cpu_s) / statistics.median(ours.cpu_s), 3),
        "wall": round(statistics.median(paired), 3),
        "best_cpu": round(min(base.cpu_s) / min(ours.cpu_s), 3),
        "cpu_per_wall": round(ours.cpu_per_wall, 2),
        "n": len(paired),
    }


def resident_mb(kind: str) -> float:
    """Return a field of /proc/self/status in MiB: ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def peak_extra_mb(call: Callable[[], object], warm_up: Callable[[], object]) -> float:
    """Return the peak memory of one call above what the process held before it, in MiB. Use in a fresh process."""
    warm_up()
    gc.collect()
    # What was freed but not given back would be used again without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    kept = call()
    peak = resident_mb("VmHWM") - before
    del kept
    return round(peak, 1)


@dataclass(frozen=True)
class Fresh:
    """What a fresh process printed as its last line, and what it cost."""

    output: object
    cpu_s: float
    wall_s: float


def run_fresh(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Fresh:
    """Run ``python ARGUMENTS`` in a process of its own and parse its last line of standard output as JSON."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stdout.strip().splitlines()
    return Fresh(json.loads(lines[-1]) if lines else None, cpu, wall)


def interleave_fresh(candidates: Mapping[str, Sequence[str]], repetitions: int) -> dict[str, Timing]:
    """Like :func:`interleave` for cold starts: each candidate is the arguments of a fresh Python process."""
    timings = {name: Timing() for name in candidates}
    for repetition in range(repetitions + 1):
        for name, arguments in candidates.items():
            fresh = run_fresh(arguments)
            if repetition:
                timings[name].cpu_s.append(fresh.cpu_s)
                timings[name].wall_s.append(fresh.wall_s)
    return timings


def describe_machine(packages: Sequence[str]) -> dict[str, object]:
    """Return what a number depends on: versions, CPU and its instruction sets, threads, commit, date."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    information = Path("/proc/cpuinfo").read_text()
    lines = [line.partition(":") for line in information.splitlines()]
    model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), "unknown")
    words = set(next((value for name, _, value in lines if name.strip() == "flags"), "").split())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": model,
        "flags": [f for f in FLAGS if f in words],
        "cores": os.cpu_count(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as an aligned table to standard error."""
    if not rows:
        return
    names = list(rows[0])
    lines = [names, *([shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    print(f"\n{title}", file=sys.stderr)
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), file=sys.stderr)


def shown(value: object) -> str:
    """Format one cell: small numbers with an exponent, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:.2f}"
    return str(value)


def finish(result: Mapping[str, object], path: Path | None) -> None:
    """Print ``result`` as one JSON line on standard output and, if asked to, keep it in a file."""
    line = json.dumps(result)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(line)
