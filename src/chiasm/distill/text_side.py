"""Targets that training changes: a text tower with low-rank adapters, and the watch against their collapse.

Comes in: a module that embeds the texts of rows, by number. Goes out: embeddings with gradients, and two numbers that
tell whether the targets still differ from each other.

Notable choice. A target that only has to be easy to predict becomes one constant vector: that is a global minimum of the
distance. The text's own classification loss anchors it (``fuse.text_anchor``), and a collapse that comes all the same
stops the run.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.distill.schedule import derived_seed
from chiasm.encoders.adapters import apply_lora, freeze
from chiasm.encoders.base import LoraConfig
from chiasm.errors import TrainingError

#: Rows that are watched, at most.
WATCHED = 1024
#: Share of the variance at the start below which targets count as collapsed.
LEAST_VARIANCE = 0.01


class TrainedText:
    """A text tower's embeddings of the rows' texts, while adapters change it.

    Args:
        tower: ``tower(split, rows)`` with ``split`` ``train`` or ``validation`` and ``rows`` (n,) int64 gives
            (n, text_dim), of any length. A copy is adapted.
        lora: Adapters.
        rows: Number of training rows.
        seed: Of the adapters.
        collapse_rank: Effective rank below which the targets count as collapsed.
        device: Where the tower runs.
    """

    def __init__(
        self,
        tower: nn.Module,
        lora: LoraConfig,
        *,
        rows: int,
        seed: int,
        collapse_rank: float = 1.5,
        device: str = "cpu",
    ) -> None:
        tower = freeze(copy.deepcopy(tower)).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "text"))
            self.model: nn.Module = apply_lora(tower, lora)
        self.device, self.collapse_rank = device, collapse_rank
        self._watched = np.unique(np.linspace(0, rows - 1, min(rows, WATCHED)).round().astype(np.int64))
        found = self._now()
        self._at_start, self._rank_at_start = target_variance(found), effective_rank(found)

    def embed(self, split: str, rows: NDArray[np.int64]) -> Tensor:
        """Return unit vectors (rows, text_dim)."""
        return F.normalize(self.model(split, torch.from_numpy(rows).to(self.device)), dim=-1)

    def watch(self) -> dict[str, float]:
        """Return ``target_variance`` and ``target_rank`` of the training targets.

        Raises:
            TrainingError: The targets have collapsed, or hardly differed to begin with.
        """
        found = self._now()
        variance, rank = target_variance(found), effective_rank(found)
        if self._rank_at_start < self.collapse_rank:
            raise TrainingError(
                f"the texts hardly differ, so that a collapse could not be seen: effective rank {self._rank_at_start:.2f} "
                f"at the start (at least {self.collapse_rank:g})",
                hint="leave out `fuse.text_lora`, pair with more reports, or lower `fuse.collapse_rank`",
            )
        if variance < LEAST_VARIANCE * self._at_start or rank < self.collapse_rank:
            raise TrainingError(
                f"the text targets have collapsed: effective rank {rank:.2f} (at least {self.collapse_rank:g}), variance "
                f"{variance:.2g} ({self._at_start:.2g} at the start)",
                hint="leave out `fuse.text_lora`, or raise `fuse.text_anchor`",
            )
        return {"target_variance": variance, "target_rank": rank}

    @torch.no_grad()
    def _now(self) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        found = self.embed("train", self._watched)
        self.model.train(was_training)
        return found


def target_variance(embeddings: Tensor) -> float:
    """Return the mean squared distance of unit vectors (n, dim) from their mean: 0 when all are one, at most 1."""
    return float((embeddings - embeddings.mean(dim=0)).square().sum(dim=1).mean())


def effective_rank(embeddings: Tensor) -> float:
    """Return exp(entropy of the singular values' shares) of vectors (n, dim): 1 when all are parallel, at most dim.

    References:
        Roy and Vetterli 2007, The effective rank.
    """
    values = torch.linalg.svdvals(embeddings.double())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())
