"""Reports of the synthetic chest films: a small grammar with synonyms, negation, uncertainty, side, site and severity.

A report states every finding of its image with its true side and site, denies some of those that are absent, and never
claims one that is absent. One sentence speaks of one finding that is present, so that a side or a "no" has one meaning;
only absent findings share a sentence ("No effusion or pneumothorax."), and half of the reports end with a summary that
names what is present without side or site ("Impression: pleural effusion and nodule."). Doubt ("possible", "cannot be excluded") is put
on findings that are there but slight. The grammar's machinery also writes the tissue reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chiasm.data.phantom_drawing import Finding

Prompts = dict[str, dict[str, list[str]]]

MM_PER_UNIT = 350.0  # a chest film is about 35 cm wide
MAX_WORDS = 38  # absences are dropped beyond it: every report fits CLIP's 77 tokens
UNCERTAIN = {"mild": 0.28, "moderate": 0.08}  # probability of doubt; none about what is severe

DEFINITE_FRAMES = ("{np}.", "There {is} {a_np}.", "{np} {is} seen.", "{np} {is} present.", "{np} {is} noted.")
UNCERTAIN_FRAMES = (
    "Possible {np}.",
    "Probable {np}.",
    "Suspected {np}.",
    "{a_np} cannot be excluded.",
    "Findings suspicious for {a_np}.",
)
NEGATIVE_FRAMES = ("No {x}.", "No evidence of {x}.", "There is no {x}.", "No {x} seen.", "Negative for {x}.")
PLURALS = ("glands", "mitotic figures", "mitoses")

SIZE_WORDS = {"mild": ("small", "minor"), "moderate": ("moderate", "moderate-sized"), "severe": ("large", "extensive")}
GRADE_WORDS = {"mild": ("mild", "slight"), "moderate": ("moderate",), "severe": ("severe", "marked")}
ZONE_WORDS = {
    "upper": ("upper zone", "upper lung zone", "upper lung"),
    "mid": ("mid zone", "middle zone", "mid lung"),
    "lower": ("lower zone", "lower lung zone", "lung base"),
}
CHEST_NEGATED = {
    "effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax",),
    "consolidation": ("consolidation", "focal consolidation", "airspace opacity"),
    "nodule": ("nodule", "pulmonary nodule", "lung nodule"),
    "oedema": ("pulmonary oedema", "pulmonary edema"),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "device": ("support device", "pacemaker", "central line"),
}
CHEST_SUMMARY = {
    "effusion": ("pleural effusion",),
    "pneumothorax": ("pneumothorax",),
    "consolidation": ("consolidation", "airspace consolidation"),
    "nodule": ("nodule", "pulmonary nodule"),
    "mass": ("mass", "pulmonary mass"),
    "oedema": ("pulmonary oedema", "pulmonary edema"),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "device": ("support device",),
}
LARGEST_NODULE_MM = 30  # beyond it radiologists say "mass"
SUMMARY_FRAMES = ("Impression: {x}.", "Conclusion: {x}.", "In summary, {x}.")
SUMMARY_SHARE = 0.5
NORMAL_HEART = ("The heart is normal in size.", "Normal cardiac silhouette.", "Heart size is within normal limits.")
CLEAR_LUNGS = ("The lungs are clear.", "Clear lungs.", "Lungs are well aerated and clear.")
NORMAL_STUDY = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "Unremarkable chest radiograph.",
    "No active disease.",
)
TECHNIQUE = ("PA chest radiograph.", "Frontal chest film.", "AP portable chest radiograph.", "Chest, frontal view.")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase without its article.

    Attributes:
        text: In lower case.
        kind: ``count`` takes "a", ``mass`` takes no article, ``plural`` takes "are".
    """

    text: str
    kind: str = "count"

    def with_article(self) -> str:
        """Return the phrase as it follows "there is"."""
        if self.kind != "count":
            return self.text
        vowel = self.text[0] in "aeiou" or self.text.startswith(("8 ", "18 ", "11 "))
        return f"{'an' if vowel else 'a'} {self.text}"


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options."""
    return options[int(rng.integers(len(options)))]


def capital(sentence: str) -> str:
    """Return the sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def state(rng: np.random.Generator, phrase: Phrase, *, severity: str = "") -> str:
    """Return a sentence that states a finding, with doubt at times when it is slight."""
    doubt = rng.random() < UNCERTAIN.get(severity, 0.0)
    frame = pick(rng, UNCERTAIN_FRAMES if doubt else DEFINITE_FRAMES)
    verb = "are" if phrase.kind == "plural" else "is"
    return capital(frame.format(np=phrase.text, a_np=phrase.with_article(), **{"is": verb}))


def deny(rng: np.random.Generator, terms: Sequence[Sequence[str]]) -> list[str]:
    """Return sentences that deny the findings; two or three may share one."""
    words = [pick(rng, options) for options in terms]
    sentences = []
    while words:
        count = min(len(words), int(rng.integers(1, 4)))
        group, words = words[:count], words[count:]
        listed = " or ".join([", ".join(group[:-1]), group[-1]]) if count > 1 else group[0]
        sentences.append(absence(pick(rng, NEGATIVE_FRAMES), listed))
    return sentences


def absence(frame: str, words: str) -> str:
    """Fill a frame of ``NEGATIVE_FRAMES``: "there are no glands", but "there is no fat or glands"."""
    verb = "There are no" if words.startswith(PLURALS) else "There is no"
    return frame.replace("There is no", verb).format(x=words)


def summarise(rng: np.random.Generator, terms: Sequence[Sequence[str]]) -> list[str]:
    """Return, half of the time, one sentence that names the findings without side or site."""
    words = [pick(rng, options) for options in terms]
    words = [words[int(i)] for i in rng.permutation(len(words))]
    if not words or rng.random() >= SUMMARY_SHARE:
        return []
    listed = " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    return [pick(rng, SUMMARY_FRAMES).format(x=listed)]


def order_sentences(
    rng: np.random.Generator, stated: list[str], denied: list[str], *, opening: Sequence[str], closing: list[str]
) -> str:
    """Join the sentences: findings first, or absences first, or mixed; at times a technique before, a summary after."""
    way = rng.random()
    while denied and sum(len(sentence.split()) for sentence in stated + denied + closing) > MAX_WORDS:
        denied = denied[:-1]
    if sum(len(sentence.split()) for sentence in stated + closing) > MAX_WORDS:
        closing = []
    stated = [stated[int(i)] for i in rng.permutation(len(stated))]
    sentences = stated + denied if way < 0.6 else denied + stated
    if way > 0.8:
        sentences = [sentences[int(i)] for i in rng.permutation(len(sentences))]
    if rng.random() < 0.22:
        sentences.insert(0, pick(rng, opening))
    return " ".join(sentences + closing)


def write_chest_report(rng: np.random.Generator, findings: Sequence[Finding]) -> str:
    """Write the report of a chest film with these findings (at most about 45 words)."""
    present = {f.name for f in findings}
    stated = [state(rng, describe_chest(rng, f), severity=f.severity) for f in findings]
    absent = [name for name in CHEST_NEGATED if name not in present]
    absent = [absent[int(i)] for i in rng.permutation(len(absent))]
    denied: list[str] = []
    if not present:
        stated = [pick(rng, NORMAL_STUDY)]
    if "cardiomegaly" in absent and rng.random() < 0.40:
        absent.remove("cardiomegaly")
        denied.append(pick(rng, NORMAL_HEART))
    if not present - {"cardiomegaly", "device"} and rng.random() < 0.5:
        denied.append(pick(rng, CLEAR_LUNGS))
    count = int(rng.integers(2, 5)) if len(present) < 2 else int(rng.integers(1, 4))
    denied += deny(rng, [CHEST_NEGATED[name] for name in absent[:count]])
    closing = summarise(rng, [CHEST_SUMMARY["mass" if _is_mass(f) else f.name] for f in findings])
    return order_sentences(rng, stated, denied, opening=TECHNIQUE, closing=closing)


def describe_chest(rng: np.random.Generator, finding: Finding) -> Phrase:
    """Return a noun phrase for a chest finding, with its side, its site and its size or severity."""
    writer = {
        "effusion": _effusion,
        "pneumothorax": _pneumothorax,
        "consolidation": _consolidation,
        "nodule": _nodule,
        "oedema": _oedema,
        "cardiomegaly": _cardiomegaly,
        "device": _device,
    }[finding.name]
    return writer(rng, finding)


def _effusion(rng: np.random.Generator, f: Finding) -> Phrase:
    size = pick(rng, SIZE_WORDS[f.severity])
    if f.side == "bilateral":
        return Phrase(
            pick(rng, (f"{size} bilateral pleural effusions", f"bilateral pleural effusions of {size} size")), "plural"
        )
    options = [
        f"{size} {f.side} pleural effusion",
        f"{size} {f.side}-sided pleural effusion",
        f"{size} pleural effusion on the {f.side}",
        f"{size} {f.side} basal pleural effusion",
    ]
    if f.severity == "mild":
        options.append(f"blunting of the {f.side} costophrenic angle by a {size} effusion")
    text = pick(rng, options)
    return Phrase(text, "mass" if text.startswith("blunting") else "count")


def _pneumothorax(rng: np.random.Generator, f: Finding) -> Phrase:
    size = pick(rng, SIZE_WORDS[f.severity])
    return Phrase(
        pick(
            rng,
            (
                f"{size} {f.side} {f.site} pneumothorax",
                f"{size} {f.side}-sided {f.site} pneumothorax",
                f"{size} {f.site} pneumothorax on the {f.side}",
                f"{size} {f.side} {f.site} pneumothorax with a visible pleural line",
            ),
        )
    )


def _consolidation(rng: np.random.Generator, f: Finding) -> Phrase:
    word = pick(
        rng,
        {"mild": ("mild", "patchy"), "moderate": ("moderate", "focal"), "severe": ("dense", "extensive")}[f.severity],
    )
    term = pick(rng, ("consolidation", "airspace consolidation", "airspace opacity"))
    zone = pick(rng, ZONE_WORDS[f.site])
    if f.side == "bilateral":
        return Phrase(f"{word} bilateral {zone} {term}", "mass" if term != "airspace opacity" else "count")
    text = pick(
        rng,
        (
            f"{word} {f.side} {zone} {term}",
            f"{word} {term} in the {f.side} {zone}",
            f"{word} {term} of the {f.side} {zone}",
        ),
    )
    return Phrase(text, "mass" if term != "airspace opacity" else "count")


def _nodule_mm(f: Finding) -> int:
    return round(2 * f.extent * MM_PER_UNIT)


def _is_mass(f: Finding) -> bool:
    return f.name == "nodule" and _nodule_mm(f) > LARGEST_NODULE_MM


def _nodule(rng: np.random.Generator, f: Finding) -> Phrase:
    mm = _nodule_mm(f)
    look = pick(
        rng,
        {
            "solid": ("solid ", "well-defined ", ""),
            "calcified": ("calcified ",),
            "cavitating": ("cavitating ", "cavitary "),
        }[f.kind],
    )
    term = "mass" if _is_mass(f) else pick(rng, ("nodule", "pulmonary nodule", "nodular opacity"))
    zone = pick(rng, ZONE_WORDS[f.site])
    return Phrase(
        pick(
            rng,
            (
                f"{look}{mm} mm {term} in the {f.side} {zone}",
                f"{look}{f.side} {zone} {term} measuring {mm} mm",
                f"{look}{term} in the {f.side} {zone}",
                f"{look}{f.side} {zone} {term}",
            ),
        )
    )


def _oedema(rng: np.random.Generator, f: Finding) -> Phrase:
    grade = pick(rng, GRADE_WORDS[f.severity])
    term = pick(rng, ("oedema", "edema"))
    return Phrase(
        pick(
            rng,
            (
                f"{grade} bilateral pulmonary {term}",
                f"{grade} bilateral {f.kind} pulmonary {term}",
                f"bilateral perihilar haze from {grade} pulmonary {term}",
                f"{grade} {f.kind} pulmonary {term} in a bilateral perihilar distribution",
            ),
        ),
        "mass",
    )


def _cardiomegaly(rng: np.random.Generator, f: Finding) -> Phrase:
    grade = pick(rng, GRADE_WORDS[f.severity])
    text = pick(
        rng,
        (
            f"{grade} cardiomegaly",
            f"{grade} cardiac enlargement",
            f"{grade} enlargement of the cardiac silhouette",
            f"{grade} enlargement of the heart",
        ),
    )
    return Phrase(text, "mass")


def _device(rng: np.random.Generator, f: Finding) -> Phrase:
    if f.kind == "pacemaker":
        options = (
            f"{f.side}-sided dual-chamber pacemaker",
            f"{f.side} pectoral pacemaker with leads in situ",
            f"dual-chamber pacemaker on the {f.side}",
            f"{f.side} chest wall pacemaker",
        )
    else:
        vein = "internal jugular" if f.kind == "jugular" else "subclavian"
        options = (
            f"{f.side} {vein} central venous catheter",
            f"{f.side} {vein} central line with its tip in the superior vena cava",
            f"central venous catheter via the {f.side} {vein} vein",
            f"{f.side} {vein} line in situ",
        )
    return Phrase(pick(rng, options))


def name_alone(terms: Sequence[str]) -> list[str]:
    """Return prompts that name a finding without side or site: the bare words, and as a summary does."""
    return [f"{capital(t)}." for t in terms] + [frame.format(x=t) for t in terms for frame in SUMMARY_FRAMES]


def chest_prompts() -> Prompts:
    """Return prompt ensembles: per finding present against absent, per side one side against the other."""
    one_sided = {
        "effusion": ("{size} {side} pleural effusion", "There is a {size} {side}-sided pleural effusion."),
        "pneumothorax": ("{size} {side} apicolateral pneumothorax", "There is a {size} {side} apical pneumothorax."),
    }
    in_zone = {
        "consolidation": ("{side} {zone} consolidation", "There is dense airspace consolidation in the {side} {zone}."),
        "nodule": ("{side} {zone} nodule", "There is a solid nodule in the {side} {zone}."),
    }
    on_side = {
        "device": (
            "{side}-sided dual-chamber pacemaker",
            "{side} internal jugular central venous catheter",
            "{side} subclavian central line",
        )
    }

    def on(side: str) -> dict[str, list[str]]:
        sized = {
            k: [t.format(side=side, size=s) for t in v for s in ("small", "moderate", "large")]
            for k, v in one_sided.items()
        }
        zoned = {
            k: [t.format(side=side, zone=z) for t in v for z in ("upper zone", "mid zone", "lower zone")]
            for k, v in in_zone.items()
        }
        return {**sized, **zoned, **{k: [t.format(side=side) for t in v] for k, v in on_side.items()}}

    left, right = on("left"), on("right")
    positive = {name: left[name] + right[name] for name in left}
    positive["effusion"].append("Bilateral pleural effusions are present.")
    positive["consolidation"].append("Bilateral lower zone consolidation is seen.")
    positive["cardiomegaly"] = [
        "mild cardiomegaly",
        "Severe cardiomegaly.",
        "There is moderate cardiac enlargement.",
        "Marked enlargement of the cardiac silhouette.",
    ]
    positive["oedema"] = [
        "mild bilateral pulmonary oedema",
        "Severe bilateral alveolar pulmonary edema.",
        "There is moderate bilateral interstitial pulmonary oedema.",
        "Bilateral perihilar haze from pulmonary edema.",
    ]
    prompts: Prompts = {}
    for name, terms in CHEST_NEGATED.items():
        negative = [absence(frame, term) for term in terms for frame in NEGATIVE_FRAMES[:3]]
        if name == "cardiomegaly":
            negative += NORMAL_HEART
        prompts[name] = {"positive": positive[name], "negative": negative}
    prompts["no_finding"] = {
        "positive": [*NORMAL_STUDY, *CLEAR_LUNGS],
        "negative": [sentence for name in CHEST_NEGATED for sentence in positive[name][:4]],
    }
    for name in left:
        prompts[f"{name}_left"] = {"positive": left[name], "negative": right[name]}
        prompts[f"{name}_right"] = {"positive": right[name], "negative": left[name]}
    return prompts
