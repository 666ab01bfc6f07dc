"""A recipe to a classifier: same bits every time, nothing of the test images in the weights, a model that can be read."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.classifier import load_classifier
from chiasm.distill.experiment import Experiment
from chiasm.distill.recipe import load_distill_recipe
from chiasm.distill.run import distill
from chiasm.distill.run_folder import read_predictions, write_predictions
from chiasm.errors import CheckpointError, ConfigError, FileFormatError, InputError, MissingExtra


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_leaves_all_that_is_promised(phantom_recipe, tmp_path):
    recipe = phantom_recipe(data={"label_noise": 0.4}, pairing={"top_k": 2, "temperature": 0.1})
    result = distill(recipe, out=tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"recipe.toml", "data.json", "stages", "model", "predictions.csv", "results.json"} <= names
    assert load_distill_recipe(tmp_path / "recipe.toml").digest == recipe.digest
    probabilities, truth = read_predictions(tmp_path / "predictions.csv")
    assert (tmp_path / "predictions.csv").read_text().startswith("class_0,class_1,target\n")
    assert probabilities.tobytes() == result.predictions.probabilities.tobytes()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["metrics"]["balanced_accuracy"]["chance"] == 0.5
    assert 0 < record["majority_accuracy"] < 1
    assert set(record["stages"]) == {"unimodal", "text", "fuse"}
    assert record["unimodal"]["auroc"]["n"] == len(truth)
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["texts"]["corpus"]["reports"] >= 10
    assert any("EXPERIMENT: 40%" in note for note in data["notes"])
    classifier = load_classifier(tmp_path)
    assert "EXPERIMENT" in classifier.facts["note"]
    experiment = Experiment(recipe, cache=tmp_path)
    test = experiment.prepare(0).division.test
    pictures = [experiment.images.table.open(int(r)) for r in test]
    assert np.allclose(classifier.predict(pictures).probabilities, probabilities, atol=1e-5)
    assert classifier.classes == ("0", "1")


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(phantom_recipe, tmp_path):
    first, second = (distill(phantom_recipe(), out=tmp_path / name) for name in "ab")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert first.predictions.digest == second.predictions.digest
    assert {n: str(v) for n, v in first.metrics.items()} == {n: str(v) for n, v in second.metrics.items()}
    assert (tmp_path / "a/model/classifier.json").read_bytes() == (tmp_path / "b/model/classifier.json").read_bytes()
    other = distill(phantom_recipe(seed=1), out=tmp_path / "c")
    assert other.predictions.ids == first.predictions.ids, "all seeds are tested on the same images"
    assert weights(tmp_path / "c") != weights(tmp_path / "a")


class StopAt:
    """Progress that interrupts at one of its calls."""

    def __init__(self, number: int) -> None:
        self.left = number

    def start(self, total: int | None, description: str) -> None:
        self.tick()

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.tick()

    def finish(self) -> None:
        pass

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(phantom_recipe, tmp_path):
    recipe = phantom_recipe(fuse={"checkpoint_every": 2}, unimodal={"checkpoint_every": 1})
    distill(recipe, out=tmp_path / "whole")
    interruptions = 0
    for number in (3, 12, 17, 21, 9, 10):
        try:
            distill(recipe, out=tmp_path / "cut", resume=True, progress=StopAt(number))
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 3
    distill(recipe, out=tmp_path / "cut", resume=True)
    for file in ("model/model.safetensors", "predictions.csv"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not list((tmp_path / "cut/stages").glob("*.part.safetensors"))


def test_a_folder_keeps_its_run(phantom_recipe, tmp_path):
    recipe = phantom_recipe()
    distill(recipe, out=tmp_path)
    before = weights(tmp_path)
    with pytest.raises(InputError, match="holds a run") as caught:
        distill(recipe, out=tmp_path)
    assert "--resume" in str(caught.value)
    with pytest.raises(CheckpointError, match="another recipe"):
        distill(phantom_recipe(fuse={"kd_weight": 3.0}), out=tmp_path, resume=True)
    assert weights(tmp_path) == before
    begun = tmp_path / "begun"
    with pytest.raises(InputError, match=r"absent\.txt"):
        distill(phantom_recipe(pairing={"reports": "absent.txt"}), out=begun)
    assert not (begun / "recipe.toml").exists()
    distill(recipe, out=begun)  # nothing was there that could be lost
    (tmp_path / "notes.txt").write_text("mine")
    distill(phantom_recipe(fuse={"kd_weight": 3.0, "steps": 7}), out=tmp_path, overwrite=True)
    assert weights(tmp_path) != before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"run\.out"):
        distill(recipe)


@pytest.fixture
def files_recipe(phantom_recipe, phantom_table, tmp_path):
    """A recipe on files with official splits and a corpus of reports, and the folder of the table."""
    folder = tmp_path / "data"
    shutil.copytree(phantom_table.parent, folder)
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({r["patient_id"] for r in rows})
    for r in rows:
        place = patients.index(r["patient_id"]) % 4
        r["split"] = ("train", "train", "val", "test")[place]
    write(folder, rows)
    (folder / "reports.txt").write_text("\n".join(f"Report {i}: tumour of grade {i}." for i in range(12)))
    recipe = phantom_recipe(
        data={"phantoms": None, "source": str(folder / "table.csv")},
        pairing={
            "reports": str(folder / "reports.txt"),
            "overlap_tokens": 4,
            "top_k": 3,
            "temperature": 0.1,
            "prompts": {"0": ("benign",), "1": ("a tumour",)},
        },
    )
    return recipe, folder, rows


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_test_images_never_reach_the_weights(files_recipe, tmp_path):
    recipe, folder, rows = files_recipe
    distill(recipe, out=tmp_path / "before")
    for r in rows:
        if r["split"] == "test":  # the canary: other labels, other pictures, other texts
            r["tumour"] = str(1 - int(r["tumour"]))
            r["title"] = "canary"
            Image.new("RGB", (32, 32), (200, 0, 0)).save(folder / r["filepath"])
    write(folder, rows)
    distill(recipe, out=tmp_path / "after")
    stages = [sorted((tmp_path / n / "stages").iterdir()) for n in ("before", "after")]
    assert weights(tmp_path / "before") == weights(tmp_path / "after"), [p.name for s in stages for p in s]
    assert (tmp_path / "before/predictions.csv").read_bytes() != (tmp_path / "after/predictions.csv").read_bytes()


def test_validation_images_are_not_trained_on(files_recipe, tmp_path):
    recipe, folder, rows = files_recipe
    last = {"monitor": "none"}
    recipe = replace(
        recipe, unimodal=replace(recipe.unimodal, **last), text=replace(recipe.text, **last),
        fuse=replace(recipe.fuse, **last),
    )  # fmt: skip
    distill(recipe, out=tmp_path / "before")
    for r in rows:
        if r["split"] == "val":
            r["tumour"] = str(1 - int(r["tumour"]))
    write(folder, rows)
    distill(recipe, out=tmp_path / "after")
    assert weights(tmp_path / "before") == weights(tmp_path / "after")


def test_pairs_are_blind_to_labels_and_pairs_on_disk_are_the_same(files_recipe, tmp_path):
    from chiasm.datasets.reports import read_reports
    from chiasm.io.pairs import save_pairs
    from chiasm.load import load
    from chiasm.pairing import pair_reports

    recipe, folder, rows = files_recipe
    first = Experiment(recipe, cache=tmp_path / "a").prepare(0)
    for r in rows:
        r["tumour"] = str(1 - int(r["tumour"]))
    write(folder, rows)
    flipped = Experiment(recipe, cache=tmp_path / "b").prepare(0)
    assert len(np.unique(first.sources.given["pairs"].train, axis=0)) > 5, "images have targets of their own"
    assert first.sources.given["pairs"].digest == flipped.sources.given["pairs"].digest
    assert first.sources.given["prompts"].digest == flipped.sources.given["prompts"].digest
    assert first.sources.given["label"].digest != flipped.sources.given["label"].digest
    assert len(first.sources.given["pairs"].train) == len(first.problem.train), "test images get no text"
    experiment = Experiment(recipe, cache=tmp_path / "b")
    made = pair_reports(
        load(recipe.pairing.encoder), experiment.images.table.samples, read_reports(folder / "reports.txt"),
        overlap_tokens=4,
        k=3,
    )  # fmt: skip
    save_pairs(tmp_path / "pairs", made.pairs)
    kept = replace(recipe, pairing=replace(recipe.pairing, reports=None, pairs=str(tmp_path / "pairs")))
    from_disk = Experiment(kept, cache=tmp_path / "b").prepare(0)
    pairs, given = from_disk.sources.given["pairs"], flipped.sources.given["pairs"]
    assert np.allclose(pairs.train, given.train, atol=1e-6)
    assert "prompts" in from_disk.sources.given
    alone = replace(kept, pairing=replace(kept.pairing, encoder=None))
    setup = Experiment(alone, cache=tmp_path / "b").prepare(0)
    assert set(setup.sources.given) == {"pairs"}
    assert setup.impossible("prompt_text")
    assert setup.impossible("paired")
    assert setup.impossible("clip_it") is None
    for name, value in (("tissue", "colon"), ("text_filter", "no"), ("correction", "csls"), ("aggregate", "mean")):
        with pytest.raises(ConfigError, match=rf"`pairing\.{name}` has no effect on `pairing\.pairs`"):
            replace(kept.pairing, **{name: value})
    files = sorted((folder / "images").glob("*.png"))
    one, other = files[0].read_bytes(), files[-1].read_bytes()
    files[0].write_bytes(other)
    files[-1].write_bytes(one)
    for recipe in (kept, alone):
        with pytest.raises(InputError, match="are not the files that were paired"):
            Experiment(recipe, cache=tmp_path / "b").prepare(0)


def test_what_text_there_was_not_is_said(files_recipe, tmp_path):
    recipe, folder, _ = files_recipe
    reports = folder / "reports.txt"
    assert not any("report" in note for note in Experiment(recipe, cache=tmp_path / "a").prepare(0).notes)
    reports.write_text("Tumour.\n \n")
    one = replace(recipe, pairing=replace(recipe.pairing, top_k=1))
    notes = Experiment(one, cache=tmp_path / "b").prepare(0).notes
    assert "reports left out: 1 text is empty" in notes
    assert any("have one and the same report" in note for note in notes)
    reports.write_text("Tumour.\nNo tumour at all.")
    none = replace(one, pairing=replace(one.pairing, min_similarity=0.99))
    assert any("have no report near enough" in note for note in Experiment(none, cache=tmp_path / "c").prepare(0).notes)


def test_a_tower_that_is_trained_and_then_adapted_is_the_one_that_is_saved(phantom_recipe, tmp_path):
    recipe = phantom_recipe(
        backbone={"unimodal": "full", "lora": {"rank": 2}, "augment": {"preset": "histology"}}, unimodal={"lr": 1e-3}
    )
    result = distill(recipe, out=tmp_path)
    experiment = Experiment(recipe, cache=tmp_path)
    setup = experiment.prepare(0)
    assert setup.problem.train.features is None
    pictures = [experiment.images.table.open(int(r)) for r in setup.division.test]
    found = load_classifier(tmp_path).predict(pictures).probabilities
    assert np.allclose(found, result.predictions.probabilities, atol=1e-5)
    locked = replace(recipe, backbone=replace(recipe.backbone, lora=None))
    answers = distill(locked, out=tmp_path / "locked").predictions.probabilities
    assert np.allclose(load_classifier(tmp_path / "locked").predict(pictures).probabilities, answers, atol=1e-5)


def test_what_is_missing_is_said_before_anything_is_trained(phantom_recipe, files_recipe, tmp_path):
    recipe, folder, _ = files_recipe
    for changes, words in (
        ({"encoder": None}, r"pairing\.encoder"),
        ({"reports": None}, r"pairing\.reports"),
        ({"reports": str(folder / "absent.txt")}, r"absent\.txt"),
        ({"prompts": {"0": ("healthy",)}}, r"pairing\.prompts"),
        ({"columns": {"body": "x"}}, r"pairing\.columns\.body"),
    ):
        with pytest.raises((ConfigError, InputError), match=words):
            distill(replace(recipe, pairing=replace(recipe.pairing, **changes)), out=tmp_path / "x", overwrite=True)
    with pytest.raises(ConfigError, match="no images"):
        distill(replace(phantom_recipe(), data=replace(
            phantom_recipe().data, phantoms=None, synthetic=load_synthetic()), backbone=replace(
            phantom_recipe().backbone, image=None, unimodal="full"), pairing=replace(
            phantom_recipe().pairing, encoder=None)), out=tmp_path / "y")  # fmt: skip


def load_synthetic():
    from chiasm.distill.recipe import SyntheticConfig

    return SyntheticConfig(train=20, test=20, reports=20)


def test_reports_of_the_same_patients_are_told(files_recipe, tmp_path):
    recipe, folder, _ = files_recipe
    columns = {"text": "title", "id": "id", "patient": "patient_id"}
    same = replace(recipe, pairing=replace(recipe.pairing, reports=str(folder / "table.csv"), columns=columns))
    notes = Experiment(same, cache=tmp_path).prepare(0).notes
    assert any("of patients whose images are used for test" in note for note in notes)
    assert not any("of patients whose" in note for note in Experiment(recipe, cache=tmp_path).prepare(0).notes)


def test_bits_do_not_depend_on_threads_where_only_heads_train(synthetic_recipe, tmp_path):
    import torch

    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(distill(synthetic_recipe(), out=tmp_path / str(threads)).predictions.digest)
        assert torch.get_num_threads() == threads
    assert weights(tmp_path / "1") == weights(tmp_path / "2")
    assert found[0] == found[1]


def test_a_tracker_that_is_not_installed_is_missed_at_once(synthetic_recipe, tmp_path, monkeypatch):
    from chiasm.distill import run as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="wandb"):
        distill(synthetic_recipe(run={"log": ("wandb",)}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_go_to_a_tracker_too(synthetic_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    distill(synthetic_recipe(run={"log": ("tensorboard",)}), out=tmp_path)
    assert list((tmp_path / "tensorboard").iterdir())


def test_predictions_come_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 50)
    write_predictions(tmp_path / "p.csv", probabilities, rng.integers(0, 3, 50))
    back, truth = read_predictions(tmp_path / "p.csv")
    assert back.tobytes() == probabilities.tobytes()
    assert truth.dtype == np.int64
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileFormatError):
        read_predictions(tmp_path / "p.csv")
