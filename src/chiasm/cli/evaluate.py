"""Run models × data sets × tasks from a suite file, and compare the models on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.output import JsonOption, make_progress, print_json, print_table

if TYPE_CHECKING:
    from chiasm.evaluate.suite.run import PlannedCell, SuiteRun

#: Exit code of a suite that ran, but in which some cell has no result.
SOME_FAILED = 3


def run(
    suite: Annotated[Path, typer.Argument(help="A TOML file; docs/reference/suite.md lists its fields.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="seed=1, as often as needed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; by default runs/NAME.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="model=NAME, data=NAME or task=NAME, as often as needed.")
    ] = None,
    list_cells: Annotated[
        bool, typer.Option("--list", help="Show the cells and what is on disk; run nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run what is missing, write the page, say which cells have no result (exit code 3)."""
    from chiasm.evaluate.suite.run import plan_suite, run_suite
    from chiasm.evaluate.suite.settings import load_suite
    from chiasm.io.manifest import write_json_atomic

    plan = load_suite(suite, overrides or [])
    folder = Path(out or Path("runs") / plan.name)
    if list_cells:
        _list(plan_suite(plan, folder, only=only or ()), as_json)
        return
    try:
        found = run_suite(plan, folder, only=only or (), progress=make_progress(as_json, unit="rows"))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from what is on disk") from None
    from chiasm.evaluate.page import save_page
    from chiasm.evaluate.suite.page import suite_page

    page = save_page(suite_page(found), folder / "index.html")
    document: dict[str, Any] = {**found.to_dict(), "page": str(page)}
    write_json_atomic(folder / "suite.json", document)
    if as_json:
        print_json(document)
    else:
        _say(found, page)
    if found.failed:
        raise typer.Exit(SOME_FAILED)


def _list(cells: tuple[PlannedCell, ...], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json([asdict(c) for c in cells])
        return
    rows = []
    for c in cells:
        state = c.problem or (
            "on disk" if c.cached else f"{c.embeds:,} rows to embed" if c.embeds else "vectors on disk"
        )
        rows.append((c.data, c.task, c.model, state))
    print_table(("data", "task", "model", "state"), rows)
    most: dict[tuple[str, str], int] = {}
    for c in cells:  # the tasks of a model and a data set share its vectors
        most[c.model, c.data] = max(c.embeds, most.get((c.model, c.data), 0))
    print(f"  {sum(c.cached for c in cells)} of {len(cells)} cells are on disk, {sum(most.values()):,} rows to embed")


def _say(found: SuiteRun, page: Path) -> None:
    rows = []
    for c in found.cells:
        if c.result is None:
            rows.append((c.data, c.task, c.model, "-", "-", "-", c.reason))
            continue
        main = c.result.main
        chance = "-" if main.value.chance is None else f"{main.value.chance:.3f}"
        rows.append((c.data, c.task, c.model, str(main.value), chance, str(main.value.n), c.result.primary))
    print_table(("data", "task", "model", "value [95 % interval]", "chance", "n", "measure"), rows)
    for (data, task), model in found.best.items():
        print(f"  {data}, {task}: `{model}` is better than every other model (corrected p < {found.suite.alpha:g})")
    if found.failed:
        print(f"  {len(found.failed)} of {len(found.cells)} cells have no result")
    print(f"page: {page}")
