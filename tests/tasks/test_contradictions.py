"""Minimal pairs: what is turned, what is left alone, and laws of turning."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.data.phantoms import make_chest_phantoms
from chiasm.errors import ConfigError, FileFormatError, InputError
from chiasm.tasks.contradictions import KINDS, ContradictionRules, contradictions, make_probes

RULES = ContradictionRules.load()
DENIED, CLAIMED = KINDS["negation"]
LEFT, RIGHT = KINDS["laterality"]


@pytest.mark.parametrize(
    ("sentence", "kind", "false"),
    [
        ("No pleural effusion.", CLAIMED, "Pleural effusion."),
        ("There is no pneumothorax.", CLAIMED, "There is pneumothorax."),
        ("No evidence of oedema.", CLAIMED, "Evidence of oedema."),
        ("Negative for mass.", CLAIMED, "Positive for mass."),
        ("Axial CT shows no bleed.", CLAIMED, "Axial CT shows bleed."),
        ("Heart is not enlarged.", CLAIMED, "Heart is enlarged."),
        ("There is a nodule.", DENIED, "There is no nodule."),
        ("A small nodule is seen.", DENIED, "No small nodule is seen."),
        ("Focal opacity is present.", DENIED, "No focal opacity is present."),
        ("MR demonstrates a large mass.", DENIED, "MR demonstrates no large mass."),
        ("Left basal opacity.", LEFT, "Right basal opacity."),
        ("Opacity in the RIGHT lung.", RIGHT, "Opacity in the LEFT lung."),
        ("Collapse of the LUL.", LEFT, "Collapse of the RUL."),
    ],
)
def test_how_sentences_are_turned(sentence: str, kind: str, false: str) -> None:
    assert (kind, false) in contradictions(sentence, RULES)


@pytest.mark.parametrize(
    "sentence",
    ["Nodules on the left and on the right.", "No mass and no bleed.", "Clear lungs.", "Normal heart size.", "Both are enlarged."],
)  # fmt: skip
def test_what_is_not_certain_is_left_alone(sentence: str) -> None:
    assert contradictions(sentence, RULES) == []


def test_doubt_gives_no_probe() -> None:
    texts = ("Possible left effusion.", "No change in the nodule.", "Effusion cannot be excluded.", None, "")
    assert make_probes(texts) == ()


def test_a_contradiction_that_the_report_also_says_is_left_out() -> None:
    assert make_probes(["Left effusion. Right effusion."]) == ()
    assert [p.false for p in make_probes(["Left effusion. Right nodule."])] == ["Right effusion.", "Left nodule."]


def test_at_most_so_many_a_text() -> None:
    text = " ".join(f"No mass {k}." for k in range(9))
    assert len(make_probes([text])) == 4
    assert len(make_probes([text], per_text=7)) == 7
    with pytest.raises(InputError, match="per_text"):
        make_probes([text], per_text=0)


@given(st.sampled_from(["left", "right"]), st.sampled_from(["Small {} effusion.", "Opacity on the {}.", "{} nodule."]))
def test_turning_a_side_twice_gives_the_sentence(side: str, frame: str) -> None:
    sentence = frame.format(side).capitalize()
    ((kind, turned),) = contradictions(sentence, RULES)
    ((other, back),) = contradictions(turned, RULES)
    assert back == sentence
    assert {kind, other} == {LEFT, RIGHT}


def test_the_truth_of_phantoms_agrees() -> None:
    """What a phantom's report claims is there, what it denies is not; the sides are the true ones."""
    phantoms = make_chest_phantoms(60, seed=3)
    probes = make_probes([s.text for s in phantoms.samples])
    assert {p.kind for p in probes} == {DENIED, CLAIMED, LEFT, RIGHT}
    words = {"effusion": "effusion", "pneumothorax": "pneumothorax", "nodule": "nodule", "cardiomegaly": "cardiomegaly"}
    checked = 0
    for probe in probes:
        labels = phantoms.samples[probe.row].labels
        for word, column in words.items():
            if word in probe.true.lower() and "costophrenic" not in probe.true:
                checked += 1
                assert labels[column] == (0 if probe.kind == CLAIMED else 1)
                if probe.group == "laterality" and word != "cardiomegaly":
                    assert labels[f"{column}_{'left' if probe.kind == LEFT else 'right'}"] == 1
    assert checked > 60


def test_rules_are_data(tmp_path: Path) -> None:
    own = tmp_path / "rules.toml"
    own.write_text(
        'skip = []\nnegations = ["kein"]\nclaim = [{find = "^kein ", put = ""}]\ndeny = []\n'
        'side = [{left = "links", right = "rechts"}]\nsides = {skip = []}\n'
    )
    rules = ContradictionRules.load(own)
    assert contradictions("Kein Erguss links.", rules) == [(CLAIMED, "Erguss links."), (LEFT, "Kein Erguss rechts.")]
    own.write_text("skip = [")
    with pytest.raises(FileFormatError):
        ContradictionRules.load(own)
    own.write_text("skip = []")
    with pytest.raises(ConfigError, match="claim"):
        ContradictionRules.load(own)
    own.write_text('claim = [{find = "(", put = ""}]')
    with pytest.raises(ConfigError, match="regular expression"):
        ContradictionRules.load(own)
