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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "model=tyni"), ("unknown model `tyni`; did you mean `tiny`", "the suite has: tiny, colours")),
        (("--only", "data=film"), ("unknown data `film`; did you mean `films`", "the suite has: films")),
        (("--only", "task=probe"), ("unknown task `probe`", "the suite has: prototype, zero_shot")),
        (("--only", "prototype"), ("unknown part of a suite `prototype`", "--only model=NAME, data=NAME or task=NAME")),
        (("--only", "tasks=prototype"), ("did you mean `task`",)),
        (("--only", "task="), ("unknown task ``", "the suite has")),
        (("--set", "tasks.prototype.k=1"), ("unknown field `tasks.prototype.k`",)),
        (("--set", "sed=1"), ("unknown field `sed`; did you mean `seed`",)),
        (("--set", "seed=-1"), ("`seed` must be at least 0",)),
        (("--set", "seed=one"), ("`seed`",)),
        (("--set", "seed"), ("seed",)),
        (("--set", "data.films.fractions.train=2"), ("`data.films.fractions` must be positive and sum to 1",)),
        (("--set", "data.films.split.test=x"), ("exclude each other", "keep `split`")),
        (("--set", "models.tiny.floor=random"), ("`models.tiny.source` or `floor`",)),
        (("--set", "name=a/b"), ("`name` must be a plain name",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [("--list",), ("--json",)])
def test_wrong_words_are_errors(
    suite: Path,
    tmp_path: Path,
    chiasm: Callable[..., Any],
    words: tuple[str, ...],
    said: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    printed = " ".join(chiasm("evaluate", suite, "--out", tmp_path / "run", *words, *more, code=1).split())
    assert "error: " in printed
    for part in said:
        assert part in printed
    assert str(tmp_path) not in printed
    assert not list(tmp_path.glob("run/cells/*"))


def test_a_suite_that_is_absent_or_no_suite(tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    assert "absent.toml" in chiasm("evaluate", tmp_path / "absent.toml", code=1)
    for text, said in (
        ("", "`models` is empty"),
        ("x = ", "not valid TOML"),
        ("[models.a]\n", "`models.a.source` or `floor`"),
    ):
        (tmp_path / "s.toml").write_text(text)
        assert said in chiasm("evaluate", tmp_path / "s.toml", code=1)


def test_a_dry_run_computes_nothing_and_counts(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    plan = chiasm("evaluate", suite, "--out", tmp_path / "run", "--list", "--json", "--only", "task=prototype")
    assert [(c["model"], c["data"], c["task"], c["cached"], c["problem"]) for c in plan] == [
        ("tiny", "films", "prototype", False, ""), ("colours", "films", "prototype", False, "")
    ]  # fmt: skip
    assert plan[0]["embeds"] == plan[1]["embeds"] > 40
    printed = chiasm("evaluate", suite, "--out", tmp_path / "run", "--list")
    # Two tasks of one model share its vectors: its rows are counted once.
    assert f"0 of 3 cells are on disk, {2 * plan[0]['embeds']:,} rows to embed" in printed
    assert not [p for p in tmp_path.rglob("run/*") if p.name in ("index.html", "suite.json", "cells", "vectors")]


def test_only_what_is_missing_is_computed_and_said(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    words = ("evaluate", suite, "--out", tmp_path / "run", "--json")
    first = chiasm(*words, "--only", "model=colours")
    assert [(c["model"], c["task"], c["cached"]) for c in first["cells"]] == [("colours", "prototype", False)]
    assert first["embedded"] == [["colours", "films", "image"]]
    second = chiasm(*words, "--only", "task=prototype")
    assert [(c["model"], c["cached"]) for c in second["cells"]] == [("tiny", False), ("colours", True)]
    assert second["embedded"] == [["tiny", "films", "image"]]
    third = chiasm(*words, "--only", "task=prototype")
    assert [c["cached"] for c in third["cells"]] == [True, True]
    assert third["embedded"] == []
    for a, b in zip(second["cells"], third["cells"], strict=True):
        assert (a["numbers"], a["key"], a["run_card"]["digest"]) == (b["numbers"], b["key"], b["run_card"]["digest"])
    assert second["tests"] == third["tests"]
    other = chiasm(*words, "--only", "model=colours", "--set", "seed=1")
    assert [c["cached"] for c in other["cells"]] == [False]
    assert other["embedded"] == []  # another seed draws other parts of the same vectors


def test_an_interrupted_run_says_how_it_goes_on(
    suite: Path, tmp_path: Path, chiasm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chiasm.evaluate.suite.run.run_suite", stop)
    assert "the same command goes on from what is on disk" in chiasm(
        "evaluate", suite, "--out", tmp_path / "run", code=130
    )


def test_no_path_and_no_patient_is_printed(suite: Path, tmp_path: Path, chiasm: Callable[..., Any]) -> None:
    text = json.dumps(chiasm("evaluate", suite, "--out", tmp_path / "run", "--json", "--only", "task=prototype"))
    text = text.replace(json.dumps(str(tmp_path / "run" / "index.html")), "")
    page = (tmp_path / "run" / "index.html").read_text()
    for secret in ("chest-0", str(tmp_path)):
        assert secret not in text
        assert secret not in page
