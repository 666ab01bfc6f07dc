"""``chiasm evaluate``: the page, one JSON document, a dry run, an exit code for cells without a result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SUITE = """
name = "small"
n_resamples = 20
n_permutations = 20
smallest_group = 3

[models.tiny]
source = "{model}"

[models.colours]
floor = "colours"

[data.films]
source = "{table}"
labels = ["cardiomegaly", "effusion"]
truth = "*"
fractions = {{ train = 0.5, test = 0.5 }}
subgroups = ["visit"]

[tasks.prototype]

[tasks.zero_shot]
models = ["tiny"]
"""


@pytest.fixture
def suite(model_dir: Path, many_films: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SUITE.format(model=model_dir, table=many_films))
    return path


@pytest.fixture(scope="session")
def many_films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chiasm.data.phantoms import make_chest_phantoms

    return make_chest_phantoms(40, seed=4, size_px=32).save(tmp_path_factory.mktemp("films"))


def test_a_suite_from_file_to_page(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    plan = chiasm("evaluate", suite, "--out", tmp_path / "run", "--list", "--json")
    assert [c["cached"] for c in plan] == [False] * 3
    assert plan[0]["embeds"] > 0
    assert not (tmp_path / "run" / "index.html").exists()
    found = chiasm("evaluate", suite, "--out", tmp_path / "run", "--json")
    assert found["failed"] == 0
    assert {c["state"] for c in found["cells"]} == {"done"}
    assert found["run_card"]["digest"]
    assert all(c["run_card"]["digest"] for c in found["cells"])
    assert len([t for t in found["tests"] if t["task"] == "prototype" and not t["finding"]]) == 1
    page = (tmp_path / "run" / "index.html").read_text()
    for part in (
        "Models × tasks",
        "Data set: films",
        "Leakage",
        "Run card",
        "not a medical device",
        "better than every",
    ):
        assert part in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing from outside
    for word in ("because", "due to", "causes", "caused"):
        assert not re.search(rf"\b{word}\b", page)  # groups are described, not explained
    assert json.loads((tmp_path / "run" / "suite.json").read_text())["cells"] == found["cells"]
    listed = chiasm("evaluate", suite, "--out", tmp_path / "run", "--list")
    assert "3 of 3 cells are on disk" in listed
    again = chiasm("evaluate", suite, "--out", tmp_path / "run")
    assert "prototype" in again
    assert "page:" in again


def test_a_cell_without_a_result_sets_the_exit_code(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    suite.write_text(suite.read_text().replace('models = ["tiny"]', ""))
    words = ("evaluate", suite, "--out", tmp_path / "run", "--only", "task=zero_shot")
    printed = chiasm(*words, code=3)
    assert "1 of 2 cells have no result" in printed
    assert "no text tower" in printed
    document = json.loads(chiasm(*words, "--json", code=3))
    assert document["failed"] == 1
    assert "Without a result" in (tmp_path / "run" / "index.html").read_text()
    assert "no text tower" in chiasm(*words, "--list")


def test_wrong_words_are_errors(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    chiasm("evaluate", suite, "--only", "model=tyni", code=1)
    chiasm("evaluate", suite, "--set", "tasks.prototype.k=1", code=1)
    chiasm("evaluate", tmp_path / "absent.toml", code=1)


def test_no_path_and_no_patient_is_printed(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    text = json.dumps(chiasm("evaluate", suite, "--out", tmp_path / "run", "--json", "--only", "task=prototype"))
    text = text.replace(json.dumps(str(tmp_path / "run" / "index.html")), "")
    page = (tmp_path / "run" / "index.html").read_text()
    for secret in ("chest-0", str(tmp_path)):
        assert secret not in text
        assert secret not in page
