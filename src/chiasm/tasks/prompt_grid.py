"""Prompts as choices: which templates and which names of a label make its ensemble, and what each choice scores.

In: labels with synonyms and templates (or any :class:`~chiasm.tasks.prompts.PromptSet`), and the embeddings of all their
texts. Out: a :class:`PromptGrid`, its vectors, and :class:`Problem` values: "of these options, which subset?", scored
without embedding anything twice.

The score of a subset equals that of ``build_classifier`` with the same texts: the cosine with the normalised mean of
unit vectors is the mean of the cosines divided by the length of the mean, which the Gram matrix of the texts gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.bootstrap import WeightStatistic
from chiasm.metrics.labels import as_binary, is_missing
from chiasm.metrics.weighted import (
    accuracy_statistic,
    auprc_statistic,
    auroc_statistic,
    balanced_accuracy_statistic,
)
from chiasm.tasks.prompts import (
    POSITIVE_TEMPLATES,
    LabelPrompts,
    PromptSet,
    choose_templates,
    fill,
    negate,
    says_normal,
)
from chiasm.tasks.zero_shot import (
    FALLBACK_LOGIT_SCALE,
    Mode,
    TextClassifier,
    build_classifier,
    check_images,
    embed_prompts,
    unit_vectors,
)
from chiasm.types import Embeddings, LabelValue

Floats = NDArray[np.float64]
Metric = Literal["auroc", "auprc", "balanced_accuracy", "accuracy"]
Truth = Mapping[str, Sequence[LabelValue]] | Sequence[str | None]
#: Axis -> chosen options of it, none empty.
Pick = tuple[frozenset[int], ...]

METRICS: dict[Mode, tuple[Metric, ...]] = {"multi": ("auroc", "auprc"), "single": ("balanced_accuracy", "accuracy")}
#: Name of the one problem of classes that exclude each other.
ALL_CLASSES = "all classes"


class Variant(NamedTuple):
    """One wording of a label: a template filled with one of its names."""

    template: str
    synonym: str
    positive: str
    negative: str | None = None


@dataclass(frozen=True)
class GridLabel:
    """The wordings of one label.

    Attributes:
        name: The label.
        variants: At least one.
        negatives: Texts against the label that all wordings share; empty where each has its own, or none is needed.
    """

    name: str
    variants: tuple[Variant, ...]
    negatives: tuple[str, ...] = ()

    @property
    def templates(self) -> tuple[str, ...]:
        """Distinct templates, in order."""
        return tuple(dict.fromkeys(v.template for v in self.variants))

    @property
    def synonyms(self) -> tuple[str, ...]:
        """Distinct names, in order."""
        return tuple(dict.fromkeys(v.synonym for v in self.variants))

    def select(self, templates: Sequence[str], synonyms: Sequence[str]) -> LabelPrompts:
        """Return the prompts of the wordings that have one of these templates and one of these names."""
        kept = [v for v in self.variants if v.template in templates and v.synonym in synonyms]
        own = tuple(dict.fromkeys(v.negative for v in kept if v.negative is not None))
        return LabelPrompts(self.name, tuple(dict.fromkeys(v.positive for v in kept)), own or self.negatives)


@dataclass(frozen=True)
class PromptGrid:
    """All wordings of all labels.

    Attributes:
        labels: At least one.
    """

    labels: tuple[GridLabel, ...]

    @classmethod
    def from_templates(
        cls,
        names: Sequence[str] | Mapping[str, str | Sequence[str]],
        templates: str | Sequence[str] | None = None,
        *,
        pairs: bool = False,
    ) -> Self:
        """Cross names with templates.

        Args:
            names: Labels, or labels with their synonyms.
            templates: As :func:`~chiasm.tasks.prompts.choose_templates`; None: ``general``, with ``pairs`` the built-in
                positive ones.
            pairs: Give every wording its negation. A label that says "nothing is there" gets prompts of its own.
        """
        used = choose_templates(templates if templates is not None else POSITIVE_TEMPLATES if pairs else "general")
        made = PromptSet.from_pairs(names, used) if pairs else None
        plain = PromptSet.from_classnames(names if isinstance(names, Mapping) else {n: (n,) for n in names}, used)
        found = []
        for number, label in enumerate(plain.labels):
            if made is not None and says_normal(label.name):
                found.append(_own_words(made.labels[number]))
                continue
            given = names[label.name] if isinstance(names, Mapping) else label.name
            spoken = dict.fromkeys([given] if isinstance(given, str) else given)
            variants = tuple(
                Variant(t, s, fill(t, s), fill(_negated(t), s) if pairs else None) for s in spoken for t in used
            )
            found.append(GridLabel(label.name, variants))
        return cls(tuple(found))

    @classmethod
    def from_prompts(cls, prompts: PromptSet) -> Self:
        """Take every text of a prompt set as a wording of its own; equal numbers of both sides are pairs, in order.

        Raises:
            InputError: A label has ways that exclude each other (``any_of``), which are no ensemble to choose from.
        """
        if any(label.any_of for label in prompts.labels):
            raise InputError(
                "prompts with `any_of` cannot be taken apart", hint="name the sides as labels of their own"
            )
        return cls(tuple(_own_words(label) for label in prompts.labels))

    @property
    def names(self) -> tuple[str, ...]:
        """The labels."""
        return tuple(label.name for label in self.labels)

    def prompts(self, chosen: Mapping[str, tuple[Sequence[str], Sequence[str]]] | None = None) -> PromptSet:
        """Return the prompts of a choice: label -> its templates and its names; None or a missing label: all."""
        labels = []
        for label in self.labels:
            templates, synonyms = (chosen or {}).get(label.name, (label.templates, label.synonyms))
            labels.append(label.select(templates, synonyms))
        return PromptSet(tuple(labels))

    def embed(self, embed_text: Callable[[list[str]], Embeddings]) -> GridVectors:
        """Return the grid with the vectors of all its texts, each embedded once."""
        texts = self.prompts().texts()
        return GridVectors(self, tuple(texts), embed_prompts(texts, embed_text))


@dataclass(frozen=True)
class GridVectors:
    """A grid and the embeddings of its texts.

    Attributes:
        grid: The wordings.
        texts: Every distinct text.
        embeddings: One row a text.
    """

    grid: PromptGrid
    texts: tuple[str, ...]
    embeddings: Embeddings

    @cached_property
    def row(self) -> dict[str, int]:
        """Text -> its row."""
        return {text: k for k, text in enumerate(self.texts)}

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """Unit rows (texts, dim)."""
        return unit_vectors(self.embeddings, "prompt")

    @cached_property
    def gram(self) -> Floats:
        """Cosines between the texts."""
        vectors = self.vectors.astype(np.float64)
        return vectors @ vectors.T

    def classifier(self, prompts: PromptSet | None = None) -> TextClassifier:
        """Return the classifier of prompts whose texts are all in the grid; None: the plain ensemble of all."""
        return build_classifier(
            prompts or self.grid.prompts(), lambda texts: self.embeddings.select([self.row[t] for t in texts])
        )


@dataclass(frozen=True)
class Axis:
    """Options of which any subset but the empty one can be chosen.

    Attributes:
        kind: ``template`` or ``synonym``.
        options: Their texts.
        label: Whose options they are; empty where all classes share them.
    """

    kind: Literal["template", "synonym"]
    options: tuple[str, ...]
    label: str = ""


class Problem:
    """One choice of options and its score: a label told from its absence, or classes told from each other.

    Args:
        name: The label, or :data:`ALL_CLASSES`.
        labels: The labels that the score compares: one, or all classes.
        axes: What can be chosen.
        vectors: The texts.
        cosines: Images with texts, (n, texts).
    """

    def __init__(
        self, name: str, labels: Sequence[GridLabel], axes: Sequence[Axis], vectors: GridVectors, cosines: Floats
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self.axes = tuple(axes)
        self._vectors = vectors
        self._cosines = cosines
        scale = vectors.embeddings.logit_scale
        self.logit_scale = FALLBACK_LOGIT_SCALE if scale is None else scale

    @property
    def everything(self) -> Pick:
        """The plain ensemble."""
        return tuple(frozenset(range(len(axis.options))) for axis in self.axes)

    @property
    def size(self) -> int:
        """How many choices there are."""
        return math.prod(2 ** len(axis.options) - 1 for axis in self.axes)

    def chosen(self, pick: Pick) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Return a pick as label -> its templates and its names."""
        found = {}
        for label in self.labels:
            parts = {"template": label.templates, "synonym": label.synonyms}
            for axis, options in zip(self.axes, pick, strict=True):
                if axis.label in ("", label.name):
                    parts[axis.kind] = tuple(axis.options[k] for k in sorted(options))
            found[label.name] = (parts["template"], parts["synonym"])
        return found

    def scores(self, pick: Pick) -> Floats:
        """Return (n, labels): cosines, less those with the negative texts where there are some, of the ensemble."""
        columns = []
        for label in self.labels:
            prompts = label.select(*self.chosen(pick)[label.name])
            column = self._cosine(prompts.positive)
            columns.append(column - self._cosine(prompts.negative) if prompts.negative else column)
        return np.stack(columns, axis=1)

    def answers(self, pick: Pick) -> Floats:
        """Return what a metric compares with the truth: (n,) scores of a label, or (n,) numbers of classes."""
        scores = self.scores(pick)
        return scores[:, 0] if len(self.labels) == 1 else scores.argmax(1).astype(np.float64)

    def _cosine(self, texts: Sequence[str]) -> Floats:
        rows = [self._vectors.row[t] for t in texts]
        length = math.sqrt(max(float(self._vectors.gram[np.ix_(rows, rows)].mean()), 0.0))
        if length < 1e-6:
            raise InputError(f"the prompts of label `{self.name}` cancel out")
        mean: Floats = self._cosines[:, rows].mean(1) / length
        return mean


def make_problems(images: Embeddings, vectors: GridVectors, *, mode: Mode) -> tuple[Problem, ...]:
    """Return one problem a label (``multi``), or one of all classes (``single``).

    Raises:
        SpaceMismatch: Images and texts come from two spaces.
        InputError: One class only in ``single``, or vectors that are damaged.
    """
    check_images(images, vectors.embeddings.space)
    cosines = unit_vectors(images, "image").astype(np.float64) @ vectors.vectors.astype(np.float64).T
    labels = vectors.grid.labels
    if mode == "multi":
        return tuple(
            Problem(
                label.name,
                [label],
                [Axis("template", label.templates), Axis("synonym", label.synonyms)],
                vectors,
                cosines,
            )
            for label in labels
        )
    if len(labels) < 2:
        raise InputError("one class alone cannot be told from others", hint="name two classes, or use --multi")
    stripped = [GridLabel(x.name, tuple(v._replace(negative=None) for v in x.variants)) for x in labels]
    shared = len({label.templates for label in stripped}) == 1
    axes = (
        [Axis("template", stripped[0].templates)]
        if shared
        else [Axis("template", x.templates, x.name) for x in stripped]
    )
    axes += [Axis("synonym", x.synonyms, x.name) for x in stripped if len(x.synonyms) > 1]
    return (Problem(ALL_CLASSES, stripped, axes, vectors, cosines),)


def truth_of(problem: Problem, truth: Truth, rows: int) -> Floats:
    """Return the truth of a problem: (n,) of 0, 1, NaN for a label, of class numbers or NaN for classes.

    Raises:
        InputError: A label has no truth, lengths differ, or a class is unknown.
    """
    if len(problem.labels) == 1:
        if not isinstance(truth, Mapping):
            found = np.array([np.nan if is_missing(v) else float(v == problem.name) for v in truth])
        elif problem.name not in truth:
            raise InputError(f"label `{problem.name}` has no truth", hint="one column of 0 and 1 for each label")
        else:
            found = as_binary(list(truth[problem.name]))
    else:
        names = [label.name for label in problem.labels]
        if isinstance(truth, Mapping):
            raise InputError("classes that exclude each other need one column of class names", hint="or use --multi")
        unknown = {v for v in truth if not is_missing(v)} - set(names)
        if unknown:
            raise InputError(
                f"{len(unknown)} classes of the truth are none of the labels", hint=f"labels: {', '.join(names)}"
            )
        found = np.array([np.nan if is_missing(v) else float(names.index(str(v))) for v in truth])
    if len(found) != rows:
        raise InputError(f"there are {len(found)} truth values for {rows} images")
    return found


def statistic_of(metric: Metric, truth: Floats, answers: Floats) -> WeightStatistic:
    """Return a metric as a function of row weights; rows without a label count nothing."""
    if metric == "auroc":
        return auroc_statistic(truth, answers)
    if metric == "auprc":
        return auprc_statistic(truth, answers)
    known = [None if np.isnan(v) else int(v) for v in truth]
    make = balanced_accuracy_statistic if metric == "balanced_accuracy" else accuracy_statistic
    return make(known, [int(v) for v in answers])


def chance_of(metric: Metric, truth: Floats) -> float:
    """Return what guessing gives."""
    known = truth[~np.isnan(truth)]
    if metric in ("auroc", "auprc"):
        return 0.5 if metric == "auroc" or not len(known) else float(known.mean())
    return 1.0 / max(1, len(np.unique(known)))


def majority_of(metric: Metric, truth: Floats) -> float | None:
    """Return what always saying the most frequent class gives; None for metrics of ranks, where it is chance."""
    known = truth[~np.isnan(truth)].astype(int)
    if metric == "accuracy" and len(known):
        return float(np.bincount(known).max() / len(known))
    return None


def _negated(template: str) -> str:
    from chiasm.tasks.prompts import NEGATIVE_TEMPLATES

    built_in = dict(zip(POSITIVE_TEMPLATES, NEGATIVE_TEMPLATES, strict=True))
    return built_in.get(template, negate(template))


def _own_words(label: LabelPrompts) -> GridLabel:
    if len(label.positive) == len(label.negative):
        variants = tuple(Variant(p, label.name, p, n) for p, n in zip(label.positive, label.negative, strict=True))
        return GridLabel(label.name, variants)
    return GridLabel(label.name, tuple(Variant(p, label.name, p) for p in label.positive), label.negative)
