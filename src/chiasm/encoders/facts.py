"""What is known about the models that have a name, as data: ``models/facts.toml`` and ``models/datasets.toml``.

In: the two tables. Out: :class:`ModelFacts` by name, :class:`DatasetFacts` by key, and catalog entries with the facts
in place. Only what was read in a paper, a repository or a model card stands there, with its source; what nobody could
confirm is left out. torch is not imported, and nothing is read before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from chiasm.config import build, read_toml
from chiasm.encoders.entry import CatalogEntry, Figure
from chiasm.errors import ConfigError

Use = Literal["images", "texts", "labels", "selection"]


@dataclass(frozen=True)
class DatasetFacts:
    """A data set that some model was trained or measured on.

    Attributes:
        name: Its usual name.
        about: What it is.
        places: Hospitals and other places its material comes from.
        derived_from: Keys of data sets whose images it holds.
        unlisted: Whether nobody outside can say image by image what is in it.
    """

    name: str
    about: str
    places: tuple[str, ...] = ()
    derived_from: tuple[str, ...] = ()
    unlisted: bool = False


@dataclass(frozen=True)
class TrainedOn:
    """One data set in a model's training.

    Attributes:
        data: Key of the data set.
        uses: What of it was used; ``selection``: only to choose among checkpoints.
        note: What a reader should know besides.
    """

    data: str
    uses: tuple[Use, ...]
    note: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """A model as its authors describe it.

    Attributes:
        title: Name as published.
        description: One sentence.
        kind: ``both`` towers, ``image`` or ``text`` alone.
        scopes: What it knows: ``chest X-ray``, ``pathology``, ``biomedical figures``, ``natural images``, ``species``,
            ``clinical text``, ``biomedical text``, ``general text``.
        image_tower: Short description; empty: none.
        text_tower: Short description; empty: none.
        dim: Dimensions of the joint space, or of the features.
        image_size_px: Side of the input; 0: no image tower.
        tokenizer: Kind and vocabulary; empty: no text tower.
        context: Longest text in tokens; 0: not stated.
        parameters: Number of weights as chiasm builds it, without heads that it does not use; 0: not counted.
        members: Files that are averaged (an ensemble), otherwise 1.
        licence: Of the weights, short.
        licence_source: Where that is printed.
        gate: ``open``: anybody may download; ``agreement``: after accepting terms with an account; ``request``: handed
            out by the authors.
        ask: Where the weights are.
        training: What it was trained on, one sentence with its source.
        trained_on: The same as data.
        starts_from: Names of models whose weights it started from; their training counts as its own.
        good_for: What it is for.
        not_for: What it is not for.
        caveats: What a user should know before believing a number.
        figures: Published scores.
        variants: Names of catalog entries that are the same weights used otherwise.
        released: False: no weights of this name are known; the name stands here so that it leads somewhere.
    """

    title: str
    description: str
    kind: Literal["both", "image", "text"]
    scopes: tuple[str, ...]
    licence: str
    licence_source: str
    training: str
    good_for: str
    not_for: str
    image_tower: str = ""
    text_tower: str = ""
    dim: int = 0
    image_size_px: int = 0
    tokenizer: str = ""
    context: int = 0
    parameters: int = 0
    members: int = 1
    gate: Literal["open", "agreement", "request"] = "open"
    ask: str = ""
    trained_on: tuple[TrainedOn, ...] = ()
    starts_from: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    variants: tuple[str, ...] = ()
    released: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@cache
def load_datasets() -> Mapping[str, DatasetFacts]:
    """Return the data sets by key.

    Raises:
        ConfigError: The table has an unknown field, or derives a data set from an unknown one.
    """
    return build_datasets(_read("datasets.toml"))


@cache
def load_facts() -> Mapping[str, ModelFacts]:
    """Return the facts by model name, in the order of the table: by field, then by family.

    Raises:
        ConfigError: The table has an unknown field, data set or model, or a figure without a source.
    """
    return build_facts(_read("facts.toml"), load_datasets())


def find_facts(name: str) -> ModelFacts | None:
    """Return what is known about a name; None for plug-ins and the user's own models."""
    return load_facts().get(name)


def find_original(name: str) -> str | None:
    """Return the name of the model of which ``name`` is a variant, or None."""
    return next((key for key, facts in load_facts().items() if name in facts.variants), None)


def join_facts(entry: CatalogEntry) -> CatalogEntry:
    """Return an entry with licence, gate, training data and figures of the table; one that is not in it unchanged.

    A variant keeps its own description and has no figures: they were measured on the original.
    """
    original = find_original(entry.name)
    facts = find_facts(original or entry.name)
    if facts is None:
        return entry
    if original is not None:
        return replace(entry, licence=facts.licence, gate=facts.gate, training_data=facts.training, figures=())
    weights = entry.weights
    if weights is not None and facts.gate != "open" and not weights.ask:
        weights = replace(weights, ask=facts.ask)
    return replace(
        entry,
        weights=weights,
        licence=facts.licence,
        gate=facts.gate,
        description=facts.description,
        training_data=facts.training,
        parameters=facts.parameters or entry.parameters,
        figures=facts.figures,
    )


def build_datasets(values: Mapping[str, Any]) -> Mapping[str, DatasetFacts]:
    """Return checked data sets from the content of ``datasets.toml``."""
    found = {key: build(DatasetFacts, value, where=f"{key}.") for key, value in values.items()}
    for key, facts in found.items():
        for origin in facts.derived_from:
            _check(origin in found, f"`{key}` is derived from the unknown data set `{origin}`")
    return found


def build_facts(values: Mapping[str, Any], datasets: Mapping[str, DatasetFacts]) -> Mapping[str, ModelFacts]:
    """Return checked facts from the content of ``facts.toml``; ``datasets`` are the keys that it may name.

    Raises:
        ConfigError: Unknown field, data set or model; a figure without a source; a mark of doubt in a text.
    """
    found = {name: build(ModelFacts, value, where=f"{name}.") for name, value in values.items()}
    for name, facts in found.items():
        used = [*(t.data for t in facts.trained_on), *(f.on for f in facts.figures)]
        for key in used:
            _check(key in datasets, f"`{name}` names the unknown data set `{key}`")
        for parent in facts.starts_from:
            _check(parent in found and parent != name, f"`{name}` starts from the unknown model `{parent}`")
        for figure in facts.figures:
            _check(bool(figure.source.strip()), f"a figure of `{name}` has no source: {figure.task}")
            _check(0 < figure.value < 1, f"a figure of `{name}` is no fraction: {figure.task}, {figure.value}")
        for text in _texts(facts.to_dict()):
            _check("[?]" not in text, f"`{name}` states something that nobody confirmed: {text}")
        _check(bool(facts.licence and facts.licence_source and facts.training), f"`{name}` lacks licence or training")
        _check(facts.gate == "open" or bool(facts.ask), f"`{name}` does not say where to ask for its weights")
        _check((facts.kind == "text") == (not facts.image_tower), f"`{name}`: kind and image tower do not fit")
        _check((facts.kind == "image") == (not facts.text_tower), f"`{name}`: kind and text tower do not fit")
    return found


def _read(name: str) -> dict[str, Any]:
    return read_toml(str(files("chiasm.encoders.models") / name))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(problem)
