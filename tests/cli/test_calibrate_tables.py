"""``chiasm calibrate --scores`` on small tables: what is refused and how, what the document holds, what must not matter."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from chiasm.tasks.calibration_file import load_calibration
from chiasm.tasks.zero_shot import sigmoid

Run = Callable[..., Any]
HOSTILE = "<svg onload=alert(1)> & “é” $x"


def frame_of(patients: int = 120, images: int = 2, seed: int = 0, label: str = "effusion") -> pd.DataFrame:
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    z = random.normal(size=len(patient)) + random.normal(size=patients)[patient] * 0.5
    truth = (random.random(len(patient)) < sigmoid(z)).astype(float)
    return pd.DataFrame({"id": [f"file{i}.png" for i in range(len(patient))], "patient": [f"secret{p}" for p in patient],
                         f"score {label}": 3 * z + 1, f"truth {label}": truth})  # fmt: skip


@pytest.fixture
def run(chiasm: Run, tmp_path: Path) -> Run:
    """Calibrate a frame."""

    def calibrate(frame: pd.DataFrame, *words: object, code: int = 0, truth: str = "*") -> Any:
        path = tmp_path / "scores.csv"
        frame.to_csv(path, index=False)
        given = ("--truth", truth, "--resamples", 20, *words)
        return chiasm("calibrate", "--scores", path, *given, code=code)

    return calibrate


def with_column(**columns: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.assign(**{name.replace("_", " "): value for name, value in columns.items()})


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda f: f.head(0), (), "has no row"),
        (lambda f: f.head(2), (), "cannot be dealt"),  # two images of one patient
        (lambda f: f.head(8), (), "none of 1 labels can be calibrated"),
        (with_column(truth_effusion=1), (), "none of 1 labels can be calibrated"),
        (with_column(truth_effusion=0), (), "none of 1 labels can be calibrated"),
        (with_column(truth_effusion=None), (), "none of 1 labels can be calibrated"),
        (with_column(truth_effusion=2), (), "something else"),
        (with_column(truth_effusion="yes"), (), "got text"),
        (with_column(score_effusion=0.5), (), "none of 1 labels can be calibrated"),
        (with_column(score_effusion="high"), (), "no number"),
        (with_column(score_effusion=None), (), "missing or not finite"),
        (with_column(score_effusion=np.inf), (), "missing or not finite"),
        (with_column(patient="one"), (), "cannot be dealt"),
        (lambda f: f.assign(**{"score effusion": -f["score effusion"]}), (), "do not rise with it"),
        (lambda f: f.drop(columns="truth effusion"), (), "no 0/1 column"),
        (lambda f: f.drop(columns="score effusion"), (), "can be recognised"),
        (lambda f: f, ("--group", "person"), "person"),
        (lambda f: f, ("--labels", "nodule"), "no column of scores for label `nodule`"),
        (lambda f: f, ("--fit-share", "1"), "between 0 and 1"),
        (lambda f: f, ("--fit-share", "nan"), "between 0 and 1"),
        (lambda f: f, ("--sensitivity", "1.2"), "between 0 and 1"),
        (lambda f: f, ("--coverage", "0"), "between 0 and 1"),
        (lambda f: f, ("--fit-split", "val", "--test-split", "test"), "no row has split `val`"),
        (lambda f: f, ("--method", "magic"), "unknown method"),
        (lambda f: f, ("--model", "m"), "has them already"),
        (lambda f: f, ("--csv", "a.csv"), "belongs to --apply"),
        (lambda f: f, ("--in-domain", "s"), "needs embeddings"),
    ],
)
def test_each_wrong_table_is_told_with_a_way_out(run: Run, change: Any, words: tuple[str, ...], message: str) -> None:
    said = run(change(frame_of()), *words, code=1)
    assert message in said
    assert "Traceback" not in said
    assert "secret" not in said
    assert "file1" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda f: f, ("--model", "m")), (lambda f: f, ("--csv", "a.csv")), (lambda f: f, ("--coverage", "0")),
     (lambda f: f, ("--in-domain", "s")), (lambda f: f.head(8), ()), (with_column(score_effusion=None), ()),
     (lambda f: f.assign(patient="one"), ())],
)  # fmt: skip
def test_refusals_have_a_hint(run: Run, change: Any, words: tuple[str, ...]) -> None:
    assert "hint: " in run(change(frame_of()), *words, code=1)


def test_the_document_has_a_fixed_form(run: Run) -> None:
    found = run(frame_of(), "--json")
    assert set(found) == {"calibration", "scores", "split", "run_card"}
    assert set(found["scores"]) == {"mode", "coverage", "pooled", "labels", "sets", "by_sets", "refused", "n", "patients",
                                    "domain", "notes"}  # fmt: skip
    label = found["scores"]["labels"]["effusion"]
    assert set(label) == {"positives", "negatives", "auroc", "errors", "point", "reached", "band", "sets", "by_sets"}
    for side in ("before", "after", "gain"):
        assert set(label["errors"][side]) == {"ece", "brier", "log_loss"}
        for number in label["errors"][side].values():
            assert set(number) == {"value", "low", "high", "n", "chance"}
            assert number["low"] <= number["high"]
    assert label["errors"]["gain"]["brier"]["value"] == pytest.approx(
        label["errors"]["before"]["brier"]["value"] - label["errors"]["after"]["brier"]["value"]
    )
    assert label["auroc"]["chance"] == 0.5
    assert found["scores"]["patients"] == 60
    assert sum(found["calibration"]["patients"].values()) == 60
    assert label["positives"] + label["negatives"] == found["scores"]["n"] == 120


def test_it_is_the_same_twice_and_another_seed_is_another_deal(run: Run) -> None:
    def numbers(*words: object) -> Mapping[str, Any]:
        found = run(frame_of(), "--json", *words)
        return {"scores": found["scores"], "fitted": found["calibration"]["calibrators"]}

    assert numbers() == numbers()
    assert numbers("--seed", 1)["fitted"] != numbers()["fitted"]


def test_neither_the_order_of_rows_nor_of_columns_nor_names_of_patients_matter_to_the_fit(run: Run) -> None:
    frame = frame_of()
    expected = run(frame, "--json")
    order = frame.sample(frac=1, random_state=1)[["truth effusion", "patient", "score effusion", "id"]]
    for other in (order, frame.assign(unused="x")):
        found = run(other, "--json")
        assert found["scores"]["labels"]["effusion"]["errors"]["after"]["brier"]["value"] == pytest.approx(
            expected["scores"]["labels"]["effusion"]["errors"]["after"]["brier"]["value"]
        )
        slope = [d["calibration"]["calibrators"]["effusion"]["fitted"][0]["slope"] for d in (found, expected)]
        assert slope[0] == pytest.approx(slope[1])


def test_units_of_the_scores_do_not_matter(run: Run) -> None:
    """Platt's line takes up any scale: the same answers of the same patients."""
    frame = frame_of()
    a = run(frame, "--json")["scores"]["labels"]["effusion"]
    b = run(frame.assign(**{"score effusion": 100 * frame["score effusion"] - 7}), "--json")["scores"]["labels"][
        "effusion"
    ]
    for name in ("brier", "log_loss", "ece"):
        assert b["errors"]["after"][name]["value"] == pytest.approx(a["errors"]["after"][name]["value"], abs=1e-9)
    assert b["reached"]["sensitivity"] == a["reached"]["sensitivity"]
    assert b["sets"]["coverage"] == a["sets"]["coverage"]
    assert b["errors"]["before"]["brier"]["value"] != a["errors"]["before"]["brier"]["value"]


def test_without_patients_the_page_says_so(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    found = run(frame_of().drop(columns="patient"), "--json", "--out", page)
    assert "there is no column of patients: each row counts as a patient" in found["scores"]["notes"]
    assert "no column of patients" in page.read_text()
    assert "no column of patients" in run(frame_of().drop(columns="patient"))
    assert not any("no column" in note for note in run(frame_of(), "--json")["scores"]["notes"])


def test_rows_of_the_training_split_take_no_part(run: Run) -> None:
    frame = frame_of(180).assign(split=np.where(np.arange(360) // 2 < 60, "train", "test"))
    spoiled = frame.copy()
    spoiled.loc[frame["split"] == "train", "truth effusion"] = 1.0
    a, b = run(frame, "--json"), run(spoiled, "--json")
    assert a["scores"] == b["scores"]
    assert a["calibration"] == b["calibration"]
    assert "60 patients of the training split left out" in a["split"]
    assert a["scores"]["patients"] == 60


def test_a_name_that_is_code_stays_a_name(run: Run, tmp_path: Path) -> None:
    page, saved = tmp_path / "p.html", tmp_path / "c.json"
    found = run(frame_of(label=HOSTILE), "--json", "--out", page, "--save", saved)
    assert list(found["scores"]["labels"]) == [HOSTILE]
    assert "<svg onload" not in page.read_text()
    assert html.escape(HOSTILE) in page.read_text()
    assert load_calibration(saved).calibration.labels == (HOSTILE,)
    assert "secret" not in page.read_text() + saved.read_text()


def test_what_is_applied_is_what_was_saved(run: Run, chiasm: Run, tmp_path: Path) -> None:
    saved, answers = tmp_path / "c.json", tmp_path / "a.csv"
    fitted = run(frame_of(), "--json", "--save", saved)["calibration"]
    new = frame_of(10, 1, seed=5).drop(columns="truth effusion")
    new.to_csv(tmp_path / "new.csv", index=False)
    said = chiasm("calibrate", "--scores", tmp_path / "new.csv", "--apply", saved, "--csv", answers, "--json")
    line = fitted["calibrators"]["effusion"]["fitted"][0]
    wanted = sigmoid(line["slope"] * new["score effusion"].to_numpy() + line["intercept"])
    assert [r["probability effusion"] for r in said["rows"]] == pytest.approx(wanted.tolist())
    assert [r["id"] for r in said["rows"]] == new["id"].tolist()
    absent, present = (1.0 if t is None else t for t in fitted["sets"]["effusion"]["thresholds"])
    for row, p in zip(said["rows"], wanted, strict=True):
        in_set = (p <= absent + 1e-12, 1 - p <= present + 1e-12)
        word = {(True, False): "absent", (False, True): "present"}.get(in_set, "cannot tell")
        assert row["answer effusion"] == word
    assert pd.read_csv(answers)["answer effusion"].tolist() == [r["answer effusion"] for r in said["rows"]]
    assert said["out_of_domain_score"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(columns={"score effusion": "score nodule"}), "no column of scores for label `effusion`"),
        (lambda f: f.assign(**{"score effusion": np.nan}), "missing or not finite"),
        (lambda f: f.head(0), "has no row"),
    ],
)
def test_what_it_cannot_be_applied_to(run: Run, chiasm: Run, tmp_path: Path, change: Any, message: str) -> None:
    saved = tmp_path / "c.json"
    run(frame_of(), "--save", saved)
    change(frame_of(6)).to_csv(tmp_path / "new.csv", index=False)
    assert message in chiasm("calibrate", "--scores", tmp_path / "new.csv", "--apply", saved, code=1)


def test_a_calibration_of_probabilities_is_not_applied_to_logits(run: Run, chiasm: Run, tmp_path: Path) -> None:
    saved, frame = tmp_path / "c.json", frame_of()
    run(frame.assign(**{"score effusion": sigmoid(frame["score effusion"].to_numpy())}), "--save", saved)
    assert json.loads(saved.read_text())["origin"]["activation"] == "probabilities"
    frame.to_csv(tmp_path / "new.csv", index=False)
    said = chiasm("calibrate", "--scores", tmp_path / "new.csv", "--apply", saved, code=1)
    assert "outside [0, 1], but probabilities are expected" in said


def test_classes_in_one_column(run: Run) -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 3, 240)
    scores = random.normal(size=(240, 3)) + 2 * np.eye(3)[true]
    frame = pd.DataFrame(scores, columns=["score a", "score b", "score c"]).assign(
        truth=np.array(["a", "b", "c"])[true], patient=[f"secret{i}" for i in range(240)]
    )
    found = run(frame, "--json", truth="truth")
    assert found["scores"]["mode"] == "single"
    assert found["scores"]["pooled"]["after"]["brier"]["chance"] == pytest.approx(2 / 3, abs=0.02)
    said = run(frame.assign(truth=np.where(true == 2, "d", "a")), truth="truth", code=1)
    assert "true class that has no column of scores" in said
    assert "exclude each other" in run(frame, "--method", "platt", truth="truth", code=1)
