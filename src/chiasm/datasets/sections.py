"""A radiology report's sections by their headings: ``FINDINGS: ...``, ``IMPRESSION: ...``.

Comes in: the text of a report. Goes out: section -> text, names in lower case. A heading stands at the start of a line, in
capitals, and ends in a colon, as in MIMIC-CXR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /&,()\-]{2,60}?)[ \t]*:", re.MULTILINE)
#: Other spellings of the two sections that captions are made of.
ALIASES: Mapping[str, str] = {
    "finding": "findings",
    "findings and impression": "findings",
    "findings/impression": "findings",
    "impressions": "impression",
    "conclusion": "impression",
    "conclusions": "impression",
}


def split_sections(report: str) -> dict[str, str]:
    """Return section -> text, white space made single, in order; a section that comes twice is joined.

    What stands before the first heading is left out; a section without text too.
    """
    marks = list(_HEADING.finditer(report))
    ends = [*(mark.start() for mark in marks[1:]), len(report)][: len(marks)]
    found: dict[str, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        name = " ".join(mark.group(1).casefold().split())
        name, text = ALIASES.get(name, name), " ".join(report[mark.end() : end].split())
        if text:
            found[name] = f"{found[name]} {text}" if name in found else text
    return found


def join_sections(sections: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """Return the wanted sections in the order asked for, joined by a space; None where there is none of them."""
    return " ".join(sections[name] for name in wanted if sections.get(name)) or None
