"""Class prompts that are products of attribute lists (severity, subtype, location), as MedCLIP and GLoRIA make them.

In: the lists, as JSON or as the Python file in which the authors publish them (read as data, never run). Out: one text a
combination, all of them or a seeded sample.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.errors import FileFormatError, InputError
from chiasm.types import digest_of

Attributes = Mapping[str, Mapping[str, Sequence[str]]]

MAX_BYTES = 2**20
#: Combinations of one class that are accepted; the published lists have at most 210.
MAX_PROMPTS = 100_000


def load_attributes(path: str | Path, *, variable: str = "CHEXPERT_CLASS_PROMPTS") -> dict[str, dict[str, list[str]]]:
    """Return the attribute lists of a JSON file, or of a Python file that assigns them to ``variable``.

    The Python file is parsed, not run: the value must be a plain literal.

    Raises:
        FileFormatError: The file cannot be read as what its ending says.
        InputError: It does not exist, or does not hold ``{class: {attribute: [texts]}}``.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"`{path.name}` is larger than {MAX_BYTES // 2**10} KiB: no list of attributes")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"attribute file `{path.name}` does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"attribute file `{path.name}` cannot be read: {type(error).__name__}") from error
    try:
        value = _assigned(text, variable) if path.suffix.lower() == ".py" else json.loads(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise FileFormatError(
            f"`{path.name}` holds no readable attribute lists",
            hint=f"JSON, or a Python file with `{variable} = {{...}}` in plain literals",
        ) from error
    return checked_attributes(value, path.name)


def looks_like_attributes(value: Any) -> bool:
    """Return whether a JSON value has the form ``{class: {attribute: [texts]}}`` of two attributes at least."""
    known = {"positive", "negative", "any_of", "classnames", "templates"}
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(v, Mapping) and len(v) >= 2 and not known & set(v) for v in value.values())
    )


def checked_attributes(value: Any, name: str = "value") -> dict[str, dict[str, list[str]]]:
    """Return attribute lists after checking their form; the texts may be empty ("no severity stated")."""
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"`{name}` must map classes to attribute lists")
    checked: dict[str, dict[str, list[str]]] = {}
    for label, lists in value.items():
        if not isinstance(lists, Mapping) or not lists:
            raise InputError(f"class `{label}` of `{name}` must map attributes to lists of texts")
        for attribute, texts in lists.items():
            if not isinstance(texts, list) or not texts or any(not isinstance(t, str) for t in texts):
                raise InputError(f"attribute `{attribute}` of class `{label}` must be a list of texts")
        count = 1
        for texts in lists.values():
            count *= len(texts)
        if count > MAX_PROMPTS:
            raise InputError(f"class `{label}` has {count} combinations; at most {MAX_PROMPTS} are made")
        checked[str(label)] = {str(k): list(v) for k, v in lists.items()}
    return checked


def combine(attributes: Attributes) -> dict[str, tuple[str, ...]]:
    """Return every combination of each class, joined by single spaces, in the order of the lists.

    Repeated texts stay repeated and empty attributes leave their space, as published ("  pulmonary edema").

    Raises:
        InputError: When a combination is blank.
    """
    prompts = {
        label: tuple(" ".join(c) for c in itertools.product(*lists.values())) for label, lists in attributes.items()
    }
    for label, texts in prompts.items():
        if any(not t.strip() for t in texts):
            raise InputError(f"class `{label}` has a combination of attributes without a word")
    return prompts


def sample_prompts(prompts: Mapping[str, Sequence[str]], count: int | None, seed: int) -> dict[str, tuple[str, ...]]:
    """Return ``count`` prompts a class, drawn without replacement, class after class, by one Python generator.

    A class with no more than ``count`` prompts keeps them all, in order, and draws nothing. ``random.Random(seed)`` gives
    what a script gets that seeds Python's generator and draws nothing else before.
    """
    if count is not None and count < 1:
        raise InputError(f"the number of prompts must be at least 1, got {count}")
    generator = random.Random(seed)
    return {
        label: tuple(texts) if count is None or count >= len(texts) else tuple(generator.sample(list(texts), count))
        for label, texts in prompts.items()
    }


def prompts_digest(prompts: Mapping[str, Sequence[str]]) -> str:
    """Return 16 hex digits that tell whether lists are the published ones, without a copy of them."""
    return digest_of({label: list(texts) for label, texts in prompts.items()}, 16)


def _assigned(text: str, variable: str) -> Any:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == variable for t in targets):
            return ast.literal_eval(value)
    raise ValueError(f"nothing is assigned to {variable}")
