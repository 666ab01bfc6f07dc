"""``chiasm weak-labels``: tables of labels, agreement, probes, rules of one's own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chiasm.data.phantoms import make_chest_phantoms

Run = Callable[..., Any]


def test_labels_agreement_and_probes(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    written, page = tmp_path / "labels.csv", tmp_path / "labels.html"
    words = ("weak-labels", "--table", phantom_table, "--truth", "*", "--uncertain", "positive")
    record = chiasm(*words, "--labels-out", written, "--evidence", "--out", page, "--examples", 2, "--json")
    assert record["agreement"]["findings"]["pneumothorax"]["f1"]["value"] == 1
    assert record["labels"]["pneumothorax"]["positive"] > 0
    assert "run_card" in record
    with written.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record["reports"]
    assert set(rows[0]["pneumothorax"]) <= {"0", "1", "-", ""}
    assert "texts of patients" in page.read_text()
    parquet = tmp_path / "labels.parquet"
    text = chiasm("weak-labels", "--table", phantom_table, "--labels-out", parquet, "--sections", "impression")
    assert "not named" in text
    assert pq.read_table(parquet).num_rows == len(rows)


def test_a_probe_of_a_store(chiasm: Run, model_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    table = make_chest_phantoms(70, seed=5, size_px=32, images_per_patient=(1, 1)).save(tmp_path / "phantoms")
    chiasm("embed", table, "--out", store, "--model", model_dir, "--modality", "image", "--json")
    words = ("weak-labels", "--table", table, "--train-probe")
    record = chiasm(*words, "--truth", "*", "--store", store, "--uncertain", "positive", "--json")
    pair = next(iter(record["probes"]["findings"].values()))
    assert 0 <= pair["weak"]["value"] <= 1
    assert pair["trained_weak"] > 0
    assert "needs --truth" in chiasm(*words, "--store", store, code=1)


def test_rules_of_ones_own(chiasm: Run, phantom_table: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    chiasm("weak-labels", "--write-rules", rules)
    rules.write_text(rules.read_text() + '\n[[finding]]\nname = "haze"\nphrases = ["haze"]\n')
    record = chiasm("weak-labels", "--table", phantom_table, "--rules", rules, "--json")
    assert "haze" in record["labels"]
    assert "no table" in chiasm("weak-labels", code=1)
    assert "unknown set of rules" in chiasm("weak-labels", "--table", phantom_table, "--rules", "knees", code=1)
    words = ("weak-labels", "--table", phantom_table)
    assert "must end in .csv" in chiasm(*words, "--labels-out", tmp_path / "l.txt", code=1)
    assert "no label column `mesh`" in chiasm(*words, "--truth", "mesh", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels-out", "labels.txt"), "must end in .csv or .parquet, got `labels.txt`"),
        (("--labels-out", "private/labels"), "there is no folder `private` to write `labels` to"),
        (("--examples", 2, "--sections", "findings"), "--examples shows whole reports"),
        (("--train-probe",), "needs --truth"),
        (("--truth", "nothing"), "no label column `nothing`"),
        (("--rules", "knees"), "unknown set of rules `knees`"),
        (("--split", "winter"), "winter"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint(
    chiasm: Run, phantom_table: Path, words: tuple[object, ...], message: str
) -> None:
    text = chiasm("weak-labels", "--table", phantom_table, *words, code=1)
    assert message in text
    assert "hint: " in text
    assert str(phantom_table.parent) not in text


def test_a_phrase_in_place_of_a_list_is_refused(chiasm: Run, phantom_table: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[finding]]\nname = "effusion"\nphrases = "effusion"\n')
    text = chiasm("weak-labels", "--table", phantom_table, "--rules", rules, code=1)
    assert "`phrases` must be a list of phrases" in text


def test_the_card_tells_truths_and_groups_apart(chiasm: Run, phantom_table: Path) -> None:
    words = ("weak-labels", "--table", phantom_table, "--json")
    plain, again, truth, group = (
        chiasm(*words, *more)["run_card"] for more in ((), (), ("--truth", "*"), ("--group", "id"))
    )
    assert plain["digest"] == again["digest"]
    assert len({plain["digest"], truth["digest"], group["digest"]}) == 3
    assert "given labels" in truth["data"]
