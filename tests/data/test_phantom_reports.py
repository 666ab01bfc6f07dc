"""Reports must tell the truth; checked with regular expressions that know nothing of the grammar."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.data.phantom_chest import make_anatomy
from chiasm.data.phantom_chest_findings import plan_visits
from chiasm.data.phantom_drawing import Finding
from chiasm.data.phantom_reports import Phrase, describe_chest, write_chest_report
from chiasm.data.phantom_tissue import plan_patches
from chiasm.data.phantom_tissue_reports import describe_tissue, write_tissue_report

CHEST_WORDS = {
    "effusion": r"effusion|pleural fluid",
    "pneumothorax": r"pneumothorax",
    "consolidation": r"consolidation|airspace opacity",
    "nodule": r"nodul|mass\b",
    "oedema": r"o?edema",
    "cardiomegaly": r"cardiomegaly|cardiac enlargement|enlargement of the",
    "device": r"pacemaker|catheter|central line|support device|line in situ|line with its tip|subclavian line",
}
TISSUE_WORDS = {
    "tumour": r"carcinoma|tumour(?! necrosis)|malignancy|malignant gland",
    "high_grade": r"high-grade|poorly differentiated|pleomorphi",
    "lymphocytes": r"lymph|inflammation",
    "necrosis": r"necrosis",
    "mitoses": r"mitotic|mitoses",
    "glands": r"gland",
    "fat": r"\bfat\b|adipose",
}
NEGATED = re.compile(r"^(no |there (is|are) no |negative for )|without", re.IGNORECASE)
SUMMARY = re.compile(r"^(impression:|conclusion:|in summary,)", re.IGNORECASE)
ZONES = {"upper": "upper", "mid": "mid", "lower": "lower|base", "apical": "apical", "apicolateral": "apicolateral"}


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=\.)\s+", text) if s]


def chest_cases(patients: int) -> list[tuple[tuple[Finding, ...], str]]:
    cases = []
    for patient in range(patients):
        rng = np.random.default_rng([77, patient])
        for findings in plan_visits(rng, make_anatomy(rng), 2):
            cases.append((findings, write_chest_report(rng, findings)))
    return cases


def tissue_cases(patients: int) -> list[tuple[tuple[Finding, ...], str]]:
    cases = []
    for patient in range(patients):
        rng = np.random.default_rng([78, patient])
        for findings in plan_patches(rng, 2):
            cases.append((findings, write_tissue_report(rng, findings)))
    return cases


SUMMARY = re.compile(r"(Impression:|Conclusion:|In summary,)")
CASES = {"chest": (chest_cases(700), CHEST_WORDS), "tissue": (tissue_cases(700), TISSUE_WORDS)}


@pytest.mark.parametrize("kind", CASES)
def test_reports_claim_what_is_there_and_deny_only_what_is_not(kind: str) -> None:
    cases, words = CASES[kind]
    for findings, text in cases:
        present = {f.name for f in findings}
        for name, pattern in words.items():
            mentions = [s for s in sentences(text) if re.search(pattern, s, re.IGNORECASE)]
            claims = [s for s in mentions if not NEGATED.search(s)]
            denials = [s for s in mentions if NEGATED.search(s)]
            assert bool(claims) == (name in present), (name, text)
            assert not (denials and name in present), (name, text)


def test_sides_and_sites_are_the_true_ones() -> None:
    for findings, text in CASES["chest"][0]:
        for f in findings:
            claims = [
                s for s in sentences(text) if re.search(CHEST_WORDS[f.name], s, re.IGNORECASE) and not NEGATED.search(s)
            ]
            summaries = [s for s in claims if SUMMARY.match(s)]
            assert len(summaries) <= 1, text
            assert not any(re.search(r"\b(left|right|bilateral)\b", s.lower()) for s in summaries), text
            claims = [s for s in claims if s not in summaries]
            assert len(claims) == 1, text
            said = set(re.findall(r"\b(left|right|bilateral)\b", claims[0].lower()))
            assert said == ({f.side} if f.side else set()), text
            if f.site:
                assert re.search(rf"\b({ZONES[f.site]})", claims[0].lower()), text


def test_places_in_tissue_are_the_true_ones() -> None:
    for findings, text in CASES["tissue"][0]:
        for f in findings:
            if f.site:
                claim = next(
                    s for s in sentences(text) if re.search(TISSUE_WORDS[f.name], s, re.I) and not NEGATED.search(s)
                )
                said = set(re.findall(r"\b(upper|lower|left|right|centr)", claim.lower()))
                assert said == ({"centr"} if f.site == "centre" else set(f.site.split())), text


def test_nodules_are_measured_truly() -> None:
    for findings, text in CASES["chest"][0]:
        for measured in re.findall(r"(\d+) mm", text):
            nodule = next(f for f in findings if f.name == "nodule")
            assert abs(int(measured) - 2 * nodule.extent * 350) <= 0.5


def test_doubt_is_about_slight_findings_only_and_not_rare() -> None:
    doubt = re.compile(r"possible|probable|suspected|cannot be excluded|suspicious", re.IGNORECASE)
    doubtful = 0
    for findings, text in CASES["chest"][0]:
        if doubt.search(text):
            doubtful += 1
            assert any(f.severity in ("mild", "moderate") for f in findings), text
    assert 0.08 < doubtful / len(CASES["chest"][0]) < 0.45


@pytest.mark.parametrize("kind", CASES)
def test_reports_deny_some_absent_findings_and_vary_in_words_and_order(kind: str) -> None:
    texts = [text for _, text in CASES[kind][0]]
    assert np.mean([bool(re.search(r"\bno\b|negative for|normal", t, re.I)) for t in texts]) > 0.7
    assert len(set(texts)) > 0.9 * len(texts)
    starts_with_absence = np.mean([bool(NEGATED.search(t)) for t in texts])
    assert 0.1 < starts_with_absence < 0.6


def test_reports_without_findings_say_so() -> None:
    for findings, text in CASES["chest"][0]:
        normal = re.search(r"no acute cardiopulmonary|normal chest|unremarkable|no active disease", text, re.I)
        assert bool(normal) == (not findings), text


@pytest.mark.parametrize("kind", CASES)
def test_the_language_is_tidy(kind: str) -> None:
    for _, text in CASES[kind][0]:
        assert not re.search(r"\ba [aeio]|\ban [bcdfghjklmnpqrstvwxyz]|  |\.\.|\{|,\.", text), text
        assert all(s[0].isupper() or s[0].isdigit() for s in sentences(text)), text
        assert text.endswith(".")
        assert not re.search(r"\b(\w+) \1\b", text), text
        assert not re.search(r"There is no (glands|mitotic figures|mitoses)|There are no (?!glands|mit)", text), text


@pytest.mark.parametrize("kind", CASES)
def test_reports_fit_the_context_of_clip(kind: str) -> None:
    tokenizers = pytest.importorskip("chiasm.data.tokenizers")
    tokens = tokenizers.ClipTokenizer().encode([text for _, text in CASES[kind][0][:600]])
    assert tokens.truncated == ()


SEVERITY = st.sampled_from(["mild", "moderate", "severe"])
SIDE = st.sampled_from(["left", "right"])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["effusion", "pneumothorax", "consolidation", "nodule", "device"]),
    SIDE,
    SEVERITY,
    st.sampled_from(["upper", "mid", "lower"]),
)
def test_any_chest_phrase_names_its_side(seed: int, name: str, side: str, severity: str, zone: str) -> None:
    kind = {"nodule": "calcified", "device": "jugular"}.get(name, "")
    site = "apical" if name == "pneumothorax" else zone if name in ("consolidation", "nodule") else ""
    phrase = describe_chest(np.random.default_rng(seed), Finding(name, side, site, severity, kind, 0.03))
    assert side in phrase.text
    assert {"left": "right", "right": "left"}[side] not in phrase.text
    assert phrase.text[0].islower() or phrase.text[0].isdigit()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["low", "high"]), st.booleans())
def test_any_tumour_phrase_names_its_grade(seed: int, grade: str, malignant: bool) -> None:
    text = describe_tissue(np.random.default_rng(seed), Finding("tumour", severity=grade), malignant=malignant).text
    assert bool(re.search(TISSUE_WORDS["high_grade"], text)) == (grade == "high")


def test_articles() -> None:
    assert Phrase("effusion").with_article() == "an effusion"
    assert Phrase("small effusion").with_article() == "a small effusion"
    assert Phrase("18 mm nodule").with_article() == "an 18 mm nodule"
    assert Phrase("28 mm nodule").with_article() == "a 28 mm nodule"
    assert Phrase("oedema", "mass").with_article() == "oedema"
