"""Reports of the synthetic tissue patches, written with the grammar of :mod:`chiasm.data.phantom_reports`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chiasm.data.phantom_drawing import Finding
from chiasm.data.phantom_reports import (
    NEGATIVE_FRAMES,
    Phrase,
    Prompts,
    absence,
    deny,
    name_alone,
    order_sentences,
    pick,
    state,
    summarise,
)

TISSUE_NEGATED = {
    "tumour": ("tumour", "malignancy", "carcinoma"),
    "lymphocytes": ("lymphocytic infiltrate", "lymphoid aggregate", "inflammation"),
    "necrosis": ("necrosis", "tumour necrosis"),
    "mitoses": ("mitotic activity", "mitotic figures"),
    "glands": ("gland formation", "glands"),
    "fat": ("adipose tissue", "fat"),
}
BENIGN = ("Benign fibrous stroma.", "Benign tissue only.", "Fibrous connective tissue without atypia.")
TISSUE_SUMMARY = {
    "high_grade": ("high-grade carcinoma", "high-grade tumour"),
    "low_grade": ("low-grade carcinoma", "low-grade tumour"),
    "lymphocytes": ("lymphocytic infiltrate",),
    "necrosis": ("necrosis",),
    "mitoses": ("mitoses", "mitotic figures"),
    "glands": ("gland formation", "glands"),
    "fat": ("adipose tissue",),
}
TECHNIQUE = ("H&E section.", "Haematoxylin and eosin stain.", "Microscopic field, H&E.")
AMOUNT_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "lymphocytes": {"mild": ("mild", "sparse"), "moderate": ("moderate",), "severe": ("dense", "brisk")},
    "necrosis": {"mild": ("focal", "limited"), "moderate": ("moderate",), "severe": ("extensive", "confluent")},
    "mitoses": {
        "mild": ("occasional", "rare"),
        "moderate": ("scattered", "several"),
        "severe": ("frequent", "numerous"),
    },
}


def write_tissue_report(rng: np.random.Generator, findings: Sequence[Finding]) -> str:
    """Write the report of a patch with these findings (at most about 45 words)."""
    present = {f.name: f for f in findings}
    stated = []
    for finding in findings:
        if finding.name == "high_grade":
            continue  # said in the sentence on the tumour
        doubt = "" if finding.name in ("tumour", "glands", "fat") else finding.severity
        stated.append(state(rng, describe_tissue(rng, finding, malignant="tumour" in present), severity=doubt))
    denied: list[str] = []
    if "tumour" not in present and rng.random() < 0.6:
        denied.append(pick(rng, BENIGN))
    absent = [name for name in TISSUE_NEGATED if name not in present]
    absent = [absent[int(i)] for i in rng.permutation(len(absent))]
    if "tumour" in absent and rng.random() < 0.5:
        absent.sort(key=lambda name: name != "tumour")
    count = int(rng.integers(1, 4)) if len(stated) < 3 else int(rng.integers(0, 3))
    denied += deny(rng, [_deniable(name, malignant="tumour" in present) for name in absent[:count]])
    closing = summarise(rng, [_summary(f) for f in findings if f.name != "high_grade"])
    return order_sentences(rng, stated, denied, opening=TECHNIQUE, closing=closing) or pick(rng, BENIGN)


def _summary(finding: Finding) -> Sequence[str]:
    """Return the words that name a finding in a summary."""
    if finding.name == "tumour":
        return TISSUE_SUMMARY["high_grade" if finding.severity == "high" else "low_grade"]
    return TISSUE_SUMMARY[finding.name]


def _deniable(name: str, *, malignant: bool) -> Sequence[str]:
    """Return the words by which an absence is stated; "tumour necrosis" needs a tumour."""
    return TISSUE_NEGATED[name][:1] if name == "necrosis" and not malignant else TISSUE_NEGATED[name]


def _where(rng: np.random.Generator, site: str) -> str:
    """Return the place in the field of view in words."""
    if site == "centre":
        return pick(rng, ("in the centre of the field", "centrally"))
    return pick(rng, (f"in the {site} part of the field", f"at the {site} of the field"))


def describe_tissue(rng: np.random.Generator, finding: Finding, *, malignant: bool) -> Phrase:
    """Return a noun phrase for a tissue finding, with grade, amount or place."""
    f = finding
    if f.name == "tumour":
        if f.severity == "high":
            name = pick(rng, ("high-grade carcinoma", "poorly differentiated carcinoma", "high-grade tumour"))
            tail = pick(rng, ("with marked nuclear pleomorphism", "in solid sheets", "with large pleomorphic nuclei"))
        else:
            name = pick(rng, ("low-grade carcinoma", "well differentiated carcinoma", "low-grade tumour"))
            tail = pick(rng, ("with uniform nuclei", "in nests", "with mild atypia"))
        return Phrase(f"{name} {tail}", "count" if name.endswith("tumour") else "mass")
    if f.name == "glands":
        options = (
            ("malignant gland formation", "irregular malignant glands", "malignant glands with open lumina")
            if malignant
            else ("benign gland formation", "regular benign glands", "benign glands lined by a single row of cells")
        )
        text = pick(rng, options)
        return Phrase(text, "mass" if text.endswith("formation") else "plural")
    if f.name == "fat":
        return Phrase(
            f"{pick(rng, ('mature adipose tissue', 'adipose tissue', 'mature fat'))} {_where(rng, f.site)}", "mass"
        )
    amount = pick(rng, AMOUNT_WORDS[f.name][f.severity])
    if f.name == "mitoses":
        return Phrase(f"{amount} {pick(rng, ('mitotic figures', 'mitoses'))}", "plural")
    if f.name == "necrosis":
        return Phrase(f"{amount} necrosis {_where(rng, f.site)}", "mass")
    return Phrase(
        f"{amount} {pick(rng, ('lymphocytic infiltrate', 'infiltrate of lymphocytes'))} {_where(rng, f.site)}"
    )


def tissue_prompts() -> Prompts:
    """Return prompt ensembles per finding: present against absent; for the grade, high against low or none."""
    said = {name: name_alone(terms) for name, terms in TISSUE_SUMMARY.items()}
    high = [*said["high_grade"], "There is poorly differentiated carcinoma with marked nuclear pleomorphism."]
    low = [*said["low_grade"], "There is well differentiated carcinoma with uniform nuclei."]
    prompts: Prompts = {}
    for name, terms in TISSUE_NEGATED.items():
        negative = [absence(frame, term) for term in terms for frame in NEGATIVE_FRAMES[:3]]
        if name == "tumour":
            prompts[name] = {"positive": high + low, "negative": negative + list(BENIGN)}
        else:
            prompts[name] = {"positive": said[name], "negative": negative}
    prompts["high_grade"] = {"positive": high, "negative": [*low, "No tumour.", *BENIGN]}
    return prompts
