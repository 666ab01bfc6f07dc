"""Any text in, the text as CLIP cleans it out: what ``ftfy.fix_text`` and two rounds of ``html.unescape`` return.

ftfy looks for a dozen kinds of damage in every line, which takes longer than the rest of the tokenizer, and almost no
text has any. It is asked only about texts that it could change; for the others a few scans show that every one of its
steps would leave them alone. Its own tables say which characters the steps touch, and a version with other steps is
asked about every text that is not plain.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

_PLAIN = r"[\t\n\r\x20-\x25\x27-\x7e]*"
#: No step changes a text of these: printable ASCII, tab, line feed, carriage return, and `&` where no entity begins.
SIMPLE_TEXT = re.compile(rf"{_PLAIN}(?:&(?![#a-zA-Z0-9]){_PLAIN})*")
#: The characters of :data:`SIMPLE_TEXT` without `&`, for a test of many texts at once.
SIMPLE_BYTES = bytes([*b"\t\n\r", *range(0x20, 0x26), *range(0x27, 0x7F)])
#: What ftfy takes for an entity, and what it might in another version.
_ENTITY = re.compile(r"&[#\w]+;")
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")
_STEPS = {
    "unescape_html", "remove_terminal_escapes", "fix_encoding", "restore_byte_a0", "replace_lossy_sequences",
    "decode_inconsistent_utf8", "fix_c1_controls", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes",
    "fix_line_breaks", "fix_surrogates", "remove_control_chars", "normalization", "max_decode_length", "explain",
}  # fmt: skip


def clean_text(text: str) -> str:
    """Return the text as CLIP sees it: mended encoding, no HTML entities, single spaces, lower case."""
    return tidy_text(text).lower()


def tidy_text(text: str) -> str:
    """Return a text with mended encoding, without HTML entities and with single spaces; its case stays."""
    if SIMPLE_TEXT.fullmatch(text) is None:
        text = mended(text)
        if "&" in text:
            text = html.unescape(html.unescape(text))
    return " ".join(text.split())


def prepare_text(text: str) -> str:
    """Return a text with the words of :func:`clean_text`; white space of simple texts stays, as no word holds any."""
    return text.lower() if SIMPLE_TEXT.fullmatch(text) else clean_text(text)


def mended(text: str) -> str:
    """Return what ``ftfy.fix_text`` returns, but for line breaks, which it writes as line feeds.

    References: R. Speer 2019, ftfy, https://github.com/rspeer/python-ftfy.
    """
    known = _known_tables()
    if known is None:
        return _fix_text(text)
    found: str | None = text
    if "&" in text and _ENTITY.search(text):
        found = known.without_entities(text)
    elif text.isascii():  # only terminal escapes and control characters can be wrong with it
        return _ESCAPE_SEQUENCE.sub("", text).translate(known.controls)
    return found if found is not None and known.unharmed(found) else _fix_text(text)


class _Tables(NamedTuple):
    """What ftfy's steps look for.

    Attributes:
        touched: A character that some step replaces or removes.
        controls: The ASCII control characters that it removes, as ``str.translate`` takes them.
        looks_bad: Whether a line looks like text that was decoded by the wrong table.
        unescape: Replaces entities, once.
        longest: ftfy cuts longer lines into pieces.
    """

    touched: re.Pattern[str]
    controls: dict[int, None]
    looks_bad: Callable[[str], bool]
    unescape: Callable[[str], str]
    longest: int

    def unharmed(self, text: str) -> bool:
        """Whether no step changes a text without entities; ftfy goes through it line by line."""
        if self.touched.search(text) is not None or len(text) > self.longest:
            return False
        if text.isascii():
            return True
        lines = [f"{line}\n" for line in text.split("\n")] if "\n" in text else [text]
        return unicodedata.is_normalized("NFC", text) and not any(map(self.looks_bad, lines))

    def without_entities(self, text: str) -> str | None:
        """Replace the entities of one line until none is left, as ftfy does; None where it would do more meanwhile."""
        if "\n" in text or len(text) > self.longest:
            return None
        if "<" in text:  # then it takes the text for HTML and leaves the entities
            return text
        while (found := self.unescape(text)) != text:
            if "\n" in found or not self.unharmed(found):
                return None
            text = found
        return text


@lru_cache(maxsize=1)
def _known_tables() -> _Tables | None:
    """Return the tables of the installed ftfy, or None when it has other steps or keeps them elsewhere."""
    from ftfy import TextFixerConfig, chardata  # 0.1 s, and most texts never need it
    from ftfy.badness import is_bad
    from ftfy.fixes import unescape_html

    try:
        quotes = [chardata.SINGLE_QUOTE_RE.pattern, chardata.DOUBLE_QUOTE_RE.pattern]
        single = [*chardata.LIGATURES, *chardata.WIDTH_MAP, *chardata.CONTROL_CHARS]
        config = TextFixerConfig()
        standard = config.unescape_html == "auto" and config.normalization == "NFC"
    except AttributeError:
        return None
    classes = all(re.fullmatch(r"\[[^\]\[\\]+\]", pattern) for pattern in quotes)
    if not (classes and standard and set(config._fields) == _STEPS):
        return None
    breaks = "\x80-\x9f\u2028\u2029\ud800-\udfff\x1b"  # C1 controls, line breaks, surrogates, terminal escapes
    inside = "".join(pattern[1:-1] for pattern in quotes) + "".join(re.escape(chr(c)) for c in single)
    controls = dict.fromkeys(c for c in chardata.CONTROL_CHARS if c < 0x80)
    return _Tables(re.compile(f"[{breaks}{inside}]"), controls, is_bad, unescape_html, config.max_decode_length)


def _fix_text(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)
