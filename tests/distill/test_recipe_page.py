"""docs/reference/distill-recipe.md tells every field that a recipe may have."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

from chiasm.distill.recipe import DistillRecipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_recipe_page", ROOT / "tools" / "make_recipe_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tables(cls: type) -> set[type]:
    """All dataclasses that a recipe is made of."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                found |= tables(part)
    return found


def test_the_page_is_what_the_docstrings_say(page: ModuleType) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run tools/make_recipe_page.py"


def test_no_field_is_missing_or_without_a_sentence(page: ModuleType) -> None:
    told = [cls for cls, _ in page.SECTIONS.values()]
    assert tables(DistillRecipe) <= set(told)
    for cls in told:
        for name, values, default, meaning in page.rows(cls):
            assert all((values, default, meaning)), f"{cls.__name__}.{name}"
    named = {name for cls in told for name, *_ in page.rows(cls)}
    for cls in tables(DistillRecipe) - {DistillRecipe}:
        assert {f.name for f in dataclasses.fields(cls)} <= named


def test_what_cannot_be_written_in_a_recipe_is_not_offered(page: ModuleType) -> None:
    assert "None" not in page.render()
