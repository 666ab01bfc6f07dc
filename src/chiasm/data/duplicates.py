"""Images that are the same picture: identical pixels, or nearly so after rescaling, recompression or a change of tone.

Comes in: samples. Goes out: pairs of rows. A difference hash proposes pairs, small pictures decide: chest films look
alike to any hash (among 1,800 of them 26,000 pairs differ in 4 bits or fewer), while pictures of 32 x 32 pixels that
correlate above 0.99 were the same film in every pair that was looked at. The small pictures are also compared mirrored
and in quarter turns. Cropped copies are not found; keep what was cut from one picture together by a group column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.data.loader import Batches
from chiasm.datasets.images import open_image_path
from chiasm.io.image import average_hash, image_digest
from chiasm.io.manifest import RejectLog
from chiasm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

#: Side of the small pictures.
THUMBNAIL_PX = 32
_BLOCK = 512
#: Ways to lay a square on itself, beside leaving it: three quarter turns, and the mirror image in four turns.
_TURNS = range(1, 8)
_PAIRS_AT_ONCE = 4096
ImageLoader = Callable[[Path], "Image"]


class Pair(NamedTuple):
    """Rows ``first < second`` of one picture; ``exact`` when their pixels are identical."""

    first: int
    second: int
    exact: bool


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of every readable image: about 1 kB.

    Attributes:
        rows: Row of the samples behind each entry.
        hashes: 64-bit difference hashes.
        digests: Of mode, size and pixels.
        thumbnails: uint8, shape (n, 1024).
        unreadable: Number of images that could not be opened.
    """

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    digests: tuple[str, ...]
    thumbnails: NDArray[np.uint8]
    unreadable: int


class _Small(NamedTuple):
    """Hashes of the small pictures and their values, centred and of unit norm."""

    hashes: NDArray[np.uint64]
    unit: NDArray[np.float32]


def fingerprint_images(
    samples: Sequence[Sample], *, image_loader: ImageLoader = open_image_path, workers: int = 2
) -> Fingerprints:
    """Return the fingerprints of all images, decoded in threads; samples without an image are passed over."""

    def load(row: int, _: np.random.Generator) -> tuple[int, str, NDArray[np.uint8]]:
        path = samples[row].image
        assert path is not None
        return _fingerprint(image_loader(path))

    rejects = RejectLog()
    rows: list[int] = []
    items: list[tuple[int, str, NDArray[np.uint8]]] = []
    with_image = [i for i, s in enumerate(samples) if s.image is not None]
    for batch in Batches(samples, batch_size=16, rows=with_image, load=load, workers=workers, rejects=rejects):
        rows.extend(batch.rows)
        items.extend(batch.items)
    return Fingerprints(
        rows=np.array(rows, np.int64),
        hashes=np.array([h for h, _, _ in items], np.uint64),
        digests=tuple(d for _, d, _ in items),
        thumbnails=np.stack([t for _, _, t in items]) if items else np.zeros((0, THUMBNAIL_PX**2), np.uint8),
        unreadable=len(rejects),
    )


def _fingerprint(image: Image) -> tuple[int, str, NDArray[np.uint8]]:
    from PIL.Image import Resampling

    grey = (image.convert("RGB") if image.mode in ("P", "PA") else image).convert("L")
    small = np.asarray(grey.resize((THUMBNAIL_PX, THUMBNAIL_PX), Resampling.BOX)).ravel()
    return average_hash(image), image_digest(image), small


def find_duplicates(
    prints: Fingerprints,
    *,
    sides: Sequence[object] | None = None,
    near: bool = True,
    turned: bool = True,
    max_hamming: int = 8,
    min_correlation: float = 0.99,
) -> Iterator[Pair]:
    """Yield every pair of rows that show one picture, in order of the first row.

    Args:
        prints: Of :func:`fingerprint_images`.
        sides: One value for each entry; pairs on one side are passed over.
        near: Whether nearly equal pictures count, or identical pixels only.
        turned: Whether mirrored and turned pictures count among the nearly equal ones.
        max_hamming: Bits by which the hashes may differ.
        min_correlation: Of the small pictures, at least. An image of one tone has no correlation and is a duplicate
            only of identical pixels.
    """
    n = len(prints.rows)
    digests = _codes(prints.digests)
    side = np.zeros(n, np.int64) if sides is None else _codes([str(s) for s in sides])
    unit = _unit_rows(prints.thumbnails) if near else None
    known = _Small(_thumbnail_hashes(prints.thumbnails), unit) if unit is not None and turned else None
    for start in range(0, n, _BLOCK):
        block = slice(start, min(start + _BLOCK, n))
        candidates = np.arange(n)[None] > np.arange(n)[block, None]  # each pair once
        if sides is not None:
            candidates &= side[block, None] != side[None]
        exact = candidates & (digests[block, None] == digests[None])
        found = exact
        if unit is not None:
            close = candidates & (np.bitwise_count(prints.hashes[block, None] ^ prints.hashes[None]) <= max_hamming)
            columns = np.flatnonzero(close.any(axis=0))
            alike = np.zeros_like(close)
            alike[:, columns] = unit[block] @ unit[columns].T >= min_correlation
            found = exact | (close & alike)
        if known is not None:
            for turn in _TURNS:
                own = _turn(prints.thumbnails[block], turn)
                found |= _alike_turned(own, known, candidates & ~found, max_hamming, min_correlation)
        for i, j in np.argwhere(found):
            yield Pair(int(prints.rows[start + i]), int(prints.rows[j]), bool(exact[i, j]))


def _alike_turned(
    own: NDArray[np.uint8],
    known: _Small,
    candidates: NDArray[np.bool_],
    max_hamming: int,
    min_correlation: float,
) -> NDArray[np.bool_]:
    """Return which candidates (own, known) show the same picture, where the own ones were turned before."""
    near = np.bitwise_count(_thumbnail_hashes(own)[:, None] ^ known.hashes[None]) <= max_hamming
    pairs = np.argwhere(candidates & near)
    left = _unit_rows(own)
    found = np.zeros_like(candidates)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        i, j = pairs[start : start + _PAIRS_AT_ONCE].T
        found[i, j] = np.einsum("nd,nd->n", left[i], known.unit[j]) >= min_correlation
    return found


def _turn(thumbnails: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    grids = thumbnails.reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)
    grids = grids[:, :, ::-1] if turn >= 4 else grids
    return np.rot90(grids, turn % 4, axes=(1, 2)).reshape(len(thumbnails), THUMBNAIL_PX**2)


def _thumbnail_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return difference hashes of small pictures, 8 x 8 bits; close to those of the images, not equal."""
    grids = thumbnails.reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX).astype(np.float32)
    rows = grids.reshape(len(grids), 8, THUMBNAIL_PX // 8, THUMBNAIL_PX).mean(axis=2)
    # Share of each of the 32 columns in each of 9 cells.
    edges = np.arange(10) * THUMBNAIL_PX / 9
    start = np.arange(THUMBNAIL_PX)[:, None]
    share = np.clip(np.minimum(start + 1, edges[1:]) - np.maximum(start, edges[:-1]), 0, None).astype(np.float32)
    cells = rows @ share
    bits = np.packbits((cells[:, :, 1:] > cells[:, :, :-1]).reshape(len(grids), 64), axis=1)
    return np.ascontiguousarray(bits).view(">u8")[:, 0].astype(np.uint64)


def _codes(values: Sequence[str]) -> NDArray[np.int64]:
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(v, len(seen)) for v in values], np.int64)


def _unit_rows(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values[norms[:, 0] < THUMBNAIL_PX] = 0  # a spread under one grey level is noise
    values /= np.maximum(norms, 1e-6)
    return values
