"""Webdataset shards to samples: tar files in which ``0001.jpg``, ``0001.txt`` and ``0001.json`` make one sample.

Comes in: ``shards/train-{000..012}.tar``, several joined by ``::``. Goes out: a `Dataset` whose image paths lead
through the shards (see `chiasm.datasets.images`): only headers, texts and JSON are read, no image before it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from chiasm.datasets.columns import GROUP_NAMES, TEXT_NAMES, is_missing, plain_name
from chiasm.datasets.dataset import Dataset
from chiasm.datasets.folder import IMAGE_SUFFIXES
from chiasm.datasets.images import index_shard, keep_decodable, read_member
from chiasm.datasets.packed import GZIP_SUFFIXES, TAR_SUFFIXES, Shard
from chiasm.datasets.parsing import flat_cell
from chiasm.datasets.table import Part, check_rejected
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected
from chiasm.types import LabelValue, Sample

TEXT_SUFFIXES = (".txt", ".text", ".caption")
MAX_TEXT_BYTES = 1 << 20
MAX_SHARDS = 100_000


def expand_shards(pattern: str) -> list[str]:
    """Return the file names of ``a-{00..11}.tar::b-{x,y}.tar``: ranges keep their zeros, alternatives their order.

    Raises:
        InputError: A range is malformed or runs backwards, braces do not match, or there are too many shards.
    """
    every = (name for part in pattern.split("::") if part for name in _expand(part))
    names = list(islice(every, MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise InputError(f"the pattern names more than {MAX_SHARDS} shards")
    return names


def _expand(pattern: str) -> Iterator[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise InputError("braces of the shard pattern do not match", hint="write it as train-{000..012}.tar")
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found.group(1))
    if numbers:
        first, last = int(numbers.group(1)), int(numbers.group(2))
        if last < first or last - first >= MAX_SHARDS:
            raise InputError(f"range {{{found.group(1)}}} of the shard pattern is empty or too long")
        width = len(numbers.group(1))
        choices = [str(i).zfill(width) for i in range(first, last + 1)]
    elif "," in found.group(1):
        choices = found.group(1).split(",")
    else:
        raise InputError(
            f"`{{{found.group(1)}}}` in the shard pattern is no range", hint="write it as train-{000..012}.tar"
        )
    for choice in choices:
        yield from _expand(pattern[: found.start()] + choice + pattern[found.end() :])


def load_webdataset(
    pattern: str | Path,
    *,
    require: Sequence[Part] | None = None,
    on_bad_row: Literal["skip", "fail"] = "skip",
    check_images: bool = False,
) -> Dataset:
    """Read the index of tar shards.

    The key of a member is its name up to the first dot of the file name. Images are ``jpg``, ``png`` ...; the text is
    ``txt`` (or ``caption``), else the JSON's ``caption``; the JSON's patient, study, slide and split are recognised by
    the names that tables use, its other values become labels.

    Args:
        pattern: A tar file, a folder of tar files, or a pattern; see :func:`expand_shards`. Compressed ones (``.tar.gz``,
            ``.tgz``) are unpacked into a temporary file, so plain ones are faster.
        require: What a sample must have; None requires what any sample of the shards has.
        on_bad_row: ``skip`` lists bad rows in ``Dataset.rejected``; ``fail`` raises at the first. Members that are not
            plain files, or whose name leads out of the shard, are bad rows; so is the end of a truncated shard.
        check_images: Also decode every image.

    Raises:
        InputError: A shard is absent, nothing can be used, or a row is bad when these are fatal.
        FileFormatError: A shard is no tar file.
    """
    shards = _find_shards(pattern)
    samples: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    row = 0
    for shard, label in zip(shards, _short_names(shards), strict=True):
        index = index_shard(shard)
        for item in _read_samples(shard, index, label):
            row += 1
            if isinstance(item, Sample):
                samples.append((row, item))
            else:
                rejected.append(replace(item, row=row))
    if require is None:
        has: dict[Part, bool] = {"image": any(s.image for _, s in samples), "text": any(s.text for _, s in samples)}
        require = [part for part in has if has[part]]
    lacking = {row: reason for row, s in samples if (reason := _lacks(s, require))}
    rejected += [Rejected(row, s.id, lacking[row]) for row, s in samples if row in lacking]
    samples = [(row, s) for row, s in samples if row not in lacking]
    if check_images:
        samples, undecodable = keep_decodable(samples)
        rejected += undecodable
    rejected.sort(key=lambda r: r.row)
    name = shards[0].name if len(shards) == 1 else f"{shards[0].name} and {len(shards) - 1} more"
    check_rejected(rejected, kept=len(samples), name=name, on_bad_row=on_bad_row)
    return Dataset(tuple(s for _, s in samples), tuple(rejected), name)


def is_shard(path: Path) -> bool:
    """Return whether a file is a tar, plain or compressed, by its ending."""
    return path.name.casefold().endswith((*TAR_SUFFIXES, *GZIP_SUFFIXES))


def _lacks(sample: Sample, require: Sequence[Part]) -> str | None:
    if "image" in require and sample.image is None:
        return "sample has no image"
    return "text is empty" if "text" in require and sample.text is None else None


def _find_shards(pattern: str | Path) -> list[Path]:
    if Path(pattern).is_dir():
        shards = sorted(p for p in Path(pattern).iterdir() if is_shard(p))
    else:
        shards = [Path(name) for name in expand_shards(str(pattern))]
    if not shards:
        raise InputError("no tar shard is named", hint="give a folder of .tar files or train-{000..012}.tar")
    missing = [s for s in shards if not s.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(shards)} shards do not exist, the first is `{missing[0].name}`")
    return shards


def _short_names(shards: Sequence[Path]) -> list[str]:
    """Return as many last parts of each path as it takes to tell the shards apart; ids start with them."""
    for depth in range(1, max(len(s.parts) for s in shards) + 1):
        names = ["/".join(_without_ending(s).parts[-depth:]) for s in shards]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"the same shard is named twice among {len(shards)}", hint="name every shard once")


def _without_ending(shard: Path) -> Path:
    return shard.with_suffix("").with_suffix("") if shard.name.casefold().endswith(".tar.gz") else shard.with_suffix("")


def _read_samples(shard: Path, index: Shard, label: str) -> Iterator[Sample | Rejected]:
    keys: dict[str, list[str]] = {}
    for name in index.members:
        folder, _, file = name.rpartition("/")
        if not file.startswith("."):
            stem = file.partition(".")[0]
            keys.setdefault(f"{folder}/{stem}" if folder else stem, []).append(name)
    for key, names in keys.items():
        sample_id = f"{label}/{key}"
        try:
            yield _read_sample(shard, index, sample_id, names)
        except _BadMember as bad:
            yield Rejected(0, sample_id, str(bad))
    for name in index.refused:
        yield Rejected(0, name, "member is not a plain file of the shard")
    if index.damaged:
        yield Rejected(0, label, "shard is truncated; its last samples are lost")


class _BadMember(Exception):
    """A member that spoils its sample."""


def _read_sample(shard: Path, index: Shard, sample_id: str, names: Sequence[str]) -> Sample:
    image: Path | None = None
    text: str | None = None
    values: Mapping[str, object] = {}
    for name in names:
        suffix = "." + name.rpartition(".")[2].casefold()
        if suffix in IMAGE_SUFFIXES:
            if image is not None:
                raise _BadMember("sample has several images")
            image = shard / name
        elif suffix in TEXT_SUFFIXES:
            text = _read_text(shard, index, name).strip() or None
        elif suffix == ".json":
            try:
                values = json.loads(_read_text(shard, index, name))
            except ValueError:
                raise _BadMember("JSON of the sample is damaged") from None
            if not isinstance(values, Mapping):
                raise _BadMember("JSON of the sample is not an object")
    plain = {plain_name(str(k)): str(k) for k in reversed(list(values))}
    used: set[str] = set()

    def take(candidates: Sequence[str]) -> str | None:
        for candidate in candidates:
            key = plain.get(candidate)
            if key is not None and isinstance(values[key], (str, int)) and not is_missing(values[key]):
                used.add(key)
                return str(values[key]).strip()
        return None

    from_json = take(TEXT_NAMES)
    groups = {kind: take(candidates) for kind, candidates in GROUP_NAMES.items()}
    return Sample(
        id=sample_id,
        image=image,
        text=text or from_json,
        patient=groups["patient"],
        study=groups["study"],
        slide=groups["slide"],
        split=groups["split"],
        labels={str(k): _label(v) for k, v in values.items() if k not in used},
    )


def _label(value: object) -> LabelValue:
    flat = flat_cell(value)
    if is_missing(flat):
        return None
    if isinstance(flat, bool):
        return int(flat)
    return flat if isinstance(flat, (str, int, float)) else str(flat)


def _read_text(shard: Path, index: Shard, name: str) -> str:
    if index.members[name][1] > MAX_TEXT_BYTES:
        raise _BadMember("text of the sample is larger than 1 MB")
    try:
        return read_member(shard, name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _BadMember("text of the sample is not UTF-8") from None
