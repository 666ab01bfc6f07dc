"""The prompts of a published protocol: its own, or the user's labels and files put into its form.

In: a :class:`~chiasm.tasks.protocol.Protocol` and what the user brought. Out: :class:`ProtocolPrompts`, with notes on
what is not as published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import InputError
from chiasm.tasks.attribute_prompts import (
    checked_attributes,
    combine,
    load_attributes,
    looks_like_attributes,
    prompts_digest,
    sample_prompts,
)
from chiasm.tasks.prompt_files import load_prompts, parse_prompts
from chiasm.tasks.prompts import LabelPrompts, PromptSet, choose_templates, fill, negate
from chiasm.tasks.protocol import PUBLISHED, Protocol

Given = PromptSet | Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class ProtocolPrompts:
    """Prompts in a protocol's form.

    Attributes:
        prompts: One entry a label; texts may repeat, where the protocol repeats them.
        notes: What is not as published.
    """

    prompts: PromptSet
    notes: tuple[str, ...] = ()


def make_prompts(
    protocol: Protocol,
    given: Given = None,
    *,
    variant: str = PUBLISHED,
    templates: str | Sequence[str] | None = None,
    seed: int = 0,
) -> ProtocolPrompts:
    """Return the prompts that a protocol is run with.

    Args:
        protocol: The protocol.
        given: Labels, full prompts, attribute lists ``{class: {attribute: [texts]}}``, or any mapping that
            ``prompt_files`` reads. None: the protocol's own.
        variant: Of the protocol.
        templates: For labels, where the protocol has none of its own.
        seed: Of a draw for which no seed is published.

    Raises:
        InputError: When the protocol needs prompts that were not given.
        UnknownName: When it has no such variant.
    """
    chosen = protocol.variant(variant)
    notes: list[str] = []
    if templates is not None:
        if protocol.templates and tuple(choose_templates(templates)) != protocol.templates:
            raise InputError(
                f"protocol `{protocol.name}` has templates of its own", hint="leave out the template, or the protocol"
            )
        notes.append("the templates are the user's")
    full: PromptSet | None
    if given is None:
        full = _own_prompts(protocol, chosen.own_normal_prompts)
    elif isinstance(given, Mapping) and looks_like_attributes(given):
        full = _from_attributes(protocol, given, notes)
    elif isinstance(given, (Mapping, PromptSet)):
        full = parse_prompts(given, templates=_fillers(protocol, templates))
        full = _names_only(full, protocol, templates, chosen.own_normal_prompts) or full
        if protocol.prompts or not (protocol.templates or protocol.needs):
            notes.append("the prompts are the user's, not the published ones")
    else:
        full = _from_labels(protocol, tuple(given), templates, chosen.own_normal_prompts)
        if protocol.labels and set(full.names) - set(protocol.labels):
            notes.append("the labels are the user's, in the protocol's templates")
    if protocol.sample is not None:
        full = _sampled(protocol, full, seed, notes)
    return ProtocolPrompts(full, tuple(notes))


def read_prompt_file(
    protocol: Protocol,
    path: str | Path,
    *,
    variant: str = PUBLISHED,
    templates: str | Sequence[str] | None = None,
    seed: int = 0,
) -> ProtocolPrompts:
    """Return the prompts of a file: labels, full prompts, or attribute lists (JSON, or the authors' Python file as data).

    Raises:
        FileFormatError: The file cannot be read.
        InputError: Its content is none of the known forms.
    """
    path = Path(path)
    options: dict[str, Any] = {"variant": variant, "templates": templates, "seed": seed}
    if path.suffix.lower() == ".py" or (path.suffix.lower() == ".json" and _holds_attributes(path)):
        return make_prompts(protocol, load_attributes(path), **options)
    found = load_prompts(path, templates=_fillers(protocol, templates))
    return make_prompts(protocol, found, **options)


def _holds_attributes(path: Path) -> bool:
    try:
        return looks_like_attributes(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, RecursionError):
        return False  # whoever reads the file next says what is wrong with it


def _own_prompts(protocol: Protocol, own_normal: bool) -> PromptSet:
    if protocol.prompts:
        return parse_prompts(protocol.prompts)
    if protocol.labels:
        return _from_labels(protocol, protocol.labels, None, own_normal)
    needs = protocol.needs or "the labels: name them with --labels, or give a --labels-file"
    raise InputError(f"protocol `{protocol.name}` needs something of yours", hint=needs)


def _from_labels(
    protocol: Protocol, labels: Sequence[str], templates: str | Sequence[str] | None, own_normal: bool
) -> PromptSet:
    used = protocol.templates or (choose_templates(templates) if templates is not None else ())
    if not used:
        needs = protocol.needs or "give whole prompts"
        raise InputError(
            f"protocol `{protocol.name}` has no templates for labels", hint=f"add a --template, or bring {needs}"
        )
    if not protocol.negative_templates:
        return PromptSet.from_names(labels, used)
    negative = protocol.negative_templates or tuple(negate(t) for t in used)
    if own_normal:
        return PromptSet.from_pairs(labels, used, negative)
    return PromptSet(
        tuple(
            LabelPrompts(label, tuple(fill(t, label) for t in used), tuple(fill(t, label) for t in negative))
            for label in labels
        ),
        (*used, *negative),
    )


def _fillers(protocol: Protocol, templates: str | Sequence[str] | None) -> str | Sequence[str]:
    """Return what turns bare names of a file into prompts; ``{}`` marks those that still need a form."""
    return ("{}",) if protocol.negative_templates else protocol.templates or templates or ("{}",)


def _names_only(
    found: PromptSet, protocol: Protocol, templates: str | Sequence[str] | None, own_normal: bool
) -> PromptSet | None:
    """Return the prompts of a file that only names labels, where they still need the protocol's form; else None."""
    plain = all(p.positive == (fill("{}", p.name),) and not p.negative for p in found.labels)
    needs_form = bool(protocol.negative_templates) or not (protocol.templates or templates)
    return _from_labels(protocol, found.names, templates, own_normal) if plain and needs_form else None


def _from_attributes(protocol: Protocol, given: Mapping[str, Any], notes: list[str]) -> PromptSet:
    prompts = combine(checked_attributes(given))
    if protocol.published_digest:
        same = prompts_digest(prompts) == protocol.published_digest
        notes.append(
            "the attribute lists are the published ones" if same else "the attribute lists are NOT the published ones"
        )
    return PromptSet(tuple(LabelPrompts(label, texts) for label, texts in prompts.items()))


def _sampled(protocol: Protocol, full: PromptSet, seed: int, notes: list[str]) -> PromptSet:
    """Draw the protocol's number of prompts a class; negative prompts stay as they are."""
    used = protocol.seed if protocol.seed is not None else seed
    drawn = sample_prompts({p.name: p.positive for p in full.labels}, protocol.sample, used)
    origin = "published" if protocol.seed is not None else "the user's: none is published"
    notes.append(f"{protocol.sample} prompts a class were drawn with seed {used} ({origin})")
    return PromptSet(tuple(LabelPrompts(p.name, drawn[p.name], p.negative) for p in full.labels), full.templates)
