"""The interactive map in a real browser: it asks nobody, nothing hostile runs, a lasso becomes the right CSV.

Needs Playwright and Debian's Chromium; skipped with a reason where either is absent.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.evaluate.explore_map import MapColumn, render_map
from chiasm.evaluate.page import Note

HOSTILE = '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=1">'
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    file = tmp_path_factory.mktemp("map") / "map.html"
    corners = np.asarray([[x, y] for x in (0.0, 10.0) for y in (0.0, 10.0)])
    xy = (corners[np.arange(400) % 4] + np.random.default_rng(0).normal(size=(400, 2)) * 0.4).astype(np.float32)
    names = ("low left", "high left", HOSTILE, "high, right")
    column = MapColumn("corner", names, (np.arange(400) % 4).astype(np.int16))
    ids = [f'p{i}, "q"' if i % 2 else f"p{i}" for i in range(399)] + [HOSTILE]
    file.write_text(
        render_map(
            xy, ids, [column], title=HOSTILE, subtitle="s", notes=[Note(HOSTILE)], texts=[HOSTILE] * 400
        )
    )  # fmt: skip
    with api.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 760})
        said: list[str] = []
        opened.on("console", lambda m: said.append(m.text))
        opened.on("pageerror", lambda e: said.append(str(e)))
        opened.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "blob:")) else None)
        opened.goto(file.as_uri())
        opened.wait_for_selector("html[data-ready=yes]", state="attached")
        yield opened
        assert said == [], "an error, or something was asked for"
        assert opened.evaluate("window.hurt") is None
        browser.close()


def drag(page: Any, points: list[tuple[float, float]]) -> None:
    """Draw through points given as shares of the map."""
    box = page.locator("#over").bounding_box()
    places = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(x, y, steps=5)
    page.mouse.up()


def saved(page: Any) -> list[dict[str, str]]:
    with page.expect_download() as found:
        page.click("#save")
    return list(csv.DictReader(io.StringIO(Path(found.value.path()).read_text(encoding="utf-8-sig"), newline="")))


def test_a_lasso_becomes_a_table(page: Any) -> None:
    page.click("[data-tool=lasso]")
    drag(page, [(0.02, 0.02), (0.5, 0.02), (0.5, 0.5), (0.02, 0.5)])
    rows = saved(page)
    assert {r["corner"] for r in rows} == {"high left"}, "y points up"
    assert len(rows) == 100
    assert rows[0]["id"] == 'p1, "q"'
    assert rows[0]["text"] == HOSTILE
    assert float(rows[0]["y"]) > 5 > float(rows[0]["x"])
    assert page.inner_text("#counts tbody").split("\t")[:2] == ["high left", "100"]
    page.click("[data-tool=box]")
    page.keyboard.down("Shift")
    drag(page, [(0.52, 0.52), (0.99, 0.99)])
    page.keyboard.up("Shift")
    assert {r["corner"] for r in saved(page)} == {"high left", HOSTILE}
    page.click("#clear")
    assert page.is_disabled("#save")


def test_the_legend_hides_and_the_lasso_takes_only_what_shows(page: Any) -> None:
    page.locator("#legend input").nth(1).uncheck()
    page.click("[data-tool=box]")
    drag(page, [(0.01, 0.01), (0.99, 0.99)])
    assert len(saved(page)) == 300
    page.click("#all")
    page.click("#clear")


def test_search_and_keys(page: Any) -> None:
    page.fill("#search", "p39")
    page.get_by_text("10 matches").wait_for()  # p39, and p390 to p398
    page.click("#results button >> nth=0")
    assert page.inner_text("#tip-id").startswith("p39")
    page.focus("#over")
    for key in ("ArrowLeft", "+", "-", "0", "l"):
        page.keyboard.press(key)
    assert page.get_attribute("[data-tool=lasso]", "aria-pressed") == "true"
    page.click("#theme")
    page.keyboard.press("Escape")
    assert page.evaluate("document.documentElement.dataset.theme") in ("light", "dark")
