"""Splits that keep patients whole, and the check that finds what crosses a split nevertheless.

Comes in: a group for each row, or samples. Goes out: a name or a fold for each row, or a report of leaks. The split of
a group depends on its name, the seed and the other groups, never on the order of the rows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from chiasm.data.duplicates import ImageLoader, find_duplicates, fingerprint_images
from chiasm.datasets.images import open_image_path
from chiasm.errors import InputError, LeakageError
from chiasm.types import LabelValue, Sample

LeakKind = Literal["id", "patient", "study", "slide", "image", "near-duplicate image"]


def split_by_group(
    groups: Sequence[str],
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    stratify: Sequence[LabelValue] | None = None,
) -> list[str]:
    """Return the name of a split for each row, all rows of a group in one split.

    Groups are visited in the order of a hash of seed and name, and each goes to the split that lacks most rows, so a
    split misses its share by no more than the largest group. Every split gets at least one group, though.

    Args:
        groups: The group of each row: its patient, say.
        fractions: Name -> share of the rows; they sum to 1.
        seed: Another seed gives another split.
        stratify: A label for each row; each split then gets about its share of the rows of each label too. A group
            with several labels counts for the rarest of them; None is a label of its own.

    Raises:
        InputError: Shares do not sum to 1, one is not positive, there are fewer groups than splits, or ``stratify``
            has another length.
    """
    names = list(fractions)
    shares = [float(fractions[n]) for n in names]
    if not names or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(f"fractions of a split must be positive and sum to 1, got {dict(fractions)}")
    place = _assign(groups, shares, seed, stratify)
    return [names[place[g]] for g in groups]


def kfold_groups(groups: Sequence[str], k: int, seed: int = 0) -> list[int]:
    """Return the fold (0 to k - 1) of each row, all rows of a group in one fold, folds of about equal size.

    Raises:
        InputError: ``k`` is under 2, or there are fewer groups than folds.
    """
    if k < 2:
        raise InputError(f"k must be at least 2, got {k}")
    place = _assign(groups, [1 / k] * k, seed, None)
    return [place[g] for g in groups]


def _assign(
    groups: Sequence[str], shares: Sequence[float], seed: int, stratify: Sequence[LabelValue] | None
) -> dict[str, int]:
    if stratify is not None and len(stratify) != len(groups):
        raise InputError(f"stratify has {len(stratify)} labels for {len(groups)} rows")
    sizes = Counter(groups)
    if len(sizes) < len(shares):
        raise InputError(f"{len(sizes)} groups cannot fill {len(shares)} splits", hint="ask for fewer splits")
    strata = _strata(groups, stratify)
    totals: Counter[Hashable] = Counter()
    for group, n in sizes.items():
        totals[strata[group]] += n
    n_rows = len(groups)
    lack = [share * n_rows for share in shares]
    lack_in = {stratum: [share * n for share in shares] for stratum, n in totals.items()}
    # Rare labels first, while every split still has room for them.
    order = sorted(sizes, key=lambda g: (totals[strata[g]], str(strata[g]), _hash(seed, g)))
    place: dict[str, int] = {}
    for group in order:
        local = lack_in[strata[group]]
        # What the label lacks counts in groups, what the split lacks at most as one: it decides between near equals.
        most, size = max(lack), sizes[group]
        best = max(range(len(shares)), key=lambda i: local[i] / size * (stratify is not None) + lack[i] / most)
        place[group] = best
        local[best] -= sizes[group]
        lack[best] -= sizes[group]
    for empty in set(range(len(shares))) - set(place.values()):
        counts = Counter(place.values())
        giver = max(counts, key=lambda i: (counts[i], i))
        moved = min((g for g in place if place[g] == giver), key=lambda g: (sizes[g], _hash(seed, g)))
        place[moved] = empty
    return place


def _strata(groups: Sequence[str], stratify: Sequence[LabelValue] | None) -> dict[str, Hashable]:
    if stratify is None:
        return dict.fromkeys(groups, None)
    counts = Counter(stratify)
    found: dict[str, LabelValue] = {}
    for group, label in zip(groups, stratify, strict=True):
        if group not in found or (counts[label], str(label)) < (counts[found[group]], str(found[group])):
            found[group] = label
    return dict(found)


def _hash(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode()).digest()


@dataclass(frozen=True)
class Leak:
    """One thing that lies in several splits.

    Attributes:
        kind: What it is.
        rows: Split and row within that split, for every sample concerned.
    """

    kind: LeakKind
    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class LeakageReport:
    """What crosses a split. The report lists rows; its messages hold counts only, never an id.

    Attributes:
        leaks: Ids and groups in several splits, then pairs of images.
        splits: Names of the splits compared.
        images: Number of images compared.
        unreadable: Number of images that could not be opened and were not compared.
    """

    leaks: tuple[Leak, ...]
    splits: tuple[str, ...]
    images: int = 0
    unreadable: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not self.leaks

    def counts(self) -> dict[LeakKind, int]:
        """Return how many leaks of each kind there are."""
        return dict(Counter(leak.kind for leak in self.leaks))

    def rows(self, split: str) -> tuple[int, ...]:
        """Return the rows of one split that are part of a leak, sorted: drop them to be clean."""
        return tuple(sorted({row for leak in self.leaks for name, row in leak.rows if name == split}))

    def summary(self) -> str:
        """Return one line such as "3 patients and 5 images are in both `train` and `test`"."""
        unread = f" ({self.unreadable} images could not be read)" if self.unreadable else ""
        if self.is_clean:
            return f"nothing crosses the splits{unread}"
        parts = [f"{n} {_plural(kind, n)}" for kind, n in self.counts().items()]
        listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        touched = sorted({name for leak in self.leaks for name, _ in leak.rows}, key=self.splits.index)
        verb = "is" if len(self.leaks) == 1 else "are"
        names = [f"`{name}`" for name in touched]
        where = f"both {names[0]} and {names[1]}" if len(names) == 2 else f"several of {', '.join(names)}"
        return f"{listed} {verb} in {where}{unread}"


def _plural(kind: LeakKind, n: int) -> str:
    return kind if n == 1 else "studies" if kind == "study" else f"{kind}s"


def check_leakage(
    samples_by_split: Mapping[str, Sequence[Sample]],
    *,
    near_duplicates: bool = True,
    turned: bool = True,
    image_loader: ImageLoader = open_image_path,
    max_hamming: int = 8,
    min_correlation: float = 0.99,
    refuse: bool = True,
) -> LeakageReport:
    """Look for ids, patients, studies, slides and images that lie in more than one split.

    A study counts where its patient is unknown: numbers of studies repeat between patients. Images are compared by
    their pixels and, for near-duplicates, by hash and small picture; see `chiasm.data.duplicates`.

    Args:
        samples_by_split: Name of each split -> its samples.
        near_duplicates: Whether to open and compare the images.
        turned: Whether mirrored and turned copies count too.
        image_loader: Opens the image at a path.
        max_hamming: Bits by which the hashes of near-duplicates may differ.
        min_correlation: Of the small pictures of near-duplicates, at least.
        refuse: Raise when something is found; otherwise only report it.

    Raises:
        LeakageError: Something was found and ``refuse`` is set; the message holds counts and names of splits.
    """
    where = [(split, row) for split, samples in samples_by_split.items() for row in range(len(samples))]
    samples = [sample for group in samples_by_split.values() for sample in group]
    keys: dict[LeakKind, Callable[[Sample], str | None]] = {
        "id": lambda s: s.id,
        "patient": lambda s: s.patient,
        "study": lambda s: s.study if s.patient is None else None,
        "slide": lambda s: s.slide,
    }
    leaks: list[Leak] = []
    for kind, key in keys.items():
        rows: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for sample, at in zip(samples, where, strict=True):
            value = key(sample)
            if value is not None:
                rows[value].append(at)
        leaks.extend(Leak(kind, tuple(found)) for found in rows.values() if len({split for split, _ in found}) > 1)
    images = unreadable = 0
    if near_duplicates and len(samples_by_split) > 1:
        prints = fingerprint_images(samples, image_loader=image_loader)
        images, unreadable = len(prints.rows), prints.unreadable
        sides = [where[row][0] for row in prints.rows]
        pairs = find_duplicates(
            prints, sides=sides, turned=turned, max_hamming=max_hamming, min_correlation=min_correlation
        )
        for pair in pairs:
            kind = "image" if pair.exact else "near-duplicate image"
            leaks.append(Leak(kind, (where[pair.first], where[pair.second])))
    leaks.sort(key=lambda leak: leak.kind == "near-duplicate image")
    report = LeakageReport(tuple(leaks), tuple(samples_by_split), images, unreadable)
    if refuse and not report.is_clean:
        by_image = set(report.counts()) <= {"image", "near-duplicate image"}
        hint = "merge their groups with `merge_groups_by_duplicates`, then split with `split_by_group`"
        raise LeakageError(report.summary(), hint=hint if by_image else "split with `split_by_group`")
    return report


def merge_groups_by_duplicates(
    samples: Sequence[Sample],
    *,
    near: bool = True,
    turned: bool = True,
    image_loader: ImageLoader = open_image_path,
    max_hamming: int = 8,
    min_correlation: float = 0.99,
) -> list[str]:
    """Return the group of each sample after merging groups that share a picture: one person under two ids, say.

    Merged groups bear the name of the first of them in alphabetical order. Split by these names.
    """
    groups = [s.group for s in samples]
    parent = {g: g for g in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    prints = fingerprint_images(samples, image_loader=image_loader)
    pairs = find_duplicates(
        prints,
        sides=[groups[row] for row in prints.rows],
        near=near,
        turned=turned,
        max_hamming=max_hamming,
        min_correlation=min_correlation,
    )
    for pair in pairs:
        first, second = sorted((root(groups[pair.first]), root(groups[pair.second])))
        parent[second] = first
    return [root(g) for g in groups]
