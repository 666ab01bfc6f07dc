"""Cleaning takes away what scanners drew and nothing that a pathologist wrote."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.io.report import clean_report

#: Texts thick with what the cleaning looks at.
NOISY = st.text(alphabet="I1|_-=iVXpTN0 .,\n\r\t\x00\x0c\u200b\u00ad&;lt\x1b[m", max_size=60)
untimed = settings(deadline=None)  # the first call imports ftfy
STROKES = re.compile(r"[I1|]{5,}")


def letters_and_digits(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(c in rest for c in part)


@pytest.mark.parametrize(
    "text",
    [
        "Invasive ductal carcinoma, grade 1, pT1c N0",
        "Invasive carcinoma, pT1c N0",
        "I",
        "1",
        "i",
        "II III IV VIII 11 111 1111 IIII",
        "Stage III | IV; 1 of 11 nodes; clark level IV; 1-1-1-1; T1|N1",
        "accession 1111110 and 0.11111 and 11111.5 and VIII",
        "µ ± ≤ 5 °C, naïve, Gleason 3+3=6",
        "5 &lt; 6 &amp; more",
    ],
)
def test_what_a_pathologist_wrote_stays(text: str) -> None:
    assert clean_report(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Diagnosis IIIIIII carcinoma", "Diagnosis carcinoma"),
        ("||||||\n11111\nI1|I1|1I carcinoma", "carcinoma"),
        ("carcinoma.IIIIII next", "carcinoma. next"),
        ("PAGE IIIIIIIIIRUN DATE 1I1I1I1SITE", "PAGE RUN DATE SITE"),
        ("name _______ date: ------ ====== --==__", "name date:"),
        ("one\r\n\r\ntwo\x0cthree\u2028four\u2029five\tsix", "one two three four five six"),
        ("\ufeffcar\x00ci\u00adno\u200bma", "carcinoma"),
        ("11\x00111 x", "x"),
        ("caf\u00c3\u00a9 \u201cfi\ufb01\u201d \uff24\uff23\uff29\uff33 e\u0301", 'caf\u00e9 "fifi" DCIS \u00e9'),
        ("\ud800 lone", "\ufffd lone"),
        (" \n\t ", ""),
        ("", ""),
    ],
)
def test_what_scanners_and_exports_left_goes(text: str, clean: str) -> None:
    assert clean_report(text) == clean


@untimed
@given(NOISY | st.text(max_size=60))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_report(text)
    assert clean_report(once) == once
    assert once == " ".join(once.split())
    assert not any(unicodedata.category(c) == "Cc" for c in once)


@untimed
@given(NOISY)
def test_every_letter_and_digit_outside_rules_stays_in_order(text: str) -> None:
    seen = re.sub("[\x00\x1b\u00ad\u200b]", "", text)
    assert is_subsequence(letters_and_digits(STROKES.sub("", seen)), letters_and_digits(clean_report(text)))


@untimed
@given(st.text(alphabet=st.characters(max_codepoint=0x7E, min_codepoint=0x20, exclude_characters="I1|"), max_size=80))
def test_plain_ascii_keeps_exactly_its_letters_and_digits(text: str) -> None:
    assert letters_and_digits(clean_report(text)) == letters_and_digits(text)


@untimed
@given(st.text(max_size=60))
def test_no_mending_of_unicode_takes_an_ascii_letter_away(text: str) -> None:
    kept = "".join(c for c in STROKES.sub("", text) if c.isascii() and c.isalnum())
    assert is_subsequence(kept, unicodedata.normalize("NFKD", clean_report(text)))


def test_entities_stay_beside_letters_beyond_ascii() -> None:
    """ftfy runs for such texts only, and would make `<b>` of the entities, which the next step may take for a tag."""
    text = "Größe &lt;5 mm&gt; &eacute;, 5 &micro;m"
    assert clean_report(text) == text


def test_the_reference_would_fail_here() -> None:
    """What ModalityPairing's cleaning does: a class of characters where a run was meant."""

    def reference(text: str) -> str:
        return re.sub(r"[1Ii|]", "", text)

    text = "Invasive ductal carcinoma, grade 1, pT1c"
    assert reference(text) == "nvasve ductal carcnoma, grade , pTc"
    assert clean_report(text) == text
