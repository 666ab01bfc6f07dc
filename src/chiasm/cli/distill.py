"""Distil reports into an image classifier (CLIP-IT), alone or with every control that shows where a gain comes from."""

from __future__ import annotations

import difflib
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.output import JsonOption, make_progress, print_json, print_table
from chiasm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from chiasm.distill.controls import ControlRun
    from chiasm.distill.recipe import DistillRecipe
    from chiasm.distill.run import DistillResult
    from chiasm.evaluate.distill_scores import ControlScores

#: The options of CLIP-IT's own script are read by their table, not by the command line's parser.
CONTEXT = {"ignore_unknown_options": True}
OWN_OPTIONS = ("--set", "--out", "--resume", "--overwrite", "--controls", "--seeds", "--arms", "--json", "--help")
SHOWN = ("balanced_accuracy", "auroc", "accuracy", "macro_f1", "ece", "log_loss")


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE",
            help="A TOML file (`recipes/clip_it_*.toml` are examples); or the options of CLIP-IT's own script: "
            "`--ds pcam --model UNI --lora-r 16`, listed in docs/reference/clip-it-options.md.",
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="fuse.kd_weight=10, as often as needed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; by default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a stop, bit for bit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Train every arm with every seed, compare them, and say if text helped.")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="With --controls: how many.")] = 5,
    arms: Annotated[
        str | None, typer.Option("--arms", help="With --controls: only these, by commas: unimodal,lambda0,clip_it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train, then say what was reached on test images and how to go on."""
    plan, command = read_plan(words or [], overrides or [])
    if arms is not None and not controls:
        raise InputError("--arms goes with --controls", hint="add --controls")
    folder = Path(out or _expanded(plan) or Path("runs") / plan.name)
    progress = make_progress(as_json, unit="steps")
    options: dict[str, Any] = {"out": folder, "resume": resume, "overwrite": overwrite, "progress": progress}
    try:
        if not controls:
            from chiasm.distill.run import distill

            again = shlex.join(
                ["chiasm", "distill", *(words or []), *(w for o in overrides or [] for w in ("--set", o))]
            )
            again += f" --out {shlex.quote(str(out))}" if out is not None else ""
            _say_run(distill(plan, **options), again, as_json=as_json, images=plan.data.synthetic is None)
            return
        from chiasm.distill.controls import run_controls

        chosen = None if arms is None else [a.strip() for a in arms.split(",") if a.strip()]
        done = run_controls(plan, seeds=seeds, arms=chosen, **options)
    except KeyboardInterrupt:
        from chiasm.distill.run_folder import holds_run

        how = "the same command with `--resume`" if holds_run(folder) else "the same command"
        raise KeyboardInterrupt(f"interrupted; {how} goes on from what is finished") from None
    # A page may be passed on: it tells no folder of this machine.
    shown = [o if "/" not in o and "\\" not in o else f"{o.partition('=')[0]}=..." for o in overrides or []]
    changed = "".join(f" --set {shlex.quote(o)}" for o in shown)
    scores, page = report(done, plan, f"{command}{changed} --controls --seeds {seeds}")
    if as_json:
        print_json(as_record(done, scores, page))
    else:
        _say_controls(done, scores, page)


def read_plan(words: Sequence[str], overrides: Sequence[str]) -> tuple[DistillRecipe, str]:
    """Return the recipe that the words name or describe, and the command that says so, without this machine's folders.

    Raises:
        InputError: Nothing was named, or more than a recipe.
        ConfigError: An unknown option, or a recipe that is wrong.
    """
    from chiasm.distill.recipe import load_distill_recipe

    if not words:
        raise InputError("no recipe was named", hint="chiasm distill recipes/clip_it_synthetic.toml --controls")
    first, rest = words[0], words[1:]
    if not first.startswith("-"):
        if rest:
            near = difflib.get_close_matches(rest[0], OWN_OPTIONS, n=1, cutoff=0.6)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            raise InputError(
                f"`{rest[0]}` means nothing beside a recipe{meant}", hint="a recipe's fields are changed with `--set`"
            )
        return load_distill_recipe(first, overrides), f"chiasm distill {Path(first).name}"
    from chiasm.distill.reference import notes_on, parse_reference, recipe_from_reference

    options = parse_reference(words)
    for note in notes_on(options):
        print(f"warning: {note}", file=sys.stderr)
    told = [Path(w).name if "/" in w or "\\" in w else w for w in words]
    return _changed(recipe_from_reference(options), overrides), f"chiasm distill {' '.join(told)}"


def _changed(plan: DistillRecipe, overrides: Sequence[str]) -> DistillRecipe:
    """Return a recipe with ``--set`` applied."""
    if not overrides:
        return plan
    from chiasm.config import apply_overrides, build, to_mapping
    from chiasm.distill.recipe import DistillRecipe

    return build(DistillRecipe, apply_overrides(to_mapping(plan), overrides))


def _expanded(plan: DistillRecipe) -> str | None:
    from chiasm.train.recipe import expand_path

    return None if plan.run.out is None else expand_path(plan.run.out, "run.out")


def report(done: ControlRun, plan: DistillRecipe, command: str) -> tuple[ControlScores, Path]:
    """Score all arms, write ``controls.json`` and ``index.html``, and return the scores and where the page is.

    Raises:
        ConfigError: Nothing was run.
    """
    from chiasm import __version__
    from chiasm.distill.arms import ARMS
    from chiasm.evaluate.distill_page import render_control_page
    from chiasm.evaluate.distill_scores import score_arms
    from chiasm.evaluate.page import save_page
    from chiasm.io.manifest import write_json_atomic

    if not done.predictions:
        reasons = "; ".join(f"{name}: {why}" for name, why in done.impossible.items())
        raise ConfigError(f"no arm could be run: {reasons}")
    scores = score_arms(done.predictions)
    record = scores.to_dict() | {
        "recipe": plan.name,
        "recipe_digest": plan.digest,
        "impossible": dict(done.impossible),
        "data_notes": list(done.notes),
        "data": dict(done.data),
    }
    write_json_atomic(done.folder / "controls.json", record)
    facts = {
        "recipe": f"{plan.name} ({plan.digest})",
        "data": str(done.data.get("source", "")),
        **{f"note {i}": note for i, note in enumerate(done.notes, start=1)},
        **{f"not run: {name}": why for name, why in done.impossible.items()},
        "chiasm": __version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    about = {name: ARMS[name].sentence for name in done.arms if name in ARMS and not ARMS[name].standard}
    page = render_control_page(scores, facts=facts, command=command, about=about)
    return scores, save_page(page, done.folder / "index.html")


def as_record(done: ControlRun, scores: ControlScores, page: Path) -> dict[str, Any]:
    """Return what ``--json`` prints: rates as fractions of 1; ``controls.json`` holds more."""

    def bounds(interval: Any) -> dict[str, float]:
        return {"value": interval.value, "low": interval.low, "high": interval.high}

    return {
        "arms": {
            name: {metric: bounds(number.interval) for metric, number in arm.numbers.items()}
            for name, arm in scores.arms.items()
        },
        "differences": {
            name: {"value": d.value, "low": d.low, "high": d.high, "p": d.p}
            for name, d in scores.differences["balanced_accuracy"].items()
        },
        "verdict": scores.verdict.sentence,
        "outcome": scores.verdict.outcome,
        "seeds": list(scores.seeds),
        "impossible": dict(done.impossible),
        "notes": list(done.notes),
        "folder": str(done.folder),
        "page": str(page),
    }


def _say_run(result: DistillResult, command: str, *, as_json: bool, images: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    for note in result.notes:
        print(f"note: {note}")

    def cell(name: str) -> tuple[str, str, str, str]:
        chance = result.metrics[name].chance
        return name, str(result.unimodal[name]), str(result.metrics[name]), "" if chance is None else f"{chance:.3f}"

    print_table(("test images", "images only", "CLIP-IT", "chance"), [cell(name) for name in SHOWN])
    answers = result.predictions
    over = "images" if len(set(answers.groups)) == answers.n else f"{len(set(answers.groups))} groups"
    print(f"majority class alone: accuracy {result.majority:.3f}; intervals over {over}, one seed")
    print(f"model: {result.model}")
    print(f"next: {command} --controls --resume    is it the text?")
    if images:  # a classifier of made-up features knows none
        print(f"      chiasm classify {result.folder} IMAGE")
    print(f"      chiasm export {result.folder} --vision-only OUT")


def _say_controls(done: ControlRun, scores: ControlScores, page: Path) -> None:
    for note in done.notes:
        print(f"note: {note}")
    print_table(("arm", "balanced accuracy", "AUROC", "ECE", "log loss", "seeds"), scores.table())
    print()
    found = scores.differences["balanced_accuracy"]
    rows = [
        (name, f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]", f"{d.p:.3f}", str(len(d.seeds)))
        for name, d in found.items()
    ]
    print_table(("difference, points of balanced accuracy", "mean", "p (Holm)", "seeds"), rows)
    print()
    for name, why in done.impossible.items():
        print(f"not run: {name}: {why}")
    print(f"verdict: {scores.verdict.sentence}")
    print(f"page: {page}")
