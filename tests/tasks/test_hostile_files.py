"""Files of prompts and of policies with any content at all: prompts or a policy come out, or an error of chiasm's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ChiasmError
from chiasm.tasks.moderation import Category, Policy, policy_text, read_policy
from chiasm.tasks.prompt_files import load_prompts, parse_prompts
from chiasm.tasks.prompts import PromptSet

KEYS = ("labels", "templates", "classnames", "positive", "negative", "any_of", "a", "b", "")
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["", " ", "a", "b", "a {}", "{}", "{", "é<b>", "no a"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=10,
)
CATEGORIES = st.dictionaries(
    st.sampled_from(["a", "b c", ""]),
    st.fixed_dictionaries(
        {"texts": st.lists(st.sampled_from(["x", "y", "é", " "]), max_size=3)},
        optional={"action": st.sampled_from(["reject", "accept", "x"]), "threshold": st.sampled_from([0, 0.5, -2, 3, "x"]),
                  "review": st.sampled_from([-0.5, 0, 0.6, None]), "against": st.lists(st.sampled_from(["z", "x"]))},
    ),
    max_size=2,
)  # fmt: skip
untimed = settings(max_examples=80, deadline=None)


def attempt(make: Callable[[], Any]) -> Any:
    """What comes out, or None where chiasm refuses in a few words."""
    refusal = ""
    try:
        return make()
    except ChiasmError as error:
        refusal = str(error)
    assert 0 < len(refusal) < 1000
    assert "/pytest-" not in refusal
    return None


@untimed
@given(
    st.one_of(st.lists(VALUES, max_size=4), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)), st.booleans()
)
def test_any_json_is_prompts_or_refused(value: Any, pairs: bool) -> None:
    found = attempt(lambda: parse_prompts(value, pairs=pairs))
    if found is None:
        return
    assert found.labels
    assert len(set(found.names)) == len(found.names)
    for label in found.labels:
        assert label.positive
        assert all(isinstance(t, str) and t.strip() for t in (*label.positive, *label.negative))
    again = parse_prompts(json.loads(json.dumps(found.to_dict())))
    assert [(p.name, p.positive, p.negative) for p in again.labels] == [
        (p.name, p.positive, p.negative) for p in found.labels
    ]


@untimed
@given(st.binary(max_size=60), st.sampled_from(["json", "csv", "tsv", "txt"]))
def test_any_bytes_are_prompts_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"prompts.{kind}"
    path.write_bytes(content)
    assert isinstance(attempt(lambda: load_prompts(path)), PromptSet | None)


@untimed
@given(st.text("label,;\t\nposve\"'| aé", max_size=60), st.sampled_from(["csv", "tsv", "txt"]))
def test_any_table_is_prompts_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"table.{kind}"
    path.write_text("label,positive\n" + content if kind == "csv" else content, encoding="utf-8")
    found = attempt(lambda: load_prompts(path))
    assert found is None or found.labels


@untimed
@given(CATEGORIES, st.sampled_from(["accept", "review", "x"]))
def test_a_policy_of_known_fields_is_whole_or_refused(categories: dict[str, Any], default: str) -> None:
    found = attempt(lambda: Policy.from_dict({"categories": categories, "default": default}))
    good = bool(categories) and default != "x" and all(
        name and given.get("action") != "x" and given["texts"] and " " not in given["texts"]
        and not set(given["texts"]) & set(given.get("against", ())) and given.get("threshold", 0) in (0, 0.5, -2)
        and (given.get("review") is None or given["review"] <= given.get("threshold", 0))
        for name, given in categories.items()
    )  # fmt: skip
    assert (found is not None) == good


POLICY_KEYS = (
    "name",
    "default",
    "categories",
    "fitted",
    "action",
    "texts",
    "against",
    "threshold",
    "review",
    "space",
    "x",
)


@untimed
@given(st.dictionaries(st.sampled_from(POLICY_KEYS), st.recursive(
    st.one_of(LEAVES, st.sampled_from(["reject", "accept", "review"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(POLICY_KEYS), inner, max_size=4)),
    max_leaves=12), max_size=4))  # fmt: skip
def test_any_table_is_a_policy_or_refused(values: dict[str, Any]) -> None:
    found = attempt(lambda: Policy.from_dict(values))
    if found is None:
        return
    assert found.categories
    assert found.default in ("reject", "accept", "review")
    for category in found.categories:
        assert category.lower <= category.threshold


@pytest.mark.parametrize(
    ("name", "text", "against"),
    [("a.b", "x", ()), ("no chest film", 'he said "x"', ("y",)), ("é ü", "a\\b", ("#c",)), ("[x]", "= {}", ("line\ttab",)),
     ("'q'", "𝄞", ()), ("<script>", "</script>", ("&amp;",))],
)  # fmt: skip
def test_a_policy_of_odd_names_is_written_and_read(
    name: str, text: str, against: tuple[str, ...], tmp_path: Path
) -> None:
    made = Policy("p", (Category(name, (text,), against, "review", 0.25, -0.5, {"positives": 3}),), "reject")
    path = tmp_path / "p.toml"
    path.write_text(policy_text(made), encoding="utf-8")
    assert read_policy(path) == made
    assert read_policy(path).digest == made.digest


@pytest.mark.parametrize(
    "change",
    [{"name": "q"}, {"texts": ("z",)}, {"against": ("z",)}, {"action": "accept"}, {"threshold": 0.3}, {"review": 0.1},
     {"fitted": {"positives": 4}}],
)  # fmt: skip
def test_anything_in_a_policy_changes_its_digest(change: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"name": "c", "texts": ("x",), "threshold": 0.25}
    assert Policy("p", (Category(**plain),)).digest != Policy("p", (Category(**{**plain, **change}),)).digest
