"""Prompts as users have them to a :class:`~chiasm.tasks.prompts.PromptSet`.

Forms that are understood:

* names: a list, ``"pneumonia, normal"``, a TXT file with one label a line (``#`` starts a comment);
* chiasm's own JSON: ``{"labels": {name: {"positive": [...], "negative": [...]}}}``, with or without the outer key;
* open_clip and CLIP_benchmark: ``{"classnames": [...] or {name: synonyms}, "templates": [...] or {name: prompts}}``, or
  the two files of CLIP_benchmark, keyed by data set;
* CONCH: ``{"0": {"classnames": {name: synonyms}, "templates": ["... CLASSNAME"]}}``;
* a CSV or TSV table with a column ``label`` and, at will, ``positive`` (or ``prompt``) and ``negative``; several rows
  of one label make an ensemble.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.errors import FileFormatError, InputError, UnknownName
from chiasm.tasks.prompts import TEMPLATES, LabelPrompts, PromptSet, choose_templates

Templates = str | Sequence[str] | Mapping[str, Any]

MAX_BYTES = 16 * 2**20
_LABEL_COLUMNS = ("label", "name", "class", "classname", "finding")
_POSITIVE_COLUMNS = ("positive", "prompt", "text", "caption")


def parse_prompts(
    value: str | Sequence[str] | Mapping[str, Any] | PromptSet,
    *,
    templates: Templates | None = None,
    pairs: bool = False,
    variant: str | None = None,
) -> PromptSet:
    """Return the prompts that any of the known forms stands for.

    Args:
        value: Names (list, or one text with commas), or a mapping in one of the forms of this module.
        templates: For forms that bring names only: templates, the name of a built-in list, or a mapping (by data set,
            or by class as in CuPL). Default: ``general``.
        pairs: For forms that bring names only: make positive/negative pairs instead of one ensemble a class.
        variant: Which entry to take of a file that holds several (CONCH's ``"0"``, CLIP_benchmark's data sets). By
            default all CONCH entries are merged into one ensemble; several data sets need a choice.

    Raises:
        InputError: When the form is not known or a part of it is missing.
    """
    if isinstance(value, PromptSet):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value, templates, pairs, variant)
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
    names = [name for name in names if name]
    return _from_names(names, templates, pairs)


def load_prompts(
    path: str | Path,
    *,
    templates: Templates | None = None,
    pairs: bool = False,
    variant: str | None = None,
) -> PromptSet:
    """Return the prompts of a JSON, TXT, CSV or TSV file (see the module's list of forms).

    Raises:
        FileFormatError: When the file cannot be read as what its ending says.
        InputError: When its content is none of the known forms.
    """
    path = Path(path)
    text = _read(path)
    kind = path.suffix.lower()
    if kind == ".json":
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise FileFormatError(f"`{path.name}` is not valid JSON{where}") from error
        if not isinstance(value, (dict, list)):
            raise InputError(f"`{path.name}` must hold a JSON object or list, got {type(value).__name__}")
        return parse_prompts(value, templates=templates, pairs=pairs, variant=variant)
    if kind in (".csv", ".tsv"):
        return _from_table(text, path.name, "\t" if kind == ".tsv" else None, templates, pairs)
    if kind in (".txt", ""):
        lines = [line.split("#", 1)[0].strip() for line in text.splitlines()]
        return parse_prompts([line for line in lines if line], templates=templates, pairs=pairs)
    raise FileFormatError(f"labels file `{path.name}` ends in `{kind}`", hint="give a .json, .txt, .csv or .tsv file")


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"labels file `{path.name}` has {size // 2**20} MiB; at most {MAX_BYTES // 2**20} are read"
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"labels file `{path.name}` does not exist") from None
    except OSError as error:
        raise FileFormatError(f"labels file `{path.name}` cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"labels file `{path.name}` is not UTF-8 text") from error


def _from_names(
    classnames: Sequence[str] | Mapping[str, Sequence[str]],
    templates: Templates | None,
    pairs: bool,
) -> PromptSet:
    if isinstance(templates, Mapping):
        raise InputError(
            "the templates are a mapping, but the labels are a plain list",
            hint="name the data set with `variant`, or give a list of templates",
        )
    if pairs:
        return PromptSet.from_pairs(classnames) if templates is None else PromptSet.from_pairs(classnames, templates)
    used = TEMPLATES["general"] if templates is None else templates
    if isinstance(classnames, Mapping):
        return PromptSet.from_classnames(classnames, used)
    return PromptSet.from_names(classnames, used)


def _from_mapping(
    value: Mapping[str, Any],
    templates: Templates | None,
    pairs: bool,
    variant: str | None,
) -> PromptSet:
    if not value:
        raise InputError("the mapping of prompts is empty")
    if "labels" in value and isinstance(value["labels"], (Mapping, list)):
        inner = value["labels"]
        if isinstance(inner, list):
            return parse_prompts(inner, templates=value.get("templates", templates), pairs=pairs)
        return _from_labels(inner, tuple(value.get("templates") or ()))
    if "classnames" in value:
        return _from_classnames(value, templates, pairs)
    if all(isinstance(v, Mapping) and "classnames" in v for v in value.values()):
        chosen = [_pick(value, variant)] if variant is not None else list(value.values())
        return _merge([_from_classnames(part, templates, pairs) for part in chosen])
    if variant is not None:
        names = _pick(value, variant)
        if isinstance(templates, Mapping) and variant in templates:
            templates = templates[variant]
        return _from_classnames({"classnames": names}, templates, pairs)
    return _from_labels(value, ())


def _pick(value: Mapping[str, Any], variant: str) -> Any:
    if variant not in value:
        raise UnknownName("entry of the labels file", variant, value)
    return value[variant]


def _from_classnames(value: Mapping[str, Any], templates: Templates | None, pairs: bool) -> PromptSet:
    classnames = value["classnames"]
    if not isinstance(classnames, (list, Mapping)):
        raise InputError(f"`classnames` must be a list or an object, got {type(classnames).__name__}")
    used = value.get("templates", templates)
    if isinstance(used, Mapping):  # CuPL: prompts of their own for every class
        missing = [name for name in classnames if name not in used]
        if missing:
            raise InputError(f"the templates have no entry for label `{missing[0]}`")
        return PromptSet(tuple(LabelPrompts(str(n), _texts(used[n], str(n))) for n in classnames))
    if isinstance(classnames, list):
        return _from_names(classnames, used, pairs)
    texts = {str(name): _texts(names, str(name)) for name, names in classnames.items()}
    return _from_names(texts, used, pairs)


def _from_labels(value: Mapping[str, Any], templates: tuple[str, ...]) -> PromptSet:
    labels = []
    for name, prompts in value.items():
        if isinstance(prompts, Mapping):
            unknown = set(prompts) - {"positive", "negative", "any_of"}
            if unknown or ("positive" in prompts) == ("any_of" in prompts):
                raise InputError(
                    f"label `{name}` must have `positive` prompts (or `any_of`, a list of lists of them) and may have "
                    f"`negative` ones, got {sorted(prompts)}"
                )
            negative = _texts(prompts["negative"], name) if prompts.get("negative") else ()
            ways = tuple(_texts(way, name) for way in prompts.get("any_of", ()))
            positive = tuple(_distinct([t for way in ways for t in way])) or _texts(prompts.get("positive"), name)
            labels.append(LabelPrompts(str(name), positive, negative, ways))
        else:
            labels.append(LabelPrompts(str(name), _texts(prompts, str(name))))
    return PromptSet(tuple(labels), templates)


def _from_table(
    text: str,
    name: str,
    separator: str | None,
    templates: Templates | None,
    pairs: bool,
) -> PromptSet:
    header = text.split("\n", 1)[0]
    delimiter = separator or max(",;\t", key=header.count)
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise FileFormatError(f"`{name}` is not a valid table: {error}") from error
    columns = {c.strip().lower(): c for c in (rows[0] if rows else {}) if c is not None}
    label_column = next((columns[c] for c in _LABEL_COLUMNS if c in columns), None)
    if label_column is None:
        raise InputError(f"`{name}` has no column of labels", hint="name a column `label`")
    positive_column = next((columns[c] for c in _POSITIVE_COLUMNS if c in columns), None)
    negative_column = columns.get("negative")
    found: dict[str, tuple[list[str], list[str]]] = {}
    for row in rows:
        label = (row[label_column] or "").strip()
        if not label:
            continue
        positive, negative = found.setdefault(label, ([], []))
        for column, texts in ((positive_column, positive), (negative_column, negative)):
            cell = (row[column] or "").strip() if column else ""
            if cell:
                texts.append(cell)
    if positive_column is None and negative_column is None:
        return parse_prompts(list(found), templates=templates, pairs=pairs)
    used = TEMPLATES["general"] if templates is None or isinstance(templates, Mapping) else choose_templates(templates)
    plain = [label for label, (positive, _) in found.items() if not positive]
    filled = {p.name: p.positive for p in PromptSet.from_names(plain, used).labels} if plain else {}
    return PromptSet(
        tuple(
            LabelPrompts(label, tuple(_distinct(positive)) or filled[label], tuple(_distinct(negative)))
            for label, (positive, negative) in found.items()
        )
    )


def _merge(parts: Sequence[PromptSet]) -> PromptSet:
    """Pool the prompts of sets that name the same labels."""
    first = parts[0]
    for part in parts[1:]:
        if set(part.names) != set(first.names):
            raise InputError(
                "the entries of the labels file name different classes", hint="choose one of them with `variant`"
            )
    by_name = [{label.name: label for label in part.labels} for part in parts]
    return PromptSet(
        tuple(
            LabelPrompts(
                name,
                tuple(_distinct([t for part in by_name for t in part[name].positive])),
                tuple(_distinct([t for part in by_name for t in part[name].negative])),
            )
            for name in first.names
        ),
        tuple(_distinct([t for part in parts for t in part.templates])),
    )


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or any(not isinstance(t, str) or not t.strip() for t in texts):
        raise InputError(f"label `{name}` must have a text or a list of texts, none of them empty")
    return tuple(_distinct(texts))


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))
