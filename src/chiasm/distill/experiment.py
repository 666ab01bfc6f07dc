"""What all seeds and arms of a recipe share: images, backbone, reports; and for each seed its problem and its texts.

Comes in: a recipe and a cache. Goes out: :class:`SeedSetup`, of which ``distill.stages`` trains any arm. Everything
that is slow (decoding, features, text vectors) is done once and kept in the cache; a seed's setup is a function of
recipe and seed, whatever was done before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from chiasm.config import to_mapping
from chiasm.distill.arms import ARMS, Arm
from chiasm.distill.backbone import Backbone, ImagePool, PoolPixels, chosen_augment, open_backbone
from chiasm.distill.data import Division, LabelledImages, data_notes, divide, open_images
from chiasm.distill.problem import Problem, Rows
from chiasm.distill.recipe import DistillRecipe
from chiasm.distill.results import StageResult, trained_tower
from chiasm.distill.synthetic import make_synthetic
from chiasm.distill.targets import TextSources
from chiasm.distill.text_targets import text_sources
from chiasm.distill.text_tower import RowTexts, TextTower
from chiasm.distill.texts import Retriever, TextMaterial, open_corpus, open_texts
from chiasm.encoders.adapters import check_lora
from chiasm.errors import ConfigError
from chiasm.io.manifest import Rejected, count_reasons
from chiasm.progress import Progress
from chiasm.types import digest_of

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder

#: Why an arm cannot be run, by the kind of its targets.
_ABSENT = {
    "own": "the images have no text of their own",
    "prompts": "the classes have no sentence: name some in `pairing.prompts`",
    "label": "the classes have no sentence: name some in `pairing.prompts`",
}


@dataclass(frozen=True)
class SeedSetup:
    """Everything that the arms of one seed share.

    Attributes:
        seed: Of the run.
        problem: Rows; features are absent while the tower still has to be trained.
        sources: Texts of all arms.
        text_dim: Of these.
        backbone: Tower as it is before the unimodal stage; None where there are only features.
        division: Which images are on which side; None for made-up data.
        notes: What every output must say.
        facts: Counts and digests for ``data.json``.
        pool: For features of a tower that was trained.
        row_texts: The texts themselves, by kind of target.
        encoder: Whose text side is adapted, with ``fuse.text_lora``; None otherwise.
        test_content: Digest of what the test images show; empty for made-up data, which ``problem.digest`` tells.
    """

    seed: int
    problem: Problem
    sources: TextSources
    text_dim: int
    backbone: Backbone | None = None
    division: Division | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    pool: ImagePool | None = None
    row_texts: Mapping[str, RowTexts] = field(default_factory=dict)
    encoder: Encoder | None = None
    test_content: str = ""

    def text_tower(self, arm: Arm) -> nn.Module | None:
        """Return the text tower that an arm adapts, with ``fuse.text_lora``; None where texts stay as they are."""
        if self.encoder is None or arm.targets == "none":
            return None
        texts = self.row_texts["pairs" if arm.targets == "shuffled" else arm.targets]
        return TextTower(self.encoder, texts.dealt_out(self.seed) if arm.targets == "shuffled" else texts)

    @property
    def tower(self) -> nn.Module | None:
        """The tower as it is before the unimodal stage."""
        return None if self.backbone is None else self.backbone.tower

    def locked(self, unimodal: StageResult) -> SeedSetup:
        """Return the setup for later stages: with the features of the tower as the unimodal stage left it."""
        if unimodal.trained != "full" or self.backbone is None or self.pool is None or self.division is None:
            return self
        trained = self.backbone.with_tower(trained_tower(unimodal, self.backbone.tower))
        problem = replace(
            _with_features(self.problem, self.pool, trained, self.division),
            digest=digest_of([self.problem.digest, trained.digest], 24),
        )
        return replace(self, problem=problem)

    def impossible(self, arm: Arm | str) -> str | None:
        """Return why an arm cannot be run on these data; None when it can."""
        arm = ARMS[arm] if isinstance(arm, str) else arm
        kind = "pairs" if arm.targets in ("shuffled", "random") else arm.targets
        if kind == "none":
            return None
        found = self.sources.given.get(kind)
        if found is None:
            return _ABSENT.get(kind, "there is no text")
        if not found.train_mask.any():
            return "no training image has such a text"
        if arm.targets == "random" and self.sources.train_reports is None:
            return "it is not known which report is paired with which image"
        if self.encoder is not None and (kind not in self.row_texts or arm.targets == "random"):
            return "`fuse.text_lora` has no such text to adapt"
        return None


class Experiment:
    """A recipe with its images, backbone and reports.

    Args:
        recipe: The recipe.
        cache: Folder of features, vectors and finished stages.
        progress: Told of everything that takes long.
    """

    def __init__(self, recipe: DistillRecipe, *, cache: Path, progress: Progress | None = None) -> None:
        self.recipe = recipe
        self.cache = cache
        self.progress = progress
        self.features = cache / "features"
        chosen_augment(recipe.backbone)  # a typo is told before anything is read

    @property
    def is_synthetic(self) -> bool:
        """Whether features are made up and there is no image."""
        return self.recipe.data.synthetic is not None

    @cached_property
    def images(self) -> LabelledImages:
        """The images; decoded once to see that they can be."""
        return open_images(
            self.recipe.data, progress=self.progress, cache=self.features, workers=self.recipe.run.workers
        )

    @cached_property
    def pool(self) -> ImagePool:
        """The images, ready for any tower."""
        run = self.recipe.run
        return ImagePool(
            self.images.table, folder=self.features, batch_size=run.batch_size, progress=self.progress,
            workers=run.workers,
        )  # fmt: skip

    @cached_property
    def retriever(self) -> Retriever | None:
        """The CLIP that pairs; None where pairs lie on disk and no encoder is named."""
        run, pairing = self.recipe.run, self.recipe.pairing
        if pairing.pairs is not None and pairing.encoder is None:
            return None
        return Retriever(
            self.recipe.pairing, self.pool, device=run.device, batch_size=run.batch_size, progress=self.progress
        )

    @cached_property
    def material(self) -> TextMaterial:
        """All texts as vectors."""
        corpus = None if self.recipe.pairing.pairs is not None else open_corpus(self.recipe, progress=self.progress)
        return open_texts(self.recipe, self.images, self.retriever, corpus=corpus)

    @cached_property
    def _loaded(self) -> Backbone:
        return open_backbone(self.recipe.backbone, seed=self.recipe.seed, device=self.recipe.run.device)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Rows of the source that cannot be used."""
        return () if self.is_synthetic else self.images.rejected

    def backbone(self, seed: int) -> Backbone:
        """Return the tower that a seed starts from: the loaded one, or one drawn with the seed."""
        if self.recipe.backbone.image is None:
            return self._loaded
        return open_backbone(self.recipe.backbone, seed=seed, device=self.recipe.run.device)

    def prepare(self, seed: int) -> SeedSetup:
        """Return the problem and the texts of one seed.

        Raises:
            ChiasmError: Data, models or reports that cannot be used; see the parts.
        """
        recipe = self.recipe
        if recipe.data.synthetic is not None:
            return self._synthetic(seed)
        images, data = self.images, recipe.data
        division = divide(images, data, seed=seed, cache=self.features)
        backbone = self.backbone(seed)
        if recipe.backbone.lora is not None:
            check_lora(backbone.tower, recipe.backbone.lora)  # a typo is told now, not after the unimodal stage
        problem = self._problem(division, backbone)
        if recipe.backbone.unimodal != "full":
            problem = _with_features(problem, self.pool, backbone, division)
        texts = text_sources(recipe, self.material, self.retriever, division, images, pool=self.pool)
        facts = {
            "source": images.name,
            "label": images.label,
            "classes": list(images.classes),
            **division.facts,
            "rejected": count_reasons(images.rejected),
            "left_out": dict(images.left_out),
            "backbone": {"name": backbone.name, "width": backbone.width, "digest": backbone.digest},
            "texts": {**self.material.facts, **texts.facts},
            "digest": problem.digest,
        }
        notes = (*data_notes(images, division, data), *_text_notes({**self.material.facts, **texts.facts}))
        notes = (*notes, *_shared_patients(self.material, problem))
        if not len(division.validation):
            notes = (*notes, "nothing is held out for validation: the last weights of each stage are kept")
        encoder = None
        if recipe.fuse.text_lora is not None:
            if self.retriever is None or "pairs" not in texts.row_texts:
                raise ConfigError("`fuse.text_lora` needs the reports themselves", hint="name `pairing.reports`")
            encoder = self.retriever.encoder
        return SeedSetup(
            seed, problem, texts.sources, texts.sources.given["pairs"].dim, backbone, division, notes, facts, self.pool,
            texts.row_texts, encoder, digest_of(self._contents(division, "test"), 24),
        )  # fmt: skip

    def _synthetic(self, seed: int) -> SeedSetup:
        recipe = self.recipe
        assert recipe.data.synthetic is not None
        if recipe.backbone.unimodal == "full" or recipe.backbone.lora is not None:
            raise ConfigError("`backbone` has a tower to train, but `data.synthetic` has no images")
        if recipe.fuse.text_lora is not None:
            raise ConfigError("`fuse.text_lora` has no text to adapt: those of `data.synthetic` are made-up vectors")
        problem, sources = make_synthetic(recipe.data.synthetic, seed=seed)
        config = recipe.data.synthetic
        notes = (
            "SYNTHETIC: features and reports are made up so that text is privileged by construction; "
            f"{config.flip:.0%} of the labels of training and validation were redrawn at random, test labels are clean",
        )
        facts = {
            "source": "synthetic",
            "classes": list(problem.classes),
            **{
                side: {"images": len(rows), "groups": len(set(rows.groups))}
                for side, rows in (("train", problem.train), ("validation", problem.validation), ("test", problem.test))
            },
            "synthetic": to_mapping(config),
            "digest": problem.digest,
        }
        return SeedSetup(seed, problem, sources, sources.given["pairs"].dim, notes=notes, facts=facts)

    def _problem(self, division: Division, backbone: Backbone) -> Problem:
        """Return the problem without features; pixels of all rows are made by one source, decoded at most once."""
        images, recipe = self.images, self.recipe
        pixels = self.pool.pixels(backbone, chosen_augment(recipe.backbone))
        return Problem(
            classes=images.classes,
            train=self._rows(division.train, division, pixels),
            validation=self._rows(division.validation, division, pixels),
            test=self._rows(division.test, division, pixels),
            digest=digest_of(
                [division.digest, backbone.digest, to_mapping(backbone.preprocess), self._contents(division)], 24
            ),
            shared_groups=recipe.data.leakage in ("warn", "off"),
        )

    def _contents(self, division: Division, *sides: str) -> list[str]:
        """Return the digests of the images of some sides, of all that decide weights unless they are named."""
        contents = self.pool.contents
        return [contents[r] for side in sides or ("train", "validation") for r in getattr(division, side)]

    def _rows(self, rows: NDArray[np.int64], division: Division, pixels: PoolPixels) -> Rows:
        samples = self.images.table.samples
        return Rows(
            tuple(samples[r].id for r in rows),
            tuple(samples[r].group for r in rows),
            division.labels[rows],
            pixels=_RowPixels(pixels, rows),
        )


class _RowPixels:
    """Pixels of the rows of one side."""

    def __init__(self, pixels: PoolPixels, rows: NDArray[np.int64]) -> None:
        self.pixels = pixels
        self.rows = rows

    def __call__(self, rows: NDArray[np.int64], rng: np.random.Generator | None) -> Any:
        return self.pixels(self.rows[rows], rng)


def _text_notes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return notes about a corpus that was not read whole, images without a report, and one report for all."""
    notes = []
    rejected = facts.get("corpus", {}).get("rejected", {})
    if rejected:
        notes.append("reports left out: " + ", ".join(f"{n} {reason}" for reason, n in rejected.items()))
    if facts["without_report"]:
        notes.append(
            f"{facts['without_report']} of {facts['without_report'] + facts['paired']} images of training and validation "
            "have no report near enough, so no text teaches them"
        )
    if facts["reports_used"] == 1 and facts["paired"] > 1:
        notes.append(
            f"all {facts['paired']} paired images have one and the same report: it can teach nothing, and shuffling changes "
            "nothing; look at the page of `chiasm pairing`"
        )
    return tuple(notes)


def _shared_patients(material: TextMaterial, problem: Problem) -> tuple[str, ...]:
    """Return a note where reports are of the very patients whose images are used: those pairs came with the data."""
    notes = []
    for side, rows in (("training", problem.train), ("validation", problem.validation), ("test", problem.test)):
        groups = set(rows.groups)
        n = sum(p in groups for p in material.patients)
        if n:
            notes.append(f"{n} reports of the corpus are of patients whose images are used for {side}")
    return tuple(notes)


def _with_features(problem: Problem, pool: ImagePool, backbone: Backbone, division: Division) -> Problem:
    """Return the problem with a tower's features; those of training and validation are made as one list of rows.

    That list is the same for all seeds unless images are left out, so the files are the same, too.
    """
    both = np.sort(np.concatenate([division.train, division.validation]))
    made = pool.features(backbone, both)
    test = pool.features(backbone, division.test)
    sides = {
        "train": made[np.searchsorted(both, division.train)],
        "validation": made[np.searchsorted(both, division.validation)],
        "test": test,
    }
    return replace(
        problem,
        **{side: dataclasses.replace(getattr(problem, side), features=values) for side, values in sides.items()},
    )
