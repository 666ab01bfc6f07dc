"""``chiasm moderate``: a folder by a policy, labelled tables, fitted thresholds, the shipped policy, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chiasm.evaluate.moderation_scores import score_moderation
from chiasm.tasks.moderation import Category, Policy, embed_policy, moderate, read_policy
from chiasm.types import Embeddings, Space

SHIPPED = Path(__file__).parents[2] / "recipes" / "moderation_chest_intake.toml"
POLICY = """
name = "p"
[categories.tissue]
action = "reject"
texts = ["pink tissue", "cells"]
against = ["a chest film"]
threshold = 0.05
review = 0.0
[categories."never seen"]
action = "review"
texts = ["a horse"]
against = ["a chest film"]
threshold = 1.9
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    from chiasm.data.phantoms import make_chest_phantoms, make_tissue_phantoms

    folder = tmp_path_factory.mktemp("kinds")
    rows = []
    for kind, make in (("film", make_chest_phantoms), ("tissue", make_tissue_phantoms)):
        table = make(40, seed=4, size_px=48, images_per_patient=(1, 1)).save(folder / kind)
        for row in pd.read_csv(table).to_dict("records"):
            rows.append({"filepath": f"{kind}/{row['filepath']}", "patient_id": row["patient_id"], "kind": kind})
    path = folder / "labelled.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    (folder / "policy.toml").write_text(POLICY)
    return path


def test_a_folder_gets_decisions_and_evidence(chiasm, labelled, model_dir, tmp_path):
    words = (
        "moderate",
        labelled.parent / "tissue" / "images",
        "--policy",
        labelled.parent / "policy.toml",
        "--model",
        model_dir,
    )
    csv, jsonl, page = tmp_path / "d.csv", tmp_path / "e.jsonl", tmp_path / "p.html"
    found = chiasm(*words, "--csv", csv, "--jsonl", jsonl, "--out", page, "--examples", 2, "--json")
    assert sum(found["counts"].values()) == len(found["images"]) == 40
    assert len(found["images"][0]["evidence"]) == 2
    frame = pd.read_csv(csv)
    assert set(frame["decision"]) <= {"reject", "review", "accept"}
    assert {"text", "cosine", "against", "margin", "because"} <= set(frame.columns)
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [x["decision"] for x in lines] == list(frame["decision"])
    assert "fitted to nothing" in page.read_text()
    assert page.read_text().count("data:image/png") >= 2
    assert found["run_card"]["prompts"]
    assert "nearest text" in chiasm(*words)


def test_thresholds_are_fitted_on_some_patients_and_judged_on_others(chiasm, labelled, model_dir, tmp_path):
    fitted, page = tmp_path / "fitted.toml", tmp_path / "p.html"
    words = ("moderate", "--table", labelled, "--truth", "kind", "--model", model_dir, "--resamples", 50)
    policy = ("--policy", labelled.parent / "policy.toml")
    found = chiasm(*words, *policy, "--fit", fitted, "--out", page, "--json")
    made = read_policy(fitted)
    assert made.categories[0].fitted["positives"] + made.categories[0].fitted["negatives"] == 40
    assert found["scores"]["n"] == 40
    assert found["scores"]["skipped"] == ["never seen"]
    assert "never seen" in found["refused"]
    # An untrained tower still sees that pink is not grey: its geometry, read by fitted thresholds.
    assert found["scores"]["categories"]["tissue"]["positives"] > 10
    assert "data:image" not in page.read_text()
    assert "phantom" not in page.read_text()
    printed = chiasm(*words, "--policy", fitted)
    assert "right decisions" in printed
    text = fitted.read_text().replace(made.space.weights, "0" * len(made.space.weights))
    fitted.write_text(text)
    assert "were fitted in" in chiasm(*words, "--policy", fitted, code=1)


def test_the_shipped_policy_is_whole(chiasm, labelled, model_dir):
    policy = read_policy(SHIPPED)
    assert policy.space is None
    assert policy.by_hand == policy.names
    found = chiasm("moderate", "--table", labelled, "--policy", SHIPPED, "--model", model_dir, "--json")
    assert set(found["images"][0]["evidence"][0]) >= {"category", "text", "cosine", "margin"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fit", "x.toml"), "name the column"),
        (("a.png", "--truth", "kind"), "images are given"),
        (("--table", "T", "--truth", "nothing"), "no label column"),
        (("--table", "T", "--truth", "patient"), "no label column"),
        (("--table", "T", "--store", "s"), "one of the two"),
        ((), "one of the two"),
    ],
)
def test_wrong_options(chiasm, labelled, model_dir, words, message):
    given = [labelled if w == "T" else w for w in words]
    printed = chiasm("moderate", *given, "--policy", labelled.parent / "policy.toml", "--model", model_dir, code=1)
    assert message in printed


def test_scores_are_counted_by_hand():
    space = Space("t", "w", "p", 2)
    texts = {"x": (1, 0), "y": (0, 1)}
    policy = Policy("p", (Category("X", ("x",), ("y",), threshold=0.5, review=-0.5),))
    vectors = embed_policy(policy, lambda t: Embeddings(np.array([texts[v] for v in t]), tuple(t), space, "text"))
    angles = np.array([0.0, 0.1, 0.75, 0.8, 1.5, 1.5, 0.0, 1.5])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    result = moderate(Embeddings(rows, tuple("abcdefgh"), space, "image"), vectors)
    assert result.decisions == ("reject", "reject", "review", "review", "accept", "accept", "reject", "accept")
    found = score_moderation(result, {"X": [1, 1, 1, 0, 0, 0, 0, None]}, n_resamples=50)
    (x,) = found.categories
    assert (x.positives, x.negatives) == (3, 4)
    assert x.found.value == 1.0
    assert x.left_alone.value == 0.5
    assert x.acted.value == pytest.approx(2 / 3)
    assert x.wrongly_acted.value == 0.25
    assert found.reviewed.value == pytest.approx(2 / 7)
    assert found.wanted.value == pytest.approx(4 / 5)
    assert found.wanted.chance == pytest.approx(3 / 5)  # of the five that are no review
    assert found.confusion == {"reject": {"reject": 2, "review": 1, "accept": 0},
                               "accept": {"reject": 1, "review": 1, "accept": 2}}  # fmt: skip
