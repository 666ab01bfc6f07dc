"""What a step minimises: each image with its own label and its own text, whichever images a batch has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chiasm.distill.recipe import FuseConfig, StageConfig, SyntheticConfig
from chiasm.distill.student import Student, TextProbe, identity_tower, make_heads
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import make_targets
from chiasm.distill.tasks import DistillTask, ImageTask, Judge, TextTask
from chiasm.encoders.base import LoraConfig
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


def test_the_text_head_learns_each_text_with_the_label_of_its_image(drawn):
    problem, pairs = drawn
    mask, held_out_mask = np.arange(20) % 3 > 0, np.arange(10) > 4
    targets = make_targets(pairs.train, pairs.validation, mask, held_out_mask)
    probe = TextProbe(HeadsConfig(width=1, classes=4, text_dim=5), 0)
    task = TextTask(probe, problem, targets, StageConfig())
    assert len(task) == mask.sum()
    rows = np.array([5, 0, 9])
    loss = task.losses(rows, step=0, rng=np.random.default_rng(0))["loss"]
    chosen = np.flatnonzero(mask)[rows]
    wanted = F.cross_entropy(probe(torch.tensor(pairs.train[chosen])), torch.tensor(problem.train.labels[chosen]))
    torch.testing.assert_close(loss, wanted)
    logits = probe(torch.tensor(pairs.validation[held_out_mask])).detach()
    held_out = F.cross_entropy(logits, torch.tensor(problem.validation.labels[held_out_mask]))
    assert task.validate(step=0)["val_ce"] == pytest.approx(float(held_out))


def test_in_the_warm_up_adapters_rest_too(drawn):
    problem, pairs = drawn
    heads = make_heads(HeadsConfig(width=8, classes=4, text_dim=5), 0)
    adapted = Student.adapted(heads, identity_tower(8), lora=LoraConfig(rank=2), seed=0)
    task = DistillTask(adapted, problem, pairs, FuseConfig(), steps=3, pixels=False)
    names = [n for n, p in task.model.named_parameters() if p.requires_grad]
    assert any("lora_" in n for n in names)
    assert {n for n in names if task.trains(n, warmup=True)} == {"heads.distill.weight", "heads.distill.bias"}
    assert all(task.trains(n, warmup=False) for n in names)


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
