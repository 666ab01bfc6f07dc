"""``chiasm retrieval``: directions, labels, probes and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.cli.retrieval import Wanted, _shown, _sides
from chiasm.io.store import save_embeddings
from chiasm.types import Embeddings, Space

Run = Callable[..., Any]


@pytest.mark.filterwarnings("ignore::chiasm.data.tokens.TruncationWarning")
def test_directions_probes_and_the_page(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    words = ("retrieval", "--table", phantom_table, "--model", model_dir)
    record = chiasm(
        *words, "--relevant-by", "effusion", "--direction", "image-image", "--probes", "--out", page, "--json"
    )
    assert set(record) >= {"image_to_image", "keys", "probes", "run_card", "rejected"}
    assert record["image_to_image"]["exclude"] == "patient"
    assert record["keys"] == ["effusion"]
    assert 0 <= record["probes"]["negation"]["wins"]["value"] <= 1
    html = page.read_text()
    assert "Does it read" in html
    assert "<image " not in html
    text = chiasm(*words, "--direction", "text-image", "--direction", "image_to_text", "--out", page, "--examples", 1)
    assert "text → image mAP@R" in text
    assert "patient data" in page.read_text()


def test_a_store_is_measured_without_its_model(
    chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    chiasm("embed", phantom_table, "--out", store, "--model", model_dir, "--modality", "image", "--json")
    record = chiasm("retrieval", "--store", store, "--relevant-by", "effusion,oedema", "--json")
    assert record["graded"]
    assert "text_to_image" not in record, "the store has no texts"
    assert "no texts" in chiasm("retrieval", "--store", store, code=1)
    assert "unknown direction `up_to_down`" in chiasm("retrieval", "--store", store, "--direction", "up-down", code=1)
    assert "unknown label column" in chiasm("retrieval", "--store", store, "--relevant-by", "efusion", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --table or --store, one of the two"),
        (("--table", "t.csv", "--store", "s"), "give --table or --store, one of the two"),
        (("--store", "s", "--answers", "sound"), "--answers must be image or text, got `sound`"),
        (("--store", "s", " "), "a query is empty"),
        (("--store", "s", "--drop-text", "age", "--direction", "image-image"), "--drop-text is for tables"),
        (("--store", "s", "--column", "id=x", "--direction", "image-image"), "are for tables, not for a store"),
    ],
)
def test_what_does_not_fit_is_said_with_a_hint(chiasm: Run, words: tuple[str, ...], message: str) -> None:
    text = chiasm("retrieval", *words, code=1)
    assert message in text
    assert "hint: " in text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of six patients, images beside texts that say one of three words."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(12, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = ("mass", "normal", "scar") * 4
    shared = {"ids": tuple(f"secret{k}" for k in range(12)), "patients": tuple(f"who{k // 2}" for k in range(12)),
              "space": Space("m", "w", "p", 5), "labels": {"kind": words, "split": ("train", "test") * 6}}  # fmt: skip
    path = tmp_path_factory.mktemp("search") / "s"
    save_embeddings(
        path, Embeddings(vectors, modality="image", **shared),
        Embeddings(vectors[::-1].copy(), modality="text", texts=tuple(f"a {w}" for w in words), **shared),
    )  # fmt: skip
    return path


def test_the_document_and_the_page_of_a_store(chiasm: Run, store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = chiasm("retrieval", "--store", store, "--relevant-by", "kind", "--out", page, "--json")
    names = ("text_to_image", "image_to_text", "image_to_image", "text_to_text")
    assert set(found) == {*names, "keys", "graded", "left_out", "rejected", "reasons", "run_card"}
    for name in names:
        assert found[name]["n_queries"] == 12
        assert found[name]["exclude"] == ("none" if name.split("_to_")[0] != name.split("_to_")[1] else "patient")
    text = page.read_text()
    for name in names:
        value = found[name]["mean_average_precision"]
        assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in text
    assert found["run_card"]["digest"] in text
    assert "secret" not in text
    assert "who1" not in text
    assert "a scar" not in text
    assert "secret" not in chiasm("retrieval", "--store", store, "--relevant-by", "kind")


def test_the_card_changes_with_what_can_change_a_number(chiasm: Run, store: Path) -> None:
    words = ("retrieval", "--store", store, "--json", "--direction", "text-image")
    by_kind = (*words, "--relevant-by", "kind")
    runs = [words, by_kind, (*by_kind, "--exclude", "patient"), (*by_kind, "--seed", 1), (*words, "--same", "case"),
            (*by_kind, "--split", "test"), (*by_kind, "--group", "kind")]  # fmt: skip
    digests = [chiasm(*w)["run_card"]["digest"] for w in runs]
    assert len(set(digests)) == len(runs)
    assert chiasm(*by_kind)["run_card"]["digest"] == digests[1]


def test_rules_of_probes_are_in_the_card(tmp_path: Path) -> None:
    rules = tmp_path / "a.toml"
    rules.write_text("x")
    given = Wanted(("all",), "pair", None, None, 0, 0, rules).settings()
    assert str(tmp_path) not in str(given)
    rules.write_text("y")
    assert Wanted(("all",), "pair", None, None, 0, 0, rules).settings() != given
    assert Wanted(("all",), "pair", None, None, 0, 0, None).settings() == {
        "directions": "all", "exclude": "by direction", "same": "pair"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("direction", "sides"),
    [
        (["image-image"], ("image",)),
        (["text_to_text"], ("text",)),
        (["image-image", "text-text"], None),
        (["text-image"], None),
        (["all"], None),
        (None, None),
        ([], None),
    ],
)
def test_what_a_row_of_a_table_must_have(direction: list[str] | None, sides: tuple[str, ...] | None) -> None:
    assert _sides(direction) == sides


@pytest.mark.parametrize(
    ("text", "side", "shown"),
    [
        ("a\n b", "text", "a b"),
        ("x" * 70, "text", "x" * 70),
        ("x" * 71, "text", "x" * 69 + "…"),
        ("a b", "image", "film.png"),
        (None, "text", "film.png"),
    ],
)
def test_how_an_answer_is_shown(text: str | None, side: str, shown: str) -> None:
    assert _shown([[text]], 0, 0, "/private/folder/film.png", side) == shown
    assert _shown(None, 0, 0, "film.png", side) == "film.png"
