"""Rules that a user edits: what is wrong in a file is said with a hint, and no list is read letter by letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import ChiasmError, ConfigError, FileFormatError
from chiasm.tasks.contradictions import KINDS, ContradictionRules, contradictions, make_probes
from chiasm.tasks.weak_labels import combine, find_mentions, label_texts
from chiasm.tasks.weak_rules import LabelRules, fold, phrase_pattern

FINDING = {"name": "effusion", "phrases": ["effusion", "pleural fluid"]}
TURNS: dict[str, Any] = {
    "claim": [{"find": "^No (.*)", "put": r"There is \1"}],
    "deny": [{"find": "^There is a (.*)", "put": r"There is no \1"}],
    "side": [{"left": "left", "right": "right"}],
    "negations": ["no"],
    "skip": ["maybe"],
    "sides": {"skip": ["both"]},
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "rules are a table"),
        ("text", "rules are a table"),
        ({}, "got 0 with 0 names"),
        ({"finding": "effusion"}, "rules are a table"),
        ({"finding": ["effusion"]}, "rules are a table"),
        ({"finding": [FINDING], "cues": ["no"]}, "rules are a table"),
        ({"finding": [FINDING, FINDING]}, "got 2 with 1 names"),
        ({"finding": [FINDING], "no_finding": "effusion"}, "got 2 with 1 names"),
        ({"finding": [{**FINDING, "phrases": "effusion"}]}, "`phrases` must be a list of phrases, got str"),
        ({"finding": [{**FINDING, "phrases": [1]}]}, "`phrases` must be a list of phrases, got list"),
        ({"finding": [{**FINDING, "absent": "dry"}]}, "`absent` must be a list"),
        ({"finding": [{**FINDING, "unless": "x"}]}, "`unless` must be a list"),
        ({"finding": [{**FINDING, "terms": "fluid"}]}, "`terms` must be a list"),
        ({"finding": [FINDING], "cues": {"stops": "but"}}, "`stops` must be a list"),
        ({"finding": [FINDING], "cues": {"negated_before": {"no": 1}}}, "`negated_before` must be a list"),
        ({"finding": [FINDING], "exempt": "effusion"}, "`exempt` must be a list"),
    ],
)
def test_label_rules_that_make_no_sense(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        LabelRules.from_dict(values)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"finding": [FINDING], "cues": {"nope": ["no"]}}, "unknown kind of cue `nope`"),
        ({"finding": [FINDING], "exempt": ["effuson"]}, "did you mean `effusion`"),
        ({"finding": [{**FINDING, "phrase": ["x"]}]}, "did you mean `phrases`"),
        ({"finding": [{"name": "x", "phrases": []}]}, "finding `x` needs a name and phrases"),
        ({"finding": [{"phrases": ["x"]}]}, "needs a name and phrases"),
        ({"finding": [{"name": "x", "phrases": ["..."]}]}, "must begin and end with a word"),
        ({"finding": [{"name": "x", "phrases": ["a ..."]}]}, "must begin and end with a word"),
        ({"finding": [{"name": "x", "phrases": [" "]}]}, "must begin and end with a word"),
    ],
)
def test_names_and_phrases_that_are_wrong(values: Any, message: str) -> None:
    with pytest.raises(ChiasmError, match=re.escape(message)):
        LabelRules.from_dict(values)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.toml", b"\xff\xfe\x00", FileFormatError),
        ("a.toml", b"[[finding", FileFormatError),
        ("a.json", b"{", FileFormatError),
        ("a.json", b"[1, 2]", ConfigError),
        ("a.json", b"3", ConfigError),
        ("a.toml", b"", ConfigError),
    ],
)
def test_files_that_are_no_rules(tmp_path: Path, name: str, content: bytes, error: type[ChiasmError]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        LabelRules.load(path)
    assert str(tmp_path) not in str(caught.value), "no path of the machine"


def test_json_and_toml_of_the_same_rules_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"finding": [FINDING], "cues": {"negated_before": ["no"]}}))
    (tmp_path / "a.toml").write_text(
        '[cues]\nnegated_before = ["no"]\n[[finding]]\nname = "effusion"\nphrases = ["effusion", "pleural fluid"]\n'
    )
    one, other = (LabelRules.load(tmp_path / f"a.{kind}") for kind in ("json", "toml"))
    assert one == other
    text = "No effusion. Pleural  fluid on the left."
    found = find_mentions(text, one)
    assert [(m.value, text[m.start : m.end]) for m in found] == [(0, "effusion"), (1, "Pleural  fluid")]
    assert combine(found, one) == {"effusion": 1}, "one that is stated beats one that is denied"


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("effusion*", "two effusions", "effusions"),
        ("effusion", "two effusions", None),
        ("right|left base", "at the left base", "left base"),
        ("right|left base", "at the base", None),
        ("heart ... enlarged", "heart is mildly enlarged", "heart is mildly enlarged"),
        ("heart ... enlarged", "heart one two three four enlarged", "heart one two three four enlarged"),
        ("heart ... enlarged", "heart one two three four five enlarged", None),
        ("air-space disease", "air space   disease", "air space   disease"),
        ("air space disease", "AIR-SPACE\ndisease", "AIR-SPACE\ndisease"),
        ("T.B", "TxB", None),
        ("épanchement", "Épanchement pleural", "Épanchement"),
    ],
)
def test_signs_of_phrases(phrase: str, text: str, found: str | None) -> None:
    match = re.search(rf"\b(?:{phrase_pattern(phrase)})\b", text, re.IGNORECASE)
    assert (match and match.group()) == found


@pytest.mark.parametrize(
    ("name", "folded"),
    [("Pleural_Effusion", "pleural effusion"), ("  A  b ", "a b"), ("ÉPANCHEMENT", "épanchement"), ("", "")],
)
def test_names_are_folded(name: str, folded: str) -> None:
    assert fold(name) == folded
    assert fold(fold(name)) == folded


@pytest.mark.parametrize(
    ("uncertain", "blank", "expected"),
    [
        ("ignore", "ignore", [1, 0, None, None]),
        ("positive", "ignore", [1, 0, 1, None]),
        ("negative", "ignore", [1, 0, 0, None]),
        ("ignore", "negative", [1, 0, None, 0]),
        ("positive", "negative", [1, 0, 1, 0]),
        ("negative", "negative", [1, 0, 0, 0]),
    ],
)
def test_policies_by_hand(uncertain: Any, blank: Any, expected: list[int | None]) -> None:
    rules = LabelRules.from_dict(
        {"finding": [FINDING], "cues": {"negated_before": ["no"], "uncertain_before": ["possible"]}}
    )
    weak = label_texts(["Effusion.", "No effusion.", "Possible effusion.", "Clear."], rules)
    values = weak.resolve(uncertain=uncertain, blank=blank)[:, 0]
    assert [None if v != v else int(v) for v in values] == expected
    assert weak.counts() == {"effusion": {"positive": 1, "negative": 1, "uncertain": 1, "blank": 1}}
    assert [r["effusion"] for r in weak.to_rows()] == [1, 0, -1, None]
    assert weak.to_rows(spans=True)[2]["effusion_evidence"] == ":9-17"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": "x"}, "a word where a list or a table is expected"),
        ({"claim": ["x"]}, "a word where a list or a table is expected"),
        ({"claim": 3}, "a word where a list or a table is expected"),
        ({"negations": "no"}, "a word where a list or a table is expected"),
        ({"skip": "maybe"}, "a word where a list or a table is expected"),
        ({"sides": "both"}, "a word where a list or a table is expected"),
        ({"sides": {}}, "lack `skip`"),
        ({"side": [{"left": "left"}]}, "lack `right`"),
        ({"claim": [{"find": "a"}]}, "lack `put`"),
        ({"deny": [{"find": "(", "put": "b"}]}, "no regular expression"),
        ({"claim": [{"find": "^No (.*)", "put": r"There is \9"}]}, "invalid group reference"),
        ({"deny": [{"find": "^No (?P<x>.*)", "put": r"\g<y>"}]}, "no regular expression"),
    ],
)
def test_contradiction_rules_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        ContradictionRules.from_dict({**TURNS, **changes})
    assert caught.value.hint


@pytest.mark.parametrize("missing", sorted(TURNS))
def test_a_part_of_the_contradiction_rules_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"lack `{missing}`"):
        ContradictionRules.from_dict({k: v for k, v in TURNS.items() if k != missing})


@pytest.mark.parametrize("content", [b"\xff\xfe", b"claim = ["])
def test_a_file_that_is_no_rules_of_contradictions(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "turns.toml"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        ContradictionRules.load(path)
    assert caught.value.hint


def test_rules_without_sides_turn_no_side() -> None:
    rules = ContradictionRules.from_dict({**TURNS, "side": []})
    assert contradictions("There is a left mass.", rules) == [(KINDS["negation"][0], "There is no left mass.")]
    every = make_probes(["There is a left mass. No effusion. Both maybe left."], ContradictionRules.from_dict(TURNS))
    assert [(p.group, p.false) for p in every] == [
        ("negation", "There is no left mass."),
        ("laterality", "There is a right mass."),
        ("negation", "There is effusion."),
    ]
