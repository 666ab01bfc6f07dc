"""Weak labels of the real Open-i reports against their MeSH terms, on the half that no rule was corrected on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from chiasm.datasets import open_dataset
from chiasm.datasets.columns import Columns
from chiasm.evaluate.weak_label_scores import given_labels, score_weak_labels
from chiasm.tasks.weak_labels import label_texts
from chiasm.tasks.weak_rules import LabelRules


def test_agreement_with_the_terms() -> None:
    if not os.environ.get("CHIASM_DATA"):
        pytest.skip("CHIASM_DATA does not name the folder of the real data")
    table = Path(os.environ["CHIASM_DATA"]) / "openi_reports" / "metadata.jsonl"
    if not table.is_file():
        pytest.skip("the folder of the real data holds no openi_reports")
    dataset = open_dataset(table, columns=Columns(text=("findings", "impression")), require=("text",))
    kept = [s for s in dataset.samples if int(hashlib.sha256(s.id.encode()).hexdigest(), 16) % 2]
    rules = LabelRules.load()
    weak = label_texts([s.text for s in kept], rules, ids=[s.id for s in kept])
    truth = given_labels({"mesh": [s.labels["mesh_major"] for s in kept]}, rules, "mesh")
    scores = score_weak_labels(weak, truth, uncertain="ignore", n_resamples=2)
    assert len(scores.findings) == 14
    assert scores.macro_f1 > 0.75
    for name, least in (("cardiomegaly", 0.95), ("pleural_effusion", 0.95), ("atelectasis", 0.9), ("no_finding", 0.92)):
        assert scores.findings[name].f1.value > least
        assert scores.findings[name].f1.value > scores.findings[name].always + 0.3
