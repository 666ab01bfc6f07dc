"""The interactive map: nothing in a label or a text can run, columns become classes, thumbnails keep their budget."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.evaluate.explore_map import (
    ACROSS,
    BANDS,
    MapColumn,
    _inside_script,
    make_thumbnails,
    map_column,
    render_map,
)
from chiasm.evaluate.page import Note

HOSTILE = (
    '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=1">',
    "<!--<script>", "]]>", "${alert(1)}", "{{ 7*7 }}", "\u2028alert(1)", "' onmouseover='x",
)  # fmt: skip


class Reader(HTMLParser):
    """Every element and attribute of a page, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(("/" + tag, {}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def page(**fields: Any) -> str:
    n = len(HOSTILE)
    column = map_column(HOSTILE[0], HOSTILE)
    assert column is not None
    settings: dict[str, Any] = {
        "title": HOSTILE[0],
        "subtitle": HOSTILE[0],
        "notes": [Note(HOSTILE[0], "warning"), Note("")],
        "texts": HOSTILE,
    }
    xy = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    return render_map(xy, HOSTILE, [column], **{**settings, **fields})


def test_nothing_of_a_user_runs() -> None:
    reader = Reader(page())
    kinds = [attributes.get("type") for tag, attributes in reader.tags if tag == "script"]
    assert kinds == ["application/json", None], "the data and one script"
    assert not [t for t, _ in reader.tags if t in ("img", "iframe", "object", "embed", "link", "base", "form")]
    assert not [a for _, attributes in reader.tags for a in attributes if a.startswith("on")]
    assert not [v for _, a in reader.tags for k, v in a.items() if k in ("src", "href")], "it asks nobody for anything"
    data = json.loads(reader.scripts[0])
    assert data["ids"] == list(HOSTILE)
    assert data["texts"] == list(HOSTILE)
    assert data["columns"][0]["categories"] == sorted(HOSTILE)


def test_only_its_own_script_is_allowed() -> None:
    text = page()
    reader = Reader(text)
    policy = next(a["content"] or "" for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = re.search(r"script-src '(sha256-[^']+)'", policy)
    digest = base64.b64encode(hashlib.sha256(reader.scripts[1].encode()).digest()).decode()
    assert allowed is not None
    assert allowed.group(1) == f"sha256-{digest}"
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    script = reader.scripts[1]
    for word in (
        "innerHTML",
        "outerHTML",
        "document.write",
        "insertAdjacentHTML",
        "eval(",
        "fetch(",
        "XMLHttp",
        "http",
    ):
        assert word not in script, word


anything = st.text(st.characters())  # with halves of characters, as names of files can hold


@given(anything, anything)
def test_json_survives_and_cannot_leave_its_element(first: str, second: str) -> None:
    text = _inside_script({first: [second]})
    assert json.loads(text) == {first: [second]}
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()


def test_texts_and_pictures_only_where_asked_for() -> None:
    text = page(texts=None, notes=[])
    data = json.loads(Reader(text).scripts[0])
    assert data["texts"] is None
    assert data["thumbnails"] is None
    assert "Search ids<" in text.replace("\n", "")


def test_points_arrive_bit_for_bit() -> None:
    xy = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    column = MapColumn("c", ("a", "b"), np.asarray([0, 1, -1, 1, 0], dtype=np.int16))
    text = render_map(
        xy, list("abcde"), [column], title="t", subtitle="s", notes=[], modalities=["image"] * 4 + ["text"]
    )
    data = json.loads(Reader(text).scripts[0])
    x, y = (np.frombuffer(base64.b64decode(data[k]), dtype="<f4") for k in "xy")
    np.testing.assert_array_equal(np.stack([x, y], axis=1), xy)
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(data["columns"][0]["codes"]), dtype="<i2"), column.codes
    )
    assert list(base64.b64decode(data["modality"])) == [0, 0, 0, 0, 1]


def test_columns() -> None:
    words = map_column("w", ["b", None, "a", "b"])
    assert words is not None
    assert (words.categories, words.codes.tolist(), words.ordered) == (("a", "b"), [1, -1, 0, 1], False)
    binary = map_column("b", [1, 0, None, 1])
    assert binary is not None
    assert binary.categories == ("0", "1")
    mixed = map_column("m", ["x", 2, 1.5, None])
    assert mixed is not None
    assert mixed.categories == ("1.5", "2", "x")
    ages = list(range(100))
    bands = map_column("age", [*ages, None])
    assert bands is not None
    assert bands.ordered
    assert len(bands.categories) == BANDS
    assert bands.codes[-1] == -1
    counts = np.bincount(bands.codes[:-1])
    assert counts.max() - counts.min() <= 2
    assert (np.diff(bands.codes[:-1]) >= 0).all()
    assert map_column("free text", [f"report {i}" for i in range(50)]) is None
    assert map_column("nearly an id", [f"t{i // 2}" for i in range(30)]) is None
    assert map_column("empty", [None, float("nan")]) is None
    spread = map_column("one big", [0.0] * 500 + [float(i) for i in range(1, 20)])
    assert spread is not None
    assert (spread.codes >= 0).all()


def make_images(folder: Path, count: int) -> list[str | None]:
    paths: list[str | None] = []
    for i in range(count):
        path = folder / f"i{i}.png"
        Image.new("RGB", (30, 20), (i, 255 - i, 40)).save(path)
        paths.append(str(path))
    return paths


def test_thumbnails(tmp_path: Path) -> None:
    paths = make_images(tmp_path, 5)
    (tmp_path / "torn.png").write_bytes(b"no image")
    found = make_thumbnails([*paths, None, str(tmp_path / "torn.png"), str(tmp_path / "gone.png")], size_px=24)
    assert (found.shown, found.of, len(found.sheets)) == (5, 7, 1)
    assert (found.cells[5:] == -1).all()
    assert sorted(found.cells[:5].tolist()) == list(range(5))
    assert "5 of 7" in found.note
    sheet = Image.open(io.BytesIO(base64.b64decode(found.sheets[0].partition(",")[2])))
    assert sheet.size == (ACROSS * 24, ACROSS * 24)
    for row in range(5):
        place = int(found.cells[row])
        red, green, _ = sheet.getpixel(((place % ACROSS) * 24 + 12, (place // ACROSS) * 24 + 12))
        assert abs(red - row) < 12
        assert abs(green - (255 - row)) < 12


def test_thumbnails_keep_their_budget(tmp_path: Path) -> None:
    path = make_images(tmp_path, 1)[0]
    many = [path] * (ACROSS * ACROSS * 2)
    whole = make_thumbnails(many, size_px=16)
    assert len(whole.sheets) == 2
    assert whole.note == ""
    budget = 1.2 * len(whole.sheets[0]) / 1e6
    part = make_thumbnails(many, size_px=16, budget_mb=budget)
    assert sum(map(len, part.sheets)) <= budget * 1e6
    assert (part.shown, part.of) == (ACROSS * ACROSS, len(many))
    assert make_thumbnails([None, None]).shown == 0
    text = page(thumbnails=make_thumbnails([None] * len(HOSTILE)))
    assert json.loads(Reader(text).scripts[0])["thumbnails"] is None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_have_a_style(theme: str) -> None:
    assert (':root[data-theme="dark"]' if theme == "dark" else ":root {") in page()
