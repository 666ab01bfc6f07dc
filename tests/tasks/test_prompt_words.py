"""Shipped words: every template can be negated as a clinician would, names are found, and faulty pairs are noticed."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import UnknownName
from chiasm.tasks.prompt_checks import find_faults
from chiasm.tasks.prompt_words import synonym_kinds, synonyms_of, template_sets
from chiasm.tasks.prompts import PLACEHOLDER, TEMPLATES, LabelPrompts, PromptSet, fill, negate

SHIPPED = [(name, template) for name, entry in template_sets().items() for template in entry.templates]
ODD = re.compile(r"\b(?:of|an?|no|without) no\b|\bno (?:no|without)\b|\ba no\b")


@pytest.mark.parametrize(("name", "template"), SHIPPED)
def test_every_shipped_template_can_be_filled_and_negated(name: str, template: str) -> None:
    assert len(PLACEHOLDER.findall(template)) == 1
    spoken = fill(negate(template), "edema")
    assert re.search(r"\b(?:no|not|without|absence)\b", spoken)
    assert not ODD.search(spoken), spoken
    assert "edema" in spoken


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("an image of {}", "an image with no {}"),
        ("a photo of a {}", "a photo with no {}"),
        ("there is a {}", "there is no {}"),
        ("this is {c}", "this is not {c}"),
        ("Presence of CLASSNAME", "absence of CLASSNAME"),
        ("evidence of {}", "no evidence of {}"),
        ("signs of {label}", "no signs of {label}"),
        ("findings consistent with {}", "findings not consistent with {}"),
        ("suspicious for {}", "not suspicious for {}"),
        ("positive for {}", "negative for {}"),
        ("a film with a {}", "a film with no {}"),
        ("{} seen", "no {} seen"),
        ("a film showing {}", "a film showing no {}"),
    ],
)
def test_how_a_negation_is_said(template: str, expected: str) -> None:
    assert negate(template) == expected


@given(st.text(alphabet="abc {}.,", max_size=20), st.sampled_from(["{}", "{c}", "{label}", "CLASSNAME"]))
def test_the_place_of_the_label_survives(words: str, place: str) -> None:
    template = f"{words.replace('{', '').replace('}', '')} {place} x"
    assert PLACEHOLDER.findall(negate(template)) == PLACEHOLDER.findall(template)
    assert negate(template) != template


def test_a_large_text_takes_no_time() -> None:
    assert negate("a " * 20_000 + "{}").endswith("{}")


def test_sets_are_complete() -> None:
    assert set(TEMPLATES) >= {
        "general",
        "chest",
        "histology",
        "ct",
        "mr",
        "ct-mr",
        "ultrasound",
        "fundus",
        "dermoscopy",
    }
    assert len(TEMPLATES) == len(template_sets())
    for entry in template_sets().values():
        assert entry.about
        assert "{}" in entry.templates
        assert len(set(entry.templates)) == len(entry.templates) >= 4


def test_names_of_labels_are_found_however_a_table_writes_them() -> None:
    assert synonyms_of(["Pleural_Thickening"])["Pleural_Thickening"][:2] == ("Pleural Thickening", "thickened pleura")
    assert synonyms_of(["Oedema"], "chest")["Oedema"][0] == "Oedema"
    assert "pulmonary edema" in synonyms_of(["Oedema"], "chest")["Oedema"]
    assert synonyms_of(["COVID-19"])["COVID-19"] == ("COVID-19", "COVID-19 pneumonia", "coronavirus pneumonia")
    assert synonyms_of(["xyz"]) == {"xyz": ("xyz",)}
    assert synonyms_of(["melanoma"], "chest") == {"melanoma": ("melanoma",)}
    with pytest.raises(UnknownName, match="did you mean `chest`"):
        synonyms_of(["a"], "chst")


def test_no_list_of_names_repeats_itself() -> None:
    for labels in synonym_kinds().values():
        for names in labels.values():
            folded = [n.casefold() for n in names]
            assert len(set(folded)) == len(folded) >= 2


def faults(**labels: tuple[tuple[str, ...], tuple[str, ...]]) -> list[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = PromptSet(tuple(LabelPrompts(n.replace("_", " "), p, m) for n, (p, m) in labels.items()))
    return [(f.label, f.kind) for f in find_faults(prompts)]


def test_faulty_pairs_are_found() -> None:
    assert faults(No_Finding=(("No Finding",), ("no No Finding",))) == [("No Finding", "denied label")]
    assert faults(normal=(("normal chest",), ("no normal",))) == [("normal", "denied label")]
    assert faults(edema=(("edema",), ("no evidence of no edema",))) == [("edema", "double negation")]
    assert faults(edema=(("no edema",), ("edema",))) == [
        ("edema", "denying positive"),
        ("edema", "negative does not deny"),
    ]
    assert faults(a=(("x",), ()), b=(("X",), ())) == [("b", "shared text")]
    assert faults(a=(("film of {}",), ())) == [("a", "open place")]


@pytest.mark.parametrize("name", ["edema", "No Finding", "normal", "pleural effusion"])
@pytest.mark.parametrize("templates", ["chest", "general", None])
def test_what_chiasm_makes_itself_has_no_fault(name: str, templates: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PromptSet.from_pairs([name]) if templates is None else PromptSet.from_pairs([name], templates)
    assert find_faults(made) == ()
