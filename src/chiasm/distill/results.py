"""A stage, run or found: how it is kept, what it gives back, and what can be asked of it.

Comes in: a task and its options. Goes out: a :class:`StageResult`, from which the student and its answers are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.config import build, to_mapping
from chiasm.distill.problem import Rows
from chiasm.distill.recipe import StageConfig
from chiasm.distill.schedule import Plan
from chiasm.distill.stage_files import Position, StageFiles
from chiasm.distill.student import Inputs, Student, identity_tower, make_heads, run_student
from chiasm.distill.trainer import Log, StageTrainer, Task, reproducible
from chiasm.encoders.base import LoraConfig
from chiasm.encoders.heads import HeadsConfig
from chiasm.errors import InputError
from chiasm.progress import Progress


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        stage: ``unimodal``, ``text`` or ``fuse``.
        key: Digest of everything that decides the weights.
        state: Best weights, on the CPU: ``heads.*``, and of the tower what trained (``tower.*``).
        heads: Shapes of the heads.
        trained: What trained in the tower: ``none``, ``lora`` or ``full``.
        lora: Adapters in ``state``, if any.
        curve: One record a validation: ``step``, ``train_*``, ``val_*``, ``lr``, and of trained text ``target_*``.
        best_step: Step of the best validation, of the stage proper; the last step when nothing was selected.
        metrics: Record of that validation; empty without validation.
        steps: Steps done, warm-up included.
        stopped_early: Whether patience ran out.
        seconds: Time it took when it was trained.
        path: Its file; None without a cache.
        reused: Whether it was found finished.
    """

    stage: str
    key: str
    state: Mapping[str, Tensor]
    heads: HeadsConfig
    trained: str
    lora: LoraConfig | None
    curve: tuple[Mapping[str, float], ...]
    best_step: int
    metrics: Mapping[str, float]
    steps: int
    stopped_early: bool
    seconds: float
    path: Path | None = None
    reused: bool = False

    def student(self, tower: nn.Module | None = None) -> Student:
        """Return the module with these weights, on the CPU, in eval mode.

        Args:
            tower: The tower as it was before training, which is copied; None when the heads take features.

        Raises:
            InputError: The stage trained a tower, and none is given.
            CheckpointError: The weights do not fit.
        """
        heads = make_heads(self.heads, 0)
        if self.trained == "none":
            student = Student(heads) if tower is None else Student.adapted(heads, tower, lora=None, seed=0)
        elif tower is None:
            if not self._identity():
                raise InputError("the stage trained a tower: give the tower that it started from")
            student = Student.adapted(heads, identity_tower(self.heads.width), lora=self.lora, seed=0)
        else:
            student = Student.adapted(heads, tower, lora=self.lora, seed=0, full=self.trained == "full")
        student.restore(self.state)
        return student.eval()

    def _identity(self) -> bool:
        names = {n for n in self.state if n.startswith("tower.")}
        return self.trained == "lora" and names == {f"tower.0.lora_{x}.default.weight" for x in "AB"}


@dataclass(frozen=True)
class Surroundings:
    """What a stage runs in and what does not change its result.

    Attributes:
        cache: Folder of finished and interrupted stages; None: nothing is kept.
        device: Where it runs.
        progress: Told after every step.
        log: Told of every validation.
        name: Shown by the progress bar.
    """

    cache: Path | None = None
    device: str = "cpu"
    progress: Progress | None = None
    log: Log | None = None
    name: str = ""


#: No cache, on the CPU, in silence.
ALONE = Surroundings()


def class_probabilities(
    result: StageResult, rows: Rows, *, tower: nn.Module | None = None, batch_size: int = 1024, device: str = "cpu"
) -> NDArray[np.float64]:
    """Return softmax probabilities (n, classes), float64, of a finished stage on rows.

    Args:
        result: Of ``unimodal`` or ``fuse``.
        rows: With features, or with pixels where the stage trained a tower on pixels.
        tower: The tower that the stage started from (:func:`trained_tower`).
        batch_size: Rows per forward pass.
        device: Where it runs.

    Raises:
        InputError: What the student takes is not there.
    """
    student = result.student(tower if result.trained != "none" else None).to(device)
    pixels = result.trained != "none" and rows.pixels is not None
    with reproducible(device):
        out = run_student(student, Inputs(rows, pixels=pixels, device=device), batch_size=batch_size)
    return out.logits.double().softmax(dim=-1).cpu().numpy()  # type: ignore[no-any-return]


def trained_tower(unimodal: StageResult, tower: nn.Module) -> nn.Module:
    """Return a locked copy of the tower as the unimodal stage left it: what gives the features of later stages."""
    student = unimodal.student(tower)
    assert student.tower is not None
    student.tower.requires_grad_(False)
    return student.tower.eval()


def run_stage(
    stage: str,
    key: str,
    config: StageConfig,
    heads: HeadsConfig,
    make: Callable[[], tuple[Task, Student | None]],
    *,
    seed: int,
    around: Surroundings,
    rows: int,
    warmup: int = 0,
    lora: LoraConfig | None = None,
    finish: Callable[[Student], None] | None = None,
) -> StageResult:
    """Find a stage in the cache, or train it (on), and keep it."""
    files = StageFiles(Path(around.cache), f"{stage}-{key}") if around.cache is not None else None
    found = files.load(files.result) if files is not None else None
    if found is not None and files is not None:
        tensors, position, about = found
        files.checkpoint.unlink(missing_ok=True)  # of a run that was killed between the two
        return _result(stage, key, tensors, position, about, files, reused=True)
    plan = Plan.of(config, rows, warmup=warmup)
    with reproducible(around.device):
        task, student = make()
        trainer = StageTrainer(task, config, plan, seed=seed, files=files, log=around.log, name=around.name or stage)
        trained = trainer.run(around.progress)
        state = trained.state
        if finish is not None and student is not None:
            student.restore(state)
            finish(student)
            state = student.changed_state()
    state = {n: t.cpu() for n, t in state.items()}
    about = {
        "stage": stage,
        "heads": heads.to_dict(),
        "trained": student.trained if student is not None else "none",
        "lora": to_mapping(lora) if lora is not None else None,
        "stopped_early": trained.position.step < plan.total,
    }
    if files is not None:
        files.save(files.result, state, trained.position, about)
        files.checkpoint.unlink(missing_ok=True)
    return _result(stage, key, state, trained.position, about, files, reused=False)


def _result(
    stage: str,
    key: str,
    state: Mapping[str, Tensor],
    position: Position,
    about: Mapping[str, Any],
    files: StageFiles | None,
    *,
    reused: bool,
) -> StageResult:
    best = [r for r in position.curve if r["step"] == position.best_step and "val_ce" in r]
    return StageResult(
        stage=stage,
        key=key,
        state=state,
        heads=HeadsConfig.from_dict(about["heads"]),
        trained=about["trained"],
        lora=build(LoraConfig, about["lora"]) if about["lora"] else None,
        curve=position.curve,
        best_step=position.best_step,
        metrics=dict(best[-1]) if best else {},
        steps=position.step,
        stopped_early=about["stopped_early"],
        seconds=position.seconds,
        path=files.result if files is not None else None,
        reused=reused,
    )
