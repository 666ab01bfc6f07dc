"""Few-shot on real lung tiles: the floor is the one that is known for the set, and source tiles stay on one side."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from chiasm.data.splits import split_by_group
from chiasm.datasets import open_dataset
from chiasm.evaluate.few_shot_images import colour_method
from chiasm.evaluate.few_shot_scores import score_few_shot
from chiasm.tasks.k_shot import draw_episodes, run_episodes


def test_the_colour_floor_of_lung_tiles() -> None:
    folder = Path(os.environ.get("CHIASM_DATA", "")) / "lc25000_lung"
    if "CHIASM_DATA" not in os.environ or not (folder / "metadata.csv").is_file():
        pytest.skip("CHIASM_DATA names no folder with lc25000_lung")
    dataset = open_dataset(folder / "metadata.csv", require=("image",))
    samples = [s for s in dataset.samples if int(s.group.rsplit("_", 1)[1]) % 3 == 0]  # lung_aca_0: a third suffices
    labels = [s.labels["label"] for s in samples]
    groups = [s.group for s in samples]
    parts = split_by_group(groups, {"pool": 0.6, "test": 0.4}, seed=0, stratify=labels)
    draws = draw_episodes(labels, groups, [p == "test" for p in parts], shots=(1, 8, None), seeds=(0, 1, 2))
    answers = run_episodes(draws, {"colour": colour_method(samples, draws)})
    scores = score_few_shot(draws, answers, n_resamples=100)
    curve = [scores.point("colour", k).balanced_accuracy.value for k in (1, 8, None)]
    assert curve[0] < curve[2] + 0.05
    assert curve[2] == pytest.approx(0.86, abs=0.07)  # the floor of the whole set: five folds by source tile
    assert scores.test_patients < scores.test_rows
    assert len(np.unique(draws.truth)) == 3
