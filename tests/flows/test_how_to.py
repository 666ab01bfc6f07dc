"""The how-to pages and tutorials keep their word: every ``sh`` and ``python`` block runs, in order, beside a small demo.

A page starts where `make demo` ends: in a folder that holds `demo/`. Its fenced ``sh`` blocks are lines of ``chiasm``
(continued with a backslash; others, such as ``pip``, are left out), its fenced ``python`` blocks share one namespace.
``text`` and ``toml`` blocks are what a reader sees; a ``toml`` block whose first line is ``# file: NAME`` is written
into the folder first, and so is a ``json`` or ``csv`` block with such a line.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))  # whole stories take a minute each: `make test-slow`
PAGES = [*HOW_TO, *(pytest.param(page, marks=pytest.mark.slow) for page in TUTORIALS)]
BLOCK = re.compile(r"^```([a-z]+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks_of(path: Path) -> list[tuple[str, str]]:
    """Return the language and the text of every fenced block, in order."""
    return [(m.group(1), m.group(2)) for m in BLOCK.finditer(path.read_text())]


def lines_of(block: str) -> list[list[str]]:
    """Return the words of each line of ``chiasm`` in a block of the shell."""
    joined = re.sub(r"\\\n\s*", " ", block)
    found = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words[1:] for words in found if words and words[0] == "chiasm"]


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in (*HOW_TO, *TUTORIALS)])
def test_the_page_runs(
    page: Path, demo_for_pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chiasm: Callable[..., Any]
) -> None:
    shutil.copytree(demo_for_pages, tmp_path / "demo")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for language, text in blocks_of(page):
        first = re.match(r"#\s*file:\s*(\S+)\n", text)
        if first:
            Path(first.group(1)).write_text(text[first.end() :])
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("default")
                exec(compile(text, f"{page.name}", "exec"), names)
            ran += 1
        elif language == "sh":
            for words in lines_of(text):
                with warnings.catch_warnings():
                    warnings.simplefilter("default")
                    chiasm(*words)
                ran += 1
    assert ran, f"{page.name} shows nothing that runs"


def test_a_page_that_lies_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "lie.md"
    page.write_text("```sh\nchiasm zero-shot \\\n  a.png  # b\npip install x\n```\n```python\n1 / 0\n```\n")
    (sh, text), (python, code) = blocks_of(page)
    assert (sh, python) == ("sh", "python")
    assert lines_of(text) == [["zero-shot", "a.png"]]
    with pytest.raises(ZeroDivisionError):
        exec(code, {})
