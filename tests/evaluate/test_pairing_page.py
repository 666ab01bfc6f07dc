"""Scores and page of pairs: controls beside them, labels only in the audit, patients only on request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.data.phantoms import make_tissue_phantoms
from chiasm.datasets.reports import ReportCorpus
from chiasm.errors import InputError
from chiasm.evaluate.page import render_page
from chiasm.evaluate.pairing_page import pairing_page
from chiasm.evaluate.pairing_scores import score_pairing
from chiasm.metrics.pairing import hubness
from chiasm.pairing import PairingRun, pair_reports
from chiasm.testing import TinyEncoder
from chiasm.types import Sample


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("tissue")
    phantoms = make_tissue_phantoms(30, seed=1, size_px=32)
    made = []
    for row, sample in enumerate(phantoms.samples):
        phantoms.image(row).save(folder / f"{row}.png")
        made.append(replace(sample, image=folder / f"{row}.png", text=None))
    return made


@pytest.fixture(scope="module")
def run(samples: list[Sample]) -> PairingRun:
    reports = make_tissue_phantoms(12, seed=2, size_px=32, first_patient=500).samples
    texts = [s.text or "" for s in reports]
    corpus = ReportCorpus.from_texts(
        [*texts, " ".join(texts[:3]), texts[0]], patients=[*(s.patient for s in reports), "zz", None], name="made"
    )
    return pair_reports(TinyEncoder(0), samples, corpus, k=2)


def test_scores_beside_chance(run: PairingRun, samples: list[Sample]) -> None:
    scores = score_pairing(run, samples=samples, audit_label="tumour", permutations=50)
    assert scores.images == scores.paired == len(samples)
    assert scores.reports - scores.distinct_reports >= 1
    assert scores.long_reports >= 1
    assert scores.loads.sum() == scores.random_loads.sum() == len(samples)
    assert (scores.random_similarity <= scores.similarity).all()
    assert scores.nearer_than_random > 0.5
    assert scores.shared_patients == 0
    counts = np.bincount(run.report_of)
    assert scores.chosen_chunks == pytest.approx(counts[run.pairing.report_rows[:, 0]].mean())
    assert scores.audit is not None
    assert abs(scores.audit.shuffled.adjusted) < 0.2
    json.dumps(scores.to_dict(), allow_nan=False)
    same = score_pairing(run, samples=samples, audit_label="tumour", permutations=50)
    assert same.to_dict() == scores.to_dict()
    mine = [replace(s, patient="zz") for s in samples]
    assert score_pairing(run, samples=mine).shared_patients == 1
    assert score_pairing(run).shared_patients is None
    with pytest.raises(InputError, match="no label column `age`"):
        score_pairing(run, samples=samples, audit_label="age")


def test_labels_change_the_audit_and_nothing_else(run: PairingRun, samples: list[Sample]) -> None:
    one = score_pairing(run, samples=samples, audit_label="tumour", permutations=20).to_dict()
    rng = np.random.default_rng(0)
    other = [replace(s, labels={"tumour": int(rng.integers(2))}) for s in samples]
    two = score_pairing(run, samples=other, audit_label="tumour", permutations=20).to_dict()
    assert one.pop("audit") != two.pop("audit")
    assert one == two


def test_a_page_without_patients(run: PairingRun, samples: list[Sample]) -> None:
    scores = score_pairing(run, samples=samples, audit_label="tumour", permutations=20)
    html = render_page(pairing_page(run, scores, samples))
    for text in run.corpus.texts:
        assert text not in html
    for name in (*run.pairing.image_ids, *run.corpus.ids):
        assert name not in html
    assert "data:image/png" not in html
    for words in ("Audit", "shuffled", "lead over the second", "no label was read", run.corpus.digest):
        assert words in html


def test_examples_mark_the_chunk(run: PairingRun, samples: list[Sample]) -> None:
    page = pairing_page(run, score_pairing(run), samples, examples=4)
    section = next(s for s in page.sections if s.title == "Pairs side by side")
    note, examples = section.blocks
    assert "patients" in note.text  # type: ignore[union-attr]
    rows: Any = examples.rows  # type: ignore[union-attr]
    assert len(rows) == 4
    shown = [float(e.heading.split()[1].rstrip(",")) for e in rows]
    assert shown == sorted(shown, reverse=True)
    texts = run.corpus.texts
    for e in rows:
        whole = (e.before.removeprefix("… ") + e.marked + e.after.removesuffix(" …")).strip()
        assert any(whole in text for text in texts)
        assert e.marked in {p.text for p in run.pieces}
    html = render_page(page)
    assert html.count("<mark>") == 4
    assert "Audit" not in html


def test_what_users_typed_is_escaped(run: PairingRun, samples: list[Sample]) -> None:
    wild = "<script>alert(1)</script>"
    bad = [replace(s, labels={wild: i % 2}) for i, s in enumerate(samples)]
    corpus = replace(run.corpus, name=wild)
    html = render_page(
        pairing_page(
            replace(run, corpus=corpus, pairs=replace(run.pairs, header=replace(run.pairs.header, corpus=wild))),
            score_pairing(run, samples=bad, audit_label=wild, permutations=5),
            bad,
            examples=2,
        )
    )
    assert wild not in html


def test_nothing_paired_makes_a_page_all_the_same(samples: list[Sample]) -> None:
    corpus = ReportCorpus.from_texts(["Necrosis."])
    run = pair_reports(TinyEncoder(0), samples, corpus, min_similarity=1.0)
    scores = score_pairing(run, samples=samples)
    assert scores.paired == 0
    json.dumps(scores.to_dict(), allow_nan=False)
    html = render_page(pairing_page(run, scores, samples, examples=3))
    assert "nan" not in html
    assert f"it leaves {len(samples)} of {len(samples)} images" in html


def test_one_report_for_most_images_is_warned_of(run: PairingRun, samples: list[Sample]) -> None:
    scores = score_pairing(run)
    n = scores.paired

    def page(most: int) -> str:
        loads = np.zeros(len(scores.loads), dtype=np.int64)
        loads[:3] = most, (n - most) // 2, (n - most + 1) // 2
        return render_page(pairing_page(run, replace(scores, loads=loads, hubness=hubness(loads)), samples))

    told = page(n - 1)
    assert f"{n - 1} of {n} images have one and the same report" in told
    assert "one and the same report" not in page(n // 2)
    assert "pairs = " in told


def test_examples_whose_file_has_gone_are_passed_over(run: PairingRun, samples: list[Sample], tmp_path: Path) -> None:
    gone = [replace(s, image=tmp_path / "gone.png") for s in samples]
    page = pairing_page(run, score_pairing(run), gone, examples=3)
    assert "<mark>" not in render_page(page)
