"""``chiasm zero-shot --calibration``: what it answers is what the calibration says of the same scores; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from chiasm.tasks.calibrated import Calibration, CalibrationPlan, fit_calibration
from chiasm.tasks.calibration_file import save_calibration
from chiasm.tasks.scored_rows import Origin, ScoredRows
from chiasm.tasks.zero_shot import sigmoid, softmax

Run = Callable[..., Any]
LABELS = ("effusion", "nodule")


@pytest.fixture(scope="module")
def asked(model_dir: Path, phantom_table: Path) -> dict[str, Any]:
    """The scores and their origin, for yes and no and for classes."""
    from chiasm.cli.inputs import read_images, read_prompts
    from chiasm.embed import embed_images, embed_texts
    from chiasm.load import load
    from chiasm.tasks.zero_shot import build_classifier, classify

    encoder = load(str(model_dir))
    images = embed_images(encoder, read_images(None, phantom_table).samples)
    found: dict[str, Any] = {}
    for mode in ("multi", "single"):
        prompts = read_prompts(", ".join(LABELS), None, pairs=mode == "multi", template=None)
        found[mode] = classify(images, build_classifier(prompts, lambda t: embed_texts(encoder, t)), mode=mode)  # type: ignore[arg-type]
    return found


def calibration_of(result: Any, mode: str) -> Calibration:
    """A calibration of the same classifier, fitted on made scores."""
    random = np.random.default_rng(0)
    centre, spread = result.logits.mean(), max(float(result.logits.std()), 1e-3)
    true = random.integers(0, 2, 200)
    truth = np.eye(2)[true] if mode == "single" else random.integers(0, 2, (200, 2)).astype(float)
    scores = centre + spread * (random.normal(size=(200, 2)) + 1.5 * truth)
    names = tuple(f"secret{i}" for i in range(200))
    return fit_calibration(ScoredRows(scores, truth, names, names, Origin.of(result)), CalibrationPlan(coverage=0.8))


@pytest.mark.parametrize("mode", ["multi", "single"])
def test_answers_are_those_of_the_calibration(
    mode: str, chiasm: Run, asked: dict[str, Any], model_dir: Path, phantom_table: Path, tmp_path: Path
) -> None:
    result = asked[mode]
    made = calibration_of(result, mode)
    save_calibration(tmp_path / "c.json", made)
    words = ("zero-shot", "--table", phantom_table, "--model", model_dir, "--labels", "effusion,nodule",
             *(["--multi"] if mode == "multi" else []), "--calibration", tmp_path / "c.json")  # fmt: skip
    found = chiasm(*words, "--out", tmp_path / "a.csv", "--json")["calibrated"]
    assert [r["id"] for r in found] == list(result.ids)
    if mode == "multi":
        for k, label in enumerate(LABELS):
            line = made.calibrators[label].to_dict()["fitted"][0]
            wanted = sigmoid(line["slope"] * result.logits[:, k] + line["intercept"])
            assert [r[f"probability {label}"] for r in found] == pytest.approx(wanted.tolist(), abs=1e-5)
            assert {r[f"answer {label}"] for r in found} <= {"present", "absent", "cannot tell"}
    else:
        warmth = made.calibrators[""].to_dict()["fitted"][0]["temperature"]
        wanted = softmax(result.logits / warmth)
        assert np.array([[r[f"probability {k}"] for k in LABELS] for r in found]) == pytest.approx(wanted, abs=1e-5)
        for r in found:
            members = [m for m in r["set"].split("|") if m]
            assert r["answer"] == (members[0] if len(members) == 1 else "cannot tell")
    assert pd.read_csv(tmp_path / "a.csv", keep_default_na=False)["id"].tolist() == list(result.ids)
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels", "nodule,effusion", "--multi"), "the calibration is of effusion, nodule (multi)"),
        (("--labels", "effusion", "--multi"), "the question of effusion (multi)"),
        (("--labels", "effusion,nodule"), "the question of effusion, nodule (single)"),
        (("--labels", "effusion,nodule", "--multi", "--template", "look: {}"), "other prompts"),
    ],
)
def test_another_question_is_refused(
    words: tuple[str, ...],
    message: str,
    chiasm: Run,
    asked: dict[str, Any],
    model_dir: Path,
    phantom_table: Path,
    tmp_path: Path,
) -> None:
    save_calibration(tmp_path / "c.json", calibration_of(asked["multi"], "multi"))
    said = chiasm("zero-shot", "--table", phantom_table, "--model", model_dir, *words, "--calibration",
                  tmp_path / "c.json", code=1)  # fmt: skip
    assert message in said
    assert "hint: use the labels and prompts" in said


def test_another_model_is_refused(chiasm: Run, asked: dict[str, Any], phantom_table: Path, tmp_path: Path) -> None:
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    save_encoder(TinyEncoder(9), tmp_path / "other")
    save_calibration(tmp_path / "c.json", calibration_of(asked["multi"], "multi"))
    said = chiasm("zero-shot", "--table", phantom_table, "--model", tmp_path / "other", "--labels", "effusion,nodule",
                  "--multi", "--calibration", tmp_path / "c.json", code=1)  # fmt: skip
    assert "the calibration was fitted in" in said
    assert "hint: " in said


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "no calibration of form"), ("no", "not valid JSON"), (None, "does not exist")]
)
def test_a_file_that_is_no_calibration_is_missed_before_the_model_is_loaded(
    content: str | None, message: str, chiasm: Run, phantom_table: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    said = chiasm("zero-shot", "--table", phantom_table, "--model", "absent-model", "--labels", "effusion,nodule",
                  "--calibration", path, code=1)  # fmt: skip
    assert message in said
    assert "absent-model" not in said
