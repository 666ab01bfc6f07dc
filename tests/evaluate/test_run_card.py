"""A run card changes with everything that can change a number, and with nothing else; it names no patient."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest

from chiasm.evaluate.page import Page, Table, render_page
from chiasm.evaluate.run_card import RunCard, digest_of_rows, make_run_card, package_versions
from chiasm.types import Embeddings, Space

SPACE = Space("toy", "abcdef012345", "99aa", 4)


def rows(**changes: Any) -> Embeddings:
    values: dict[str, Any] = {
        "vectors": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
        "ids": ("film-1", "film-2", "film-3"),
        "space": SPACE,
        "modality": "image",
        "normalized": False,
        "patients": ("Ada", "Ada", "Grace"),
        "labels": {"finding": (1, 0, None)},
    }
    return Embeddings(**{**values, **changes})


def card(**changes: Any) -> RunCard:
    values: dict[str, Any] = {
        "command": "chiasm toy",
        "embeddings": {"images": rows()},
        "seed": 3,
        "split": ["train", "test", None],
        "prompts": ["a film", "no film"],
        "settings": {"k": 5},
    }
    values |= changes
    return make_run_card(values.pop("command"), values.pop("embeddings"), **values)


def test_a_repeated_run_has_the_same_card() -> None:
    assert card().digest == card().digest
    # What cannot change a number is not in the digest.
    assert card(seconds=4.0).digest == card().digest
    assert card(command="chiasm toy --json").digest == card().digest
    other = dataclasses.replace(card(), versions={"chiasm": "99"})
    assert other.digest == card().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"split": ["train", "train", None]},
        {"split": None},
        {"prompts": ["no film", "a film"]},
        {"prompts": None},
        {"settings": {"k": 6}},
        {"settings": {}},
        {"embeddings": {"rows": rows()}},
        {"embeddings": {"images": rows(ids=("film-1", "film-3", "film-2"))}},
        {"embeddings": {"images": rows(patients=("Ada", "Grace", "Grace"))}},
        {"embeddings": {"images": rows(labels={"finding": (1, 0, 0)})}},
        {"embeddings": {"images": rows(labels={"other": (1, 0, None)})}},
        {"embeddings": {"images": rows(vectors=np.ones((3, 4), np.float32))}},
        {"embeddings": {"images": rows(space=dataclasses.replace(SPACE, weights="fedcba"))}},
        {"embeddings": {"images": rows().select([0, 1])}},
    ],
)
def test_what_can_change_a_number_changes_the_card(changes: dict[str, Any]) -> None:
    assert card(**changes).digest != card().digest


def test_rounding_below_half_precision_is_no_other_data() -> None:
    vectors = rows().vectors
    assert digest_of_rows(rows(vectors=vectors * np.float32(1 + 1e-5))) == digest_of_rows(rows())
    assert digest_of_rows(rows(vectors=vectors + np.float32(1e-2))) != digest_of_rows(rows())


def test_the_card_is_json_and_names_nobody() -> None:
    text = json.dumps(card(seconds=1.5).to_dict(), allow_nan=False)
    for secret in ("Ada", "Grace", "film-1", "a film"):
        assert secret not in text
    found = json.loads(text)
    assert found["digest"] == card().digest
    assert found["rows"] == {"images": 3}
    assert found["model"] == str(SPACE)
    again = RunCard(**{k: v for k, v in found.items() if k != "digest"})
    assert again.digest == card().digest


def test_the_page_shows_every_field() -> None:
    section = card(seconds=1.5).section()
    text = render_page(Page("t", "s", (), (section,)))
    for part in ("chiasm toy", str(SPACE), "1.5 s", card().digest, str(card().split), str(card().prompts), "numpy"):
        assert part in text
    bare = render_page(Page("t", "s", (), (card(split=None, prompts=None).section(),)))
    assert "<td>split</td>" not in bare
    assert "<td>prompts</td>" not in bare


def test_several_spaces_are_named_once_each() -> None:
    both = {
        "images": rows(),
        "texts": rows(modality="text"),
        "others": rows(space=dataclasses.replace(SPACE, encoder="x")),
    }
    assert card(embeddings=both).model.count("toy@") == 1
    assert ", x@" in card(embeddings=both).model
    assert card(embeddings={}).model == "none"


def test_versions_are_those_of_this_process() -> None:
    found = package_versions()
    assert found["numpy"] == np.__version__
    assert {"chiasm", "python"} <= set(found)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (70_000.0, 80_000.0, False),
        (70_000.0, 70_000.0, True),
        (1e30, 2e30, False),
        (-7e4, 7e4, False),
        (1e-6, 2e-6, False),
        (1e-30, 1e-30, True),
        (70_000.0, 70_000.01, True),
        (0.5, 0.50001, True),
        (0.5, 0.51, False),
        (0.0, 1e-9, False),
    ],
)
def test_numbers_of_any_size_are_in_the_digest(one: float, other: float, same: bool) -> None:
    """Columns of a table need not lie within float16; no overflow may warn, and none may hide a difference."""

    def digest(value: float) -> str:
        vectors = np.zeros((3, 4), np.float32)
        vectors[1, 2] = value
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return digest_of_rows(rows(vectors=vectors))

    assert (digest(one) == digest(other)) is same


def test_missing_numbers_are_part_of_the_digest() -> None:
    gap = rows().vectors.copy()
    gap[0, 0] = np.nan
    assert digest_of_rows(rows(vectors=gap)) == digest_of_rows(rows(vectors=gap.copy()))
    assert digest_of_rows(rows(vectors=gap)) != digest_of_rows(rows())


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "</table><h1>x", "\u202e<b>"])
def test_hostile_settings_are_text(hostile: str) -> None:
    one = card(command=hostile, settings={hostile: hostile}, embeddings={hostile: rows()})
    page = render_page(Page("t", "s", (), (one.section(),)))
    assert hostile not in page
    assert "&lt;" in page


def test_the_rows_of_the_card_by_hand() -> None:
    one = RunCard("chiasm x", {"images": "0a"}, {"images": 12345}, "m", 7, "1b", "2c", {"k": 5}, 3.25, {"numpy": "9"})
    (table,) = one.section().blocks
    assert isinstance(table, Table)
    assert table.rows == (
        ("command", "chiasm x"), ("model", "m"), ("rows of images", "12,345, digest 0a"), ("split", "1b"),
        ("prompts", "2c"), ("k", 5), ("seed", 7), ("time", "3.2 s"), ("versions", "numpy 9"), ("card", one.digest),
    )  # fmt: skip
    assert RunCard("c", {"images": "0a"}, {}, "m", 7).section().blocks[0].rows[2] == ("rows of images", "0, digest 0a")  # type: ignore[union-attr]
