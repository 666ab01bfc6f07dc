"""Weak labels: known sentences, laws of negation and spacing, phantoms with the truth, rules as data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.phantoms import make_chest_phantoms
from chiasm.errors import ConfigError, FileFormatError, InputError, UnknownName
from chiasm.tasks.weak_labels import combine, find_mentions, label_texts
from chiasm.tasks.weak_rules import LabelRules, phrase_pattern, rules_text

RULES = LabelRules.load()
REPORTS = [
    "PA chest radiograph. Small left pleural effusion. No pneumothorax or pulmonary nodule. Normal cardiac silhouette.",
    "Possible mild bilateral pulmonary edema. Heart size is within normal limits. Negative for airspace opacity.",
    "Focal consolidation cannot be excluded. There is a left chest wall pacemaker; the lungs are otherwise clear.",
]
NAMES = ["pneumothorax", "pleural effusion", "cardiomegaly", "atelectasis", "consolidation", "edema", "rib fracture"]


def labels(text: str) -> dict[str, int]:
    return combine(find_mentions(text, RULES), RULES)


@pytest.mark.parametrize(
    ("text", "finding", "value"),
    [
        ("No pneumothorax.", "pneumothorax", 0),
        ("No focal consolidation, pleural effusion, or pneumothorax.", "pneumothorax", 0),
        ("There is a small left pleural effusion.", "pleural_effusion", 1),
        ("No pneumothorax but a small effusion.", "pleural_effusion", 1),
        ("Pneumothorax is not seen.", "pneumothorax", 0),
        ("The effusion has completely resolved.", "pleural_effusion", 0),
        ("Pneumothorax cannot be excluded.", "pneumothorax", -1),
        ("Possible pneumonia.", "pneumonia", -1),
        ("Opacity may represent pneumonia.", "lung_opacity", 1),
        ("Opacity may represent pneumonia.", "pneumonia", -1),
        ("No opacity to suggest pneumonia.", "pneumonia", 0),
        ("No pneumothorax, possible effusion.", "pleural_effusion", -1),
        ("No change in the effusion.", "pleural_effusion", 1),
        ("The heart is mildly enlarged.", "cardiomegaly", 1),
        ("The heart is not enlarged.", "cardiomegaly", 0),
        ("Heart size is within normal limits.", "cardiomegaly", 0),
        ("Lungs are clear.", "consolidation", 0),
        ("Effusion. Effusion is not seen on the other film.", "pleural_effusion", 1),
        ("Possible effusion. No effusion.", "pleural_effusion", -1),
        ("Pericardial effusion.", "pleural_effusion", None),
        ("History of pneumothorax.", "pneumothorax", None),
        ("Air-space\ndisease.", "lung_opacity", 1),
        ("Normal chest.", "no_finding", 1),
        ("Pacemaker. Lungs are clear.", "no_finding", 1),
        ("Scoliosis.", "no_finding", 0),
        ("Possible nodule.", "no_finding", -1),
        ("Nodule 0.5 cm. No mass.", "lung_lesion", 1),
    ],
)
def test_known_sentences(text: str, finding: str, value: int | None) -> None:
    assert labels(text).get(finding) == value


@given(st.sampled_from(NAMES), st.sampled_from(["There is {}.", "{} is seen.", "Small {}."]))
def test_adding_a_negation_flips(name: str, frame: str) -> None:
    stated, finding = (
        labels(frame.format(name)),
        RULES.named(name.replace("rib ", "").replace("pleural effusion", "effusion")),
    )
    assert finding is not None
    assert stated[finding] == 1
    for denied in (f"No {name}.", f"No evidence of {name}.", f"{name} is not identified.", f"Negative for {name}."):
        assert labels(denied)[finding] == 0
        assert labels(denied)["no_finding"] == 1
    assert labels(f"Possible {name}.")[finding] == -1
    assert labels(frame.format(name) + f" No {name}.")[finding] == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_case_and_white_space_do_not_matter(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(REPORTS))
    space = st.sampled_from([" ", "  ", "\n", "\t ", "\r\n"])
    changed = "".join(data.draw(space) if c == " " else c for c in text)
    case = data.draw(st.sampled_from([str.upper, str.lower, str.swapcase]))
    assert labels(case(changed)) == labels(text)


@given(st.lists(st.sampled_from(["No effusion.", "Cardiomegaly.", "Possible nodule.", "Lungs are clear."]), max_size=4))
def test_the_order_of_sentences_does_not_matter(sentences: list[str]) -> None:
    assert labels(" ".join(sentences)) == labels(" ".join(reversed(sentences)))


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    for m in find_mentions(text, RULES):
        assert text[m.start : m.end].strip()
        assert m.value in (-1, 0, 1)


def test_phantoms_agree_with_their_truth() -> None:
    """Doubt is put on findings that are there: with `positive` every label of every report is right."""
    phantoms = make_chest_phantoms(150, seed=11, size_px=32, images_per_patient=(1, 1))
    weak = label_texts([s.text for s in phantoms.samples], RULES, ids=[s.id for s in phantoms.samples])
    values = weak.resolve(uncertain="positive", blank="negative")
    columns = ("cardiomegaly", "effusion", "pneumothorax", "consolidation", "nodule", "oedema", "device")
    wrong = total = 0
    for column in columns:
        truth = np.array([s.labels[column] for s in phantoms.samples], dtype=float)
        wrong += int((values[:, weak.findings.index(RULES.named(column) or "")] != truth).sum())
        total += len(truth)
    assert wrong / total <= 0.002, f"{wrong} of {total}"
    sure = weak.resolve(uncertain="ignore", blank="ignore")
    stated = ~np.isnan(sure[:, weak.findings.index("pneumothorax")])
    truth = np.array([s.labels["pneumothorax"] for s in phantoms.samples], dtype=float)
    assert (sure[stated, weak.findings.index("pneumothorax")] == truth[stated]).all()


def test_policies_and_the_table() -> None:
    weak = label_texts(
        ["Possible effusion.", "No effusion.", None, "Effusion."], ids=list("abcd"), patients=["p", None, "q", "q"]
    )
    column = weak.column("pleural_effusion")
    np.testing.assert_array_equal(column, [-1, 0, np.nan, 1])
    assert weak.patients == ("p", "b", "q", "q")
    at = weak.findings.index("pleural_effusion")
    np.testing.assert_array_equal(weak.resolve()[:, at], [np.nan, 0, np.nan, 1])
    np.testing.assert_array_equal(weak.resolve(uncertain="positive", blank="negative")[:, at], [1, 0, 0, 1])
    np.testing.assert_array_equal(weak.resolve(uncertain="negative")[:, at], [0, 0, np.nan, 1])
    normal = weak.findings.index("no_finding")
    np.testing.assert_array_equal(weak.resolve(uncertain="positive")[:, normal], [0, 1, np.nan, 0])
    np.testing.assert_array_equal(weak.resolve(uncertain="negative")[:, normal], [1, 1, np.nan, 0])
    assert weak.counts()["pleural_effusion"] == {"positive": 1, "negative": 1, "uncertain": 1, "blank": 1}
    rows = weak.to_rows(spans=True)
    assert rows[0]["pleural_effusion"] == -1
    assert rows[2]["pleural_effusion"] is None
    assert rows[3]["pleural_effusion_evidence"] == ":0-8"
    (mention,) = weak.evidence(1, "pleural_effusion")
    assert (mention.start, mention.end, mention.cue) == (3, 11, (0, 2))


def test_sections() -> None:
    report = "INDICATION: pneumothorax?\nFINDINGS: Small effusion.\nIMPRESSION: No pneumothorax."
    assert labels(report)["pneumothorax"] == 1, "read whole, the question counts"
    weak = label_texts([report, "Effusion."], sections=["impression"])
    np.testing.assert_array_equal(weak.column("pneumothorax"), [0, np.nan])
    np.testing.assert_array_equal(weak.column("pleural_effusion"), [np.nan, 1])
    assert weak.mentions[0][0].section == "impression"


def test_rules_are_data(tmp_path: Path) -> None:
    own = {"finding": [{"name": "fat", "phrases": ["fat*", "liver ... bright"]}], "cues": {"negated_before": ["kein"]}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    rules = LabelRules.load(path)
    assert rules.columns == ("fat",)
    for text, value in (("Fatty change", 1), ("kein fat", 0), ("The LIVER is rather bright.", 1)):
        assert combine(find_mentions(text, rules), rules) == {"fat": value}
    copy = tmp_path / "chest.toml"
    copy.write_text(rules_text())
    assert LabelRules.load(copy).columns == RULES.columns
    assert len(RULES.columns) == 14
    assert RULES.named("Pleural_Effusion") == "pleural_effusion"
    assert RULES.named("Nodule") == "lung_lesion"
    assert RULES.named("age") is None


def test_wrong_rules_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for text, error, message in (
        ("finding = [", FileFormatError, "cannot be read"),
        ("name = 'x'", ConfigError, "need findings"),
        ("finding = [{name = 'a'}]", ConfigError, "phrases"),
        ("finding = [{name = 'a', phrases = ['x'], colour = 1}]", UnknownName, "field of a finding"),
        ("finding = [{name = 'a', phrases = ['...']}]", ConfigError, "begin and end"),
        ("finding = [{name = 'a', phrases = ['x']}]\ncues = {before = []}", UnknownName, "kind of cue"),
        ("exempt = ['b']\nfinding = [{name = 'a', phrases = ['x']}]", UnknownName, "finding"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=message):
            LabelRules.load(path)
    with pytest.raises(UnknownName, match="set of rules"):
        LabelRules.load("knees")
    with pytest.raises(InputError, match="2 ids"):
        label_texts(["a"], ids=["a", "b"])
    with pytest.raises(UnknownName, match="policy"):
        label_texts(["a"]).resolve(uncertain="maybe")  # type: ignore[arg-type]
    assert phrase_pattern("a.b c*|d") == r"a\.b[\s-]+(?:c\w*|d)"
