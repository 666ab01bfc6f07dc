"""The kept results as the table of ``benchmarks/README.md``.

Comes in: ``results/SCRIPT.jsonl``. Goes out: Markdown between two markers. A row that was not measured, or that misses
its floor, stays and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import FLOORS, KEYS, RESULTS, SCRIPTS

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- table: written by all.py -->"
END = "<!-- end of the table -->"
Row = Mapping[str, Any]


def read_rows(folder: Path = RESULTS) -> dict[str, Row]:
    """Return the kept rows of all scripts by name; a line that lacks a key is an error that names it."""
    rows: dict[str, Row] = {}
    for script in SCRIPTS:
        path = folder / f"{script}.jsonl"
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            row = json.loads(line)
            lacking = [key for key in KEYS if key not in row]
            if lacking:
                raise ValueError(f"{path.name}, line {number}: no {', '.join(lacking)}")
            rows[row["name"]] = row
    return rows


def render(rows: Mapping[str, Row]) -> str:
    """Return the table of the rows with a floor, then that of the others, with the machines above them."""
    parts = [machine_lines([*rows.values()]), table_of([(name, rows.get(name)) for name in FLOORS])]
    others = [(name, row) for name, row in rows.items() if name not in FLOORS]
    if others:
        parts += ["Measured beside them, without a floor:", table_of(others)]
    return "\n\n".join(part for part in parts if part)


def machine_lines(rows: Sequence[Row]) -> str:
    """Say on what the rows were measured; rows of several machines or commits are told apart."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        m = row["machine"]
        place = f"{m['cpu']} ({', '.join(m['flags'])}), {m['cores']} cores"
        if m.get("gpu"):
            place += f", {m['gpu']}"
        versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v and k in ("torch", "numpy"))
        groups.setdefault(f"{place}; Python {m['python']}, {versions}; {m['date']}", []).append(row["name"])
    if len(groups) == 1:
        return f"Machine: {next(iter(groups))}."
    return "\n".join(f"- {place}: {', '.join(names)}" for place, names in groups.items())


def table_of(rows: Sequence[tuple[str, Row | None]]) -> str:
    lines = [
        "| row | peer | floor | CPU × | wall × | | error | best rival: its CPU ÷ ours | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        if row is None:
            lines.append(f"| `{name}` | | {FLOORS[name]:g} | | | not measured | | | |")
            continue
        floor = "" if row["floor"] is None else f"{row['floor']:g}"
        cells = [
            f"`{name}`", peer_of(row), floor, f"{row['ratio_cpu']:.2f}", f"{row['ratio_wall']:.2f}", verdict(row),
            error_of(row), rival_of(row), str(row["n"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peer_of(row: Row) -> str:
    """The peer with its version after the name of its package."""
    package, _, rest = row["peer"].partition(" ")
    return " ".join(word for word in (package, row["peer_version"], rest) if word)


def verdict(row: Row) -> str:
    """Whether the floor is reached: by CPU time, by wall time, with a right result."""
    if not row["error"] <= row.get("error_bound", float("inf")):
        return "**WRONG**"
    if row["floor"] is None:
        return ""
    if row["ratio_cpu"] < row["floor"]:
        return "**MISSED**"
    return "reached" if row["ratio_wall"] >= row["floor"] else "reached (CPU)"


def error_of(row: Row) -> str:
    error = row["error"]
    number = str(error) if isinstance(error, int) or error == 0 else f"{error:.1e}"
    return f"{number} ({row['error_kind']})" if row.get("error_kind") else number


def rival_of(row: Row) -> str:
    """The fastest of the other peers; below 1 it is faster than chiasm."""
    rivals = row.get("rivals") or []
    if not rivals:
        return ""
    best = min(rivals, key=lambda rival: rival["ratio_cpu"])
    missed = " (**MISSED** " + f"{best['floor']:g})" if best["floor"] and best["ratio_cpu"] < best["floor"] else ""
    return f"{best['name']}: {best['ratio_cpu']:.2f}{missed}"


def with_table(text: str, table: str) -> str:
    """Return the README's text with the table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks the markers `{BEGIN}` and `{END}`")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def write_table(readme: Path = README, folder: Path = RESULTS) -> None:
    readme.write_text(with_table(readme.read_text(), render(read_rows(folder))))
