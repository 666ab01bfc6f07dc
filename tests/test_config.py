"""TOML in, dataclasses out and back; mistakes name the dotted field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm import config
from chiasm.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Literal["cosine", "constant"] = "cosine"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"`lr` must be positive, got {self.lr}")


@dataclass(frozen=True)
class Recipe:
    name: str
    optim: Optim = field(default_factory=Optim)
    where: Path = Path("runs")
    tags: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fast: bool = False


def test_round_trip_through_toml(tmp_path: Path) -> None:
    recipe = Recipe(
        "a", Optim(lr=1e-4, steps=3), tags=("x", "ü\n"), labels={"no finding": ("a", "b")}, options={"k": {"d": 1}}
    )
    path = tmp_path / "r.toml"
    path.write_text(config.to_toml(recipe))
    assert config.build(Recipe, config.read_toml(path)) == recipe


def test_only_what_differs_from_the_defaults_is_stated() -> None:
    assert config.changed_fields(Recipe("a")) == {"name": "a"}
    stated = Recipe("a", Optim(steps=3), tags=(), options={"k": 1}, fast=True)
    assert config.changed_fields(stated) == {
        "name": "a", "optim": {"steps": 3}, "options": {"k": 1}, "fast": True,
    }  # fmt: skip


@given(st.dictionaries(st.text(), st.text() | st.integers(-(2**60), 2**60) | st.booleans() | st.lists(st.text())))
def test_any_mapping_survives_toml(values: dict[str, Any]) -> None:
    import tomllib

    surrogates = any(0xD800 <= ord(c) <= 0xDFFF for c in repr(values))
    if not surrogates:
        assert tomllib.loads(config.to_toml({"options": values}))["options"] == values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nam": "x"}, ["unknown field `nam`", "did you mean `name`"]),
        ({}, ["missing field `name`"]),
        ({"name": 3}, ["`name` must be str, got int"]),
        ({"name": "x", "optim": {"lrr": 1.0}}, ["`optim.lrr`", "did you mean `optim.lr`"]),
        ({"name": "x", "optim": {"lr": "fast"}}, ["`optim.lr` must be float"]),
        ({"name": "x", "optim": {"lr": float("nan")}}, ["`optim.lr`", "finite"]),
        ({"name": "x", "optim": {"lr": -1.0}}, ["`optim`", "must be positive"]),
        ({"name": "x", "optim": {"schedule": "cosin"}}, ["`optim.schedule`", "did you mean `cosine`"]),
        ({"name": "x", "optim": {"betas": [0.9]}}, ["`optim.betas` must have 2 items"]),
        ({"name": "x", "optim": {"steps": True}}, ["`optim.steps` must be int"]),
        ({"name": "x", "optim": 3}, ["`optim` must be a table"]),
        ({"name": "x", "fast": 1}, ["`fast` must be bool"]),
        ({"name": "x", "tags": "abc"}, ["`tags`"]),
    ],
)
def test_mistakes_name_the_field(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.build(Recipe, values)
    for word in words:
        assert word in str(caught.value)


@dataclass(frozen=True)
class Stage:
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"`steps` must be at least 1, got {self.steps}", hint="more")


@dataclass(frozen=True)
class Stages:
    first: Stage = field(default_factory=Stage)
    second: Stage = field(default_factory=Stage)


def test_a_table_that_stands_twice_tells_which_one_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"`second\.steps` must be at least 1, got 0\nhint: more"):
        config.build(Stages, {"second": {"steps": 0}})


def test_integers_are_floats_where_floats_are_wanted() -> None:
    assert config.build(Recipe, {"name": "x", "optim": {"lr": 1}}).optim.lr == 1.0


def test_overrides() -> None:
    values = {"name": "a", "optim": {"lr": 1.0}}
    new = config.apply_overrides(values, ["optim.lr=1e-4", "name=b", "labels.x=['p', 'q']"])
    assert new == {"name": "b", "optim": {"lr": 1e-4}, "labels": {"x": ["p", "q"]}}
    assert values["optim"]["lr"] == 1.0
    with pytest.raises(ConfigError, match="has no `=`"):
        config.apply_overrides(values, ["optim.lr"])
    with pytest.raises(ConfigError, match="is a value, not a table"):
        config.apply_overrides(values, ["name.x=1"])


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config.read_toml(tmp_path / "no.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.read_toml(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_toml(bad)
    with pytest.raises(ConfigError, match="cannot be written"):
        config.to_toml({"a": object()})
