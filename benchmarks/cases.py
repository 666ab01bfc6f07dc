"""The rows of the speed table: their names and floors, and the one JSON line that each of them is reported as.

Comes in: timings of a peer and of chiasm that were measured in turn (:mod:`timing`), and the error of the result. Goes
out: a line on standard output and, when asked to, ``results/SCRIPT.jsonl``. A row that misses its floor says so and is
kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from timing import Timing, describe_machine, print_table

RESULTS = Path(__file__).parent / "results"
#: Smallest ratio (peer ÷ ours, CPU time and wall) that a row has to reach; for memory the ratio of peaks.
FLOORS: Mapping[str, float] = {
    "image_fp32_b1": 1.6, "image_fp32_b8": 1.25, "image_fp32_b32": 1.25,
    "image_bf16_b1": 2.4, "image_bf16_b8": 2.2, "image_bf16_b32": 2.4,
    "image_int8_b1": 4.5, "image_int8_b8": 3.0,
    "rn50_bf16_b8": 2.2,
    "text_prompts_fp32": 6.5, "text_captions_fp32": 3.5, "text_mixed_fp32": 2.0,
    "text_prompts_bf16": 11.0, "text_captions_bf16": 5.5, "text_mixed_bf16": 3.2,
    "bert_text": 8.0,
    "tokenizer_prompts": 20.0, "tokenizer_varied": 4.0,
    "preprocess_jpeg": 1.3, "preprocess_cxr": 1.3,
    "loss_4k": 1.35, "loss_8k": 1.5, "loss_memory_16k": 20.0,
    "train_fp32": 1.4, "train_bf16": 1.35,
    "cold_start": 2.5,
    "search_batch": 8.0, "search_single": 5.0,
    "embed_folder": 2.2,
}  # fmt: skip
#: Script -> the rows that it measures, in the order in which ``all.py`` runs them.
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer_prompts", "tokenizer_varied"),
    "cold_start": ("cold_start",),
    "image_tower": tuple(name for name in FLOORS if name.startswith("image_")),
    "resnet": ("rn50_bf16_b8",),
    "text_tower": tuple(name for name in FLOORS if name.startswith("text_")),
    "bert": ("bert_text",),
    "preprocess": ("preprocess_jpeg", "preprocess_cxr"),
    "loss": ("loss_4k", "loss_8k", "loss_memory_16k"),
    "train_step": ("train_fp32", "train_bf16"),
    "search": ("search_batch", "search_single"),
    "embed_folder": ("embed_folder",),
}
#: What every kept line says.
KEYS = ("name", "ratio_wall", "ratio_cpu", "floor", "peer", "peer_version", "n", "error", "machine")


@dataclass(frozen=True)
class Rival:
    """Another peer beside the one that the floor names: the best that a careful user could have.

    Attributes:
        name: What it is, precision and settings included.
        ratio_cpu: Its CPU time ÷ ours.
        ratio_wall: The same of wall time, paired.
        floor: What is to be reached against it, where something is.
    """

    name: str
    ratio_cpu: float
    ratio_wall: float
    floor: float | None = None


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: A key of :data:`FLOORS`, or another name (a row without a floor, which is told beside the others).
        ratio_wall: Median of the paired wall ratios, peer ÷ ours.
        ratio_cpu: Median CPU time of the peer ÷ median of ours.
        peer: What it was measured against, precision included.
        n: Interleaved repetitions.
        error: Difference of the results, in the measure that the row names in ``error_kind``.
        error_kind: What ``error`` is.
        error_bound: What it may be; above it the row has no speed.
        rivals: Other peers of the same run.
        cpu_per_wall: Cores in use by ours.
        details: Anything else worth keeping.
    """

    name: str
    ratio_wall: float
    ratio_cpu: float
    peer: str
    n: int
    error: float
    error_kind: str
    error_bound: float
    rivals: tuple[Rival, ...] = ()
    cpu_per_wall: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def floor(self) -> float | None:
        """What both ratios have to reach."""
        return FLOORS.get(self.name)

    @property
    def reached(self) -> bool:
        """Whether the floor is reached in CPU time, with a right result."""
        return self.error <= self.error_bound and (self.floor is None or self.ratio_cpu >= self.floor)

    def to_dict(self, machine: Mapping[str, object]) -> dict[str, object]:
        """Return the line."""
        versions = machine["versions"]
        assert isinstance(versions, Mapping)
        return {
            "name": self.name, "ratio_wall": self.ratio_wall, "ratio_cpu": self.ratio_cpu, "floor": self.floor,
            "peer": self.peer, "peer_version": versions.get(self.peer.split()[0]), "n": self.n, "error": self.error,
            "error_kind": self.error_kind, "error_bound": self.error_bound, "reached": self.reached,
            "cpu_per_wall": self.cpu_per_wall, "rivals": [vars(r) for r in self.rivals], **self.details,
            "machine": machine,
        }  # fmt: skip


def compare(
    name: str,
    peer: str,
    timings: Mapping[str, Timing],
    *,
    error: float,
    error_kind: str,
    error_bound: float,
    ours: str = "chiasm",
    rivals: Mapping[str, float | None] | None = None,
    details: Mapping[str, object] | None = None,
) -> Case:
    """Make a row of what :func:`timing.interleave` measured.

    Args:
        name: Of the row.
        peer: Key of ``timings`` that the floor is about; begins with its package's name (``open_clip_torch ...``).
        timings: All candidates of the run.
        error: Of our result.
        error_kind: What that is.
        error_bound: What it may be.
        ours: Our key.
        rivals: Other keys, each with the floor against it or None.
        details: Anything else worth keeping.
    """
    mine = timings[ours]

    def cpu(key: str) -> float:
        return round(statistics.median(timings[key].cpu_s) / statistics.median(mine.cpu_s), 3)

    def wall(key: str) -> float:
        return round(statistics.median(b / o for b, o in zip(timings[key].wall_s, mine.wall_s, strict=True)), 3)

    others = tuple(Rival(key, cpu(key), wall(key), floor) for key, floor in (rivals or {}).items())
    return Case(
        name, wall(peer), cpu(peer), peer, len(mine.cpu_s), error, error_kind, error_bound, others,
        round(mine.cpu_per_wall, 2), details or {},
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every script of the table has."""
    parser.add_argument("--json", action="store_true", help="one JSON line a case on standard output")
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved repetitions of every candidate")
    parser.add_argument("--case", nargs="+", default=[], help="only these rows")
    parser.add_argument("--keep", action="store_true", help="keep the lines in benchmarks/results/SCRIPT.jsonl")


def report(script: str, cases: list[Case], options: argparse.Namespace, packages: list[str]) -> None:
    """Print a table on standard error, the lines on standard output with ``--json``, and keep them with ``--keep``.

    Args:
        script: Stem of the script: the file is ``results/SCRIPT.jsonl``.
        cases: Its rows; kept rows of other names in the file stay.
        options: Of :func:`add_options`.
        packages: Distributions whose versions the rows name.

    Raises:
        SystemExit: After all that: a row of ``--case`` is none of the script's.
    """
    machine = describe_machine(["chiasm", "torch", "numpy", *packages])
    if "torch" in sys.modules:
        machine["threads"] = sys.modules["torch"].get_num_threads()
    rows = [
        {"case": c.name, "cpu x": c.ratio_cpu, "wall x": c.ratio_wall, "floor": c.floor, "peer": c.peer, "n": c.n,
         c.error_kind: c.error, "reached": c.reached,
         "rivals": "; ".join(f"{r.name} {r.ratio_cpu:.2f}" for r in c.rivals)}
        for c in cases
    ]  # fmt: skip
    for kind in dict.fromkeys(c.error_kind for c in cases):
        print_table(script, [row for row in rows if kind in row])
    lines = {c.name: json.dumps(c.to_dict(machine)) for c in cases}
    if options.json:
        print(*lines.values(), sep="\n", end="\n" if lines else "")
    if options.keep and lines:
        path = RESULTS / f"{script}.jsonl"
        kept = path.read_text().splitlines() if path.exists() else []
        names = {json.loads(line)["name"]: line for line in kept} | lines
        RESULTS.mkdir(exist_ok=True)
        path.write_text("\n".join(names.values()) + "\n")
    unknown = [name for name in getattr(options, "case", None) or [] if name not in lines]
    if unknown:
        sys.exit(
            f"error: {script}.py measured no row `{unknown[0]}`\nhint: rows with a floor: {', '.join(SCRIPTS[script])}"
        )
