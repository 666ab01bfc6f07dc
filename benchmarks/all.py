"""Run every script of the speed table, one after the other, and write the table into ``benchmarks/README.md``.

    make bench                                                  all, in the second environment
    PYTHONPATH=src .venv-peers/bin/python benchmarks/all.py --only search loss_4k
    PYTHONPATH=src .venv-peers/bin/python benchmarks/all.py --table     only write the table of the kept results

Each script has a process of its own, whose idle threads do not spin. One that fails is told and does not stop the rest;
its kept rows stay as they were.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import table
from cases import SCRIPTS
from timing import PASSIVE

FOLDER = Path(__file__).parent


def choose(only: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return script -> rows for names of scripts or rows, in the fixed order; nothing named means all."""
    known = {*SCRIPTS, *(row for rows in SCRIPTS.values() for row in rows)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no script or row `{unknown[0]}`; there are {', '.join(sorted(known))}")
    chosen: dict[str, tuple[str, ...]] = {}
    for script, rows in SCRIPTS.items():
        if not only or script in only:
            chosen[script] = ()
        elif any(row in only for row in rows):
            chosen[script] = tuple(row for row in rows if row in only)
    return chosen


def run_scripts(
    chosen: Mapping[str, Sequence[str]], options: Sequence[str] = (), *, folder: Path = FOLDER, limit_s: float = 1800
) -> dict[str, str]:
    """Run the scripts in turn; return what went wrong by script, nothing where all went well.

    Args:
        chosen: Script -> its rows to measure; no rows means all of them.
        options: Further arguments of every script.
        folder: Where the scripts lie.
        limit_s: After this a script is stopped.
    """
    failed: dict[str, str] = {}
    environment = {**os.environ, **PASSIVE, "PYTHONPATH": str(FOLDER.parent / "src")}
    for script, rows in chosen.items():
        path = folder / f"{script}.py"
        if not path.is_file():
            failed[script] = "there is no such script"
            continue
        started = time.monotonic()
        print(f"--- {script}", file=sys.stderr, flush=True)
        command = [sys.executable, str(path), "--json", *options, *(["--case", *rows] if rows else [])]
        try:
            done = subprocess.run(command, env=environment, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            failed[script] = f"stopped after {limit_s:g} s"
            continue
        if done.returncode:
            failed[script] = f"ended with status {done.returncode}"
        print(f"--- {script}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these scripts or rows")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of the kept results")
    parser.add_argument("--repetitions", type=int, help="interleaved repetitions of every candidate")
    parser.add_argument("--dry", action="store_true", help="keep neither results nor table")
    options = parser.parse_args()
    failed: dict[str, str] = {}
    if not options.table:
        try:
            chosen = choose(options.only)
        except ValueError as error:
            parser.error(str(error))
        further = [] if options.repetitions is None else ["--repetitions", str(options.repetitions)]
        failed = run_scripts(chosen, further if options.dry else [*further, "--keep"])
    if not options.dry:
        table.write_table()
    for script, reason in failed.items():
        print(f"FAILED {script}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
