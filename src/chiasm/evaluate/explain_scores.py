"""Every heat-map method on a set of images with boxes: one table of methods by measures, beside what knows nothing.

Comes in: an encoder and cases (an image, what to look for, where it lies). Goes out: for every method the pointing game,
overlap and contrast (:mod:`chiasm.evaluate.map_scores`), deletion and insertion against a random order, and whether the
map depends on the weights at all. A bump in the middle of the picture is scored like a method, and every method's
pointing game is compared with it, in pairs. Intervals are over patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.evaluate.map_scores import PointingScores, score_pointing
from chiasm.metrics.bootstrap import Comparison, paired_difference, weighted_interval
from chiasm.metrics.localization import box_mask, pointing_game
from chiasm.metrics.weighted import mean_statistic
from chiasm.progress import Progress, SilentProgress
from chiasm.types import Box, Interval, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder
    from chiasm.explain.curves import Curves
    from chiasm.explain.fidelity import FidelityReport
    from chiasm.explain.heatmap import HeatMap
    from chiasm.tasks.prompts import PromptSet

#: A finding is large when its boxes cover at least this share of the image.
LARGE = 0.04
#: Images of the check with shuffled weights, and shufflings.
CHECKED, SEEDS = 12, (0, 1)


@dataclass(frozen=True)
class Case:
    """One finding of one image.

    Attributes:
        open: Gives the image.
        label: Of the finding.
        texts: What to look for, an ensemble.
        against: Texts that say the opposite; empty: none.
        boxes: Where it lies, in pixels of the image.
        group: Patient.
    """

    open: Callable[[], Image]
    label: str
    texts: tuple[str, ...]
    against: tuple[str, ...]
    boxes: tuple[Box, ...]
    group: str


@dataclass(frozen=True)
class MethodScores:
    """One method on all cases.

    Attributes:
        method: Its name; ``centre`` is the bump in the middle.
        all: On every case.
        large: On cases whose boxes cover at least :data:`LARGE` of the image; None where there are none.
        gain: Its pointing game less that of ``centre``, in pairs; None for ``centre`` itself.
        gain_large: The same on large findings.
        deletion: Area of the random order less that of the method: positive where the score falls earlier than by
            chance. None without curves.
        insertion: Area of the method less that of the random order: positive is better.
        curves: Mean curves, for the figure.
        fidelity: Whether the maps change when the weights are shuffled; None where it was not asked or has no meaning.
    """

    method: str
    all: PointingScores
    large: PointingScores | None
    gain: Comparison | None
    gain_large: Comparison | None
    deletion: Interval | None = None
    insertion: Interval | None = None
    curves: Curves | None = None
    fidelity: FidelityReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""

        def compared(value: Comparison | None) -> dict[str, Any] | None:
            if value is None:
                return None
            p = value.p_value
            return {"difference": value.difference.to_dict(), "p_value": None if np.isnan(p) else float(p)}

        return {
            **self.all.to_dict(),
            "method": self.method,
            "large": None if self.large is None else self.large.to_dict(),
            "gain_over_centre": compared(self.gain),
            "gain_over_centre_large": compared(self.gain_large),
            "deletion_gain": None if self.deletion is None else self.deletion.to_dict(),
            "insertion_gain": None if self.insertion is None else self.insertion.to_dict(),
            "curves": None if self.curves is None else self.curves.to_dict(),
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
        }


@dataclass(frozen=True)
class ExplainScores:
    """All methods on all cases.

    Attributes:
        methods: In the order that was asked for; ``centre`` is last.
        n: Cases.
        n_large: Those with large boxes.
        n_patients: Groups.
        labels: Label -> cases.
        large_from: What counts as large, as a share of the image.
        random_curves: The order that knows nothing; None without curves.
    """

    methods: tuple[MethodScores, ...]
    n: int
    n_large: int
    n_patients: int
    labels: Mapping[str, int]
    large_from: float
    random_curves: Curves | None = None

    def of(self, method: str) -> MethodScores:
        """Return the scores of one method."""
        for scores in self.methods:
            if scores.method == method:
                return scores
        raise InputError(f"`{method}` was not scored", hint=f"scored: {', '.join(m.method for m in self.methods)}")

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of text: method, pointing game of all and of large findings, over centre, IoU, contrast, curves."""
        rows: list[tuple[str, ...]] = []
        for m in self.methods:
            rows.append((
                m.method,
                str(m.all.pointing_game),
                "-" if m.large is None else str(m.large.pointing_game),
                "-" if m.gain is None else _signed(m.gain.difference),
                str(m.all.iou),
                str(m.all.contrast_to_noise),
                "-" if m.deletion is None else _signed(m.deletion),
                "-" if m.insertion is None else _signed(m.insertion),
                "-" if m.fidelity is None else f"{m.fidelity.mean_rank_correlation:.2f}",
            ))  # fmt: skip
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "n": self.n,
            "n_large": self.n_large,
            "n_patients": self.n_patients,
            "labels": dict(self.labels),
            "large_from": self.large_from,
            "methods": {m.method: m.to_dict() for m in self.methods},
            "random_curves": None if self.random_curves is None else self.random_curves.to_dict(),
        }


#: Heads of :meth:`ExplainScores.table`.
COLUMNS = (
    "method", "pointing game", "large findings", "over centre", "IoU", "contrast", "deletion", "insertion", "shuffled",
)  # fmt: skip


def cases_of(
    samples: Sequence[Sample], prompts: PromptSet, *, limit: int | None = None, seed: int = 0
) -> tuple[tuple[Case, ...], Mapping[str, int]]:
    """Return the cases of a table, and how many boxes have a label that the prompts do not name.

    Args:
        samples: With images and boxes.
        prompts: One label per kind of box; names are compared without case, spaces and underscores.
        limit: At most this many, drawn at random but as many of each label as there are.
        seed: Of the draw.

    Raises:
        InputError: No box has a label of the prompts.
    """
    from chiasm.datasets.images import open_sample_image

    known = {_folded(label.name): label for label in prompts.labels}
    found: list[Case] = []
    unknown: dict[str, int] = {}
    for sample in samples:
        by_label: dict[str, list[Box]] = {}
        for box in sample.boxes:
            if _folded(box.label) in known:
                by_label.setdefault(_folded(box.label), []).append(box)
            else:
                unknown[box.label] = unknown.get(box.label, 0) + 1
        for name, boxes in by_label.items() if sample.image is not None else ():
            label = known[name]
            found.append(
                Case(
                    lambda sample=sample: open_sample_image(sample),  # type: ignore[misc]
                    label.name,
                    label.positive,
                    label.negative,
                    tuple(boxes),
                    sample.group,
                )
            )
    if not found:
        raise InputError(
            "no image has a box with a label of the prompts",
            hint="boxes.json beside the table holds the boxes; --labels-file names its labels",
        )
    if limit is not None and len(found) > limit:
        found = [found[i] for i in _drawn([c.label for c in found], limit, seed)]
    return tuple(found), unknown


def score_methods(
    encoder: Encoder,
    cases: Sequence[Case],
    *,
    methods: Sequence[str] | Literal["all"] = "all",
    curves: bool = False,
    fidelity: bool = False,
    large_from: float = LARGE,
    steps: int = 20,
    fill: Literal["blur", "mean"] = "blur",
    n_resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExplainScores:
    """Score methods on cases.

    Args:
        encoder: Draws the maps.
        cases: From :func:`cases_of`, or made by hand.
        methods: Names, or ``all`` that the encoder's towers can serve.
        curves: Whether to draw deletion and insertion curves: 2 · (steps + 1) passes a map.
        fidelity: Whether to draw maps of shuffled weights, of a few cases.
        large_from: Share of the image from which boxes count as large.
        steps: Of the curves.
        fill: Of the curves.
        n_resamples: Of every interval.
        seed: Of the intervals, random order and ties.
        progress: Told about every method.

    Raises:
        InputError: No cases, or a method that the towers cannot serve.
    """
    from chiasm.explain.methods import choose_method, methods_for

    if not cases:
        raise InputError("there is no image with a box to score on")
    names = methods_for(encoder) if methods == "all" else tuple(choose_method(encoder, cast(Any, m)) for m in methods)
    runner = _Runner(encoder, cases, large_from, n_resamples, seed, progress or SilentProgress())
    random_curves = runner.curves("random", steps, fill) if curves else None
    found = []
    for name in (*dict.fromkeys(names), "centre"):
        heats = runner.maps(name)
        drawn = runner.curves("centre" if name == "centre" else heats, steps, fill) if curves else None
        report = runner.fidelity(name) if fidelity else None
        found.append(runner.score(name, heats, drawn, random_curves, report))
    return ExplainScores(
        tuple(found),
        len(cases),
        int(runner.large.sum()),
        len({c.group for c in cases}),
        {label: sum(c.label == label for c in cases) for label in dict.fromkeys(c.label for c in cases)},
        large_from,
        random_curves,
    )


class _Runner:
    """The cases with what all methods share: opened images, sizes, the hits of the centre."""

    def __init__(
        self,
        encoder: Encoder,
        cases: Sequence[Case],
        large_from: float,
        n_resamples: int,
        seed: int,
        progress: Progress,
    ) -> None:
        from chiasm.explain.priors import centre_map

        self.encoder, self.cases, self.progress = encoder, cases, progress
        self.images = [case.open() for case in cases]
        self.groups = [case.group for case in cases]
        self.options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
        self.large = np.array([
            float(box_mask(c.boxes, i.height, i.width).mean()) >= large_from
            for c, i in zip(cases, self.images, strict=True)
        ])  # fmt: skip
        self.centre = [centre_map(i.size, text=c.label) for c, i in zip(cases, self.images, strict=True)]
        self.centre_hits = self.hits(self.centre)

    def maps(self, method: str) -> list[HeatMap]:
        """Draw the maps of one method; set against the opposite where the method can and the case has one."""
        if method == "centre":
            return self.centre
        from chiasm.explain.methods import explain_batch

        plain = method == "gloria"
        return list(
            explain_batch(
                self.encoder,
                self.images,
                [c.texts for c in self.cases],
                method=cast(Any, method),
                against=None if plain else [c.against for c in self.cases],
                progress=self.progress,
            )
        )

    def hits(self, heats: Sequence[HeatMap]) -> NDArray[np.float64]:
        return np.array([pointing_game(h.to_image_size(), c.boxes) for h, c in zip(heats, self.cases, strict=True)])

    def curves(self, orders: list[HeatMap] | Literal["random", "centre"], steps: int, fill: Any) -> Curves:
        from chiasm.explain.curves import deletion_insertion

        return deletion_insertion(
            self.encoder,
            self.images,
            [c.texts for c in self.cases],
            orders,
            against=[c.against for c in self.cases],
            steps=steps,
            fill=fill,
            seed=self.options["seed"],
            progress=self.progress,
        )

    def fidelity(self, method: str) -> FidelityReport | None:
        """Compare with shuffled weights on a few cases; ``centre`` has no weights, ``gloria`` a text side of its own."""
        if method in ("centre", "gloria"):
            return None
        from chiasm.explain.fidelity import randomisation_check

        rows = _drawn([c.label for c in self.cases], min(CHECKED, len(self.cases)), self.options["seed"])
        return randomisation_check(
            self.encoder,
            [self.images[i] for i in rows],
            [self.cases[i].texts for i in rows],
            method=cast(Any, method),
            seeds=SEEDS,
        )

    def score(
        self,
        method: str,
        heats: list[HeatMap],
        curves: Curves | None,
        random_curves: Curves | None,
        fidelity: FidelityReport | None,
    ) -> MethodScores:
        rows = np.flatnonzero(self.large)
        hits = self.centre_hits if method == "centre" else self.hits(heats)
        everything = np.arange(len(self.cases))
        deletion = insertion = None
        if curves is not None and random_curves is not None:
            deletion = self._mean(random_curves.deletion_area - curves.deletion_area)
            insertion = self._mean(curves.insertion_area - random_curves.insertion_area)
        return MethodScores(
            method,
            self._pointing(heats, everything),
            self._pointing(heats, rows) if len(rows) else None,
            None if method == "centre" else self._gain(hits, everything),
            None if method == "centre" or not len(rows) else self._gain(hits, rows),
            deletion,
            insertion,
            curves,
            fidelity,
        )

    def _pointing(self, heats: list[HeatMap], rows: NDArray[np.intp]) -> PointingScores:
        kept = rows.tolist()
        return score_pointing(
            [heats[i] for i in kept],
            [self.cases[i].boxes for i in kept],
            labels=[self.cases[i].label for i in kept],
            groups=[self.groups[i] for i in kept],
            **self.options,
        )

    def _gain(self, hits: NDArray[np.float64], rows: NDArray[np.intp]) -> Comparison:
        return paired_difference(
            mean_statistic(hits[rows]),
            mean_statistic(self.centre_hits[rows]),
            [self.groups[i] for i in rows.tolist()],
            **self.options,
        )

    def _mean(self, values: NDArray[np.float64]) -> Interval:
        return weighted_interval(mean_statistic(values), self.groups, chance=0.0, **self.options)


def _signed(number: Interval) -> str:
    text = f"{number.value:+.3f}"
    if np.isfinite(number.low) and np.isfinite(number.high):
        text += f" [{number.low:+.3f}, {number.high:+.3f}]"
    return text


def _folded(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").split())


def _drawn(labels: Sequence[str], limit: int, seed: int) -> list[int]:
    """Return about equally many rows of every label, in their order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels)).tolist()
    turn: dict[str, int] = {}
    rank = {}
    for i in order:
        turn[labels[i]] = turn.get(labels[i], 0) + 1
        rank[i] = turn[labels[i]]
    chosen = sorted(order, key=lambda i: rank[i])[:limit]
    return sorted(chosen)
