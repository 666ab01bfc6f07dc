"""What the stages minimise and measure: classification of images, of texts, and classification with distillation.

Comes in: a student, rows and targets. Goes out: losses of a batch and metrics of the held-out rows, for
:class:`chiasm.distill.trainer.StageTrainer`.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.distill.problem import Problem, Targets
from chiasm.distill.recipe import FuseConfig, StageConfig
from chiasm.distill.schedule import kd_weight
from chiasm.distill.student import Inputs, Student, TextProbe, run_student
from chiasm.distill.trainer import scores
from chiasm.encoders.heads import HeadsOutput
from chiasm.losses.distillation import (
    balanced_weights,
    classification,
    cosine_kd,
    logit_kd,
    mse_kd,
    ref_compat,
    relational_kd,
)
from chiasm.metrics.classification import MissingClassWarning

DISTANCES = {"cosine": cosine_kd, "mse": mse_kd, "relational": relational_kd}


class Judge:
    """Classification losses and scores that all stages share.

    Args:
        config: Class weights.
        train: Labels that are trained on.
        held_out: Labels that are validated on.
        classes: Names of all classes.
        softmax_twice: Train on the cross-entropy of the softmax output, as the published code.
        device: Of the logits.
    """

    def __init__(
        self,
        config: StageConfig,
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
        *,
        classes: int,
        softmax_twice: bool = False,
        device: str = "cpu",
    ) -> None:
        self.train = torch.tensor(train, dtype=torch.int64, device=device)
        self.held_out = torch.tensor(held_out, dtype=torch.int64, device=device)
        self._held_out = np.asarray(held_out)
        self.weights = balanced_weights(self.train.cpu(), classes).to(device) if config.class_weights else None
        self._loss = ref_compat if softmax_twice else classification
        absent = classes - len(np.unique(self._held_out))
        self.every_class = not absent
        if len(held_out) and absent:
            warnings.warn(
                f"{absent} of {classes} classes have no row to validate on: val_auroc is not a number",
                MissingClassWarning,
                stacklevel=3,
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss that is trained on."""
        return self._loss(logits, labels, self.weights)

    def of_rows(self, logits: Tensor, rows: Tensor | None) -> Tensor:
        """Return the loss of some training rows (None: all)."""
        return self.loss(logits, self.train if rows is None else self.train[rows])

    def metrics(self, logits: Tensor) -> dict[str, float]:
        """Return ``val_ce`` (of logits, unweighted), ``val_loss`` as it is trained, and the scores."""
        found = {
            "val_ce": float(classification(logits, self.held_out)),
            "val_loss": float(self.loss(logits, self.held_out)),
        }
        probabilities = logits.double().softmax(dim=-1).cpu().numpy()
        if not np.isfinite(probabilities).all():
            return found
        return found | scores(probabilities, self._held_out, every_class=self.every_class)


class ImageTask:
    """Cross-entropy of the student's logits: the unimodal stage, and arms without a text."""

    def __init__(
        self,
        student: Student,
        problem: Problem,
        config: StageConfig,
        *,
        pixels: bool,
        softmax_twice: bool = False,
        device: str = "cpu",
    ) -> None:
        self.model: nn.Module = student.to(device)
        self.student = student
        self.device = device
        self.inputs = Inputs(problem.train, pixels=pixels, device=device)
        self.held_out = Inputs(problem.validation, pixels=pixels, device=device) if len(problem.validation) else None
        self.judge = Judge(
            config, problem.train.labels, problem.validation.labels, classes=len(problem.classes),
            softmax_twice=softmax_twice, device=device,
        )  # fmt: skip

    def chosen(self, rows: NDArray[np.int64]) -> Tensor | None:
        """Return row numbers on the device; None when they are all rows in their order."""
        return None if len(rows) == len(self.inputs) and rows[0] == 0 else torch.from_numpy(rows).to(self.device)

    def answer(self, rows: NDArray[np.int64], rng: np.random.Generator) -> HeadsOutput:
        """Return the student's outputs on training rows."""
        whole = self.chosen(rows) is None and not self.inputs.pixels
        return self.student(self.inputs.take(None if whole else rows, rng))  # type: ignore[no-any-return]

    def losses(self, rows: NDArray[np.int64], *, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return ``loss``: cross-entropy."""
        return {"loss": self.judge.of_rows(self.answer(rows, rng).logits, self.chosen(rows))}

    def trains(self, name: str, *, warmup: bool) -> bool:
        """Everything that is not locked trains."""
        return not warmup

    def validate(self, *, step: int) -> dict[str, float]:
        """Return the metrics of the held-out images."""
        return {} if self.held_out is None else self.judge.metrics(run_student(self.student, self.held_out).logits)

    def state(self) -> dict[str, Tensor]:
        """Return copies of what the student learnt."""
        return self.student.changed_state()


class TextTask:
    """Cross-entropy of ``h_t`` on real text embeddings; rows without a text are left out."""

    def __init__(
        self, probe: TextProbe, problem: Problem, targets: Targets, config: StageConfig, *,
        softmax_twice: bool = False, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.model: nn.Module = probe.to(device)
        self.probe = probe
        self.embeddings = torch.tensor(targets.train[targets.train_mask], device=device)
        self.held_out = torch.tensor(targets.validation[targets.validation_mask], device=device)
        self.judge = Judge(
            config, problem.train.labels[targets.train_mask], problem.validation.labels[targets.validation_mask],
            classes=len(problem.classes), softmax_twice=softmax_twice, device=device,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.embeddings)

    def losses(self, rows: NDArray[np.int64], *, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return ``loss``: cross-entropy."""
        chosen = torch.from_numpy(rows).to(self.embeddings.device)
        return {"loss": self.judge.of_rows(self.probe(self.embeddings[chosen]), chosen)}

    def trains(self, name: str, *, warmup: bool) -> bool:
        """Everything trains."""
        return not warmup

    @torch.no_grad()
    def validate(self, *, step: int) -> dict[str, float]:
        """Return the metrics on the texts of held-out images."""
        return self.judge.metrics(self.probe(self.held_out)) if len(self.held_out) else {}

    def state(self) -> dict[str, Tensor]:
        """Return copies of ``heads.text.*``."""
        return self.probe.changed_state()


class TextSide(Protocol):
    """Text embeddings that training changes (``fuse.text_lora``); see ``distill.text_side``."""

    model: nn.Module

    def embed(self, split: str, rows: NDArray[np.int64]) -> Tensor:
        """Return (rows, text_dim), with gradients where they are enabled."""

    def watch(self) -> dict[str, float]:
        """Return what tells of a collapse; raise when there is one."""


class DistillTask(ImageTask):
    """``CE(logits, y) + λ · KD(target, predicted)``: the fuse stage of arms with a text.

    Args:
        student: With fused heads.
        problem: Rows.
        targets: Of its training and validation rows.
        config: λ, kind of distance, warm-up.
        text: Trained text embeddings instead of the fixed ones.
        **options: As :class:`ImageTask`.
    """

    def __init__(
        self,
        student: Student,
        problem: Problem,
        targets: Targets,
        config: FuseConfig,
        *,
        steps: int,
        text: TextSide | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, problem, config, **options)
        self.config, self.steps, self.text = config, steps, text
        self.target = torch.tensor(targets.train, dtype=torch.float32, device=self.device)
        self.held_out_target = torch.tensor(targets.validation, dtype=torch.float32, device=self.device)
        self.mask = self._mask(targets.train_mask)
        self.held_out_mask = self._mask(targets.validation_mask)
        if text is not None:
            self.model = nn.ModuleDict({"student": student, "text": text.model.to(self.device)})

    def _mask(self, mask: NDArray[np.bool_]) -> Tensor | None:
        return None if mask.all() else torch.tensor(mask, device=self.device)

    def losses(self, rows: NDArray[np.int64], *, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return ``loss``, ``ce`` and ``kd``; in the warm-up (``step`` < 0) the loss is the distance alone."""
        out, chosen = self.answer(rows, rng), self.chosen(rows)
        mask = self.mask if self.mask is None or chosen is None else self.mask[chosen]
        target = self.target if chosen is None else self.target[chosen]
        if self.text is not None:
            target = self.text.embed("train", rows)
        kd = self.distance(out, target, mask)
        if step < 0:
            return {"loss": kd, "kd": kd.detach()}
        ce = self.judge.of_rows(out.logits, chosen)
        weight = kd_weight(step, config=self.config, steps=self.steps)
        loss = ce + weight * kd if weight else ce
        found = {"ce": ce.detach(), "kd": kd.detach(), "kd_weight": torch.tensor(weight)}
        if self.text is not None:
            assert out.text is not None
            anchor = self._anchor(target, chosen, mask)
            pull = self.towards_image(target, out, mask)
            loss = loss + self.config.text_anchor * anchor + weight * pull
            found["anchor"] = anchor.detach()
        return {"loss": loss, **found}

    def distance(self, out: HeadsOutput, target: Tensor, mask: Tensor | None) -> Tensor:
        """Return the distance between predicted and real embeddings, which teaches ``h_d`` and the tower alone."""
        assert out.text is not None
        if self.config.kd != "logit":
            return DISTANCES[self.config.kd](out.text, target, mask)
        student, teacher = self._text_logits(out.text), self._text_logits(target)
        return logit_kd(student, teacher, self.config.kd_temperature, mask)

    def _text_logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits of ``h_t`` as it stands, without gradients for it: it must not learn to tell nothing."""
        heads = self.student.heads
        assert heads.text is not None
        locked = {n: p.detach() for n, p in heads.text.named_parameters()}
        return torch.func.functional_call(heads.text, locked, (heads.enter_text_head(embeddings),))  # type: ignore[no-any-return]

    def _anchor(self, target: Tensor, chosen: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the text's own classification loss, which keeps trained targets from becoming one."""
        heads = self.student.heads
        assert heads.text is not None
        labels = self.judge.train if chosen is None else self.judge.train[chosen]
        logits: Tensor = heads.text(heads.enter_text_head(target))
        if mask is not None:
            logits, labels = logits[mask], labels[mask]
        return self.judge.loss(logits, labels) if len(labels) else (logits * 0).sum()

    def towards_image(self, target: Tensor, out: HeadsOutput, mask: Tensor | None) -> Tensor:
        """Return the same distance with the roles exchanged: the text learns, the image's prediction is the target."""
        assert out.text is not None
        if self.config.kd != "logit":
            return DISTANCES[self.config.kd](target, out.text, mask)
        return logit_kd(self._text_logits(target), self._text_logits(out.text), self.config.kd_temperature, mask)

    def trains(self, name: str, *, warmup: bool) -> bool:
        """In the warm-up ``h_d`` alone trains."""
        return not warmup or "heads.distill." in f".{name}"

    def validate(self, *, step: int) -> dict[str, float]:
        """Return the metrics of the held-out images; ``val_loss`` has the text in it, ``val_ce`` has not."""
        watched = {} if self.text is None else self.text.watch()
        if self.held_out is None:
            return watched
        out = run_student(self.student, self.held_out)
        found = self.judge.metrics(out.logits)
        target = self.held_out_target
        with torch.no_grad():
            if self.text is not None:
                target = self.text.embed("validation", np.arange(len(self.held_out), dtype=np.int64))
            found["val_kd"] = float(self.distance(out, target, self.held_out_mask))
        weight = kd_weight(max(step, 0), config=self.config, steps=self.steps)
        found["val_loss"] += weight * found["val_kd"]
        return found | watched
