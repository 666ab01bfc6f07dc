"""The page of weak labels: all numbers, no text unless asked, hostile texts as text; the card of a run on texts."""

from __future__ import annotations

import csv
import dataclasses
import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.cli.weak_labels import _write
from chiasm.errors import InputError
from chiasm.evaluate.page import Excerpts, Page, Table, render_page
from chiasm.evaluate.weak_label_page import make_weak_label_page, report_card
from chiasm.evaluate.weak_label_scores import WeakLabelScores, given_labels, score_weak_labels
from chiasm.evaluate.weak_probe import ProbePair, WeakProbeScores, draw_test
from chiasm.metrics.agreement import Agreement
from chiasm.tasks.weak_labels import WeakLabels, label_texts
from chiasm.tasks.weak_rules import LabelRules
from chiasm.types import Embeddings, Interval, Sample, Space

NAN = float("nan")
RULES = LabelRules.from_dict({
    "name": "two", "no_finding": "nothing", "exempt": ["tube"],
    "finding": [
        {"name": "effusion", "phrases": ["effusion"], "terms": ["pleural effusion"]},
        {"name": "mass", "phrases": ["mass", "nodule"], "terms": ["nodule", "mass/lung"]},
        {"name": "tube", "phrases": ["tube"], "terms": ["catheter", "thickening/mild"]},
    ],
    "cues": {"negated_before": ["no"], "uncertain_before": ["possible"]},
})  # fmt: skip
TEXTS = ("Effusion.", "No effusion.", "Possible effusion.", "Nodule. No effusion.", "Tube.", "")
SAMPLES = [Sample(id=f"secret-{i}", text=t, patient=f"patient-{i // 2}") for i, t in enumerate(TEXTS)]


def weak(texts: tuple[str, ...] = TEXTS) -> WeakLabels:
    n = len(texts)
    return label_texts(
        texts, RULES, ids=[f"secret-{i}" for i in range(n)], patients=[f"patient-{i // 2}" for i in range(n)]
    )


def interval(value: float, chance: float | None = None) -> Interval:
    return Interval(value, value - 0.011, value + 0.022, 6, chance)


def agreed(start: float, **changes: Any) -> Agreement:
    values = [interval(start + k / 1000) for k in (1, 2, 3, 4)]
    return dataclasses.replace(Agreement(*values, start + 0.005, 2, 3, 6), **changes)


KINDS = {
    "given 1": {"stated": 11, "denied": 12, "doubted": 13, "not named": 14},
    "given 0": {"stated": 15, "denied": 16, "doubted": 17, "not named": 18},
}
BARE = agreed(0.2, positives=0, f1=Interval(NAN, NAN, NAN, 6), recall=Interval(NAN, NAN, NAN, 6), always=NAN)
SCORES = WeakLabelScores({"effusion": agreed(0.7), "mass": BARE}, "ignore", "negative", {"effusion": KINDS})
PROBES = WeakProbeScores(
    {"mass": ProbePair(interval(0.81, 0.5), interval(0.84, 0.5), interval(-0.03), 0.0456, 1234, 1001)},
    {"tube": "fewer than 4 patients"},
)


def plain(page: Page) -> str:
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", render_page(page), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


def card(**changes: Any) -> Any:
    values: dict[str, Any] = {"weak": weak(), "samples": SAMPLES, "settings": {}, "seed": 0, "seconds": 1.5}
    values |= changes
    return report_card(values.pop("weak"), values.pop("samples"), values.pop("settings"), **values)


def test_every_number_stands_on_the_page() -> None:
    text = plain(make_weak_label_page(weak(), card(), scores=SCORES, probes=PROBES, texts=TEXTS))
    counts = weak().counts()
    for name, c in counts.items():
        assert f"{name} {c['positive']} {c['uncertain']} {c['negative']} {c['blank']}" in text
    a = SCORES.findings["effusion"]
    assert f"effusion 2 of 6 {a.precision} {a.recall} {a.f1} 0.705 {a.kappa}" in text
    assert f"mass 0 of 6 {BARE.precision} – – – {BARE.kappa}" in text
    assert "effusion 11 13 12 14 15 17" in text
    p = PROBES.findings["mass"]
    assert f"mass 1,234 / 1,001 6 {p.weak} {p.given} {p.difference} 0.046" in text
    assert "Left out: tube (fewer than 4 patients)." in text
    assert "6 reports of 3 patients, 4 findings" in text
    assert "mean over 1 findings" in text, "of the two only one has a positive"
    assert "on given labels: 0.840" in text
    assert "nan" not in text.lower()


def test_nobody_is_named_unless_asked() -> None:
    page = render_page(make_weak_label_page(weak(), card(), scores=SCORES, probes=PROBES, texts=TEXTS))
    for word in ("secret", "patient-", "Possible", "Nodule", "texts of patients"):
        assert word not in page
    asked = render_page(make_weak_label_page(weak(), card(), texts=TEXTS, examples=9))
    assert "Possible" in asked
    assert "secret" not in asked


@pytest.mark.parametrize(("examples", "shown"), [(0, 0), (1, 1), (2, 2), (3, 3), (5, 6), (99, 6)])
def test_as_many_reports_as_were_asked_for(examples: int, shown: int) -> None:
    page = make_weak_label_page(weak(), card(), texts=TEXTS, examples=examples)
    found = [e for s in page.sections for b in s.blocks if isinstance(b, Excerpts) for e in b.rows]
    assert len(found) == shown, "five reports name something, one of them two findings"
    for e in found:
        assert e.marked.lower() in ("effusion", "nodule", "tube")


@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 7), (219, 221), (220, 220), (400, 400)])
def test_an_excerpt_is_the_words_around_the_finding(before: int, after: int) -> None:
    text = "x" * (before - 1) + " " * (before > 0) + "effusion" + " " * (after > 0) + "y" * (after - 1)
    page = make_weak_label_page(weak((text,)), card(), texts=(text,), examples=1)
    (found,) = (e for s in page.sections for b in s.blocks if isinstance(b, Excerpts) for e in b.rows)
    assert (len(found.before), found.marked, len(found.after)) == (min(before, 220), "effusion", min(after, 220))
    assert found.before + found.marked + found.after in text


def test_the_word_that_denies_is_quoted() -> None:
    page = make_weak_label_page(weak(("No  Effusion.",)), card(), texts=("No  Effusion.",), examples=1)
    (found,) = (e for s in page.sections for b in s.blocks if isinstance(b, Excerpts) for e in b.rows)
    assert (found.heading, found.picture.alt) == ("effusion: denied by “No”", "denied")


def test_hostile_reports_are_text() -> None:
    hostile = (
        "<script>alert(1)</script> effusion <img src=x onerror=y>.",
        "no {{ 3*3333 }} effusion",
        "nodule " + "é" * 9,
    )
    page = render_page(make_weak_label_page(weak(hostile), card(), texts=hostile, examples=3))
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "9999" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert "&lt;script&gt;alert(1)" in page
    assert "<mark>effusion</mark>" in page
    assert "éééé" in page


def test_reports_that_name_nothing_have_a_page() -> None:
    empty = weak(("", "Clear.", "Fine."))
    text = plain(make_weak_label_page(empty, card(), texts=("", "Clear.", "Fine."), examples=2))
    assert "reports that name a finding 0.000" in text
    assert "nothing 2 0 0 1" in text, "an empty report is not `nothing found`"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"settings": {"uncertain": "positive"}},
        {"weak": weak((*TEXTS[:5], "Effusion."))},
        {"samples": [dataclasses.replace(s, text="x") for s in SAMPLES]},
        {"samples": [dataclasses.replace(s, patient="one") for s in SAMPLES]},
        {"samples": SAMPLES[:5]},
        {"given": {"effusion": np.array([1.0, 0, NAN, 0, 0, 0])}},
        {"images": Embeddings(np.eye(6, dtype=np.float32), tuple("abcdef"), Space("m", "w", "p", 6), "image")},
    ],
    ids=["seed", "policy", "labels", "texts", "patients", "rows", "given labels", "images"],
)
def test_what_can_change_a_number_changes_the_card(changes: dict[str, Any]) -> None:
    assert card(**changes).digest != card().digest
    assert card(**changes).digest == card(**changes).digest
    written = json.dumps(card(**changes).to_dict(), allow_nan=False)
    assert "secret" not in written
    assert "patient-" not in written


def test_the_card_names_what_entered() -> None:
    truth = {"effusion": np.array([1.0, 0, NAN, 0, 0, 0]), "mass": np.zeros(6)}
    images = Embeddings(np.eye(6, dtype=np.float32), tuple("abcdef"), Space("m", "w", "p", 6), "image")
    full = card(given=truth, images=images)
    assert full.rows == {"reports": 6, "labels": 24, "given labels": 12, "images": 6}
    assert full.model == str(images.space)
    other = {**truth, "mass": np.array([0, 0, 0, 0, 0, NAN])}
    assert card(given=other).data["given labels"] != card(given=truth).data["given labels"]
    assert (card().model, set(card().data)) == ("none", {"reports", "labels"})
    assert card(seconds=9).digest == card().digest


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["Pleural Effusion", "x", None], {"effusion": [1, 0, NAN]}),
        (["effusion;nodule", "NODULE", "x"], {"effusion": [1, 0, 0], "mass": [1, 1, 0]}),
        (["Mass/lung/upper", "Mass/liver", "x"], {"mass": [1, 1, 0]}),
        (["Thickening/pleura/mild", "Thickening/bronchus", "x"], {"tube": [1, 0, 0]}),
        (["normal", "no finding", "catheter"], {"tube": [0, 0, 1], "nothing": [1, 1, 0]}),
        (["nothing", "", "pleural_effusion"], {"effusion": [0, NAN, 1], "nothing": [1, NAN, 0]}),
    ],
)
def test_terms_by_hand(cells: list[Any], expected: dict[str, list[float]]) -> None:
    found = given_labels({"t": cells}, RULES, "t")
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"Effusion": [1, 0, None]}, {"effusion": [1, 0, NAN]}),
        ({"Effusion": ["1.0", "0", "-1"]}, {"effusion": [1, 0, NAN]}),
        ({"effusion": [True, False, True]}, {"effusion": [1, 0, 1]}),
        ({"nodule": [1, 0, None], "mass": [0, 0, 1]}, {"mass": [1, 0, 1]}),
        ({"nodule": [0, 1, 0], "mass": ["x", "y", "z"]}, {"mass": [0, 1, 0]}),
        ({"normal": [1, 0, 0], "sex": [0, 1, 1]}, {"nothing": [1, 0, 0]}),
    ],
)
def test_columns_by_hand(columns: dict[str, list[Any]], expected: dict[str, list[float]]) -> None:
    found = given_labels(columns, RULES)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_given_labels_of_other_texts_are_refused() -> None:
    with pytest.raises(InputError, match="finding `effusion` has 3 given labels for 6 texts") as caught:
        score_weak_labels(weak(), {"effusion": np.zeros(3)})
    assert caught.value.hint


def test_agreement_by_hand_for_every_policy() -> None:
    """Effusion is said: stated, denied, doubted, denied, not named, no text; given: 1, 0, 1, 1, 0, 0."""
    truth = {"effusion": np.array([1.0, 0, 1, 1, 0, 0])}
    expected = {
        ("ignore", "ignore"): (1 / 1, 1 / 2, 3), ("positive", "ignore"): (1.0, 2 / 3, 4), ("negative", "ignore"): (1.0, 1 / 3, 4),
        ("ignore", "negative"): (1.0, 1 / 2, 5), ("positive", "negative"): (1.0, 2 / 3, 6), ("negative", "negative"): (1.0, 1 / 3, 6),
    }  # fmt: skip
    for (uncertain, blank), (precision, recall, n) in expected.items():
        found = score_weak_labels(weak(), truth, uncertain=uncertain, blank=blank, n_resamples=5)  # type: ignore[arg-type]
        a = found.findings["effusion"]
        assert (a.precision.value, a.recall.value, a.n) == (pytest.approx(precision), pytest.approx(recall), n)
        kinds = found.kinds["effusion"]
        assert kinds["given 1"] == {"stated": 1, "denied": 1, "doubted": 1, "not named": 0}
        assert kinds["given 0"] == {"stated": 0, "denied": 1, "doubted": 0, "not named": 2}


def test_a_finding_without_positives_is_not_averaged() -> None:
    truth = {"effusion": np.array([1.0, 0, 1, 1, 0, 0]), "tube": np.zeros(6)}
    found = score_weak_labels(weak(), truth, n_resamples=5)
    assert set(found.findings) == {"effusion", "tube"}
    assert found.averaged == ("effusion",)
    assert found.macro_f1 == found.findings["effusion"].f1.value
    assert found.table()[1][5] == "-"
    none = score_weak_labels(weak(), {"mass": np.zeros(6)}, n_resamples=5)
    assert none.to_dict()["macro_f1"] is None


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(6)))
def test_agreement_ignores_the_order_of_reports(order: list[int]) -> None:
    truth = np.array([1.0, 0, 1, 1, 0, NAN])
    texts, ids = [TEXTS[i] for i in order], [f"s{i}" for i in order]
    turned = label_texts(texts, RULES, ids=ids, patients=[f"p{i // 2}" for i in order])
    one = score_weak_labels(weak(), {"effusion": truth}, n_resamples=2).findings["effusion"]
    other = score_weak_labels(turned, {"effusion": truth[order]}, n_resamples=2).findings["effusion"]
    for name in ("precision", "recall", "f1", "kappa"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, nan_ok=True)
    assert (one.n, one.positives, one.given, one.always) == (other.n, other.positives, other.given, other.always)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(0, 999))
def test_three_tenths_of_the_patients_are_drawn_whole(groups: list[int], seed: int) -> None:
    names = [f"p{g}" for g in groups]
    drawn = draw_test(names, seed)
    by_patient = {g: {bool(d) for h, d in zip(names, drawn, strict=True) if h == g} for g in names}
    assert all(len(sides) == 1 for sides in by_patient.values())
    assert sum(True in s for s in by_patient.values()) == max(1, round(0.3 * len(by_patient)))
    assert (draw_test(names, seed) == drawn).all()


def test_labels_are_written_as_they_are(tmp_path: Path) -> None:
    rows = weak().to_rows(spans=True)
    _write(tmp_path / "l.csv", rows)
    with (tmp_path / "l.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    for before, after in itertools.zip_longest(rows, read):
        assert {k: "" if v is None else str(v) for k, v in before.items()} == after
    assert [r["effusion"] for r in read] == ["1", "0", "-1", "0", "", ""]
    assert [r["nothing"] for r in read] == ["0", "1", "-1", "0", "1", ""], "a tube alone is nothing found"


def test_tables_are_as_wide_as_their_heads() -> None:
    page = make_weak_label_page(weak(), card(), scores=SCORES, probes=PROBES)
    tables = [b for s in page.sections for b in s.blocks if isinstance(b, Table)]
    assert len(tables) == 5
    for table in tables:
        assert {len(r) for r in table.rows} == {len(table.columns)}
