"""The image of a sample, wherever it lies: its own file, a member of a tar, a cell of Parquet, a row of HDF5.

A member is written as a path through the file, ``shards/train-000.tar/0001.jpg``, ``table.parquet/image/12`` or
``set_x.h5/x/12``. Plain tars are never unpacked, the bytes are read at their offset when the sample is opened; compressed
tars and Parquet files are unpacked once a process, see `chiasm.datasets.packed`; rows of HDF5 arrays are read one by
one, see `chiasm.datasets.arrays`. `open_sample_image` is the one door for training, embedding and leakage checks.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from chiasm.datasets.arrays import ARRAY_SUFFIXES, has_row, read_array_image
from chiasm.datasets.packed import (
    GZIP_SUFFIXES,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    Shard,
    spool,
    unpack_gzip,
    unpack_parquet,
)
from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io.image import MAX_PIXELS, open_image
from chiasm.io.manifest import Rejected
from chiasm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


def open_sample_image(sample: Sample, *, max_pixels: int = MAX_PIXELS, draft_px: int | None = None) -> Image:
    """Return the decoded image of a sample; see `chiasm.io.image.open_image`.

    Args:
        sample: Names its image.
        max_pixels: A larger image is refused.
        draft_px: Lossy: large JPEGs may be decoded smaller, see `chiasm.data.transforms.ImageTransform`.

    Raises:
        InputError: The sample has no image, or its file is absent or too large.
        FileFormatError: The file is not a whole image.
    """
    if sample.image is None:
        raise InputError("sample has no image")
    return open_image_path(sample.image, max_pixels=max_pixels, draft_px=draft_px)


def open_image_path(path: Path, *, max_pixels: int = MAX_PIXELS, draft_px: int | None = None) -> Image:
    """Return the decoded image at a path, which may lead through a tar shard."""
    found = split_member(path)
    if found is None:
        return open_image(path, max_pixels=max_pixels, draft_px=draft_px)
    if _is_array(found[0]):
        return read_array_image(*found, max_pixels=max_pixels)
    try:
        return open_image(read_member(*found), max_pixels=max_pixels, draft_px=draft_px)
    except ChiasmError as error:
        # Bytes have no name; give the message that of the member.
        raise type(error)(error.message.replace("`(bytes)`", f"`{path.name}`"), hint=error.hint) from error


def image_exists(path: Path) -> bool:
    """Return whether there is a regular file at the path, or a member of a shard."""
    try:
        found = split_member(path)
        if found is None:
            return path.is_file()
        return has_row(*found) if _is_array(found[0]) else found[1] in index_shard(found[0]).members
    except (OSError, ValueError, FileFormatError):
        return False


def hash_image(path: Path) -> bytes:
    """Return the SHA-256 of what is stored of an image: its bytes, whatever file they lie in; of a row of an array, pixels.

    A copy or another name changes nothing.

    Raises:
        InputError: There is no such image.
        FileFormatError: The file around it is damaged.
        OSError: The file cannot be read.
    """
    found = split_member(path)
    if found is None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if _is_array(found[0]):
        image = open_image_path(path)  # a row of an array has no bytes of its own
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
    return hashlib.sha256(read_member(*found)).digest()


def split_member(path: Path) -> tuple[Path, str] | None:
    """Return file and member of a path that leads through a tar, Parquet or HDF5 file, or None for any other path."""
    parts = path.parts
    for i, part in enumerate(parts[:-1]):
        if part.casefold().endswith((*TAR_SUFFIXES, *GZIP_SUFFIXES, *PARQUET_SUFFIXES, *ARRAY_SUFFIXES)):
            shard = Path(*parts[: i + 1])
            if shard.is_file():
                return shard, PurePosixPath(*parts[i + 1 :]).as_posix()
    return None


def _is_array(path: Path) -> bool:
    return path.name.casefold().endswith(ARRAY_SUFFIXES)


def read_member(shard: Path, name: str) -> bytes:
    """Return the bytes of one member; several threads may read one shard.

    Raises:
        InputError: The shard has no such member.
    """
    index = index_shard(shard)
    place = index.members.get(name)
    if place is None:
        raise InputError(f"shard `{shard.name}` has no such member")
    offset, size = place
    if index.unpacked:
        return spool().read(offset, size)
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def index_shard(shard: Path) -> Shard:
    """Return what a shard holds, read once for each version of the file: of a plain tar its headers only.

    Raises:
        InputError: The file is absent, or too large to be unpacked.
        FileFormatError: It is not what its ending says.
    """
    try:
        state = shard.stat()
    except OSError:
        raise InputError(f"shard `{shard.name}` does not exist") from None
    name = shard.name.casefold()
    if name.endswith((*GZIP_SUFFIXES, *PARQUET_SUFFIXES)):
        with spool().lock:  # several workers may ask at once
            return _index_packed(shard, state.st_mtime_ns, state.st_size)
    return _index_shard(shard, state.st_mtime_ns, state.st_size)


@cache  # what is unpacked stays, so it must not be forgotten
def _index_packed(shard: Path, modified_ns: int, size: int) -> Shard:
    if shard.name.casefold().endswith(PARQUET_SUFFIXES):
        return unpack_parquet(shard)
    start, end, torn = unpack_gzip(shard)
    spool().file.seek(start)
    found = _read_headers(shard, spool().file, start, end)
    if not (found.members or found.refused):  # tarfile takes nonsense for the end unless it stands at offset 0
        spool().cut(start)
        raise FileFormatError(f"`{shard.name}` is not a tar file, or an empty one")
    return Shard(found.members, found.refused, found.damaged or torn, unpacked=True)


@lru_cache(maxsize=1024)
def _index_shard(shard: Path, modified_ns: int, size: int) -> Shard:
    return _read_headers(shard, None, 0, size)


def _read_headers(shard: Path, file: IO[bytes] | None, start: int, end: int) -> Shard:
    """Return the members of a tar, of its file or of an open one that stands at its beginning."""
    members: dict[str, tuple[int, int]] = {}
    refused: list[str] = []
    damaged = False
    try:
        with tarfile.open(shard if file is None else None, "r:", fileobj=file) as archive:
            try:
                for member in archive:
                    name = _safe_name(member)
                    if name is None:
                        refused.append(member.name)
                    elif name and member.offset_data + member.size <= end:
                        members[name] = (member.offset_data, member.size)
                    elif name:
                        damaged = True
            except tarfile.TarError:
                damaged = True
    except tarfile.TarError as error:
        hint = "give compressed shards the ending .tar.gz" if file is None else None
        raise FileFormatError(f"`{shard.name}` is not a tar file", hint=hint) from error
    # A whole archive ends with a block of zeros after its last member; tarfile does not ask for it.
    return Shard(members, tuple(refused), damaged or (end - start) % tarfile.BLOCKSIZE != 0)


def _safe_name(member: tarfile.TarInfo) -> str | None:
    """Return the member's plain name, "" for a folder, None for what may not be used."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return None
    if member.isdir():
        return ""
    return path.as_posix() if member.isreg() and not member.issparse() else None


def keep_decodable(
    samples: Sequence[tuple[int, Sample]], *, workers: int = 2
) -> tuple[list[tuple[int, Sample]], list[Rejected]]:
    """Return the (row, sample) pairs whose image decodes (or that have none), and the others as rejected rows."""
    pool = ThreadPoolExecutor(workers)
    try:
        reasons = list(pool.map(_why_undecodable, [s for _, s in samples]))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    kept = [pair for pair, reason in zip(samples, reasons, strict=True) if reason is None]
    rejected = [
        Rejected(row, s.id, reason) for (row, s), reason in zip(samples, reasons, strict=True) if reason is not None
    ]
    return kept, rejected


def _why_undecodable(sample: Sample) -> str | None:
    if sample.image is None:
        return None
    try:
        open_sample_image(sample)
    except (InputError, FileFormatError) as error:
        return plain_reason(error, sample)
    return None


def plain_reason(error: ChiasmError, sample: Sample) -> str:
    """Return an image's error without the file name, so that equal reasons can be counted."""
    name = sample.image.name if sample.image is not None else ""
    return error.message.replace(f"image `{name}`", "image").replace(f"`{name}`", "image") if name else error.message
