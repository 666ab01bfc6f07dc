"""Prompts that are products of attribute lists: order, spaces and repeats as published; files are read, never run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from chiasm.errors import FileFormatError, InputError
from chiasm.tasks.attribute_prompts import (
    checked_attributes,
    combine,
    load_attributes,
    looks_like_attributes,
    prompts_digest,
    sample_prompts,
)

LISTS = {
    "Oedema": {"severity": ["", "mild"], "subtype": ["oedema"], "location": [""]},
    "Effusion": {"severity": ["small"], "location": ["left", "right"], "subtype": ["effusion", "effusion"]},
}


def test_combinations_keep_order_spaces_and_repeats() -> None:
    prompts = combine(LISTS)
    assert prompts["Oedema"] == (" oedema ", "mild oedema ")
    assert prompts["Effusion"] == ("small left effusion",) * 2 + ("small right effusion",) * 2


def test_a_draw_is_that_of_a_seeded_script() -> None:
    prompts = {"a": [f"a{i}" for i in range(20)], "few": ["x", "y"], "b": [f"b{i}" for i in range(30)]}
    random.seed(6)
    script = {"a": tuple(random.sample(prompts["a"], 5)), "b": tuple(random.sample(prompts["b"], 5))}
    drawn = sample_prompts(prompts, 5, 6)
    assert drawn == {"a": script["a"], "few": ("x", "y"), "b": script["b"]}
    assert sample_prompts(prompts, 5, 7) != drawn
    assert sample_prompts(prompts, None, 0)["a"] == tuple(prompts["a"])
    with pytest.raises(InputError):
        sample_prompts(prompts, 0, 0)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(LISTS))
    source = f"import os\nfrom pathlib import Path\nOTHER = Path('x')\nCHEXPERT_CLASS_PROMPTS = {LISTS!r}\n"
    (tmp_path / "constants.py").write_text(source + "os.mkdir('must not exist')\n")
    assert load_attributes(tmp_path / "a.json") == load_attributes(tmp_path / "constants.py") == LISTS
    assert not (Path.cwd() / "must not exist").exists()
    (tmp_path / "typed.py").write_text(f"CHEXPERT_CLASS_PROMPTS: dict = {LISTS!r}\n")
    assert load_attributes(tmp_path / "typed.py") == LISTS


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.py", "CHEXPERT_CLASS_PROMPTS = make()", FileFormatError),
        ("a.py", "CHEXPERT_CLASS_PROMPTS = __import__('os').getcwd()", FileFormatError),
        ("a.py", "X = 1", FileFormatError),
        ("a.py", "CHEXPERT_CLASS_PROMPTS: dict\n", FileFormatError),
        ("a.py", "CHEXPERT_CLASS_PROMPTS = " + "[" * 500, FileFormatError),
        ("a.py", "x\x00", FileFormatError),
        ("a.json", "[" * 100_000, FileFormatError),
        ("a.json", "{", FileFormatError),
        ("a.json", "[]", InputError),
        ("a.json", '{"a": []}', InputError),
        ("a.json", '{"a": {"severity": [1]}}', InputError),
        ("a.json", '{"a": {"severity": []}}', InputError),
        ("a.json", " " * 2_000_000, InputError),
        ("a.json", json.dumps({"a": {str(k): ["x"] * 100 for k in range(4)}}), InputError),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, error: type[Exception]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(error):
        load_attributes(tmp_path / name)


def test_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_attributes(tmp_path / "no.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FileFormatError):
        load_attributes(tmp_path / "b.json")


def test_forms_are_told_apart() -> None:
    assert looks_like_attributes(LISTS)
    assert not looks_like_attributes({"a": {"positive": ["x"], "negative": ["y"]}})
    assert not looks_like_attributes({"0": {"classnames": {"a": ["b"]}, "templates": ["CLASSNAME"]}})
    assert not looks_like_attributes({"a": ["b"]})
    assert not looks_like_attributes({})
    with pytest.raises(InputError, match="without a word"):
        combine(checked_attributes({"a": {"x": ["", "b"], "y": [" "]}}))


def test_the_digest_tells_lists_apart() -> None:
    one = prompts_digest(combine(LISTS))
    assert one == prompts_digest(dict(reversed(combine(LISTS).items())))
    assert one != prompts_digest({**combine(LISTS), "Oedema": ("oedema", "mild oedema ")})
