"""Do the whole job on synthetic chest films: pretrain a small CLIP, classify, search, explain, map; writes a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.output import JsonOption, SeedOption, make_progress, print_json, print_table


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model, data, results and page.")] = Path("demo"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run the demo and print a short table."""
    from chiasm.evaluate.demo import run_demo, summary_rows

    results = run_demo(out, seed=seed, progress=make_progress(as_json, unit="images"))
    if as_json:
        print_json(results)
        return
    print_table(
        ("on held-out synthetic patients", "value [95 % interval]", "n", "chance", "majority"), summary_rows(results)
    )
    print(f"  {results['seconds']:.0f} s in all; page: {out / 'index.html'}; model: {out / 'model'}")
    print("  The images are drawn by a program: this model knows nothing about patients. Research use only.")
