"""Retrieval scores to a page: what was found in each direction, beside chance and one ranking for all queries.

Patients' pictures and texts appear only where examples were asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from chiasm.errors import ChiasmError
from chiasm.evaluate.figures import interval_dots
from chiasm.evaluate.page import (
    Block,
    Figure,
    Gallery,
    KeyNumber,
    Note,
    Page,
    Picture,
    Section,
    Table,
    picture_source,
)
from chiasm.evaluate.probe_scores import ProbeScores
from chiasm.evaluate.retrieval_figures import recall_curves
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.search_scores import DIRECTIONS, DirectionScores, SearchScores, arrow
from chiasm.tasks.retrieval import search
from chiasm.types import Embeddings, Interval

_EXCLUDED = {"none": "nothing", "self": "the query's own row", "patient": "the query's own patient"}
_PICTURE_PX = 132
_TEXT_LETTERS = 160


def make_retrieval_page(
    scores: SearchScores,
    sides: Callable[[str], Embeddings],
    card: RunCard,
    *,
    probes: ProbeScores | None = None,
    examples: int = 0,
) -> Page:
    """Return the page of :func:`~chiasm.evaluate.search_scores.score_search`.

    Args:
        scores: What was measured.
        sides: ``image`` or ``text`` -> embeddings, for the examples.
        card: Of the run.
        probes: Of minimal pairs, where they were measured.
        examples: Queries of each direction that are shown with their first answers; 0 shows no patient's picture or text.
    """
    first = next(iter(scores.directions.values()))
    by = " or ".join(scores.keys)
    right = "shares findings with" if scores.graded else "has the same"
    sections = [_overview(scores), *(_direction(name, found) for name, found in scores.directions.items())]
    if probes is not None:
        sections.append(_probes(probes))
    if examples > 0:
        sections.append(_examples(scores, sides, examples))
    sections.append(card.section())
    return Page(
        title="Search",
        subtitle=f"{first.n_queries:,} queries in {arrow(next(iter(scores.directions)))}, {first.corpus_size:,} rows searched. "
        f"An answer is right when it {right} {by}" + (" as the query." if not scores.graded else " of the query."),
        key_numbers=tuple(
            KeyNumber(f"{arrow(name)}, R@10", found.recall[10], f"one answer list for all: {found.majority[10]:.3f}")
            for name, found in scores.directions.items()
            if 10 in found.recall
        ),
        sections=tuple(sections),
        footer=("Research and teaching only; not a medical device.",),
    )


def _overview(scores: SearchScores) -> Section:
    blocks: list[Block] = [
        Figure(
            recall_curves(scores.directions),
            "How many queries have a right answer among the first K. Bars: 95 % intervals, resampling patients.",
            wide=True,
        )
    ]
    if scores.left_out:
        blocks.append(
            Note("Not measured: " + "; ".join(f"{arrow(n)} ({reason})" for n, reason in scores.left_out.items()) + ".")
        )
    return Section(
        "Recall",
        "A right answer that comes first is found at once; one that comes late is found by nobody. Chance is that of a "
        "random order, computed exactly.",
        tuple(blocks),
    )


def _direction(name: str, found: DirectionScores) -> Section:
    rows = [
        (measure, value, _plain(value.chance), _plain(constant))
        for measure, (value, constant) in found.measures().items()
    ]
    missing = f" {found.n_unanswerable:,} queries without a right answer are left out." if found.n_unanswerable else ""
    return Section(
        arrow(name).capitalize(),
        f"{found.n_queries:,} queries, {found.corpus_size:,} rows searched, {found.right_answers:.1f} right answers a query "
        f"on average; a query may find everything but {_EXCLUDED[found.exclude]}.{missing}"
        if found.exclude != "none"
        else f"{found.n_queries:,} queries, {found.corpus_size:,} rows searched, {found.right_answers:.1f} right answers a "
        f"query on average.{missing}",
        (
            Table(
                ("measure", "value [95 % interval]", "chance", "one ranking for all"),
                tuple(rows),
                "Intervals resample patients. One ranking for all: every query gets the same answers, chosen with the truth "
                "at hand; a model must beat it. Equal scores share their expected value.",
            ),
        ),
    )


def _probes(probes: ProbeScores) -> Section:
    rows: list[tuple[object, ...]] = []
    intervals: dict[str, Interval] = {}
    notes: list[Block] = []
    for name, found in probes.groups.items():
        rows.append((name, found.wins, f"{found.wins.n:,}", found.blind, f"{found.always:.3f}", found.corrected))
        rows += [(f"– {kind}", value, f"{value.n:,}", "", "", "") for kind, value in found.kinds.items()]
        intervals |= {name: found.wins, **found.kinds, f"{name}, mean image": found.blind}
        gain, p = found.gain.difference, found.gain.p_value
        reads = np.isfinite(p) and p < 0.05 and gain.value > 0
        verdict = "The image decides in part" if reads else "Nothing shows that the image decides"
        sure = (
            f" [{gain.low:+.3f}, {gain.high:+.3f}]" if np.isfinite(gain.low) else " (too few patients for an interval)"
        )
        notes.append(
            Note(
                f"{verdict} on {name}: {gain.value:+.3f}{sure} against the mean image"
                + (f", p = {p:.3f}." if np.isfinite(p) else "."),
                "plain" if reads else "warning",
            )
        )
    return Section(
        "Does it read “no”, left and right",
        f"{probes.probes:,} sentences of {probes.images:,} images' own reports, each beside its contradiction: the true one "
        "should be nearer to the image. A preference for sentences without “no”, or for one side, wins too; so the mean of "
        "all images, which shows nothing, stands beside it.",
        (
            Figure(
                interval_dots(intervals, xlabel="true sentence wins", limits=(0, 1.05)),
                "Chance is one half.",
                wide=True,
            ),
            Table(
                ("probe", "true sentence wins", "n", "mean image", "always one way", "corrected"),
                tuple(rows),
                "Always one way: the better of the two fixed preferences. Corrected: after the mean image's preference is "
                "subtracted.",
            ),
            *notes,
        ),
    )


def _examples(scores: SearchScores, sides: Callable[[str], Embeddings], count: int) -> Section:
    rows: list[tuple[str, tuple[Picture, ...]]] = []
    for name, found in scores.directions.items():
        queries, corpus = (sides(side) for side in DIRECTIONS[name])
        chosen = np.unique(np.linspace(0, len(queries) - 1, min(count, len(queries))).round().astype(int))
        part = queries.select(chosen)
        hits = search(part, corpus, k=4, exclude=found.exclude)  # type: ignore[arg-type]
        for q in range(len(part)):
            asked = _picture(part, q, "query")
            answers = [_picture(corpus, int(r), f"{s:.3f}") for r, s in zip(hits.rows[q], hits.scores[q], strict=True)
                       if r >= 0]  # fmt: skip
            rows.append((f"{arrow(name)}", (asked, *answers)))
    return Section(
        "Examples",
        "Evenly spaced queries, first in each row, with their nearest answers and cosines.",
        (
            Note("These are pictures and texts of patients. Keep this page where patient data may lie.", "warning"),
            Gallery(tuple(rows), size_px=_PICTURE_PX),
        ),
    )


def _picture(rows: Embeddings, row: int, note: str) -> Picture:
    """Return an image, or a text on an empty card."""
    path = rows.paths[row] if rows.paths is not None else None
    if rows.modality == "image":
        if path is not None and Path(path).is_file():
            from chiasm.io.image import open_image

            try:
                return Picture(picture_source(open_image(Path(path)), width_px=_PICTURE_PX), (note,), alt="image")
            except ChiasmError:
                pass
        return Picture(_empty(), (note, "picture is not at hand"), alt="no picture")
    text = " ".join(((rows.texts[row] if rows.texts is not None else None) or "").split())
    short = text if len(text) <= _TEXT_LETTERS else text[: _TEXT_LETTERS - 1] + "…"
    return Picture(_empty(), (note, short), alt="text")


def _empty() -> str:
    """Return a card with a few grey lines, in place of a text."""
    from PIL import Image, ImageDraw

    card = Image.new("L", (_PICTURE_PX, 46), 244)
    draw = ImageDraw.Draw(card)
    for k, width in enumerate((100, 84, 92)):
        draw.rectangle((14, 11 + 10 * k, 14 + width, 14 + 10 * k), fill=196)
    return picture_source(card)


def _plain(value: float | None) -> str:
    return "–" if value is None else str(Interval(value, np.nan, np.nan, 0))
