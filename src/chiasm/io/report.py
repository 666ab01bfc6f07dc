"""The text of a report as it came, in; the same text without the marks of scanners and exports, out.

One function for every use of reports (pairing, training, pages), so that what was paired is what is trained on. It
takes away drawn rules, control characters and surplus white space, and never a letter or a digit.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

#: Nothing of ftfy's changes printable ASCII, once entities and terminal codes are left alone.
_PLAIN = re.compile(r"[\t\n\r\x20-\x7e]*")
#: Bytes without a meaning in text, and marks that take no room: they are dropped without a gap.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
#: Bars and bar codes as scanners read them, often grown into the next word: `IIIIIIIIRUN DATE`.
_STROKES = re.compile(r"[I1|]{5,}")
#: Ends of a number, so that `1111110` and `0.11111` are not taken for bars.
_NUMBER_BEFORE = re.compile(r"\d[.,]?$")
_NUMBER_AFTER = re.compile(r"[.,]?\d")
_LINES = re.compile(r"[_\-=]{5,}")
_ROUNDS = 32


def clean_report(text: str) -> str:
    """Return a report's text without the marks of scanners and exports; cleaning it again changes nothing.

    - Rules become a space: runs of at least 5 of ``I 1 |`` (but ones that are part of a longer number stay), and runs of
      at least 5 of ``_ - =``.
    - Control characters and marks without width are dropped.
    - Broken encodings (``Ã©``), ligatures, full-width letters and curled quotes are mended by ftfy, Unicode is in form
      NFC. HTML entities and terminal codes stay: mending them would eat letters, and the tokenizers of models that were
      trained without entities take them out themselves.
    - White space becomes one space, also where a line, a paragraph or a page ends: a cleaned report is one line, so
      that a text file with one report a line holds it as it is. Both ends are stripped.

    Letters and digits outside rules all stay, in order: single letters, Roman numerals, ``pT1c N0``.

    Raises:
        TypeError: ``text`` is not a string.

    References:
        Deviation from ModalityPairing's ``clean_pathology_report``, which deletes every ``1``, ``I``, ``i`` and ``|`` and
        is applied to some training texts but not in pairing.
    """
    for _ in range(_ROUNDS):
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    if _PLAIN.fullmatch(text) is None:
        import ftfy  # 0.1 s to import, and most reports never need it

        text = ftfy.fix_text(text, _safe_repairs())
    text = _STROKES.sub(_unless_number, _LINES.sub(" ", _UNSEEN.sub("", text)))
    return " ".join(text.split())


def _unless_number(run: re.Match[str]) -> str:
    text, strokes = run.string, run.group()
    if set(strokes) == {"1"}:
        before, after = text[max(0, run.start() - 2) : run.start()], text[run.end() : run.end() + 2]
        if _NUMBER_BEFORE.search(before) or _NUMBER_AFTER.match(after):
            return strokes
    return " "


@lru_cache(maxsize=1)
def _safe_repairs() -> Any:
    """Return ftfy's repairs, less those that take letters away, and less line ends, which are ours."""
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        explain=False,
    )
