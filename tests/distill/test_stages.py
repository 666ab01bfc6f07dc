"""The three stages: what they train, select, keep and find again."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from chiasm.distill.arms import ARMS
from chiasm.distill.problem import Problem, Rows
from chiasm.distill.recipe import DistillData, DistillRecipe, FuseConfig, HeadOptions, StageConfig, SyntheticConfig
from chiasm.distill.schedule import Plan
from chiasm.distill.stages import (
    Surroundings,
    class_probabilities,
    run_arm,
    run_fuse,
    run_text,
    run_unimodal,
)
from chiasm.distill.student import Student, make_heads
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import make_targets, targets_of
from chiasm.distill.tasks import DistillTask
from chiasm.distill.trainer import StageTrainer
from chiasm.encoders.heads import HeadsConfig
from chiasm.errors import ConfigError, InputError, TrainingError
from chiasm.metrics.classification import MissingClassWarning

SMALL = SyntheticConfig(train=40, test=30, reports=30, width=10, text_dim=6)
STAGE = {"steps": 12, "batch_size": "full", "lr": 1e-2, "schedule": "constant", "eval_every": 3}


def make_recipe(*, heads=None, unimodal=None, text=None, data=None, **fuse):
    return DistillRecipe(
        name="small", data=DistillData(synthetic=data or SMALL), heads=HeadOptions(**(heads or {})),
        unimodal=StageConfig(**(STAGE | (unimodal or {}))), text=StageConfig(**(STAGE | (text or {}))),
        fuse=FuseConfig(**(STAGE | {"kd_weight": 2.0} | fuse)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    return make_synthetic(SMALL, seed=0)


@pytest.fixture
def problem(drawn):
    return drawn[0]


@pytest.fixture
def pairs(drawn):
    return drawn[1].given["pairs"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_same_seed_same_bits_other_seed_other_weights(problem, pairs):
    runs = [run_arm(problem, pairs, "clip_it", make_recipe(batch_size=7), seed=s).final for s in (0, 0, 1)]
    assert equal(runs[0].state, runs[1].state)
    assert runs[0].curve == runs[1].curve
    assert not equal(runs[0].state, runs[2].state)


@pytest.mark.parametrize("warm", [True, False])
def test_arms_that_differ_in_their_text_alone_have_files_of_their_own(drawn, tmp_path, warm):
    problem, sources = drawn
    recipe, around = make_recipe(steps=1, warm_start_text=warm), Surroundings(cache=tmp_path)
    arms = ("lambda0", "clip_it", "shuffled", "random_text", "prompt_text", "paired")
    keys = {
        run_arm(
            problem, targets_of(ARMS[n].targets, sources, seed=0), n, recipe, seed=0, text_dim=6, around=around
        ).final.key
        for n in arms
    }
    assert len(keys) == len(arms)


def test_features_are_standardised_by_training_images_alone(problem):
    state = run_unimodal(problem, make_recipe(), seed=0).state
    features = torch.tensor(problem.train.features, dtype=torch.float64)
    torch.testing.assert_close(state["heads.norm.mean"], features.mean(0).float())
    torch.testing.assert_close(state["heads.norm.scale"], 1 / features.std(0, unbiased=False).float())


def test_what_was_drawn_before_does_not_matter_and_is_left_alone(problem):
    torch.manual_seed(1)
    first = run_unimodal(problem, make_recipe(), seed=0)
    torch.manual_seed(2)
    wanted = torch.rand(3)
    torch.manual_seed(2)
    assert not torch.are_deterministic_algorithms_enabled()
    second = run_unimodal(problem, make_recipe(), seed=0)
    assert equal(first.state, second.state)
    torch.testing.assert_close(torch.rand(3), wanted)
    assert not torch.are_deterministic_algorithms_enabled()


def test_finished_stages_are_found_and_arms_share_the_first(problem, drawn, tmp_path):
    around = Surroundings(cache=tmp_path)
    for arm in ("clip_it", "lambda0", "shuffled"):
        targets = targets_of(ARMS[arm].targets, drawn[1], seed=0)
        first = run_arm(problem, targets, arm, make_recipe(), seed=0, text_dim=6, around=around)
        again = run_arm(problem, targets, arm, make_recipe(), seed=0, text_dim=6, around=around)
        assert again.final.reused
        assert equal(first.final.state, again.final.state)
        assert (first.final.curve, first.final.best_step) == (again.final.curve, again.final.best_step)
        assert (first.final.heads, first.final.metrics) == (again.final.heads, again.final.metrics)
    names = sorted(p.name.split("-")[0] for p in tmp_path.iterdir())
    assert names == ["fuse"] * 3 + ["text"] * 2 + ["unimodal"]


def test_what_decides_the_weights_decides_the_name(problem, pairs, drawn):
    def key(recipe=None, seed=0, on=problem, targets=pairs, arm="clip_it"):
        return run_arm(on, targets, arm, recipe or make_recipe(), seed=seed).final.key

    plain = key()
    others = [
        key(seed=1),
        key(on=replace(problem, digest="other")),
        key(targets=targets_of("shuffled", drawn[1], seed=0)),
        key(arm="no_warm_start"),
        *(key(make_recipe(**{n: v})) for n, v in (("kd_weight", 1.0), ("lr", 1e-3), ("lock_vision_head", True))),
        key(make_recipe(heads={"text_length": 2.0})),
        key(make_recipe(unimodal={"steps": 5})),
        key(make_recipe(text={"steps": 5})),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert key(make_recipe(checkpoint_every=3)) == plain


def test_weight_of_the_text_means_nothing_where_there_is_none(problem):
    first = run_unimodal(problem, make_recipe(), seed=0)
    keys = {
        run_fuse(problem, None, ARMS["lambda0"], make_recipe(kd_weight=w), seed=0, unimodal=first, text_dim=6).key
        for w in (1.0, 9.0)
    }
    assert len(keys) == 1


def test_the_best_validation_is_kept():
    problem, sources = make_synthetic(replace(SMALL, flip=0.1), seed=0)
    pairs = sources.given["pairs"]
    recipe = make_recipe(steps=60, eval_every=5, lr=1e-2, fusion_start="random")
    found = run_arm(problem, pairs, "no_warm_start", recipe, seed=0).final
    by_step = {r["step"]: r["val_ce"] for r in found.curve}
    assert found.best_step == min(by_step, key=by_step.get)
    assert 0 < found.best_step < 60
    assert found.metrics["val_ce"] == min(by_step.values())
    shorter = replace(recipe, fuse=replace(recipe.fuse, steps=found.best_step, monitor="none"))
    assert equal(found.state, run_arm(problem, pairs, "no_warm_start", shorter, seed=0).final.state)


@pytest.mark.parametrize(("monitor", "sign"), [("val_ce", 1), ("val_loss", 1), ("val_balanced_accuracy", -1)])
def test_monitor_and_its_direction_count(problem, pairs, monitor, sign):
    found = run_arm(problem, pairs, "clip_it", make_recipe(steps=40, monitor=monitor, lr=5e-2), seed=0).final
    values = [sign * r[monitor] for r in found.curve]
    assert found.metrics[monitor] == sign * min(values)
    assert found.best_step == found.curve[int(np.argmin(values))]["step"]


def test_patience_and_least_gain_stop(problem, pairs):
    options = {"steps": 60, "eval_every": 1, "lr": 3e-2}
    long = run_arm(problem, pairs, "clip_it", make_recipe(**options), seed=0).final
    short = run_arm(problem, pairs, "clip_it", make_recipe(**options, patience=4), seed=0).final
    assert short.stopped_early
    assert not long.stopped_early
    assert short.steps < 60
    greedy = run_arm(problem, pairs, "clip_it", make_recipe(**options, patience=4, min_delta=10.0), seed=0).final
    assert greedy.steps == 4  # the first value counts, four others do not
    assert greedy.metrics["val_ce"] == min(r["val_ce"] for r in greedy.curve)


def test_loss_on_held_out_images_has_the_text_in_it_cross_entropy_has_not(problem, pairs):
    recipe = make_recipe(steps=10, eval_every=2, kd_weight=4.0, kd_schedule="rise")
    for record in run_arm(problem, pairs, "clip_it", recipe, seed=0).final.curve:
        weight = 4.0 * max(record["step"] - 1, 0) / 9
        assert record["val_loss"] == pytest.approx(record["val_ce"] + weight * record["val_kd"], abs=1e-6)
        if record["step"]:
            assert record["train_kd_weight"] == pytest.approx(weight)


def make_task(problem, pairs, seed=0, **options):
    config = FuseConfig(**(STAGE | options))
    heads = HeadsConfig(width=10, classes=4, text_dim=6)
    return DistillTask(Student(make_heads(heads, seed)), problem, pairs, config, steps=12, pixels=False), config


def test_in_the_warm_up_h_d_alone_learns(problem, pairs):
    task, config = make_task(problem, pairs)
    before = task.state()
    plan = Plan(rows=40, batch_size=40, per_epoch=1, steps=0, warmup=30, eval_every=1)
    after = StageTrainer(task, config, plan, seed=0).run().state
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"heads.distill.weight", "heads.distill.bias"}


def test_warm_up_brings_the_prediction_nearer(problem, pairs):
    cold, warm = (
        run_arm(problem, pairs, "clip_it", make_recipe(kd_warmup_steps=w), seed=0).final.curve[0] for w in (0, 60)
    )
    assert cold["step"] == warm["step"] == 0
    assert warm["val_kd"] < 0.7 * cold["val_kd"]


@pytest.mark.parametrize("locked", [True, False])
def test_a_locked_vision_head_stays(problem, pairs, locked):
    found = run_arm(problem, pairs, "clip_it", make_recipe(lock_vision_head=locked, monitor="none"), seed=0)
    same = [torch.equal(found.final.state[n], found.unimodal.state[n]) for n in found.unimodal.state if "vision" in n]
    assert same == [locked] * len(same)
    assert torch.equal(found.final.state["heads.norm.mean"], found.unimodal.state["heads.norm.mean"])


def test_every_arm_starts_from_the_unimodal_classifier(problem, drawn, pairs):
    recipe = make_recipe()
    first = run_unimodal(problem, recipe, seed=0)
    lambda0 = run_fuse(problem, None, ARMS["lambda0"], recipe, seed=0, unimodal=first, text_dim=6)
    assert lambda0.curve[0]["val_ce"] == pytest.approx(first.metrics["val_ce"], abs=1e-6)
    adapted = run_fuse(problem, None, ARMS["unimodal_lora"], recipe, seed=0, unimodal=first)
    assert adapted.curve[0]["val_ce"] == pytest.approx(first.metrics["val_ce"], abs=1e-6)
    random = run_fuse(
        problem, None, ARMS["lambda0"], make_recipe(fusion_start="random"), seed=0, unimodal=first, text_dim=6
    )
    assert random.curve[0]["val_ce"] != pytest.approx(first.metrics["val_ce"], abs=1e-3)


def test_h_t_starts_from_the_text_stage_where_it_may(problem, pairs):
    still = make_recipe(lr=1e-12, monitor="none")
    found = run_arm(problem, pairs, "clip_it", still, seed=0)
    torch.testing.assert_close(found.final.state["heads.text.0.weight"], found.text.state["heads.text.0.weight"])
    cold = run_arm(problem, pairs, "no_warm_start", still, seed=0)
    assert cold.text is None
    assert not torch.allclose(cold.final.state["heads.text.0.weight"], found.text.state["heads.text.0.weight"])


def test_a_detached_h_d_learns_from_text_alone(problem, pairs):
    recipe = make_recipe(heads={"detach_text": True}, weight_decay=0.0, kd_weight=0.0, monitor="none")
    found = run_arm(problem, pairs, "clip_it", recipe, seed=0).final
    drawn_first = make_heads(found.heads, 0).state_dict()
    torch.testing.assert_close(found.state["heads.distill.weight"], drawn_first["distill.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("kd", ["cosine", "mse", "relational", "logit"])
def test_text_never_teaches_vision_head_text_head_or_fusion(problem, pairs, kd):
    task, _ = make_task(problem, pairs, kd=kd)
    rows, rng = np.arange(40), np.random.default_rng(0)
    task.losses(rows, step=-1, rng=rng)["loss"].backward()
    taught = {n for n, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert taught == {"heads.distill.weight", "heads.distill.bias"}


def test_without_weight_the_gradient_is_that_of_the_heads_alone(problem, pairs):
    task, _ = make_task(problem, pairs, kd_weight=0.0)
    rows, rng = np.arange(40), np.random.default_rng(0)
    names, weights = zip(*task.model.named_parameters(), strict=True)
    with_text = torch.autograd.grad(task.losses(rows, step=3, rng=rng)["loss"], weights)
    logits = task.student(torch.tensor(problem.train.features)).logits
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor(problem.train.labels)), weights)
    for name, one, other in zip(names, with_text, plain, strict=True):
        assert torch.equal(one, other), name


def test_every_weight_of_the_heads_learns(problem, pairs):
    task, _ = make_task(problem, pairs)
    task.losses(np.arange(5), step=0, rng=np.random.default_rng(0))["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_images_without_text_learn_from_their_label_alone(problem, pairs):
    """Whatever stands in a row without a text changes nothing, not even the name."""
    mask = np.arange(40) % 2 == 0
    junk = np.where(mask[:, None], pairs.train, 7.0)
    one = make_targets(pairs.train, pairs.validation, mask)
    other = make_targets(junk, pairs.validation, mask)
    assert one.digest == other.digest
    task, _ = make_task(problem, one)
    task.losses(np.flatnonzero(~mask)[:3], step=-1, rng=np.random.default_rng(0))["loss"].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in task.model.parameters())


def test_batches_of_one_and_a_last_batch_of_one_work(problem, pairs):
    for size in (1, 39):
        found = run_arm(problem, pairs, "clip_it", make_recipe(batch_size=size, unimodal={"batch_size": size}), seed=0)
        assert math.isfinite(found.final.metrics["val_ce"])


def test_eight_images_are_learnt_by_heart(problem, pairs):
    few = problem.train
    eight = replace(problem, train=Rows(few.ids[:8], few.groups[:8], few.labels[:8], few.features[:8]), digest="eight")
    targets = make_targets(pairs.train[:8], pairs.validation)
    long = {"steps": 300, "lr": 3e-2, "monitor": "none"}
    found = run_arm(eight, targets, "clip_it", make_recipe(**long, unimodal=long), seed=0)
    for stage in (found.unimodal, found.final):
        assert (class_probabilities(stage, eight.train).argmax(1) == eight.train.labels).all()


def test_class_weights_raise_the_recall_of_a_rare_class():
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.1).astype(np.int64)
    features = (rng.standard_normal((300, 4)) + 0.8 * labels[:, None]).astype(np.float32)

    def rows(name, part):
        ids = tuple(f"{name}{i}" for i in range(len(labels[part])))
        return Rows(ids, ids, labels[part], features[part])

    problem = Problem(
        ("a", "b"), rows("t", slice(200)), rows("v", slice(200, 250)), rows("e", slice(250, 300)), "weights"
    )
    recalls = []
    for weighted in (False, True):
        stage = {"steps": 200, "class_weights": weighted, "monitor": "none"}
        found = run_unimodal(problem, make_recipe(unimodal=stage), seed=0)
        answers = class_probabilities(found, problem.train).argmax(1)
        recalls.append((answers == 1)[problem.train.labels == 1].mean())
    assert recalls[1] > recalls[0] + 0.2


def without_class(problem, missing):
    keep = np.flatnonzero(problem.validation.labels != missing)
    held_out = problem.validation
    chosen = Rows(
        tuple(held_out.ids[i] for i in keep), tuple(held_out.groups[i] for i in keep), held_out.labels[keep],
        held_out.features[keep],
    )  # fmt: skip
    return replace(problem, validation=chosen, digest="missing"), keep


def test_a_class_absent_from_validation_gives_nan_and_one_warning(problem):
    lacking, _ = without_class(problem, 2)
    with pytest.warns(MissingClassWarning) as caught:
        found = run_unimodal(lacking, make_recipe(), seed=0)
    assert len(caught) == 1
    assert all(math.isnan(r["val_auroc"]) for r in found.curve)
    assert math.isfinite(found.metrics["val_ce"])


def test_a_monitor_that_is_never_a_number_keeps_the_last_weights(problem):
    lacking, _ = without_class(problem, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingClassWarning)
        found = run_unimodal(lacking, make_recipe(unimodal={"monitor": "val_auroc"}), seed=0)
        last = run_unimodal(lacking, make_recipe(unimodal={"monitor": "none"}), seed=0)
    assert found.best_step == 12
    assert equal(found.state, last.state)


def test_without_validation_the_last_weights_are_kept(problem, pairs):
    none = Rows((), (), np.zeros(0, np.int64), np.zeros((0, 10), np.float32))
    bare = replace(problem, validation=none, digest="bare")
    targets = make_targets(pairs.train, pairs.validation[:0])
    found = run_arm(bare, targets, "clip_it", make_recipe(), seed=0)
    assert (found.final.best_step, found.final.metrics) == (12, {})


def test_compatible_loss_never_falls_below_its_floor(problem):
    recipe = make_recipe(unimodal={"steps": 100, "lr": 0.1})
    compatible = run_unimodal(problem, replace(recipe, run=replace(recipe.run, ref_compat=True)), seed=0)
    plain = run_unimodal(problem, recipe, seed=0)
    assert min(r["train_loss"] for r in compatible.curve[1:]) > 0.7437
    assert min(r["train_loss"] for r in plain.curve[1:]) < 0.7437
    assert compatible.key != plain.key


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_learn(problem, optimizer):
    found = run_unimodal(problem, make_recipe(unimodal={"optimizer": optimizer, "steps": 40}), seed=0)
    assert found.curve[-1]["train_loss"] < found.curve[1]["train_loss"]


def test_clipping_bounds_a_step(problem):
    stage = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "steps": 1, "monitor": "none"}
    moved = []
    for bound in (1e-3, None):
        found = run_unimodal(problem, make_recipe(unimodal=stage | {"clip_norm": bound}), seed=0)
        start = make_heads(found.heads, 0).state_dict()
        moved.append(sum(float((found.state[f"heads.{n}"] - start[n]).square().sum()) for n in start if "vision" in n))
    assert moved[0] ** 0.5 <= 1.9e-3 + 1e-6 < moved[1] ** 0.5  # Nesterov's first step is 1.9 gradients


def test_what_does_not_fit_is_said(problem, pairs):
    first = run_unimodal(problem, make_recipe(), seed=0)
    fuse = {"seed": 0, "unimodal": first}
    with pytest.raises(ConfigError, match="needs text targets"):
        run_fuse(problem, None, ARMS["clip_it"], make_recipe(), **fuse)
    with pytest.raises(ConfigError, match="text_dim"):
        run_fuse(problem, None, ARMS["lambda0"], make_recipe(), **fuse)
    with pytest.raises(ConfigError, match="text stage"):
        run_fuse(problem, pairs, ARMS["clip_it"], make_recipe(), **fuse)
    with pytest.raises(InputError, match="targets of train"):
        run_text(problem, make_targets(pairs.train[:-1], pairs.validation), make_recipe(), seed=0)
    with pytest.raises(InputError, match="no training image has a text"):
        run_text(problem, make_targets(pairs.train, pairs.validation, np.zeros(40, bool)), make_recipe(), seed=0)
    spoilt = problem.train.features.copy()
    spoilt[3, 3] = np.nan
    with pytest.raises(InputError, match="not all numbers"):
        run_unimodal(replace(problem, train=replace(problem.train, features=spoilt)), make_recipe(), seed=0)
    with pytest.raises(InputError, match="features"):
        run_unimodal(replace(problem, train=replace(problem.train, features=None)), make_recipe(), seed=0)
    with pytest.raises(InputError, match="labels"):
        run_unimodal(replace(problem, classes=("a", "b")), make_recipe(), seed=0)


def test_a_loss_that_is_not_a_number_stops_the_run(problem):
    with pytest.raises(TrainingError, match="not a number at step"):
        run_unimodal(problem, make_recipe(unimodal={"lr": 1e30, "optimizer": "sgd", "weight_decay": 1e30}), seed=0)
