"""Train a CLIP from a recipe: pretrain, fine-tune, or fit projections on locked towers."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.output import JsonOption, make_progress, print_json, print_table


def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; `recipes/` holds examples.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="optim.lr=1e-4, as often as needed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; by default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a stop, bit for bit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train, then say what was reached on held-out patients and how to go on."""
    from chiasm.train.loop import LAST
    from chiasm.train.recipe import load_recipe
    from chiasm.train.run import train

    plan = load_recipe(recipe, overrides or [])
    folder = Path(out or plan.run.out or Path("runs") / plan.name)
    quiet = int(os.environ.get("RANK", "0")) > 0  # under torchrun the first process speaks for all
    try:
        result = train(
            plan, out=folder, resume=resume, overwrite=overwrite, progress=make_progress(as_json or quiet, unit="steps")
        )
    except KeyboardInterrupt:
        kept = (folder / LAST).exists()
        raise KeyboardInterrupt(
            "interrupted; the same command with `--resume` goes on from the last checkpoint"
            if kept
            else "interrupted before the first checkpoint; nothing was kept"
        ) from None
    if quiet:
        return
    if as_json:
        print_json({**asdict(result), "best_dir": str(result.best_dir)})
        return
    print_table(("validation measure", "value"), [(k, f"{v:.4f}") for k, v in result.metrics.items()])
    print(f"model: {result.best_dir}")
    print(f'next: chiasm inspect IMAGE "a text" "another text" --model {result.best_dir}')
