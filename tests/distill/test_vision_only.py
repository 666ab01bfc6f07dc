"""From a run with adapters to an export: the same answers on the test images, and nothing of where it was made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chiasm.classifier import load_classifier
from chiasm.distill.experiment import Experiment
from chiasm.distill.run import distill
from chiasm.distill.run_folder import read_predictions
from chiasm.export_vision import export_vision_only


@pytest.mark.slow
def test_an_exported_run_answers_as_it_did_when_it_was_measured(phantom_recipe: Any, tmp_path: Any) -> None:
    recipe = phantom_recipe(backbone={"lora": {"rank": 2}}, fuse={"lr": 0.05})
    run = tmp_path / "run"
    distill(recipe, out=run)
    probabilities, _ = read_predictions(run / "predictions.csv")
    export = export_vision_only(run, tmp_path / "out", onnx=False)
    assert export.agrees
    assert export.text_free.passed
    experiment = Experiment(recipe, cache=run)
    pictures = [experiment.images.table.open(int(r)) for r in experiment.prepare(0).division.test]
    small = load_classifier(tmp_path / "out")
    assert np.abs(small.predict(pictures).probabilities - probabilities).max() <= 1e-5
    content = b"".join(p.read_bytes() for p in sorted((tmp_path / "out").iterdir()))
    assert b"recipe.toml" not in content
    assert str(tmp_path).encode() not in content
