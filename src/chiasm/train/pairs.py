"""From a recipe's ``[data]`` to pairs for training and pairs held out, with everything that was left out on record.

Comes in: a table, a folder, shards, or a request for phantoms. Goes out: two :class:`PairTable`. Rows of other splits
(the test split, say) are looked at by the leakage check only: they are never trained on, validated on or selected by.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.config import build
from chiasm.data.splits import check_leakage, split_by_group
from chiasm.datasets.columns import Columns
from chiasm.datasets.images import open_image_path, split_member
from chiasm.datasets.sources import open_dataset
from chiasm.errors import InputError
from chiasm.io.manifest import Rejected, summarize_rejected, write_json_atomic
from chiasm.progress import Progress, SilentProgress
from chiasm.train.recipe import DataConfig, Recipe, expand_path
from chiasm.train.texts import RenderedText, render_texts
from chiasm.types import Sample, digest_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.data.phantoms import PhantomSet

UNKNOWN_SPLIT = "(none)"
PHANTOM_PIECE = 50  # patients drawn at a time


@dataclass(frozen=True)
class PairTable:
    """Rows that can be used.

    Attributes:
        samples: Of each row.
        texts: Of each row.
        arrays: Images of each row (uint8), where they exist as arrays (phantoms).
    """

    samples: tuple[Sample, ...]
    texts: tuple[RenderedText, ...]
    arrays: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, rows: Sequence[int]) -> PairTable:
        """Return the pairs at these rows, in that order."""
        arrays = None if self.arrays is None else self.arrays[np.asarray(rows, np.int64)]
        return PairTable(tuple(self.samples[r] for r in rows), tuple(self.texts[r] for r in rows), arrays)

    def keys(self, positives: str) -> list[str]:
        """Return the key of each row: of its ``caption``, of its ``group``, or of its own (``none``)."""
        if positives == "caption":
            return [t.key for t in self.texts]
        if positives == "group":
            return [s.study or s.group for s in self.samples]
        return [s.id for s in self.samples]

    def open(self, row: int) -> Image:
        """Return the decoded image of one row."""
        if self.arrays is not None:
            from PIL import Image

            return Image.fromarray(self.arrays[row])
        path = self.samples[row].image
        if path is None:
            raise InputError("sample has no image")
        return open_image_path(path)

    @property
    def digest(self) -> str:
        """Digest of ids, groups and texts; it does not depend on where the files lie."""
        return digest_of([[s.id, s.group, *t.variants] for s, t in zip(self.samples, self.texts, strict=True)])


@dataclass(frozen=True)
class OpenedPairs:
    """What a recipe's data have become.

    Attributes:
        train: To train on.
        validation: Held out for selection; empty when nothing is.
        rejected: Rows that were left out, with the reason.
        name: Of the source.
        unused: Rows of splits that the recipe does not name.
    """

    train: PairTable
    validation: PairTable
    rejected: tuple[Rejected, ...]
    name: str
    unused: int = 0

    def summary(self) -> dict[str, Any]:
        """Return counts for the record of a run."""
        return {
            "source": self.name,
            "train": {"pairs": len(self.train), "groups": len({s.group for s in self.train.samples})},
            "validation": {"pairs": len(self.validation), "groups": len({s.group for s in self.validation.samples})},
            "unused": self.unused,
            "rejected": len(self.rejected),
            "digest": digest_of([self.train.digest, self.validation.digest]),
        }


def open_pairs(recipe: Recipe, *, cache: Path | None = None, progress: Progress | None = None) -> OpenedPairs:
    """Read the pairs of a recipe, make their texts, hold out groups, and check for leakage.

    Args:
        recipe: Its ``data`` part counts, and the size of images for phantoms.
        cache: Folder that remembers which files were found free of leakage.
        progress: Told while phantoms are drawn.

    Raises:
        ConfigError: A field of ``[data]`` does not fit the table.
        InputError: No pair is left, or a row is bad and ``data.on_bad_row`` is ``fail``.
        LeakageError: Groups or near-identical images lie on both sides of a split.
    """
    data = recipe.data
    samples, arrays, rejected, name = _phantoms(recipe, progress or SilentProgress()) if data.phantoms else _table(data)
    samples = _merge_groups(samples, data.same_group)
    texts = render_texts(samples, data)
    rejected += _refused(samples, texts, data)
    if rejected and data.on_bad_row == "fail":
        first = min(rejected, key=lambda r: r.row)
        raise InputError(
            f"row {first.row} of `{name}` cannot be used: {first.reason} ({len(rejected)} bad in all)",
            hint='repair the rows, or set `data.on_bad_row = "skip"`',
        )
    refused = {r.id for r in rejected}
    good = [i for i, s in enumerate(samples) if s.id not in refused and texts[i] is not None]
    if not good:
        raise InputError(f"no pair of `{name}` can be used: {summarize_rejected(rejected)}")
    table = PairTable(tuple(samples), tuple(t or RenderedText((), "") for t in texts), arrays).select(good)
    given = _split(table, data)
    unused = len(table) - len(given["train"]) - len(given["validation"])
    # Phantoms are drawn one by one: patients look alike, which is no leak, and there are no files to compare.
    images = data.near_duplicates and table.arrays is None
    sides, dropped = drop_leaks(table.samples, given, leakage=data.leakage, images=images, cache=cache)
    return OpenedPairs(
        table.select(sides["train"]), table.select(sides["validation"]), (*rejected, *dropped), name, unused=unused
    )


def _phantoms(recipe: Recipe, progress: Progress) -> tuple[list[Sample], NDArray[np.uint8] | None, list[Rejected], str]:
    data = recipe.data
    assert data.phantoms is not None
    size = recipe.encoder_config().preprocess.size if recipe.start is None else 224
    whole = draw_phantoms(data.phantoms, data.patients, seed=data.phantom_seed, size_px=size, progress=progress)
    return list(whole.samples), whole.images, [], whole.name


def draw_phantoms(
    kind: Literal["chest", "tissue"],
    patients: int,
    *,
    seed: int,
    size_px: int,
    first_patient: int = 0,
    progress: Progress | None = None,
) -> PhantomSet:
    """Return phantoms that were drawn in pieces, two threads at a time; the pieces change nothing in the result.

    Raises:
        InputError: A number out of its range.
    """
    from chiasm.data.phantoms import make_chest_phantoms, make_tissue_phantoms

    make = make_chest_phantoms if kind == "chest" else make_tissue_phantoms
    progress = progress or SilentProgress()

    def piece(first: int) -> PhantomSet:
        count = min(PHANTOM_PIECE, patients - first)
        return make(count, seed=seed, size_px=size_px, first_patient=first_patient + first)

    progress.start(patients, "phantoms")
    pieces = []
    pool = ThreadPoolExecutor(2, thread_name_prefix="chiasm-phantoms")
    try:
        for made in pool.map(piece, range(0, patients, PHANTOM_PIECE)):
            pieces.append(made)
            progress.advance(min(PHANTOM_PIECE, patients - PHANTOM_PIECE * (len(pieces) - 1)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.finish()
    return pieces[0].join(*pieces[1:])


def _table(data: DataConfig) -> tuple[list[Sample], NDArray[np.uint8] | None, list[Rejected], str]:
    assert data.source is not None
    columns = None
    if data.columns:
        columns = build(Columns, data.columns, where="data.columns.")
    opened = open_dataset(
        expand_path(data.source, "data.source"),
        columns=columns,
        root=None if data.root is None else expand_path(data.root, "data.root"),
        require=("image",) if data.texts else ("image", "text"),
        on_bad_row=data.on_bad_row,
    )
    return list(opened.samples), None, list(opened.rejected), opened.name


def _merge_groups(samples: list[Sample], same: Sequence[Sequence[str]]) -> list[Sample]:
    """Give patients that are one person one id."""
    alias = {name: group[0] for group in same for name in group}
    if not alias:
        return samples
    return [dataclasses.replace(s, patient=alias.get(s.patient or "", s.patient)) for s in samples]


def _refused(samples: Sequence[Sample], texts: Sequence[RenderedText | None], data: DataConfig) -> list[Rejected]:
    patterns = [re.compile(p, re.IGNORECASE) for p in data.drop_texts]
    refused = []
    for row, (sample, text) in enumerate(zip(samples, texts, strict=True), start=1):
        reason = None
        if text is None:
            reason = "text is empty, or a hole of every template is blank"
        elif max(len(v.split()) for v in text.variants) < data.min_words:
            reason = f"text has fewer than {data.min_words} words"
        elif any(p.search(sample.text or "") for p in patterns):
            reason = "text matches `data.drop_texts`"
        if reason is not None:
            refused.append(Rejected(row, sample.id, reason))
    return refused


def _split(table: PairTable, data: DataConfig) -> dict[str, list[int]]:
    """Return rows of ``train``, ``validation`` and the unused rest by the name of their split."""
    given = [s.split for s in table.samples]
    sides: dict[str, list[int]] = {"train": [], "validation": []}
    if not any(given):
        sides["train"] = list(range(len(table)))
    else:
        for row, split in enumerate(given):
            side = "train" if split in data.train_splits else "validation" if split in data.validation_splits else None
            sides.setdefault(side or f"unused: {split or UNKNOWN_SPLIT}", []).append(row)
        if not sides["train"]:
            found = ", ".join(sorted({str(s) for s in given if s}))
            raise InputError(
                f"no row is in the splits of `data.train_splits` = {list(data.train_splits)}", hint=f"splits: {found}"
            )
    if data.validation_splits and not sides["validation"]:
        raise InputError(f"no row is in the splits of `data.validation_splits` = {list(data.validation_splits)}")
    if not data.validation_splits and data.validation > 0:
        rows = sides["train"]
        fractions = {"train": 1.0 - data.validation, "validation": data.validation}
        names = split_by_group([table.samples[r].group for r in rows], fractions, seed=data.split_seed)
        for side in ("train", "validation"):
            sides[side] = [r for r, name in zip(rows, names, strict=True) if name == side]
    return sides


def drop_leaks(
    samples: Sequence[Sample],
    sides: Mapping[str, Sequence[int]],
    *,
    leakage: Literal["refuse", "drop", "warn", "off"],
    images: bool,
    cache: Path | None = None,
) -> tuple[dict[str, list[int]], list[Rejected]]:
    """Return the rows of each side that may stay, and those that were dropped because they cross a split.

    Args:
        samples: All rows.
        sides: Rows of ``train``, ``validation`` and others; rows are dropped from ``train`` first, then from
            ``validation``, never from another side.
        leakage: What to do, as in a recipe.
        images: Whether pictures are compared, too.
        cache: Folder that remembers which files were found free of leakage.

    Raises:
        LeakageError: Something crosses, and ``leakage`` is ``refuse``.
    """
    whole = {name: list(rows) for name, rows in sides.items()}
    by_split = {name: [samples[r] for r in rows] for name, rows in whole.items() if rows}
    if leakage == "off" or len(by_split) < 2:
        return whole, []
    known = None if cache is None or not images else cache / f"leakage-{_leakage_key(by_split)}.json"
    if known is not None and known.exists():
        return whole, []
    report = check_leakage(by_split, near_duplicates=images, image_loader=open_image_path, refuse=leakage == "refuse")
    if report.is_clean:
        if known is not None:
            write_json_atomic(known, {"clean": True, "images": report.images})
        return whole, []
    if leakage == "warn":
        warnings.warn(report.summary(), stacklevel=4)
        return whole, []
    gone: dict[str, set[int]] = {"train": set(), "validation": set()}
    for leak in report.leaks:
        places = [side for side, _ in leak.rows]
        loser = "train" if "train" in places else "validation" if "validation" in places else None
        if loser is not None:
            gone[loser].update(row for side, row in leak.rows if side == loser)
    dropped = [
        Rejected(whole[side][i], samples[whole[side][i]].id, f"{side} row also lies in another split")
        for side, places in gone.items()
        for i in sorted(places)
    ]
    kept = {side: [r for i, r in enumerate(rows) if i not in gone.get(side, ())] for side, rows in whole.items()}
    return kept, dropped


#: Changes with what the check can find, so that files which an older check called clean are looked at again.
LEAKAGE_CHECK = 2


def _leakage_key(by_split: Mapping[str, Sequence[Sample]]) -> str:
    return digest_of({"check": LEAKAGE_CHECK} | {name: file_facts(samples) for name, samples in by_split.items()}, 24)


def file_facts(samples: Sequence[Sample]) -> list[list[Any]]:
    """Return id, group, size and time of change of each sample's file: what tells whether any has changed."""
    facts = []
    for sample in samples:
        path = sample.image
        shard = None if path is None else split_member(path)
        path = path if shard is None else shard[0]
        state = path.stat() if path is not None and path.is_file() else None
        facts.append([sample.id, sample.group, *((state.st_size, state.st_mtime_ns) if state else (0, 0))])
    return facts
