"""Labels from notes: which findings a report names, denies or doubts, each with the words that say so.

Comes in: texts and :class:`~chiasm.tasks.weak_rules.LabelRules`. Goes out: :class:`WeakLabels`: 1, 0, −1 (uncertain) or
blank (not named) for every text and finding, with the evidence, for a table or to train a probe. The labels say what was
written, not what an image shows.

A sentence is searched for phrases; a word that denies or doubts works on the phrases behind it (some on those before it)
up to a stop such as "but". The nearest word decides. Of several mentions, a stated one beats a doubtful one, and that a
denied one.

References:
    W. W. Chapman, W. Bridewell, P. Hanbury, G. F. Cooper, B. G. Buchanan, A simple algorithm for identifying negated
    findings and diseases in discharge summaries, 2001 (NegEx: cues with a scope). J. Irvin et al., CheXpert, 2019 (the 14
    findings, the four values, "no finding", the order of several mentions). Deviations: no window of words and no parser,
    stops end a scope; the phrases are this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets.sections import split_sections
from chiasm.errors import InputError, UnknownName
from chiasm.tasks.weak_rules import FindingRules, LabelRules

Uncertain = Literal["ignore", "positive", "negative"]
Blank = Literal["ignore", "negative"]

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
_END = re.compile(r"[.;!?]+(?=\s|$)")
_RANK = {POSITIVE: 2, UNCERTAIN: 1, NEGATIVE: 0}


@dataclass(frozen=True)
class Mention:
    """One place where a text speaks of a finding.

    Attributes:
        finding: Its name.
        value: 1, 0 or −1.
        start: First character of the phrase, counted in the text, or in the section's text with single spaces.
        end: After its last character.
        cue: Characters of the word that denied or doubted it, or None.
        section: ``findings``, ``impression`` ...; empty where the text has no headings.
    """

    finding: str
    value: int
    start: int
    end: int
    cue: tuple[int, int] | None = None
    section: str = ""


@dataclass(frozen=True)
class WeakLabels:
    """Labels of texts.

    Attributes:
        ids: One a text.
        findings: Columns.
        values: float64, (texts, findings): 1, 0, −1 (uncertain) or NaN (blank).
        mentions: Of each text, in its order.
        patients: Group of each text.
        no_finding: The column that means that nothing was found, if there is one.
    """

    ids: tuple[str, ...]
    findings: tuple[str, ...]
    values: NDArray[np.float64]
    mentions: tuple[tuple[Mention, ...], ...]
    patients: tuple[str, ...]
    no_finding: str | None = None

    def column(self, finding: str) -> NDArray[np.float64]:
        """Return the values of one finding; one that is not there raises ``UnknownName``."""
        if finding not in self.findings:
            raise UnknownName("finding", finding, self.findings)
        return self.values[:, self.findings.index(finding)]

    def resolve(self, *, uncertain: Uncertain = "ignore", blank: Blank = "ignore") -> NDArray[np.float64]:
        """Return 1, 0 and NaN (not used), as a probe or a comparison needs them.

        Args:
            uncertain: What −1 becomes: left out, 1 or 0; for "no finding" the other way round, since it is the doubtful
                finding that becomes positive.
            blank: What a finding that is not named becomes: left out, or 0.

        Raises:
            UnknownName: Another word.
        """
        if uncertain not in ("ignore", "positive", "negative"):
            raise UnknownName("policy for uncertain labels", uncertain, ("ignore", "positive", "negative"))
        if blank not in ("ignore", "negative"):
            raise UnknownName("policy for blank labels", blank, ("ignore", "negative"))
        doubt = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}[uncertain]
        other = np.array([1 - doubt if name == self.no_finding else doubt for name in self.findings])
        values = np.where(self.values == UNCERTAIN, other[None, :], self.values)
        return np.where(np.isnan(self.values), 0.0, values) if blank == "negative" else values

    def counts(self) -> dict[str, dict[str, int]]:
        """Return, a finding, how many texts state, deny, doubt it, or say nothing."""
        found = {}
        for k, name in enumerate(self.findings):
            v = self.values[:, k]
            found[name] = {
                "positive": int((v == POSITIVE).sum()),
                "negative": int((v == NEGATIVE).sum()),
                "uncertain": int((v == UNCERTAIN).sum()),
                "blank": int(np.isnan(v).sum()),
            }
        return found

    def evidence(self, row: int, finding: str) -> tuple[Mention, ...]:
        """Return the mentions that decided a label."""
        value = self.values[row, self.findings.index(finding)]
        return tuple(m for m in self.mentions[row] if m.finding == finding and m.value == value)

    def to_rows(self, *, spans: bool = False) -> list[dict[str, Any]]:
        """Return one row a text: id, patient, and each finding as 1, 0, −1 or None.

        Args:
            spans: Add ``FINDING_evidence``: ``section:start-end`` of the phrases that decided, joined by ``|``.
        """
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.ids):
            row: dict[str, Any] = {"id": name, "patient": self.patients[i]}
            for k, finding in enumerate(self.findings):
                value = self.values[i, k]
                row[finding] = None if np.isnan(value) else int(value)
                if spans:
                    places = [f"{m.section}:{m.start}-{m.end}" for m in self.evidence(i, finding)]
                    row[f"{finding}_evidence"] = "|".join(places)
            rows.append(row)
        return rows


def label_texts(
    texts: Sequence[str | None],
    rules: LabelRules | None = None,
    *,
    ids: Sequence[str] | None = None,
    patients: Sequence[str | None] | None = None,
    sections: Sequence[str] = (),
) -> WeakLabels:
    """Return the labels of texts.

    Args:
        texts: Reports; None or an empty one gets blank labels.
        rules: None: the chest findings of the package.
        ids: One a text; by default its number.
        patients: Group of each text; by default its id.
        sections: Of reports with headings, only these (``impression``); reports without headings are read whole.

    Raises:
        InputError: There is not one id or patient a text.
    """
    rules = rules or LabelRules.load()
    names = tuple(ids) if ids is not None else tuple(str(i) for i in range(len(texts)))
    groups = (
        names if patients is None else tuple(p if p is not None else n for p, n in zip(patients, names, strict=False))
    )
    if len(names) != len(texts) or len(groups) != len(texts):
        raise InputError(f"there are {len(texts)} texts, {len(names)} ids and {len(groups)} patients")
    mentions = tuple(find_mentions(text or "", rules, sections=sections) for text in texts)
    values = np.full((len(texts), len(rules.columns)), np.nan)
    for i, found in enumerate(mentions):
        labels = combine(found, rules, named=bool((texts[i] or "").strip()))
        values[i] = [np.nan if labels.get(name) is None else labels[name] for name in rules.columns]
    return WeakLabels(names, rules.columns, values, mentions, groups, rules.no_finding)


def combine(mentions: Sequence[Mention], rules: LabelRules, *, named: bool = True) -> dict[str, int]:
    """Return finding -> label from all mentions of a text; what is not named is absent.

    Args:
        mentions: Of one text.
        rules: Say which findings "no finding" allows.
        named: Whether there is any text: an empty one is not "no finding".
    """
    labels: dict[str, int] = {}
    for m in mentions:
        if m.finding not in labels or _RANK[m.value] > _RANK[labels[m.finding]]:
            labels[m.finding] = m.value
    if rules.no_finding and named:
        stated = [name for name, value in labels.items() if value != NEGATIVE and name not in rules.exempt]
        labels[rules.no_finding] = NEGATIVE if any(labels[n] == POSITIVE for n in stated) else POSITIVE
        if stated and labels[rules.no_finding] == POSITIVE:
            labels[rules.no_finding] = UNCERTAIN
    return labels


def find_mentions(text: str, rules: LabelRules, *, sections: Sequence[str] = ()) -> tuple[Mention, ...]:
    """Return every mention of a finding in a text, in order.

    Args:
        text: A report.
        rules: Phrases and cues.
        sections: As :func:`label_texts`.
    """
    parts = split_sections(text) if sections else {}
    pieces: Mapping[str, str] = {s: parts[s] for s in sections if s in parts} if parts else {"": text}
    found = [m for name, piece in pieces.items() for m in _in_text(piece, rules, name)]
    return tuple(found)


def _in_text(text: str, rules: LabelRules, section: str) -> list[Mention]:
    found: list[Mention] = []
    start = 0
    for end in [*(m.start() for m in _END.finditer(text)), len(text)]:
        if end > start:
            found += _in_sentence(text, start, end, rules, section)
        start = end + 1
    return found


def _in_sentence(text: str, start: int, end: int, rules: LabelRules, section: str) -> list[Mention]:
    cues: list[tuple[str, int, int]] | None = None
    found = []
    for finding in rules.findings:
        for first, last, absent in _phrases(finding, text, start, end):
            if cues is None:
                cues = [(str(m.lastgroup).rpartition("_")[0], *m.span()) for m in rules.cues.finditer(text, start, end)]
            value, cue = _assert(text, cues, first, last)
            if value is None or (absent and value != POSITIVE):
                continue
            found.append(Mention(finding.name, NEGATIVE if absent else value, first, last, cue, section))
    return sorted(found, key=lambda m: (m.start, m.end))


def _phrases(finding: FindingRules, text: str, start: int, end: int) -> list[tuple[int, int, bool]]:
    """Return the phrases of one sentence: start, end, whether it states absence. The longest of overlapping ones stays."""
    other = [m.span() for m in finding.unless.finditer(text, start, end)]
    spans = [
        (*m.span(), absent)
        for pattern, absent in ((finding.phrases, False), (finding.absent, True))
        for m in pattern.finditer(text, start, end)
    ]
    kept: list[tuple[int, int, bool]] = []
    for first, last, absent in sorted(spans, key=lambda s: (s[0] - s[1], s[0])):
        covered = any(a <= first and last <= b for a, b in other)
        if not covered and not any(first < b and a < last for a, b, _ in kept):
            kept.append((first, last, absent))
    return kept


def _assert(
    text: str, cues: Sequence[tuple[str, int, int]], first: int, last: int
) -> tuple[int | None, tuple[int, int] | None]:
    """Return what the nearest cue in scope makes of a phrase: 1, 0, −1, or None where it is not about this film."""
    for kind, a, b in cues:  # inside the phrase: "heart is not enlarged"
        if first < a and b < last and kind.startswith(("negated", "uncertain")):
            return (NEGATIVE if kind.startswith("negated") else UNCERTAIN), (a, b)
    for k, (kind, a, b) in reversed(list(enumerate(cues))):
        if b > first:
            continue
        if kind == "stops":
            break
        if kind == "not_now":
            return None, (a, b)
        if kind == "negated_before":
            return NEGATIVE, (a, b)
        if kind == "uncertain_before":
            denied = _denied(text, cues[:k], a)
            return (NEGATIVE, denied) if denied else (UNCERTAIN, (a, b))
    for kind, a, b in cues:
        if a < last:
            continue
        if kind == "stops":
            break
        if kind in ("negated_after", "uncertain_after"):
            return (NEGATIVE if kind == "negated_after" else UNCERTAIN), (a, b)
    return POSITIVE, None


def _denied(text: str, earlier: Sequence[tuple[str, int, int]], before: int) -> tuple[int, int] | None:
    """Return the word that denies a doubt ("no opacity to suggest a mass"), if no stop or comma lies between."""
    if not earlier:
        return None
    kind, a, b = earlier[-1]
    return (a, b) if kind == "negated_before" and "," not in text[b:before] else None
