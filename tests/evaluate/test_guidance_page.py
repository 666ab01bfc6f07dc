"""Pages of guided pictures and of CLIPScores: each number of the JSON, who guided, no text or id of a table, no markup."""

from __future__ import annotations

import dataclasses
import json
import math
from html import unescape
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.evaluate.guidance_page import NO_EVIDENCE, guidance_page, score_page, to_picture
from chiasm.evaluate.page import Figure, Gallery, Note, Page, Table, render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.metrics.bootstrap import Comparison
from chiasm.tasks.clip_score import ClipScores, clip_score, score_agreement
from chiasm.train.guidance import GuidedImages
from chiasm.types import Embeddings, Interval, Space

CARD = RunCard("chiasm guide", {"start": "0" * 12}, {"start": 1}, "tiny", 0)
EVIL = "<script>alert(1)</script>"


def guided(followed: tuple[str, ...] = ("effusion", "large effusion", "normal"), steps: int = 40) -> GuidedImages:
    frames = tuple((k * steps // 2, torch.full((1, 3, 8, 6), k / 4)) for k in range(3))
    cosines = tuple(tuple(0.1 * (k + 1) * (j + 1) for j in range(len(followed))) for k in range(3))
    return GuidedImages(frames[-1][1], frames, tuple(1.0 - 0.01 * k for k in range(steps)), followed, cosines)


def blocks(page: Page, kind: type) -> list[Any]:
    return [b for s in page.sections for b in s.blocks if isinstance(b, kind)]


def test_what_guided_and_what_did_not_with_its_gain() -> None:
    found = guided()
    page = guidance_page(found, ("effusion", "large effusion"), (), CARD)
    table = blocks(page, Table)[0]
    assert table.rows == (
        ("effusion", "guides", "0.100", "0.300", "+0.200"),
        ("large effusion", "guides", "0.200", "0.600", "+0.400"),
        ("normal", "control", "0.300", "0.900", "+0.600"),
    )
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    for row in table.rows:
        assert row[4] == f"{document['gains'][row[0]]:+.3f}"
    assert document["frames"] == [0, 20, 40][:3] == [step for step, _ in found.frames]
    assert (document["steps"], len(document["losses"])) == (40, 40)


def test_every_frame_is_shown_with_step_and_cosine() -> None:
    (gallery,) = blocks(guidance_page(guided(), ("effusion",), (), CARD), Gallery)
    ((heading, pictures),) = gallery.rows
    assert heading == "effusion"
    assert [p.lines for p in pictures] == [
        ("step 0", "cosine 0.100"),
        ("step 20", "cosine 0.200"),
        ("step 40", "cosine 0.300"),
    ]
    assert len({p.source for p in pictures}) == 3


@pytest.mark.parametrize("against", [(), ("no effusion", "normal")])
def test_the_page_says_that_it_is_no_evidence(against: tuple[str, ...]) -> None:
    page = guidance_page(guided(), ("effusion",), against, CARD)
    html = unescape(" ".join(render_page(page).split()))
    assert html.count(NO_EVIDENCE) >= 3
    assert ("Against: no effusion; normal." in html) == bool(against)
    assert "not a medical device" in html
    assert any(n.tone == "warning" for n in blocks(page, Note))
    assert "A control does not guide" in html


@pytest.mark.parametrize("steps", [2, 4, 5, 39, 40, 41, 200])
def test_the_curve_bears_any_number_of_steps(steps: int) -> None:
    figures = blocks(guidance_page(guided(steps=steps), ("effusion",), (), CARD), Figure)
    assert len(figures) == 2
    assert all(f.svg.startswith("<svg") for f in figures)


def test_texts_of_a_user_are_text() -> None:
    names = (EVIL, "$\\frac{$", "_underscore and a very long text that does not fit into any legend")
    html = render_page(guidance_page(guided(names), names[:1], (EVIL,), CARD))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3


@pytest.mark.parametrize(
    ("value", "grey"), [(0.0, 0), (1.0, 255), (0.5, 128), (-3.0, 0), (7.0, 255), (0.001, 0), (0.003, 1)]
)
def test_a_picture_is_rounded_not_cut(value: float, grey: int) -> None:
    picture = to_picture(torch.full((3, 2, 5), value))
    assert picture.size == (5, 2)
    assert picture.mode == "RGB"
    assert set(np.asarray(picture).ravel().tolist()) == {grey}


def test_channels_and_rows_stay_where_they_are() -> None:
    pixels = torch.zeros(3, 2, 3)
    pixels[0, 0, 1] = pixels[2, 1, 2] = 1.0
    values = np.asarray(to_picture(pixels.requires_grad_()))
    assert values[0, 1].tolist() == [255, 0, 0]
    assert values[1, 2].tolist() == [0, 0, 255]
    assert values.sum() == 510
    assert isinstance(to_picture(pixels), Image.Image)


def scores(n: int = 30, *, references: bool = False) -> ClipScores:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2, n, 8)).astype(np.float32) + 1
    space = Space("made", "w", "p", 8)
    ids, patients = tuple(f"secret-{k}" for k in range(n)), tuple(f"person-{k // 2}" for k in range(n))
    images = Embeddings(vectors[0], ids, space, "image", normalized=False, patients=patients)
    texts = Embeddings(
        vectors[1], ids, space, "text", normalized=False, patients=patients, texts=tuple(f"words-{k}" for k in range(n))
    )
    options: dict[str, Any] = {"references": texts} if references else {}
    return score_agreement(images, texts.select(range(n - 3)), n_resamples=20, **options)


@pytest.mark.parametrize("references", [False, True])
def test_every_number_of_the_scores_is_on_the_page(references: bool) -> None:
    found = scores(references=references)
    page = score_page(found, CARD)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    rows = {row[0]: row for row in blocks(page, Table)[0].rows}
    wanted = {"CLIPScore": "clip_score", "with texts of other patients": "exchanged", "own text wins": "wins"}
    if references:
        wanted["RefCLIPScore"] = "ref_clip_score"
    for name, key in wanted.items():
        assert (
            rows[name][1] == f"{document[key]['value']:.3f} [{document[key]['low']:.3f}, {document[key]['high']:.3f}]"
        )
        assert rows[name][2] == "27"
    assert rows["difference"][1].startswith(f"{document['gain']['difference']['value']:.3f} [")
    assert rows["own text wins"][3] == "0.500"
    assert float(rows["CLIPScore"][3]) == pytest.approx(
        found.exchanged.value, abs=1e-3
    )  # chance is that of exchanged texts
    assert len(page.key_numbers) == 3 if references else 2
    html = render_page(page)
    assert "3 rows have no partner and were left out." in html
    for word in ("secret-", "person-", "words-"):
        assert word not in html
        assert word not in json.dumps(document)


def test_the_order_of_pairs_moves_no_score() -> None:
    found, pairs = scores(), 27
    assert found.mean.value == pytest.approx(found.scores.mean())
    assert found.mean.chance == pytest.approx(found.exchanged.value)
    assert found.gain.difference.value == pytest.approx(found.mean.value - found.exchanged.value)
    assert len(found.ids) == len(found.scores) == pairs
    assert ((found.scores >= 0) & (found.scores <= 2.5)).all()


def test_a_p_value_that_is_none_is_null() -> None:
    found = scores()
    number = Interval(0.1, math.nan, math.nan, 3)
    bare = dataclasses.replace(found, gain=Comparison(number, math.nan))
    assert json.loads(json.dumps(bare.to_dict(), allow_nan=False))["gain"]["p_value"] is None


@pytest.mark.parametrize(
    ("cosine", "score"), [(-1.0, 0.0), (-0.01, 0.0), (0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (1.0, 2.5)]
)
def test_the_score_of_a_cosine(cosine: float, score: float) -> None:
    assert clip_score([cosine]).tolist() == pytest.approx([score])
