"""Targets softened by the locked text tower: what they are, and that training on them works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.losses.contrastive import positive_keys
from chiasm.train.contrastive import ContrastiveTask, Pairs, contrastive_loss, softened_targets
from chiasm.train.distributed import Group
from chiasm.train.features import LockedSides
from chiasm.train.recipe import LossConfig, OptimConfig, TrainConfig

SOFT = LossConfig("multi_positive", text_similarity=0.3)


def unit(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), share=st.floats(0.05, 0.9), scale=st.floats(0.5, 60), kinds=st.integers(1, 12))
def test_rows_are_distributions_that_favour_the_right_and_the_alike(
    n: int, share: float, scale: float, kinds: int
) -> None:
    guide = unit(kinds)[torch.arange(n) % kinds]
    keys = positive_keys([k % kinds for k in range(n)])
    config = LossConfig("multi_positive", text_similarity=share, text_similarity_scale=scale)
    targets = softened_targets(guide, keys, config=config)
    assert torch.allclose(targets.sum(1), torch.ones(n), atol=1e-5)
    assert bool((targets >= 0).all())
    assert torch.equal(targets.argmax(1) % kinds, torch.arange(n) % kinds)
    wrong = keys[:, None] != keys[None]
    order_of_targets = targets.masked_fill(~wrong, -1).argsort(dim=1, stable=True)
    order_of_cosines = (guide @ guide.T).masked_fill(~wrong, -2).argsort(dim=1, stable=True)
    gap = (targets.gather(1, order_of_targets) - targets.gather(1, order_of_cosines)).abs()
    assert float(gap.max()) < 1e-5


def test_a_small_share_is_the_plain_loss() -> None:
    features = {
        "image_features": unit(10, seed=1),
        "text_features": unit(10, seed=2),
        "text_guide": unit(10, seed=3),
        "logit_scale": torch.tensor(14.0),
    }
    keys = [str(k % 7) for k in range(10)]
    plain = contrastive_loss(features, keys, config=LossConfig("multi_positive"))
    nearly = contrastive_loss(features, keys, config=LossConfig("multi_positive", text_similarity=1e-7))
    soft = contrastive_loss(features, keys, config=SOFT)
    assert float(nearly) == pytest.approx(float(plain), rel=1e-4)
    assert abs(float(soft) - float(plain)) > 1e-3
    alone = LossConfig("multi_positive", positives="none", text_similarity=1e-7)
    unique = contrastive_loss(features, keys, config=LossConfig("infonce"))
    assert float(contrastive_loss(features, keys, config=alone)) == pytest.approx(float(unique), rel=1e-4)


def test_what_it_needs_is_said() -> None:
    features = {"image_features": unit(4), "text_features": unit(4), "logit_scale": torch.tensor(14.0)}
    with pytest.raises(ConfigError, match=r"text\.freeze"):
        contrastive_loss(features, list("abcd"), config=SOFT)
    with pytest.raises(ConfigError, match=r"loss\.text_similarity.*multi_positive"):
        LossConfig("infonce", text_similarity=0.3)
    with pytest.raises(ConfigError, match=r"loss\.text_similarity"):
        LossConfig("multi_positive", text_similarity=1.0)
    with pytest.raises(ConfigError, match=r"loss\.text_similarity_scale"):
        LossConfig("multi_positive", text_similarity=0.3, text_similarity_scale=0.0)
    assert Group().world == 1


class Cached:
    """Features of a locked text tower in the place of ids."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.lengths = ids, None


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_locked_tower_guides_and_is_not_moved(tiny, colour_pairs, chunk) -> None:
    """The guide reaches the loss through the cache of features, and chunks give the gradient of the whole batch."""
    batch = colour_pairs(16).batch(np.arange(16), np.random.default_rng(0))
    texts = Cached(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_())

    def gradient(chunk: int | None, loss: LossConfig) -> torch.Tensor:
        model = tiny()
        config = TrainConfig(loss=loss, optim=OptimConfig(grad_cache_chunk=chunk))
        called = LockedSides(model, image=False, text=True)
        ContrastiveTask(model, config=config, called=called).backward(Pairs(batch.pixels, texts, batch.keys))
        return model.text_projection.grad.clone()

    soft = gradient(chunk, SOFT)
    assert torch.allclose(soft, gradient(None, SOFT), atol=1e-6)
    assert not torch.allclose(soft, gradient(None, LossConfig("multi_positive")), atol=1e-4)
