"""The whole argument in one call: every arm with every seed, on the same data, in the same order, for as many steps.

Comes in: a recipe, arms and the number of seeds. Goes out: :class:`ControlRun`, what every arm said about the test
images, ready to be scored. Stages that arms share (the unimodal one) are trained once a seed. A run that is killed goes
on with what is missing; arms that the data do not allow are listed with the reason, not left out in silence.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.distill.arms import ARMS, STANDARD, Arm
from chiasm.distill.experiment import Experiment, SeedSetup
from chiasm.distill.recipe import DistillRecipe
from chiasm.distill.run import MAIN, ArmRunner, check_trackers, open_sinks, save_model, score
from chiasm.distill.run_folder import RunFolder, begin_run, open_run, read_predictions, write_predictions
from chiasm.distill.stages import ArmResult
from chiasm.errors import ConfigError, FileFormatError, InputError, UnknownName
from chiasm.io.manifest import write_json_atomic
from chiasm.metrics.paired import ArmPredictions
from chiasm.progress import Progress

#: Fewer seeds than this say little about other seeds.
FEW_SEEDS = 5


@dataclass(frozen=True)
class ControlRun:
    """What all arms and seeds have answered.

    Attributes:
        folder: Of the run.
        predictions: One an arm and seed; arms in their order, seeds rising.
        seeds: All seeds.
        arms: Names that were run.
        impossible: Name -> why it could not be run.
        notes: What every output must say.
        data: Counts and digests of the first seed.
        seconds: Wall time of this call.
    """

    folder: Path
    predictions: tuple[ArmPredictions, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    impossible: Mapping[str, str]
    notes: tuple[str, ...]
    data: Mapping[str, Any]
    seconds: float


def run_controls(
    recipe: DistillRecipe,
    *,
    out: str | Path | None = None,
    seeds: int = FEW_SEEDS,
    arms: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ControlRun:
    """Train all arms with ``seeds`` seeds, the recipe's and those after it.

    Args:
        recipe: The recipe; its ``arms`` are added to the standard ones.
        out: Folder of the run; None: the recipe's ``run.out``.
        seeds: How many; at least one.
        arms: Only these; None: the standard ones and those of the recipe.
        resume: Go on with the run in the folder.
        overwrite: Start anew in a folder that holds a run.
        progress: Told of everything that takes long.

    Raises:
        UnknownName: No arm of that name.
        ConfigError: An arm that was asked for by name cannot be run on these data.
        ChiasmError: As :func:`chiasm.distill.run.distill`; what was finished is kept.
    """
    began = time.perf_counter()
    if seeds < 1:
        raise InputError(f"there must be at least one seed, got {seeds}")
    chosen = choose_arms(recipe, arms)
    check_trackers(recipe)
    folder = open_run(recipe, out=out, resume=resume, overwrite=overwrite)
    experiment = Experiment(recipe, cache=folder.cache, progress=progress)
    numbers = tuple(range(recipe.seed, recipe.seed + seeds))
    first = experiment.prepare(recipe.seed)
    impossible = _impossible(first, chosen, named=arms is not None)
    begin_run(folder, recipe, facts=first.facts, notes=first.notes, rejected=experiment.rejected)
    found: list[ArmPredictions] = []
    with open_sinks(recipe, folder.path) as sinks:
        for seed in numbers:
            setup = first if seed == recipe.seed else experiment.prepare(seed)
            impossible |= _impossible(setup, chosen, named=arms is not None)
            runner = ArmRunner(recipe, setup, folder, progress=progress, sinks=sinks)
            for arm in (a for a in chosen if a.name not in impossible):
                found.append(run_arm_once(runner, arm, folder))
                if arm.name == MAIN and seed == recipe.seed:
                    _keep_model(runner, arm, found[-1])
    names = tuple(a.name for a in chosen if a.name not in impossible)
    found = [p for p in found if p.arm in names]
    found.sort(key=lambda p: (names.index(p.arm), p.seed))
    return ControlRun(
        folder.path, tuple(found), numbers, names, impossible, first.notes, first.facts, time.perf_counter() - began
    )  # fmt: skip


def _impossible(setup: SeedSetup, chosen: Sequence[Arm], *, named: bool) -> dict[str, str]:
    """Return name -> reason of the arms that the data do not allow; raise where they were asked for by name."""
    reasons = {arm.name: reason for arm in chosen if (reason := setup.impossible(arm)) is not None}
    if named and reasons:
        name, reason = next(iter(reasons.items()))
        raise ConfigError(f"the arm `{name}` cannot be run: {reason}")
    return reasons


def choose_arms(recipe: DistillRecipe, arms: Sequence[str] | None) -> list[Arm]:
    """Return the arms to run, in the order of their table.

    Raises:
        UnknownName: No arm of that name.
    """
    wanted = set(arms) if arms is not None else {*STANDARD, *recipe.arms}
    for name in sorted(wanted):
        if name not in ARMS:
            raise UnknownName("arm", name, ARMS, hint=f"known: {', '.join(ARMS)}")
    if not wanted:
        raise InputError("no arm was named", hint=f"known: {', '.join(ARMS)}")
    return [arm for name, arm in ARMS.items() if name in wanted]


def run_arm_once(runner: ArmRunner, arm: Arm, folder: RunFolder) -> ArmPredictions:
    """Return what an arm says about the test images, trained now or found; it is kept in ``arms/ARM/seed-N``."""
    result = runner.run(arm)
    place = folder.arm(arm.name, runner.setup.seed)
    known = _found(place, result, runner)
    if known is not None:
        return known
    answers = runner.answers(result)
    write_predictions(place / "predictions.csv", answers.probabilities, answers.truth)
    record = {
        "arm": arm.name,
        "seed": runner.setup.seed,
        "key": result.final.key,
        "test": f"{answers.test_digest}.{runner.setup.test_content}",
        "steps": result.final.steps,
        "best_step": result.final.best_step,
        "validation": dict(sorted(result.final.metrics.items())),
    }
    write_json_atomic(place / "arm.json", record)  # last: it says that the answers beside it are whole
    return answers


def _found(place: Path, result: ArmResult, runner: ArmRunner) -> ArmPredictions | None:
    """Return answers on disk if they are of these very weights and test images."""
    test = runner.setup.problem.test
    try:
        record = json.loads((place / "arm.json").read_text())
        probabilities, truth = read_predictions(place / "predictions.csv")
        found = ArmPredictions(result.arm.name, runner.setup.seed, test.ids, test.groups, truth, probabilities)
    except (OSError, ValueError, FileFormatError):
        return None
    same_test = found.truth.tolist() == test.labels.tolist() and record.get("test") == (
        f"{found.test_digest}.{runner.setup.test_content}"
    )
    return found if same_test and record.get("key") == result.final.key else None


def _keep_model(runner: ArmRunner, arm: Arm, answers: ArmPredictions) -> None:
    """Write the classifier of the recipe's own seed, so that a run with controls is a run."""
    save_model(runner, runner.run(arm), score(answers))
    write_predictions(runner.folder.path / "predictions.csv", answers.probabilities, answers.truth)
