"""`chiasm survival` on a table with traps: the outcome among the features, odd names, a card that tells runs apart."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.cli.survival import _inputs, _Rows
from chiasm.types import Embeddings, Space

pytest.importorskip("sksurv", reason="the extra `survival` is not installed")

Run = Callable[..., Any]
COMMON = ("--time", "days", "--unit", "days", "--folds", "2", "--resamples", "10")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 patients whose age and a marker (of a name with brackets) shape the hazard."""
    random = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("traps") / "t.csv"
    rows = []
    for k in range(60):
        age, marker = int(random.integers(40, 80)), float(random.normal())
        died, lost = random.exponential(500 * np.exp(-0.05 * (age - 60) - marker)), random.exponential(900)
        rows.append({"id": f"p{k}", "caption": "x", "age": age, "marker[ng]": round(marker, 3), "gene_a": round(marker, 3),
                     "days": int(min(died, lost)) + 400, "event": int(died <= lost), "alive": int(died > lost),
                     "weight_g": 70_000 + k, "site": "AB"[k % 2]})  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ("clinical:days", "`days`"),
        ("clinical:age,event", "`event`"),
        ("columns:*", "`days`"),
        ("columns:ev*", "`event`"),
        ("clinical:age+columns:d?ys", "`days`"),
    ],
)
def test_the_outcome_is_no_feature(chiasm: Run, table: Path, features: str, named: str) -> None:
    text = chiasm("survival", "--table", table, *COMMON, "--event", "event", "--features", features, code=1)
    assert f"takes in {named}, the outcome itself" in text
    assert "hint: " in text


@pytest.mark.parametrize("horizon", ["0", "-5", "nan"])
def test_a_horizon_lies_after_the_beginning(chiasm: Run, table: Path, horizon: str) -> None:
    words = ("--event", "event", "--features", "clinical:age", "--horizon", horizon)
    text = chiasm("survival", "--table", table, *COMMON, *words, code=1)
    assert "--horizon must be a time after 0" in text
    assert "hint: " in text


def test_a_horizon_beyond_the_follow_up_is_refused(chiasm: Run, table: Path) -> None:
    words = ("--event", "event", "--features", "clinical:age", "--horizon", "99999")
    text = chiasm("survival", "--table", table, *COMMON, *words, code=1)
    assert "99999" in text
    assert "hint: ask for earlier times" in text


def test_a_column_with_brackets_is_found_by_its_name(chiasm: Run, table: Path) -> None:
    features = "clinical:marker[ng]"
    found = chiasm("survival", "--table", table, *COMMON, "--event", "event", "--features", features, "--json")
    assert found["models"][features]["columns"] == 1
    same = chiasm("survival", "--table", table, *COMMON, "--event", "event", "--features", "clinical:gene_*", "--json")
    assert same["models"]["clinical:gene_*"]["harrell"] == found["models"][features]["harrell"]


def test_the_card_tells_an_event_from_its_opposite(chiasm: Run, table: Path) -> None:
    features = ("--features", "clinical:age", "--json")

    def card(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = chiasm("survival", "--table", table, *COMMON, *words, *features)["run_card"]
        return found

    one, again = card("--event", "event"), card("--event", "event")
    assert one["digest"] == again["digest"]
    assert one["settings"]["event is"] == "1"
    turned = card("--event", "event", "--event-is", "0")
    assert turned["settings"]["event is"] == "0"
    assert card("--censored", "alive")["settings"]["event is"] == "not 1"
    assert turned["digest"] != one["digest"]
    part = card("--event", "event", "--where", "site=A")
    assert part["rows"] == {"clinical:age": 30}


def test_large_numbers_of_a_table_are_in_the_card_without_a_warning(chiasm: Run, table: Path, tmp_path: Path) -> None:
    words = ("--event", "event", "--features", "clinical:weight_g", "--json")
    digest = chiasm("survival", "--table", table, *COMMON, *words)["run_card"]["data"]
    text = table.read_text(encoding="utf-8")
    other = tmp_path / "t.csv"
    other.write_text(text.replace(",70000,", ",99000,"), encoding="utf-8")
    assert chiasm("survival", "--table", other, *COMMON, *words)["run_card"]["data"] != digest


def test_the_card_counts_the_rows_that_were_kept() -> None:
    side = Embeddings(np.eye(4, dtype=np.float32), tuple("abcd"), Space("m", "w", "p", 4), "image")
    rows = _Rows(["b", "d"], ["p", "q"], {"days": [1, 2], "event": [0, 1]}, {"image": side})
    found = _inputs({"clinical:age": (np.ones((2, 1)), ["age"])}, rows, "days", "event")
    assert (found["images"].ids, found["clinical:age"].ids) == (("b", "d"), ("b", "d"))
    assert found["clinical:age"].labels == {"days": (1, 2), "event": (0, 1)}
