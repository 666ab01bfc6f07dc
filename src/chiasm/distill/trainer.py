"""The loop that all three stages share: steps, validations, the best weights, checkpoints, resume.

Comes in: a task (losses and metrics of one stage), its options and a plan. Goes out: the weights of the best validation
and everything that was measured on the way.

Everything random is a function of (seed, step): the order of rows, augmentation, dropout. So a stage that was killed goes
on from its checkpoint to the same bits as one that never was, given the same machine and number of threads.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.distill.recipe import LOWER_IS_BETTER, StageConfig
from chiasm.distill.schedule import Plan, derived_seed, learning_rate
from chiasm.distill.stage_files import Position, StageFiles, load_optimizer, optimizer_tensors, part_of
from chiasm.errors import ConfigError, TrainingError
from chiasm.progress import Progress, SilentProgress

#: Seconds between checkpoints where the recipe names no number of steps: short stages write none.
CHECKPOINT_SECONDS = 20.0
#: What is told of a validation: (kind, step, numbers), as ``RunLog.write``.
Log = Callable[[str, int, Mapping[str, float]], None]


class Task(Protocol):
    """What one stage trains.

    Attributes:
        model: All that trains; parameters without ``requires_grad`` are locked.
    """

    model: nn.Module

    def losses(self, rows: NDArray[np.int64], *, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return ``loss``, which is minimised, and its parts.

        Args:
            rows: Of the training images.
            step: Of the stage proper, the first is 0; negative during the warm-up.
            rng: For augmentation.
        """

    def trains(self, name: str, *, warmup: bool) -> bool:
        """Return whether a parameter that is not locked trains in this phase."""

    def validate(self, *, step: int) -> dict[str, float]:
        """Return ``val_ce`` and so on; empty where nothing is held out."""

    def state(self) -> dict[str, Tensor]:
        """Return copies of the weights that are the result."""


@dataclass(frozen=True)
class Trained:
    """How a stage ended: the best weights and where it stands."""

    state: dict[str, Tensor]
    position: Position
    plan: Plan


@contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Use deterministic algorithms, and leave the caller's generators and settings as they were."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cuda = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


class StageTrainer:
    """One stage of one seed.

    Args:
        task: What is trained.
        config: Optimizer, schedule, selection.
        plan: Steps and batches.
        seed: Of batches, augmentation and dropout.
        files: Where to save and go on from; None: nowhere.
        log: Told of every validation.
        name: For the progress bar and messages.
    """

    def __init__(
        self,
        task: Task,
        config: StageConfig,
        plan: Plan,
        *,
        seed: int,
        files: StageFiles | None = None,
        log: Log | None = None,
        name: str = "stage",
    ) -> None:
        self.task, self.config, self.plan, self.seed, self.files, self.name = task, config, plan, seed, files, name
        self.log = log
        self.position = Position()
        self.best: dict[str, Tensor] | None = None
        self._parts: dict[str, float] = {}
        self._began = self._saved = time.monotonic()
        self._optimizer: torch.optim.Optimizer | None = None
        self._cuda = any(p.is_cuda for p in task.model.parameters())

    def run(self, progress: Progress | None = None) -> Trained:
        """Train to the end or until patience runs out, from the checkpoint if there is one.

        Raises:
            TrainingError: A loss or gradient that is not a number, or a file that cannot be written.
        """
        progress = progress or SilentProgress()
        self._resume()
        self._began = time.monotonic() - self.position.seconds
        progress.start(self.plan.total, self.name)
        try:
            progress.advance(self.position.step)
            self.task.model.train()
            if self.position.step == self.plan.warmup == 0:
                self._validate(0)
            while self.position.step < self.plan.total and not self.position.done:
                loss = self._step()
                progress.advance(1, loss=loss)
                self._after()
        finally:
            progress.finish()
        self.position.done = True
        self.position.seconds = time.monotonic() - self._began
        if self.best is None:  # nothing was selected: the last weights
            self.best, self.position.best_step = self.task.state(), self.position.step - self.plan.warmup
        return Trained(self.best, self.position, self.plan)

    def _step(self) -> float:
        step, warmup = self.position.step, self.plan.warmup
        proper = step - warmup
        if self._optimizer is None or proper == 0:  # the stage proper starts with an optimizer of its own
            self._optimizer = self._make_optimizer(warmup=proper < 0)
        rate = self.config.lr if proper < 0 else learning_rate(proper, config=self.config, steps=self.plan.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        seed_generators(derived_seed(self.seed, "step", step), self._cuda)
        rng = np.random.default_rng([self.seed, 3, step])
        self._optimizer.zero_grad(set_to_none=True)
        parts = self.task.losses(self.plan.batch(step, seed=self.seed), step=proper, rng=rng)
        parts["loss"].backward()  # type: ignore[no-untyped-call]
        self._parts = {f"train_{n}": float(v.detach()) for n, v in parts.items()} | {"lr": rate}
        if not math.isfinite(self._parts["train_loss"]):
            raise self._not_a_number("the loss")
        if self.config.clip_norm is not None:
            parameters = self._optimizer.param_groups[0]["params"]
            norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
            if not math.isfinite(float(norm)):
                raise self._not_a_number("the gradient")
        self._optimizer.step()
        self.position.step = step + 1
        return self._parts["train_loss"]

    def _make_optimizer(self, *, warmup: bool) -> torch.optim.Optimizer:
        chosen = [
            p for n, p in self.task.model.named_parameters() if p.requires_grad and self.task.trains(n, warmup=warmup)
        ]
        if not chosen:
            raise ConfigError(f"nothing is left to train in the stage `{self.name}`")
        rate, decay = self.config.lr, self.config.weight_decay
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(chosen, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
        kind = torch.optim.Adam if self.config.optimizer == "adam" else torch.optim.AdamW
        return kind(chosen, lr=rate, weight_decay=decay, fused=True)

    def _not_a_number(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} of the stage `{self.name}` is not a number at step {self.position.step + 1}",
            hint="lower the stage's `lr`, or set its `clip_norm`",
        )

    def _after(self) -> None:
        """Validate, select, save where they are due."""
        proper = self.position.step - self.plan.warmup
        if self.plan.validates(proper):
            self._validate(proper)
        every = self.config.checkpoint_every
        if self.position.step >= self.plan.total or self.position.done or self.files is None:
            return
        is_long = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        if self.position.step % every == 0 if every else is_long:
            self._save()

    def _validate(self, proper: int) -> None:
        position, config = self.position, self.config
        metrics = self.task.validate(step=proper - 1)
        self.task.model.train()
        record = {"step": float(proper), **self._parts, **metrics}
        position.curve = (*position.curve, record)
        if self.log is not None:
            self.log("validation" if metrics else "train", proper, record)
        if config.monitor == "none" or not metrics:
            return
        if config.monitor not in metrics:
            raise ConfigError(f"`monitor` is `{config.monitor}`, which the stage `{self.name}` does not measure")
        value = metrics[config.monitor]
        sign = -1.0 if config.monitor in LOWER_IS_BETTER else 1.0

        def gain(over: float | None) -> float:
            return math.inf if over is None else sign * (value - over)

        if math.isfinite(value) and gain(position.best) > 0:
            position.best, position.best_step, self.best = value, proper, self.task.state()
        if math.isfinite(value) and gain(position.reference) > config.min_delta:
            position.reference, position.stale = value, 0
        else:
            position.stale += 1
        position.done = bool(config.patience) and position.stale >= config.patience

    def _save(self) -> None:
        assert self.files is not None
        assert self._optimizer is not None
        self.position.seconds = time.monotonic() - self._began
        tensors = {f"model/{n}": t for n, t in _trained(self.task.model).items()}
        tensors |= optimizer_tensors(self._optimizer)
        tensors |= {f"best/{n}": t for n, t in (self.best or {}).items()}
        self.files.save(self.files.checkpoint, tensors, self.position, {})
        self._saved = time.monotonic()

    def _resume(self) -> None:
        found = self.files.load(self.files.checkpoint) if self.files is not None else None
        if found is None:
            return
        tensors, position, _ = found
        own, weights = _trained(self.task.model), part_of(tensors, "model")
        if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
            return  # written by another version of the code
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        self.position = position
        self.best = part_of(tensors, "best") or None
        if position.step != self.plan.warmup:
            self._optimizer = self._make_optimizer(warmup=position.step < self.plan.warmup)
            load_optimizer(self._optimizer, tensors)


def seed_generators(seed: int, cuda: bool) -> None:
    """Seed torch's generators; ``torch.manual_seed`` takes as long as a step of small heads where CUDA is not in use."""
    torch.default_generator.manual_seed(seed)
    if cuda:
        torch.cuda.manual_seed_all(seed)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that training changes: parameters that are not locked, and buffers."""
    locked = {n for n, p in model.named_parameters() if not p.requires_grad}
    return {n: t for n, t in model.state_dict().items() if n not in locked}


def scores(probabilities: NDArray[Any], labels: NDArray[np.int64], *, every_class: bool) -> dict[str, float]:
    """Return balanced accuracy, accuracy and AUROC (NaN unless every class is there) of held-out rows."""
    from chiasm.metrics.classification import accuracy, balanced_accuracy, multiclass_auroc

    predicted = probabilities.argmax(axis=1)
    return {
        "val_balanced_accuracy": balanced_accuracy(labels, predicted),
        "val_accuracy": accuracy(labels, predicted),
        "val_auroc": multiclass_auroc(labels, probabilities) if every_class else math.nan,
    }
