"""``chiasm calibrate`` from a table of scores and from a model: fit, judge, save, apply, refuse."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chiasm.io.store import save_embeddings
from chiasm.tasks.zero_shot import sigmoid
from chiasm.types import Embeddings, Space

PROBE = Path(__file__).parents[2] / "examples" / "probe_scores.py"


@pytest.fixture(scope="module")
def scores_csv(tmp_path_factory):
    random = np.random.default_rng(0)
    patient = random.integers(0, 400, 700)
    z = random.normal(size=(700, 2)) + random.normal(size=(400, 2))[patient] * 0.5
    truth = (random.random(z.shape) < sigmoid(z)).astype(int)
    frame = pd.DataFrame({
        "patient": [f"secret{p}" for p in patient], "split": np.where(patient % 2, "val", "test"),
        "score effusion": 3 * z[:, 0], "score nodule": 3 * z[:, 1] + 1,
        "truth effusion": truth[:, 0], "truth nodule": truth[:, 1],
    })  # fmt: skip
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    frame.to_csv(path, index=False)
    return path


def test_fit_judge_save_apply(chiasm, scores_csv, tmp_path):
    saved, page = tmp_path / "c.json", tmp_path / "page.html"
    words = ("calibrate", "--scores", scores_csv, "--truth", "*", "--resamples", 50)
    found = chiasm(*words, "--save", saved, "--out", page, "--json")
    assert found["split"] == "fitted on `val`, judged on `test`"
    effusion = found["scores"]["labels"]["effusion"]
    assert effusion["errors"]["after"]["brier"]["value"] < effusion["errors"]["before"]["brier"]["value"]
    assert set(effusion["reached"]) >= {"sensitivity", "specificity"}
    assert found["run_card"]["rows"] == {"scores": 700}
    for text in (page.read_text(), saved.read_text(), json.dumps(found)):
        assert "secret" not in text
    assert "Calibration" in page.read_text()
    assert found == found | chiasm(*words, "--json") | {"run_card": found["run_card"], "saved": found["saved"],
                                                        "page": found["page"]}  # fmt: skip
    printed = chiasm(*words, "--method", "isotonic")
    assert "cannot tell" in printed
    answers = tmp_path / "a.csv"
    rows = chiasm("calibrate", "--scores", scores_csv, "--apply", saved, "--csv", answers, "--json")["rows"]
    assert len(rows) == len(pd.read_csv(answers)) == 700
    assert {r["answer effusion"] for r in rows} == {"present", "absent", "cannot tell"}
    assert "effusion" in chiasm("calibrate", "--scores", scores_csv, "--apply", saved)


def test_patients_on_both_sides_are_refused(chiasm, scores_csv, tmp_path):
    frame = pd.read_csv(scores_csv)
    frame.loc[0, "split"] = {"val": "test", "test": "val"}[frame.loc[0, "split"]]
    frame.to_csv(tmp_path / "t.csv", index=False)
    printed = chiasm("calibrate", "--scores", tmp_path / "t.csv", "--truth", "*", code=1)
    assert "1 patients are in the validation rows and in the test rows" in printed
    assert "secret" not in printed
    frame.drop(columns="split").to_csv(tmp_path / "t.csv", index=False)
    printed = chiasm("calibrate", "--scores", tmp_path / "t.csv", "--truth", "*", "--resamples", 20)
    assert "50% of the patients drawn at random" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of the three"),
        (("--scores", "x.csv", "--model", "m"), "has them already"),
        (("--scores", "x.csv", "--csv", "a.csv"), "belongs to --apply"),
        (("--scores", "x.csv"), "does not exist"),
        (("--scores", "x.csv", "--out-of-domain", "s"), "needs images of the kind"),
        (("--scores", "x.csv", "--apply", "absent.json"), "does not exist"),
        (("--scores", "x.csv", "--coverage", "90"), "between 0 and 1"),
        (("--scores", "x.csv", "--method", "plat"), "unknown method"),
    ],
)
def test_wrong_options(chiasm, words, message):
    assert message in chiasm("calibrate", *words, code=1)


def test_wrong_splits_and_no_vectors(chiasm, scores_csv, tmp_path):
    words = ("calibrate", "--scores", scores_csv, "--truth", "*", "--resamples", 20)
    assert "name both" in chiasm(*words, "--fit-split", "val", code=1)
    assert "no row has split `train`" in chiasm(*words, "--fit-split", "train", "--test-split", "val", code=1)
    assert "needs embeddings" in chiasm(*words, "--in-domain", tmp_path, code=1)


def test_a_model_with_prompts_and_its_calibration(chiasm, model_dir, tmp_path):
    """An untrained model: isotonic may refuse a label, so the truth is made of what it says."""
    from chiasm.data.phantoms import make_chest_phantoms

    table = make_chest_phantoms(90, seed=5, size_px=32, images_per_patient=(1, 1)).save(tmp_path / "phantoms")
    frame = pd.read_csv(table)
    ask = ("--model", model_dir, "--labels", "effusion,nodule", "--multi")
    said = chiasm("zero-shot", "--table", table, *ask, "--json")["images"]
    logits = np.array([[row["logits"][k] for k in ("effusion", "nodule")] for row in said])
    random = np.random.default_rng(0)
    spread = logits.std(axis=0)
    truth = random.random(logits.shape) < sigmoid((logits - np.median(logits, axis=0)) / spread)
    frame[["effusion", "nodule"]] = truth.astype(int)
    frame.to_csv(table, index=False)
    saved = tmp_path / "c.json"
    chiasm(
        "calibrate", "--table", table, *ask, "--truth", "*", "--fit-share", "0.7", "--resamples", 20, "--save", saved
    )
    found = chiasm("zero-shot", "--table", table, *ask, "--calibration", saved, "--json")
    assert len(found["calibrated"]) == 90
    assert 0 <= found["calibrated"][0]["probability effusion"] <= 1
    printed = chiasm("zero-shot", "--table", table, *ask, "--calibration", saved, "--out", tmp_path / "a.csv")
    assert "answer effusion" in pd.read_csv(tmp_path / "a.csv").columns
    assert "effusion" in printed
    again = chiasm("calibrate", "--table", table, *ask, "--apply", saved, "--json")["rows"]
    assert [r["answer nodule"] for r in again] == [r["answer nodule"] for r in found["calibrated"]]
    store, domain = tmp_path / "films.store", tmp_path / "d.json"
    chiasm("embed", table, "--model", model_dir, "--modality", "image", "--out", store)
    two = (
        "--in-domain",
        store,
        "--in-domain",
        store,
        "--out-of-domain",
        store,
        "--fit-share",
        "0.7",
        "--resamples",
        20,
    )
    judged = chiasm("calibrate", "--store", store, *ask, "--truth", "*", *two, "--save", domain, "--json")
    assert judged["scores"]["domain"]["false_alarms"]["n"] == 36  # a fifth of the patients of both stores
    assert judged["scores"]["domain"]["auroc"]["n"] == 36 + 90
    assert [p.rsplit(".", 1)[1] for p in judged["saved"]] == ["json", "npz"]
    flagged = chiasm("zero-shot", "--table", table, *ask, "--calibration", domain, "--json")["calibrated"]
    assert {"out of domain", "domain score", "domain p"} <= set(flagged[0])
    other = (*ask[:3], "nodule,effusion", "--multi")
    assert "the calibration is of" in chiasm("zero-shot", "--table", table, *other, "--calibration", saved, code=1)
    worded = (*ask, "--template", "this shows {}")
    assert "other prompts" in chiasm("zero-shot", "--table", table, *worded, "--calibration", saved, code=1)


def test_a_probe_of_stored_vectors_is_a_table_of_scores(chiasm, tmp_path, monkeypatch, capsys):
    """``examples/probe_scores.py``: three classes, labels joined by ``|``, and out-of-fold scores with their AUROC."""
    random = np.random.default_rng(0)
    patient = np.repeat(np.arange(320), 2)
    true = random.integers(0, 3, 320)[patient]
    vectors = random.normal(size=(640, 5)) + 1.5 * np.eye(3, 5)[true]
    names = np.array(["a", "b", "c"])[true]
    joined = tuple(f"{n}|{'a' if n == 'b' else 'b'}" if random.random() < 0.3 else str(n) for n in names)
    images = Embeddings(vectors, tuple(f"i{k}" for k in range(640)), Space("t", "w", "p", 5), "image", normalized=False,
                        patients=tuple(f"p{p}" for p in patient), labels={"kind": tuple(names.tolist()), "many": joined})  # fmt: skip
    save_embeddings(tmp_path / "s.store", images)

    def probe(*words):
        monkeypatch.setattr("sys.argv", ["probe_scores.py", str(tmp_path / "s.store"), *words])
        runpy.run_path(str(PROBE), run_name="__main__")

    probe("--label", "kind", "--out", str(tmp_path / "kind.csv"))
    found = chiasm("calibrate", "--scores", tmp_path / "kind.csv", "--resamples", 20, "--json")
    assert found["scores"]["mode"] == "single"
    assert found["scores"]["labels"]["a"]["auroc"]["value"] > 0.8
    assert found["split"] == "fitted on `val`, judged on `test`"
    probe("--label", "many", "--out", str(tmp_path / "many.csv"), "--folds", "3")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b", "c"]
    assert all("(Holm)" in line for line in lines)
    assert len(pd.read_csv(tmp_path / "many.csv")) == 640
