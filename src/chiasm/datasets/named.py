"""Public data sets by name: ``open_dataset("pcam", "/data")``, or ``pcam:/data`` wherever a table can be given.

One line a data set: how it is opened and what is known about it. A name with a dash is the same data with another rule:
``bach-clip-it`` has the validation images of CLIP-IT's code, ``crc-nonorm`` the patches without colour normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from chiasm.datasets import (
    bach,
    chexpert,
    crc,
    lc25000,
    medmnist,
    medpix,
    mhist,
    mimic_cxr,
    nih14,
    openi,
    pcam,
    roco,
    rsna,
    tuberculosis,
    vindr_cxr,
)
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.facts import DatasetFacts
from chiasm.datasets.images import keep_decodable
from chiasm.datasets.table import Part, check_rejected
from chiasm.errors import InputError, UnknownName


@dataclass(frozen=True)
class NamedDataset:
    """A data set of the table: its reader, the facts, and the reader's options.

    Attributes:
        read: Takes the folder and the options.
        facts: What is known about it.
        options: Names of the options that the reader takes.
        takes_require: Whether it takes ``require``; the others list images, so that each of theirs exists.
    """

    read: Callable[..., Dataset]
    facts: DatasetFacts
    options: tuple[str, ...] = ()
    takes_require: bool = False


_ENTRIES = (
    NamedDataset(pcam.load_pcam, pcam.FACTS, ("splits",)),
    NamedDataset(bach.load_bach, bach.FACTS, ("patients", "partial")),
    NamedDataset(partial(bach.load_bach, val="reference"), bach.REFERENCE_FACTS, ("patients", "partial")),
    NamedDataset(crc.load_crc, crc.FACTS),
    NamedDataset(partial(crc.load_crc, colours="original"), crc.NONORM_FACTS),
    NamedDataset(lc25000.load_lc25000, lc25000.FACTS, ("groups",)),
    NamedDataset(partial(lc25000.load_lc25000, organ="lung"), lc25000.LUNG_FACTS, ("groups",)),
    NamedDataset(partial(lc25000.load_lc25000, organ="colon"), lc25000.COLON_FACTS, ("groups",)),
    NamedDataset(nih14.load_nih14, nih14.FACTS, takes_require=True),
    NamedDataset(chexpert.load_chexpert, chexpert.FACTS, ("uncertain", "splits"), takes_require=True),
    NamedDataset(
        mimic_cxr.load_mimic_cxr,
        mimic_cxr.FACTS,
        ("reports", "sections", "labeller", "uncertain", "per"),
        takes_require=True,
    ),
    NamedDataset(openi.load_openi, openi.FACTS, ("sections", "per"), takes_require=True),
    NamedDataset(tuberculosis.load_tuberculosis, tuberculosis.SHENZHEN_FACTS),
    NamedDataset(partial(tuberculosis.load_tuberculosis, place="montgomery"), tuberculosis.MONTGOMERY_FACTS),
    NamedDataset(mhist.load_mhist, mhist.FACTS, takes_require=True),
    NamedDataset(rsna.load_rsna, rsna.FACTS, takes_require=True),
    NamedDataset(vindr_cxr.load_vindr_cxr, vindr_cxr.FACTS, ("agreement", "splits"), takes_require=True),
    NamedDataset(roco.load_roco, roco.FACTS, ("splits",), takes_require=True),
    NamedDataset(partial(roco.load_roco, version=2), roco.V2_FACTS, ("splits",), takes_require=True),
    NamedDataset(medpix.load_medpix, medpix.FACTS, ("splits",), takes_require=True),
    *(NamedDataset(partial(medmnist.load_medmnist, name=n), f, ("side_px",)) for n, f in medmnist.FACTS.items()),
)
#: Words before a colon that are no data sets: addresses (a `Path` drops one of their slashes), files of packages.
_OTHER_SCHEMES = frozenset({"http", "https", "ftp", "s3", "gs", "hf", "file", "package"})
NAMED = {entry.facts.name: entry for entry in _ENTRIES}


def dataset_names() -> tuple[str, ...]:
    """Return the names of the table, in its order."""
    return tuple(NAMED)


def dataset_facts(name: str) -> DatasetFacts:
    """Return what is known about a data set.

    Raises:
        UnknownName: The table has no such data set.
    """
    return _entry(name).facts


def open_dataset(
    name: str,
    root: str | Path,
    *,
    require: Sequence[Part] | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    check_images: bool = False,
    **options: object,
) -> Dataset:
    """Open a public data set as it was downloaded.

    Args:
        name: A name of the table; see `dataset_names`.
        root: Folder; what must lie in it is in ``dataset_facts(name).layout``.
        require: What a sample must have. None: an image. An empty tuple takes the labels of data sets that have a table
            of them without their images.
        on_bad_row: ``skip`` lists what cannot be used in ``Dataset.rejected``; ``fail`` raises at the first.
        check_images: Also decode every image.
        options: Of the reader; docs/reference/datasets.md lists them.

    Raises:
        UnknownName: The table has no such data set.
        InputError: A file is missing (the message says which, and from where to get it), or an option is unknown.
        FileFormatError: A file is damaged.
        MissingExtra: A package that reads the files is not installed.
    """
    entry = _entry(name)
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        known = ", ".join(entry.options) or "none"
        raise InputError(f"data set `{entry.facts.name}` has no option `{unknown[0]}`", hint=f"options: {known}")
    if require is not None and "text" in require and not entry.facts.texts:
        raise InputError(f"data set `{entry.facts.name}` has no texts", hint="ask for its images alone")
    if entry.takes_require and require is not None:
        options["require"] = tuple(require)
    data = entry.read(Path(root).expanduser(), **options)
    samples, rejected = list(enumerate(data.samples, start=1)), list(data.rejected)
    if check_images:
        samples, undecodable = keep_decodable(samples)
        rejected = sorted(rejected + undecodable, key=lambda r: r.row)
    check_rejected(rejected, kept=len(samples), name=data.name, on_bad_row=on_bad_row)
    return Dataset(tuple(s for _, s in samples), tuple(rejected), data.name)


def split_source(source: str | Path) -> tuple[str, str] | None:
    """Return name and folder of ``pcam:/data``, or None for anything that is not of this form.

    Raises:
        UnknownName: It is of this form, nothing lies at such a path, and the table has no such name.
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9-]+):(?!//)(.+)", str(source), re.DOTALL)
    if found is None:
        return None
    name, root = found.group(1).casefold(), found.group(2)
    if name not in NAMED:
        if name in _OTHER_SCHEMES or Path(source).exists() or "::" in str(source) or "{" in str(source):
            return None
        _entry(name)
    return name, root


def cautions_of(source: str | Path) -> tuple[str, ...]:
    """Return what a reader of a result on ``NAME:ROOT`` must know; nothing for any other source.

    Raises:
        UnknownName: The table has no such name.
    """
    by_name = split_source(source)
    return () if by_name is None else dataset_facts(by_name[0]).cautions


def _entry(name: str) -> NamedDataset:
    entry = NAMED.get(name.casefold())
    if entry is None:
        raise UnknownName("data set", name, NAMED, hint=f"known: {', '.join(NAMED)}")
    return entry
