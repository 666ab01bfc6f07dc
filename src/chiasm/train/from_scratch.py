"""The baseline that CLIP must beat: a small CNN trained on nothing but the labelled images.

In: samples (or their decoded pixels) with one class each, and their patients. Out: an estimator in the manner of
scikit-learn (``fit``, ``predict_proba``, ``predict``, ``classes_``). Without it a few-shot curve says nothing about what
pretraining is worth.

Notable choices: 64-pixel images, decoded once; group normalisation, so that a batch of two images trains like a batch of
64; class weights; the best epoch is chosen on held-out patients of the training rows, never on rows that are scored
later. One seed fixes weights, order, augmentation and dropout; the caller's random state is left alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor, nn

from chiasm.data.augment import Augment
from chiasm.data.splits import split_by_group
from chiasm.data.transforms import fit_image
from chiasm.datasets.images import open_sample_image
from chiasm.errors import InputError, UnknownName
from chiasm.metrics.labels import is_missing
from chiasm.progress import Progress, SilentProgress
from chiasm.train.augmentation import augment_batch
from chiasm.types import Preprocess, Sample

Pixels = NDArray[np.uint8]

#: Channels of the convolutional blocks of each architecture; every block halves the side.
ARCHITECTURES: dict[str, tuple[int, ...]] = {"small_cnn": (16, 32, 64, 128), "tiny_cnn": (8, 16, 32)}
#: Images a step, at most.
BATCH = 64
#: Images a pass when nothing is learned.
SCORING_BATCH = 256
_GROUP_CHANNELS = 8


class FromScratch(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A small CNN without pretraining.

    Args:
        architecture: ``small_cnn`` (four blocks, about 100 000 weights) or ``tiny_cnn`` (three blocks, 6 000).
        image_size: Side to which images are squashed, in pixels; a multiple of 2 to the number of blocks.
        epochs: Passes over the training rows, at most.
        min_steps: Of the optimiser; a few shots get more epochs until they reach it.
        patience: Epochs without a better validation loss before training ends.
        validation: Share of the training rows, by whole patients, that chooses the epoch; needs ``groups`` in ``fit``.
        learning_rate: Peak of AdamW's rate; it rises over a tenth of the steps and falls as a cosine.
        weight_decay: AdamW's.
        dropout: Before the last layer.
        augment: Name of a preset of :class:`~chiasm.data.augment.Augment`, or one. ``chest`` never mirrors, so left
            stays left; ``histology`` does.
        class_weights: ``balanced`` weighs every class alike in the loss, ``none`` every row.
        seed: Of weights, order, augmentation, dropout and of the held-out patients.
        workers: Threads that decode.

    Attributes:
        classes_: Names, sorted; the columns of :meth:`predict_proba`.
        history_: One dict an epoch: ``train_loss``, ``validation_loss`` (NaN without validation).
        best_epoch_: The epoch whose weights are kept, from 0.
        validation_rows_: Rows of the training set that chose the epoch, or empty.
        model_: The network.
    """

    def __init__(
        self,
        architecture: str = "small_cnn",
        image_size: int = 64,
        *,
        epochs: int = 30,
        min_steps: int = 120,
        patience: int = 8,
        validation: float = 0.2,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        dropout: float = 0.2,
        augment: str | Augment = "chest",
        class_weights: Literal["balanced", "none"] = "balanced",
        seed: int = 0,
        workers: int = 2,
    ) -> None:
        self.architecture = architecture
        self.image_size = image_size
        self.epochs = epochs
        self.min_steps = min_steps
        self.patience = patience
        self.validation = validation
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.augment = augment
        self.class_weights = class_weights
        self.seed = seed
        self.workers = workers

    def fit(
        self,
        samples: Sequence[Sample] | Pixels,
        classes: Sequence[str],
        groups: Sequence[Hashable] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Train on images and their classes.

        Args:
            samples: The labelled images, or what :func:`decode_images` made of them.
            classes: The class of each; at least two different ones.
            groups: The patient of each. With them a share of the patients is held out to choose the epoch, if every
                class keeps a patient on both sides; without them all rows train for all epochs.
            progress: Told about every epoch.

        Raises:
            InputError: Lengths that differ, a missing class, one class only, or an image that cannot be read.
        """
        augment = self._check()
        pixels = self._pixels(samples)
        names, target = _numbered(classes, len(pixels))
        train, held = self._hold_out(names, target, groups)
        self.classes_ = np.asarray(names)
        self.validation_rows_ = tuple(int(row) for row in held)
        is_grey = bool((pixels == pixels[..., :1]).all())
        self._channels = 1 if is_grey else 3
        inputs = self._tensor(pixels)
        self._mean = inputs[train].mean((0, 2, 3), keepdim=True)
        self._std = inputs[train].std((0, 2, 3), keepdim=True).clamp(min=1e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._train(inputs, torch.from_numpy(target), train, held, augment, progress or SilentProgress())
        return self

    def predict_proba(self, samples: Sequence[Sample] | Pixels) -> NDArray[np.float64]:
        """Return class probabilities (n, classes), rows sum to 1; they are the network's own, not calibrated.

        Raises:
            InputError: Not fitted, or an image that cannot be read.
        """
        if not hasattr(self, "model_"):
            raise InputError("this baseline is not fitted", hint="call `fit` first")
        inputs = self._tensor(self._pixels(samples))
        self.model_.eval()
        with torch.inference_mode():
            found = [self.model_(self._normal(part)) for part in torch.split(inputs, SCORING_BATCH)]
        probabilities: NDArray[np.float64] = torch.cat(found).double().softmax(1).numpy()
        return probabilities

    def predict(self, samples: Sequence[Sample] | Pixels) -> NDArray[Any]:
        """Return the most probable class of each image."""
        chosen: NDArray[Any] = self.classes_[self.predict_proba(samples).argmax(1)]
        return chosen

    def _check(self) -> Augment:
        if self.architecture not in ARCHITECTURES:
            raise UnknownName(
                "architecture", self.architecture, ARCHITECTURES, hint=f"one of: {', '.join(ARCHITECTURES)}"
            )
        factor = 2 ** len(ARCHITECTURES[self.architecture])
        if self.image_size < factor or self.image_size % factor:
            raise InputError(f"`image_size` must be a multiple of {factor}, got {self.image_size}")
        for name, least in (("epochs", 1), ("min_steps", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise InputError(f"`validation` must be a share between 0 and 1, got {self.validation}")
        if self.class_weights not in ("balanced", "none"):
            raise UnknownName("class weights", self.class_weights, ("balanced", "none"))
        return Augment.preset(self.augment) if isinstance(self.augment, str) else self.augment

    def _pixels(self, samples: Sequence[Sample] | Pixels) -> Pixels:
        if not isinstance(samples, np.ndarray):
            return decode_images(samples, self.image_size, workers=self.workers)
        expected = (self.image_size, self.image_size, 3)
        if samples.dtype != np.uint8 or samples.shape[1:] != expected or not len(samples):
            raise InputError(
                f"pixels must be uint8 of shape (n, {', '.join(map(str, expected))}), got {samples.dtype} {samples.shape}",
                hint="`decode_images` makes them",
            )
        return samples

    def _hold_out(
        self, names: Sequence[str], target: NDArray[np.int64], groups: Sequence[Hashable] | None
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the rows that train and those that choose the epoch; the latter may be none."""
        everything = np.arange(len(target))
        if groups is None:
            return everything, everything[:0]
        if len(groups) != len(target):
            raise InputError(f"there are {len(groups)} groups for {len(target)} images")
        if any(is_missing(g) for g in groups):
            raise InputError("an image has no group", hint="give it a group of its own, such as its id")
        patients = [str(g) for g in groups]
        if len(set(patients)) < 2:
            return everything, everything[:0]
        shares = {"train": 1 - self.validation, "held": self.validation}
        part = np.asarray(split_by_group(patients, shares, seed=self.seed, stratify=[names[k] for k in target]))
        train, held = np.flatnonzero(part == "train"), np.flatnonzero(part == "held")
        if any(len(np.unique(target[rows])) < len(names) for rows in (train, held)):
            return everything, everything[:0]
        return train, held

    def _tensor(self, pixels: Pixels) -> Tensor:
        """Return values in [0, 1], (n, channels, size, size); colours become grey where all training images were."""
        values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(255)
        return values.mean(1, keepdim=True) if self._channels == 1 else values

    def _normal(self, values: Tensor) -> Tensor:
        normal: Tensor = (values - self._mean) / self._std
        return normal

    def _train(
        self,
        inputs: Tensor,
        target: Tensor,
        train: NDArray[np.intp],
        held: NDArray[np.intp],
        augment: Augment,
        progress: Progress,
    ) -> None:
        model = make_cnn(self.architecture, self._channels, len(self.classes_), dropout=self.dropout)
        rng = np.random.default_rng(self.seed)
        steps_an_epoch = math.ceil(len(train) / BATCH)
        epochs = max(self.epochs, math.ceil(self.min_steps / steps_an_epoch))
        weights = self._weights(target[train])
        optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=epochs * steps_an_epoch, pct_start=0.1, cycle_momentum=False
        )
        fill = float(self._mean.mean())
        best, best_loss = {k: v.clone() for k, v in model.state_dict().items()}, math.inf
        self.history_: list[dict[str, float]] = []
        self.best_epoch_ = epochs - 1
        progress.start(epochs, "training from scratch")
        for epoch in range(epochs):
            model.train()
            total = 0.0
            for rows in np.array_split(rng.permutation(train), steps_an_epoch):
                values = augment_batch(inputs[rows], augment, rng, fill=fill)
                loss = F.cross_entropy(model(self._normal(values)), target[rows], weight=weights)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(rows) / len(train)
            measured = self._loss(model, inputs, target, held, weights)
            self.history_.append({"train_loss": total, "validation_loss": measured})
            progress.advance(1, loss=total)
            if len(held):
                if measured < best_loss:
                    best_loss, self.best_epoch_ = measured, epoch
                    best = {k: v.clone() for k, v in model.state_dict().items()}
                elif epoch - self.best_epoch_ >= self.patience and epoch * steps_an_epoch >= self.min_steps:
                    break
        progress.finish()
        if len(held):
            model.load_state_dict(best)
        self.model_ = model.eval()

    def _weights(self, target: Tensor) -> Tensor | None:
        if self.class_weights == "none":
            return None
        counts = torch.bincount(target, minlength=len(self.classes_)).float()
        return counts.sum() / (len(counts) * counts.clamp(min=1))

    def _loss(
        self, model: nn.Module, inputs: Tensor, target: Tensor, rows: NDArray[np.intp], weights: Tensor | None
    ) -> float:
        if not len(rows):
            return math.nan
        model.eval()
        with torch.inference_mode():
            found = torch.cat([model(self._normal(part)) for part in torch.split(inputs[rows], SCORING_BATCH)])
            return float(F.cross_entropy(found, target[rows], weight=weights))


def make_cnn(architecture: str, channels: int, classes: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Return an untrained network: blocks of convolution, group normalisation, ReLU and pooling, then one linear layer.

    Args:
        architecture: One of ``ARCHITECTURES``.
        channels: Of the images.
        classes: Logits.
        dropout: Before the linear layer.
    """
    layers: list[nn.Module] = []
    before = channels
    for number, width in enumerate(ARCHITECTURES[architecture]):
        if number == 0:  # at full resolution a step would cost three times as much
            layers.append(nn.Conv2d(before, width, 5, stride=2, padding=2, bias=False))
        else:
            layers += [nn.MaxPool2d(2), nn.Conv2d(before, width, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(width // _GROUP_CHANNELS, width), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(before, classes)
    )


def decode_images(samples: Sequence[Sample], image_size: int = 64, *, workers: int = 2) -> Pixels:
    """Return the images of samples squashed to a square: uint8 (n, image_size, image_size, 3).

    Decode once and give the array to ``fit`` and ``predict_proba`` where many baselines see the same images.

    Raises:
        InputError: No sample, or one without an image.
        FileFormatError: An image is damaged.
    """
    if not len(samples):
        raise InputError("there are no images")
    missing = sum(s.image is None for s in samples)
    if missing:
        raise InputError(f"{missing} of {len(samples)} samples have no image", hint="leave them out")
    shape = Preprocess(size=image_size, resize="squash", crop="none", interpolation="bilinear")

    def read(sample: Sample) -> Pixels:
        return np.asarray(fit_image(open_sample_image(sample), shape).convert("RGB"))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return np.stack(list(pool.map(read, samples)))


def _numbered(classes: Sequence[str], rows: int) -> tuple[list[str], NDArray[np.int64]]:
    if isinstance(classes, str) or len(classes) != rows:
        raise InputError(f"there are {len(classes)} classes for {rows} images", hint="give one class an image")
    missing = sum(is_missing(c) for c in classes)
    if missing:
        raise InputError(f"{missing} of {rows} images have no class", hint="leave out the rows that are not labelled")
    counts = Counter(str(c) for c in classes)
    if len(counts) < 2:
        raise InputError(f"all {rows} images have one class; at least two are needed")
    names = sorted(counts)
    number = {name: k for k, name in enumerate(names)}
    return names, np.asarray([number[str(c)] for c in classes], dtype=np.int64)
