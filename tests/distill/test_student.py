"""The student's tower: locked, adapted or trained; and its low-rank updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from chiasm.distill.arms import ARMS
from chiasm.distill.recipe import (
    BackboneConfig,
    DistillData,
    DistillRecipe,
    FuseConfig,
    HeadOptions,
    StageConfig,
    SyntheticConfig,
)
from chiasm.distill.stages import Surroundings, class_probabilities, run_arm, run_fuse, run_unimodal, trained_tower
from chiasm.distill.student import Inputs, Student, absorb_norm, identity_tower, make_heads, merged, run_student
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import TextSources, targets_of
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig
from chiasm.encoders.heads import HeadsConfig
from chiasm.encoders.image_side import build_backbone
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.types import Preprocess

SMALL = SyntheticConfig(train=24, test=9, reports=20, width=16, text_dim=6)
STAGE = {"steps": 4, "batch_size": 8, "lr": 1e-2, "eval_every": 2}
LORA = LoraConfig(rank=3, alpha=6.0)
SIDE = 16


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16),
    )  # fmt: skip


def transformer():
    image = ImageTowerConfig(kind="vit", image_size=SIDE, patch_size=8, width=16, layers=2, heads=2)
    config = EncoderConfig(image=image, preprocess=Preprocess(size=SIDE), sides="image")
    return build_backbone(config, projected=False, seed=0)


TOWERS = {"identity": lambda: identity_tower(16), "convolutions": convolutions, "transformer": transformer}


def pixels_of(seed):
    """Images of 24 rows; a generator shifts them, as augmentation would."""
    images = torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))

    def take(rows, rng):
        shift = 0.0 if rng is None else float(rng.standard_normal()) * 0.1
        return images[torch.from_numpy(rows)] + shift

    return take


@pytest.fixture(scope="module")
def drawn():
    problem, sources = make_synthetic(SMALL, seed=0)
    sides = {
        name: replace(getattr(problem, name), pixels=pixels_of(i))
        for i, name in enumerate(("train", "validation", "test"))
    }
    return replace(problem, **sides), sources.given["pairs"]


def make_recipe(*, lora=None, unimodal="frozen", heads=None, **fuse):
    return DistillRecipe(
        name="small", data=DistillData(synthetic=SMALL), unimodal=StageConfig(**STAGE), text=StageConfig(**STAGE),
        fuse=FuseConfig(**(STAGE | {"monitor": "none"} | fuse)), heads=HeadOptions(**(heads or {})),
        backbone=BackboneConfig(lora=lora, unimodal=unimodal),
    )  # fmt: skip


def heads_for(seed=0):
    return make_heads(HeadsConfig(width=16, classes=4, text_dim=6, standardize=False), seed)


def inputs_for(name):
    generator = torch.Generator().manual_seed(5)
    shape = (5, 16) if name == "identity" else (5, 3, SIDE, SIDE)
    return torch.randn(shape, generator=generator)


def start_adapters(student):
    with torch.no_grad():
        for name, parameter in student.tower.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return student


@pytest.mark.parametrize("name", TOWERS)
def test_fresh_adapters_change_nothing(name):
    tower = TOWERS[name]().eval()
    inputs = inputs_for(name)
    with torch.no_grad():
        plain = tower(inputs)
        student = Student.adapted(heads_for(), tower, lora=LORA, seed=0).eval()
        torch.testing.assert_close(student.features(inputs), plain, rtol=0, atol=1e-6)
    again = Student.adapted(heads_for(), tower, lora=LORA, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", TOWERS)
def test_adapters_and_heads_alone_train_and_all_of_them_learn(name):
    student = start_adapters(Student.adapted(heads_for(), TOWERS[name](), lora=LORA, seed=0)).train()
    out = student(inputs_for(name))
    (nn.functional.cross_entropy(out.logits, torch.arange(5) % 4) + out.text.square().mean()).backward()
    for parameter_name, parameter in student.named_parameters():
        trains = parameter_name.startswith("heads.") or "lora_" in parameter_name
        assert parameter.requires_grad == trains, parameter_name
        if trains:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", TOWERS)
def test_merged_answers_alike_and_has_the_plain_names(name):
    tower = TOWERS[name]()
    student = start_adapters(Student.adapted(heads_for(), tower, lora=LORA, seed=0)).eval()
    inputs = inputs_for(name)
    with torch.no_grad():
        before = student(inputs).logits
        after = merged(student)(inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert student.tower.state_dict().keys() == tower.state_dict().keys()


@pytest.mark.parametrize("rank", [1, 3])
def test_updates_have_at_most_their_rank_and_their_scale(rank):
    tower = identity_tower(16)
    config = LoraConfig(rank=rank, alpha=6.0)
    student = start_adapters(Student.adapted(heads_for(), tower, lora=config, seed=0))
    weights = dict(student.tower.named_parameters())
    wanted = 6.0 / rank * weights["0.lora_B.default.weight"] @ weights["0.lora_A.default.weight"]
    update = merged(student).tower[0].weight - torch.eye(16)
    assert int(torch.linalg.matrix_rank(update.double(), atol=1e-4)) == rank
    torch.testing.assert_close(update, wanted, rtol=1e-4, atol=1e-5)


def test_a_locked_tower_stands_still_while_adapters_drop(drawn):
    """Dropout and batch statistics of the tower are off in training; dropout of the adapters is on."""
    tower = convolutions()
    student = start_adapters(Student.adapted(heads_for(), tower, lora=replace(LORA, dropout=0.5), seed=0)).train()
    modes = {name: module.training for name, module in student.tower.named_modules() if not list(module.children())}
    assert any(modes.values())
    assert all("lora_dropout" in name for name, training in modes.items() if training)
    plain = Student.adapted(heads_for(), tower, lora=None, seed=0).train()
    images = inputs_for("convolutions")
    torch.testing.assert_close(plain.features(images), plain.eval().features(images))
    assert torch.equal(plain.tower[1].running_mean, tower[1].running_mean)


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_the_tower_that_was_given_is_bit_identical_after_training(drawn, name, lora):
    problem, pairs = drawn
    tower = TOWERS[name]()
    before = {n: t.clone() for n, t in tower.state_dict().items()}
    modes = [m.training for m in tower.modules()]
    found = run_arm(problem, pairs, "clip_it", make_recipe(lora=lora), seed=0, tower=tower).final
    assert all(torch.equal(before[n], t) for n, t in tower.state_dict().items())
    assert modes == [m.training for m in tower.modules()]
    assert all(p.requires_grad for p in tower.parameters())
    in_tower = {n for n in found.state if n.startswith("tower.")}
    assert all("lora_" in n for n in in_tower)
    assert bool(in_tower) == (lora is not None)
    base = found.student(tower if lora else None)
    if lora:
        weights = {n.replace("base_layer.", ""): t for n, t in base.tower.state_dict().items() if "lora_" not in n}
        assert all(torch.equal(before[n], t) for n, t in weights.items() if n in before)


def test_adapters_see_augmented_pixels_and_validation_does_not(drawn):
    problem, _ = drawn
    seen = []

    def spy(rows, rng):
        seen.append(rng is not None)
        return pixels_of(0)(rows, rng)

    watched = replace(problem, train=replace(problem.train, pixels=spy))
    recipe = make_recipe(lora=LORA)
    first = run_unimodal(watched, recipe, seed=0)
    assert seen == []  # the locked stage looks at features
    run_fuse(watched, None, ARMS["lambda0"], recipe, seed=0, unimodal=first, text_dim=6, tower=transformer())
    assert seen == [True] * 4


def test_all_arms_see_the_same_images_in_the_same_order_augmented_alike(drawn):
    """Otherwise a difference between two arms would have two causes; and no step draws what another one drew."""
    problem, pairs = drawn
    seen = []

    def spy(rows, rng):
        if rng is not None:
            seen.append((tuple(rows.tolist()), float(rng.random())))
        return pixels_of(0)(rows, None)

    watched = replace(problem, train=replace(problem.train, pixels=spy))
    recipe = make_recipe(lora=LORA, steps=5)
    first = run_unimodal(watched, recipe, seed=0)
    orders = {}
    for name in ("unimodal_lora", "lambda0", "clip_it", "shuffled"):
        seen.clear()
        targets = targets_of(ARMS[name].targets, TextSources({"pairs": pairs}), seed=0)
        run_arm(watched, targets, name, recipe, seed=0, unimodal=first, text_dim=6, tower=transformer())
        orders[name] = list(seen)
    assert len(orders["clip_it"]) == 5
    assert all(order == orders["clip_it"] for order in orders.values())
    assert len({draw for _, draw in orders["clip_it"]}) == 5
    assert len({rows for rows, _ in orders["clip_it"]}) == 5


def test_other_adapters_and_other_towers_have_files_of_their_own(drawn, tmp_path):
    problem, pairs = drawn
    around = Surroundings(cache=tmp_path)
    other = transformer()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    cases = [(None, transformer()), (LORA, transformer()), (replace(LORA, alpha=7.0), transformer()), (LORA, other)]
    keys = [
        run_arm(problem, pairs, "clip_it", make_recipe(lora=x, steps=1), seed=0, tower=t, around=around).final.key
        for x, t in cases
    ]
    assert len(set(keys)) == len(cases)


def test_unimodal_with_adapters_takes_as_many_steps_as_the_fuse_stage(drawn):
    problem, _ = drawn
    found = run_arm(problem, None, "unimodal_lora", make_recipe(steps=7), seed=0, tower=transformer()).final
    assert (found.steps, found.trained, found.heads.fused) == (7, "lora", False)
    features_only = replace(
        problem, **{n: replace(getattr(problem, n), pixels=None) for n in ("train", "validation", "test")}
    )
    found = run_arm(features_only, None, "unimodal_lora", make_recipe(steps=7), seed=0).final
    assert {n for n in found.state if n.startswith("tower.")} == {
        "tower.0.lora_A.default.weight",
        "tower.0.lora_B.default.weight",
    }
    assert class_probabilities(found, features_only.test).shape == (9, 4)


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
@pytest.mark.parametrize("standardize", [True, False])
def test_a_tower_trained_in_full_goes_on_into_the_fuse_stage(drawn, name, standardize):
    problem, pairs = drawn
    blind = replace(
        problem, **{n: replace(getattr(problem, n), features=None) for n in ("train", "validation", "test")}
    )
    tower = TOWERS[name]()
    recipe = make_recipe(lora=LORA, unimodal="full", heads={"standardize": standardize})
    found = run_arm(blind, pairs, "clip_it", recipe, seed=0, tower=tower)
    assert found.unimodal.trained == "full"
    changed = trained_tower(found.unimodal, tower)
    assert any(not torch.equal(a, b) for a, b in zip(changed.parameters(), tower.parameters(), strict=True))
    assert not any(p.requires_grad for p in changed.parameters())
    first = class_probabilities(found.unimodal, problem.test, tower=tower)
    # What later runs see: cached features of the trained tower, and the heads alone on them.
    heads = found.unimodal.student(tower).heads
    with torch.no_grad():
        features = changed(problem.test.pixels(np.arange(9), None))
        torch.testing.assert_close(
            torch.tensor(first), heads(features).logits.double().softmax(1), rtol=1e-4, atol=1e-6
        )
    assert class_probabilities(found.final, problem.test, tower=changed).shape == (9, 4)


def test_norm_is_taken_over_without_changing_the_answers(drawn):
    problem, _ = drawn
    for vision in ("linear", "mlp"):
        config = HeadsConfig(width=16, classes=4, vision=vision, hidden=5, fused=False)
        student = Student(make_heads(config, 0))
        inputs = Inputs(problem.train, pixels=False)
        before = run_student(student, inputs).logits
        absorb_norm(student, inputs)
        after = run_student(student, inputs).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        found = student.heads.norm(inputs.take(None))
        torch.testing.assert_close(found.mean(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_answers_do_not_depend_on_the_batch(drawn):
    problem, pairs = drawn
    found = run_arm(problem, pairs, "clip_it", make_recipe(), seed=0).final
    whole = class_probabilities(found, problem.test)
    np.testing.assert_allclose(class_probabilities(found, problem.test, batch_size=2), whole, rtol=1e-5)
    np.testing.assert_allclose(whole.sum(1), 1)


def test_what_a_tower_needs_is_said(drawn):
    problem, pairs = drawn
    with pytest.raises(ConfigError, match="no tower to train"):
        run_unimodal(problem, make_recipe(unimodal="full"), seed=0)
    with pytest.raises(ConfigError, match="adapters need the tower"):
        run_arm(problem, pairs, "clip_it", make_recipe(lora=LORA), seed=0)
    wrong = make_recipe(lora=replace(LORA, targets=("nowhere",)))
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        run_arm(problem, pairs, "clip_it", wrong, seed=0, tower=transformer())
    found = run_arm(problem, pairs, "clip_it", make_recipe(lora=LORA), seed=0, tower=transformer()).final
    with pytest.raises(InputError, match="give the tower"):
        found.student()
    with pytest.raises(CheckpointError, match="do not fit"):
        found.student(convolutions())
    with pytest.raises(ConfigError, match="hidden layer"):
        run_unimodal(problem, make_recipe(heads={"vision": "mlp"}), seed=0)
    assert run_unimodal(problem, make_recipe(heads={"vision": "mlp"}), seed=0, text_dim=6).heads.hidden == 6
