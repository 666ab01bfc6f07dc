"""What a step minimises: each image with its own label and its own text, whichever images a batch has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chiasm.distill.recipe import FuseConfig, StageConfig, SyntheticConfig
from chiasm.distill.student import Student, make_heads
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import make_targets
from chiasm.distill.tasks import DistillTask, ImageTask, Judge
from chiasm.encoders.heads import HeadsConfig
from chiasm.losses.distillation import balanced_weights

SMALL = SyntheticConfig(train=20, test=4, reports=20, width=8, text_dim=5)
ROWS = np.array([13, 2, 7, 19, 4])


@pytest.fixture(scope="module")
def drawn():
    problem, sources = make_synthetic(SMALL, seed=0)
    return problem, sources.given["pairs"]


def student():
    return Student(make_heads(HeadsConfig(width=8, classes=4, text_dim=5), 0))


@pytest.mark.parametrize("rows", [ROWS, np.arange(20)], ids=["some", "all"])
@pytest.mark.parametrize("every", [True, False], ids=["every image has a text", "some have none"])
def test_each_image_is_taught_by_its_own_label_and_text(drawn, rows, every):
    problem, pairs = drawn
    mask = np.ones(20, bool)
    mask[[2, 19, 0]] = every
    targets = make_targets(pairs.train, pairs.validation, mask, pairs.validation_mask)
    task = DistillTask(student(), problem, targets, FuseConfig(kd_weight=3.0), steps=9, pixels=False)
    found = task.losses(rows, step=0, rng=np.random.default_rng(0))
    out = task.student(torch.tensor(problem.train.features[rows], dtype=torch.float32))
    ce = F.cross_entropy(out.logits, torch.tensor(problem.train.labels[rows]))
    has = torch.tensor(mask[rows])
    kd = 1 - F.cosine_similarity(out.text[has], torch.tensor(pairs.train[rows])[has])
    torch.testing.assert_close(found["ce"], ce)
    torch.testing.assert_close(found["kd"], kd.mean())
    torch.testing.assert_close(found["loss"], ce + 3 * kd.mean())
    other = ImageTask(student(), problem, StageConfig(), pixels=False).losses(
        rows, step=0, rng=np.random.default_rng(0)
    )
    torch.testing.assert_close(other["loss"], ce)


def test_the_weight_of_the_text_follows_its_schedule(drawn):
    problem, pairs = drawn
    task = DistillTask(student(), problem, pairs, FuseConfig(kd_weight=4.0, kd_schedule="rise"), steps=5, pixels=False)
    for step, weight in enumerate((0.0, 1.0, 2.0, 3.0, 4.0)):
        found = task.losses(ROWS, step=step, rng=np.random.default_rng(0))
        torch.testing.assert_close(found["loss"].detach(), found["ce"] + weight * found["kd"])


def test_changing_held_out_rows_changes_no_loss_of_training(drawn):
    problem, pairs = drawn
    config = FuseConfig(class_weights=True)
    other = replace(
        problem.validation, features=-problem.validation.features, labels=problem.validation.labels[::-1].copy()
    )
    swapped = make_targets(pairs.train, pairs.validation[::-1].copy(), pairs.train_mask, pairs.validation_mask)
    one = DistillTask(student(), problem, pairs, config, steps=3, pixels=False)
    two = DistillTask(student(), replace(problem, validation=other), swapped, config, steps=3, pixels=False)
    losses = [t.losses(ROWS, step=0, rng=np.random.default_rng(0))["loss"] for t in (one, two)]
    assert torch.equal(*losses)
    assert one.validate(step=0) != two.validate(step=0)


def test_classes_are_weighed_by_how_often_they_are_trained_on():
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])
    judge = Judge(StageConfig(class_weights=True), train, held_out, classes=2)
    assert judge.weights is not None
    torch.testing.assert_close(judge.weights, balanced_weights(torch.tensor(train), 2))
    assert judge.weights[1] == 3 * judge.weights[0]
