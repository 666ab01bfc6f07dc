"""The rules of weak labels as data: phrases of findings, words that deny or doubt, where their scope ends.

Comes in: a TOML or JSON file. Goes out: :class:`LabelRules` with compiled patterns. Phrases are plain words with three
signs (``*`` any ending, ``a|b`` either word, ``...`` up to four words), so that a radiologist can edit them; case does not
matter and a space also stands for a line break or a hyphen.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigError, FileFormatError, UnknownName

#: Kinds of words around a phrase.
CUES = ("ignored", "not_now", "uncertain_before", "uncertain_after", "negated_before", "negated_after", "stops")
SHIPPED = ("chest_findings",)
_GAP = r"(?:[\s,-]+[\w'/]+){0,4}?[\s,-]+"
_SPACE = r"[\s-]+"


@dataclass(frozen=True)
class FindingRules:
    """How one finding is named.

    Attributes:
        name: Of the label's column.
        phrases: What names it.
        absent: What states that it is not there.
        unless: What holds a phrase and means something else.
        terms: Its names in tables of labels, in lower case.
        hidden: Not reported; counts only against "no finding".
    """

    name: str
    phrases: re.Pattern[str]
    absent: re.Pattern[str]
    unless: re.Pattern[str]
    terms: tuple[str, ...]
    hidden: bool


@dataclass(frozen=True)
class LabelRules:
    """Everything that turns a text into labels.

    Attributes:
        name: Of the set.
        findings: In the order of the file.
        cues: One pattern with a named group for each of ``CUES``; a longer cue beats a shorter one.
        no_finding: Name of the label that is 1 where no other finding is named; None: there is none.
        exempt: Findings that "no finding" allows.
    """

    name: str
    findings: tuple[FindingRules, ...]
    cues: re.Pattern[str]
    no_finding: str | None
    exempt: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the reported labels; "no finding" comes first."""
        named = tuple(f.name for f in self.findings if not f.hidden)
        return (self.no_finding, *named) if self.no_finding else named

    def named(self, column: str) -> str | None:
        """Return the finding that a column or term of another table means, or None."""
        folded = fold(column)
        if self.no_finding and folded in (fold(self.no_finding), "normal"):
            return self.no_finding
        by_name = [f.name for f in self.findings if folded == fold(f.name)]
        return next(iter([*by_name, *(f.name for f in self.findings if folded in f.terms)]), None)

    @classmethod
    def load(cls, source: str | Path = "chest_findings") -> LabelRules:
        """Read rules: the name of a shipped set, or a ``.toml`` or ``.json`` file.

        Raises:
            UnknownName: Neither a set nor a file.
            FileFormatError: The file cannot be parsed.
            ConfigError: A field is missing, empty or unknown.
        """
        path = Path(source)
        if str(source) in SHIPPED:
            text, suffix = rules_text(str(source)), ".toml"
        elif path.is_file():
            try:
                text, suffix = path.read_text(encoding="utf-8"), path.suffix.lower()
            except UnicodeDecodeError:
                raise FileFormatError(
                    f"the rules in `{path.name}` are no UTF-8 text", hint="save the file as UTF-8"
                ) from None
        else:
            raise UnknownName("set of rules", path.name, SHIPPED, hint="name a shipped set or a .toml or .json file")
        try:
            values = json.loads(text) if suffix == ".json" else tomllib.loads(text)
        except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise FileFormatError(f"the rules in `{path.name}` cannot be read: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelRules:
        """Build from the fields of the file; see ``rules/chest_findings.toml``."""
        cues, listed = (
            (values.get("cues", {}), values.get("finding", ())) if isinstance(values, Mapping) else (None, ())
        )
        if not isinstance(cues, Mapping) or not all(isinstance(v, Mapping) for v in listed):
            raise ConfigError(
                "rules are a table with [[finding]] tables and one table [cues], got something else",
                hint="begin with the shipped rules: `chiasm weak-labels --write-rules rules.toml`",
            )
        if unknown := [name for name in cues if name not in CUES]:
            raise UnknownName("kind of cue", unknown[0], CUES, hint=f"one of: {', '.join(CUES)}")
        findings = tuple(_finding(v) for v in listed)
        names = [f.name for f in findings] + ([str(values["no_finding"])] if values.get("no_finding") else [])
        if not findings or len(set(names)) < len(names):
            raise ConfigError(
                f"rules need findings with names of their own, got {len(names)} with {len(set(names))} names",
                hint='[[finding]] with name = "..." and phrases = [...]',
            )
        exempt = _words(values, "exempt")
        if strange := [name for name in exempt if name not in names]:
            raise UnknownName("finding", strange[0], names)
        return cls(str(values.get("name", "")), findings, _cues(cues), values.get("no_finding"), exempt)


def rules_text(name: str = "chest_findings") -> str:
    """Return a shipped set as TOML, to be edited."""
    return resources.files("chiasm.tasks").joinpath(f"rules/{name}.toml").read_text("utf-8")


def fold(name: str) -> str:
    """Return a name in lower case with single spaces for ``_`` and white space."""
    return " ".join(name.replace("_", " ").casefold().split())


def phrase_pattern(phrase: str) -> str:
    """Return a phrase as a regular expression, without word boundaries around it.

    Raises:
        ConfigError: The phrase is empty, or ``...`` stands at its end.
    """
    words = phrase.replace("-", " ").replace(",", " ").split()
    if not words or words[0] == "..." or words[-1] == "...":
        raise ConfigError(f"phrase `{phrase}` must begin and end with a word")
    found = ""
    for k, word in enumerate(words):
        if word == "...":
            found += _GAP
            continue
        found += _SPACE if k and words[k - 1] != "..." else ""
        parts = [re.escape(p.removesuffix("*")) + (r"\w*" if p.endswith("*") else "") for p in word.split("|")]
        found += parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
    return found


def _words(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of phrases; one phrase alone would be read letter by letter."""
    found = values.get(key, ())
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(w, str) for w in found):
        raise ConfigError(
            f"`{key}` must be a list of phrases, got {type(found).__name__}", hint=f'{key} = ["...", "..."]'
        )
    return tuple(found)


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    if not phrases:
        return re.compile(r"(?!)")
    return re.compile(rf"\b(?:{'|'.join(map(phrase_pattern, _longest_first(phrases)))})\b", re.IGNORECASE)


def _longest_first(phrases: Sequence[str]) -> list[str]:
    return sorted(phrases, key=lambda p: (-len(p.split()), -len(p)))


def _finding(values: Mapping[str, Any]) -> FindingRules:
    known = ("name", "phrases", "absent", "unless", "terms", "hidden")
    if unknown := [key for key in values if key not in known]:
        raise UnknownName("field of a finding", unknown[0], known)
    if not values.get("name") or not values.get("phrases"):
        raise ConfigError(f"finding `{values.get('name', '')}` needs a name and phrases")
    terms = tuple(fold(t) for t in _words(values, "terms"))
    phrases, absent, unless = (_any_of(_words(values, key)) for key in ("phrases", "absent", "unless"))
    return FindingRules(str(values["name"]), phrases, absent, unless, terms, bool(values.get("hidden", False)))


def _cues(values: Mapping[str, Any]) -> re.Pattern[str]:
    listed = [(phrase, kind) for kind in CUES for phrase in _words(values, kind)]
    # Of two cues at one place the one with more words is meant: "cannot be excluded", not "excluded".
    listed.sort(key=lambda pair: (-len(pair[0].split()), -len(pair[0])))
    if not listed:
        return re.compile(r"(?!)")
    parts = [f"(?P<{kind}_{k}>{phrase_pattern(phrase)})" for k, (phrase, kind) in enumerate(listed)]
    return re.compile(rf"\b(?:{'|'.join(parts)})\b", re.IGNORECASE)
