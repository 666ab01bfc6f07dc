"""A recipe to a classifier: the call behind ``chiasm distill``.

Comes in: a :class:`DistillRecipe` and a folder. Goes out, in the folder: ``model/`` (what ``chiasm classify`` and
``chiasm export --vision-only`` read), ``predictions.csv`` of the test images, ``results.json`` with intervals over
patients, ``data.json``, ``recipe.toml`` (resolved), and ``stages/``, from which an interrupted run goes on.

The same recipe gives the same bits, whether it ran through or was killed on the way; nothing that depends on time is
written into the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chiasm.classifier import save_classifier
from chiasm.config import to_toml
from chiasm.distill.arms import ARMS, Arm
from chiasm.distill.experiment import Experiment, SeedSetup
from chiasm.distill.recipe import DistillRecipe
from chiasm.distill.results import StageResult, Surroundings, class_probabilities, trained_tower
from chiasm.distill.run_folder import RunFolder, begin_run, open_run, write_predictions
from chiasm.distill.stages import ArmResult, run_arm, run_unimodal
from chiasm.errors import ConfigError, MissingExtra
from chiasm.io.manifest import write_json_atomic
from chiasm.metrics.bootstrap import WeightStatistic, weighted_interval
from chiasm.metrics.calibration import ece_statistic, log_loss_statistic
from chiasm.metrics.classification import majority_baseline
from chiasm.metrics.paired import ArmPredictions
from chiasm.metrics.weighted import (
    accuracy_statistic,
    balanced_accuracy_statistic,
    macro_f1_statistic,
    multiclass_auroc_statistic,
)
from chiasm.progress import Progress, SilentProgress
from chiasm.train.log import RunLog, Sink, TensorBoardSink, WandbSink
from chiasm.types import Interval

#: The arm that a plain run trains.
MAIN = "clip_it"
N_RESAMPLES = 1000
#: Multiply-adds of the largest matrix product of a step up to which one thread is as fast as several.
SMALL = 50_000_000


@dataclass(frozen=True)
class DistillResult:
    """What a run has made.

    Attributes:
        folder: Of the run.
        model: Folder of the classifier, for ``chiasm.classifier.load_classifier``.
        metrics: Of the classifier on the test images, with intervals over patients.
        unimodal: The same of the first stage, which has seen no text.
        majority: Accuracy of always giving the most frequent class of the test images.
        predictions: Answers on the test images.
        notes: What every output must say.
        data: Counts and digests.
        seconds: Wall time of this call.
    """

    folder: Path
    model: Path
    metrics: Mapping[str, Interval]
    unimodal: Mapping[str, Interval]
    majority: float
    predictions: ArmPredictions
    notes: tuple[str, ...]
    data: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "folder": str(self.folder),
            "model": str(self.model),
            "seed": self.predictions.seed,
            "metrics": {name: value.to_dict() for name, value in self.metrics.items()},
            "unimodal": {name: value.to_dict() for name, value in self.unimodal.items()},
            "majority_accuracy": self.majority,
            "notes": list(self.notes),
            "data": dict(self.data),
            "seconds": self.seconds,
        }


def distill(
    recipe: DistillRecipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DistillResult:
    """Train a CLIP-IT classifier: unimodal probe, text head, then fuse and distil.

    Args:
        recipe: See :func:`chiasm.distill.recipe.load_distill_recipe`. Code that it names itself (towers of kind
            ``python``) is run.
        out: Folder of the run; None: the recipe's ``run.out``.
        resume: Go on with the run in the folder; without one the run starts.
        overwrite: Start anew in a folder that holds a run.
        progress: Told of everything that takes long.

    Raises:
        ConfigError: A field of the recipe does not fit the data or the model.
        InputError: No images, too few, or a folder that holds a run already.
        LeakageError: Patients on both sides of a split.
        CheckpointError: A model that cannot be read, or a folder with a run of another recipe.
        TrainingError: A loss that is not a number, or a full disk; finished stages are kept.
    """
    began = time.perf_counter()
    check_trackers(recipe)
    folder = open_run(recipe, out=out, resume=resume, overwrite=overwrite)
    experiment = Experiment(recipe, cache=folder.cache, progress=progress)
    setup = experiment.prepare(recipe.seed)
    reason = setup.impossible(MAIN)
    if reason is not None:
        raise ConfigError(f"nothing can be distilled: {reason}", hint="look at `pairing` in the recipe")
    begin_run(folder, recipe, facts=setup.facts, notes=setup.notes, rejected=experiment.rejected)
    with open_sinks(recipe, folder.path) as sinks:
        runner = ArmRunner(recipe, setup, folder, progress=progress, sinks=sinks)
        trained = runner.run(MAIN)
    answers = runner.answers(trained)
    first = runner.answers(replace(trained, arm=ARMS["unimodal"], final=trained.unimodal))
    metrics, unimodal = score(answers), score(first)
    save_model(runner, trained, metrics)
    write_predictions(folder.path / "predictions.csv", answers.probabilities, answers.truth)
    majority = majority_baseline(answers.truth)
    result = DistillResult(
        folder.path, folder.model, metrics, unimodal, majority, answers, setup.notes, setup.facts,
        time.perf_counter() - began,
    )  # fmt: skip
    write_json_atomic(folder.path / "results.json", results_record(recipe, result, trained))
    return result


class ArmRunner:
    """Trains arms of one seed on the same data, from the same unimodal stage.

    Args:
        recipe: The recipe.
        setup: Of the seed.
        folder: Of the run.
        progress: Told after every step.
        sinks: Where else the numbers of every validation go.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        setup: SeedSetup,
        folder: RunFolder,
        *,
        progress: Progress | None = None,
        sinks: RunLog | None = None,
    ) -> None:
        self.recipe = recipe
        self.setup = setup
        self.folder = folder
        self.progress = progress or SilentProgress()
        self.sinks = sinks or RunLog()
        self._logged = 0
        self._unimodal: StageResult | None = None
        self._locked: SeedSetup | None = None

    def run(self, arm: Arm | str) -> ArmResult:
        """Train all stages of an arm, or find them finished."""
        arm = ARMS[arm] if isinstance(arm, str) else arm
        with one_thread() if self._is_small(arm) else nullcontext():
            return self._run(arm)

    def _is_small(self, arm: Arm) -> bool:
        """Whether steps are so small that threads would wait for each other longer than they work."""
        recipe, problem = self.recipe, self.setup.problem
        adapts = recipe.backbone.lora is not None or arm.lora or recipe.backbone.unimodal == "full"
        if (adapts and self.setup.tower is not None) or recipe.fuse.text_lora is not None:
            return False
        if problem.train.features is None:
            return False
        stages = (recipe.unimodal, recipe.text, recipe.fuse)
        sizes = [len(problem.train) if isinstance(s.batch_size, str) else s.batch_size for s in stages]
        rows = min(max(sizes), len(problem.train))
        width = int(problem.train.features.shape[1])
        return rows * width * self.setup.text_dim <= SMALL

    def _run(self, arm: Arm) -> ArmResult:
        setup, recipe = self.setup, self.recipe
        around = self._around("unimodal")
        if self._unimodal is None:
            self._unimodal = run_unimodal(
                setup.problem, recipe, seed=setup.seed, tower=setup.tower, text_dim=setup.text_dim, around=around
            )
        locked = self.locked
        around = self._around(arm.name)
        return run_arm(
            locked.problem, self._targets(arm), arm, recipe, seed=setup.seed, unimodal=self._unimodal,
            text_dim=setup.text_dim, tower=setup.tower, text_tower=setup.text_tower(arm), around=around,
        )  # fmt: skip

    @property
    def locked(self) -> SeedSetup:
        """The setup with features of the tower as the unimodal stage left it."""
        assert self._unimodal is not None
        if self._locked is None:
            self._locked = self.setup.locked(self._unimodal)
        return self._locked

    def _targets(self, arm: Arm) -> Any:
        from chiasm.distill.targets import targets_of

        return targets_of(arm.targets, self.setup.sources, seed=self.setup.seed)

    def _around(self, name: str) -> Surroundings:
        named = NamedProgress(self.progress, f"seed {self.setup.seed}, {name}")

        def log(kind: str, step: int, values: Mapping[str, float]) -> None:
            # Steps begin anew with every stage, and trackers want them to rise.
            self._logged += 1
            place = f"{name}/seed-{self.setup.seed}/{named.stage}/{kind}"
            self.sinks.write(place, self._logged, {**values, "step": step})

        return Surroundings(cache=self.folder.stages, device=self.recipe.run.device, progress=named, log=log)

    def answers(self, result: ArmResult) -> ArmPredictions:
        """Return what an arm says about the test images."""
        setup = self.locked
        probabilities = class_probabilities(
            result.final, setup.problem.test, tower=self.start_tower(result),
            batch_size=max(self.recipe.run.batch_size, 64), device=self.recipe.run.device,
        )  # fmt: skip
        test = setup.problem.test
        return ArmPredictions(result.arm.name, setup.seed, test.ids, test.groups, test.labels, probabilities)

    def start_tower(self, result: ArmResult) -> torch.nn.Module | None:
        """Return the tower that the last stage of an arm started from."""
        tower = self.setup.tower
        if tower is None or result.final.trained == "full" or result.unimodal.trained != "full":
            return tower
        return trained_tower(result.unimodal, tower)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread; bits then do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NamedProgress:
    """Says before each stage's name which arm and seed it belongs to."""

    def __init__(self, inner: Progress, name: str) -> None:
        self.inner = inner
        self.name = name
        self.stage = ""

    def start(self, total: int | None, description: str) -> None:
        """Begin a stage."""
        self.stage = description
        self.inner.start(total, f"{self.name}: {description}")

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Report units done."""
        self.inner.advance(n, **fields)

    def finish(self) -> None:
        """End the stage."""
        self.inner.finish()


def check_trackers(recipe: DistillRecipe) -> None:
    """Miss the package of a tracker before anything is read.

    Raises:
        MissingExtra: It is not installed.
    """
    for name in recipe.run.log:
        if find_spec(name) is None:
            raise MissingExtra(name, "track")


def open_sinks(recipe: DistillRecipe, folder: Path) -> RunLog:
    """Open the trackers that the recipe asks for; use as a context manager.

    Raises:
        MissingExtra: A tracker's package is not installed.
    """
    sinks: list[Sink] = []
    if "tensorboard" in recipe.run.log:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if "wandb" in recipe.run.log:
        sinks.append(WandbSink(folder, name=recipe.name, config={"digest": recipe.digest}))
    return RunLog(sinks)


def score(answers: ArmPredictions) -> dict[str, Interval]:
    """Return the numbers of one arm and seed with intervals over patients, and chance where there is such a number."""
    truth, given, probabilities = answers.truth, answers.predicted, answers.probabilities
    present = len(np.unique(truth))
    statistics: dict[str, tuple[WeightStatistic, float | None]] = {
        "balanced_accuracy": (balanced_accuracy_statistic(truth, given), 1 / present),
        "auroc": (multiclass_auroc_statistic(truth, probabilities), 0.5),
        "accuracy": (accuracy_statistic(truth, given), 1 / present),
        "macro_f1": (macro_f1_statistic(truth, given), None),
        "ece": (ece_statistic(truth, probabilities), None),
        "log_loss": (log_loss_statistic(truth, probabilities), None),
    }
    return {
        name: weighted_interval(statistic, answers.groups, n_resamples=N_RESAMPLES, chance=chance)
        for name, (statistic, chance) in statistics.items()
    }


def save_model(runner: ArmRunner, trained: ArmResult, metrics: Mapping[str, Interval]) -> Path:
    """Write the classifier of an arm: tower as it is then, heads, classes, and what was measured."""
    setup, recipe, final = runner.setup, runner.recipe, trained.final
    start = runner.start_tower(trained)
    student = final.student(start if final.trained != "none" else None)
    config = None if setup.backbone is None else setup.backbone.config
    tower = student.tower if final.trained != "none" else start
    if config is not None and final.lora is not None:
        config = replace(config, image=replace(config.image, lora=final.lora))
    if config is None:
        tower = None
    facts = {
        "data": str(setup.facts["source"]),
        "balanced_accuracy": metrics["balanced_accuracy"].to_dict(),
        "note": " ".join(f"{note}." for note in setup.notes),
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "seed": setup.seed,
        "steps": final.steps,
        "best_step": final.best_step,
    }
    return save_classifier(
        runner.folder.model, student.heads, classes=setup.problem.classes, tower=tower, config=config,
        projected=setup.backbone.projected if setup.backbone is not None else False,
        label=str(setup.facts.get("label", "class")), name=recipe.name, facts=facts, recipe=to_toml(recipe),
    )  # fmt: skip


def results_record(recipe: DistillRecipe, result: DistillResult, trained: ArmResult) -> dict[str, Any]:
    """Return what ``results.json`` holds: numbers, curves of the stages, versions."""
    stages: Sequence[StageResult | None] = (trained.unimodal, trained.text, trained.final)
    record = result.to_dict()
    for name in ("folder", "model", "seconds"):
        record.pop(name)
    return {
        "name": recipe.name,
        "recipe_digest": recipe.digest,
        **record,
        "stages": {
            s.stage: {
                "steps": s.steps,
                "best_step": s.best_step,
                "stopped_early": s.stopped_early,
                "validation": dict(sorted(s.metrics.items())),
                "curve": [dict(sorted(r.items())) for r in s.curve],
            }
            for s in stages
            if s is not None
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
