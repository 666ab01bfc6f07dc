"""The words of prompts as data: templates by kind of image, how a template is negated, other names of labels.

In: the TOML files of this folder. Out: plain tuples and rules. Nothing is read before it is asked for.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from chiasm.errors import UnknownName

_PLACE = "\0"


class TemplateSet(NamedTuple):
    """Templates for one kind of image."""

    name: str
    about: str
    templates: tuple[str, ...]


class TemplateLists(Mapping[str, tuple[str, ...]]):
    """The built-in sets: name -> templates; the file is read at the first look."""

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return template_sets()[name].templates

    def __iter__(self) -> Iterator[str]:
        return iter(template_sets())

    def __len__(self) -> int:
        return len(template_sets())


@cache
def template_sets() -> dict[str, TemplateSet]:
    """Return the built-in sets of templates by name."""
    return {
        name: TemplateSet(name, entry["about"], tuple(entry["templates"])) for name, entry in _read("templates").items()
    }


@cache
def synonym_kinds() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return kind of image -> label -> its names."""
    return {kind: {label: tuple(names) for label, names in entry.items()} for kind, entry in _read("synonyms").items()}


def synonyms_of(names: Sequence[str], kind: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return labels with their names: the given one, then the shipped others.

    Args:
        names: Labels as a table has them (``Pleural_Effusion``); an unknown one keeps its own name alone.
        kind: ``chest``, ``histology`` ...; None: the first kind that knows the label.

    Raises:
        UnknownName: There is no such kind.
    """
    kinds = synonym_kinds()
    if kind is not None and kind not in kinds:
        raise UnknownName("kind of synonyms", kind, kinds, hint=f"one of: {', '.join(kinds)}")
    searched = list(kinds.values()) if kind is None else [kinds[kind]]
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        spoken = _folded(name)
        entry: tuple[str, ...] = ()
        for words in searched:
            entry = entry or next((w for label, w in words.items() if spoken == _folded(label)), ())
            entry = entry or next((w for w in words.values() if spoken in map(_folded, w)), ())
        own = name.replace("_", " ").strip()
        others = [w for w in entry if _folded(w) != spoken]
        found[name] = (own, *others)
    return found


def negated(template: str, place: re.Pattern[str]) -> str:
    """Return a template in the negative by the rules of ``negation.toml``.

    Args:
        template: With one place for the label or several.
        place: What marks the place.
    """
    marks = [m.group(0) for m in place.finditer(template)]
    bare = place.sub(_PLACE, template)
    for find, put in _rules():
        changed, count = find.subn(put, bare)
        if count:
            bare = changed
            break
    else:
        bare = bare.replace(_PLACE, f"no {_PLACE}")
    for mark in marks:
        bare = bare.replace(_PLACE, mark, 1)
    return bare


@cache
def _rules() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple(
        (re.compile(rule["find"].replace("{}", _PLACE), re.IGNORECASE), rule["put"].replace("{}", _PLACE))
        for rule in _read("negation")["rule"]
    )


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _read(name: str) -> dict[str, Any]:
    file = resources.files("chiasm.tasks.prompt_words") / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
