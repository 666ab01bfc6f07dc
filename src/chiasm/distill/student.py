"""The image side of distillation as one module: a tower, locked, adapted or trained, and the heads on it.

Comes in: a tower (or none, for cached features) and :class:`HeadsConfig`. Goes out: logits, and the few tensors that a
stage changed. No text lives here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.distill.problem import Rows
from chiasm.distill.schedule import derived_seed
from chiasm.encoders.adapters import FusedLora, apply_lora, freeze, merge_lora
from chiasm.encoders.base import LoraConfig
from chiasm.encoders.heads import DistilledHeads, FeatureNorm, HeadsConfig, HeadsOutput
from chiasm.errors import CheckpointError, InputError


class Student(nn.Module):
    """Inputs to logits: ``heads(tower(inputs))``, or ``heads(features)`` without a tower.

    Args:
        heads: On features (batch, width).
        tower: Inputs to features; None when the features are given. It is used as it stands: :meth:`adapted` copies.
        trained: ``none``: the tower is locked; ``lora``: its adapters train; ``full``: all of it trains.
    """

    def __init__(self, heads: DistilledHeads, tower: nn.Module | None = None, *, trained: str = "none") -> None:
        super().__init__()
        self.heads = heads
        self.tower = tower
        self.trained = trained if tower is not None else "none"

    @classmethod
    def adapted(
        cls, heads: DistilledHeads, tower: nn.Module, *, lora: LoraConfig | None, seed: int, full: bool = False
    ) -> Self:
        """Return a student on a copy of ``tower``: with adapters (drawn with ``seed``), trained in full, or locked.

        Raises:
            ConfigError: Nothing to adapt, or ``lora.targets`` that match nothing.
        """
        tower = copy.deepcopy(tower)
        if full:
            return cls(heads, tower.requires_grad_(True), trained="full")
        freeze(tower)
        if lora is None:
            return cls(heads, tower)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "lora"))
            apply_lora(tower, lora)
        return cls(heads, tower, trained="lora")

    def forward(self, inputs: Tensor) -> HeadsOutput:
        """Return what the heads say of inputs: (batch, width) or (batch, 3, height, width)."""
        return self.heads(self.features(inputs))  # type: ignore[no-any-return]

    def features(self, inputs: Tensor) -> Tensor:
        """Return the features (batch, width) that the heads take."""
        return inputs if self.tower is None else self.tower(inputs)

    def train(self, mode: bool = True) -> Self:
        """Switch what trains; a locked tower's dropout and batch statistics stand still, its adapters' dropout acts."""
        super().train(mode)
        if self.tower is not None and self.trained != "full":
            self.tower.eval()
            for name, module in self.tower.named_modules():
                if isinstance(module, FusedLora) or name.endswith("lora_dropout") or "lora_dropout." in name:
                    module.train(mode)
        return self

    def changed_state(self) -> dict[str, Tensor]:
        """Return copies of all heads and of what trains in the tower: ``heads.*``, ``tower.*``."""
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        if self.trained == "full":
            trained |= {n for n, _ in self.named_buffers()}
        return {
            name: tensor.detach().clone()
            for name, tensor in self.state_dict().items()
            if name.startswith("heads.") or name in trained
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`changed_state` back.

        Raises:
            CheckpointError: Tensors that are absent, foreign or of another shape.
        """
        own, wanted = self.state_dict(), set(self.changed_state())
        wrong = (wanted ^ set(state)) | {n for n in wanted & set(state) if own[n].shape != state[n].shape}
        if wrong:
            raise CheckpointError(
                f"the weights of a stage do not fit the model: `{min(wrong)}` and {len(wrong) - 1} more"
            )
        with torch.no_grad():
            for name in wanted:
                own[name].copy_(state[name])


def make_heads(config: HeadsConfig, seed: int) -> DistilledHeads:
    """Return heads drawn with ``seed``: the same numbers whatever was drawn before, and for every arm of one shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "heads"))
        return DistilledHeads(config)


class TextProbe(nn.Module):
    """``h_t`` by itself: real text embeddings to class logits, at the length at which it will meet predicted ones."""

    def __init__(self, config: HeadsConfig, seed: int) -> None:
        super().__init__()
        self.heads = make_heads(config, seed)
        for name in ("vision", "distill", "fusion"):
            setattr(self.heads, name, None)
        self.heads.norm = nn.Identity()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return logits (batch, classes) of embeddings (batch, text_dim)."""
        logits: Tensor = self.heads.text(self.heads.enter_text_head(embeddings))  # type: ignore[misc]
        return logits

    def changed_state(self) -> dict[str, Tensor]:
        """Return copies of ``heads.text.*``."""
        return {n: t.detach().clone() for n, t in self.state_dict().items()}


def identity_tower(width: int) -> nn.Module:
    """Return a locked tower that gives features back: what adapters are put on where features are all there is."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return freeze(nn.Sequential(layer))  # adapters need a name to replace


class Inputs:
    """What a student takes of some rows, on its device.

    Args:
        rows: Images of one split.
        pixels: Whether the student has a tower that takes pixels; features otherwise.
        device: Where tensors go.

    Raises:
        InputError: What the student takes is not there.
    """

    def __init__(self, rows: Rows, *, pixels: bool, device: str | torch.device = "cpu") -> None:
        if pixels and rows.pixels is None:
            raise InputError("the tower cannot be trained: there are no images, only features")
        if not pixels and rows.features is None:
            raise InputError("the heads cannot be trained: the features of the locked backbone are missing")
        self.rows, self.pixels, self.device = rows, pixels, device
        # A copy: vector arithmetic may depend on where memory is aligned, and torch aligns its own alike each time.
        self._features = None if pixels else torch.tensor(rows.features, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64] | None, rng: np.random.Generator | None = None) -> Tensor:
        """Return the inputs of some rows (None: all); ``rng`` augments pixels."""
        if self._features is not None:
            return self._features if rows is None else self._features[torch.from_numpy(rows).to(self.device)]
        assert self.rows.pixels is not None
        chosen = np.arange(len(self.rows), dtype=np.int64) if rows is None else rows
        return self.rows.pixels(chosen, rng).to(self.device)


@torch.no_grad()
def run_student(student: Student, inputs: Inputs, *, batch_size: int = 1024) -> HeadsOutput:
    """Return the outputs of all rows, without gradients, in eval mode; the student's mode is left as it was."""
    was_training = student.training
    student.eval()
    try:
        if len(inputs) == 0:
            raise InputError("there is no image to look at")
        parts = [
            student(inputs.take(np.arange(i, min(i + batch_size, len(inputs)), dtype=np.int64)))
            for i in range(0, len(inputs), batch_size)
        ]
    finally:
        student.train(was_training)
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]
    columns = list(zip(*parts, strict=True))
    return HeadsOutput(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]


@torch.no_grad()
def fit_norm(student: Student, inputs: Inputs, *, batch_size: int = 1024) -> None:
    """Take the statistics of the training images' features, without augmentation, into the heads' norm."""
    if isinstance(student.heads.norm, FeatureNorm):
        student.heads.norm.fit(all_features(student, inputs, batch_size=batch_size))


@torch.no_grad()
def all_features(student: Student, inputs: Inputs, *, batch_size: int = 1024) -> Tensor:
    """Return the features (n, width) of all rows in eval mode; the student's mode is left as it was."""
    was_training = student.training
    student.eval()
    try:
        chosen = (
            np.arange(i, min(i + batch_size, len(inputs)), dtype=np.int64) for i in range(0, len(inputs), batch_size)
        )
        return torch.cat([student.features(inputs.take(rows)) for rows in chosen])
    finally:
        student.train(was_training)


@torch.no_grad()
def absorb_norm(student: Student, inputs: Inputs, *, batch_size: int = 1024) -> None:
    """Give the heads' norm the statistics of the features as they are now, and ``h_v`` weights that undo the change.

    Logits stay as they are, up to rounding. A tower that trained has other features at the end than it began with.
    """
    norm = student.heads.norm
    if not isinstance(norm, FeatureNorm):
        return
    mean, scale = norm.mean.clone(), norm.scale.clone()
    norm.fit(all_features(student, inputs, batch_size=batch_size))
    first = next(m for m in student.heads.vision.modules() if isinstance(m, nn.Linear))
    weight = first.weight.double()
    # (x - m) s = ((x - m') s') s/s' + (m' - m) s
    first.bias.add_((weight @ ((norm.mean - mean) * scale).double()).to(first.bias.dtype))
    first.weight.copy_(weight * (scale / norm.scale).double())


def merged(student: Student) -> Student:
    """Add the low-rank updates to the tower's weights, in place; outputs are the same up to rounding."""
    if student.tower is not None:
        merge_lora(student.tower)
    student.trained = "none"
    return student.eval()
