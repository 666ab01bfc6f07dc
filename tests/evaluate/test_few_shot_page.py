"""The page of learning curves from a hand-written result: each number once, choices counted, draws explained, nothing of patients."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, pairwise_distances, roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.few_shot_figures import learning_curves
from chiasm.evaluate.few_shot_images import colour_method, colour_numbers
from chiasm.evaluate.few_shot_page import WHAT_THEY_ARE, few_shot_page
from chiasm.evaluate.few_shot_scores import Contrast, FewShotScores, Point, score_few_shot, shots_name
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.io.manifest import to_json
from chiasm.metrics.paired import SeedDifference, seed_difference
from chiasm.tasks.k_shot import IMAGE_METHODS, TEXT_METHODS, Answer, Draws, draw_episodes, run_episodes
from chiasm.types import Interval, Sample

CARD = RunCard("chiasm few-shot", {"images": "abc"}, {"images": 3}, "a table", 0)


def point(method: str, shots: int | None, value: float, **changes: Any) -> Point:
    made = Point(
        method, shots, Interval(value, value - 0.031, value + 0.032, 90, 0.25),
        Interval(value, value - 0.011, value + 0.012, 3, 0.25), Interval(value + 0.1, value + 0.05, value + 0.15, 90, 0.5),
        value - 0.003, (0, 1, 2), (value - 0.02, value, value + 0.02), 4.0 * (shots or 100), 4.0, {}, 0.5,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def contrast(method: str, shots: int | None, value: float, p: float, **changes: Any) -> Contrast:
    first = {0: value + 0.01, 1: value - 0.01, 2: value}
    found = seed_difference(first, {0: 0.0, 1: 0.0, 2: 0.0})
    both = Interval(value, value - 0.02, value + 0.02, 90, 0.0)
    return Contrast(method, shots, dataclasses.replace(found, value=value, p=p, patients=both, **changes))


SCORES = FewShotScores(
    ("<b>ill</b>", "well", "x", "y"),
    (
        point("linear-probe", 1, 0.412, chosen={"C": (1.0, 10.0, 10.0)}), point("zero-shot", 1, 0.501),
        point("prototypes", 1, 0.433), point("linear-probe", 8, 0.722, chosen={"C": (0.1, 1.0, 10.0)}),
        point("zero-shot", 8, 0.502), point("prototypes", 8, 0.633),
        point("linear-probe", None, 0.811, chosen={"C": (10.0,) * 3}), point("zero-shot", None, 0.503),
    ),
    (contrast("zero-shot", 1, 0.089, 0.0004), contrast("prototypes", 8, -0.089, 0.021),
     contrast("zero-shot", 8, -0.22, math.nan), contrast("zero-shot", None, 0.307, 0.31), contrast("prototypes", 1, 0.021, 0.0052)),
    "linear-probe", 0.25, 0.377, 1234, 617, {"<b>ill</b>": 1011, "well": 22, "x": 33, "y": 44},
    {16: "a class has 11 images in its half of the patients, 16 are needed"},
)  # fmt: skip


def shown(page: Any) -> str:
    return html.unescape(re.sub(r"<svg.*?</svg>", "", render_page(page), flags=re.DOTALL))


@pytest.fixture(scope="module")
def text() -> str:
    return shown(few_shot_page(SCORES, CARD, label="state & <i>kind</i>"))


@pytest.mark.parametrize("number", range(len(SCORES.points)))
def test_each_point_stands_in_its_tables(number: int, text: str) -> None:
    p = SCORES.points[number]
    assert str(p.balanced_accuracy) in text
    cells = (str(shots_name(p.shots)), p.method, str(p.auroc), f"{p.accuracy:.3f}",
             f"{p.over_seeds.low:.3f} to {p.over_seeds.high:.3f}", "0.020", "3")  # fmt: skip
    assert "".join(f"<td>{c}</td>" for c in cells) in text


@pytest.mark.parametrize(
    "cells",
    [
        ("1", "zero-shot", "+0.089", "+0.069 to +0.109", "< 0.001", "3", "better"),
        ("8", "prototypes", "-0.089", "-0.109 to -0.069", "0.021", "3", "worse"),
        ("8", "zero-shot", "-0.220", "-0.240 to -0.200", "–", "3", "not told apart"),
        ("all", "zero-shot", "+0.307", "+0.287 to +0.327", "0.310", "3", "not told apart"),
        ("1", "prototypes", "+0.021", "+0.001 to +0.041", "0.005", "3", "better"),
        ("linear-probe", "0.412 [0.381, 0.444]", "0.722 [0.691, 0.754]", "0.811 [0.780, 0.843]"),
        ("prototypes", "0.433 [0.402, 0.465]", "0.633 [0.602, 0.665]", "–"),
        ("1", "4", "4", "1234"),
        ("8", "32", "4", "1234"),
        ("all", "400", "4", "1234"),
    ],
)
def test_rows_of_the_tables(cells: tuple[str, ...], text: str) -> None:
    assert "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>" in text


@pytest.mark.parametrize(
    "said",
    [
        "C 10 (×2), 1 (×1)",
        "C 10 (×3)",
        "C 0.1 (×1), 1 (×1), 10 (×1)",
        "“state & <i>kind</i>”, 4 classes",
        "1,234 images of 617 patients",
        "<b>ill</b>: 1,011, well: 22, x: 33, y: 44",
        "16 shots were left out: a class has 11 images",
        "Chance and the majority's answer: 0.250 (the majority's plain accuracy is 0.377)",
        "Against linear-probe",
        "corrected by Holm",
        "not a medical device",
        WHAT_THEY_ARE["prototypes"],
    ],
)
def test_what_the_page_says(said: str, text: str) -> None:
    assert said in text


def test_names_are_escaped() -> None:
    page = render_page(few_shot_page(SCORES, CARD, label="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "<b>ill" not in page
    assert "&lt;b&gt;ill" in page


def test_one_method_has_no_comparison() -> None:
    alone = dataclasses.replace(SCORES, points=(SCORES.points[0],), contrasts=(), left_out={})
    found = shown(few_shot_page(alone, CARD, label="kind"))
    assert "Against" not in found
    assert "left out" not in found


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        (("linear-probe",), ["linear-probe", "majority"]),
        (("linear-probe", "zero-shot", "prototypes"), ["linear-probe", "zero-shot", "majority"]),
        (("linear-probe", "from-scratch", "colour"), ["linear-probe", "from-scratch", "colour", "majority"]),
    ],
)
def test_key_numbers_are_the_reference_and_the_floors(methods: tuple[str, ...], names: list[str]) -> None:
    points = tuple(point(m, k, 0.5 + i / 10) for k in (1, 8) for i, m in enumerate(methods))
    page = few_shot_page(dataclasses.replace(SCORES, points=points, contrasts=()), CARD, label="kind")
    assert [n.name for n in page.key_numbers] == names
    assert "8 a class" in page.key_numbers[0].note  # the largest k
    assert page.key_numbers[0].interval == points[len(methods)].balanced_accuracy
    assert page.key_numbers[-1].interval.value == 0.377


@pytest.mark.parametrize("method", [*IMAGE_METHODS, *TEXT_METHODS, "coop", "from-scratch", "colour"])
def test_each_method_is_explained(method: str) -> None:
    assert len(WHAT_THEY_ARE[method]) > 20


def test_the_document_is_whole() -> None:
    document = json.loads(to_json(SCORES.to_dict()))
    assert [(c["method"], c["shots"]) for c in document["curves"]] == [
        (p.method, "all" if p.shots is None else p.shots) for p in SCORES.points
    ]
    assert document["curves"][0]["chosen"] == {"C": [1.0, 10.0, 10.0]}
    assert document["left_out"] == {"16": SCORES.left_out[16]}
    assert [c["verdict"] for c in document["contrasts"]] == [
        "better",
        "worse",
        "not told apart",
        "not told apart",
        "better",
    ]
    assert document["contrasts"][1]["patients_and_seeds"]["low"] == pytest.approx(-0.109)
    assert document["majority_accuracy"] == 0.377
    assert document["contrasts"][2]["p"] is None


@pytest.mark.parametrize(
    ("method", "shots", "value"), [("zero-shot", 8, 0.502), ("linear-probe", None, 0.811), ("prototypes", 1, 0.433)]
)
def test_a_point_is_found_by_name(method: str, shots: int | None, value: float) -> None:
    assert SCORES.point(method, shots).balanced_accuracy.value == value
    with pytest.raises(UnknownName):
        SCORES.point(method, 16)


def test_panels_of_the_figure() -> None:
    one = dataclasses.replace(SCORES, points=tuple(p for p in SCORES.points if p.method != "zero-shot"))
    assert learning_curves(SCORES).count('id="axes_') == 2  # images only, with texts
    assert learning_curves(one).count('id="axes_') == 1
    bare = [dataclasses.replace(p, balanced_accuracy=Interval(0.5, math.nan, math.nan, 3)) for p in SCORES.points]
    assert "nan" not in learning_curves(dataclasses.replace(SCORES, points=tuple(bare))).lower()


def drawn(classes: int = 3, seeds: int = 3) -> Draws:
    labels = [f"c{(i // 2) % classes}" for i in range(36 * classes)]
    patients = [f"p{i // 2:03d}" for i in range(36 * classes)]
    return draw_episodes(labels, patients, np.arange(36 * classes) < 12 * classes, shots=(2,), seeds=range(seeds))


def answers_of(draws: Draws, name: str, strength: float, seed: int = 0) -> list[Answer]:
    found, truth = [], draws.truth[draws.test]
    for e in draws.episodes:
        random = np.random.default_rng([seed, e.seed])
        logits = random.normal(size=(len(truth), len(draws.classes))) + strength * np.eye(len(draws.classes))[truth]
        given_ = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        found.append(Answer(name, e.seed, e.shots, given_, 6, 6, {}, 0.1))
    return found


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_points_are_scikit_learns(classes: int) -> None:
    draws = drawn(classes)
    answers = answers_of(draws, "m", 1.0)
    found = score_few_shot(draws, answers, n_resamples=20).points[0]
    truth = draws.truth[draws.test]
    each = [balanced_accuracy_score(truth, a.probabilities.argmax(axis=1)) for a in answers]
    assert found.per_seed == pytest.approx(each)
    assert found.balanced_accuracy.value == pytest.approx(np.mean(each))
    areas = [
        roc_auc_score(truth, a.probabilities if classes > 2 else a.probabilities[:, 1], multi_class="ovr")
        for a in answers
    ]
    assert found.auroc.value == pytest.approx(np.mean(areas))
    assert found.accuracy == pytest.approx(np.mean([(a.probabilities.argmax(1) == truth).mean() for a in answers]))
    assert found.balanced_accuracy.chance == pytest.approx(1 / classes)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_answers_is_no_matter(order: list[int]) -> None:
    draws = drawn()
    answers = [*answers_of(draws, "linear-probe", 1.0), *answers_of(draws, "other", 2.0, seed=1)]
    a = score_few_shot(draws, answers, n_resamples=20)
    b = score_few_shot(draws, [answers[i] for i in order], n_resamples=20)
    for p in a.points:
        assert b.point(p.method, p.shots) == p
    assert a.contrasts[0].difference.value == b.contrasts[0].difference.value


def test_a_method_against_itself_is_not_told_apart() -> None:
    draws = drawn()
    same = [dataclasses.replace(a, method="copy") for a in answers_of(draws, "linear-probe", 1.0)]
    found = score_few_shot(draws, [*answers_of(draws, "linear-probe", 1.0), *same], n_resamples=50).contrasts[0]
    both = found.difference.patients
    assert both is not None
    assert (found.difference.value, both.low, both.high) == (0.0, 0.0, 0.0)
    assert found.verdict == "not told apart"


def test_swapping_the_reference_turns_the_signs_round() -> None:
    draws = drawn()
    answers = [*answers_of(draws, "a", 1.0), *answers_of(draws, "b", 3.0, seed=1)]
    (of_a,) = score_few_shot(draws, answers, reference="a", n_resamples=100).contrasts
    (of_b,) = score_few_shot(draws, answers, reference="b", n_resamples=100).contrasts
    one, other = of_a.difference.patients, of_b.difference.patients
    assert one is not None
    assert other is not None
    assert (of_a.method, of_b.method) == ("b", "a")
    means = {p.method: p.balanced_accuracy.value for p in score_few_shot(draws, answers, n_resamples=20).points}
    assert of_a.difference.value == pytest.approx(means["b"] - means["a"])
    assert of_a.difference.value == pytest.approx(-of_b.difference.value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert of_a.difference.p == pytest.approx(of_b.difference.p)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_probabilities_that_are_no_numbers_are_refused(bad: float) -> None:
    draws = drawn()

    def diverged(episode: Any) -> tuple[Any, dict[str, Any]]:
        made = np.full((len(episode.test), 3), 1 / 3)
        made[3, 1] = bad
        return made, {}

    with pytest.raises(InputError, match="diverged gave probabilities that are not finite") as raised:
        run_episodes(draws, {"diverged": diverged})
    assert raised.value.hint
    with pytest.raises(InputError, match=r"shape \(1, 3\)"):
        run_episodes(draws, {"short": lambda _: (np.ones((1, 3)), {})})


def test_the_floor_is_scikit_learns_nearest_centroid(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    samples = []
    for i in range(108):
        pixels = random.integers(0, 256, (8, 8, 3)) * (0.4 + 0.2 * ((i // 2) % 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        samples.append(Sample(id=str(i), image=tmp_path / f"{i}.png", patient=f"p{i // 2:03d}"))
    draws = drawn(seeds=1)
    (answer,) = run_episodes(draws, {"colour": colour_method(samples, draws)})
    e, numbers = draws.episodes[0], colour_numbers(samples)
    rows = np.concatenate([e.train, e.validation])
    scaler = StandardScaler().fit(numbers[rows])
    nearest = NearestCentroid().fit(scaler.transform(numbers[rows]), draws.truth[rows])
    np.testing.assert_array_equal(
        answer.probabilities.argmax(axis=1), nearest.predict(scaler.transform(numbers[e.test]))
    )
    distance = pairwise_distances(scaler.transform(numbers[e.test]), nearest.centroids_)
    expected = np.exp(-distance) / np.exp(-distance).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answer.probabilities, expected, atol=1e-9)


def test_a_seed_difference_is_used_as_it_is() -> None:
    assert isinstance(SCORES.contrasts[0].difference, SeedDifference)
    assert SCORES.methods == ("linear-probe", "zero-shot", "prototypes")
    assert SCORES.shots == (1, 8, None)
