"""The prompts of a protocol: its own, or the user's labels and files in the protocol's form."""

from __future__ import annotations

from typing import Any

import pytest

from chiasm.errors import InputError
from chiasm.tasks.prompts import LabelPrompts, PromptSet, fill
from chiasm.tasks.protocol import get_protocol
from chiasm.tasks.protocol_prompts import make_prompts

PAIRS = PromptSet((LabelPrompts("a", ("a1", "a2"), ("not a",)), LabelPrompts("b", ("b1",), ("not b", "b absent"))))


def test_labels_and_files_in_a_protocols_form(tmp_path: Any) -> None:
    from chiasm.tasks.protocol_prompts import read_prompt_file

    chexzero = get_protocol("chexzero-chexpert14")
    made = make_prompts(chexzero, ["Emphysema"])
    assert made.prompts.labels == (LabelPrompts("Emphysema", ("Emphysema",), ("no Emphysema",)),)
    assert made.notes == ("the labels are the user's, in the protocol's templates",)
    (tmp_path / "names.txt").write_text("Edema\nFracture\n")
    read = read_prompt_file(chexzero, tmp_path / "names.txt").prompts
    assert [p.negative for p in read.labels] == [("no Edema",), ("no Fracture",)]
    (tmp_path / "pairs.json").write_text('{"x": {"positive": ["x is here"], "negative": ["x is not"]}}')
    own = read_prompt_file(chexzero, tmp_path / "pairs.json")
    assert own.prompts.labels[0].positive == ("x is here",)
    (tmp_path / "conch.json").write_text(
        '{"0": {"classnames": {"a": ["x", "y"], "b": ["z"]}, "templates": ["CLASSNAME."]}}'
    )
    assert read_prompt_file(get_protocol("conch"), tmp_path / "conch.json").prompts.labels[0].positive == ("x.", "y.")
    biovil = make_prompts(get_protocol("biovil-rsna"), PAIRS)
    assert biovil.notes == ("the prompts are the user's, not the published ones",)
    with pytest.raises(InputError, match="templates of its own"):
        make_prompts(chexzero, ["a"], templates="a {}")
    for bare in (["a", "b"], {"classnames": ["a", "b"]}, {"a": ["a"], "b": ["b"]}):  # chiasm's own templates stay out
        with pytest.raises(InputError, match="no templates"):
            make_prompts(get_protocol("quiltnet"), bare)
    own = make_prompts(get_protocol("quiltnet"), {"classnames": ["a", "b"]}, templates="{}, a photo")
    assert own.prompts.labels[0].positive == ("a, a photo",)
    assert own.notes == ("the templates are the user's",)
    (tmp_path / "plain.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="no templates"):
        read_prompt_file(get_protocol("plip"), tmp_path / "plain.txt")
    filled = read_prompt_file(get_protocol("openai-imagenet"), tmp_path / "plain.txt").prompts
    assert len(filled.labels[0].positive) == 80


def test_attribute_lists_are_combined_drawn_and_checked(tmp_path: Any) -> None:
    from chiasm.tasks.protocol_prompts import read_prompt_file

    lists = {
        c: {"severity": ["", "mild"], "subtype": [f"{c}{i}" for i in range(9)], "location": ["left", ""]} for c in "ab"
    }
    gloria, medclip = get_protocol("gloria-chexpert5x200"), get_protocol("medclip-chexpert5x200")
    made = make_prompts(gloria, lists, seed=99)
    assert [len(p.positive) for p in made.prompts.labels] == [5, 5]
    assert made.prompts == make_prompts(gloria, lists, seed=1).prompts  # GLoRIA's seed is published
    assert "the attribute lists are NOT the published ones" in made.notes
    (tmp_path / "constants.py").write_text(f"CHEXPERT_CLASS_PROMPTS = {lists!r}")
    drawn = [read_prompt_file(medclip, tmp_path / "constants.py", seed=s) for s in (0, 1)]
    assert [len(p.positive) for p in drawn[0].prompts.labels] == [10, 10]
    assert drawn[0].prompts != drawn[1].prompts
    assert any("seed 1 (the user's" in n for n in drawn[1].notes)


def test_templates_fill_every_label_alike() -> None:
    protocol = get_protocol("biomedclip-lc25000-lung")
    made = make_prompts(protocol).prompts
    for label in made.labels:
        assert label.positive == tuple(fill(t, label.name) for t in protocol.templates)
