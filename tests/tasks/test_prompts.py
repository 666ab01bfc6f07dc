"""Prompts: every form that users have gives the texts that it states; traps of negation and laterality are caught."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, FileFormatError, InputError, UnknownName
from chiasm.tasks.prompt_files import load_prompts, parse_prompts
from chiasm.tasks.prompts import (
    NEGATIVE_TEMPLATES,
    POSITIVE_TEMPLATES,
    TEMPLATES,
    LabelPrompts,
    PromptSet,
    PromptWarning,
    choose_templates,
    fill,
    mirror,
    negate,
    says_normal,
    sided,
)

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=8), min_size=1, max_size=6, unique=True)


@pytest.mark.parametrize("template", ["a {} b", "a {c} b", "a {label} b", "a CLASSNAME b", "a {name} b"])
def test_every_placeholder_is_filled(template: str) -> None:
    assert fill(template, "Pleural_Effusion") == "a Pleural Effusion b"


def test_templates_from_files_cannot_reach_into_objects() -> None:
    hostile = "{0.__class__} {}"
    assert fill(hostile, "x") == "{0.__class__} x"
    with pytest.raises(InputError, match="no place for the label"):
        fill("a photo", "x")
    assert fill("{}", r"a\1{}") == r"a\1{}"


@given(NAMES)
def test_ensembles_hold_every_template_once(names: list[str]) -> None:
    prompts = PromptSet.from_names(names, "chest")
    assert prompts.names == tuple(names)
    assert all(label.positive == tuple(fill(t, label.name) for t in TEMPLATES["chest"]) for label in prompts.labels)
    assert len(prompts.texts()) == len(set(prompts.texts()))
    assert not prompts.has_pairs


@given(NAMES)
def test_own_form_round_trips(names: list[str]) -> None:
    prompts = PromptSet.from_pairs([f"{n} x" for n in names])
    again = parse_prompts(json.loads(json.dumps(prompts.to_dict())))
    assert again == prompts
    assert again.digest == prompts.digest


def test_pairs_follow_the_templates() -> None:
    label = PromptSet.from_pairs(["edema"]).labels[0]
    assert label.positive == tuple(fill(t, "edema") for t in POSITIVE_TEMPLATES)
    assert label.negative == tuple(fill(t, "edema") for t in NEGATIVE_TEMPLATES)
    label = PromptSet.from_pairs(["edema"], "a film showing {}").labels[0]
    assert label.negative == ("a film showing no edema",)
    label = PromptSet.from_pairs({"edema": ["edema", "congestion"]}, ["{}"], ["not {}"]).labels[0]
    assert label.positive == ("edema", "congestion")
    assert label.negative == ("not edema", "not congestion")
    assert negate("CLASSNAME seen") == "no CLASSNAME seen"


@pytest.mark.parametrize("name", ["No Finding", "no_finding", "Normal", "HEALTHY", "no-finding"])
def test_no_finding_is_not_negated(name: str) -> None:
    with pytest.warns(PromptWarning, match="itself a negation"):
        label = PromptSet.from_pairs(["edema", name]).labels[1]
    assert label.name == name
    assert "no abnormality" in label.positive
    assert not any(text.lower().startswith("no ") for text in label.negative)


def test_a_negated_finding_becomes_the_finding() -> None:
    with pytest.warns(PromptWarning):
        label = PromptSet.from_pairs(["no pneumothorax"]).labels[0]
    assert label.positive[0] == "no pneumothorax"
    assert label.negative[0] == "pneumothorax"
    assert says_normal("without edema")
    assert not says_normal("nodule")


def test_a_double_negation_by_the_user_warns() -> None:
    with pytest.warns(PromptWarning, match="negates twice"):
        parse_prompts({"No Finding": {"positive": ["No Finding"], "negative": ["no No Finding"]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptSet.from_names(["No Finding", "edema"])  # single-label: nothing is negated


def test_sides() -> None:
    prompts = PromptSet.from_sides(["pleural_effusion"])
    assert prompts.names == ("left pleural_effusion", "right pleural_effusion")
    left, right = prompts.labels
    assert left.positive == right.negative
    assert left.negative == right.positive
    assert "left-sided pleural effusion" in left.positive
    absent = PromptSet.from_sides(["nodule"], against="absent").labels[0]
    assert absent.negative[0] == "no left nodule"
    assert len(PromptSet.from_sides(["nodule"], against="both").labels[0].negative) == 8
    with pytest.raises(UnknownName):
        sided("nodule", "leftt")


@given(st.text(st.characters(codec="ascii"), max_size=40))
def test_mirror_is_its_own_inverse(text: str) -> None:
    text = text.replace("left", "").replace("right", "")
    sentence = f"Left lung, RIGHT side, left-sided {text} right"
    if all(w in ("left", "LEFT", "Left", "right", "RIGHT", "Right") or w.lower() not in ("left", "right")
           for w in sentence.replace("-", " ").split()):  # fmt: skip
        assert mirror(mirror(sentence)) == sentence
    assert mirror("Left lung, RIGHT leftover") == "Right lung, LEFT leftover"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "no labels"),
        ([" "], "empty name"),
        (["a", "a"], "appears twice"),
        (["a", 3], "must be a text"),
        ({}, "empty"),
        ({"a": {"negative": ["x"]}}, "must have `positive`"),
        ({"a": {"positive": ["x"], "negativ": ["y"]}}, "must have `positive`"),
        ({"a": {"positive": [""]}}, "none of them empty"),
        ({"a": 3}, "text or a list"),
        ({"a": {"positive": ["x"], "negative": ["x"]}}, "same text"),
        ({"classnames": 3, "templates": ["{}"]}, "must be a list or an object"),
        ({"classnames": ["a"], "templates": []}, "empty"),
        ({"classnames": ["a"], "templates": ["photo"]}, "no place"),
        ({"classnames": ["a"], "templates": [3]}, "must be a text"),
        ({"classnames": ["a", "b"], "templates": {"a": ["x"]}}, "no entry for label `b`"),
        ({"0": {"classnames": ["a"]}, "1": {"classnames": ["b"]}}, "different classes"),
    ],
)
def test_malformed_prompts_are_refused(value: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_prompts(value)  # type: ignore[arg-type]


def test_single_words_name_built_in_templates() -> None:
    assert choose_templates("histology") == TEMPLATES["histology"]
    assert choose_templates("{}") == ("{}",)
    with pytest.raises(UnknownName, match="did you mean `chest`"):
        choose_templates("chst")
    with pytest.raises(InputError, match="got one text"):
        PromptSet.from_names("abc")


def test_known_forms() -> None:
    assert parse_prompts("pneumonia, normal ,").names == ("pneumonia", "normal")
    assert parse_prompts(["a", "b"], templates="film of {}").texts() == ["film of a", "film of b"]
    benchmark = parse_prompts({"classnames": ["a", "b"], "templates": ["one {c}", "two {c}"]})
    assert benchmark.labels[1] == LabelPrompts("b", ("one b", "two b"))
    two_files = parse_prompts({"x": ["a"], "pcam": ["c", "d"]}, templates={"pcam": ["t {c}"]}, variant="pcam")
    assert two_files.texts() == ["t c", "t d"]
    cupl = parse_prompts({"classnames": ["a"], "templates": {"a": ["first", "second"]}})
    assert cupl.labels[0].positive == ("first", "second")
    conch = {
        "0": {"classnames": {"LUAD": ["adenocarcinoma"], "LUSC": ["squamous"]}, "templates": ["CLASSNAME."]},
        "1": {
            "classnames": {"LUSC": ["scc"], "LUAD": ["adenocarcinoma"]},
            "templates": ["CLASSNAME.", "H&E: CLASSNAME"],
        },
    }
    merged = parse_prompts(conch)
    assert merged.names == ("LUAD", "LUSC")
    assert merged.labels[0].positive == ("adenocarcinoma.", "H&E: adenocarcinoma")
    assert merged.labels[1].positive == ("squamous.", "scc.", "H&E: scc")
    assert parse_prompts(conch, variant="0").labels[1].positive == ("squamous.",)
    with pytest.raises(UnknownName):
        parse_prompts(conch, variant="7")
    assert parse_prompts({"a": "only", "b": ["x", "y"]}).labels[1].positive == ("x", "y")
    assert parse_prompts({"labels": ["a"], "templates": ["is {}"]}).texts() == ["is a"]
    assert parse_prompts({"classnames": {"a": ["b"]}, "templates": ["{}"]}, pairs=True).labels[0].negative == ("no b",)
    with pytest.raises(InputError, match="mapping"):
        parse_prompts(["a"], templates={"x": ["{}"]})
    prompts = PromptSet.from_names(["a", "b"])
    assert parse_prompts(prompts) is prompts
    assert prompts.select(["b"]).names == ("b",)
    with pytest.raises(UnknownName):
        prompts.select(["c"])


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("﻿pneumonia  # the common one\n\n# none\nnormal\n", encoding="utf-8")
    assert load_prompts(tmp_path / "a.txt").names == ("pneumonia", "normal")
    (tmp_path / "a.json").write_text('{"labels": {"x": {"positive": ["x"], "negative": ["no x"]}}}')
    assert load_prompts(tmp_path / "a.json").has_pairs
    (tmp_path / "list.json").write_text('["x", "y"]')
    assert load_prompts(tmp_path / "list.json", pairs=True).has_pairs
    (tmp_path / "a.csv").write_text(
        'Label;positive;negative\nedema;"wet; lungs";dry lungs\nedema;congestion;\nother;;not\n'
    )
    table = load_prompts(tmp_path / "a.csv", templates=["the {}"])
    assert table.labels[0] == LabelPrompts("edema", ("wet; lungs", "congestion"), ("dry lungs",))
    assert table.labels[1] == LabelPrompts("other", ("the other",), ("not",))
    (tmp_path / "names.tsv").write_text("class\na\n\nb\n")
    assert load_prompts(tmp_path / "names.tsv", templates="t {}").texts() == ["t a", "t b"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("broken.json", b'{"a": ', FileFormatError),
        ("deep.json", b"[" * 100_000, FileFormatError),
        ("number.json", b"3", InputError),
        ("latin.txt", b"\xe9\xff", FileFormatError),
        ("empty.txt", b"", InputError),
        ("no_label.csv", b"x,y\n1,2\n", InputError),
        ("quote.csv", b'label\n"a', FileFormatError),
        ("empty.csv", b"", InputError),
        ("a.pdf", b"a", FileFormatError),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, name: str, content: bytes, error: type[ChiasmError]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        load_prompts(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)


def test_absent_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_prompts(tmp_path / "none.json")
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_prompts(tmp_path)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(InputError, match="17 MiB"):
        load_prompts(tmp_path / "huge.txt")
