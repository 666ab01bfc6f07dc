"""All arms and seeds: the same data and steps, found again after a stop, nothing left out in silence."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from chiasm.classifier import load_classifier
from chiasm.distill.arms import ARMS, STANDARD
from chiasm.distill.controls import choose_arms, run_controls
from chiasm.distill.experiment import Experiment
from chiasm.distill.run import distill
from chiasm.errors import ConfigError, InputError, UnknownName
from chiasm.evaluate.distill_scores import score_arms

from .test_run import StopAt


def test_all_arms_and_seeds_on_the_same_test_images(synthetic_recipe, tmp_path):
    recipe = synthetic_recipe(arms=("label_leak",), data={"synthetic": {"test": 60}})
    run = run_controls(recipe, out=tmp_path, seeds=2)
    assert run.arms == (*STANDARD, "label_leak")
    assert run.seeds == (0, 1)
    assert [(p.arm, p.seed) for p in run.predictions] == [(a, s) for a in run.arms for s in (0, 1)]
    for seed in (0, 1):
        assert len({p.test_digest for p in run.predictions if p.seed == seed}) == 1
    scores = score_arms(run.predictions)
    assert set(scores.arms) == set(run.arms)
    assert any("SYNTHETIC" in note for note in run.notes)
    records = {arm: json.loads((tmp_path / f"arms/{arm}/seed-1/arm.json").read_text()) for arm in run.arms}
    assert len({records[a]["key"] for a in run.arms}) == len(run.arms)
    steps = {a: records[a]["steps"] for a in run.arms}
    assert steps["unimodal"] == 10
    assert steps["lambda0"] == steps["unimodal_lora"] == 10, "no text, no warm-up"
    assert {steps[a] for a in ("clip_it", "shuffled", "random_text", "prompt_text", "paired")} == {15}
    (main,) = (p for p in run.predictions if p.arm == "clip_it" and p.seed == 0)
    alone = distill(replace(recipe, arms=()), out=tmp_path / "alone")
    assert alone.predictions.digest == main.digest, "the arm clip_it is what a plain run trains"
    assert load_classifier(tmp_path).classes == load_classifier(tmp_path / "alone").classes
    for name in ("model/model.safetensors", "predictions.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_finished_arms_are_found_again(synthetic_recipe, tmp_path):
    recipe, arms = synthetic_recipe(), ("unimodal", "lambda0", "clip_it")
    with pytest.raises(KeyboardInterrupt):
        run_controls(recipe, out=tmp_path, seeds=2, arms=arms, progress=StopAt(75))
    done = {p: p.read_bytes() for p in tmp_path.glob("arms/*/*/predictions.csv")}
    assert 1 <= len(done) < 6
    times = {p: p.stat().st_mtime_ns for p in done}
    run = run_controls(recipe, out=tmp_path, seeds=2, arms=arms, resume=True)
    assert len(run.predictions) == 6
    assert {p: p.stat().st_mtime_ns for p in done} == times, "answers that were there are not made again"
    fresh = run_controls(recipe, out=tmp_path / "fresh", seeds=2, arms=arms)
    assert [p.digest for p in fresh.predictions] == [p.digest for p in run.predictions]
    more = run_controls(recipe, out=tmp_path, seeds=3, arms=arms, resume=True)
    assert [p.digest for p in more.predictions if p.seed < 2] == [p.digest for p in run.predictions]


@pytest.mark.parametrize("damage", ["cut", "other key", "other test"])
def test_answers_that_are_not_of_these_weights_are_made_again(synthetic_recipe, tmp_path, damage):
    recipe = synthetic_recipe()
    first = run_controls(recipe, out=tmp_path, seeds=1, arms=("unimodal",))
    place = tmp_path / "arms/unimodal/seed-0"
    if damage == "cut":
        text = (place / "predictions.csv").read_text()
        (place / "predictions.csv").write_text(text[: len(text) // 2])
    else:
        record = json.loads((place / "arm.json").read_text())
        record["key" if damage == "other key" else "test"] = "0" * 12
        (place / "arm.json").write_text(json.dumps(record))
    again = run_controls(recipe, out=tmp_path, seeds=1, arms=("unimodal",), resume=True)
    assert again.predictions[0].digest == first.predictions[0].digest


def test_arms_that_cannot_be_run_are_listed_with_the_reason(phantom_recipe, phantom_table, tmp_path):
    recipe = phantom_recipe(
        data={"phantoms": None, "source": str(phantom_table), "columns": {"text": ""}},
        pairing={"reports": str(phantom_table), "columns": {"text": "title", "id": "id"}},
    )
    run = run_controls(recipe, out=tmp_path, seeds=1)
    assert set(run.impossible) == {"paired", "prompt_text"}
    assert "text of their own" in run.impossible["paired"]
    assert "pairing.prompts" in run.impossible["prompt_text"]
    assert set(run.arms) == set(STANDARD) - set(run.impossible)
    assert {p.arm for p in run.predictions} == set(run.arms)
    with pytest.raises(ConfigError, match="`paired` cannot be run"):
        run_controls(recipe, out=tmp_path, seeds=1, arms=("paired",), resume=True)


def test_arms_on_images_share_stages_and_features(phantom_recipe, tmp_path):
    recipe = phantom_recipe(run={"cache": str(tmp_path / "cache")})
    run = run_controls(recipe, out=tmp_path / "run", seeds=2)
    assert not run.impossible
    assert len(list((tmp_path / "cache/stages").glob("unimodal-*"))) == 2, "one a seed, whatever the arm"
    assert not (tmp_path / "run/stages").exists()
    assert not (tmp_path / "run/features").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")}
    other = run_controls(recipe, out=tmp_path / "other", seeds=2)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")} == kept
    assert [p.digest for p in other.predictions] == [p.digest for p in run.predictions]
    assert len({p.test_digest for p in run.predictions}) == 1


def test_pictures_that_changed_under_the_same_names_are_seen(phantom_recipe, phantom_table, tmp_path):
    import shutil

    from PIL import Image

    folder = tmp_path / "data"
    shutil.copytree(phantom_table.parent, folder)
    recipe = phantom_recipe(
        data={"phantoms": None, "source": str(folder / "table.csv")},
        pairing={"reports": str(folder / "table.csv"), "columns": {"text": "title", "id": "id"}},
    )
    arms = ("unimodal", "clip_it")
    run_controls(recipe, out=tmp_path / "run", seeds=1, arms=arms)
    setup = Experiment(recipe, cache=tmp_path / "run").prepare(0)
    for side in ("test", "train"):
        name = getattr(setup.problem, side).ids[0]
        Image.new("RGB", (32, 32), (255, 0, 0)).save(folder / "images" / f"{name}.png")
        again = run_controls(recipe, out=tmp_path / "run", seeds=1, arms=arms, resume=True)
        fresh = run_controls(recipe, out=tmp_path / side, seeds=1, arms=arms)
        assert [p.digest for p in again.predictions] == [p.digest for p in fresh.predictions]


def test_shuffled_and_random_keep_what_they_must(phantom_recipe, tmp_path):
    from chiasm.distill.targets import targets_of

    # A retriever without training finds one hub for all; the weights of several reports tell the images apart.
    recipe = phantom_recipe(pairing={"top_k": 3, "temperature": 0.1})
    setup = Experiment(recipe, cache=tmp_path).prepare(0)
    pairs, mixed, drawn = (targets_of(k, setup.sources, seed=0) for k in ("pairs", "shuffled", "random"))
    assert sorted(map(bytes, mixed.train)) == sorted(map(bytes, pairs.train))
    assert mixed.train.tobytes() != pairs.train.tobytes()
    same = np.abs(pairs.train[:, None] - pairs.train[None]).max(axis=2) == 0
    assert ((np.abs(drawn.train[:, None] - drawn.train[None]).max(axis=2) == 0) >= same).all(), "who shares, shares"
    assert np.abs((drawn.train * pairs.train).sum(axis=1)).mean() < 0.5


def test_wrong_requests_are_errors(synthetic_recipe, tmp_path):
    with pytest.raises(UnknownName, match="did you mean `clip_it`"):
        run_controls(synthetic_recipe(), out=tmp_path, arms=("clipit",))
    with pytest.raises(InputError, match="at least one seed"):
        run_controls(synthetic_recipe(), out=tmp_path, seeds=0)
    with pytest.raises(InputError, match="no arm"):
        run_controls(synthetic_recipe(), out=tmp_path, arms=())
    assert not list(tmp_path.iterdir()), "nothing is written before the request is understood"
    recipe = replace(synthetic_recipe(), arms=("label_leak",))
    assert [a.name for a in choose_arms(recipe, None)] == [n for n in ARMS if n in {*STANDARD, "label_leak"}]
