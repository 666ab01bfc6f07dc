"""Moderation to a page: decisions, what each category says and why, and what the policy is worth where truth is known.

Comes in: a result, its scores where there is a truth. Goes out: a :class:`~chiasm.evaluate.page.Page`. Pictures and names
of files are on it only where examples were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import chiasm
from chiasm.datasets.images import open_image_path
from chiasm.errors import ChiasmError
from chiasm.evaluate.moderation_scores import ModerationScores
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
from chiasm.evaluate.pairing_figures import distributions
from chiasm.evaluate.run_card import RunCard
from chiasm.tasks.moderation import ACTIONS, Category, ModerationResult
from chiasm.types import Interval

_PICTURE_PX = 132
_WORDS = {"reject": "rejected", "review": "to review", "accept": "accepted"}


def moderation_page(
    result: ModerationResult,
    card: RunCard,
    *,
    scores: ModerationScores | None = None,
    truth: Mapping[str, Any] | None = None,
    examples: int = 0,
) -> Page:
    """Return the page.

    Args:
        result: Decisions with their evidence.
        card: Of the run.
        scores: Where the truth is known.
        truth: Category -> 0, 1 or None an image, for the drawings.
        examples: Pictures of each decision; 0: none.
    """
    sections = [_policy(result)]
    if scores is not None:
        sections.append(_worth(scores))
    sections.append(_distributions(result, truth or {}))
    if examples:
        sections.append(_examples(result, examples))
    return Page(
        title=f"Moderation by “{result.policy.name}”",
        subtitle=f"{len(result):,} images, compared with {len(result.policy.texts)} texts in {result.space}.",
        key_numbers=_key_numbers(result, scores),
        sections=(*sections, card.section()),
        footer=(f"chiasm {chiasm.__version__}.", "Research and teaching only; not a medical device."),
    )


def _key_numbers(result: ModerationResult, scores: ModerationScores | None) -> tuple[KeyNumber, ...]:
    counts, n = result.counts(), max(len(result), 1)
    found = [
        KeyNumber(_WORDS[action], Interval(counts[action] / n, math.nan, math.nan, n), f"{counts[action]:,} of {n:,}")
        for action in ACTIONS
    ]
    if scores is not None and math.isfinite(scores.wanted.value):
        found.append(KeyNumber("right decisions", scores.wanted, "always the commonest; reviews left out"))
    return tuple(found)


def _policy(result: ModerationResult) -> Section:
    rows = []
    for k, category in enumerate(result.policy.categories):
        rows.append((category.name, category.action, f"{category.threshold:.3f}",
                     "" if category.review is None else f"{category.review:.3f}", _source(category),
                     f"{int((result.deciding == k).sum()):,}"))  # fmt: skip
    blocks: list[Block] = [
        Table(
            ("category", "action", "from a score of", "review from", "thresholds come from", "images decided"),
            tuple(rows),
            f"The score is the cosine with the nearest text of the category less that with the nearest text against it. "
            f"Without any category the answer is “{result.policy.default}”.",
        )
    ]
    if result.policy.by_hand:
        blocks.append(
            Note(
                f"The thresholds of {', '.join(result.policy.by_hand)} were fitted to nothing: how often they are right is "
                "unknown until they are tried on labelled images.",
                "warning",
            )
        )
    return Section("The policy", "The strictest category decides: reject, then review, then accept.", tuple(blocks))


def _source(category: Category) -> str:
    if not category.fitted:
        return "written by hand"
    facts = category.fitted
    aims = [f"{name} {facts[name]:.2f}" for name in ("sensitivity", "specificity") if name in facts]
    return f"{' and '.join(aims)} on {facts.get('positives')} + {facts.get('negatives')} validation images"


def _worth(scores: ModerationScores) -> Section:
    rows = tuple(
        (c.category, c.positives, c.negatives, c.auroc, c.found, c.left_alone, c.acted, c.wrongly_acted)
        for c in scores.categories
    )
    given = tuple((wanted, *(f"{row[action]:,}" for action in ACTIONS)) for wanted, row in scores.confusion.items())
    blocks: list[Block] = [
        Table(
            (
                "category",
                "images of it",
                "others",
                "AUROC",
                "found",
                "others left alone",
                "acted on",
                "others acted on",
            ),
            rows,
            "Found: acted on or sent to review. Chance of the AUROC is 0.50.",
        ),
        Table(("asked for by the truth", *(f"given: {a}" for a in ACTIONS)), given),
    ]
    if scores.skipped:
        blocks.append(Note(f"No labelled image of: {', '.join(scores.skipped)}. Nothing is known about these."))
    return Section(
        "What the policy is worth",
        f"On {scores.n:,} labelled images of {scores.patients:,} patients, with 95 % intervals over patients. Right decisions, "
        f"reviews left out: {scores.wanted} (always the commonest: {_chance(scores)}); to review: {scores.reviewed}.",
        tuple(blocks),
    )


def _chance(scores: ModerationScores) -> str:
    return "–" if scores.wanted.chance is None else f"{scores.wanted.chance:.3f}"


def _distributions(result: ModerationResult, truth: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    for k, category in enumerate(result.policy.categories):
        scores: NDArray[np.float64] = result.scores[:, k]
        values = {"all images": scores}
        if category.name in truth:
            column = np.array([np.nan if v is None else float(v) for v in truth[category.name]])
            sides = {"others": scores[column == 0], f"{category.name}": scores[column == 1]}
            values = {name: v for name, v in sides.items() if len(v)} or values
        drawn = distributions(values, xlabel=f"score of “{category.name}”", line=(category.threshold, category.action))
        blocks.append(Figure(drawn, f"From the dashed line on: {category.action}."))
    return Section("Scores", "Where two kinds lie on each other, no threshold can part them.", tuple(blocks))


def _examples(result: ModerationResult, count: int) -> Section:
    records = result.to_records(flat=True)
    rows = []
    for action in ACTIONS:
        chosen = [i for i, decision in enumerate(result.decisions) if decision == action]
        # From the clearest to the least clear.
        chosen.sort(key=lambda i: -abs(float(records[i]["margin"])))
        pictures = [p for i in chosen[:count] if (p := _picture(result, records[i], i)) is not None]
        if pictures:
            rows.append((_WORDS[action], tuple(pictures)))
    return Section(
        "Images with their evidence",
        "The nearest text and the margin to the threshold, the clearest first.",
        (
            Note("These are pictures of patients. Keep this page where patient data may lie.", "warning"),
            Gallery(tuple(rows), size_px=_PICTURE_PX),
        ),
    )


def _picture(result: ModerationResult, record: Mapping[str, Any], row: int) -> Picture | None:
    path = None if result.paths is None else result.paths[row]
    if path is None:
        return None
    try:
        image = open_image_path(Path(path))
    except (ChiasmError, OSError):
        return None
    lines = (Path(str(record["id"])).name, str(record["because"] or "default"), f"“{record['text']}”",
             f"cosine {record['cosine']:.3f}, margin {record['margin']:+.3f}")  # fmt: skip
    return Picture(picture_source(image, width_px=_PICTURE_PX), lines, alt="image")
