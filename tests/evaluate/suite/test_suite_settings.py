"""A suite file says what is wrong with it, by dotted name, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import ConfigError
from chiasm.evaluate.suite.settings import Suite, load_suite

GOOD = """
[models.demo]
source = "demo/model"

[data.films]
source = "films.csv"
labels = ["a", "b"]
truth = "label"

[tasks.zero_shot]
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Suite:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return load_suite(path, overrides)


def test_the_least_suite(tmp_path: Path) -> None:
    suite = read(tmp_path, GOOD)
    assert suite.name == "s"
    assert suite.data["films"].resolved_mode == "single"
    assert Path(suite.data["films"].source).parent == tmp_path
    assert suite.models["demo"].source == "demo/model"  # nothing lies beside the file, so it may be a name
    (tmp_path / "demo" / "model").mkdir(parents=True)
    assert read(tmp_path, GOOD).models["demo"].source == str(tmp_path / "demo" / "model")
    assert read(tmp_path, GOOD, "seed=7", "data.films.mode=multi").data["films"].resolved_mode == "multi"


def test_environment_variables_and_named_data_sets_are_left_as_written(tmp_path: Path) -> None:
    text = GOOD.replace('"films.csv"', '"pcam:$SOMEWHERE/pcam"').replace('"demo/model"', '"$MODELS/demo"')
    suite = read(tmp_path, text)
    assert suite.data["films"].source.startswith("pcam:")
    assert suite.models["demo"].source == "$MODELS/demo"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("labels =", "label =", r"unknown field `data.films.label`; did you mean `data.films.labels`"),
        ('source = "demo/model"', "", r"`models.demo.source` or `floor`"),
        ('source = "demo/model"', 'source = "m"\nfloor = "random"', r"`models.demo.source` or `floor`"),
        ('source = "demo/model"', 'floor = "colors"', r"did you mean `colours`"),
        ('source = "demo/model"', 'source = "m"\ntrained_on = ["film"]', r"did you mean `films`"),
        ('truth = "label"', "", r"`data.films.labels` and `truth` belong together"),
        ('["a", "b"]', '["a", "a"]', r"names a label twice"),
        ('["a", "b"]', '["a"]', r"one class only"),
        ('["a", "b"]', '"a"', r"`data.films.labels` must be"),
        ('truth = "label"', 'truth = "label"\nsplit = { tset = "x" }', r"`data.films.split` names the unknown `tset`"),
        ('truth = "label"', 'truth = "label"\nsplit = { train = "x" }', r"need the part `test`"),
        ('truth = "label"', 'truth = "label"\nfractions = { train = 0.5, test = 0.6 }', r"sum to 1"),
        ('truth = "label"', 'truth = "label"\nfractions = { train = 1.5, test = -0.5 }', r"positive"),
        (
            'truth = "label"',
            'truth = "label"\nfractions = { test = 1.0 }\nsplit = { test = "x" }',
            r"exclude each other",
        ),
        ('truth = "label"', 'truth = "label"\nbands = { age = [60, 40] }', r"rising"),
        ('truth = "label"', 'truth = "label"\ncolumns = { pateint = "p" }', r"did you mean `patient`"),
        ('truth = "label"', 'truth = "label"\nmode = "mutli"', r"did you mean `multi`"),
        (
            'truth = "label"',
            'truth = "label"\nknown_as = ["nih"]',
            r"`data.films.known_as` names the unknown `nih`; did",
        ),
        ('source = "demo/model"', 'source = "m"\ncatalog = "chexzro"', r"did you mean `chexzero`"),
        ('source = "demo/model"', 'source = "m"\ndata = ["flims"]', r"`models.demo.data` .* did you mean `films`"),
        ("[tasks.zero_shot]", "[tasks.zero_shto]", r"`tasks.zero_shto.kind`.*did you mean `zero_shot`"),
        ("[tasks.zero_shot]", '[tasks.zero_shot]\ndata = ["film"]', r"`tasks.zero_shot.data` names the unknown `film`"),
        ("[tasks.zero_shot]", '[tasks.zero_shot]\ndata = "films"', r"must be a list"),
        ("[tasks.zero_shot]", "[tasks.zero_shot]\nk = 3", r"unknown field `tasks.zero_shot.k`"),
        ("[tasks.zero_shot]", '[tasks.few]\nkind = "few_shot"\nshot = 3', r"did you mean `tasks.few.shots`"),
        ("[tasks.zero_shot]", "[tasks.few_shot]\nshots = 0", r"at least 1"),
        ("[tasks.zero_shot]", "[tasks.knn]\nks = []", r"`tasks.knn.ks`"),
        ("[tasks.zero_shot]", "[tasks.retrieval]\nks = [0]", r"`tasks.retrieval.ks`"),
        ("[tasks.zero_shot]", "[tasks.linear_probe]\ncs = [-1.0]", r"`tasks.linear_probe.cs`"),
        ("[tasks.zero_shot]", "", r"`tasks` is empty"),
        ("[models.demo]", "seed = 0\n[model.demo]", r"did you mean `models`"),
        ("[models.demo]", "alpha = 2.0\n[models.demo]", r"`alpha`"),
        ("[models.demo]", "smallest_group = 1\n[models.demo]", r"`smallest_group` must be at least 2"),
        ("[models.demo]", "n_resamples = 0\n[models.demo]", r"`n_resamples`"),
        ("[models.demo]", "near_cosine = 1.5\n[models.demo]", r"`near_cosine`"),
        ("[models.demo]", "models = 3\n[other]", r"`models` must hold tables"),
        ("[models.demo]", "[models.demo", r"not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, GOOD.replace(old, new))


def test_a_file_that_is_absent_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_suite(tmp_path / "absent.toml")
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_suite(tmp_path / "s.toml")


def test_an_unset_variable_is_a_failed_cell_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.evaluate.suite.run import run_suite

    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    suite = read(tmp_path, GOOD.replace('"films.csv"', '"$NOT_SET_HERE/t.csv"'))
    run = run_suite(suite, tmp_path / "out")
    assert "NOT_SET_HERE" in run.failed[0].reason


@pytest.mark.parametrize("name", ["suite_phantoms", "suite_real"])
def test_the_recipes_are_suites(name: str) -> None:
    suite = load_suite(Path(__file__).parents[3] / "recipes" / f"{name}.toml")
    assert suite.name == name
    assert suite.entries


def test_the_reference_names_every_field_and_task() -> None:
    import dataclasses

    from chiasm.evaluate.suite.settings import DataEntry, ModelEntry
    from chiasm.evaluate.suite.tasks import SUITE_TASKS

    text = (Path(__file__).parents[3] / "docs" / "reference" / "suite.md").read_text()
    names = [f.name for kind in (Suite, ModelEntry, DataEntry) for f in dataclasses.fields(kind)]
    kinds = [n for n in SUITE_TASKS.names() if n != "norm"]  # the how-to page adds one
    for kind in kinds:
        names += [f.name for f in dataclasses.fields(SUITE_TASKS.get(kind).settings)]
    missing = [n for n in [*names, *kinds] if f"`{n}`" not in text and f"`[{n}." not in text]
    assert missing == []
