"""A recipe to a model: the one call behind ``chiasm train``.

Comes in: a :class:`Recipe` and a folder. Goes out, in the folder: ``model/`` (what ``chiasm.load`` opens, the best
weights on held-out patients), ``recipe.toml`` (resolved), ``results.jsonl``, ``rejected.jsonl``, ``data.json``, and the
checkpoints to go on from. :func:`train_contrastive` is the part without recipe and files, for data in memory.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from chiasm.checkpoints.native import save_model_dir
from chiasm.config import changed_fields, to_toml
from chiasm.data.augment import Augment
from chiasm.data.tokens import TruncationWarning
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.errors import ConfigError, InputError
from chiasm.io.manifest import RejectLog, write_bytes_atomic, write_json_atomic, write_rejected
from chiasm.progress import Progress
from chiasm.train.checkpoint import load_checkpoint
from chiasm.train.contrastive import ContrastiveTask, PairSource
from chiasm.train.distributed import current_group, is_sharded, join_group, wait_for_all
from chiasm.train.features import (
    CachedImages,
    LockedSides,
    cache_image_features,
    cache_text_features,
    locked_sides,
)
from chiasm.train.images import array_digest, file_images, images_of, readable
from chiasm.train.loop import LAST, Loop, LoopResult
from chiasm.train.machine import prepare_for_training
from chiasm.train.optim import lock_parts
from chiasm.train.pairs import OpenedPairs, PairTable, file_facts, open_pairs
from chiasm.train.precision import settle_precision
from chiasm.train.recipe import Recipe, TrainConfig, resolve_augment
from chiasm.train.sources import ImageBatch, PairRows
from chiasm.train.text_sources import with_text_files
from chiasm.train.texts import TokenTable, sentence_views
from chiasm.train.validation import Validation
from chiasm.types import digest_of

if TYPE_CHECKING:
    from chiasm.data.tokenizers import Tokenizer

MODEL = "model"


@dataclass(frozen=True)
class TrainResult:
    """What a run has made.

    Attributes:
        best_dir: Model folder with the best weights, for ``chiasm.load``.
        metrics: Of those weights on held-out patients; empty when nothing was held out.
        best_step: Step of those weights.
        steps: Steps done in all.
        seconds: Wall time of this call.
        stopped_early: Whether patience ran out.
        data: Counts of pairs, groups and rejected rows.
        precision: What the towers trained in, ``fp32`` or ``bf16``.
    """

    best_dir: Path
    metrics: Mapping[str, float]
    best_step: int
    steps: int
    seconds: float
    stopped_early: bool
    data: Mapping[str, Any]
    precision: str = "fp32"


def train_contrastive(
    model: nn.Module,
    source: PairSource,
    *,
    config: TrainConfig,
    out: str | Path,
    validation: PairSource | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> LoopResult:
    """Train a dual encoder on any source of pairs; afterwards it holds the best weights and is in eval mode.

    Args:
        model: Forward pass ``(pixels, ids, lengths)`` -> ``image_features``, ``text_features``, ``logit_scale``.
        source: Training pairs: ``len(source)`` and ``source.batch(indices, rng) -> (pixels, tokens, keys)``, see
            :class:`chiasm.train.sources.PairRows`.
        config: Loss, optimizer, run and seed.
        out: Folder for checkpoints and ``results.jsonl``.
        validation: Held-out pairs to select by; None: the last weights are the best.
        resume: Go on from ``out/last.safetensors`` if it is there.
        progress: Told after every step: loss and pairs per second.

    Raises:
        TrainingError: A loss that is not a number, or a disk that is full; the last good checkpoint is kept.
        CheckpointError: ``out`` holds a run with another configuration.
    """
    last = Path(out) / LAST if resume else None
    device = next(model.parameters()).device
    optim = settle_precision(config.optim, device, goes_on_from=last, group=current_group())
    config = replace(config, optim=optim)
    return _run_loop(model, source, config, Path(out), _Sides(model, validation), resume, progress)


@dataclass(frozen=True)
class _Sides:
    called: nn.Module
    validation: PairSource | None
    fingerprint: str = ""


def _run_loop(
    model: nn.Module,
    source: PairSource,
    config: TrainConfig,
    out: Path,
    sides: _Sides,
    resume: bool,
    progress: Progress | None,
) -> LoopResult:
    task = ContrastiveTask(model, config=config, group=current_group(), called=sides.called)
    validate = None
    if sides.validation is not None and len(sides.validation) >= 2:
        validate = Validation(sides.called, sides.validation, config=config)
    loop = Loop(task, source, config=config, out=out, validate=validate, fingerprint=sides.fingerprint)
    result = loop.run(resume=resume, progress=progress)
    load_checkpoint(result.best, model)
    model.eval()
    return result


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Run a recipe from its data to a model folder.

    Args:
        recipe: See :func:`chiasm.train.recipe.load_recipe`. Code that it names itself (towers of kind ``python``) is
            run; code named inside a model that it starts from is not.
        out: Folder of the run; None: the recipe's ``run.out``.
        resume: Go on from the last checkpoint in the folder; without one the run starts.
        overwrite: Start anew in a folder that holds a run.
        progress: Told after every step.

    Raises:
        ConfigError: A field of the recipe does not fit the data or the model.
        InputError: No pairs, too few, or a folder that holds a run already.
        LeakageError: Patients on both sides of a split.
        TrainingError: A loss that is not a number, or a full disk; the last good checkpoint is kept.
        MissingExtra: TensorBoard, W&B or a tower's package is not installed.
    """
    began = time.perf_counter()
    folder = _folder(recipe, out)
    if not (resume or overwrite) and (folder / LAST).exists():
        raise InputError(
            f"folder `{folder.name}` holds a run already",
            hint="go on with `--resume`, start anew with `--overwrite`, or choose another folder",
        )
    group = join_group(recipe.run.device)
    last = folder / LAST if resume else None
    optim = settle_precision(recipe.optim, recipe.run.device, goes_on_from=last, group=group)
    recipe = replace(recipe, optim=optim, augment=resolve_augment(recipe.augment).to_dict())
    cache = Path(recipe.run.feature_cache or folder / "features")
    pairs = open_pairs(recipe, cache=cache, progress=progress)
    _check_laterality(recipe, pairs)
    model, tokenizer = _build(recipe, pairs)
    rejects = RejectLog(pairs.rejected)
    maker = _RowsMaker(recipe, model, tokenizer, cache=cache, progress=progress)
    train_rows = maker.rows(pairs.train, rejects, train=True)
    validation_rows = maker.rows(pairs.validation, rejects, train=False) if len(pairs.validation) >= 2 else None
    data = {**pairs.summary(), "rejected": len(rejects), "truncated_texts": maker.truncated}
    if maker.truncated and group.is_main:
        warnings.warn(
            f"{maker.truncated} distinct texts are longer than {tokenizer.context_length} tokens and are trained on "
            "without their ends",
            TruncationWarning,
            stacklevel=2,
        )
    if group.is_main:
        for leftover in folder.glob(".*.part"):  # of a run that was killed while it wrote
            leftover.unlink(missing_ok=True)
        write_bytes_atomic(folder / "recipe.toml", to_toml(recipe).encode())
        write_rejected(folder / "rejected.jsonl", rejects.items)
        write_json_atomic(folder / "data.json", data)
    sides = _Sides(maker.called(), validation_rows, digest_of([recipe.digest, data["digest"], len(train_rows)]))
    result = _run_loop(model, train_rows, recipe.training, folder, sides, resume, progress)
    if is_sharded(model):  # for saving, every process takes the whole model again
        model, tokenizer = _build(recipe, pairs)
        lock_parts(model, recipe.optim)
        load_checkpoint(result.best, model)
    best = folder / MODEL
    if group.is_main:
        write_rejected(folder / "rejected.jsonl", rejects.items)
        _save(best, recipe, model, tokenizer, result, data)
    wait_for_all(group)
    return TrainResult(
        best, result.metrics, result.best_step, result.steps, time.perf_counter() - began, result.stopped_early, data,
        recipe.optim.precision,
    )  # fmt: skip


def _folder(recipe: Recipe, out: str | Path | None) -> Path:
    chosen = out if out is not None else recipe.run.out
    if chosen is None:
        raise ConfigError("the recipe names no `run.out`", hint="pass `--out FOLDER`")
    return Path(chosen)


def _build(recipe: Recipe, pairs: OpenedPairs) -> tuple[DualEncoder, Tokenizer]:
    """Return model and tokenizer, of the declaration or of the model to start from, on the recipe's device."""
    from chiasm.data.tokenizers import ClipTokenizer, make_tokenizer

    if recipe.start is not None:
        from chiasm.load import load
        from chiasm.train.recipe import expand_path

        encoder = load(expand_path(recipe.start, "start"), device=recipe.run.device)
        return prepare_for_training(encoder.model.train()), encoder.tokenizer
    config = with_text_files(recipe.encoder_config())
    spec = dict(config.tokenizer)
    if spec.pop("compact", False):
        texts = (v for t in pairs.train.texts for v in t.variants)
        tokenizer: Tokenizer = ClipTokenizer.compact_from(texts, config.text.context_length)
    else:
        tokenizer = make_tokenizer(spec)
    text = config.text
    if text.is_native and tokenizer.vocab_size != text.vocab_size:
        text = replace(text, vocab_size=tokenizer.vocab_size)
    config = replace(config, text=text, tokenizer=tokenizer.to_dict())
    model = build_encoder_model(config, allow_code=True, seed=recipe.seed)
    return prepare_for_training(model.to(recipe.run.device)), tokenizer


class _RowsMaker:
    """Turns tables of pairs into sources, with features of locked towers in the place of inputs where that is right."""

    def __init__(
        self, recipe: Recipe, model: DualEncoder, tokenizer: Tokenizer, *, cache: Path, progress: Progress | None
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress
        self.cache = cache
        self.image_locked, self.text_locked = locked_sides(model) if recipe.run.cache_features else (False, False)
        self.truncated = 0

    def called(self) -> nn.Module:
        """Return the module that is called on the batches."""
        if not (self.image_locked or self.text_locked):
            return self.model
        return LockedSides(self.model, image=self.image_locked, text=self.text_locked)

    def rows(self, table: PairTable, rejects: RejectLog, *, train: bool) -> PairRows:
        """Return the source of one table."""
        recipe, preprocess = self.recipe, self.model.config.preprocess
        augment = resolve_augment(recipe.augment) if train else None
        if augment == Augment.preset("none"):
            augment = None
        if self.image_locked:
            images, usable = self._features(table, augment, rejects)
        else:
            images, usable = images_of(
                table, preprocess, data=recipe.data, augment=augment, rejects=rejects, progress=self.progress
            )
        tokens = TokenTable([self._ways(t.variants, train) for t in usable.texts], self.tokenizer)
        self.truncated += tokens.truncated
        text_features = None
        if self.text_locked:
            text_features = cache_text_features(self.model, tokens, folder=self.cache, progress=self.progress)
        positives = recipe.loss.positives
        keys = usable.keys("caption" if positives == "none" and not train else positives)
        return PairRows(images, tokens, keys, train=train, text_features=text_features)

    def _features(self, table: PairTable, augment: Augment | None, rejects: RejectLog) -> tuple[ImageBatch, PairTable]:
        """Return features of the locked image tower, augmented at full resolution, and the rows that can be read."""
        recipe, preprocess = self.recipe, self.model.config.preprocess
        usable = table
        if table.arrays is None:
            fail = recipe.data.on_bad_row == "fail"
            usable = readable(table, rejects=rejects, fail=fail, cache=self.cache, progress=self.progress)
        described = [
            changed_fields(preprocess),
            None if augment is None else changed_fields(augment),
            None if usable.arrays is None else array_digest(usable.arrays),
            file_facts(usable.samples),
        ]
        features = cache_image_features(
            self.model, file_images(usable, preprocess, augment=augment), len(usable), folder=self.cache,
            describes=described, views=1 if augment is None else recipe.run.views, progress=self.progress,
        )  # fmt: skip
        return CachedImages(features), usable

    def _ways(self, variants: tuple[str, ...], train: bool) -> tuple[str, ...]:
        """Return the texts of one row; in training with parts of reports beside the whole."""
        data = self.recipe.data
        if not (train and data.sentence_views):
            return variants
        parts = (sentence_views(v, data.sentence_views, seed=data.split_seed) for v in variants)
        return (*variants, *(view for views in parts for view in views))


def _check_laterality(recipe: Recipe, pairs: OpenedPairs) -> None:
    if resolve_augment(recipe.augment).keeps_laterality:
        return
    sided = re.compile(r"\b(left|right)\b", re.IGNORECASE)
    count = sum(any(sided.search(v) for v in t.variants) for t in pairs.train.texts)
    if count:
        warnings.warn(
            f"`augment` mirrors or turns images, but {count} of {len(pairs.train)} texts say left or right",
            stacklevel=3,
        )


def _save(
    directory: Path,
    recipe: Recipe,
    model: DualEncoder,
    tokenizer: Tokenizer,
    result: LoopResult,
    data: Mapping[str, Any],
) -> None:
    """Write the model folder; adapters are merged into their towers first."""
    from chiasm.encoders.adapters import merge_lora

    config = replace(model.stored_config, tokenizer=tokenizer.to_dict())
    if config.image.lora is not None or config.text.lora is not None:
        merge_lora(model)
        image, text = replace(config.image, lora=None), replace(config.text, lora=None)
        config = replace(config, image=image, text=text)
    training = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "seed": recipe.seed,
        "precision": recipe.optim.precision,
        "steps": result.steps,
        "best_step": result.best_step,
        "validation": dict(result.metrics),
        "data": dict(data),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    save_model_dir(
        directory, model.state_dict(), name=recipe.name, config=config.to_dict(), training=training,
        recipe=to_toml(recipe),
    )  # fmt: skip
