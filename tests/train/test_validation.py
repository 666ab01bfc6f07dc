from __future__ import annotations

import numpy as np
import pytest
import torch

from chiasm.errors import TrainingError
from chiasm.train.contrastive import Pairs
from chiasm.train.recipe import LossConfig, OptimConfig, RunConfig, TrainConfig
from chiasm.train.validation import Validation


class Vectors(torch.nn.Module):
    """A model whose features are given: pixels and ids hold them."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images, ids, lengths=None):
        unit = torch.nn.functional.normalize
        return {
            "image_features": unit(images, dim=-1),
            "text_features": unit(ids, dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class Given:
    def __init__(self, image, text, keys):
        self.image, self.text, self.keys = torch.as_tensor(image).float(), torch.as_tensor(text).float(), keys

    def __len__(self):
        return len(self.keys)

    def batch(self, indices, rng):
        class Text:
            ids = self.text[indices]
            lengths = None

        return Pairs(self.image[indices], Text(), [self.keys[i] for i in indices])


def measure(image, text, keys, **kw):
    config = TrainConfig(
        loss=kw.pop("loss", LossConfig()), optim=OptimConfig(**kw.pop("optim", {})), run=RunConfig(**kw)
    )
    return Validation(Vectors(), Given(image, text, keys), config=config)


def test_perfect_pairs_score_one():
    vectors = np.eye(12)
    found = measure(vectors, vectors, [str(i) for i in range(12)])()
    for name in (
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
        "image_to_text_recall_at_1",
        "text_to_image_recall_at_1",
    ):
        assert found[name] == 1.0
    assert found["median_rank"] == 1.0
    assert "text_choice_accuracy" not in found, "twelve texts of twelve images are no classes"
    assert found["loss"] == pytest.approx(np.log(1 + 11 * np.exp(-np.exp(2.0))), rel=1e-4)


def test_unrelated_pairs_score_chance():
    rng = np.random.default_rng(0)
    found = measure(rng.normal(size=(400, 64)), rng.normal(size=(400, 64)), [str(i) for i in range(400)])()
    assert found["recall_at_10"] == pytest.approx(10 / 400, abs=0.03)
    assert found["median_rank"] == pytest.approx(200, rel=0.2)


def test_equal_keys_are_right_answers():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16))
    kind = np.arange(30) % 3
    image, text = centres[kind] + 0.05 * rng.normal(size=(30, 16)), centres[kind] + 0.05 * rng.normal(size=(30, 16))
    by_kind = measure(image, text, [str(k) for k in kind])()
    by_row = measure(image, text, [str(i) for i in range(30)])()
    assert by_kind["recall_at_1"] == 1.0
    assert by_row["recall_at_1"] < 0.6
    assert by_kind["text_choice_accuracy"] == 1.0
    wrong = measure(image, centres[(kind + 1) % 3], [str(k) for k in kind])()
    assert wrong["text_choice_accuracy"] == 0.0


def test_batches_and_rows_do_not_change_retrieval():
    rng = np.random.default_rng(1)
    image = rng.normal(size=(25, 8))
    text = image + rng.normal(size=(25, 8))
    keys = [str(i) for i in range(25)]
    one, many = measure(image, text, keys)(), measure(image, text, keys, optim={"batch_size": 7})()
    assert one["recall_at_5"] == many["recall_at_5"]
    assert one["loss"] != many["loss"]
    order = rng.permutation(25)
    shuffled = measure(image[order], text[order], [keys[i] for i in order])()
    assert shuffled["recall_at_5"] == one["recall_at_5"]


def test_the_limit_takes_an_even_sample_without_repeats():
    check = measure(np.eye(50), np.eye(50), [str(i) for i in range(50)], validation_limit=20)
    assert len(set(check.rows.tolist())) == 20
    assert {int(check.rows.min()), int(check.rows.max())} == {0, 49}
    assert check()["recall_at_1"] == 1.0


@pytest.mark.parametrize("kind", ["infonce", "multi_positive"])
def test_bf16_and_a_last_batch_of_one(kind):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 8))
    found = measure(
        vectors, vectors, list("abcdefghi"), loss=LossConfig(kind), optim={"batch_size": 4, "precision": "bf16"}
    )()
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("side", ["image", "text"])
def test_broken_weights_end_in_a_clear_error(side):
    vectors = {"image": np.eye(6), "text": np.eye(6)}
    vectors[side][2, 3] = np.nan
    with pytest.raises(TrainingError, match="1 of 6 held-out pairs have embeddings that are not numbers") as caught:
        measure(vectors["image"], vectors["text"], [str(i) for i in range(6)])()
    assert "hint: lower `optim.lr`" in str(caught.value)
