"""Few-shot scores: intervals that hold seeds and patients, paired verdicts, the figure and the page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import InputError, UnknownName
from chiasm.evaluate.few_shot_figures import learning_curves
from chiasm.evaluate.few_shot_images import colour_method, colour_numbers, from_scratch_method, samples_of
from chiasm.evaluate.few_shot_page import few_shot_page
from chiasm.evaluate.few_shot_scores import FewShotScores, score_few_shot
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import make_run_card
from chiasm.io.manifest import to_json
from chiasm.metrics.classification import balanced_accuracy_interval
from chiasm.tasks.k_shot import Answer, Draws, draw_episodes, run_episodes
from chiasm.types import Embeddings, Interval, Sample, Space

N, TEST = 360, 120


@pytest.fixture(scope="module")
def draws() -> Draws:
    patients = [f"p{i // 2:03d}" for i in range(N)]
    labels = ["ill" if (i // 2) % 3 == 0 else "well" for i in range(N)]
    return draw_episodes(labels, patients, np.arange(N) < TEST, shots=(1, 4, None), seeds=range(6))


def answers_of(draws: Draws, name: str, wrong: float, *, seed: int = 0, by_seed: float = 0.0) -> list[Answer]:
    """Return answers of which a share is wrong, more so in some seeds."""
    found = []
    truth = draws.truth[draws.test]
    for e in draws.episodes:
        random = np.random.default_rng([seed, e.seed])
        share = wrong + by_seed * (e.seed % 2)
        said = np.where(random.random(len(truth)) < share, 1 - truth, truth)
        probabilities = np.full((len(truth), 2), 0.2)
        probabilities[np.arange(len(truth)), said] = 0.8
        sizes = len(e.train), len(e.validation)
        found.append(Answer(name, e.seed, e.shots, probabilities, *sizes, {"C": 1.0}, 0.01))
    return found


@pytest.fixture(scope="module")
def scores(draws: Draws) -> FewShotScores:
    answers = [
        *answers_of(draws, "linear-probe", 0.30),
        *answers_of(draws, "tip-adapter", 0.10, seed=1),
        *answers_of(draws, "prototypes", 0.30, seed=2),
    ]
    return score_few_shot(draws, answers, n_resamples=300)


def test_points_are_means_over_seeds(draws: Draws, scores: FewShotScores) -> None:
    point = scores.point("linear-probe", 4)
    assert point.seeds == tuple(range(6))
    assert point.balanced_accuracy.value == pytest.approx(np.mean(point.per_seed))
    assert point.balanced_accuracy.low < point.balanced_accuracy.value < point.balanced_accuracy.high
    assert (point.train, point.validation) == (8, 8)
    assert point.chosen == {"C": (1.0,) * 6}
    assert (scores.chance, scores.test_rows, scores.test_patients) == (0.5, TEST, TEST // 2)
    assert scores.majority == pytest.approx(2 / 3)
    with pytest.raises(UnknownName):
        scores.point("linear-probe", 3)


def test_the_interval_holds_patients_and_seeds(draws: Draws) -> None:
    """As wide as the bootstrap over patients for equal seeds; wider once seeds differ too."""
    same = [a for a in answers_of(draws, "one", 0.2) if a.seed == 0]
    copies = [Answer("one", s, a.shots, a.probabilities, 2, 2, {}, 0.0) for s in range(6) for a in same]
    still = score_few_shot(draws, copies, n_resamples=1000).point("one", 1)
    truth = draws.truth[draws.test]
    patients = [draws.episodes[0].patients[i] for i in draws.test]
    alone = balanced_accuracy_interval(truth, same[0].probabilities.argmax(axis=1), patients)
    assert still.balanced_accuracy.low == pytest.approx(alone.low, abs=0.01)
    assert still.balanced_accuracy.high == pytest.approx(alone.high, abs=0.01)
    assert still.over_seeds.high - still.over_seeds.low == pytest.approx(
        0, abs=1e-9
    )  # the trap: seeds alone say nothing
    moving = score_few_shot(draws, answers_of(draws, "two", 0.1, by_seed=0.3), n_resamples=1000).point("two", 1)
    assert (moving.balanced_accuracy.high - moving.balanced_accuracy.low) > 1.3 * (alone.high - alone.low)


def test_verdicts(scores: FewShotScores) -> None:
    found = {(c.method, c.shots): c for c in scores.contrasts}
    assert len(found) == 6
    for k in (1, 4, None):
        assert found["tip-adapter", k].verdict == "better"
        assert found["tip-adapter", k].difference.value > 0.1
        assert found["prototypes", k].verdict == "not told apart"
    raw = [c.difference.p_raw for c in scores.contrasts]
    assert all(c.difference.p >= r for c, r in zip(scores.contrasts, raw, strict=True))
    assert max(c.difference.p / r for c, r in zip(scores.contrasts, raw, strict=True)) == pytest.approx(6)


@pytest.mark.parametrize(
    ("value", "p", "low", "high", "verdict"),
    [
        (0.1, 0.01, 0.05, 0.15, "better"),
        (-0.1, 0.01, -0.15, -0.05, "worse"),
        (0.1, 0.20, 0.05, 0.15, "not told apart"),  # other shots might undo it
        (0.1, 0.01, -0.01, 0.2, "not told apart"),  # other patients might
        (-0.1, 0.01, -0.2, 0.01, "not told apart"),
        (0.1, math.nan, 0.05, 0.15, "not told apart"),  # one seed has no p
        (0.1, 0.01, math.nan, math.nan, "not told apart"),  # one patient has no interval
        (0.1, 0.05, 0.05, 0.15, "not told apart"),
    ],
)
def test_what_may_be_claimed(
    scores: FewShotScores, value: float, p: float, low: float, high: float, verdict: str
) -> None:
    known = scores.contrasts[0]
    found = replace(known.difference, value=value, p=p, patients=Interval(value, low, high, TEST, 0.0))
    assert replace(known, difference=found).verdict == verdict
    assert replace(known, difference=replace(found, patients=None)).verdict == "not told apart"


def test_seeds_alone_are_no_claim(draws: Draws) -> None:
    """A difference that all seeds share but that hangs on a few patients is not claimed."""
    base = answers_of(draws, "linear-probe", 0.0)
    truth = draws.truth[draws.test]
    lucky = []
    for a in base:
        other = a.probabilities.copy()
        row = int(np.flatnonzero(truth == 0)[0])  # one patient, in all seeds
        other[row] = other[row, ::-1]
        lucky.append(Answer("lucky", a.seed, a.shots, other, a.train, a.validation, {}, 0.0))
    contrast = score_few_shot(draws, [*base, *lucky], n_resamples=300).contrasts[0]
    assert contrast.difference.patients is not None
    assert contrast.difference.patients.high >= 0
    assert contrast.verdict == "not told apart"


def test_a_method_with_fewer_seeds_is_compared_on_those(draws: Draws) -> None:
    few = [a for a in answers_of(draws, "from-scratch", 0.4, seed=4) if a.seed < 2]
    found = score_few_shot(draws, [*answers_of(draws, "linear-probe", 0.1), *few], n_resamples=100)
    assert found.point("from-scratch", 4).seeds == (0, 1)
    assert found.contrasts[0].difference.seeds == (0, 1)
    assert found.contrasts[0].difference.left_out == (2, 3, 4, 5)
    with pytest.raises(UnknownName, match="reference method"):
        score_few_shot(draws, few, reference="linear-probe")


def test_figure_page_and_json(draws: Draws, scores: FewShotScores) -> None:
    svg = learning_curves(scores)
    assert svg.startswith("<svg")
    assert svg == learning_curves(scores)
    space = Space("made", "0" * 12, "1" * 12, 3)
    images = Embeddings(np.ones((2, 3)), ("a", "b"), space, "image", patients=("secret-1", "secret-2"))
    card = make_run_card("chiasm few-shot", {"images": images}, seed=0, settings={"shots": "1,4"})
    page = render_page(few_shot_page(scores, card, label="state <b>"))
    for text in ("Learning curves", "Against linear-probe", "Run card", "not a medical device", "state &lt;b&gt;"):
        assert text in page
    assert "secret" not in page
    assert not re.search(r"p\d{3}\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    document = json.loads(to_json(scores.to_dict()))
    assert document["curves"][0]["shots"] == 1
    assert document["contrasts"][0]["verdict"] in ("better", "worse", "not told apart")
    assert not any(isinstance(v, float) and math.isnan(v) for v in document["curves"][0]["per_seed"])


@pytest.fixture
def pictures(tmp_path: Path) -> list[Sample]:
    """Red and blue squares: colour tells everything."""
    found = []
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 120
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels).save(path)
        found.append(Sample(id=str(i), image=path, patient=f"p{i}"))
    return found


def test_baselines_on_images(pictures: list[Sample]) -> None:
    labels = [i % 2 for i in range(40)]
    drawn = draw_episodes(labels, [s.group for s in pictures], np.arange(40) >= 24, shots=(2,), seeds=(0,))
    methods = {"colour": colour_method(pictures, drawn),
               "from-scratch": from_scratch_method(pictures, drawn, image_size=16, epochs=5, min_steps=40)}  # fmt: skip
    for answer in run_episodes(drawn, methods):
        assert (answer.probabilities.argmax(axis=1) == drawn.truth[drawn.test]).mean() > 0.9
        np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-5)
    numbers = colour_numbers(pictures[:2])
    assert numbers.shape == (2, 6)
    assert numbers[0, 0] > numbers[0, 2]
    assert numbers[1, 0] < numbers[1, 2]


def test_samples_come_from_paths() -> None:
    space = Space("made", "0" * 12, "1" * 12, 2)
    rows = Embeddings(np.ones((2, 2)), ("a", "b"), space, "image", paths=("x.png", None), patients=("p", "q"))
    with pytest.raises(InputError, match="1 of 2 rows name no image file"):
        samples_of(rows)
    assert samples_of(rows.select([0]))[0].patient == "p"
