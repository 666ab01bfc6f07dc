"""Names of classes to the texts that stand for them: templates, ensembles, positive/negative pairs, laterality.

In: names, templates, or one of the forms that users already have (``prompt_files`` reads them). Out: a frozen
:class:`PromptSet`, which ``zero_shot.build_classifier`` turns into one direction per label. Templates are filled by
replacing the placeholder (``{}``, ``{c}``, ``{label}`` or ``CLASSNAME``), never by ``str.format``: files bring them.

A label can mean that nothing is there ("No Finding", "normal"). Its negated template, "no No Finding", says the
opposite of what it should and inverts the score (AUROC 0.07 in rajpurkarlab/CheXzero#19), so such labels get prompts of
their own and a :class:`PromptWarning`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from chiasm.errors import InputError, UnknownName
from chiasm.tasks.prompt_words import TemplateLists, negated
from chiasm.types import digest_of

PLACEHOLDER = re.compile(r"\{(?:c|label|name|classname)?\}|\bCLASSNAME\b")
SIDES = ("left", "right")

#: Sets of templates by the kind of image (``prompt_words/templates.toml``).
TEMPLATES: Mapping[str, tuple[str, ...]] = TemplateLists()
#: Templates that state presence and absence, one to one (the first pair is CheXzero's).
POSITIVE_TEMPLATES = ("{}", "evidence of {}", "there is {}", "{} is present")
NEGATIVE_TEMPLATES = ("no {}", "no evidence of {}", "there is no {}", "{} is absent")

_NORMAL_WORDS = {
    "normal", "healthy", "none", "negative", "unremarkable", "no finding", "no findings", "no abnormality",
    "no abnormalities", "no disease", "no acute disease", "no acute finding", "no acute findings",
    "no acute abnormality", "normal study", "normal chest", "nothing",
}  # fmt: skip
_NORMAL_POSITIVE = ("normal study", "no abnormality", "no acute findings", "unremarkable", "normal appearance")
_NORMAL_NEGATIVE = ("abnormal study", "an abnormality is present", "acute findings", "abnormal", "abnormal appearance")
_NEGATED = re.compile(r"^(?:no|without|absence of|absent)\s+", re.IGNORECASE)
_DOUBLE_NEGATION = re.compile(r"\b(?:no|without)\b(?:\s+evidence\s+of)?\s+(?:no|without)\b", re.IGNORECASE)


class PromptWarning(UserWarning):
    """Prompts say something else than their label; what was done about it is in the message."""


@dataclass(frozen=True)
class LabelPrompts:
    """The texts of one label.

    Attributes:
        name: The label, as it appears in results and in the truth column.
        positive: Texts that say the label is true; their embeddings are averaged.
        negative: Texts that say it is false; empty unless the label is one of a multi-label set.
        any_of: Ways in which the label can be true that exclude each other (on the left, on the right), each an
            ensemble of its own; together they are ``positive``. Their directions differ, so an average of them points
            nowhere; an image is scored by the log-mean-exp of its logits with the ways. Empty: one ensemble.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    any_of: tuple[tuple[str, ...], ...] = ()


def fill(template: str, name: str) -> str:
    """Return the template with its placeholder replaced; underscores of the name become spaces.

    Raises:
        InputError: When the template has no placeholder, so every class would get the same text.
    """
    spoken = name.replace("_", " ").strip()
    text, count = PLACEHOLDER.subn(lambda _: spoken, template)
    if count == 0:
        raise InputError(
            f"template `{template}` has no place for the label",
            hint="write `{}` where the label belongs: `a chest film showing {}`",
        )
    return text


def negate(template: str) -> str:
    """Return the template in the negative, by the rules of ``prompt_words/negation.toml``.

    ``a film showing {}`` → ``a film showing no {}``, ``an image of {}`` → ``an image with no {}``.
    """
    return negated(template, PLACEHOLDER)


def says_normal(name: str) -> bool:
    """Return whether a label means that nothing is found, or is itself a negation ("no pneumothorax")."""
    spoken = " ".join(name.replace("_", " ").replace("-", " ").lower().split())
    return spoken in _NORMAL_WORDS or bool(_NEGATED.match(spoken))


@dataclass(frozen=True)
class PromptSet:
    """Labels with their prompts, in the order in which results list them.

    Attributes:
        labels: At least one; names are unique.
        templates: What the prompts were made of, when templates were used; for the record.
    """

    labels: tuple[LabelPrompts, ...]
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels:
            raise InputError("no labels were given", hint="name at least one class")
        seen: set[str] = set()
        for label in self.labels:
            if not label.name.strip():
                raise InputError("a label has an empty name")
            if label.name in seen:
                raise InputError(f"label `{label.name}` appears twice")
            seen.add(label.name)
            if not label.positive:
                raise InputError(f"label `{label.name}` has no prompt")
            for text in (*label.positive, *label.negative):
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"label `{label.name}` has an empty prompt")
            if set(label.positive) & set(label.negative):
                raise InputError(f"label `{label.name}` has the same text among its positive and negative prompts")
            if any(_DOUBLE_NEGATION.search(text) for text in label.negative):
                warnings.warn(
                    f"a negative prompt of `{label.name}` negates twice, so its score may be inverted; "
                    "state the abnormal case instead",
                    PromptWarning,
                    stacklevel=3,
                )

    @classmethod
    def from_names(cls, names: Iterable[str], templates: str | Sequence[str] = TEMPLATES["general"]) -> Self:
        """Make one ensemble per class from templates (single-label classification).

        Args:
            names: Class names.
            templates: Templates with a placeholder, one of them, or the name of a built-in list (``chest`` ...).
        """
        return cls.from_classnames({name: (name,) for name in _checked_names(names)}, templates)

    @classmethod
    def from_classnames(
        cls, classnames: Mapping[str, str | Sequence[str]], templates: str | Sequence[str] = TEMPLATES["general"]
    ) -> Self:
        """Make one ensemble per class from its synonyms × templates."""
        used = choose_templates(templates)
        labels = tuple(
            LabelPrompts(name, _unique(fill(t, s) for s in _texts_of(synonyms, name) for t in used))
            for name, synonyms in classnames.items()
        )
        return cls(labels, used)

    @classmethod
    def from_pairs(
        cls,
        names: Iterable[str] | Mapping[str, str | Sequence[str]],
        positive: str | Sequence[str] = POSITIVE_TEMPLATES,
        negative: str | Sequence[str] | None = None,
    ) -> Self:
        """Make a positive and a negative ensemble per label (multi-label classification).

        Args:
            names: Labels, or labels with their synonyms.
            positive: Templates that state presence.
            negative: Templates that state absence; by default the built-in ones beside the built-in positive ones,
                else the positive ones with "no" before the label.

        Labels that mean "nothing is there" get prompts of their own with a :class:`PromptWarning`: their negated
        template would be inverted.
        """
        used_positive = choose_templates(positive)
        if negative is None:
            built_in = used_positive == POSITIVE_TEMPLATES
            negative = NEGATIVE_TEMPLATES if built_in else tuple(negate(t) for t in used_positive)
        used_negative = choose_templates(negative)
        synonyms = names if isinstance(names, Mapping) else {name: (name,) for name in _checked_names(names)}
        labels = []
        for name, value in synonyms.items():
            spoken = _texts_of(value, name)
            if says_normal(name):
                label = _normal_label(name)
                warnings.warn(
                    f"label `{name}` is itself a negation: `{fill(used_negative[0], name)}` would invert its score; "
                    f"it is scored by `{label.positive[0]}` against `{label.negative[0]}`",
                    PromptWarning,
                    stacklevel=2,
                )
            else:
                label = LabelPrompts(
                    name,
                    _unique(fill(t, s) for s in spoken for t in used_positive),
                    _unique(fill(t, s) for s in spoken for t in used_negative),
                )
            labels.append(label)
        return cls(tuple(labels), (*used_positive, *used_negative))

    @classmethod
    def from_sides(
        cls, names: Iterable[str], *, against: Literal["other side", "absent", "both"] = "other side"
    ) -> Self:
        """Make two labels per finding, "left ..." and "right ...", with laterality-aware prompts.

        Args:
            names: Findings without a side ("pleural effusion").
            against: What the negative prompts state: the same finding on the other side ("which side is it on?"),
                its absence on this side ("is it there?"), or both.
        """
        labels = []
        for name in _checked_names(names):
            for side in SIDES:
                positive = sided(name, side)
                other = tuple(mirror(text) for text in positive)
                absent = tuple(f"no {text}" for text in positive)
                negative = {"other side": other, "absent": absent, "both": (*other, *absent)}[against]
                labels.append(LabelPrompts(f"{side} {name}", positive, negative))
        return cls(tuple(labels), ())

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names, in order."""
        return tuple(label.name for label in self.labels)

    @property
    def has_pairs(self) -> bool:
        """Whether every label has negative prompts."""
        return all(label.negative for label in self.labels)

    def texts(self) -> list[str]:
        """Return every distinct prompt once, in order of first appearance."""
        return list(_unique(t for label in self.labels for t in (*label.positive, *label.negative)))

    def select(self, names: Sequence[str]) -> PromptSet:
        """Return the set with these labels only, in this order.

        Raises:
            UnknownName: When a label is not in the set.
        """
        by_name = {label.name: label for label in self.labels}
        for name in names:
            if name not in by_name:
                raise UnknownName("label", name, by_name, hint=f"known labels: {', '.join(by_name)}")
        return PromptSet(tuple(by_name[name] for name in names), self.templates)

    def to_dict(self) -> dict[str, Any]:
        """Return chiasm's own JSON form, which ``prompt_files.parse_prompts`` reads back."""
        labels: dict[str, Any] = {}
        for label in self.labels:
            if label.any_of:
                labels[label.name] = {"any_of": [list(way) for way in label.any_of]}
            else:
                labels[label.name] = {"positive": list(label.positive)}
            if label.negative:
                labels[label.name]["negative"] = list(label.negative)
        return {"labels": labels, "templates": list(self.templates)}

    @property
    def digest(self) -> str:
        """Short hash that changes with any prompt or with their order."""
        return digest_of([[label.name, label.positive, label.negative] for label in self.labels])


def sided(name: str, side: str) -> tuple[str, ...]:
    """Return prompts that put a finding on one side of the patient.

    Sides are the patient's, as reports use them; on a radiograph the patient's left is on the image's right.
    """
    if side not in SIDES:
        raise UnknownName("side", side, SIDES, hint="`left` or `right`, of the patient")
    spoken = name.replace("_", " ").strip()
    return (f"{side} {spoken}", f"{side}-sided {spoken}", f"{spoken} on the {side}", f"there is a {side} {spoken}")


def mirror(text: str) -> str:
    """Return the text with left and right exchanged, capitals kept."""
    swap = {"left": "right", "right": "left"}

    def exchange(match: re.Match[str]) -> str:
        word = match.group(0)
        other = swap[word.lower()]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(r"\b(?:left|right)\b", exchange, text, flags=re.IGNORECASE)


def choose_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates as a tuple: a list, one template, or the name of a built-in list.

    Raises:
        InputError: When there is none, or one has no placeholder.
        UnknownName: When a single word names no built-in list.
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if not PLACEHOLDER.search(templates) and " " not in templates.strip():
            raise UnknownName("list of templates", templates, TEMPLATES, hint=f"built in: {', '.join(TEMPLATES)}")
        templates = (templates,)
    if not templates:
        raise InputError("the list of templates is empty")
    for template in templates:
        if not isinstance(template, str):
            raise InputError(f"a template must be a text, got {type(template).__name__}")
        fill(template, "x")
    return _unique(templates)


def _normal_label(name: str) -> LabelPrompts:
    spoken = " ".join(name.replace("_", " ").split())
    if spoken.replace("-", " ").lower() in _NORMAL_WORDS:
        return LabelPrompts(name, _NORMAL_POSITIVE, _NORMAL_NEGATIVE)
    finding = _NEGATED.sub("", spoken)
    return LabelPrompts(
        name,
        _unique(fill(t, finding) for t in NEGATIVE_TEMPLATES),
        _unique(fill(t, finding) for t in POSITIVE_TEMPLATES),
    )


def _checked_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InputError("labels must be a list of names, got one text", hint='split it: `["pneumonia", "normal"]`')
    listed = tuple(names)
    for k, name in enumerate(listed):
        if not isinstance(name, str):
            raise InputError(f"a label must be a text, got {type(name).__name__}")
        if name in listed[:k]:
            raise InputError(f"label `{name}` appears twice")
    return listed


def _texts_of(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts or any(not isinstance(t, str) or not t.strip() for t in texts):
        raise InputError(f"label `{name}` has an empty list of names, or an empty name in it")
    return texts


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
