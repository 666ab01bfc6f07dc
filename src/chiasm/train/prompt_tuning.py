"""Learned prompts (CoOp): vectors in front of the class name, trained through the frozen text tower.

In: an encoder, embeddings of the labelled images, their classes. Out: :class:`TunedPrompts`, one direction a label, which
``tasks.zero_shot.classifier_of_directions`` turns into a classifier for every task, and a folder on disk that names the
space it belongs to.

Source: Zhou et al. 2022, Learning to Prompt for Vision-Language Models, equations 2 and 3, class name at the end; with
``class_specific`` every class has vectors of its own. For labels of which any number can be true, one set of vectors says
that a finding is there and another that it is not (Sun et al. 2022, DualCoOp), trained with binary cross-entropy. The
anchor is KgCoOp's (Yao et al. 2023, equation 5): it holds directions near those of the words that training starts from.

Deviations: image vectors are computed once, so images are not augmented; AdamW instead of SGD; the default start is a
sentence, not noise; classes have equal weight in the loss; the epoch is chosen on held-out patients of the training
rows, epoch 0 (the sentence itself) included. Sun et al. use an asymmetric loss and average over regions; both are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.checkpoints import native
from chiasm.config import build, to_mapping
from chiasm.data.splits import split_by_group
from chiasm.encoders.face import Encoder
from chiasm.errors import CheckpointError, InputError, LeakageError, SpaceMismatch
from chiasm.metrics.labels import as_binary, is_missing
from chiasm.progress import Progress, SilentProgress
from chiasm.train.prompt_writer import PromptWriter, TuningConfig, token_table
from chiasm.types import Embeddings, LabelValue, Space

Floats = NDArray[np.float32]
Truth = Mapping[str, Sequence[LabelValue]] | Sequence[str | None]

FORM = native.Form("prompts.json", "chiasm-prompts", 1, "set of tuned prompts")
#: Used when a model has no logit scale.
FALLBACK_SCALE = 100.0


@dataclass(frozen=True, eq=False)
class TunedPrompts:
    """Learned vectors and the directions that the text tower made of them.

    Attributes:
        labels: Names of the classes.
        spoken: What of each name stood in the prompt.
        config: How they were learned.
        contexts: Side -> (1 or labels, vectors, width of the tokens).
        positive: Unit rows (labels, dim).
        negative: Against each label, in mode ``multi``.
        space: Where the directions live.
        logit_scale: Of the encoder.
        logit_bias: Of the encoder.
        history: One dict an epoch, from 0 (before training): ``train_loss``, ``validation_loss``.
        best_epoch: The epoch whose vectors these are.
        rows: Training rows and rows that chose the epoch.
    """

    labels: tuple[str, ...]
    spoken: tuple[str, ...]
    config: TuningConfig
    contexts: Mapping[str, Floats]
    positive: Floats
    negative: Floats | None
    space: Space
    logit_scale: float | None
    logit_bias: float | None
    history: tuple[dict[str, float], ...] = ()
    best_epoch: int = 0
    rows: tuple[int, int] = (0, 0)

    def described(self) -> dict[str, Any]:
        """Return everything but the vectors, as plain JSON values."""
        return {
            "labels": list(self.labels),
            "spoken": list(self.spoken),
            "tuning": to_mapping(self.config),
            "space": self.space.to_dict(),
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
            "best_epoch": self.best_epoch,
            "rows": list(self.rows),
        }


def tune_prompts(
    encoder: Encoder,
    images: Embeddings,
    labels: Sequence[str] | Mapping[str, str],
    truth: Truth,
    *,
    config: TuningConfig | None = None,
    groups: Sequence[Hashable] | None = None,
    held: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TunedPrompts:
    """Learn prompts from labelled images.

    Args:
        encoder: Its weights are not changed.
        images: Vectors of the training images, of this encoder.
        labels: Names of the classes, or names with the words that stand in the prompt.
        truth: The class of each row (``single``), or label -> 0, 1, None a row (``multi``); rows without are left out.
        config: Settings.
        groups: Patient of each row; by default those of ``images``. Some of them choose the epoch, if there are enough.
        held: Rows that choose the epoch and teach nothing, in place of a share of the patients.
        progress: Told about every epoch.

    Raises:
        LeakageError: A patient of ``held`` also teaches.
        SpaceMismatch: The vectors are not of this encoder.
        InputError: A text tower that cannot be tuned, too long a prompt, or a truth that does not fit.
    """
    config = config or TuningConfig()
    if images.space != encoder.space:
        raise SpaceMismatch(
            f"images come from `{images.space}`, the encoder's space is `{encoder.space}`",
            hint="embed the images with this encoder",
        )
    if images.modality != "image":
        raise InputError(f"prompts are tuned on image embeddings, got {images.modality} embeddings")
    names = tuple(labels)
    spoken = (
        tuple(labels[n] for n in names) if isinstance(labels, Mapping) else tuple(n.replace("_", " ") for n in names)
    )
    target, known = _targets(names, truth, len(images), config.mode)
    patients = [str(g) for g in (images.groups if groups is None else groups)]
    if len(patients) != len(images):
        raise InputError(f"there are {len(patients)} groups for {len(images)} images")
    train, chooses = _hold_out(target, known, patients, config) if held is None else _given(held, known, patients)
    writer = PromptWriter(encoder, spoken, config)
    pixels = torch.from_numpy(images.normalize().vectors).to(encoder.device)
    scale = encoder.logit_scale if encoder.logit_scale is not None else FALLBACK_SCALE
    problem = _Problem(pixels, torch.from_numpy(target).to(encoder.device), scale, config, len(names), train)
    with _frozen(encoder.model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        history, best = _learn(writer, problem, train, chooses, config, progress or SilentProgress())
        with torch.no_grad():
            found = [d.float().cpu().numpy() for d in writer.directions()]
    return TunedPrompts(
        names,
        spoken,
        config,
        {side: c.detach().float().cpu().numpy() for side, c in writer.contexts.items()},
        found[0],
        found[1] if len(found) > 1 else None,
        images.space,
        encoder.logit_scale,
        encoder.logit_bias,
        tuple(history),
        best,
        (len(train), len(chooses)),
    )


def nearest_words(encoder: Encoder, tuned: TunedPrompts, *, count: int = 1) -> dict[str, list[list[str]]]:
    """Return, for every side and learned vector of the first class, the tokens whose embeddings are nearest.

    Zhou et al. 2022 (table 4) find them "not very meaningful"; they are shown to keep anybody from reading meaning
    into the vectors, not to explain them.
    """
    weight = token_table(encoder).weight.detach().float().cpu()
    found: dict[str, list[list[str]]] = {}
    for side, context in tuned.contexts.items():
        distance = torch.cdist(torch.from_numpy(context[0]), weight)
        rows = distance.argsort(1)[:, :count].tolist()
        found[side] = [[_word(encoder.tokenizer.decode([int(k)]), k) for k in row] for row in rows]
    return found


def _word(piece: str, number: int) -> str:
    """Return a token in letters, or its number where it is a byte without any."""
    return piece if piece.strip() and piece.isprintable() and "\ufffd" not in piece else f"token {number}"


def save_prompts(directory: str | Path, tuned: TunedPrompts) -> Path:
    """Write learned prompts as a folder (``prompts.json``, ``model.safetensors``); atomic.

    Raises:
        CheckpointError: The files cannot be written.
    """
    tensors = {f"context.{side}": torch.from_numpy(c) for side, c in tuned.contexts.items()}
    tensors["positive"] = torch.from_numpy(tuned.positive)
    if tuned.negative is not None:
        tensors["negative"] = torch.from_numpy(tuned.negative)
    return native.save_model_dir(
        directory,
        tensors,
        name="prompts",
        config=tuned.described(),
        training={"history": list(tuned.history)},
        form=FORM,
    )


def load_prompts(directory: str | Path, *, space: Space | None = None) -> TunedPrompts:
    """Read learned prompts.

    Args:
        directory: From :func:`save_prompts`.
        space: Where they are to be used.

    Raises:
        CheckpointError: Absent, damaged or foreign files.
        SpaceMismatch: They were learned in another space.
    """
    found = native.read_model_dir(directory, form=FORM)
    try:
        stated = found.config
        tensors = {name: np.asarray(t.float().numpy()) for name, t in found.tensors.items()}
        labels = tuple(str(x) for x in stated["labels"])
        config = build(TuningConfig, {k: tuple(v) if isinstance(v, list) else v for k, v in stated["tuning"].items()})
        tuned = TunedPrompts(
            labels,
            tuple(str(x) for x in stated["spoken"]),
            config,
            {side: tensors[f"context.{side}"] for side in config.sides},
            tensors["positive"],
            tensors["negative"] if len(config.sides) > 1 else None,
            Space.from_dict(stated["space"]),
            stated["logit_scale"],
            stated["logit_bias"],
            tuple(found.training.get("history", ())),
            int(stated["best_epoch"]),
            (int(stated["rows"][0]), int(stated["rows"][1])),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError("the description of the tuned prompts lacks a part or has a wrong one") from error
    for rows in (tuned.positive, tuned.negative):
        if rows is not None and rows.shape != (len(labels), tuned.space.dim):
            raise CheckpointError(
                f"tuned prompts have vectors of shape {rows.shape}, expected {(len(labels), tuned.space.dim)}"
            )
    if space is not None and tuned.space != space:
        raise SpaceMismatch(
            f"the prompts were learned in `{tuned.space}`, they are to be used in `{space}`",
            hint="tune them again with this encoder",
        )
    return tuned


@dataclass(frozen=True)
class _Problem:
    """Images, their truth, and the loss of directions on some of them."""

    pixels: Tensor
    target: Tensor
    scale: float
    config: TuningConfig
    classes: int
    train: NDArray[np.intp]
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        target = self.target[torch.from_numpy(self.train)]
        if self.config.mode == "single":
            counts = torch.bincount(target.long(), minlength=self.classes).float()
            weights = torch.where(counts > 0, counts.sum() / (counts.clamp(min=1) * (counts > 0).sum()), 0.0)
        else:
            ones, zeros = (target == 1).sum(0), (target == 0).sum(0)
            weights = (zeros.clamp(min=1) / ones.clamp(min=1)).clamp(0.1, 10.0)
        object.__setattr__(self, "weights", weights)

    def loss(self, directions: Sequence[Tensor], rows: NDArray[np.intp]) -> Tensor:
        index = torch.from_numpy(rows).to(self.pixels.device)
        pixels, target = self.pixels[index], self.target[index]
        logits = self.scale * (pixels @ directions[0].to(pixels.dtype).T)
        if self.config.mode == "single":
            return F.cross_entropy(logits, target.long(), weight=self.weights)
        logits = logits - self.scale * (pixels @ directions[1].to(pixels.dtype).T)
        known = ~torch.isnan(target)
        each = F.binary_cross_entropy_with_logits(
            logits, torch.nan_to_num(target), pos_weight=self.weights, reduction="none"
        )
        return (each * known).sum() / known.sum().clamp(min=1)


def _learn(
    writer: PromptWriter,
    problem: _Problem,
    train: NDArray[np.intp],
    held: NDArray[np.intp],
    config: TuningConfig,
    progress: Progress,
) -> tuple[list[dict[str, float]], int]:
    """Train the writer's contexts in place; leave it with those of the best epoch."""
    parameters = list(writer.contexts.values())
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)
    steps = math.ceil(len(train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    rng = np.random.default_rng(config.seed)
    with torch.no_grad():
        first = [d.clone() for d in writer.directions()]
        history = [{"train_loss": float(problem.loss(first, train)), "validation_loss": _loss(problem, first, held)}]
    best, best_loss, kept = 0, history[0]["validation_loss"], [p.detach().clone() for p in parameters]
    progress.start(config.epochs, "tuning prompts")
    for epoch in range(1, config.epochs + 1):
        total = 0.0
        for rows in np.array_split(rng.permutation(train), steps):
            directions = writer.directions()
            loss = problem.loss(directions, rows)
            if config.anchor:
                pulls = [(d - f).square().sum(1).mean() for d, f in zip(directions, first, strict=True)]
                loss = loss + config.anchor * torch.stack(pulls).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows) / len(train)
        with torch.no_grad():
            measured = _loss(problem, writer.directions(), held) if len(held) else math.nan
        history.append({"train_loss": total, "validation_loss": measured})
        progress.advance(1, loss=total)
        if not len(held) or measured < best_loss:
            best, best_loss, kept = epoch, measured, [p.detach().clone() for p in parameters]
        elif epoch - best >= config.patience:
            break
    progress.finish()
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return history, best


def _loss(problem: _Problem, directions: Sequence[Tensor], rows: NDArray[np.intp]) -> float:
    return float(problem.loss(directions, rows)) if len(rows) else math.nan


def _targets(names: Sequence[str], truth: Truth, rows: int, mode: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the truth, class numbers (rows,) or 0/1/NaN (rows, labels), and which rows have any."""
    if len(names) < (2 if mode == "single" else 1) or len(set(names)) != len(names):
        raise InputError(
            f"got {len(names)} labels; `{mode}` needs {'two classes' if mode == 'single' else 'one'} or more, each named once"
        )
    if (mode == "multi") != isinstance(truth, Mapping):
        raise InputError(
            "`multi` needs a column of 0 and 1 for each label, `single` one column of class names",
            hint="choose the mode that fits the truth",
        )
    if isinstance(truth, Mapping):
        missing = [n for n in names if n not in truth]
        if missing:
            raise InputError(f"label `{missing[0]}` has no truth")
        target = np.stack([as_binary(list(truth[n])) for n in names], axis=1)
        known = (~np.isnan(target)).any(1)
    else:
        unknown = {v for v in truth if not is_missing(v)} - set(names)
        if unknown:
            raise InputError(f"{len(unknown)} classes of the truth are none of the {len(names)} labels")
        target = np.array([np.nan if is_missing(v) else names.index(str(v)) for v in truth], dtype=np.float64)
        known = ~np.isnan(target)
    if len(target) != rows:
        raise InputError(f"there are {len(target)} truth values for {rows} images")
    if not known.any():
        raise InputError("no row is labelled")
    return target.astype(np.float32), np.asarray(known)


def _hold_out(
    target: NDArray[np.float32], known: NDArray[np.bool_], patients: Sequence[str], config: TuningConfig
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows that train and rows that choose the epoch; none of the latter where a class would be lost."""
    rows = np.flatnonzero(known)
    groups = [patients[int(k)] for k in rows]
    if len(set(groups)) < 2:
        return rows, rows[:0]
    strata: list[LabelValue] = [str(np.nan_to_num(target[k], nan=-1).tolist()) for k in rows]
    shares = {"train": 1 - config.validation, "held": config.validation}
    part = np.asarray(split_by_group(groups, shares, seed=config.seed, stratify=strata))
    train, held = rows[part == "train"], rows[part == "held"]
    if config.mode == "single" and not set(target[rows]) <= set(target[train]) & set(target[held]):
        return rows, rows[:0]
    return train, held


def _given(
    held: Sequence[int], known: NDArray[np.bool_], patients: Sequence[str]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows that train and the labelled ones of those that the caller wants to choose the epoch."""
    chooses = np.zeros(len(known), dtype=bool)
    chooses[np.asarray(held, dtype=np.intp)] = True
    train, rows = np.flatnonzero(known & ~chooses), np.flatnonzero(known & chooses)
    both = {patients[int(k)] for k in train} & {patients[int(k)] for k in rows}
    if both:
        raise LeakageError(f"{len(both)} patients teach the prompts and choose the epoch", hint="split by patient")
    if not len(train):
        raise InputError("no labelled row is left to teach")
    return train, rows


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight of a model gather gradients, and put it back as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
