"""Explanations to pages: one image side by side, or all methods on a set of images with boxes.

Comes in: an :class:`~chiasm.evaluate.explain_image.ImageExplanation` or
:class:`~chiasm.evaluate.explain_scores.ExplainScores`. Goes out: a :class:`~chiasm.evaluate.page.Page`. Pictures of a
set are on the page only where examples were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import chiasm
from chiasm.evaluate.explain_figures import curve_lines, method_dots, overlay_picture
from chiasm.evaluate.page import Block, Figure, Gallery, KeyNumber, Note, Page, Picture, Section, Table, picture_source
from chiasm.types import Interval

if TYPE_CHECKING:
    from chiasm.evaluate.explain_image import ImageExplanation, Panel
    from chiasm.evaluate.explain_scores import Case, ExplainScores
    from chiasm.evaluate.run_card import RunCard
    from chiasm.explain.heatmap import HeatMap
    from chiasm.tasks.terms import NearestTerms

RESEARCH = "Research and teaching only; not a medical device."
NO_FINDING = "A map shows what the model's score hangs on. It is no finding, and no proof that the model looked at the right thing."
_SIZE_PX = 190


def image_page(
    found: ImageExplanation | None,
    card: RunCard,
    *,
    terms: Sequence[tuple[str, NearestTerms]] = (),
    encoder: str = "",
) -> Page:
    """Return the side-by-side page of one image.

    Args:
        found: Its maps; None where only terms were asked for.
        card: What it was computed from.
        terms: What each list is about (``whole image``, ``region``), and the list.
        encoder: Name of the model.
    """
    sections: list[Section] = []
    if found is not None:
        sections.append(_maps_section(found))
        if found.baselines:
            sections.append(_curves_section(found))
    if terms:
        sections.append(_terms_section(terms))
    sections.append(card.section())
    return Page(
        title="Where the model looks",
        subtitle=f"One image, seen by {encoder or 'the model'}. {NO_FINDING}",
        sections=tuple(sections),
        footer=(f"chiasm {chiasm.__version__}.", RESEARCH),
    )


def _maps_section(found: ImageExplanation) -> Section:
    plain = Picture(picture_source(overlay_picture(found.image, None, found.boxes)), ("the image",), alt="the image")
    rows = tuple(
        (text, (plain, *(_picture(found, panel) for panel in panels)))
        for text, panels in zip(found.texts, found.rows, strict=True)
    )
    caption = "Bright: the text is supported. The cross is the highest place."
    caption += " The frame is the true box." if found.boxes else ""
    caption += " The colours of one map cannot be compared with those of another: each is scaled to its own range."
    return Section("Maps", "Every row is a text, every column a method.", (Gallery(rows, caption, _SIZE_PX),))


def _picture(found: ImageExplanation, panel: Panel) -> Picture:
    heat, mark = panel.heat, ""
    lines = [heat.method, f"cosine {heat.cosine:.3f}" if np.isfinite(heat.cosine) else ""]
    if heat.is_flat:
        lines.append("flat: it points nowhere")
    if panel.boxes is not None:
        mark = "right" if panel.boxes.hit == 1 else "wrong"
        lines.append(f"pointing {panel.boxes.hit:.0f} (chance {panel.boxes.chance:.2f}), IoU {panel.boxes.iou:.2f}")
        lines.append(f"contrast {panel.boxes.contrast:.2f}")
    if panel.curves is not None:
        lines.append(f"deletion {panel.curves.deletion_area[0]:.3f}, insertion {panel.curves.insertion_area[0]:.3f}")
    drawn = overlay_picture(found.image, heat, found.boxes)
    return Picture(picture_source(drawn), tuple(line for line in lines if line), mark, f"{heat.method} map")


def _curves_section(found: ImageExplanation) -> Section:
    blocks: list[Block] = []
    for text, panels, quiet in zip(found.texts, found.rows, found.baselines, strict=True):
        curves = [p.curves for p in panels if p.curves is not None]
        blocks.append(
            Figure(curve_lines([*curves, *quiet]), f"“{text}”: the number is the area, a mean score.", wide=True)
        )
    blocks.append(
        Note(
            "Deletion should fall early, insertion should rise early; a map must beat the random order and the centre."
        )
    )
    return Section(
        "Deletion and insertion", "What becomes of the score when pixels go and come in the map's order.", tuple(blocks)
    )


def _terms_section(terms: Sequence[tuple[str, NearestTerms]]) -> Section:
    blocks: list[Block] = []
    for what, found in terms:
        rows = tuple(
            (
                t.term,
                t.category,
                f"{t.cosine:.3f}",
                _number(t.expected),
                _number(t.excess, "+"),
                _number(t.z, "+", 2),
                _number(t.p_value),
            )
            for t in found.terms
        )
        null = f"compared with {found.n_reference} reference images" if found.n_reference else "no reference images"
        blocks.append(
            Table(
                ("term", "kind", "cosine", "usual", "above usual", "z", "p of this term"),
                rows,
                f"{what}: the nearest of {found.vocabulary_size} terms by {found.ranked_by}, {null}.",
            )
        )
    if any(found.n_reference == 0 for _, found in terms):
        blocks.append(
            Note(
                "Without reference images the raw cosine ranks, and terms that are near to every image come first. "
                "Give ordinary images with --reference.",
                "warning",
            )
        )
    else:
        blocks.append(
            Note(
                "z is how far the cosine lies above the term's mean over the reference, in standard deviations. p is not corrected for the number of terms."
            )
        )
    return Section("Nearest terms", "Words of a vocabulary, by how near their vectors are.", tuple(blocks))


def _number(value: float, sign: str = "", digits: int = 3) -> str:
    return "–" if not np.isfinite(value) else f"{value:{sign}.{digits}f}"


def methods_page(
    scores: ExplainScores, card: RunCard, *, examples: Sequence[tuple[Case, Sequence[HeatMap]]] = (), encoder: str = ""
) -> Page:
    """Return the page of all methods on a set.

    Args:
        scores: From :func:`chiasm.evaluate.explain_scores.score_methods`.
        card: What it was computed from.
        examples: Cases to show with the maps of each method; none: no picture of a patient is on the page.
        encoder: Name of the model.
    """
    best = max(scores.methods, key=lambda m: m.all.pointing_game.value)
    keys = [
        KeyNumber(f"pointing game, {best.method}", best.all.pointing_game, "the best method, chosen on these images")
    ]
    if best.large is not None:
        keys.append(KeyNumber("large findings", best.large.pointing_game, f"boxes of {scores.large_from:.0%} or more"))
    keys.append(KeyNumber("the middle of the picture", scores.of("centre").all.pointing_game, "knows nothing"))
    sections = [_table_section(scores), _labels_section(scores)]
    if scores.random_curves is not None:
        sections.append(_set_curves_section(scores))
    if any(m.fidelity is not None for m in scores.methods):
        sections.append(_fidelity_section(scores))
    if examples:
        sections.append(_examples_section(examples))
    sections.append(card.section())
    return Page(
        title="Heat maps against boxes",
        subtitle=f"{scores.n:,} findings of {scores.n_patients:,} patients, {scores.n_large:,} of them large; model "
        f"{encoder or 'unnamed'}. {NO_FINDING}",
        key_numbers=tuple(keys),
        sections=tuple(sections),
        footer=(f"chiasm {chiasm.__version__}.", RESEARCH),
    )


def _table_section(scores: ExplainScores) -> Section:
    large = f"large ({scores.n_large})"
    columns = ("method", "pointing game", large, "over centre", "p", "IoU", "contrast", "flat")
    rows = tuple(
        (
            m.method,
            m.all.pointing_game,
            "–" if m.large is None else m.large.pointing_game,
            "–" if m.gain is None else _signed(m.gain.difference),
            "–" if m.gain is None else _number(m.gain.p_value),
            m.all.iou,
            m.all.contrast_to_noise,
            m.all.n_flat,
        )
        for m in scores.methods
    )
    dots = method_dots(
        {
            m.method: {
                "all findings": m.all.pointing_game,
                **({} if m.large is None else {"large findings": m.large.pointing_game}),
            }
            for m in scores.methods
        },
        xlabel="pointing game",
        chance=scores.methods[0].all.pointing_game.chance,
    )
    first = scores.methods[0].all
    note = Note(
        f"A random pixel would hit {first.pointing_game.chance or 0:.3f}. One place for all images, chosen with the boxes at "
        f"hand, would hit {first.majority:.3f}; one place for each finding {first.majority_by_label:.3f}: that is what knowing "
        "the text alone can reach, so a method shows that it sees the image only above it."
    )
    return Section(
        "All methods",
        "“over centre” is the pointing game less that of a bump in the middle, in pairs.",
        (
            Table(columns, rows, "95 % intervals over patients."),
            Figure(dots, "Pointing game with 95 % intervals."),
            note,
        ),
    )


def _labels_section(scores: ExplainScores) -> Section:
    labels = list(scores.labels)
    rows = tuple(
        (m.method, *(str(m.all.per_label[label]) if label in m.all.per_label else "–" for label in labels))
        for m in scores.methods
    )
    chance = scores.methods[0].all.per_label
    last = ("chance", *(f"{chance[label].chance or 0:.3f}" for label in labels))
    columns = ("pointing game", *(f"{label} ({n})" for label, n in scores.labels.items()))
    return Section("By finding", "How often the highest place lies in a box.", (Table(columns, (*rows, last)),))


def _set_curves_section(scores: ExplainScores) -> Section:
    curves = [m.curves for m in scores.methods if m.curves is not None]
    if scores.random_curves is not None:
        curves.append(scores.random_curves)
    rows = tuple(
        (m.method, _signed(m.deletion), _signed(m.insertion))
        for m in scores.methods
        if m.deletion is not None and m.insertion is not None
    )
    table = Table(
        ("method", "deletion: falls earlier by", "insertion: rises earlier by"),
        rows,
        "Difference of the areas from those of a random order, positive is better; 95 % intervals over patients.",
    )
    figure = Figure(curve_lines(curves), f"Mean curves; absent pixels are filled by {curves[0].fill}.", wide=True)
    return Section("Deletion and insertion", "Does the score hang on the places that the map marks?", (figure, table))


def _fidelity_section(scores: ExplainScores) -> Section:
    rows = tuple(
        (
            m.method,
            f"{f.mean_rank_correlation:.2f}",
            f"{f.mean_structural_similarity:.2f}",
            "passes" if f.passes else "FAILS",
        )
        for m in scores.methods
        if (f := m.fidelity) is not None
    )
    return Section(
        "Shuffled weights",
        "A method that draws the same map when the image tower's weights are shuffled shows the image, not the model.",
        (
            Table(
                ("method", "rank correlation", "SSIM", "below 0.7"),
                rows,
                "Mean over a few images and two shufflings; lower is better.",
            ),
        ),
    )


def _examples_section(examples: Sequence[tuple[Case, Sequence[HeatMap]]]) -> Section:
    from chiasm.evaluate.explain_image import score_boxes

    rows = []
    for case, heats in examples:
        image = case.open()
        pictures = [Picture(picture_source(overlay_picture(image, None, case.boxes)), ("the image",), alt="the image")]
        for heat in heats:
            scored = score_boxes(heat, case.boxes)
            pictures.append(
                Picture(
                    picture_source(overlay_picture(image, heat, case.boxes)),
                    (heat.method, f"pointing {scored.hit:.0f}, IoU {scored.iou:.2f}"),
                    "right" if scored.hit == 1 else "wrong",
                    f"{heat.method} map",
                )
            )
        rows.append((case.label, tuple(pictures)))
    return Section(
        "Examples",
        "Drawn at random, not chosen.",
        (Gallery(tuple(rows), "Frame: the true box. Cross: the highest place.", 150),),
    )


def _signed(number: Interval | None) -> str:
    if number is None:
        return "–"
    text = f"{number.value:+.3f}"
    return text + (f" [{number.low:+.3f}, {number.high:+.3f}]" if np.isfinite(number.low) else "")
