"""A suite file says what is wrong with it, by dotted name, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        ('truth = "label"', 'truth = "label"\nbands = { age = [40, 40] }', r"rising"),
        ('truth = "label"', 'truth = "label"\nbands = { age = [] }', r"rising"),
        (
            'truth = "label"',
            'truth = "label"\nbands = { age = [nan] }',
            r"`data.films.bands.age\[0\]` must be a finite",
        ),
        ('truth = "label"', 'truth = "label"\nsplit = { train = "x", test = "x" }', r"gives two parts the same name"),
        ("[models.demo]", "seed = -1\n[models.demo]", r"`seed` must be at least 0, got -1"),
        ("[models.demo]", 'name = "../up"\n[models.demo]', r"`name` must be a plain name"),
        ("[models.demo]", 'name = " "\n[models.demo]', r"`name` must be a plain name"),
        ("[models.demo]", "n_permutations = 0\n[models.demo]", r"`n_permutations` must be at least 1"),
        ("[models.demo]", "batch_size = 0\n[models.demo]", r"`batch_size` must be at least 1"),
        ("[models.demo]", "near_cosine = 0.0\n[models.demo]", r"`near_cosine` must lie in"),
        ("[models.demo]", "alpha = 0.0\n[models.demo]", r"`alpha` must lie between"),
        ("[tasks.zero_shot]", "[tasks.survival]", r"missing field `tasks.survival.time`"),
        (
            "[tasks.zero_shot]",
            '[tasks.zero_shot]\nmodels = ["dmeo"]',
            r"`tasks.zero_shot.models` .* did you mean `demo`",
        ),
        ("[tasks.zero_shot]", "[tasks.zero_shot]\nkind = 3", r"`tasks.zero_shot.kind`"),
        ("[tasks.zero_shot]", "tasks = 3", r"tasks"),
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


#: Every field of a suite, each with a value of a wrong type.
WRONG = {
    "": {
        "name": "3", "seed": '"a"', "n_resamples": "1.5", "n_permutations": '"many"', "alpha": '"x"', "smallest_group": "[1]",
        "near_duplicates": "3", "near_cosine": '"near"', "device": "0", "batch_size": '"big"',
    },
    "models.demo": {"source": "3", "floor": "1", "family": "2", "catalog": "[1]", "trained_on": '"films"', "data": "true"},
    "data.films": {
        "source": "1", "root": "2", "columns": '"id"', "labels": "[1, 2]", "truth": "7", "mode": "0", "prompts": "1",
        "template": "[1]", "protocol": "3", "variant": "4", "split": '"test"', "fractions": "[0.5]", "subgroups": '"sex"',
        "bands": "[40]", "drop_texts": '"x"', "known_as": '"nih"',
    },
    "tasks.zero_shot": {"kind": '"none"', "data": "3", "models": '"demo"'},
    "tasks.few": {"shots": '"a"', "draws": "1.5", "method": '"svm"', "c": '"strong"'},
    "tasks.near": {"ks": '"5"'},
    "tasks.probe": {"cs": "0.5"},
    "tasks.search": {"ks": "[1.5]"},
    "tasks.cox": {"time": "1", "event": "2", "event_is": "[1]"},
}  # fmt: skip
KINDS = {"few": "few_shot", "near": "knn", "probe": "linear_probe", "search": "retrieval", "cox": "survival"}
TABLES = """
[tasks.few]
[tasks.near]
[tasks.probe]
[tasks.search]
[tasks.cox]
time = "days"
event = "died"
"""


@pytest.mark.parametrize(("table", "field"), [(table, field) for table, fields in WRONG.items() for field in fields])
def test_every_field_of_a_wrong_type_is_named(tmp_path: Path, table: str, field: str) -> None:
    import tomllib

    values = tomllib.loads(GOOD + TABLES)
    for name, kind in KINDS.items():
        values["tasks"][name]["kind"] = kind
    place = values
    for part in table.split(".") if table else []:
        place = place[part]
    place[field] = tomllib.loads(f"x = {WRONG[table][field]}")["x"]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, toml_of(values))
    assert field in caught.value.message
    assert not table or table in caught.value.message
    place.pop(field)
    if (table, field) not in (("models.demo", "source"), ("data.films", "source")) and field not in (
        "labels",
        "truth",
        "time",
        "event",
    ):
        read(tmp_path, toml_of(values))  # without the wrong field all is well


def toml_of(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {text(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    return "\n".join(f"{key} = {text(value)}" for key, value in values.items())


def test_the_table_of_wrong_fields_is_complete() -> None:
    import dataclasses

    from chiasm.evaluate.suite.settings import DataEntry, ModelEntry
    from chiasm.evaluate.suite.tasks import SUITE_TASKS

    named = {f.name for f in dataclasses.fields(Suite)} - {"models", "data", "tasks"}
    assert named == set(WRONG[""])
    assert {f.name for f in dataclasses.fields(ModelEntry)} == set(WRONG["models.demo"])
    assert {f.name for f in dataclasses.fields(DataEntry)} == set(WRONG["data.films"])
    for name, kind in KINDS.items():
        assert {f.name for f in dataclasses.fields(SUITE_TASKS.get(kind).settings)} == set(WRONG[f"tasks.{name}"])


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
