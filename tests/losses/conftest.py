"""Plain formulas to compare the losses with, and batches of features: unrelated pairs and nearly solved ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Gradients:
    loss: float
    features: Tensor
    scale: float


class Plain:
    """The formulas as the peers write them, with autograd doing the rest."""

    @staticmethod
    def info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """open_clip 3.3.0, loss.py, ClipLoss with world_size 1: two matrices of logits."""
        by_image = scale * image @ text.T
        by_text = scale * text @ image.T
        labels = torch.arange(len(image))
        return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2

    @staticmethod
    def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """open_clip 3.3.0, loss.py, SigLipLoss with world_size 1."""
        logits = scale * image @ text.T + bias
        labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        return -F.logsigmoid(labels * logits).sum() / len(image)

    @staticmethod
    def soft(image: Tensor, text: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with probabilities as targets, in both directions."""
        logits = scale * image @ text.T
        by_image = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
        return (by_image + by_text) / 2


@pytest.fixture(scope="session")
def plain() -> Plain:
    return Plain()


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., tuple[Tensor, Tensor]]:
    def make(n: int, dim: int, *, noise: float | None = None, seed: int = 0, dtype: torch.dtype = torch.float32):
        """Unrelated pairs, or texts that are their image plus ``noise`` (nearly solved when small)."""
        random = torch.Generator().manual_seed(seed)
        image = F.normalize(torch.randn(n, dim, generator=random, dtype=torch.float64), dim=1)
        text = torch.randn(n, dim, generator=random, dtype=torch.float64)
        if noise is not None:
            text = image + noise * text / math.sqrt(dim)
        return image.to(dtype), F.normalize(text, dim=1).to(dtype)

    return make


@pytest.fixture(scope="session")
def differentiate() -> Callable[..., Gradients]:
    def run(loss: Loss, image: Tensor, text: Tensor, scale: float) -> Gradients:
        image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
        multiplier = torch.tensor(scale, dtype=image.dtype, requires_grad=True)
        value = loss(image, text, multiplier)
        value.backward()
        assert image.grad is not None
        assert text.grad is not None
        assert multiplier.grad is not None
        return Gradients(value.item(), torch.cat([image.grad, text.grad]).double(), multiplier.grad.item())

    return run
