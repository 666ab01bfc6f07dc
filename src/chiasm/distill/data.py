"""From a recipe's ``[data]`` to labelled images, and for each seed to what is trained on, validated on and tested on.

Comes in: a table, a folder, shards, a public data set by name, or a request for phantoms. Goes out: images with class
numbers, and :class:`Division`. The test images depend on the data and ``test_seed`` alone, so that all seeds are tested
on the same; patients (else slides, studies) are never on two sides. Labels of test images are never touched.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.config import build
from chiasm.data.splits import split_by_group
from chiasm.datasets.columns import Columns, is_missing
from chiasm.datasets.named import dataset_facts, split_source
from chiasm.datasets.sources import open_dataset
from chiasm.distill.recipe import DistillData
from chiasm.errors import ConfigError, InputError, LeakageError, UnknownName
from chiasm.io.manifest import Rejected, RejectLog, count_reasons, summarize_rejected
from chiasm.progress import Progress, SilentProgress
from chiasm.train.pairs import PairTable, draw_phantoms, drop_leaks
from chiasm.train.recipe import expand_path
from chiasm.train.texts import RenderedText
from chiasm.types import LabelValue, Sample, digest_of

if TYPE_CHECKING:
    from chiasm.datasets.facts import DatasetFacts

Rows = NDArray[np.int64]
#: Splits of a data set that are validated on where the recipe names none.
VALIDATION_NAMES = ("val", "valid", "validation", "dev")
#: More values than this in a column that may have been named by mistake are no classes.
MOST_CLASSES = 200
#: Separate streams of random numbers.
_VALIDATION, _LIMIT, _NOISE = 1_000_003, 11, 12
SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class LabelledImages:
    """All images of a recipe that can be used, whatever their split.

    Attributes:
        name: Of the source.
        label: Column of the class.
        classes: Names in the order of the logits.
        table: Samples and, for phantoms, their pixels.
        labels: (n,), class numbers as the source has them.
        prompts: Class -> what to call it, where the source brings that along: whole sentences (phantoms), or words.
        prompts_are_sentences: Which of the two.
        rejected: Rows that cannot be used, with the reason.
        left_out: Reason -> rows without a class.
        cautions: What a reader of a result must know about the source.
        tissue: Keyword for reports of the same tissue, where the source states it.
        needs_groups: Whether the source has several images of one thing, which a split by image would tear apart.
    """

    name: str
    label: str
    classes: tuple[str, ...]
    table: PairTable
    labels: Rows
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts_are_sentences: bool = False
    rejected: tuple[Rejected, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
    tissue: str | None = None
    needs_groups: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def own_texts(self) -> tuple[str | None, ...]:
        """The text of each image, where it has one of its own."""
        return tuple(s.text for s in self.table.samples)


@dataclass(frozen=True)
class Division:
    """What one seed works on, as rows of :class:`LabelledImages`, ascending.

    Attributes:
        train: Images that are trained on.
        validation: Images that decide which weights are kept.
        test: Images that nothing is decided by.
        labels: (n,) of all images, with the noise that the recipe asks for in training and validation.
        facts: Counts for people and for ``data.json``.
        dropped: Rows left out because they cross a split.
        digest: Of ids, groups and labels of all three.
    """

    train: Rows
    validation: Rows
    test: Rows
    labels: Rows
    facts: Mapping[str, Any]
    dropped: tuple[Rejected, ...]
    digest: str


def open_images(
    data: DistillData, *, progress: Progress | None = None, cache: Path | None = None, workers: int = 2
) -> LabelledImages:
    """Read the images of a recipe and the class of each.

    Args:
        data: Of the recipe; not ``synthetic``.
        progress: Told while phantoms are drawn and files are looked at.
        cache: Folder that remembers which files could be decoded.
        workers: Threads that decode.

    Raises:
        ConfigError: ``data.label`` is not named where there are several, or is no column of classes.
        UnknownName: No such label, or a class of ``data.classes`` that the data do not have.
        InputError: Nothing can be used, or there is one class only.
    """
    progress = progress or SilentProgress()
    samples, arrays, rejected, name = _samples(data, progress)
    facts = _named_facts(data)
    label = _label_name(data, samples)
    named = [_class_name(s.labels.get(label)) for s in samples]
    classes = _classes(data, label, named, facts)
    number = {c: i for i, c in enumerate(classes)}
    kept = [i for i, value in enumerate(named) if value in number]
    blank = sum(value is None for value in named)
    foreign = len(named) - blank - len(kept)
    left_out = {"not labelled": blank, "of another class": foreign}
    table = PairTable(tuple(samples), (RenderedText((), ""),) * len(samples), arrays).select(kept)
    labels = np.array([number[str(named[i])] for i in kept], np.int64)
    log = RejectLog(rejected)
    if arrays is None:
        table, labels = _readable(table, labels, log, cache, progress, workers=workers)
    prompts, are_sentences = _prompts(data, label, classes, facts)
    return LabelledImages(
        name, label, classes, table, labels, prompts, are_sentences, log.items,
        {reason: n for reason, n in left_out.items() if n},
        () if facts is None else facts.cautions, None if facts is None else facts.tissue,
        facts is not None and facts.needs_groups,
    )  # fmt: skip


def _samples(
    data: DistillData, progress: Progress
) -> tuple[list[Sample], NDArray[np.uint8] | None, list[Rejected], str]:
    if data.phantoms is not None:
        drawn = draw_phantoms(
            data.phantoms, data.patients, seed=data.phantom_seed, size_px=data.phantom_size, progress=progress
        )
        return list(drawn.samples), drawn.images, [], drawn.name
    if data.source is None:
        raise ConfigError("`data.synthetic` has no images", hint="it makes its features itself")
    opened = open_dataset(
        expand_path(data.source, "data.source"),
        columns=build(Columns, data.columns, where="data.columns.") if data.columns else None,
        root=None if data.root is None else expand_path(data.root, "data.root"),
        require=("image",),
    )
    return list(opened.samples), None, list(opened.rejected), opened.name


def _named_facts(data: DistillData) -> DatasetFacts | None:
    by_name = split_source(expand_path(data.source, "data.source")) if data.source is not None else None
    return None if by_name is None else dataset_facts(by_name[0])


def _label_name(data: DistillData, samples: Sequence[Sample]) -> str:
    known = tuple(dict.fromkeys(k for s in samples for k in s.labels))
    shown = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
    if data.label is not None:
        if data.label not in known:
            raise UnknownName("label", data.label, known, hint=f"labels: {shown or 'none'}")
        return data.label
    if len(known) == 1:
        return known[0]
    if not known:
        raise InputError("the data have no label", hint="a table needs a column of classes, a folder needs subfolders")
    raise ConfigError(
        f"`data.label` must say which of {len(known)} columns is the class", hint=f"one of: {shown}"
    )  # fmt: skip


def _class_name(value: LabelValue) -> str | None:
    if is_missing(value) or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _classes(data: DistillData, label: str, named: Sequence[str | None], facts: DatasetFacts | None) -> tuple[str, ...]:
    counts = Counter(value for value in named if value is not None)
    if not counts:
        raise InputError(f"no image has a class in `{label}`")
    if data.classes:
        for name in data.classes:
            if name not in counts:
                # Whoever names a wrong column may have named one of people: values are counted, not listed.
                raise UnknownName(
                    "class", name, difflib.get_close_matches(name, counts, n=1, cutoff=0.5),
                    hint=f"`{label}` has {len(counts)} different values; `data.classes` must name them as it does",
                )  # fmt: skip
        classes = data.classes
    elif facts is not None and set(counts) <= set(facts.classes):
        classes = tuple(c for c in facts.classes if c in counts)
    else:
        classes = tuple(sorted(counts, key=_natural))
        if len(classes) > MOST_CLASSES or (len(classes) > 20 and 2 * len(classes) > sum(counts.values())):
            raise InputError(
                f"`{label}` has {len(classes)} different values in {sum(counts.values())} rows; is it a class?",
                hint="name another column in `data.label`, or the classes in `data.classes`",
            )
    if len(classes) < 2:
        raise InputError(f"all images have one class in `{label}`: there is nothing to tell apart")
    return classes


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _readable(
    table: PairTable, labels: Rows, log: RejectLog, cache: Path | None, progress: Progress, *, workers: int
) -> tuple[PairTable, Rows]:
    """Return the rows whose images decode; the outcome is remembered while no file changes."""
    from chiasm.train.images import readable

    if cache is None:
        return table, labels
    usable = readable(table, rejects=log, fail=False, cache=cache, progress=progress, workers=workers)
    kept = {s.id for s in usable.samples}
    return usable, labels[[i for i, s in enumerate(table.samples) if s.id in kept]]


def _prompts(
    data: DistillData, label: str, classes: Sequence[str], facts: DatasetFacts | None
) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Return what the source itself says about its classes, and whether these are sentences."""
    if data.phantoms is not None:
        from chiasm.data.phantom_reports import chest_prompts
        from chiasm.data.phantom_tissue_reports import tissue_prompts

        known = (chest_prompts() if data.phantoms == "chest" else tissue_prompts()).get(label)
        if known is None or set(classes) != {"0", "1"}:
            return {}, True
        return {"0": tuple(known["negative"]), "1": tuple(known["positive"])}, True
    if facts is None:
        return {}, False
    return {c: facts.words[c] for c in classes if c in facts.words}, False


def divide(images: LabelledImages, data: DistillData, *, seed: int, cache: Path | None = None) -> Division:
    """Decide what is trained on, validated on and tested on.

    Official splits are used where the data have them (the test split always, a split called ``val``, ``valid``,
    ``validation`` or ``dev`` for validation unless the recipe uses it otherwise); what is missing is held out by group,
    with about the same share of every class: the test images first and with ``data.test_seed`` alone, then the
    validation images with ``data.split_seed`` or the run's seed.

    Args:
        images: Of :func:`open_images`.
        data: Of the recipe.
        seed: Of the run.
        cache: Folder that remembers which files were found free of leakage.

    Raises:
        InputError: A side is empty, a class is missing in training, or there are too few groups.
        LeakageError: Groups or near-identical images lie on both sides of a split, or the source needs groups to be
            split by and has none.
    """
    sides, rules = _sides(images, data, seed)
    compare = data.near_duplicates and images.table.arrays is None
    sides, dropped = drop_leaks(images.table.samples, sides, leakage=data.leakage, images=compare, cache=cache)
    rows = {side: np.array(sorted(sides[side]), np.int64) for side in SIDES}
    if data.train_limit is not None:
        rows["train"] = _limited(rows["train"], images.labels, data.train_limit, seed)
    labels, changed = _noisy(images, rows, data.label_noise, seed)
    _check_sides(images, rows, labels, data)
    samples = images.table.samples
    facts = {
        side: {
            "images": len(rows[side]),
            "groups": len({samples[r].group for r in rows[side]}),
            "per_class": {c: int((labels[rows[side]] == i).sum()) for i, c in enumerate(images.classes)},
            "split": rules[side],
        }
        for side in SIDES
    }
    described = [[[samples[r].id, samples[r].group, int(labels[r])] for r in rows[side]] for side in SIDES]
    return Division(
        rows["train"], rows["validation"], rows["test"], labels,
        {
            **facts, "label_noise": data.label_noise, "labels_changed": changed,
            "unused": len(images) - sum(len(rows[side]) for side in SIDES), "dropped": count_reasons(dropped),
        },
        tuple(dropped), digest_of([images.classes, *described], 24),
    )  # fmt: skip


def _sides(images: LabelledImages, data: DistillData, seed: int) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return rows and rule of each side, before leaks are looked for."""
    given = [s.split for s in images.table.samples]
    found = sorted({s for s in given if s})
    hint = f"splits: {', '.join(found)}"
    sides: dict[str, list[int]] = {side: [] for side in SIDES}
    rules = dict.fromkeys(SIDES, "held out by group")
    validation = data.validation_splits
    if not found:
        if validation:
            raise InputError("the data have no splits, but `data.validation_splits` names one")
        sides["train"] = list(range(len(images)))
    else:
        if not validation:
            taken = {*data.train_splits, *data.test_splits}
            validation = tuple(s for s in found if s.casefold() in VALIDATION_NAMES and s not in taken)
        for side, names in (
            ("train", data.train_splits), ("validation", validation), ("test", data.test_splits)
        ):  # fmt: skip
            sides[side] = [row for row, split in enumerate(given) if split in names]
            if names and sides[side]:
                rules[side] = "given by the data: " + ", ".join(sorted(set(names) & set(found)))
            elif names:
                more = "; `data.test_splits = []` holds out a part of the others" if side == "test" else ""
                raise InputError(f"no image is in `data.{side}_splits` = {list(names)}", hint=hint + more)
    if not sides["test"] and data.test > 0:
        sides["train"], sides["test"] = _held_out(images, sides["train"], data.test, data.test_seed, "data.test")
    if not validation and data.validation > 0:
        chosen = data.split_seed if data.split_seed is not None else seed
        sides["train"], sides["validation"] = _held_out(
            images, sides["train"], data.validation, _VALIDATION + chosen, "data.validation"
        )
    rules["train"] = rules["train"] if rules["train"].startswith("given") else "the rest"
    return sides, rules


def _held_out(
    images: LabelledImages, rows: Sequence[int], share: float, seed: int, what: str
) -> tuple[list[int], list[int]]:
    """Return the rows that stay and those of the groups that are held out."""
    groups = [images.table.samples[r].group for r in rows]
    if images.needs_groups and any(images.table.samples[r].patient is None for r in rows):
        raise LeakageError(
            f"`{images.name}` has many images of one tile, and nothing says which: `{what}` would tear tiles apart",
            hint="put the table of its tiles into its folder; `lc25000_image_groups.csv` of LC25000-clean is one",
        )
    if len(set(groups)) < 2:
        raise InputError(f"`{what}` cannot hold out anything: the images belong to {len(set(groups))} group")
    names = split_by_group(
        groups, {"stays": 1 - share, "out": share}, seed=seed, stratify=[int(images.labels[r]) for r in rows]
    )
    stays = [r for r, name in zip(rows, names, strict=True) if name == "stays"]
    return stays, [r for r, name in zip(rows, names, strict=True) if name == "out"]


def _limited(rows: Rows, labels: Rows, limit: int, seed: int) -> Rows:
    """Return ``limit`` of the rows, of each class its share (at least one)."""
    if limit >= len(rows):
        return rows
    present, counts = np.unique(labels[rows], return_counts=True)
    if limit < len(present):
        raise InputError(f"`data.train_limit` is {limit}, but there are {len(present)} classes")
    exact = counts * limit / len(rows)
    quota = np.maximum(1, np.floor(exact).astype(np.int64))
    while quota.sum() > limit:  # ones that were rounded up from nothing
        quota[np.argmax(quota)] -= 1
    for place in np.argsort(-(exact - quota), kind="stable")[: limit - int(quota.sum())]:
        quota[place] += 1
    rng = np.random.default_rng([seed, _LIMIT])
    shuffled = rng.permutation(rows)
    chosen = [shuffled[labels[shuffled] == c][:n] for c, n in zip(present, quota, strict=True)]
    return np.sort(np.concatenate(chosen))


def _noisy(images: LabelledImages, rows: Mapping[str, Rows], share: float, seed: int) -> tuple[Rows, int]:
    """Return labels of which a share of those of training and validation is redrawn, and how many have changed."""
    labels = images.labels.copy()
    if share == 0:
        return labels, 0
    rng = np.random.default_rng([seed, _NOISE])
    drawn, values = rng.random(len(labels)) < share, rng.integers(0, len(images.classes), len(labels))
    touched = np.concatenate([rows["train"], rows["validation"]])
    touched = touched[drawn[touched]]
    labels[touched] = values[touched]
    return labels, int((labels != images.labels).sum())


def _check_sides(images: LabelledImages, rows: Mapping[str, Rows], labels: Rows, data: DistillData) -> None:
    if not len(rows["train"]):
        raise InputError("no image is left to train on", hint="look at `data.train_splits` and at rejected.jsonl")
    if not len(rows["test"]):
        raise InputError("no image is left to test on", hint="set `data.test` above 0, or name `data.test_splits`")
    missing = [c for i, c in enumerate(images.classes) if not (labels[rows["train"]] == i).any()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(images.classes)} classes have no training image",
            hint="use more images, another split, or name the classes in `data.classes`",
        )
    for side in ("validation", "test"):
        absent = len(images.classes) - len(np.unique(labels[rows[side]]))
        if len(rows[side]) and absent:
            warnings.warn(f"{absent} of {len(images.classes)} classes have no {side} image", stacklevel=4)


def data_notes(images: LabelledImages, division: Division, data: DistillData) -> tuple[str, ...]:
    """Return what every output of a run must say about its data: noise, limits, rows left out, cautions."""
    notes = []
    if data.label_noise:
        notes.append(
            f"EXPERIMENT: {data.label_noise:.0%} of the labels of training and validation were redrawn at random "
            f"({division.facts['labels_changed']} changed); test labels are as they were"
        )
    if data.train_limit is not None:
        notes.append(f"EXPERIMENT: only {len(division.train)} training images are used")
    for reason, n in images.left_out.items():
        notes.append(f"{n} images were left out: {reason}")
    if images.rejected:
        notes.append(summarize_rejected(images.rejected))
    if division.dropped:
        notes.append(f"{len(division.dropped)} images were left out because they cross a split")
    if all(s.patient is None and s.slide is None and s.study is None for s in images.table.samples):
        notes.append("the data name no patient or slide: images of one may lie on two sides of a held-out split")
    return (*notes, *images.cautions)
