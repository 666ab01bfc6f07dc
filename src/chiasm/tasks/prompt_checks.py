"""Prompts that say something else than their label: found before they are scored, not after.

In: a :class:`~chiasm.tasks.prompts.PromptSet`. Out: frozen faults. They are suspicions, found by words: a score that lies
below chance proves them, and ``chiasm prompts explain`` shows it.

The first kind is a published one: "no No Finding" as the negative prompt of a label that means that nothing is there
inverted its score (AUROC 0.07, rajpurkarlab/CheXzero#19).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from chiasm.tasks.prompts import PLACEHOLDER, PromptSet, says_normal

Kind = Literal[
    "double negation", "denied label", "denying positive", "negative does not deny", "shared text", "open place"
]

_DENIES = re.compile(
    r"\b(?:no|not|without|absence of|absent|negative for|free of|clear of|lack of|never|neither|nor|normal|unremarkable"
    r"|healthy|ruled out|benign)\b",
    re.IGNORECASE,
)
_DOUBLE = re.compile(
    r"\b(?:no|not|without|absence of|negative for)\b(?:\s+\w+){0,2}?\s+(?:no|without|absence of|negative for|normal|"
    r"unremarkable|healthy)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PromptFault:
    """One suspicion.

    Attributes:
        label: Whose prompt it is.
        kind: What is wrong.
        text: The prompt.
        advice: What to write instead.
    """

    label: str
    kind: Kind
    text: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


def find_faults(prompts: PromptSet) -> tuple[PromptFault, ...]:
    """Return what is suspicious about prompts, label by label.

    * ``double negation``: a negative prompt denies twice ("no no finding", "without normal ..."), so it says the label;
    * ``denied label``: the label means that nothing is there, and its negative prompt is the label with "no" before it;
    * ``denying positive``: a positive prompt of a finding denies something;
    * ``negative does not deny``: a negative prompt says the label's own words without a word that denies;
    * ``shared text``: a text stands for two labels, which then cannot be told apart by it;
    * ``open place``: a template was not filled in.
    """
    found: list[PromptFault] = []
    owners: dict[str, list[str]] = defaultdict(list)
    for label in prompts.labels:
        is_normal = says_normal(label.name)
        spoken = " ".join(label.name.replace("_", " ").casefold().split())
        for text in label.positive:
            owners[text.casefold()].append(label.name)
            if not is_normal and _DENIES.search(text) and not _DENIES.search(spoken):
                advice = "a positive prompt states that the finding is there"
                found.append(PromptFault(label.name, "denying positive", text, advice))
        for text in label.negative:
            lower = " ".join(text.casefold().split())
            if is_normal and re.search(rf"\b(?:no|not|without)\s+(?:a\s+)?{re.escape(spoken)}\b", lower):
                advice = "state the abnormal case instead: `an abnormality is present`"
                found.append(PromptFault(label.name, "denied label", text, advice))
            elif _DOUBLE.search(text):
                found.append(PromptFault(label.name, "double negation", text, "deny once, or state the other case"))
            elif not is_normal and spoken in lower and not _DENIES.search(text):
                advice = f"deny it: `no {spoken}`"
                found.append(PromptFault(label.name, "negative does not deny", text, advice))
        for text in (*label.positive, *label.negative):
            if PLACEHOLDER.search(text):
                found.append(PromptFault(label.name, "open place", text, "put the label where the place is"))
    for text, labels in owners.items():
        if len(set(labels)) > 1:
            named = ", ".join(dict.fromkeys(labels))
            found.append(PromptFault(labels[1], "shared text", text, f"keep it for one of: {named}"))
    return tuple(found)
