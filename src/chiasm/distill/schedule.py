"""When what happens in a stage: batches, learning rate, weight of the text, validations; pure functions of the step.

Comes in: the stage's options and the number of rows. Goes out: numbers. Nothing here holds state, so the step is all
that a checkpoint must remember of order, rates and random draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.distill.recipe import FuseConfig, StageConfig
from chiasm.errors import InputError


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a stage.

    Attributes:
        rows: Training images.
        batch_size: Images per step; the last batch of an epoch may be smaller.
        per_epoch: Batches per epoch.
        steps: Steps of the stage proper.
        warmup: Steps before them in which ``h_d`` alone learns.
        eval_every: Steps between validations.
    """

    rows: int
    batch_size: int
    per_epoch: int
    steps: int
    warmup: int
    eval_every: int

    @classmethod
    def of(cls, config: StageConfig, rows: int, *, warmup: int = 0) -> Plan:
        """Make the plan of a stage.

        Raises:
            InputError: Nothing to train on.
        """
        if rows < 1:
            raise InputError("there is no image to train on", hint="look at `data.train_splits` and `data.classes`")
        size = rows if isinstance(config.batch_size, str) else min(config.batch_size, rows)
        per_epoch = math.ceil(rows / size)
        steps = config.steps if config.steps is not None else max(1, round(config.epochs * per_epoch))
        return cls(rows, size, per_epoch, steps, warmup, config.eval_every or max(1, per_epoch // 10))

    @property
    def total(self) -> int:
        """All steps, warm-up included."""
        return self.warmup + self.steps

    def batch(self, step: int, *, seed: int) -> NDArray[np.int64]:
        """Return the rows of step ``step`` (the first is 0, warm-up included): of each epoch a new order.

        The stage proper has the same batches with and without warm-up, so that arms differ in nothing else.
        """
        if self.per_epoch == 1:
            return np.arange(self.rows, dtype=np.int64)
        phase, number = (1, step) if step < self.warmup else (0, step - self.warmup)
        epoch, place = divmod(number, self.per_epoch)
        order = np.random.default_rng([seed, phase, epoch]).permutation(self.rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size].astype(np.int64)

    def validates(self, step: int) -> bool:
        """Return whether a validation is due after ``step`` steps of the stage proper.

        The weights that a stage starts from count, too: an arm that only makes them worse keeps them.
        """
        return step >= 0 and (step % self.eval_every == 0 or step == self.steps)


def learning_rate(step: int, *, config: StageConfig, steps: int) -> float:
    """Return the rate of step ``step`` (the first is 0): constant, or half a cosine that reaches 0 after the last."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def kd_weight(step: int, *, config: FuseConfig, steps: int) -> float:
    """Return λ of step ``step`` (the first is 0): constant; rising in a line from 0 to λ; falling along a cosine to 0."""
    if config.kd_schedule == "constant":
        return config.kd_weight
    progress = min(1.0, step / (steps - 1)) if steps > 1 else 1.0
    if config.kd_schedule == "rise":
        return config.kd_weight * progress
    return config.kd_weight * 0.5 * (1 + math.cos(math.pi * progress))


def derived_seed(seed: int, *purpose: int | str) -> int:
    """Return a seed for one purpose, named by numbers and words, that is independent of all others."""
    words = [n if isinstance(n, int) else int.from_bytes(n.encode(), "little") for n in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)
