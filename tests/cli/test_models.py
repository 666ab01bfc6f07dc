"""`chiasm models`: the list, one model, the ranking for a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chiasm.encoders.advice import load_targets
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.entry import CatalogEntry
from chiasm.encoders.facts import load_facts

Run = Callable[..., Any]


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 300])
def test_the_list_fits_the_terminal(chiasm: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = chiasm("models")
    assert max(map(len, text.splitlines())) <= min(max(columns, 80), 120)
    for name in load_facts():
        assert name in text
    assert "Chest radiographs" in text
    assert ("licence" in text.splitlines()[0]) == (columns >= 120)


def test_json_holds_every_model_and_a_source_for_every_figure(chiasm: Run) -> None:
    models = {m["name"]: m for m in chiasm("models", "--json")}
    assert set(models) >= set(load_facts())
    figures = [f for m in models.values() for f in m["figures"] or []]
    assert len(figures) > 80
    assert all(f["source"] and f["metric"] and f["on"] for f in figures)
    assert models["conch"]["gate"] == "agreement"
    assert "advice" not in models["conch"]


@pytest.mark.parametrize("target", list(load_targets()))
def test_ranking(chiasm: Run, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = chiasm("models", "--for", target)
    assert max(map(len, text.splitlines())) <= 100
    assert load_targets()[target].ranks[0].model in text
    for name in load_facts():
        assert name in text, "no model is passed over in silence"
    rows = chiasm("models", "--for", target, "--json")
    assert [r["advice"]["rank"] for r in rows] == list(range(1, len(load_facts()) + 1))
    assert rows[0]["name"] == load_targets()[target].ranks[0].model
    assert {"level", "reason", "uses"} == set(rows[0]["advice"]["overlap"])


def test_ranking_warns_in_plain_words(chiasm: Run) -> None:
    text = " ".join(chiasm("models", "--for", "chexpert").split())
    assert "learned CheXpert's 14 labels" in text
    assert "same data, to choose only" in text
    assert "Published: AUC 0.889" in text
    text = " ".join(chiasm("models", "--for", "tuberculosis").split())
    assert "treat every row as a hypothesis" in text


def test_one_model_in_full(chiasm: Run) -> None:
    text = " ".join(chiasm("models", "chexzero").split())
    for part in ("10 files averaged", "Commons Clause", "MIMIC-CXR", "overlap of its training data", "0.07 "):
        assert part in text
    assert "for chexpert: recommended" not in text
    text = chiasm("models", "chexzero", "--for", "chexpert")
    assert "for chexpert: recommended, rank 1" in text
    (model,) = chiasm("models", "chexzero", "--for", "chexpert", "--json")
    assert model["advice"]["overlap"]["uses"] == ["selection"]
    assert "no weights of this name" in chiasm("models", "histo-vit")


def test_a_plug_in_is_listed_with_what_it_says_of_itself(chiasm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CatalogEntry("somebody/else", CATALOG.get("openai/RN50").config, licence="theirs", description="a model")
    monkeypatch.setitem(CATALOG._items, entry.name, entry)
    monkeypatch.setenv("COLUMNS", "120")
    *_, last = chiasm("models").split("  Other\n")
    assert "somebody/else" in last.splitlines()[0]
    assert "theirs" in last.splitlines()[0]
    assert "a model" in chiasm("models", "somebody/else", "--for", "chexpert")


def test_a_model_without_loading_code_is_marked(chiasm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CATALOG._items, "plip")
    text = chiasm("models")
    assert "plip *" in text
    assert "without loading code" in text
    assert "not in this version yet" in chiasm("models", "plip")


def test_wrong_names_get_a_suggestion(chiasm: Run) -> None:
    assert "did you mean `biomedclip`" in chiasm("models", "biomedclp", code=1)
    assert "did you mean `chexpert`" in chiasm("models", "--for", "chexprt", code=1)
