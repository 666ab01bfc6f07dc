"""The page of the controls: verdict first, every arm in plain words, no request, nothing that tells about patients."""

from __future__ import annotations

import html as web
import re

import numpy as np
import pytest

from chiasm.evaluate.distill_page import MEANINGS, render_control_page
from chiasm.evaluate.distill_scores import score_arms
from chiasm.evaluate.distill_verdict import SPOKEN
from chiasm.evaluate.page import render_page, save_page
from chiasm.metrics.paired import ArmPredictions

FACTS = {"data": "made-up <rows>", "recipe": "0123456789ab"}


def make_page(gains: dict[str, float], *, seeds: int = 3, shared: bool = True, classes: int = 2, **options):
    made = []
    for s in range(seeds):
        random = np.random.default_rng(0 if shared else s)
        truth = np.arange(60) % classes
        shape = random.normal(size=(60, classes))
        for k, (arm, gain) in enumerate(gains.items()):
            noise = 0.2 * np.random.default_rng([s, k]).normal(size=shape.shape)
            p = np.exp(shape + noise + (1 + gain) * np.eye(classes)[truth])
            ids = tuple(f"secret-{s if not shared else 0}-{i}" for i in range(60))
            groups = tuple(f"Miller-{i // 2}" for i in range(60))
            made.append(ArmPredictions(arm, s, ids, groups, truth, p / p.sum(1, keepdims=True)))
    scores = score_arms(made, n_resamples=30, **options)
    page = render_control_page(
        scores, facts=FACTS, command="chiasm distill r.toml --controls --seeds 5", about={"own-arm": "my way"}
    )
    return scores, page, render_page(page)


ALL = {"unimodal": 0.0, "lambda0": 0.0, "clip_it": 2.0, "shuffled": -0.5, "random_text": 0.0, "own-arm": 0.5}


@pytest.fixture(scope="module")
def made():
    return make_page(ALL)


def test_the_page_says_everything_in_one_file(made, tmp_path):
    scores, page, html = made
    assert [s.title for s in page.sections][:3] == ["Verdict", "What each arm is", "Differences"]
    assert page.sections[-1].title == "Do it again"
    text = web.unescape(html)
    for reason in scores.verdict.reasons:
        assert reason in text
    for arm in ALL:
        assert SPOKEN.get(arm, arm) in text
    assert "my way" in text
    assert "chiasm distill r.toml --controls --seeds 5" in text
    assert "made-up <rows>" in text
    assert "<rows>" not in html
    assert scores.digests["predictions"] in text
    assert "30 patients" in text
    assert save_page(page, tmp_path / "index.html").stat().st_size < 1_000_000


def test_nothing_leaks_and_nothing_is_loaded(made):
    _, _, html = made
    assert "Miller" not in html
    assert "secret" not in html
    assert "diagnos" not in html.lower()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", html)
    assert "<script" not in html
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S).lower()


@pytest.mark.parametrize(
    "case",
    [
        {"seeds": 1},
        {"shared": False},
        {"classes": 4, "level": 0.9},
    ],
)
def test_other_experiments(case):
    scores, page, html = make_page({a: ALL[a] for a in ("unimodal", "lambda0", "clip_it")}, **case)
    assert scores.verdict.headline in html
    assert ("seeds and patients" in html) == case.get("shared", True)
    assert all(np.isfinite(k.interval.value) for k in page.key_numbers)
    if "level" in case:
        assert "95 %" not in html
        assert "90 %" in html


def test_one_arm_alone_has_no_differences():
    scores, _, html = make_page({"clip_it": 1.0})
    assert scores.verdict.outcome == "cannot_say"
    assert "No two arms can be compared" in html


def test_every_named_arm_has_a_meaning():
    assert set(MEANINGS) == set(SPOKEN)
