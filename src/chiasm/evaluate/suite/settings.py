"""A suite as a TOML file: which models meet which data sets in which tasks.

In: the file. Out: a frozen :class:`Suite`; an unknown field, model, data set or task raises ``ConfigError`` with the dotted
name. ``docs/reference/suite.md`` lists every field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chiasm.config import apply_overrides, build, read_toml
from chiasm.errors import ConfigError, UnknownName
from chiasm.train.recipe import anchored, expand_path

Floor = Literal["colours", "random"]
#: What ``columns`` can name.
ROLES = ("image", "text", "id", "patient", "study", "slide", "split")
#: Parts that rows can belong to.
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a suite.

    Attributes:
        source: A name from ``chiasm models``, a model file or folder. None: with ``floor``.
        floor: In place of a source: ``colours`` (mean and spread of R, G and B, no model at all) or ``random`` (a small
            tower whose weights were never trained).
        family: As ``--family``: whose weights a file holds.
        catalog: Name of ``chiasm models`` whose facts on training data hold for these weights; None: ``source`` itself.
        trained_on: Data sets of this suite on which the model was trained, as far as its owner knows.
        data: Data sets that it meets; empty: all.
    """

    source: str | None = None
    floor: Floor | None = None
    family: str | None = None
    catalog: str | None = None
    trained_on: tuple[str, ...] = ()
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.source is None) == (self.floor is None):
            raise ConfigError("`source` or `floor` must be given, one of the two", hint='source = "demo/model"')


@dataclass(frozen=True)
class DataEntry:
    """One data set of a suite.

    Attributes:
        source: Table, folder, shards or ``NAME:ROOT``; ``$NAME`` is an environment variable, a relative path starts at
            the suite's folder.
        root: Folder of relative image paths.
        columns: Role (image, text, id, patient, study, slide, split) -> name of the column.
        labels: The classes or findings.
        truth: Column of the true class, or several joined by ``|``; ``*``: each label has a 0/1 column of its name.
        mode: ``single``: classes exclude each other; ``multi``: any number of findings. None: ``multi`` with ``*``.
        prompts: File of prompts for zero-shot; None: the labels in built-in templates.
        template: Name of built-in templates, or a template, for labels without a file.
        protocol: Published zero-shot protocol to follow.
        variant: Of the protocol.
        split: Part (train, val, test) -> its name in the split column.
        fractions: Part -> share of the patients, drawn anew with the suite's seed; in place of ``split``.
        subgroups: Columns whose groups are compared; None: those that look like sex, age, view or site.
        bands: Column of numbers -> where its bands are cut.
        drop_texts: Regular expressions (case ignored) of texts that are no text: placeholders, say.
        known_as: Names under which `chiasm models` knows the data, for the overlap with training data.
    """

    source: str
    root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    truth: str | None = None
    mode: Literal["single", "multi"] | None = None
    prompts: str | None = None
    template: str | None = None
    protocol: str | None = None
    variant: str = "published"
    split: Mapping[str, str] = field(default_factory=dict)
    fractions: Mapping[str, float] = field(default_factory=dict)
    subgroups: tuple[str, ...] | None = None
    bands: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    drop_texts: tuple[str, ...] = ()
    known_as: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _known(self.columns, ROLES, "columns")
        _known(self.split, PARTS, "split")
        _known(self.fractions, PARTS, "fractions")
        if self.split and self.fractions:
            raise ConfigError("`split` and `fractions` exclude each other", hint="keep `split` where the data has one")
        if self.fractions and (
            min(self.fractions.values()) <= 0 or not math.isclose(sum(self.fractions.values()), 1.0, abs_tol=1e-6)
        ):
            raise ConfigError("`fractions` must be positive and sum to 1")
        for parts in (self.split, self.fractions):
            if parts and "test" not in parts:
                raise ConfigError("`split` and `fractions` need the part `test`")
        if len(set(self.split.values())) < len(self.split):
            raise ConfigError("`split` gives two parts the same name", hint="each part needs rows of its own")
        if bool(self.labels) != (self.truth is not None):
            raise ConfigError(
                "`labels` and `truth` belong together", hint='labels = ["normal", "tumor"], truth = "label"'
            )
        if len(set(self.labels)) < len(self.labels):
            raise ConfigError("`labels` names a label twice")
        if self.resolved_mode == "single" and len(self.labels) == 1:
            raise ConfigError("`labels` has one class only", hint='two or more, or mode = "multi" to ask yes or no')
        for name, cuts in self.bands.items():
            if not cuts or list(cuts) != sorted(set(cuts)):
                raise ConfigError(f"`bands` of `{name}` must be rising numbers", hint="bands = { age = [40, 60] }")

    @property
    def resolved_mode(self) -> Literal["single", "multi"]:
        """The mode, by default ``multi`` where each label has its own column."""
        return self.mode or ("multi" if self.truth == "*" else "single")


@dataclass(frozen=True)
class TaskEntry:
    """One task of a suite.

    Attributes:
        name: Its key in the suite.
        kind: Name in the table of tasks.
        settings: Of the kind.
        data: Data sets that it runs on; empty: all.
        models: Models that it runs with; empty: all.
    """

    name: str
    kind: str
    settings: Any
    data: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A whole suite.

    Attributes:
        name: Its name.
        models: Key -> model, in the order of the page.
        data: Key -> data set.
        tasks: Key -> task; a table of ``kind`` (by default the key), ``data``, ``models`` and the kind's settings.
        seed: Of everything drawn at random.
        n_resamples: Bootstrap resamples of patients for every interval.
        n_permutations: Permutations of every test that is not DeLong's.
        alpha: A corrected p value below this makes a difference worth naming.
        smallest_group: A subgroup with fewer patients, or fewer than a quarter of them with or without a finding, gets
            no number.
        near_duplicates: Whether the leakage report opens and compares the images.
        near_cosine: Cosine of image vectors from which a test row and a training row of another patient are named.
        device: Where models run.
        batch_size: Images or texts a forward pass.
    """

    models: Mapping[str, ModelEntry]
    data: Mapping[str, DataEntry]
    tasks: Mapping[str, dict[str, Any]]
    name: str = "suite"
    seed: int = 0
    n_resamples: int = 1000
    n_permutations: int = 2000
    alpha: float = 0.05
    smallest_group: int = 20
    near_duplicates: bool = True
    near_cosine: float = 0.999
    device: str = "cpu"
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("models", "data", "tasks"):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is empty", hint=f"a suite needs a table [{name}.NAME]")
        if not self.name.strip() or {"/", "\\"} & {*self.name}:
            raise ConfigError(f"`name` must be a plain name, got `{self.name}`", hint="it names the folder in runs/")
        for name, least in (
            ("seed", 0),
            ("n_resamples", 1),
            ("n_permutations", 1),
            ("smallest_group", 2),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"`alpha` must lie between 0 and 1, got {self.alpha}")
        if not 0 < self.near_cosine <= 1:
            raise ConfigError(f"`near_cosine` must lie in (0, 1], got {self.near_cosine}")
        for key, model in self.models.items():
            _known(model.trained_on, tuple(self.data), f"models.{key}.trained_on")
            _known(model.data, tuple(self.data), f"models.{key}.data")

    @property
    def entries(self) -> tuple[TaskEntry, ...]:
        """The tasks with their settings, in the order of the file.

        Raises:
            ConfigError: Unknown kind, field, model or data set, with the dotted name.
        """
        return tuple(_task(name, dict(values), self) for name, values in self.tasks.items())


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and validate a suite.

    Args:
        path: A TOML file.
        overrides: ``dotted.key=value``, as after ``--set``.

    Returns:
        The suite; relative paths have become absolute, environment variables stand as they were written.

    Raises:
        ConfigError: Missing file, no TOML, unknown field (with the nearest name), wrong type, contradicting values.
    """
    path = Path(path)
    values = apply_overrides(read_toml(path), overrides)
    values.setdefault("name", path.stem)
    for name in ("models", "data", "tasks"):
        table = values.setdefault(name, {})
        if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
            raise ConfigError(f"`{name}` must hold tables, one a name", hint=f"write [{name}.NAME] above its fields")
    suite = build(Suite, values)
    folder = path.resolve().parent
    suite = dataclasses.replace(
        suite,
        models={
            key: dataclasses.replace(m, source=m.source if m.source is None else _model_source(m.source, folder))
            for key, m in suite.models.items()
        },
        data={
            key: dataclasses.replace(
                d,
                source=anchored(d.source, folder) or "",
                root=anchored(d.root, folder),
                prompts=anchored(d.prompts, folder),
            )
            for key, d in suite.data.items()
        },
    )
    _ = suite.entries  # a wrong task is missed now, not after the embedding
    _check_public_names(suite)
    return suite


def expanded(path: str, field_name: str) -> str:
    """Return a path with ``~`` and environment variables replaced; one that is not set raises ``ConfigError``."""
    return expand_path(path, field_name)


def _model_source(source: str, folder: Path) -> str:
    """Anchor a path that exists beside the suite or starts with a dot; a name of the catalog stays."""
    if source.startswith("."):
        return anchored(source, folder) or source
    beside = folder / source
    return str(beside) if not Path(source).is_absolute() and beside.exists() else source


def _check_public_names(suite: Suite) -> None:
    """Miss names that ``chiasm models`` does not have, which the leakage report would need."""
    from chiasm.encoders.advice import list_models
    from chiasm.encoders.facts import load_datasets

    for key, data in suite.data.items():
        _known(data.known_as, tuple(load_datasets()), f"data.{key}.known_as")
    for key, model in suite.models.items():
        _known([model.catalog] if model.catalog else [], list_models(), f"models.{key}.catalog")


def _known(names: Sequence[str] | Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"`{where}` names the unknown `{name}`{meant}", hint=f"known: {', '.join(known)}")


def _task(name: str, values: dict[str, Any], suite: Suite) -> TaskEntry:
    from chiasm.evaluate.suite.tasks import SUITE_TASKS

    where = f"tasks.{name}"
    kind = values.pop("kind", name)
    chosen = {}
    for key, known in (("data", suite.data), ("models", suite.models)):
        given = values.pop(key, [])
        if not isinstance(given, list) or not all(isinstance(v, str) for v in given):
            raise ConfigError(f"`{where}.{key}` must be a list of names")
        _known(given, tuple(known), f"{where}.{key}")
        chosen[key] = tuple(given)
    try:
        task = SUITE_TASKS.get(str(kind))
    except UnknownName as error:
        raise ConfigError(f"`{where}.kind`: {error.message}", hint=f"kinds: {', '.join(SUITE_TASKS.names())}") from None
    return TaskEntry(name, str(kind), build(task.settings, values, where=f"{where}."), chosen["data"], chosen["models"])
