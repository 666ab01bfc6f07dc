"""Tables of scores: four formats, labels found by name, truth in two forms, and what cannot be read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chiasm.errors import ChiasmError, FileFormatError, InputError, UnknownName
from chiasm.evaluate.score_table import read_score_table


def frame():
    return pd.DataFrame({
        "Patient ID": ["p1", "p1", "p2", "p3"],
        "truth": ["a", "b", None, "b"],
        "a": [0.9, 0.2, 0.5, 0.0],
        "b": [0.1, 0.8, 0.5, 1.0],
        "split": ["val", "val", "test", "test"],
        "age": [3, 4, 5, 6],
    })  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json", "jsonl"])
def test_formats_hold_the_same_rows(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    given = frame()
    if kind in ("csv", "tsv"):
        given.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        given.to_parquet(path)
    else:
        records = json.loads(given.to_json(orient="records"))
        path.write_text(json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records)) + "\n")
    found = read_score_table(path)
    assert found.rows.origin.labels == ("a", "b")
    assert (found.rows.origin.mode, found.kind, found.has_patients) == ("single", "probabilities", True)
    assert found.rows.groups == ("p1", "p1", "p2", "p3")
    assert found.rows.classes.tolist() == [0, 1, -1, 1]
    assert found.parts == ("val", "val", "test", "test")
    np.testing.assert_allclose(found.rows.uncalibrated[:3], frame()[["a", "b"]].to_numpy()[:3], atol=1e-9)
    assert np.isfinite(found.rows.scores).all()  # also of a probability of 0


def test_labels_by_prefix_truth_by_columns_and_log_odds(tmp_path):
    path = tmp_path / "t.csv"
    pd.DataFrame({
        "id": ["x", "y"], "probability pleural effusion": [0.25, 0.5], "probability_nodule": [0.5, 0.9],
        "truth pleural effusion": [1, None], "truth_nodule": [0, 1],
    }).to_csv(path, index=False)  # fmt: skip
    found = read_score_table(path, truth="*")
    assert found.rows.origin.labels == ("pleural effusion", "nodule")
    assert found.rows.origin.mode == "multi"
    np.testing.assert_allclose(found.rows.uncalibrated, [[0.25, 0.5], [0.5, 0.9]], atol=1e-9)
    assert found.rows.truth[0].tolist() == [1, 0]
    assert np.isnan(found.rows.truth[1, 0])
    assert found.rows.groups == ("x", "y")
    assert not found.has_patients
    only = read_score_table(path, labels=["Nodule"], truth=None, multi=True)
    assert only.rows.origin.labels == ("Nodule",)
    assert np.isnan(only.rows.truth).all()


def test_joined_names_and_logits(tmp_path):
    path = tmp_path / "t.csv"
    pd.DataFrame({"case": [1, 2, 3], "truth": ["Mass|Nodule", "No Finding", ""], "score Mass": [2.0, -1, 0],
                  "score Nodule": [0.5, -3, 1]}).to_csv(path, index=False)  # fmt: skip
    found = read_score_table(path)
    assert (found.rows.origin.mode, found.kind) == ("multi", "logits")
    assert found.rows.truth[:2].tolist() == [[1, 1], [0, 0]]
    assert np.isnan(found.rows.truth[2]).all()
    assert found.rows.scores[:, 0].tolist() == [2, -1, 0]
    with pytest.raises(InputError, match="outside"):
        read_score_table(path, kind="probabilities")


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({"a": ["x", 1, 1, 1]}, {}, "no number"),
        ({"a": [None, 1, 1, 1]}, {}, "missing or not finite"),
        ({"truth": ["a", "b", "c", "b"]}, {}, "has no column of scores"),
        ({"truth": ["a", "b", "z", "b"], "z": [0, 0, 0, 0]}, {"labels": ["a", "b"]}, "has no column of scores"),
        ({}, {"labels": ["nothing"]}, "no column of scores for label"),
        ({}, {"truth": "*", "labels": ["a", "b"]}, "0/1 column"),
        ({"truth": [1, 2, 3, 4]}, {}, "can be recognised"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path, change, options, error):
    path = tmp_path / "t.csv"
    frame().assign(**change).to_csv(path, index=False)
    with pytest.raises(InputError, match=error) as raised:
        read_score_table(path, **options)
    assert "p1" not in str(raised.value)


def test_damaged_files(tmp_path):
    for name, content in (("a.json", "{"), ("a.parquet", "no"), ("a.xyz", "1"), ("a.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(FileFormatError):
            read_score_table(tmp_path / name)
    (tmp_path / "b.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="records"):
        read_score_table(tmp_path / "b.json")
    with pytest.raises(InputError, match="does not exist"):
        read_score_table(tmp_path / "absent.csv")
    frame().to_csv(tmp_path / "t.csv")
    with pytest.raises(UnknownName):
        read_score_table(tmp_path / "t.csv", truth="trut")


@pytest.mark.parametrize("labels", [None, ["m"], ["n", "M"]])
def test_a_label_with_two_columns_of_scores_is_refused(tmp_path, labels):
    path = tmp_path / "t.csv"
    path.write_text("id,truth,logit m,probability m,score n\nx,m,3,0.9,1\ny,n,-1,0.2,2\n")
    with pytest.raises(InputError, match="two columns of scores") as raised:
        read_score_table(path, labels=labels)
    assert raised.value.hint
    named = read_score_table(path, labels=["logit m", "n"], truth=None)  # by its whole name it is clear
    assert named.rows.scores.tolist() == [[3, 1], [-1, 2]]


def test_a_damaged_parquet_is_read_or_refused(tmp_path: Path) -> None:
    """Metadata that lie about their own parts raise lookups inside the parser, not only its own errors."""
    good = tmp_path / "good.parquet"
    pd.DataFrame({"truth": [0, 1], "score a": [0.1, 0.9]}).to_parquet(good)
    content, draw = good.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "x.parquet").write_bytes(damaged)
        try:
            read_score_table(tmp_path / "x.parquet")
        except ChiasmError:
            refused += 1
    assert refused
