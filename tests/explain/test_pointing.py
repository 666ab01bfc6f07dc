"""Pointing game of large findings: at least 0.8 where the model is known to see them; the scores of a set add up.

The default suite plants the truth: a tower that looks for red, and red findings of known boxes. The demo's CLIP is asked in the
slow suite; docs/lab-notes.md holds the numbers of the demo's model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from chiasm.encoders.face import Encoder
from chiasm.errors import InputError
from chiasm.evaluate.explain_scores import Case, cases_of, score_methods
from chiasm.tasks.prompts import PromptSet
from chiasm.testing import TinyEncoder
from chiasm.types import Box, Sample

Make = Callable[..., Any]


def red_cases(n: int = 20, *, large: bool, seed: int = 0) -> list[Case]:
    """Images of noise in green and blue with one red rectangle; patients have two images each."""
    rng = np.random.default_rng(seed)
    cases = []
    for k in range(n):
        pixels = rng.integers(0, 120, (64, 64, 3)).astype(np.uint8)
        pixels[..., 0] = 0
        side = int(rng.integers(18, 30)) if large else 6
        x, y = rng.integers(0, 64 - side, 2)
        pixels[y : y + side, x : x + side] = (255, 60, 60)
        image = Image.fromarray(pixels)
        box = Box(float(x), float(y), float(x + side), float(y + side), "red")
        cases.append(Case(lambda image=image: image, "red", ("red",), (), (box,), f"p{k // 2}"))
    return cases


@pytest.fixture
def red_seeker(seeing: Make, answer_with: Make, as_encoder: Make) -> Encoder:
    model = seeing("cls")
    answer_with(model, F.one_hot(torch.tensor(5), 16).float())
    return as_encoder(model)


def test_large_findings_are_pointed_at(red_seeker: Encoder) -> None:
    scores = score_methods(red_seeker, red_cases(large=True), n_resamples=200)
    assert scores.n == scores.n_large == 20
    for method in ("attention", "similarity", "occlusion"):
        found = scores.of(method)
        assert found.large is not None
        assert found.large.pointing_game.value >= 0.8, method
        assert found.large.pointing_game.low > found.large.pointing_game.chance
        assert found.gain is not None
        assert found.gain.difference.low > 0, method  # better than the middle, in pairs
    centre = scores.of("centre")
    assert centre.gain is None
    assert centre.all.pointing_game.value < 0.5


def test_curves_and_shuffled_weights_beside(red_seeker: Encoder) -> None:
    cases = [*red_cases(6, large=True), *red_cases(4, large=False, seed=1)]
    scores = score_methods(
        red_seeker, cases, methods=["occlusion"], curves=True, fidelity=True, fill="mean", steps=8, n_resamples=100
    )
    assert (scores.n, scores.n_large, scores.labels) == (10, 6, {"red": 10})
    found = scores.of("occlusion")
    assert found.deletion is not None
    assert found.insertion is not None
    assert found.deletion.value > 0
    assert found.insertion.value > 0
    assert found.deletion.chance == 0
    assert found.fidelity is not None
    assert found.fidelity.passes
    assert scores.of("centre").fidelity is None
    assert len(scores.table()) == 2
    json.dumps(scores.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="was not scored"):
        scores.of("attention")


def test_the_gain_is_the_difference_of_the_hits(red_seeker: Encoder) -> None:
    scores = score_methods(red_seeker, red_cases(12, large=True), methods=["occlusion"], n_resamples=100)
    occlusion, centre = scores.of("occlusion"), scores.of("centre")
    assert occlusion.gain is not None
    expected = occlusion.all.pointing_game.value - centre.all.pointing_game.value
    assert occlusion.gain.difference.value == pytest.approx(expected)


def test_cases_of_a_table(tmp_path: Path) -> None:
    Image.new("L", (40, 40), 90).save(tmp_path / "a.png")
    samples = [
        Sample(
            f"s{k}",
            tmp_path / "a.png",
            patient=f"p{k}",
            boxes=(Box(1, 1, 9, 9, "Pleural_Effusion"), Box(2, 2, 5, 5, "x")),
        )
        for k in range(8)
    ] + [Sample("none", tmp_path / "a.png"), Sample("text", text="a", boxes=(Box(0, 0, 4, 4, "nodule"),))]
    prompts = PromptSet.from_pairs(["pleural effusion", "nodule"])
    cases, unknown = cases_of(samples, prompts)
    assert [c.label for c in cases] == ["pleural effusion"] * 8
    assert unknown == {"x": 8}
    assert cases[0].open().size == (40, 40)
    assert cases[0].against
    assert len(cases_of(samples, prompts, limit=3)[0]) == 3
    with pytest.raises(InputError, match="label of the prompts"):
        cases_of(samples, PromptSet.from_pairs(["fracture"]))


def test_refusals() -> None:
    with pytest.raises(InputError, match="no image"):
        score_methods(TinyEncoder(), [])


@pytest.mark.slow
def test_the_demos_model_points_at_large_findings(tmp_path: Path) -> None:
    """The model of `make demo` where it lies there, else trained here (minutes); method and patients are fixed beforehand.

    A tower that was trained for a minute only does not reach it (docs/lab-notes.md, 2026-11-21). Devices are left out: the
    box around a thin line is mostly empty.
    """
    from chiasm.data.phantoms import make_chest_phantoms
    from chiasm.evaluate.demo import RECIPE
    from chiasm.load import load
    from chiasm.train.recipe import load_recipe
    from chiasm.train.run import train

    ready = Path(__file__).parents[2] / "demo" / "model"
    encoder = load(ready if ready.is_dir() else train(load_recipe(RECIPE), out=tmp_path / "run").best_dir)
    test = make_chest_phantoms(100, seed=0, size_px=encoder.preprocess_spec.size, first_patient=20_000)
    cases = [
        Case(
            lambda i=i: test.image(i),  # type: ignore[misc]
            name,
            tuple(test.prompts[name]["positive"]),
            tuple(test.prompts[name]["negative"]),
            tuple(b for b in sample.boxes if b.label == name),
            sample.group,
        )
        for i, sample in enumerate(test.samples)
        for name in ("effusion", "pneumothorax", "consolidation", "cardiomegaly", "oedema")
        if any(b.label == name for b in sample.boxes)
    ]
    found = score_methods(encoder, cases, methods=["combined"], n_resamples=300).of("combined")
    assert found.large is not None
    assert found.large.pointing_game.value >= 0.8
    assert found.gain_large is not None
    assert found.gain_large.difference.low > 0.2
