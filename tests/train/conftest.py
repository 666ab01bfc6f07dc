"""A dual encoder that trains in milliseconds, and pairs in which image and text agree on a colour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.train.contrastive import Pairs
from chiasm.types import Preprocess


class Ids(NamedTuple):
    ids: Tensor
    lengths: Tensor


class ColourPairs:
    """``n`` images of one of ``kinds`` patterns, each with a text of three tokens that names it."""

    def __init__(self, n: int, kinds: int = 8, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kind = np.arange(n) % kinds
        patterns = np.random.default_rng(99).normal(size=(kinds, 3, 16, 16))
        self.pixels = (patterns[self.kind] + 0.3 * rng.normal(size=(n, 3, 16, 16))).astype(np.float32)

    def __len__(self) -> int:
        return len(self.kind)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> Pairs:
        kind = torch.from_numpy(self.kind[indices])
        noise = rng.normal(size=(len(indices), 3, 16, 16)).astype(np.float32) * 0.05
        ids = torch.stack([torch.full_like(kind, 62), 1 + kind, torch.full_like(kind, 63)], dim=1)
        return Pairs(
            torch.from_numpy(self.pixels[indices] + noise),
            Ids(ids, torch.full_like(kind, 3)),
            [str(int(k)) for k in kind],
        )


def tiny_config(*, dropout: float = 0.0, bias: float | None = None, **image: object) -> EncoderConfig:
    return EncoderConfig(
        image=ImageTowerConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, **image),
        text=TextTowerConfig(context_length=4, vocab_size=64, width=16, layers=1, heads=2),
        projection=ProjectionConfig(dim=8, image="mlp" if dropout else "linear", dropout=dropout),
        logit_bias_init=bias,
        tokenizer={"kind": "clip", "context_length": 4},
        preprocess=Preprocess(size=16),
    )


@pytest.fixture
def tiny() -> type[object]:
    """Factory of tiny models: ``tiny(seed=0, dropout=0.0, bias=None)``."""

    def make(seed: int = 0, **kw: object) -> DualEncoder:
        return build_encoder_model(tiny_config(**kw), seed=seed)

    return make


@pytest.fixture
def colour_pairs() -> type[ColourPairs]:
    return ColourPairs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
