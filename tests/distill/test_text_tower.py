"""A text side that is adapted: the same vectors as the locked one at first, only text weights train."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from chiasm.classifier import load_classifier
from chiasm.distill.arms import ARMS
from chiasm.distill.experiment import Experiment
from chiasm.distill.run import distill
from chiasm.distill.targets import targets_of
from chiasm.errors import ConfigError

LORA = {"text_lora": {"rank": 2}, "collapse_rank": 0.0}


@pytest.mark.parametrize("arm", ["clip_it", "shuffled", "prompt_text"])
def test_at_first_a_text_tower_gives_the_targets(phantom_recipe, tmp_path, arm):
    recipe = phantom_recipe(pairing={"top_k": 3, "temperature": 0.1}, fuse=LORA)
    setup = Experiment(recipe, cache=tmp_path).prepare(0)
    targets = targets_of(ARMS[arm].targets, setup.sources, seed=0)
    tower = setup.text_tower(ARMS[arm])
    for split, expected in (("train", targets.train), ("validation", targets.validation)):
        with torch.no_grad():
            found = torch.nn.functional.normalize(tower(split, torch.arange(len(expected))), dim=1)
        assert np.allclose(found.numpy(), expected, atol=1e-5)
    assert not [n for n, _ in tower.named_parameters() if "visual" in n or "logit" in n]
    kept = {n for n, t in tower.state_dict().items() if not t.is_floating_point()}
    assert not kept, "a checkpoint must not hold token ids of reports"
    assert setup.impossible("random_text")
    assert setup.impossible("paired")
    assert setup.impossible(arm) is None


def test_adapted_texts_leave_the_retriever_alone_and_train(phantom_recipe, tmp_path):
    recipe = phantom_recipe(pairing={"top_k": 3, "temperature": 0.1}, fuse=LORA)
    result = distill(recipe, out=tmp_path / "adapted")
    locked = distill(replace(recipe, fuse=replace(recipe.fuse, text_lora=None)), out=tmp_path / "locked")
    assert result.predictions.digest != locked.predictions.digest
    assert not [n for n in load_classifier(tmp_path / "adapted").state_dict() if "text" in n and "heads" not in n]
    experiment = Experiment(recipe, cache=tmp_path)
    before = experiment.retriever.encoder.space
    experiment.prepare(0).text_tower(ARMS["clip_it"])
    assert experiment.retriever.encoder.model.visual is not None
    assert experiment.retriever.encoder.space == before


def test_texts_that_are_not_there_cannot_be_adapted(synthetic_recipe, tmp_path):
    with pytest.raises(ConfigError, match="text_lora"):
        distill(synthetic_recipe(fuse=LORA), out=tmp_path)
