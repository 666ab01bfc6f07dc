"""The loop: batches in an order that a number decides, steps, validations, checkpoints, resume.

Comes in: a task (what is trained), a source (pairs by index) and a :class:`TrainConfig`. Goes out: ``last.safetensors``
and ``best.safetensors`` in the run's folder, lines in ``results.jsonl``.

Everything random is a function of (seed, step, rank): the order of rows of (seed, epoch), a batch's augmentation of
(seed, epoch, batch), dropout of (seed, step, rank). So the step alone says where to go on, and on one CPU a resumed run
ends with the same bits as one that was never stopped. The generators of the caller are left as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from chiasm.data.loader import Batches
from chiasm.errors import CheckpointError, ConfigError, InputError, TrainingError
from chiasm.progress import Progress, SilentProgress
from chiasm.train.checkpoint import Position, load_checkpoint, locked_digest, read_position, save_checkpoint
from chiasm.train.distributed import (
    Group,
    clip_gradients,
    current_group,
    local_slice,
    mean_over_ranks,
    of_main,
    wait_for_all,
)
from chiasm.train.log import RunLog, open_log
from chiasm.train.optim import learning_rate, make_optimizer, set_learning_rate
from chiasm.train.recipe import LOWER_IS_BETTER, TrainConfig

LAST = "last.safetensors"
BEST = "best.safetensors"


class Task(Protocol):
    """What the loop trains."""

    model: nn.Module

    def backward(self, batch: Any, *, weight: float = 1.0, sync: bool = True) -> float:
        """Add the gradients of one batch and return its loss."""

    def after_step(self) -> None:
        """Do what must follow a step of the optimizer."""

    def metrics(self) -> dict[str, float]:
        """Return what is worth logging beside the loss."""


class Source(Protocol):
    """Where batches come from."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def batch(self, indices: Any, rng: np.random.Generator) -> Any:
        """Return the batch of these rows."""


@dataclass(frozen=True)
class LoopResult:
    """How a run ended.

    Attributes:
        steps: Optimizer steps done.
        metrics: Of the best validation (of the last, when nothing was selected); empty without validation.
        best_step: Where that was.
        best: File with the best weights, for ``load_checkpoint``.
        stopped_early: Whether patience ran out.
    """

    steps: int
    metrics: Mapping[str, float]
    best_step: int
    best: Path
    stopped_early: bool


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run: rows, batches, steps.

    Attributes:
        rows: Pairs in the source.
        batch_size: Pairs per batch over all processes.
        per_epoch: Batches per epoch; an incomplete last one is left out.
        accumulate: Batches per step.
        total_steps: Steps of the run.
    """

    rows: int
    batch_size: int
    per_epoch: int
    accumulate: int
    total_steps: int

    @classmethod
    def of(cls, rows: int, config: TrainConfig, group: Group) -> Plan:
        """Make the plan of a run.

        Raises:
            InputError: When there are fewer than two rows.
        """
        size = min(config.optim.batch_size, rows - rows % group.world)
        if size < 2 * group.world:
            raise InputError(
                f"{rows} training pairs are too few: each needs at least one other to be contrasted with",
                hint="look at `rejected.jsonl`, and at `data.train_splits`",
            )
        per_epoch = rows // size
        steps = config.optim.steps or max(1, config.optim.epochs * per_epoch // config.optim.accumulate)
        return cls(rows, size, per_epoch, config.optim.accumulate, steps)

    def epoch_of(self, step: int) -> int:
        """Return the epochs that are complete after ``step`` steps."""
        return step * self.accumulate // self.per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Return whether step number ``step`` (the first is 1) completes an epoch."""
        return self.epoch_of(step) > self.epoch_of(step - 1)


def ordered_batches(source: Source, plan: Plan, *, seed: int, start: int, workers: int, group: Group) -> Iterator[Any]:
    """Yield this process's part of batch ``start``, ``start + 1`` ... of the run, without end.

    Batches are prepared ahead in ``workers`` threads; at most ``workers + 2`` of them wait.
    """
    part = local_slice(plan.batch_size, group)
    epoch, first = divmod(start, plan.per_epoch)
    while True:
        order = np.random.default_rng([seed, epoch, 0]).permutation(plan.rows).astype(np.int64)

        def load(number: int, rng: np.random.Generator, order: np.ndarray[Any, np.dtype[np.int64]] = order) -> Any:
            rows = order[number * plan.batch_size : (number + 1) * plan.batch_size][part]
            return source.batch(rows, rng if group.world == 1 else rng.spawn(group.world)[group.rank])

        batches = Batches(
            range(plan.per_epoch), batch_size=1, load=load, seed=seed, epoch=epoch, workers=workers, start=first,
            on_bad="fail",
        )  # fmt: skip
        with closing(iter(batches)) as upcoming:  # type: ignore[type-var]
            for item in upcoming:
                yield item.items[0]
        epoch, first = epoch + 1, 0


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step, so that dropout depends on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


class Loop:
    """One run of training.

    Args:
        task: What is trained.
        source: Training rows.
        config: Optimizer, run and seed.
        out: Folder of the run.
        validate: Returns metrics on held-out rows; None: no validation, the last weights are the best.
        fingerprint: Added to the digest that a resumed run must share (of model and data, say).

    Attributes:
        plan: Steps and batches.
    """

    def __init__(
        self,
        task: Task,
        source: Source,
        *,
        config: TrainConfig,
        out: str | Path,
        validate: Callable[[], dict[str, float]] | None = None,
        fingerprint: str = "",
    ) -> None:
        self.task = task
        self.source = source
        self.config = config
        self.out = Path(out)
        self.validate = validate
        self.group = current_group()
        self.plan = Plan.of(len(source), config, self.group)
        self.digest = f"{config.digest}.{fingerprint}.{self.plan.rows}"
        self._locked = ""

    def run(self, *, resume: bool = False, progress: Progress | None = None) -> LoopResult:
        """Train to the end, or until patience runs out.

        Args:
            resume: Go on from ``last.safetensors`` when it exists; start otherwise.
            progress: Told after every step.

        Raises:
            TrainingError: A loss or gradient that is not a number, or a checkpoint that cannot be written. The files
                written before stay.
            CheckpointError: When the checkpoint to go on from belongs to another run.
            KeyboardInterrupt: Passes through; the files written before stay.
        """
        progress = progress or SilentProgress()
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda):
            optimizer = make_optimizer(self.task.model, self.config.optim)
            position = self._resumed(optimizer) if resume else None
            if position is None:
                position = self._started()
            self._locked = locked_digest(self.task.model)
            with self._log(position) as log:
                progress.start(self.plan.total_steps, "training")
                try:
                    progress.advance(position.step)
                    position = self._steps(position, optimizer, log, progress)
                finally:
                    progress.finish()
        wait_for_all(self.group)  # the first process has written the best weights, which all may read now
        return LoopResult(
            steps=position.step,
            metrics=dict(position.best_metrics or position.last or {}),
            best_step=position.best_step,
            best=self.out / BEST,
            stopped_early=position.step < self.plan.total_steps,
        )

    def _log(self, position: Position) -> RunLog:
        if not self.group.is_main:
            return RunLog()
        run = self.config.run
        return open_log(
            self.out, run.log, after=position.step, run_name=self.out.name, config={"digest": self.config.digest}
        )

    def _started(self) -> Position:
        if self.group.is_main:
            for name in (LAST, BEST):
                (self.out / name).unlink(missing_ok=True)
        return Position(seed=self.config.seed, config=self.digest, precision=self.config.optim.precision)

    def _resumed(self, optimizer: torch.optim.Optimizer) -> Position | None:
        path = self.out / LAST
        if not path.exists():
            return None
        position = read_position(path)
        wanted = self.config.optim.precision
        if position.precision not in ("", wanted):
            raise CheckpointError(
                f"the run in this folder trains in {position.precision}, the recipe asks for {wanted}",
                hint="leave `optim.precision` at `auto`, which keeps what the run began with, or start a new run",
            )
        if position.config != self.digest:
            raise CheckpointError(
                "the run in this folder was started with another recipe or other data",
                hint="restore the recipe (it lies beside the checkpoint), or train into a new folder",
            )
        return load_checkpoint(path, self.task.model, optimizer=optimizer)

    def _steps(self, position: Position, optimizer: Any, log: RunLog, progress: Progress) -> Position:
        if position.done:
            return position
        model, run, plan = self.task.model, self.config.run, self.plan
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        batches = ordered_batches(
            self.source, plan, seed=self.config.seed, start=position.step * plan.accumulate, workers=run.workers,
            group=self.group,
        )  # fmt: skip
        model.train()
        began, first_step = time.perf_counter(), position.step
        with closing(batches):  # type: ignore[type-var]
            while not position.done:
                step = position.step + 1
                rate = learning_rate(position.step, config=self.config.optim, total_steps=plan.total_steps)
                set_learning_rate(optimizer, rate)
                loss, norm = self._one_step(step, optimizer, parameters, batches)
                seconds = time.perf_counter() - began
                speed = (step - first_step) * plan.batch_size * plan.accumulate / seconds
                progress.advance(1, loss=loss, **{"pairs/s": round(speed)})
                if step % run.log_every == 0 or step in (1, plan.total_steps):
                    values = {
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": norm,
                        "epoch": step * plan.accumulate / plan.per_epoch,
                    }
                    log.write(
                        "train", step, {**values, **self.task.metrics(), "pairs_per_s": speed, "seconds": seconds}
                    )
                position = self._after(replace(position, step=step), optimizer, log)
        return position

    def _one_step(
        self, step: int, optimizer: Any, parameters: list[Any], batches: Iterator[Any]
    ) -> tuple[float, float]:
        """Do one step and return its loss and the norm of the gradient before clipping."""
        config = self.config.optim
        seed_step(self.config.seed, step, self.group.rank)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for i in range(config.accumulate):
            is_last = i == config.accumulate - 1
            value = self.task.backward(next(batches), weight=1.0 / config.accumulate, sync=is_last)
            loss += mean_over_ranks(value, self.group, parameters[0].device) / config.accumulate
        if not math.isfinite(loss):
            raise self._not_a_number("the loss", step)
        bound = math.inf if config.clip_norm is None else config.clip_norm
        norm = clip_gradients(parameters, bound)
        if not math.isfinite(norm):
            raise self._not_a_number("the gradient", step)
        optimizer.step()
        self.task.after_step()
        return loss, norm

    def _not_a_number(self, what: str, step: int) -> TrainingError:
        kept = read_position(self.out / LAST).step if (self.out / LAST).exists() else None
        rest = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been written yet"
        return TrainingError(
            f"{what} is not a number at step {step}; {rest}",
            hint="lower `optim.lr`, lengthen the warm-up, or set `optim.precision` to `fp32`",
        )

    def _after(self, position: Position, optimizer: Any, log: RunLog) -> Position:
        """Validate, select and save where they are due."""
        run, plan, step = self.config.run, self.plan, position.step
        is_end = step >= plan.total_steps
        due = step % run.eval_every == 0 if run.eval_every else plan.ends_epoch(step)
        improved = False
        if self.validate is not None and (due or is_end):
            position, improved = self._selected(position, log)
        if is_end or (run.patience and position.stale >= run.patience):
            position = replace(position, done=True)
        if position.done and position.best is None:  # nothing was selected: the last weights are the best
            position, improved = replace(position, best_step=step, best_metrics=position.last), True
        save_due = step % run.save_every == 0 if run.save_every else due
        if improved or save_due or position.done:
            kept: dict[str, Any] = {"position": position, "locked": self._locked, "write": self.group.is_main}
            if improved:
                save_checkpoint(self.out / BEST, self.task.model, **kept)
            save_checkpoint(self.out / LAST, self.task.model, optimizer=optimizer, **kept)
        return position

    def _selected(self, position: Position, log: RunLog) -> tuple[Position, bool]:
        assert self.validate is not None
        model, select = self.task.model, self.config.run.select
        model.eval()
        try:
            metrics = of_main(self.validate(), self.group)
        finally:
            model.train()
        log.write("validation", position.step, metrics)
        position = replace(position, last=metrics)
        if select == "none":
            return position, False
        if select not in metrics:
            raise ConfigError(
                f"`run.select` is `{select}`, which validation did not return",
                hint=f"one of: {', '.join(sorted(metrics))}, none",
            )
        value = metrics[select]
        better = position.best is None or (
            value < position.best if select in LOWER_IS_BETTER else value > position.best
        )
        if not better or not math.isfinite(value):
            return replace(position, stale=position.stale + 1), False
        return replace(position, best=value, best_step=position.step, best_metrics=metrics, stale=0), True
