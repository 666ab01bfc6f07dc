"""Minimal pairs from reports: a true sentence beside its contradiction, which differs in a "no" or in a side.

Comes in: the texts of images. Goes out: :class:`Probe` values: the row, what kind of contradiction, the true and the false
sentence. A model that reads must put the image nearer to the true one. The rules are data
(``rules/contradictions.toml``) and may be replaced.

References:
    The question whether a model of images and texts reads more than a bag of words is that of M. Yuksekgonul et al., When
    and why vision-language models behave like bags-of-words, 2023 (ARO), and of negation that of J. Singh et al., Learn
    "no" to say "yes" better, 2024. The rules are this project's own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigError, FileFormatError, InputError

#: Kinds of contradiction by what they test; the first of each is what a reader of texts alone would always prefer.
KINDS: Mapping[str, tuple[str, str]] = {
    "negation": ("present finding denied", "absent finding claimed"),
    "laterality": ("left called right", "right called left"),
}
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_NO_CAPITAL = re.compile(r"(?<=^No )[A-Z](?=[a-z])")
#: Shorter sentences say nothing, longer ones are not minimal.
_WORDS = (2, 40)


@dataclass(frozen=True)
class Probe:
    """A true sentence and its contradiction.

    Attributes:
        row: Of the text that it comes from, and of its image.
        kind: One of ``KINDS``.
        true: As the report says it.
        false: The same sentence turned.
    """

    row: int
    kind: str
    true: str
    false: str

    @property
    def group(self) -> str:
        """What is tested: ``negation`` or ``laterality``."""
        return next(name for name, kinds in KINDS.items() if self.kind in kinds)


@dataclass(frozen=True)
class ContradictionRules:
    """How sentences are turned.

    Attributes:
        claim: (pattern, replacement) that claim what a sentence denies.
        deny: (pattern, replacement) that deny what a sentence claims.
        sides: Word for left -> word for right, in lower case.
        negations: Words that deny.
        skip: Words that make a contradiction uncertain.
        skip_sides: The same, for sides.
    """

    claim: tuple[tuple[re.Pattern[str], str], ...]
    deny: tuple[tuple[re.Pattern[str], str], ...]
    sides: Mapping[str, str]
    negations: re.Pattern[str]
    skip: re.Pattern[str]
    skip_sides: re.Pattern[str]

    @classmethod
    def load(cls, path: str | Path | None = None) -> ContradictionRules:
        """Read rules from a TOML file; None: those that come with the package.

        Raises:
            FileFormatError: The file is no TOML.
            ConfigError: A field is missing or a pattern is none.
        """
        hint = "begin with the shipped file `rules/contradictions.toml`"
        try:
            text = (
                resources.files("chiasm.tasks").joinpath("rules/contradictions.toml").read_text("utf-8")
                if path is None
                else Path(path).read_text("utf-8")
            )
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise FileFormatError(f"the rules are no TOML: {error}", hint=hint) from error
        except UnicodeDecodeError:
            raise FileFormatError("the rules are no UTF-8 text", hint=hint) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContradictionRules:
        """Build from the fields of the file."""
        try:
            lists = {
                name: tuple((re.compile(r["find"], re.IGNORECASE), str(r["put"])) for r in values[name])
                for name in ("claim", "deny")
            }
            sides = {str(s["left"]).lower(): str(s["right"]).lower() for s in values["side"]}
            words = (values["negations"], values["skip"], values["sides"]["skip"])
            if any(isinstance(w, str) for w in words):
                raise TypeError  # one word alone would be read letter by letter
            for pattern, replacement in (*lists["claim"], *lists["deny"]):  # a group that is not there
                re.compile(f"{pattern.pattern}|", pattern.flags).sub(replacement, "")
            return cls(lists["claim"], lists["deny"], sides, *(_any_word(w) for w in words))
        except KeyError as error:
            raise ConfigError(
                f"the rules of contradictions lack `{error.args[0]}`", hint="see the shipped file `contradictions.toml`"
            ) from error
        except (re.error, IndexError) as error:
            raise ConfigError(
                f"a pattern of the rules is no regular expression: {error}",
                hint="look at `find` and `put` of that rule",
            ) from error
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                "the rules of contradictions hold a word where a list or a table is expected",
                hint='[[claim]] and [[deny]] with find and put, [[side]], and negations = ["no", "..."]',
            ) from error


def make_probes(
    texts: Sequence[str | None], rules: ContradictionRules | None = None, *, per_text: int = 4
) -> tuple[Probe, ...]:
    """Return the minimal pairs of texts, at most ``per_text`` of each kind and text, in the order of the sentences.

    Args:
        texts: One a row; None gives nothing.
        rules: How sentences are turned; None: those of the package.
        per_text: Greatest number of each kind.

    Raises:
        InputError: ``per_text`` is below 1.
    """
    if per_text < 1:
        raise InputError(f"per_text must be at least 1, got {per_text}")
    rules = rules or ContradictionRules.load()
    found: list[Probe] = []
    for row, text in enumerate(texts):
        sentences = [" ".join(s.split()) for s in _SENTENCE.split(text or "")]
        said = {s.casefold().rstrip(".") for s in sentences}
        counts: dict[str, int] = {}
        for sentence in sentences:
            if not _WORDS[0] <= len(sentence.split()) <= _WORDS[1] or rules.skip.search(sentence):
                continue
            for kind, false in contradictions(sentence, rules):
                if false.casefold().rstrip(".") not in said and counts.get(kind, 0) < per_text:
                    counts[kind] = counts.get(kind, 0) + 1
                    found.append(Probe(row, kind, sentence, false))
    return tuple(found)


def contradictions(sentence: str, rules: ContradictionRules) -> list[tuple[str, str]]:
    """Return the contradictions of one sentence: kind and false sentence, at most one of negation and one of side."""
    found = []
    denied, claimed = KINDS["negation"]
    count = len(rules.negations.findall(sentence))
    if count == 1 and (turned := _turn(sentence, rules.claim)) is not None:
        found.append((claimed, turned))
    elif count == 0 and (turned := _turn(sentence, rules.deny)) is not None:
        found.append((denied, turned))
    other = {**rules.sides, **{right: left for left, right in rules.sides.items()}}
    side = _any_word(tuple(other))
    named = {m.group().lower() in rules.sides for m in side.finditer(sentence)}
    if len(named) == 1 and not rules.skip_sides.search(sentence):
        swapped = side.sub(lambda m: _like(m.group(), other[m.group().lower()]), sentence)
        found.append((KINDS["laterality"][0 if named == {True} else 1], swapped))
    return found


def _turn(sentence: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    """Return the sentence changed by the first rule that fits, or None where none does or one fits twice."""
    for pattern, replacement in rules:
        count = len(pattern.findall(sentence))
        if count == 1:
            turned = " ".join(pattern.sub(replacement, sentence).split())
            turned = _NO_CAPITAL.sub(lambda m: m.group().lower(), turned) if replacement.startswith("No") else turned
            return turned[:1].upper() + turned[1:] if len(turned.split()) > 1 or turned[:1].isalpha() else None
        if count:
            return None
    return None


def _like(model: str, word: str) -> str:
    """Return a word in the case of another."""
    return word.upper() if model.isupper() else word.capitalize() if model[:1].isupper() else word


def _any_word(words: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern of any of the words, longest first, as whole words."""
    listed = "|".join(r"\s+".join(map(re.escape, w.split())) for w in sorted(words, key=len, reverse=True))
    return re.compile(rf"\b(?:{listed})\b" if words else r"(?!)", re.IGNORECASE)
