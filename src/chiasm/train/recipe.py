"""A recipe: one TOML file that says everything about one training run.

Comes in: TOML and ``--set`` overrides. Goes out: frozen, validated dataclasses. A typo, a wrong type or two fields that
contradict each other raise ``ConfigError`` with the dotted name of the field. torch is not imported here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chiasm.config import apply_overrides, build, read_toml, to_mapping
from chiasm.datasets.named import NAMED
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.errors import ConfigError
from chiasm.types import Preprocess, digest_of

if TYPE_CHECKING:
    from chiasm.data.augment import Augment

Selection = Literal[
    "recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "loss", "text_choice_accuracy", "none"
]  # fmt: skip
#: Metrics of which less is better.
LOWER_IS_BETTER = ("loss", "median_rank")


def _check(condition: bool, name: str, problem: str, *, hint: str | None = None) -> None:
    if not condition:
        raise ConfigError(f"`{name}` {problem}", hint=hint)


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from, how their texts are made, and what is held out.

    Attributes:
        source: Table (CSV, TSV, JSONL, Parquet), image folder or webdataset shards. ``${NAME}`` stands for an
            environment variable; a relative path starts at the recipe's folder.
        phantoms: Make synthetic images instead of reading ``source``.
        patients: How many synthetic patients.
        phantom_seed: Seed of the phantoms; the seed of the recipe does not change them.
        root: Folder that the image column is relative to; None: the table's own.
        columns: Role -> column name, where detection does not suffice: fields of
            :class:`chiasm.datasets.columns.Columns` (``image``, ``text``, ``patient`` ...).
        texts: Templates such as ``"an H&E image of {tissue}"`` with columns of the table, ``{text}`` being the row's
            own text; one is drawn per image and epoch, validation takes them all. Empty: the row's own text.
        words: Column -> value -> ways to say it, for the templates; validation takes the first. A value without words
            stands for itself.
        sentence_views: Shorter versions of each report that training may draw instead of the whole one: some of its
            sentences, in random order. Prompts are single sentences; validation takes whole reports.
        min_words: Reject rows whose text has fewer.
        drop_texts: Reject rows whose text matches one of these regular expressions (placeholders, say).
        same_group: Groups of patient ids that are one person.
        train_splits: Values of the table's split column that may be trained on; rows with another value are never read
            (a table without splits is used whole).
        validation_splits: Values to validate on; empty: hold out a part of the training groups.
        validation: Fraction of the training groups (patients, else slides, studies) to hold out.
        split_seed: Decides which groups are held out; the seed of the recipe does not.
        leakage: What to do when groups or near-identical images lie on both sides of a split: ``refuse`` the run,
            ``drop`` the training rows (and validation rows that lie in an unused split, too), ``warn``, or ``off``.
        near_duplicates: Whether that check compares images, too (it decodes each; a clean run remembers the outcome).
        on_bad_row: ``skip`` counts and lists bad rows in ``rejected.jsonl``; ``fail`` stops.
        in_memory: Keep decoded images (as bytes, at the model's size) in memory; ``auto``: when they take < 2 GB.
    """

    source: str | None = None
    phantoms: Literal["chest", "tissue"] | None = None
    patients: int = 1000
    phantom_seed: int = 0
    root: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    sentence_views: int = 0
    min_words: int = 1
    drop_texts: tuple[str, ...] = ()
    same_group: tuple[tuple[str, ...], ...] = ()
    train_splits: tuple[str, ...] = ("train",)
    validation_splits: tuple[str, ...] = ()
    validation: float = 0.1
    split_seed: int = 0
    leakage: Literal["refuse", "drop", "warn", "off"] = "refuse"
    near_duplicates: bool = True
    on_bad_row: Literal["skip", "fail"] = "skip"
    in_memory: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        _check(
            (self.source is None) != (self.phantoms is None),
            "data.source",
            "and `data.phantoms` exclude each other, and one must be given",
            hint='write `source = "table.csv"`, or `phantoms = "chest"` for synthetic data',
        )
        _check(0 <= self.validation < 1, "data.validation", f"must be in [0, 1), got {self.validation}")
        _check(self.sentence_views >= 0, "data.sentence_views", f"must not be negative, got {self.sentence_views}")
        _check(self.patients >= 2, "data.patients", f"must be at least 2, got {self.patients}")
        _check(bool(self.train_splits), "data.train_splits", "must name a split")
        both = set(self.train_splits) & set(self.validation_splits)
        _check(not both, "data.validation_splits", f"and `data.train_splits` share {sorted(both)}")
        for pattern in self.drop_texts:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"`data.drop_texts` holds `{pattern}`, no regular expression: {error}") from error
        for column, values in self.words.items():
            for value, ways in values.items():
                _check(bool(ways), f"data.words.{column}.{value}", "lists no words")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
        kind: ``infonce`` (CLIP), ``siglip`` (pairwise sigmoid; the model then has a bias) or ``multi_positive``
            (InfoNCE in which every row spreads its target over all its right answers).
        positives: What else in the batch is a right answer for ``multi_positive`` and ``siglip``: pairs of the same
            ``caption``, of the same ``group`` (study or patient), or ``none``. Validation counts equal captions as
            right answers also under ``none``.
        text_similarity: Share of the targets of ``multi_positive`` that goes to all texts of the batch by how much they
            resemble the right one in the eyes of the locked text tower; needs that tower's cached features.
        text_similarity_scale: Multiplier of those cosines before their softmax; larger keeps to nearer texts.
        tile: Rows of logits at a time: ``auto``, a count, or ``full`` for one matrix.
    """

    kind: Literal["infonce", "siglip", "multi_positive"] = "infonce"
    positives: Literal["caption", "group", "none"] = "caption"
    text_similarity: float = 0.0
    text_similarity_scale: float = 20.0
    tile: Literal["auto", "full"] | int = "auto"

    def __post_init__(self) -> None:
        share = self.text_similarity
        _check(0 <= share < 1, "loss.text_similarity", f"must be in [0, 1), got {share}")
        _check(
            share == 0 or self.kind == "multi_positive", "loss.text_similarity", "needs `loss.kind = multi_positive`"
        )
        _check(
            self.text_similarity_scale > 0,
            "loss.text_similarity_scale",
            f"must be positive, got {self.text_similarity_scale}",
        )
        _check(isinstance(self.tile, str) or self.tile >= 1, "loss.tile", f"must be at least 1, got {self.tile}")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    ``batch_size`` pairs are contrasted with each other: they are the negatives. ``accumulate`` averages the gradients
    of that many such batches before a step: less noise, but NO more negatives. ``grad_cache_chunk`` runs one batch
    through the towers in pieces of that size and still contrasts all of it: the gradient of the full batch at the
    memory of a piece, for one more forward pass (Gao et al. 2021); BatchNorm that trains is refused with it, because a
    piece's statistics are not the batch's. Both may be combined.

    Attributes:
        lr: Peak rate.
        image_lr_factor: Times ``lr`` for the image tower; 0 leaves it as it is.
        text_lr_factor: The same for the text tower.
        projection_lr_factor: The same for the projections.
        weight_decay: Of matrices only.
        betas: Of AdamW.
        eps: Of AdamW.
        warmup_steps: Linear warm-up; None: ``warmup_fraction`` of the run.
        warmup_fraction: Used when ``warmup_steps`` is not given.
        schedule: After the warm-up.
        final_lr_fraction: Where the cosine ends, as a fraction of ``lr``.
        epochs: Passes over the training pairs; ignored when ``steps`` is given.
        steps: Optimizer steps.
        batch_size: Pairs that are contrasted with each other, over all processes.
        accumulate: Batches per step.
        grad_cache_chunk: Pairs per forward pass and process; None: the whole batch.
        clip_norm: Upper bound of the gradient's norm; None: no clipping.
        precision: ``bf16`` computes the towers under autocast; loss, weights and optimizer stay in float32. ``auto`` is
            ``bf16`` where this machine multiplies such numbers faster, else ``fp32``; the run's files say which, and a
            resumed run keeps it.
    """

    lr: float = 5e-4
    image_lr_factor: float = 1.0
    text_lr_factor: float = 1.0
    projection_lr_factor: float = 1.0
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: int | None = None
    warmup_fraction: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_fraction: float = 0.0
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    grad_cache_chunk: int | None = None
    clip_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", f"must be positive, got {self.lr}")
        _check(self.eps > 0, "optim.eps", f"must be positive, got {self.eps}")
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas", f"must be in [0, 1), got {list(self.betas)}")
        for name in ("image_lr_factor", "text_lr_factor", "projection_lr_factor", "weight_decay"):
            _check(getattr(self, name) >= 0, f"optim.{name}", f"must not be negative, got {getattr(self, name)}")
        for name in ("warmup_fraction", "final_lr_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"optim.{name}", f"must be in [0, 1], got {getattr(self, name)}")
        for name in ("epochs", "steps", "accumulate", "grad_cache_chunk"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"optim.{name}", f"must be at least 1, got {value}")
        _check(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "optim.warmup_steps",
            f"must not be negative, got {self.warmup_steps}",
        )
        _check(
            self.batch_size >= 2,
            "optim.batch_size",
            f"must be at least 2, got {self.batch_size}",
            hint="a pair has nothing to be contrasted with in a batch of one",
        )
        _check(
            self.clip_norm is None or self.clip_norm > 0, "optim.clip_norm", f"must be positive, got {self.clip_norm}"
        )


@dataclass(frozen=True)
class RunConfig:
    """How the run is watched and kept.

    Attributes:
        out: Folder of the run; the command line's ``--out`` comes first.
        eval_every: Steps between validations; 0: after every epoch.
        save_every: Steps between checkpoints; 0: with every validation.
        log_every: Steps between lines of ``results.jsonl``.
        log: Where else numbers go: ``tensorboard``, ``wandb``.
        select: Metric on held-out patients that decides which checkpoint is the best one; ``none``: the last.
        patience: Stop after this many validations without a better value; 0: never.
        validation_limit: Validate on at most this many pairs.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        shard: With several processes (``torchrun``): spread weights, gradients and optimizer state over them (FSDP2)
            instead of keeping all in each (DistributedDataParallel).
        workers: Threads that prepare batches ahead; 0: none.
        cache_features: Compute the outputs of locked towers once and train on them.
        feature_cache: Folder of that cache, which runs may share; None: in the run's own folder.
        views: Variants per image in that cache, the first without augmentation; 1 with augmentation off.
    """

    out: str | None = None
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 10
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    select: Selection = "recall_at_10"
    patience: int = 0
    validation_limit: int = 5000
    device: str = "cpu"
    shard: bool = False
    workers: int = 1
    cache_features: bool = True
    feature_cache: str | None = None
    views: int = 4

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every", "patience", "workers"):
            _check(getattr(self, name) >= 0, f"run.{name}", f"must not be negative, got {getattr(self, name)}")
        for name in ("log_every", "views"):
            _check(getattr(self, name) >= 1, f"run.{name}", f"must be at least 1, got {getattr(self, name)}")
        _check(self.validation_limit >= 2, "run.validation_limit", f"must be at least 2, got {self.validation_limit}")


@dataclass(frozen=True)
class TrainConfig:
    """The part of a recipe that the training loop needs, whatever the model and the data."""

    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def digest(self) -> str:
        """Digest of what decides the weights: seed, loss and optimizer, not where the run is logged."""
        return digest_of({"seed": self.seed, "loss": to_mapping(self.loss), "optim": to_mapping(self.optim)})


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: Name of the model that comes out.
        description: For readers.
        seed: Of the drawn weights, the order of batches, augmentation and dropout.
        start: Model to start from (a catalog name or a model folder); ``image``, ``text``, ``projection``,
            ``preprocess`` and ``tokenizer`` then come from it and must not be given.
        data: Pairs and splits.
        augment: ``preset`` (``chest``, ``histology``, ``ct-mr``, ``none``) and fields of
            :class:`chiasm.data.augment.Augment` that differ from it.
        image: Image tower.
        text: Text tower.
        projection: Joint space.
        preprocess: Fields of :class:`chiasm.types.Preprocess`; the size is the image tower's.
        tokenizer: What ``make_tokenizer`` reads; empty: CLIP's. ``compact = true`` keeps only the pieces that the
            training texts use, for small models trained from scratch.
        logit_scale_init: NATURAL LOG of the multiplier of cosines at the start; None: CLIP's ln(1/0.07), SigLIP's
            ln 10.
        logit_bias_init: Bias at the start; None: -10 for SigLIP, else the model has none.
        loss: What is minimised.
        optim: How the weights move.
        run: How the run is watched and kept.
    """

    name: str
    description: str = ""
    seed: int = 0
    start: str | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(phantoms="chest"))
    augment: Mapping[str, Any] = field(default_factory=dict)
    image: ImageTowerConfig | None = None
    text: TextTowerConfig | None = None
    projection: ProjectionConfig | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    logit_scale_init: float | None = None
    logit_bias_init: float | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(bool(re.fullmatch(r"[\w.+-]+", self.name)), "name", "must be made of letters, digits and `-_.+`")
        _check(self.seed >= 0, "seed", f"must not be negative, got {self.seed}")
        if self.start is not None:
            for name in ("image", "text", "projection", "preprocess", "tokenizer"):
                _check(not getattr(self, name), name, "comes from `start` and must not be given beside it")
        else:
            self.encoder_config()

    @property
    def training(self) -> TrainConfig:
        """Seed, loss, optimizer and run."""
        return TrainConfig(self.seed, self.loss, self.optim, self.run)

    def encoder_config(self) -> EncoderConfig:
        """Return the declaration of the model that is built when there is no ``start``.

        Raises:
            ConfigError: When the parts do not fit together.
        """
        image = self.image or ImageTowerConfig()
        text = self.text or TextTowerConfig()
        is_siglip = self.loss.kind == "siglip"
        scale = self.logit_scale_init
        if scale is None:
            scale = math.log(10.0) if is_siglip else math.log(1 / 0.07)
        bias = self.logit_bias_init
        return EncoderConfig(
            image=image,
            text=text,
            projection=self.projection or ProjectionConfig(),
            logit_scale_init=scale,
            logit_bias_init=-10.0 if bias is None and is_siglip else bias,
            tokenizer={"kind": "clip", "context_length": text.context_length, **self.tokenizer},
            preprocess=build(Preprocess, {"size": image.image_size, **self.preprocess}, where="preprocess."),
        )

    @property
    def digest(self) -> str:
        """Digest of what decides the weights: everything but ``run``, ``description`` and where the data lie."""
        values = to_mapping(self)
        for name in ("run", "description"):
            values.pop(name, None)
        for name in ("source", "root"):
            values["data"].pop(name, None)
        return digest_of(values)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: A TOML file.
        overrides: ``dotted.key=value``, as after ``--set``; they come before the file's values.

    Returns:
        The recipe; relative paths of ``data`` and ``start`` have become absolute, environment variables stand as they
        were written.

    Raises:
        ConfigError: Missing file, no TOML, unknown field (with the nearest name), wrong type, contradicting values.
    """
    path = Path(path)
    values = apply_overrides(read_toml(path), overrides)
    values.setdefault("name", path.stem)
    values.setdefault("data", {})
    recipe = build(Recipe, values)
    folder = path.resolve().parent
    data = replace(recipe.data, source=anchored(recipe.data.source, folder), root=anchored(recipe.data.root, folder))
    start = recipe.start
    if start is not None and start.startswith((".", "..")):
        start = anchored(start, folder)
    recipe = replace(recipe, data=data, start=start)
    resolve_augment(recipe.augment)
    return recipe


def anchored(path: str | None, folder: Path) -> str | None:
    """Return a path that starts at the folder of a recipe, unless it is absolute, a URL or begins with a variable.

    Of ``pcam:FOLDER`` the folder is meant.
    """
    name, colon, inner = (path or "").partition(":")
    if colon and name.casefold() in NAMED:
        return f"{name}:{anchored(inner, folder)}"
    if path is None or path.startswith(("$", "~")) or "://" in path or Path(path).is_absolute():
        return path
    return str(folder / path)


def expand_path(path: str, field_name: str) -> str:
    """Return ``path`` with ``~`` and ``${NAME}`` replaced.

    Raises:
        ConfigError: When an environment variable is not set.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(
                f"`{field_name}` needs the environment variable `{name}`, which is not set",
                hint=f"export {name}=FOLDER",
            )
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value_of, path))


def resolve_augment(values: Mapping[str, Any]) -> Augment:
    """Return the ``Augment`` of a recipe's ``[augment]``.

    Raises:
        ConfigError: Unknown field, preset or type, with the dotted name.
    """
    from chiasm.data.augment import Augment

    fields = dict(values)
    preset = fields.pop("preset", "none")
    if not isinstance(preset, str):
        raise ConfigError(f"`augment.preset` must be str, got {type(preset).__name__}")
    base = to_mapping(Augment.preset(preset))
    return build(Augment, {**base, **fields}, where="augment.")
