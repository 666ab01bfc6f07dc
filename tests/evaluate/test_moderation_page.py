"""Moderation in numbers and on its page: literal tables by hand, gaps in the truth, evidence, and no picture unasked."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score

from chiasm.errors import InputError
from chiasm.evaluate.moderation_page import moderation_page
from chiasm.evaluate.moderation_scores import ModerationScores, score_moderation, truth_of
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.tasks.moderation import ACTIONS, Category, ModerationResult, Policy, moderate, redecide, select_rows
from chiasm.tasks.moderation import PolicyVectors as Vectors
from chiasm.types import Embeddings, Space

SPACE = Space("tiny", "w", "p", 3)
CARD = RunCard("chiasm moderate", {"images": "abc"}, {"images": 3}, "a table", 0)
HOSTILE = "<img src=x onerror=alert(1)> & $\\frac"


def policy(*, default: Any = "accept", name: str = "intake", photo: str = "photo", **changes: Any) -> Policy:
    first = Category(photo, ("a photo",), threshold=0.6, review=0.3, **changes)
    return Policy(name, (first, Category("slide", ("a slide",), action="review", threshold=0.5)), default)


def result_of(rows: Any, given: Policy | None = None, **fields: Any) -> ModerationResult:
    """Cosines with three texts that stand at right angles: what is written in a row is its score."""
    vectors = np.asarray(rows, dtype=float)
    vectors = np.column_stack([vectors, np.sqrt(np.maximum(1 - (vectors**2).sum(axis=1), 0))])
    names = tuple(f"secret{i}.png" for i in range(len(vectors)))
    images = Embeddings(vectors, fields.pop("ids", names), SPACE, "image", **fields)
    return moderate(images, Vectors(given or policy(), np.eye(3, dtype=np.float32)[:2], SPACE))


#: photo, slide -> decision
TABLE = [
    ((0.9, 0.1), "reject"),
    ((0.6, 0.1), "reject"),
    ((0.5, 0.1), "review"),
    ((0.1, 0.7), "review"),
    ((0.1, 0.2), "accept"),
    ((0.7, 0.6), "reject"),
    ((0.2, 0.4), "accept"),
    ((0.4, 0.8), "review"),
]
ROWS = [row for row, _ in TABLE]
PHOTO = [1, 1, 1, 0, 0, 0, 1, 0]
SLIDE = [0, 0, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("row", "decision"), TABLE)
def test_decisions_of_the_table(row: tuple[float, float], decision: str) -> None:
    found = result_of([row])
    assert found.decisions == (decision,)
    np.testing.assert_allclose(found.scores[0], row, atol=1e-6)


@pytest.fixture(scope="module")
def scores() -> ModerationScores:
    return score_moderation(result_of(ROWS), {"photo": PHOTO, "slide": SLIDE}, n_resamples=60)


def test_a_category_is_counted_by_hand(scores: ModerationScores) -> None:
    photo, slide = scores.categories
    assert (photo.positives, photo.negatives, slide.positives, slide.negatives) == (4, 4, 3, 5)
    assert photo.found.value == 3 / 4  # 0.9, 0.6, 0.5 of four reach 0.3
    assert photo.acted.value == 2 / 4
    assert photo.left_alone.value == 2 / 4  # 0.7 and 0.4 do not
    assert photo.wrongly_acted.value == 1 / 4
    assert slide.found.value == slide.acted.value == 1.0
    assert slide.left_alone.value == 1.0
    assert photo.auroc.value == pytest.approx(roc_auc_score(PHOTO, [r[0] for r in ROWS]))
    assert photo.auroc.chance == 0.5
    assert (photo.found.n, photo.left_alone.n, slide.found.n) == (4, 4, 3)


def test_decisions_are_counted_by_hand(scores: ModerationScores) -> None:
    wanted = ["reject", "reject", "reject", "review", "accept", "review", "reject", "review"]
    given_ = [d for _, d in TABLE]
    table = confusion_matrix(wanted, given_, labels=list(ACTIONS))
    assert scores.confusion == {
        w: dict(zip(ACTIONS, row, strict=True)) for w, row in zip(ACTIONS, table.tolist(), strict=True)
    }
    # The review that nobody asked for (row 2) is left out; of the seven others row 5 and row 6 are wrong.
    assert scores.wanted.value == pytest.approx(5 / 7)
    assert scores.wanted.n == 7
    assert scores.wanted.chance == pytest.approx(3 / 7)  # always "reject", on the same seven
    assert scores.reviewed.value == pytest.approx(3 / 8)
    assert (scores.n, scores.patients, scores.skipped) == (8, 8, ())


@pytest.mark.parametrize(
    ("photo", "slide", "n"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], [0] * 8, 8),
        ([1, None, 0, 0, 0, 0, 0, 0], [0] * 8, 7),  # the second might be a photo
        ([None] * 7 + [0], [0] * 8, 1),
        ([None] * 7 + [1], [None] * 8, 1),  # nothing is stricter than what is known of it
        ([1, 1, 1, 1, 0, 0, 0, 0], [None] * 7 + [0], 5),
        ([1, 1, 1, 1, 0, 0, 0, 0], [None] * 8, 8),  # nobody looked for slides
        ([0] * 8, [1, None, None, None, None, None, None, 0], 2),
    ],
)
def test_an_unknown_truth_is_not_taken_for_absence(photo: list[Any], slide: list[Any], n: int) -> None:
    found = score_moderation(result_of(ROWS), {"photo": photo, "slide": slide}, n_resamples=10)
    assert found.n == n
    assert sum(sum(row.values()) for row in found.confusion.values()) == n
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"photo": [None] * 8}, "no image is labelled"),
        ({}, "no image is labelled"),
        ({"photo": [math.nan] * 8, "slide": [None] * 8}, "no image is labelled"),
        ({"photo": [None] * 7 + [0], "slide": [0] * 7 + [None]}, "every category that could decide"),
        ({"photo": [1, 0]}, "2 truth values for 8 images"),
        ({"photo": [2] * 8}, "something else"),
        ({"photo": ["yes"] * 8}, "got text"),
    ],
)
def test_truth_that_cannot_be_used(truth: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        score_moderation(result_of(ROWS), truth, n_resamples=10)
    assert "secret" not in str(raised.value)


def test_a_category_that_the_policy_lacks_changes_nothing(scores: ModerationScores) -> None:
    more = {"photo": PHOTO, "slide": SLIDE, "horse": [1] * 8}
    assert score_moderation(result_of(ROWS), more, n_resamples=60) == scores


def test_a_category_that_nobody_labelled_is_skipped() -> None:
    found = score_moderation(result_of(ROWS), dict[str, Any](photo=PHOTO, slide=[None] * 8), n_resamples=10)
    assert found.skipped == ("slide",)
    assert [c.category for c in found.categories] == ["photo"]


def test_where_all_is_reviewed_nothing_is_right_or_wrong() -> None:
    found = score_moderation(result_of([(0.4, 0.1)] * 3), {"photo": [1, 0, 0], "slide": [0, 0, 0]}, n_resamples=10)
    assert found.wanted.n == 0
    assert found.wanted.to_dict()["value"] is None
    assert found.wanted.chance is None
    assert found.reviewed.value == 1.0
    page = moderation_page(result_of([(0.4, 0.1)] * 3), CARD, scores=found)
    assert "always the commonest: –" in html.unescape(render_page(page))


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 3))
def test_order_and_copies_change_no_share(order: list[int], copies: int) -> None:
    rows = [i for i in order for _ in range(copies)]
    truth = {"photo": PHOTO, "slide": SLIDE}
    groups = tuple(f"p{i}" for i in rows)
    ids = tuple(f"i{k}" for k in range(len(rows)))
    result = result_of([ROWS[i] for i in rows], ids=ids, patients=groups)
    found = score_moderation(result, truth_of(truth, rows), n_resamples=10)
    assert found.wanted.value == pytest.approx(5 / 7)
    assert found.wanted.chance == pytest.approx(3 / 7)
    assert found.categories[0].found.value == pytest.approx(3 / 4)
    assert (found.n, found.patients) == (8 * copies, 8)


@pytest.mark.parametrize(
    ("default", "photo", "slide", "wanted"),
    [("accept", 0, 0, "accept"), ("accept", 1, 0, "reject"), ("accept", 0, 1, "review"), ("accept", 1, 1, "reject"),
     ("review", 0, 0, "review"), ("review", 1, 0, "reject"), ("reject", 0, 0, "reject"), ("reject", 0, 1, "review")],
)  # fmt: skip
def test_the_strictest_true_category_is_wanted(default: str, photo: int, slide: int, wanted: str) -> None:
    result = result_of([ROWS[0]], policy(default=default))
    found = score_moderation(result, {"photo": [photo], "slide": [slide]}, n_resamples=10)
    assert list(found.confusion) == [wanted]


def shown(page: Any) -> str:
    return html.unescape(re.sub(r"<svg.*?</svg>", "", render_page(page), flags=re.DOTALL))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, list[float]], dict[str, Any]]]:
    """What is drawn, without the drawing."""
    calls: list[tuple[dict[str, list[float]], dict[str, Any]]] = []

    def distributions(values: Mapping[str, Any], **options: Any) -> str:
        calls.append(({name: np.asarray(v).tolist() for name, v in values.items()}, options))
        return "<svg></svg>"

    monkeypatch.setattr("chiasm.evaluate.moderation_page.distributions", distributions)
    return calls


def test_every_number_stands_on_the_page(scores: ModerationScores, drawn: Any) -> None:
    result = result_of(ROWS)
    text = shown(moderation_page(result, CARD, scores=scores))
    for category in scores.categories:
        for name in ("auroc", "found", "left_alone", "acted", "wrongly_acted"):
            assert str(getattr(category, name)) in text, name
        assert re.search(
            rf"<td>{category.category}</td><td>{category.positives}</td><td>{category.negatives}</td>", text
        )
        numbers = (category.auroc, category.found, category.left_alone, category.acted, category.wrongly_acted)
        assert "".join(f"<td>{n}</td>" for n in numbers) in text
    assert str(scores.wanted) in text
    assert "always the commonest: 0.429" in text
    assert f"to review: {scores.reviewed}" in text
    for wanted, row in scores.confusion.items():
        assert f"<td>{wanted}</td>" + "".join(f"<td>{row[a]}</td>" for a in ACTIONS) in text
    for word, count in (("rejected", 3), ("to review", 3), ("accepted", 2)):
        assert re.search(rf"{word}</div>\s*<div class=\"value\">{count / 8:.3f}</div>", text), word
        assert f"{count} of 8" in text
    assert "On 8 labelled images of 8 patients" in text
    assert "not a medical device" in text


def test_the_policy_stands_on_the_page(drawn: Any) -> None:
    fitted = {"sensitivity": 0.95, "specificity": 0.9, "positives": 31, "negatives": 57}
    text = shown(moderation_page(result_of(ROWS, policy(fitted=fitted)), CARD))
    assert "<td>photo</td><td>reject</td><td>0.600</td><td>0.300</td>" in text
    assert "sensitivity 0.95 and specificity 0.90 on 31 + 57 validation images</td><td>3</td>" not in text
    assert "sensitivity 0.95 and specificity 0.90 on 31 + 57 validation images</td><td>4</td>" in text
    assert "<td>slide</td><td>review</td><td>0.500</td><td></td><td>written by hand</td><td>2</td>" in text
    assert "thresholds of slide were fitted to nothing" in text
    assert "the answer is “accept”" in text
    assert "What the policy is worth" not in text


def test_truth_parts_the_drawings(drawn: Any, scores: ModerationScores) -> None:
    moderation_page(result_of(ROWS), CARD, scores=scores, truth={"photo": [*PHOTO[:7], None], "slide": [0] * 8})
    (photo, options), (slide, _) = drawn
    np.testing.assert_allclose(photo["photo"], [0.9, 0.6, 0.5, 0.2], atol=1e-6)
    np.testing.assert_allclose(photo["others"], [0.1, 0.1, 0.7], atol=1e-6)
    assert options["line"] == (0.6, "reject")
    assert list(slide) == ["others"]  # no image of it: one heap
    drawn.clear()
    moderation_page(result_of(ROWS), CARD)
    assert [list(values) for values, _ in drawn] == [["all images"], ["all images"]]


def test_names_are_text_and_no_file_is_named(drawn: Any) -> None:
    result = result_of(ROWS, policy(name=HOSTILE, photo=HOSTILE))
    page = render_page(moderation_page(result, CARD))
    assert "<img src=x" not in page
    assert html.escape(HOSTILE) in page
    assert "secret" not in page
    assert "data:image" not in page


@pytest.mark.parametrize("examples", [0, 1, 2])
def test_pictures_stand_only_where_they_were_asked_for(examples: int, tmp_path: Path, drawn: Any) -> None:
    for i in range(8):
        Image.new("RGB", (20, 30), (i * 30, 0, 0)).save(tmp_path / f"secret{i}.png")
    paths = (*(str(tmp_path / f"secret{i}.png") for i in range(7)), str(tmp_path / "absent.png"))
    page = render_page(moderation_page(result_of(ROWS, paths=paths), CARD, examples=examples))
    assert page.count("data:image/png") == (0, 2, 5)[examples]  # the clearest reviewed one has no file
    assert ("pictures of patients" in page) == bool(examples)
    assert ("secret0.png" in page) == bool(examples)
    assert str(tmp_path) not in page
    if examples == 1:
        assert "margin +0.600" in page  # 0.9, from 0.3 on: the clearest rejected


def test_part_of_the_rows_is_part_of_the_page(drawn: Any) -> None:
    text = shown(moderation_page(select_rows(result_of(ROWS), [0, 4]), CARD))
    assert "2 images, compared with 2 texts in tiny" in text
    assert "1 of 2" in text


def test_another_threshold_is_decided_anew_and_shown(drawn: Any) -> None:
    result = result_of(ROWS)
    photo, slide = result.policy.categories
    strict = dataclasses.replace(
        result.policy, categories=(dataclasses.replace(photo, review=None, threshold=0.05), slide)
    )
    assert set(redecide(result, strict).decisions) == {"reject"}
    assert "8 of 8" in shown(moderation_page(redecide(result, strict), CARD))
