"""A recipe of distillation: one TOML file that says everything about a CLIP-IT run and its controls.

Comes in: TOML and ``--set`` overrides. Goes out: frozen, validated dataclasses; a typo or two fields that contradict
each other raise ``ConfigError`` with the dotted name. torch is not imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from chiasm.config import apply_overrides, build, read_toml, to_mapping
from chiasm.encoders.base import ImageTowerConfig, LoraConfig
from chiasm.errors import ConfigError
from chiasm.train.recipe import anchored
from chiasm.types import digest_of

Monitor = Literal["val_ce", "val_loss", "val_balanced_accuracy", "val_accuracy", "val_auroc", "none"]
#: Monitors of which less is better.
LOWER_IS_BETTER = ("val_ce", "val_loss")
KdKind = Literal["cosine", "mse", "relational", "logit"]


def _check(condition: bool, name: str, problem: str, *, hint: str | None = None) -> None:
    if not condition:
        raise ConfigError(f"`{name}` {problem}", hint=hint)


@dataclass(frozen=True)
class SyntheticConfig:
    """A made-up problem on which text is really privileged: noisy image labels, clean meaning only in the reports.

    The defaults are setting A of the pilot. Everything is drawn anew for every seed.

    Attributes:
        train: Training images; half as many more for validation.
        test: Test images, with clean labels.
        reports: Reports, unpaired with the images.
        classes: Classes.
        latent: Dimensions of the latent variable.
        separation: Distance of the class means from the origin.
        within: Deviation of the latent variable inside a class.
        flip: Share of training and validation labels that are redrawn uniformly over the classes.
        width: Image features.
        text_dim: Dimensions of the retriever's space.
        image_noise: Of the image features.
        clip_noise: Of the retriever's view of an image.
        report_noise: Of a report's embedding.
        nuisance: Dimensions of a second latent variable that the image shows and no report tells of, as stain and
            scanner. Without one the images' own spread gives the classes away (docs/lab-notes.md, 2026-11-21).
        nuisance_scale: Its deviation.
    """

    train: int = 150
    test: int = 3000
    reports: int = 400
    classes: int = 4
    latent: int = 3
    separation: float = 2.5
    within: float = 0.4
    flip: float = 0.4
    width: int = 64
    text_dim: int = 32
    image_noise: float = 1.5
    clip_noise: float = 0.15
    report_noise: float = 0.1
    nuisance: int = 0
    nuisance_scale: float = 3.0

    def __post_init__(self) -> None:
        for name in ("train", "test", "reports", "latent", "width", "text_dim"):
            _check(getattr(self, name) >= 2, f"data.synthetic.{name}", f"must be at least 2, got {getattr(self, name)}")
        _check(self.classes >= 2, "data.synthetic.classes", f"must be at least 2, got {self.classes}")
        _check(self.nuisance >= 0, "data.synthetic.nuisance", f"must not be negative, got {self.nuisance}")
        _check(0 <= self.flip <= 1, "data.synthetic.flip", f"must be in [0, 1], got {self.flip}")


@dataclass(frozen=True)
class DistillData:
    """Labelled images, and what is held out.

    Exactly one of ``source``, ``phantoms`` and ``synthetic`` must be given.

    Attributes:
        source: Table, folder, shards, or a named data set as ``pcam:ROOT``. ``${NAME}`` stands for an environment
            variable; a relative path starts at the recipe's folder.
        phantoms: Synthetic images instead.
        patients: How many synthetic patients (training, validation and test together).
        phantom_seed: Seed of the phantoms; the seed of the run does not change them.
        phantom_size: Side of the phantoms' images, in pixels.
        synthetic: Made-up features instead of images.
        root: Folder that the image column is relative to; None: the table's own.
        columns: Role -> column name, as for training.
        label: Column of the class; None: the only label of the table.
        classes: Values of ``label`` in the order of the logits; rows with another value are left out. Empty: all
            values, sorted.
        train_splits: Values of the split column that may be trained on.
        validation_splits: Values to validate on. Empty: a split called ``val``, ``valid``, ``validation`` or ``dev`` that
            is not named otherwise here; without one hold out ``validation`` of the training groups.
        test_splits: Values to test on. Empty, or a table without splits: hold out ``test`` of all groups first.
        validation: Fraction of the training groups (patients, else slides, studies) to hold out, by class and seed.
        test: The same for the test set, where the data have none; drawn with ``test_seed``, never with the run's.
        test_seed: Decides which groups are tested on.
        split_seed: Decides which groups are held out for validation; None: the seed of the run.
        train_limit: Use only so many training images (drawn by class with the run's seed).
        label_noise: Share of training and validation labels that are redrawn at random: an experiment, said in every
            output.
        leakage: What to do when groups or near-identical images lie on both sides of a split.
        near_duplicates: Whether that check compares images, too.
    """

    source: str | None = None
    phantoms: Literal["chest", "tissue"] | None = None
    patients: int = 600
    phantom_seed: int = 0
    phantom_size: int = 64
    synthetic: SyntheticConfig | None = None
    root: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    classes: tuple[str, ...] = ()
    train_splits: tuple[str, ...] = ("train",)
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("test",)
    validation: float = 0.1
    test: float = 0.2
    test_seed: int = 0
    split_seed: int | None = None
    train_limit: int | None = None
    label_noise: float = 0.0
    leakage: Literal["refuse", "drop", "warn", "off"] = "refuse"
    near_duplicates: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("source", "phantoms", "synthetic") if getattr(self, n) is not None]
        _check(
            len(given) == 1,
            "data.source",
            f"`data.phantoms` and `data.synthetic`: one must be given, got {' and '.join(given) or 'none'}",
            hint='write `source = "table.csv"`, `source = "pcam:${PCAM}"` or `phantoms = "tissue"`',
        )
        for name in ("validation", "test", "label_noise"):
            _check(0 <= getattr(self, name) < 1, f"data.{name}", f"must be in [0, 1), got {getattr(self, name)}")
        _check(self.train_limit is None or self.train_limit >= 2, "data.train_limit", "must be at least 2")
        _check(self.patients >= 10, "data.patients", f"must be at least 10, got {self.patients}")
        _check(bool(self.train_splits), "data.train_splits", "must name a split")
        for one, other in (
            ("train_splits", "validation_splits"),
            ("train_splits", "test_splits"),
            ("validation_splits", "test_splits"),
        ):
            both = set(getattr(self, one)) & set(getattr(self, other))
            _check(not both, f"data.{one}", f"and `data.{other}` share {sorted(both)}")
        _check(len(set(self.classes)) == len(self.classes), "data.classes", "names a class twice")


@dataclass(frozen=True)
class PairingConfig:
    """Which reports stand beside which images: a folder made by ``chiasm pairing``, or what it takes to make one.

    Attributes:
        pairs: Folder of pairs for all training and validation images.
        reports: Corpus of reports, when there is no such folder; phantoms have their own (of other patients).
        encoder: The CLIP that pairs and whose text side gives the targets: a name from ``chiasm models`` or a folder.
        family: As for ``chiasm.load``.
        tissue: Keep the reports of this tissue.
        text_filter: Keep the reports that have this substring, or match ``re:PATTERN``.
        columns: Role -> column of the corpus (``text``, ``id``, ``tissue``, ``patient``).
        top_k: Reports per image.
        temperature: Weights of the ``top_k`` are softmax(similarity / temperature); None: equal.
        min_similarity: Pairs below it do not teach; ``auto``: see ``chiasm pairing``; None: all teach.
        aggregate: How the chunks of a report count.
        correction: Of hubs, reports that are near to many images; see ``chiasm pairing``.
        phantom_reports: Synthetic patients whose reports are the corpus, numbered after those of the images.
        prompts: Class -> sentences, for the arms ``prompt_text`` and ``label_leak``. Empty: ``prompt`` with the class
            name.
        prompt: Sentence with the hole ``{class}``.
        overlap_tokens: Reports longer than the context are cut into chunks that overlap by so many tokens; None: an eighth of
            the room.
    """

    pairs: str | None = None
    reports: str | None = None
    encoder: str | None = None
    family: str | None = None
    tissue: str | None = None
    text_filter: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    top_k: int = 1
    temperature: float | None = None
    min_similarity: float | Literal["auto"] | None = None
    aggregate: Literal["max", "mean", "top_mean"] = "max"
    correction: Literal["none", "csls", "inverted_softmax"] = "none"
    phantom_reports: int = 600
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt: str = "an H&E image of {class}"
    overlap_tokens: int | None = None

    def __post_init__(self) -> None:
        _check(self.top_k >= 1, "pairing.top_k", f"must be at least 1, got {self.top_k}")
        _check(self.temperature is None or self.temperature > 0, "pairing.temperature", "must be positive, or left out")
        _check("{class}" in self.prompt, "pairing.prompt", "lacks the hole {class}")
        _check(
            self.pairs is None or self.reports is None,
            "pairing.pairs",
            "and `pairing.reports` exclude each other",
            hint="pairs on disk were made from a corpus already",
        )
        usual: dict[str, object] = {
            "tissue": None,
            "text_filter": None,
            "columns": {},
            "aggregate": "max",
            "correction": "none",
        }
        for name, value in usual.items():  # silence would look like obedience
            _check(
                self.pairs is None or getattr(self, name) == value,
                f"pairing.{name}",
                "has no effect on `pairing.pairs`, which are made already",
                hint="give it to `chiasm pairing`",
            )


@dataclass(frozen=True)
class BackboneConfig:
    """The vision backbone, whose features the heads take.

    Attributes:
        encoder: A name from ``chiasm models``, a model folder or file; its image side is used, before the projection
            into a joint space.
        family: As for ``chiasm.load``.
        image: A tower to build instead: from scratch (native kinds, drawn with the run's seed) or ``python``.
        preprocess: With ``image``: fields of :class:`chiasm.types.Preprocess`.
        unimodal: ``frozen``: the probe sees fixed features; ``full``: the tower itself is trained in the unimodal
            stage, and locked afterwards.
        projected: Take the embedding of the joint space instead of the tower's own output.
        augment: As in a training recipe, for stages that train the tower; ignored by cached features.
        lora: Low-rank adapters on the tower in the fuse stage (and in ``unimodal_lora``); None: locked features.
    """

    encoder: str | None = None
    family: str | None = None
    image: ImageTowerConfig | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    unimodal: Literal["frozen", "full"] = "frozen"
    projected: bool = False
    augment: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _check(
            self.encoder is None or self.image is None, "backbone.encoder", "and `backbone.image` exclude each other"
        )
        _check(not self.preprocess or self.image is not None, "backbone.preprocess", "needs `backbone.image`")


@dataclass(frozen=True)
class HeadOptions:
    """Kinds of the heads; their widths follow from backbone, classes and texts.

    Attributes (all others as in :class:`chiasm.encoders.heads.HeadsConfig`):
        raw_text: No ``text_length``: the predicted embedding enters ``h_t`` as long as it is. (TOML has no null.)
    """

    vision: Literal["linear", "mlp"] = "linear"
    distill: Literal["linear", "mlp"] = "linear"
    text: Literal["linear", "mlp"] = "mlp"
    hidden: int | None = None
    text_length: float | None = 3.0
    detach_text: bool = False
    standardize: bool = True
    raw_text: bool = False

    def __post_init__(self) -> None:
        _check(self.hidden is None or self.hidden >= 1, "heads.hidden", f"must be at least 1, got {self.hidden}")
        if self.raw_text:
            object.__setattr__(self, "text_length", None)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: Adam with L2 weight decay, as the reference, or decoupled (AdamW).

    Attributes:
        steps: Optimizer steps; None: ``epochs``.
        epochs: Passes over the training images.
        batch_size: Images per step; ``full``: all of them.
        lr: Learning rate.
        weight_decay: Added to the gradient (``adam``) or applied to the weights (``adamw``).
        optimizer: ``adam``, ``adamw`` or ``sgd`` (momentum 0.9, Nesterov).
        schedule: Of ``lr``: ``constant``, or ``cosine``, which falls to 0 over the stage; there is no warm-up.
        clip_norm: Upper bound of the gradient's norm; None: no clipping.
        class_weights: Weight classes by the inverse of how often they are trained on.
        monitor: What on held-out groups decides which weights are kept; ``none``: the last.
        eval_every: Steps between validations; 0: ten of them per epoch, at least one step apart.
        patience: Stop after this many validations without a better value; 0: never.
        min_delta: By how much a value must be better to count.
        checkpoint_every: Steps between checkpoints to go on from; 0: every 20 seconds.
    """

    steps: int | None = None
    epochs: float = 20.0
    batch_size: Literal["full"] | int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: float | None = None
    class_weights: bool = False
    monitor: Monitor = "val_ce"
    eval_every: int = 0
    patience: int = 0
    min_delta: float = 0.0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        _check(self.steps is None or self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        _check(self.epochs > 0, "epochs", f"must be positive, got {self.epochs}")
        _check(
            isinstance(self.batch_size, str) or self.batch_size >= 1,
            "batch_size",
            f"must be at least 1, got {self.batch_size}",
        )
        _check(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        _check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", f"must be positive, got {self.clip_norm}")
        for name in ("weight_decay", "eval_every", "patience", "min_delta", "checkpoint_every"):
            _check(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class FuseConfig(StageConfig):
    """The stage that distils: ``CE(logits, y) + kd_weight * KD(target, predicted)``.

    Attributes:
        kd_weight: λ.
        kd: ``cosine``: mean(1 - cos); ``mse`` of unit vectors; ``relational``: difference of the batch's cosine
            matrices; ``logit``: KL to the text head's logits on the target.
        kd_schedule: Of λ over the stage: ``constant``, ``rise`` (linear from 0) or ``fall`` (cosine to 0).
        kd_temperature: Of ``logit``.
        kd_warmup_steps: Steps before the stage in which ``h_d`` alone learns from the text.
        warm_start_text: Start ``h_t`` from the text stage's head (never in arms without text).
        fusion_start: Where ``W`` starts: ``mean``: at the mean of the classifiers that earlier stages trained: ``h_v``
            and a warm-started ``h_t``, or ``h_v`` alone in arms without a text, which then cannot lose by it. An ``h_t``
            that text has yet to teach gets a random ``W``. ``random``: always, as the reference; a control that cannot
            find its way back pays for that.
        lock_vision_head: Keep ``h_v`` as the unimodal stage left it.
        text_lora: Adapt the text tower, too; its classification loss then anchors the targets, and a collapse stops
            the run.
        text_anchor: Weight of that classification loss; without it (0) the targets are free to collapse.
        collapse_rank: Effective rank of the targets below which a run with ``text_lora`` stops.
    """

    kd_weight: float = 1.0
    kd: KdKind = "cosine"
    kd_schedule: Literal["constant", "rise", "fall"] = "constant"
    kd_temperature: float = 1.0
    kd_warmup_steps: int = 0
    warm_start_text: bool = True
    fusion_start: Literal["mean", "random"] = "mean"
    lock_vision_head: bool = False
    text_lora: LoraConfig | None = None
    text_anchor: float = 1.0
    collapse_rank: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kd_weight", "kd_warmup_steps", "text_anchor"):
            _check(getattr(self, name) >= 0, f"fuse.{name}", f"must not be negative, got {getattr(self, name)}")
        _check(self.kd_temperature > 0, "fuse.kd_temperature", f"must be positive, got {self.kd_temperature}")


@dataclass(frozen=True)
class DistillRun:
    """Where a run lies and on what it runs.

    Attributes:
        out: Folder; the command line's ``--out`` comes first.
        cache: Folder of features, embeddings and finished stages, which runs may share; None: in the run's own.
        device: ``cpu``, ``cuda`` ...
        workers: Threads that decode and prepare images; 0 is 1.
        batch_size: Images or texts per forward pass without gradients.
        log: Where else numbers go.
        ref_compat: Cross-entropy of the softmax output, as the published code computes it: only to compare with it.
    """

    out: str | None = None
    cache: str | None = None
    device: str = "cpu"
    workers: int = 2
    batch_size: int = 32
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    ref_compat: bool = False

    def __post_init__(self) -> None:
        _check(self.workers >= 0, "run.workers", f"must not be negative, got {self.workers}")
        _check(self.batch_size >= 1, "run.batch_size", f"must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class DistillRecipe:
    """A CLIP-IT run: data, pairs, backbone, heads and three stages.

    Attributes:
        name: Of the run.
        description: For readers.
        seed: Of drawn weights, held-out groups, order of batches, shuffled and random controls.
        arms: Further arms of ``--controls`` beside the standard ones (see ``distill.arms``).
        data: Images and splits.
        pairing: Reports.
        backbone: Features.
        heads: Kinds of heads.
        unimodal: Stage 1.
        text: Stage 2.
        fuse: Stage 3.
        run: Folder and machine.
    """

    name: str
    description: str = ""
    seed: int = 0
    arms: tuple[str, ...] = ()
    data: DistillData = field(default_factory=lambda: DistillData(synthetic=SyntheticConfig()))
    pairing: PairingConfig = field(default_factory=PairingConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    heads: HeadOptions = field(default_factory=HeadOptions)
    unimodal: StageConfig = field(default_factory=StageConfig)
    text: StageConfig = field(default_factory=StageConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    run: DistillRun = field(default_factory=DistillRun)

    def __post_init__(self) -> None:
        _check(bool(re.fullmatch(r"[\w.+-]+", self.name)), "name", "must be made of letters, digits and `-_.+`")
        _check(self.seed >= 0, "seed", f"must not be negative, got {self.seed}")
        given = self.backbone.encoder is not None or self.backbone.image is not None
        if self.data.synthetic is None:
            _check(
                given, "backbone.encoder", "is missing", hint="name a model, or describe a tower in `backbone.image`"
            )
        else:
            _check(not given, "backbone", "has no meaning for `data.synthetic`, whose features are made up")
            _check(self.pairing.encoder is None, "pairing.encoder", "has no meaning for `data.synthetic`")
        from chiasm.distill.arms import ARMS

        for name in self.arms:
            _check(name in ARMS, "arms", f"names `{name}`", hint=f"known: {', '.join(ARMS)}")

    @property
    def digest(self) -> str:
        """Digest of what decides the weights: everything but ``run``, ``arms``, ``description`` and where files lie."""
        values = to_mapping(self)
        for name in ("run", "description", "arms", "name"):
            values.pop(name, None)
        for name in ("source", "root"):
            values["data"].pop(name, None)
        values["ref_compat"] = self.run.ref_compat
        return digest_of(values)


def load_distill_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DistillRecipe:
    """Read and validate a recipe.

    Args:
        path: A TOML file.
        overrides: ``dotted.key=value``, as after ``--set``.

    Returns:
        The recipe with absolute paths; environment variables stand as they were written.

    Raises:
        ConfigError: Missing file, no TOML, unknown field (with the nearest name), wrong type, contradicting values.
    """
    path = Path(path)
    values = apply_overrides(read_toml(path), overrides)
    values.setdefault("name", path.stem)
    recipe = build(DistillRecipe, values)
    folder = path.resolve().parent

    def at(value: str | None) -> str | None:
        if value is not None and value.startswith("tcga:"):
            return f"tcga:{anchored(value.removeprefix('tcga:'), folder)}"
        return anchored(value, folder)

    def model(value: str | None) -> str | None:
        return at(value) if value is not None and value.startswith((".", "..")) else value

    data = replace(recipe.data, source=at(recipe.data.source), root=at(recipe.data.root))
    pairing = replace(
        recipe.pairing,
        pairs=at(recipe.pairing.pairs),
        reports=at(recipe.pairing.reports),
        encoder=model(recipe.pairing.encoder),
    )
    backbone = replace(recipe.backbone, encoder=model(recipe.backbone.encoder))
    return replace(recipe, data=data, pairing=pairing, backbone=backbone)
