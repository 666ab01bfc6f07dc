"""The demo, end to end and small: what it writes, that its numbers can be computed again, that its page keeps its word."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from chiasm.errors import InputError
from chiasm.evaluate.demo import MARK, run_demo, summary_rows

pytestmark = [
    # A model that was hardly trained scores some labels below one half and cuts reports; both are told, not raised.
    pytest.mark.filterwarnings("default::UserWarning"),
]
NUMBER = {"value", "low", "high", "n", "chance"}


@pytest.fixture
def results(demo_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((demo_dir / "results.json").read_text())
    return loaded


@pytest.fixture
def predictions(demo_dir: Path) -> list[dict[str, str]]:
    with (demo_dir / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_have_the_promised_keys(demo_dir: Path, results: dict[str, Any]) -> None:
    per_label = results["zero_shot"]["per_label"]
    numbers = [
        results["zero_shot"]["macro_auroc"],
        *(scores["auroc"] for scores in per_label.values()),
        results["retrieval"]["text_to_image"]["recall_at_10"],
        results["retrieval"]["image_to_text"]["recall_at_10"],
        results["explain"]["pointing_game"],
    ]
    assert len(per_label) >= 7
    for number in numbers:
        assert set(number) == NUMBER
        assert isinstance(number["n"], int)
        assert number["n"] > 0
    macro = results["zero_shot"]["macro_auroc"]
    assert macro["chance"] == 0.5
    assert macro["low"] <= macro["value"] <= macro["high"]
    assert {"seconds", "seed", "versions", "data"} <= set(results)
    assert results["seed"] == 3
    assert results["seconds"] > 0
    assert results["synthetic"] is True
    assert set(results["versions"]) >= {"chiasm", "torch"}
    assert json.loads((demo_dir.parent / "printed.json").read_text()) == results


def test_everybody_can_compute_the_scores_again(results: dict[str, Any], predictions: list[dict[str, str]]) -> None:
    """With scikit-learn alone, from the CSV alone."""
    assert list(predictions[0]) == ["patient", "label", "truth", "score"]
    again = {}
    for label, scores in results["zero_shot"]["per_label"].items():
        rows = [r for r in predictions if r["label"] == label and r["truth"] != ""]
        truth = [int(r["truth"]) for r in rows]
        assert len(rows) == scores["auroc"]["n"]
        if 0 < sum(truth) < len(truth):
            again[label] = roc_auc_score(truth, [float(r["score"]) for r in rows])
            assert again[label] == pytest.approx(scores["auroc"]["value"], abs=1e-12)
        else:
            assert scores["auroc"]["value"] is None
    assert results["zero_shot"]["macro_auroc"]["value"] == pytest.approx(np.mean(list(again.values())), abs=1e-12)


def test_held_out_patients_were_held_out(demo_dir: Path, predictions: list[dict[str, str]]) -> None:
    from chiasm.data.phantoms import make_chest_phantoms

    trained = {s.patient for s in make_chest_phantoms(40, seed=3, size_px=32).samples}
    tested = {r["patient"] for r in predictions}
    assert len(tested) == 24
    assert not tested & trained
    table = (demo_dir / "data" / "table.csv").read_text()
    assert all(patient in table for patient in tested)


def test_the_table_names_chance_and_majority(results: dict[str, Any]) -> None:
    rows = summary_rows(results)
    assert {r[0] for r in rows} >= {
        "zero-shot macro AUROC", "text to image R@10", "image to text R@10", "heat maps, pointing game",
    }  # fmt: skip
    assert all(float(chance) >= 0 for *_, chance, _ in rows)
    results["zero_shot"]["per_label"]["nodule"]["auroc"] = {**dict.fromkeys(NUMBER), "n": 24}  # no patient has one
    assert ("  nodule", "-", "24", "-", "0.500") in summary_rows(results)


def test_the_page_needs_nothing_but_itself(demo_dir: Path) -> None:
    page = (demo_dir / "index.html").read_text()
    sources = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", page)
    assert sources
    assert all(s.startswith(("data:", "#")) for s in sources), [s[:60] for s in sources]
    assert not re.search(r"@import|url\((?!['\"]?(?:data:|#))", page)
    assert page.lower().count("synthetic") >= 3
    assert "diagnosis" not in page.lower()


def test_every_command_of_the_page_runs_as_written(
    demo_dir: Path, chiasm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    monkeypatch.chdir(demo_dir)
    text = html.unescape(re.sub(r"<[^>]+>", "", (demo_dir / "index.html").read_text()))
    commands = re.findall(r"^\s*chiasm ([a-z-]+ .*)$", text, flags=re.MULTILINE)
    assert {c.split()[0] for c in commands} == {"inspect", "explain", "zero-shot", "retrieval", "embed", "doctor"}
    for command in commands:
        words = shlex.split(command)
        if words[0] == "doctor":
            continue  # it may rightly call a model collapsed that has seen 40 patients
        record = chiasm(*words, "--json")
        if words[0] == "zero-shot":
            assert record["scores"]["macro_auroc"]["value"] == pytest.approx(
                results["zero_shot"]["macro_auroc"]["value"], abs=1e-6
            )
        if words[:2] == ["retrieval", "--table"]:
            ours, page = record["text_to_image"]["recall_at_10"], results["retrieval"]["text_to_image"]["recall_at_10"]
            assert ours["value"] == pytest.approx(page["value"])
    assert (demo_dir / "heat.png").exists()


def test_a_folder_of_somebody_else_is_left_alone(demo_dir: Path, tmp_path: Path) -> None:
    assert (demo_dir / MARK).exists()
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="holds `model`, which no demo made"):
        run_demo(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
