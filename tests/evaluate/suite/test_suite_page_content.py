"""The page of a suite made by hand: every number of the JSON stands on it, in its own row; names are text, never markup."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.suite.cells import CellOutcome
from chiasm.evaluate.suite.comparisons import GroupScore, compare_groups, compare_models, correct_groups
from chiasm.evaluate.suite.leakage import DataLeakage, Exposure
from chiasm.evaluate.suite.page import MOST_TESTS, _measure_name, _p, suite_page
from chiasm.evaluate.suite.results import Number, score_answers
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.run import SuiteRun
from chiasm.evaluate.suite.settings import DataEntry, ModelEntry, Suite
from chiasm.types import Interval, Sample

ROWS = 60
EVIL = '<script>alert("x")</script>'


class Tables(HTMLParser):
    """All tables of a page as rows of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.tables[-1][-1].append("".join(self.cell).replace("\u00a0", " "))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)

    def with_head(self, *names: str) -> list[dict[str, str]]:
        """Return the rows of the first table whose head has these columns."""
        for table in self.tables:
            if set(names) <= set(table[0]):
                return [dict(zip(table[0], row, strict=True)) for row in table[1:]]
        raise AssertionError(f"no table with {names}")


def made(
    models: tuple[str, ...] = ("one", "two"), data: str = "films", task: str = "probe", **changes: Any
) -> SuiteRun:
    random = np.random.default_rng(0)
    truth = (random.random((ROWS, 3)) < 0.5).astype(float)
    samples = tuple(Sample(f"secret-{k}", patient=f"person-{k // 2}", text=f"words-{k}") for k in range(ROWS))
    labels = changes.pop("labels", ("effusion", "nodule", "mass"))
    entry = DataEntry(source="x", labels=labels, truth="*")
    sexes = tuple("MF"[(k // 2) % 2] if k < 56 else None for k in range(ROWS))
    rows = DataRows(
        data, entry, samples, (), ("test",) * ROWS, truth, "multi", {"sex": sexes},
        dict.fromkeys(("images", "texts", "rows", "truth", "parts"), "0" * 12), tuple(changes.pop("cautions", ())),
    )  # fmt: skip
    cells, groups, results = [], {}, {}
    for k, model in enumerate(models):
        scores = truth * k + random.normal(size=truth.shape)
        result = score_answers(
            np.arange(ROWS), truth, scores, rows.groups, labels, mode="multi", n_resamples=30, seed=0
        )
        card = RunCard("chiasm evaluate", {"images": f"{k:012d}"}, {"images": ROWS}, f"space-{k}", 0, seconds=1.25 + k)
        cells.append(CellOutcome(model, data, task, f"key{k}", result, card))
        results[model] = result
        found = compare_groups(result, "sex", sexes, rows.groups, smallest=4, n_resamples=30, seed=0)
        groups[model, data, task] = correct_groups(found)
    tests = compare_models(data, task, results, rows.groups, n_permutations=30, seed=0)
    suite = Suite(
        {m: ModelEntry(floor="colours") for m in models}, {data: entry}, {task: {}}, name=changes.pop("name", "made")
    )
    run = SuiteRun(
        suite, tuple(cells), tests, groups, {}, (DataLeakage(data, {"test": (ROWS, 30)}, {}, 0, 0, True),),
        tuple(Exposure(m, data, "unknown", "Nobody knows.", None, 0.999) for m in models), {data: rows}, (),
        RunCard("chiasm evaluate made.toml", {data: "1" * 12}, {data: ROWS}, ", ".join(models), 0),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def shown(run: SuiteRun) -> Tables:
    return Tables(render_page(suite_page(run)))


def text_of(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def test_every_number_of_the_json_is_on_the_page() -> None:
    run = made()
    document = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    rows = {row["measure"]: row for row in shown(run).with_head("measure", "one", "two")}
    for cell in document["cells"]:
        for name, number in cell["numbers"].items():
            row = rows[_measure_name(name)]
            assert row[cell["model"]] == text_of(number)
            assert row["chance"] == f"{number['chance']:.3f}"
            assert row["majority"] == f"{number['majority']:.3f}"
            assert row["n"] == str(number["n"]) == "60"
    assert len(rows) == 7  # the mean, and AUROC and AUPRC of three findings


def test_the_summary_has_the_number_that_models_are_compared_by() -> None:
    run = made()
    rows = shown(run).with_head("data", "task", "model", "value")
    assert [(r["data"], r["task"], r["model"], r["measure"]) for r in rows] == [
        ("films", "probe", "one", "AUROC"), ("films", "probe", "two", "AUROC")
    ]  # fmt: skip
    assert [r["value"] for r in rows] == [str(c.result.main.value) for c in run.cells if c.result]


def test_every_test_is_on_the_page_with_both_p_values() -> None:
    run = made()
    tables = shown(run)
    main = tables.with_head("first", "second", "difference")
    assert [(r["first"], r["second"]) for r in main] == [("one", "two")]
    (whole,) = [t for t in run.tests if not t.finding]
    assert main[0]["difference"] == text_of(whole.to_dict()["difference"])
    assert (main[0]["p"], main[0]["p, Holm"]) == (_p(whole.test.p_raw), _p(whole.test.p))
    assert main[0]["patients"] == "30"
    named = {r["finding"]: r for r in tables.with_head("finding", "first")}
    assert set(named) == {"effusion", "nodule", "mass"}
    for t in run.tests[1:]:
        assert named[t.finding]["p, Holm"] == _p(t.test.p)
        assert named[t.finding]["test"] == "delong, clustered"
    assert [r["p"] for r in named.values()] == sorted(
        (r["p"] for r in named.values()), key=lambda p: 0 if "<" in p else float(p)
    )


def test_raw_and_corrected_p_values_are_not_mixed_up() -> None:
    run = made()
    tests = tuple(dataclasses.replace(t, test=dataclasses.replace(t.test, p_raw=0.011, p=0.044)) for t in run.tests)
    tables = shown(dataclasses.replace(run, tests=tests))
    rows = [*tables.with_head("first", "difference"), *tables.with_head("finding", "difference")]
    assert [(r["p"], r["p, Holm"]) for r in rows] == [("0.011", "0.044")] * 4


def test_no_more_findings_are_listed_than_can_be_read() -> None:
    run = made()
    many = tuple(dataclasses.replace(run.tests[1], finding=f"f{k}") for k in range(MOST_TESTS + 5))
    page = render_page(suite_page(dataclasses.replace(run, tests=many)))
    assert f"({MOST_TESTS} of {MOST_TESTS + 5})" in page
    assert len(Tables(page).with_head("finding", "first")) == MOST_TESTS
    assert len(dataclasses.replace(run, tests=many).to_dict()["tests"]) == MOST_TESTS + 5


def test_groups_stand_with_their_numbers_or_the_reason_why_not() -> None:
    run = made()
    key = ("one", "films", "probe")
    hidden = GroupScore("site", "small", None, None, None, None, math.nan, math.nan, suppressed="fewer than 4 patients")
    run = dataclasses.replace(run, subgroups={key: (*run.subgroups[key], hidden)})
    rows = shown(run).with_head("group", "less the rest")
    assert [(r["column"], r["group"]) for r in rows] == [("sex", "F"), ("sex", "M"), ("site", "small")]
    for row, group in zip(rows[:2], run.subgroups[key], strict=False):
        assert group.value is not None
        assert group.difference is not None
        assert (row["n"], row["patients"]) == (str(group.n), str(group.patients)) == ("28", "14")
        assert row["value"] == str(group.value)
        assert row["less the rest"] == str(group.difference)
        assert (row["p"], row["p, Holm"]) == (_p(group.p_raw), _p(group.p))
    assert [rows[2][c] for c in ("n", "patients", "value", "less the rest", "p")] == [
        "–",
        "–",
        "fewer than 4 patients",
        "–",
        "–",
    ]


def test_cells_stand_with_card_and_time() -> None:
    run = made()
    rows = shown(run).with_head("space", "card")
    assert [(r["model"], r["space"], r["time"], r["card"]) for r in rows] == [
        (c.model, c.card.model, f"{c.card.seconds:.1f} s", c.card.digest)
        for c in run.cells
        if c.card and c.card.seconds
    ]
    assert rows[0]["rows"] == "0" * 12


@pytest.mark.parametrize(
    ("leak", "shows", "warns"),
    [
        (DataLeakage("films", {"train": (40, 20), "test": (60, 30)}, {}, 0, 100, True), ("none", "0", "100"), False),
        (DataLeakage("films", {"train": (40, 20), "test": (60, 30)}, {"patient": 3}, 7, 0, True), ("3 patient", "7", "not opened"), True),
        (DataLeakage("films", {"test": (60, 60)}, {}, 0, 1234, False), ("one part only", "0", "1,234"), False),
        (DataLeakage("films", {"train": (1, 1), "test": (2, 2)}, {"image": 1, "study": 2}, 2, 0, True), ("1 image, 2 study", "2", "not opened"), True),
    ],
)  # fmt: skip
def test_leakage_in_words(leak: DataLeakage, shows: tuple[str, str, str], warns: bool) -> None:
    page = render_page(suite_page(made(leakage=(leak,))))
    (row,) = Tables(page).with_head("in several parts")
    assert (row["in several parts"], row["test rows concerned"], row["images compared"]) == shows
    assert ("Some test rows are not independent" in page) == warns
    assert ("every row counts as a patient" in page) != leak.known_patients
    for part, (n, patients) in leak.parts.items():
        assert f"{part} {n:,} rows of {patients:,}" in row["parts"]


@pytest.mark.parametrize(
    ("level", "near", "warns"),
    [
        ("same data", 12345, True),
        ("same data, other split", 0, False),
        ("same hospital", None, False),
        ("none known", 0, False),
        ("unknown", None, False),
    ],
)
def test_exposure_in_words(level: str, near: int | None, warns: bool) -> None:
    page = render_page(suite_page(made(exposure=(Exposure("one", "films", level, "A reason.", near, 0.995),))))
    (row,) = Tables(page).with_head("overlap", "near test rows")
    assert (row["overlap"], row["reason"]) == (level, "A reason.")
    assert row["near test rows"] == ("–" if near is None else f"{near:,}")
    assert ("Such numbers say nothing of new patients" in " ".join(page.split())) == warns


def test_failures_are_grouped_by_reason() -> None:
    run = made()
    gone = [
        CellOutcome("one", "films", task, "", None, None, reason)
        for task, reason in (("a", "no text"), ("b", "no text"), ("c", "no rows"))
    ]
    run = dataclasses.replace(run, cells=(*run.cells, *gone))
    rows = shown(run).with_head("cells", "why")
    assert [(r["model"], r["cells"], r["why"]) for r in rows] == [
        ("one", "films · a, films · b", "no text"),
        ("one", "films · c", "no rows"),
    ]
    assert "2 of 5 cells have a result" in render_page(suite_page(run))
    assert run.to_dict()["failed"] == 3
    nothing = dataclasses.replace(run, cells=tuple(gone), tests=(), subgroups={})
    page = render_page(suite_page(nothing))
    assert "0 of 3 cells" in page
    assert "Models × tasks" not in page


def test_a_number_without_a_value_is_a_dash() -> None:
    run = made()
    none = Interval(math.nan, math.nan, math.nan, 0, 0.5)
    assert run.cells[0].result is not None
    result = dataclasses.replace(run.cells[0].result, numbers={"auroc": Number(none, 0.5)})
    cells = (dataclasses.replace(run.cells[0], result=result), run.cells[1])
    run = dataclasses.replace(run, cells=cells, best={("films", "probe"): "one"})
    page = render_page(suite_page(run))
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    assert shown(run).with_head("data", "task", "model", "value")[0]["value"] == "–"
    json.dumps(run.to_dict(), allow_nan=False)


def test_chance_and_majority_stand_in_their_own_columns() -> None:
    run = made(models=("one",))
    assert run.cells[0].result is not None
    numbers = {
        "auroc": Number(Interval(0.7, 0.6, 0.8, 1234, 0.2), 0.3),
        "ece": Number(Interval(0.1, math.nan, math.nan, 9), None, "lower"),
    }
    result = dataclasses.replace(run.cells[0].result, numbers=numbers)
    run = dataclasses.replace(run, cells=(dataclasses.replace(run.cells[0], result=result),))
    rows = shown(run).with_head("measure", "one")
    assert [list(r.values()) for r in rows] == [
        ["probe", "AUROC", "0.700 [0.600, 0.800]", "0.200", "0.300", "1234"],
        ["probe", "calibration error", "0.100", "–", "–", "9"],
    ]
    (row,) = shown(run).with_head("data", "task", "model", "value")
    assert (row["value"], row["chance"], row["majority"], row["n"]) == (
        "0.700 [0.600, 0.800]",
        "0.200",
        "0.300",
        "1234",
    )


def test_key_numbers_are_those_of_proven_models() -> None:
    run = made()
    assert [k.note for k in suite_page(run).key_numbers] == ["one"]  # none is proven: the first, without a claim
    proven = suite_page(dataclasses.replace(run, best={("films", "probe"): "two"})).key_numbers
    assert [(k.name, k.note) for k in proven] == [("films · probe", "two, better than every other")]
    assert run.cells[1].result is not None
    assert proven[0].interval == run.cells[1].result.main.value


def test_names_are_text_and_no_row_is_shown() -> None:
    run = made(models=(EVIL, "b & $\\frac{$"), data=f"d{EVIL}", task=f"t{EVIL}", labels=(EVIL, "<img src=x onerror=y>", "$_{$"),
               cautions=(EVIL,), name="<b onload=x>")  # fmt: skip
    gone = CellOutcome(EVIL, f"d{EVIL}", f"t{EVIL}", "", None, None, EVIL)
    page = render_page(
        suite_page(dataclasses.replace(run, cells=(*run.cells, gone), best={(f"d{EVIL}", f"t{EVIL}"): EVIL}))
    )
    assert "<script" not in page
    assert "<img" not in page
    assert "<b onload" not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") > 10
    for word in ("secret-", "person-", "words-"):
        assert word not in page


def test_the_page_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    assert render_page(suite_page(made())) == render_page(suite_page(made()))


@pytest.mark.parametrize(
    ("name", "shown_as"),
    [
        ("auroc", "AUROC"),
        ("auroc effusion", "AUROC effusion"),
        ("auprc a b", "AUPRC a b"),
        ("ece", "calibration error"),
        ("brier", "Brier score"),
        ("concordance", "C-index"),
        ("eces", "eces"),
        ("text to image R@1", "text to image R@1"),
    ],
)
def test_names_of_measures(name: str, shown_as: str) -> None:
    assert _measure_name(name) == shown_as


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (0.0499, "0.050"), (1.0, "1.000"), (math.nan, "–")],
)
def test_p_values(p: float, text: str) -> None:
    assert _p(p) == text
