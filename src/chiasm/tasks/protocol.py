"""Published zero-shot protocols as data: what was asked of the images, in which words, and how it was added up.

In: the JSON files of ``tasks/protocols``. Out: frozen :class:`Protocol` values. ``protocol_prompts`` makes their prompts,
``protocol_run`` runs them on embeddings.

A protocol reproduces what its authors ran, also where that is wrong, because the published figures hang on it. What is
wrong is listed in ``defects``; the variant ``corrected`` mends it. Prompts are here where their source prints them and
its licence lets them be passed on; otherwise ``needs`` says what the user must bring.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from typing import Any, Literal

from chiasm.config import build, to_mapping
from chiasm.errors import ConfigError, UnknownName
from chiasm.tasks.zero_shot import Mode

Aggregator = Literal[
    "mean_embedding", "mean_unnormalised", "raw_text", "pair_softmax", "max_prompt", "mean_prompt", "global_local"
]
PUBLISHED = "published"


class ProtocolWarning(UserWarning):
    """A protocol is run in a way whose figures cannot be compared with the published ones."""


@dataclass(frozen=True)
class Variant:
    """One form of a protocol; what is None is the protocol's own.

    Attributes:
        what: One sentence: how it differs from the published form.
        aggregator: Another way to add up.
        own_normal_prompts: Give labels like "No Finding" prompts of their own; their negated template is inverted.
        alone: Embed every prompt in a batch of its own, so that no padding enters its vector.
        per_batch: Standardise every class over the images of the run.
        words: GLoRIA's local similarity: compare the image with the ``words`` of a prompt, or with as many slots as it
            has ``characters``.
    """

    what: str
    aggregator: Aggregator | None = None
    own_normal_prompts: bool = False
    alone: bool = False
    per_batch: bool = False
    words: Literal["words", "characters"] = "words"


@dataclass(frozen=True)
class Protocol:
    """A published way to classify images by texts.

    Attributes:
        name: Its name in chiasm.
        title: One line for people.
        source: Where it is printed.
        evidence: How the source was read: ``read`` in the authors' repository, ``quoted`` from a paper or a supplement,
            ``inferred``.
        families: Models that it was published for; ``*`` and ``?`` are wildcards.
        mode: ``single``: classes exclude each other; ``multi``: any number of labels can be true.
        aggregator: How prompts become one score a class; see ``aggregation``.
        reproduced: What is as published.
        variants: By name; ``published`` is always there.
        defects: What is wrong with the published form, or what differs between it and its paper.
        not_reproduced: What is not here.
        labels: Classes, where the protocol names them.
        templates: With ``{}`` where the label belongs.
        negative_templates: The same for "it is absent".
        prompts: Full prompts of each label (``prompt_files``), where the protocol states them.
        needs: What the user must bring, and where it is published; empty: nothing but, perhaps, labels.
        sample: Prompts drawn per class; None: all.
        seed: Of the draw; None: none is published.
        published_digest: Of the full lists of prompts (``attribute_prompts.prompts_digest``): tells whether the user's
            file is the published one.
        logit_scale: ``model``; ``none``: cosines are used as they are; or the number that the authors write.
        per_class: Embed the prompts of one class together, as a batch of their own: padding is then as published.
        local: The score also compares image regions with words, for which the encoder itself is needed.
        top_j: Numbers of tiles whose mean is a slide's score; empty: images stand for themselves.
        licence: Of prompts that are passed on.
    """

    name: str
    title: str
    source: str
    evidence: Literal["read", "quoted", "inferred"]
    families: tuple[str, ...]
    mode: Mode
    aggregator: Aggregator
    reproduced: str
    variants: Mapping[str, Variant]
    defects: tuple[str, ...] = ()
    not_reproduced: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    negative_templates: tuple[str, ...] = ()
    prompts: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    sample: int | None = None
    seed: int | None = None
    published_digest: str = ""
    logit_scale: Literal["model", "none"] | float = "model"
    per_class: bool = False
    local: bool = False
    top_j: tuple[int, ...] = ()
    licence: str = ""

    def __post_init__(self) -> None:
        if PUBLISHED not in self.variants:
            raise ConfigError(f"protocol `{self.name}` has no variant `{PUBLISHED}`")
        if self.negative_templates and len(self.negative_templates) != len(self.templates):
            raise ConfigError(f"protocol `{self.name}` must have as many negative templates as positive ones")

    @property
    def stated_scale(self) -> float | None:
        """The multiplier of cosines that the protocol states, 1 where it uses none; None: the model's own."""
        if isinstance(self.logit_scale, float):
            return self.logit_scale
        return 1.0 if self.logit_scale == "none" else None

    def variant(self, name: str = PUBLISHED) -> Variant:
        """Return a variant with its aggregator filled in.

        Raises:
            UnknownName: When the protocol has no such variant.
        """
        if name not in self.variants:
            hint = f"variants of `{self.name}`: {', '.join(self.variants)}"
            if name == "corrected" and not self.defects:
                hint += "; no defect of it is known"
            raise UnknownName("variant", name, self.variants, hint=hint)
        found = self.variants[name]
        return replace(found, aggregator=found.aggregator or self.aggregator)

    def needs_raw_texts(self, variant: str = PUBLISHED) -> bool:
        """Return whether prompts must be embedded without normalising their vectors."""
        return self.variant(variant).aggregator in ("mean_unnormalised", "raw_text")

    def fits(self, *names: str | None) -> bool:
        """Return whether one of a model's names (its own, its family's) is among those it was published for."""
        known = [n.lower() for n in names if n]
        return any(fnmatch(name, pattern.lower()) for name in known for pattern in self.families)

    def warn_unless_fits(self, *names: str | None) -> bool:
        """Return :meth:`fits`, after a :class:`ProtocolWarning` where it does not."""
        fitting = self.fits(*names)
        if not fitting:
            warnings.warn(
                f"protocol `{self.name}` was published for {', '.join(self.families)}; `{next(filter(None, names), '')}` "
                "is none of them, so published figures say nothing about this run",
                ProtocolWarning,
                stacklevel=2,
            )
        return fitting

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return to_mapping(self)


@cache
def protocols() -> Mapping[str, Protocol]:
    """Return all protocols by name, sorted."""
    folder = resources.files("chiasm.tasks") / "protocols"
    found: dict[str, Protocol] = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".json"):
            values = json.loads(file.read_text(encoding="utf-8"))
            for entry in values if isinstance(values, list) else [values]:
                protocol = build(Protocol, entry, where=f"{file.name}: ")
                if protocol.name in found:
                    raise ConfigError(f"protocol `{protocol.name}` is stated twice")
                found[protocol.name] = protocol
    return dict(sorted(found.items()))


def get_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        UnknownName: When there is none.
    """
    known = protocols()
    if name not in known:
        raise UnknownName("protocol", name, known, hint="`chiasm zero-shot --protocol list` lists them")
    return known[name]


def protocols_for(*names: str | None) -> tuple[Protocol, ...]:
    """Return the protocols that were published for a model, given its name and its family's."""
    return tuple(p for p in protocols().values() if p.fits(*names))
