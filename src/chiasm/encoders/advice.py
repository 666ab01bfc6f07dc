"""Which model for which data set: overlap of training data, published figures there, and a ranking with its reasons.

In: what is known about models (``encoders.facts``) and ``models/advice.toml``. Out: :class:`Advice`, best first. The
table ranks the models that come into question; all others get a verdict from their facts. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from chiasm.config import build, read_toml
from chiasm.encoders.catalog import CATALOG
from chiasm.encoders.entry import Figure
from chiasm.encoders.facts import DatasetFacts, ModelFacts, TrainedOn, find_original, load_datasets, load_facts
from chiasm.errors import ConfigError, UnknownName

#: Best first. ``in-domain``: it saw these images, so its number here says nothing about other hospitals.
#: ``not zero-shot``: it learned these labels. ``features``: no text tower, so a classifier on labels is needed.
Verdict = Literal[
    "recommended", "possible", "in-domain", "not zero-shot", "features", "baseline", "text only", "wrong scope", "no release"
]  # fmt: skip
VERDICTS: tuple[str, ...] = get_args(Verdict)
Level = Literal["none known", "same data", "same hospital or source", "unknown"]
_USES = {"images": "images", "texts": "texts", "labels": "labels"}


@dataclass(frozen=True)
class Overlap:
    """How a model's training data meets a data set.

    Attributes:
        level: The closest tie that is known.
        uses: With ``same data``: what of it was used; ``("selection",)``: only to choose among checkpoints.
        reason: In words.
    """

    level: Level
    reason: str
    uses: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The level, and for ``same data`` what of it."""
        if self.level == "same data":
            return "same data, to choose only" if self.uses == ("selection",) else f"same data: {', '.join(self.uses)}"
        return "same hospital" if self.level == "same hospital or source" else self.level


@dataclass(frozen=True)
class Rank:
    """One row of the table: a model, its verdict and the reason."""

    model: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Target:
    """What somebody wants to work on.

    Attributes:
        title: In words.
        datasets: Keys of the data sets with which training data is compared; empty: a field, no data set.
        scopes: What a model must know for it.
        note: What to mind when measuring here.
        corrects: What is often advised, and what the facts say to it.
        ranks: The models that come into question, best first.
        related: Data sets whose figures also say something here.
    """

    title: str
    datasets: tuple[str, ...]
    scopes: tuple[str, ...]
    note: str
    corrects: str
    ranks: tuple[Rank, ...]
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class Advice:
    """What is said about one model for one target.

    Attributes:
        target: Key of the target.
        rank: From 1, best first.
        model: Name of the model.
        verdict: See :data:`Verdict`.
        why: The reason, in words.
        overlap: Of its training data with the target.
        figures: Published scores on the target and its related data sets, the target's and zero-shot first.
    """

    target: str
    rank: int
    model: str
    verdict: Verdict
    why: str
    overlap: Overlap
    figures: tuple[Figure, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@cache
def load_targets() -> Mapping[str, Target]:
    """Return the targets of ``chiasm models --for`` by key.

    Raises:
        ConfigError: The table names an unknown model or data set, or calls zero-shot what was trained on.
    """
    return build_targets(read_toml(str(files("chiasm.encoders.models") / "advice.toml")))


def build_targets(values: Mapping[str, Any]) -> Mapping[str, Target]:
    """Return checked targets from the content of ``advice.toml``."""
    found = {key: build(Target, value, where=f"{key}.") for key, value in values.items()}
    facts, datasets = load_facts(), load_datasets()
    for key, target in found.items():
        for name in (*target.datasets, *target.related):
            _check(name in datasets, f"`{key}` names the unknown data set `{name}`")
        models = [r.model for r in target.ranks]
        _check(len(set(models)) == len(models), f"`{key}` ranks a model twice")
        for rank in target.ranks:
            _check(rank.model in facts, f"`{key}` ranks the unknown model `{rank.model}`")
            _check_rank(key, rank, find_overlap(rank.model, target.datasets))
    return found


def advise(target: str) -> tuple[Advice, ...]:
    """Return what is said about every model for a target, best first.

    Args:
        target: A key of :func:`load_targets`.

    Raises:
        UnknownName: No such target.
    """
    if target not in load_targets():
        raise UnknownName("target", target, list(load_targets()), hint=f"one of: {', '.join(load_targets())}")
    aim = load_targets()[target]
    ranked = {r.model for r in aim.ranks}
    others = [
        (name, *_judge(facts, aim), find_figures(facts, aim))
        for name, facts in load_facts().items()
        if name not in ranked
    ]
    others.sort(key=lambda row: (VERDICTS.index(row[1]), -next((f.value for f in row[3]), 0.0)))
    rows: list[tuple[str, Verdict, str, tuple[Figure, ...]]] = [
        (r.model, r.verdict, r.why, find_figures(load_facts()[r.model], aim)) for r in aim.ranks
    ]
    return tuple(
        Advice(target, i, name, verdict, why, find_overlap(name, aim.datasets), figures)
        for i, (name, verdict, why, figures) in enumerate([*rows, *others], start=1)
    )


def list_models() -> list[str]:
    """Return every name: those with facts in the table's order, then what else the catalog and plug-ins have."""
    known = [name for key, facts in load_facts().items() for name in (key, *facts.variants)]
    return [*known, *(n for n in CATALOG.names() if n not in known)]


def describe_model(name: str) -> dict[str, Any]:
    """Return all that is known of a model as JSON values: its declaration, where there is one, and its facts.

    Without loading code (``loads`` is false) the declaration's fields are None.

    Raises:
        UnknownName: Neither the catalog nor the facts have this name.
    """
    key = name if name in load_facts() else None
    entry = None if key is not None and key not in CATALOG else CATALOG.get(name)
    facts = load_facts().get(entry.name if entry is not None else name)
    if entry is not None:
        value = entry.to_dict()
    else:
        value = dict.fromkeys(CATALOG.get("openai/ViT-B-32").to_dict())
        value.update(name=name, aliases=[])
    value.update(loads=CATALOG.find(value["name"]) is not None, variant_of=find_original(value["name"]), released=True)
    if facts is not None:
        stated = facts.to_dict()
        stated["tokenizer_kind"] = stated.pop("tokenizer")
        value.update(stated, training_data=stated.pop("training"), parameters=facts.parameters or value["parameters"])
    return value


def find_figures(facts: ModelFacts, target: Target) -> tuple[Figure, ...]:
    """Return the published scores that speak of a target: its own data first, zero-shot before scores with labels."""
    own = [f for f in facts.figures if f.on in target.datasets]
    near = [f for f in facts.figures if f.on in target.related]
    kinds = ("zero-shot", "retrieval", "probe", "neighbours", "slide", "fine-tuned")
    return tuple(sorted(own, key=lambda f: kinds.index(f.kind)) + sorted(near, key=lambda f: kinds.index(f.kind)))


def find_overlap(model: str, datasets: Iterable[str]) -> Overlap:
    """Return how the training data of a model meets data sets; what it started from counts as its own.

    Args:
        model: Name of a model with facts.
        datasets: Keys; none: a field and no data set.
    """
    known, facts = load_datasets(), load_facts()[model]
    keys = tuple(datasets)
    if not keys:
        return Overlap("unknown", "This is a field and no data set: compare the training data with your images.")
    if not facts.released:
        return Overlap("unknown", "No weights of this name were released, so nothing is known of their training.")
    targets = {k for key in keys for k in _origins(key, known)}
    places = {p for key in keys for p in known[key].places}
    history = list(_history(model))
    same = [(t, via) for t, via in history if targets & set(_origins(t.data, known))]
    if same:
        uses = tuple(dict.fromkeys(u for t, _ in same for u in t.uses))
        trained = tuple(u for u in uses if u != "selection")
        return Overlap("same data", " ".join(_say_same(t, via, known[t.data]) for t, via in same), trained or uses)
    near = [(t, via) for t, via in history if places & set(known[t.data].places)]
    if near:
        return Overlap("same hospital or source", " ".join(_say_near(t, via, known[t.data], places) for t, via in near))
    hidden = [(t, via) for t, via in history if known[t.data].unlisted and "images" in t.uses]
    if hidden:
        return Overlap("unknown", _say_hidden(hidden, known))
    names = ", ".join(dict.fromkeys(known[t.data].name for t, _ in history))
    return Overlap("none known", f"None of its training data is this data set or from its source: {names}.")


def _history(model: str, via: tuple[str, ...] = ()) -> Iterator[tuple[TrainedOn, str]]:
    """Yield what a model and all that it started from were trained on, with the name of the one that was."""
    facts = load_facts()[model]
    for item in facts.trained_on:
        yield item, via[-1] if via else ""
    for parent in facts.starts_from:
        if parent not in via:
            yield from _history(parent, (*via, parent))


def _origins(key: str, known: Mapping[str, DatasetFacts]) -> Iterator[str]:
    yield key
    for origin in known[key].derived_from:
        yield from _origins(origin, known)


def _subject(via: str, verb: str) -> str:
    return f"It starts from `{via}`, which was {verb}" if via else verb.capitalize()


def _note(item: TrainedOn) -> str:
    return f" {item.note[:1].upper()}{item.note[1:]}." if item.note else ""


def _say_same(item: TrainedOn, via: str, data: DatasetFacts) -> str:
    if item.uses == ("selection",):
        return f"Not trained on {data.name}, but its checkpoints were chosen there.{_note(item)}"
    used = [_USES[u] for u in item.uses if u in _USES]
    listed = f"{', '.join(used[:-1])} and {used[-1]}" if len(used) > 1 else used[0]
    holding = f" ({data.about})" if data.unlisted else ""
    return f"{_subject(via, 'trained on')} {data.name}{holding}: its {listed}.{_note(item)}"


def _say_near(item: TrainedOn, via: str, data: DatasetFacts, places: set[str]) -> str:
    shared = ", ".join(p for p in data.places if p in places)
    what = " and ".join(_USES[u] for u in item.uses if u in _USES)
    return f"{_subject(via, 'trained on')} {data.name} ({what}), from the same place: {shared}."


def _say_hidden(items: Iterable[tuple[TrainedOn, str]], known: Mapping[str, DatasetFacts]) -> str:
    named = [
        f"{known[t.data].name} (of `{via}`, from which it starts)" if via else known[t.data].name for t, via in items
    ]
    notes = "".join(_note(t) for t, _ in items)
    verb = "are" if len(named) > 1 else "is"
    return (
        f"{' and '.join(named)} {verb} not listed image by image, so copies of this data set in it cannot be ruled out."
        f"{notes}"
    )


def _judge(facts: ModelFacts, target: Target) -> tuple[Verdict, str]:
    """Return the verdict on a model that the table does not rank."""
    scopes = " and ".join(facts.scopes)
    if not facts.released:
        return "no release", f"{facts.description[:1].upper()}{facts.description[1:]}."
    if facts.kind == "text":
        return "text only", f"A text tower for {scopes}: no image goes in. A part for training a model of your own."
    if set(facts.scopes) & set(target.scopes):
        if facts.kind == "both":
            return "possible", f"Made for {scopes}; no figure here was found."
        return (
            "features",
            "No text tower, so no zero-shot: embed, then train a probe or a few-shot classifier on labels.",
        )
    if facts.scopes == ("natural images",):
        if facts.kind == "both":
            return "baseline", "Knows photographs, not medicine: the floor that a medical model has to beat."
        return "features", "Features of photographs: a floor for probes, or the start of a model of your own."
    return "wrong scope", f"Made for {scopes}."


def _check_rank(target: str, rank: Rank, overlap: Overlap) -> None:
    """Refuse advice that its own facts contradict."""
    if overlap.level != "same data" or overlap.uses == ("selection",):
        return
    _check(rank.verdict not in ("recommended", "possible"), f"`{rank.model}` was trained on the data of `{target}`")
    if "labels" in overlap.uses:
        _check(rank.verdict != "in-domain", f"`{rank.model}` learned the labels of `{target}`: not zero-shot there")


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(problem)
