"""The three stages of CLIP-IT: an image classifier, a text classifier, and the one in which text teaches the image.

Comes in: a :class:`Problem`, targets and a recipe. Goes out: a :class:`StageResult` each, found again in the cache when
the same stage was finished before, gone on with when it was interrupted.

A stage's file is named by a digest of everything that decides its weights: its options, the problem, the seed, the
targets, the stages before it, and :data:`CODE`. Where the files lie, the device and checkpoints are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from chiasm.config import to_mapping
from chiasm.distill.arms import ARMS, Arm
from chiasm.distill.problem import Problem, Rows, Targets
from chiasm.distill.recipe import DistillRecipe, FuseConfig, StageConfig
from chiasm.distill.results import ALONE, StageResult, Surroundings, class_probabilities, run_stage, trained_tower
from chiasm.distill.schedule import Plan
from chiasm.distill.student import (
    Inputs,
    Student,
    TextProbe,
    absorb_norm,
    fit_norm,
    identity_tower,
    make_heads,
)
from chiasm.distill.tasks import DistillTask, ImageTask, TextTask
from chiasm.distill.text_side import TrainedText
from chiasm.distill.trainer import Task
from chiasm.encoders.base import LoraConfig, weights_digest
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.types import digest_of

__all__ = [
    "ALONE",
    "ArmResult",
    "StageResult",
    "Surroundings",
    "class_probabilities",
    "run_arm",
    "run_fuse",
    "run_text",
    "run_unimodal",
    "trained_tower",
]

#: Raised whenever the same inputs would give other weights than before.
CODE = "1"


def run_unimodal(
    problem: Problem,
    recipe: DistillRecipe,
    *,
    seed: int,
    tower: nn.Module | None = None,
    text_dim: int | None = None,
    around: Surroundings = ALONE,
) -> StageResult:
    """Train ``h_v`` on the locked features, or, with ``backbone.unimodal = "full"``, the tower together with it.

    Args:
        problem: Rows.
        recipe: ``unimodal``, ``heads``, ``backbone`` and ``run.ref_compat`` count.
        seed: Of weights and batches.
        tower: Pixels to (batch, width); needed to train it, unused otherwise.
        text_dim: Hidden width of an ``mlp`` head where ``heads.hidden`` is not given.
        around: Cache, device, progress.

    Raises:
        ConfigError: No tower to train, or a hidden width that cannot be known.
        InputError: No images, no features, NaN.
        TrainingError: A loss that is not a number, or a file that cannot be written.
    """
    full = recipe.backbone.unimodal == "full"
    if full and tower is None:
        raise ConfigError("`backbone.unimodal` is `full`, but there is no tower to train")
    _check_rows(problem, pixels=full)
    if recipe.heads.vision == "mlp" and (recipe.heads.hidden or text_dim) is None:
        raise ConfigError("the width of the hidden layer of `heads.vision` is unknown", hint="set `heads.hidden`")
    width = _width(problem, tower if full else None)
    heads = _heads(recipe, width, len(problem.classes), text_dim or 1, fused=False)
    key = digest_of([
        CODE, "unimodal", _options(recipe.unimodal), heads.to_dict(), full, problem.digest, seed, recipe.run.ref_compat,
        weights_digest(tower.state_dict()) if full and tower is not None else "",
        dict(recipe.backbone.augment) if full else {},
    ])  # fmt: skip

    def make() -> tuple[Task, Student]:
        modules = make_heads(heads, seed)
        if full:
            assert tower is not None
            student = Student.adapted(modules, tower, lora=None, seed=seed, full=True)  # without a norm until the end
        else:
            student = Student(modules)
            fit_norm(student, Inputs(problem.train, pixels=False))
        task = ImageTask(
            student, problem, recipe.unimodal, pixels=full, softmax_twice=recipe.run.ref_compat, device=around.device
        )
        return task, student

    def finish(student: Student) -> None:
        if full:  # what follows sees the features of the trained tower
            absorb_norm(student, Inputs(problem.train, pixels=True, device=around.device))

    return run_stage("unimodal", key, recipe.unimodal, heads, make, seed=seed, around=around, rows=len(problem.train),
                finish=finish)  # fmt: skip


def run_text(
    problem: Problem,
    targets: Targets,
    recipe: DistillRecipe,
    *,
    seed: int,
    around: Surroundings = ALONE,
) -> StageResult:
    """Train ``h_t`` on real text embeddings (t, y), at the length at which it will meet predicted ones.

    Args:
        problem: Labels.
        targets: Text embeddings of its training and validation images; rows without a text are left out.
        recipe: ``text``, ``heads`` and ``run.ref_compat`` count.
        seed: Of weights and batches.
        around: Cache, device, progress.

    Returns:
        With ``heads.text.*`` alone in its state.

    Raises:
        InputError: No training image has a text, or targets of another problem.
        TrainingError: A loss that is not a number, or a file that cannot be written.
    """
    _check_targets(problem, targets)
    if not targets.train_mask.any():
        raise InputError("no training image has a text to learn from", hint="lower `pairing.min_similarity`")
    heads = _heads(recipe, 1, len(problem.classes), targets.dim, fused=True)
    key = digest_of([
        CODE, "text", _options(recipe.text), heads.to_dict(), problem.digest, targets.digest, seed,
        recipe.run.ref_compat,
    ])  # fmt: skip

    def make() -> tuple[Task, None]:
        probe = TextProbe(heads, seed)
        return TextTask(
            probe, problem, targets, recipe.text, softmax_twice=recipe.run.ref_compat, device=around.device
        ), None

    rows = int(targets.train_mask.sum())
    return run_stage("text", key, recipe.text, heads, make, seed=seed, around=around, rows=rows)


def run_fuse(
    problem: Problem,
    targets: Targets | None,
    arm: Arm,
    recipe: DistillRecipe,
    *,
    seed: int,
    unimodal: StageResult,
    text: StageResult | None = None,
    text_dim: int | None = None,
    tower: nn.Module | None = None,
    text_tower: nn.Module | None = None,
    around: Surroundings = ALONE,
) -> StageResult:
    """Train the last stage of an arm: the fused heads, or ``h_v`` with an adapted tower (``unimodal_lora``).

    Arms of one seed start from the same ``h_v``, the same drawn heads and adapters, and see the same batches.

    Args:
        problem: Rows.
        targets: What ``h_d`` learns to predict; not looked at by arms without a text.
        arm: What to leave out.
        recipe: ``fuse``, ``heads``, ``backbone`` and ``run.ref_compat`` count.
        seed: Of weights and batches.
        unimodal: The first stage; its ``h_v`` and norm are where this one starts.
        text: The second stage on the same targets, where arm and recipe let ``h_t`` start from it.
        text_dim: Of the texts that the other arms have, for fused arms without a text.
        tower: The locked tower that gave the features, or that the unimodal stage was given to train; needed for
            adapters on pixels. Where there are no pixels, adapters go on an identity.
        text_tower: With ``fuse.text_lora``, see :class:`chiasm.distill.text_side.TrainedText`.
        around: Cache, device, progress.

    Raises:
        ConfigError: The recipe asks for what was not given.
        InputError: Targets or features that do not fit the rows.
        TrainingError: A loss that is not a number, collapsed targets, or a file that cannot be written.
    """
    config, taught = recipe.fuse, arm.targets != "none"
    if taught and targets is None:
        raise ConfigError(f"the arm `{arm.name}` needs text targets")
    used = targets if taught else None
    lora = recipe.backbone.lora or (LoraConfig() if arm.lora else None)
    pixels = lora is not None and problem.train.pixels is not None
    _check_rows(problem, pixels=pixels)
    base = _base_tower(problem, unimodal, tower, pixels=pixels) if lora is not None else None
    if used is not None:
        _check_targets(problem, used)
    elif arm.fused and text_dim is None:
        raise ConfigError(f"the arm `{arm.name}` has fused heads: `text_dim` must be given")
    dim = used.dim if used is not None else text_dim or 1
    heads = _heads(recipe, unimodal.heads.width, len(problem.classes), dim, fused=arm.fused)
    if not taught:
        heads = replace(heads, detach_text=False)  # nothing else would teach `h_d`
    start = None
    if used is not None and arm.warm_start and config.warm_start_text:
        if text is None:
            raise ConfigError("`fuse.warm_start_text` needs the text stage")
        start = text
    adapts_text = used is not None and config.text_lora is not None
    if adapts_text and text_tower is None:
        raise ConfigError("`fuse.text_lora` needs the text tower and the texts")
    at_mean = config.fusion_start == "mean" and (start is not None or not taught)
    random_start = config.fusion_start == "mean" and not at_mean
    key = digest_of([
        f"{CODE} random W" if random_start else CODE, "fuse",
        _fuse_options(config, taught=taught, fused=arm.fused), heads.to_dict(), problem.digest, seed,
        unimodal.key, start.key if start else "", used.digest if used else "", recipe.run.ref_compat,
        to_mapping(lora) if lora else {}, weights_digest(base.state_dict()) if base is not None else "",
        dict(recipe.backbone.augment) if pixels else {},
        weights_digest(text_tower.state_dict()) if adapts_text and text_tower is not None else "",
    ])  # fmt: skip

    def make() -> tuple[Task, Student]:
        modules = _started(make_heads(heads, seed), unimodal, start, at_mean=at_mean)
        if arm.fused and config.lock_vision_head:
            modules.vision.requires_grad_(False)
        student = Student(modules) if base is None else Student.adapted(modules, base, lora=lora, seed=seed)
        options: dict[str, Any] = {
            "pixels": pixels, "softmax_twice": recipe.run.ref_compat, "device": around.device
        }  # fmt: skip
        if used is None:
            return ImageTask(student, problem, config, **options), student
        side = None
        if adapts_text:
            assert config.text_lora is not None
            assert text_tower is not None
            side = TrainedText(
                text_tower, config.text_lora, rows=len(problem.train), seed=seed, collapse_rank=config.collapse_rank,
                device=around.device,
            )  # fmt: skip
        steps = Plan.of(config, len(problem.train)).steps
        return DistillTask(student, problem, used, config, steps=steps, text=side, **options), student

    warmup = config.kd_warmup_steps if taught else 0
    return run_stage("fuse", key, config, heads, make, seed=seed, around=around, rows=len(problem.train), warmup=warmup,
                lora=lora)  # fmt: skip


@dataclass(frozen=True)
class ArmResult:
    """All stages of one arm.

    Attributes:
        arm: Which.
        unimodal: First stage, shared by all arms of a seed.
        text: Second stage, where there is one.
        final: The stage whose weights classify.
    """

    arm: Arm
    unimodal: StageResult
    text: StageResult | None
    final: StageResult


def run_arm(
    problem: Problem,
    targets: Targets | None,
    arm: Arm | str,
    recipe: DistillRecipe,
    *,
    seed: int,
    unimodal: StageResult | None = None,
    text_dim: int | None = None,
    tower: nn.Module | None = None,
    text_tower: nn.Module | None = None,
    around: Surroundings = ALONE,
) -> ArmResult:
    """Train all stages that an arm needs; arguments and errors as those of the stages.

    Args:
        unimodal: The first stage if it was done already; it is trained or found in the cache otherwise.
    """
    arm = ARMS[arm] if isinstance(arm, str) else arm
    if unimodal is None:
        unimodal = run_unimodal(problem, recipe, seed=seed, tower=tower, text_dim=text_dim, around=around)
    if arm.name == "unimodal":
        return ArmResult(arm, unimodal, None, unimodal)
    text = None
    if arm.targets != "none" and targets is not None and arm.warm_start and recipe.fuse.warm_start_text:
        text = run_text(problem, targets, recipe, seed=seed, around=around)
    final = run_fuse(
        problem, targets, arm, recipe, seed=seed, unimodal=unimodal, text=text, text_dim=text_dim, tower=tower,
        text_tower=text_tower, around=around,
    )  # fmt: skip
    return ArmResult(arm, unimodal, text, final)


def _heads(recipe: DistillRecipe, width: int, classes: int, text_dim: int, *, fused: bool) -> HeadsConfig:
    """Return the shapes of the heads; what a stage has no use for does not show, so that it changes no key."""
    options = recipe.heads
    hidden = options.hidden or text_dim
    if not fused:
        hidden = hidden if options.vision == "mlp" else 1
        return HeadsConfig(
            width=width, classes=classes, text_dim=1, hidden=hidden, vision=options.vision, fused=False,
            standardize=options.standardize,
        )  # fmt: skip
    return HeadsConfig(
        width=width, classes=classes, text_dim=text_dim, hidden=hidden, vision=options.vision, distill=options.distill,
        text=options.text, text_length=options.text_length, detach_text=options.detach_text,
        standardize=options.standardize,
    )  # fmt: skip


def _options(config: StageConfig) -> dict[str, Any]:
    values = to_mapping(config)
    values.pop("checkpoint_every")
    return values


def _fuse_options(config: FuseConfig, *, taught: bool, fused: bool) -> dict[str, Any]:
    """Return what counts for an arm: λ changes nothing where there is no text."""
    values = _options(config)
    if not taught:
        shared = {f.name for f in fields(StageConfig)} | ({"lock_vision_head", "fusion_start"} if fused else set())
        values = {n: v for n, v in values.items() if n in shared}
    return values


def _started(
    heads: DistilledHeads, unimodal: StageResult, text: StageResult | None, *, at_mean: bool
) -> DistilledHeads:
    """Put the earlier stages' weights into freshly drawn heads, and let ``W`` start at the mean of what they trained."""
    state = {n: t for n, t in unimodal.state.items() if n.startswith(("heads.vision.", "heads.norm."))}
    if text is not None:
        state |= {n: t for n, t in text.state.items() if n.startswith("heads.text.")}
    own = heads.state_dict()
    for full_name, tensor in state.items():
        name = full_name.removeprefix("heads.")
        if name not in own or own[name].shape != tensor.shape:
            raise CheckpointError(f"the weights of an earlier stage do not fit the heads: `{name}`")
        own[name].copy_(tensor)
    if at_mean and heads.fusion is not None:
        classes = heads.config.classes
        one = torch.eye(classes)
        shares = [one, torch.zeros_like(one)] if text is None else [one / 2, one / 2]
        own["fusion.weight"].copy_(torch.cat(shares, dim=1))
        own["fusion.bias"].zero_()
    return heads


def _base_tower(problem: Problem, unimodal: StageResult, tower: nn.Module | None, *, pixels: bool) -> nn.Module:
    """Return the locked tower that adapters go on."""
    if not pixels:
        return identity_tower(unimodal.heads.width)
    if tower is None:
        raise ConfigError("adapters need the tower: `backbone.lora` is set, but only features were given")
    return trained_tower(unimodal, tower) if unimodal.trained == "full" else tower


def _width(problem: Problem, tower: nn.Module | None) -> int:
    """Return the width of the features, from themselves or from the tower's answer to one image."""
    if tower is None:
        assert problem.train.features is not None
        return int(problem.train.features.shape[1])
    assert problem.train.pixels is not None
    was_training = tower.training
    with torch.no_grad():
        parameter = next(tower.parameters())
        out = tower.eval()(problem.train.pixels(np.zeros(1, dtype=np.int64), None).to(parameter.device))
    tower.train(was_training)
    if out.ndim != 2:
        raise InputError(f"the tower must give features of shape (batch, width), got {tuple(out.shape)}")
    return int(out.shape[1])


def _check_rows(problem: Problem, *, pixels: bool) -> None:
    """Refuse rows that cannot be trained on: labels out of range, features that are absent or not numbers."""
    for name in ("train", "validation"):
        rows: Rows = getattr(problem, name)
        if len(rows) and (rows.labels.min() < 0 or rows.labels.max() >= len(problem.classes)):
            raise InputError(f"labels of {name} must be in [0, {len(problem.classes)})")
        if pixels or (not len(rows) and name != "train"):
            continue
        if rows.features is None:
            raise InputError(f"the features of the locked backbone are missing for {name}")
        if not np.isfinite(rows.features).all():
            raise InputError(f"features of {name} are not all numbers")


def _check_targets(problem: Problem, targets: Targets) -> None:
    for name in ("train", "validation"):
        vectors, mask = getattr(targets, name), getattr(targets, f"{name}_mask")
        n = len(getattr(problem, name))
        if vectors.shape != (n, targets.dim) or mask.shape != (n,):
            raise InputError(f"targets of {name} must have shape ({n}, {targets.dim}), got {vectors.shape}")
        if not np.isfinite(vectors[mask]).all():
            raise InputError(f"targets of {name} are not all numbers")
