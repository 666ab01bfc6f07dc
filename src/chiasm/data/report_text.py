"""What GLoRIA does to a report or prompt before its tokenizer."""

from __future__ import annotations

import re

_NUMBERED = re.compile(r"[0-9]+\.")
_WORD = re.compile(r"\w+")


def report_words(text: str) -> str:
    """Return a report as plain lower-case words: numbers of list items, punctuation and one-word sentences are dropped.

    A sentence ends at a full stop; characters beyond ASCII are left out.

    References:
        marshuang80/gloria ``gloria/models/gloria_model.py`` (``process_text``). Deviation: where every sentence has one
        word ("Edema."), so that nothing would be left and all such texts would be one, the words are kept.
    """
    sentences = [_ascii_words(s) for part in _NUMBERED.split(text.replace("\n", " ")) for s in part.split(".")]
    kept = [words for count, words in sentences if count > 1] or [words for _, words in sentences]
    return " ".join(word for words in kept for word in words)


def _ascii_words(sentence: str) -> tuple[int, list[str]]:
    """Return the number of words, and those that have letters of ASCII, without their other letters."""
    words = _WORD.findall(sentence.replace("\ufffd\ufffd", " ").lower())
    plain = (word.encode("ascii", "ignore").decode() for word in words)
    return len(words), [word for word in plain if word]
