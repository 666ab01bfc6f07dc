"""The image of a sample, wherever it lies: a file of its own, or a member of an uncompressed tar shard.

A member is written as a path through the shard, ``shards/train-000.tar/0001.jpg``: nothing is ever unpacked, the bytes
are read at their offset when the sample is opened. `open_sample_image` is the one door for training, embedding and
leakage checks.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chiasm.errors import ChiasmError, FileFormatError, InputError
from chiasm.io.image import MAX_PIXELS, open_image
from chiasm.io.manifest import Rejected
from chiasm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Shard:
    """What a tar shard holds.

    Attributes:
        members: Name -> offset and size of the bytes, in the order of the file.
        refused: Names that are no plain files or that point outside the shard.
        damaged: Whether the file ends early; the members before the damage can be read.
    """

    members: Mapping[str, tuple[int, int]]
    refused: tuple[str, ...]
    damaged: bool


def open_sample_image(sample: Sample, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Return the decoded image of a sample; see `chiasm.io.image.open_image`.

    Raises:
        InputError: The sample has no image, or its file is absent or too large.
        FileFormatError: The file is not a whole image.
    """
    if sample.image is None:
        raise InputError("sample has no image")
    return open_image_path(sample.image, max_pixels=max_pixels)


def open_image_path(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Return the decoded image at a path, which may lead through a tar shard."""
    found = split_member(path)
    if found is None:
        return open_image(path, max_pixels=max_pixels)
    try:
        return open_image(read_member(*found), max_pixels=max_pixels)
    except ChiasmError as error:
        # Bytes have no name; give the message that of the member.
        raise type(error)(error.message.replace("`(bytes)`", f"`{path.name}`"), hint=error.hint) from error


def image_exists(path: Path) -> bool:
    """Return whether there is a regular file at the path, or a member of a shard."""
    try:
        found = split_member(path)
        return path.is_file() if found is None else found[1] in index_shard(found[0]).members
    except (OSError, ValueError, FileFormatError):
        return False


def split_member(path: Path) -> tuple[Path, str] | None:
    """Return shard and member of a path that leads through a tar file, or None for any other path."""
    parts = path.parts
    for i, part in enumerate(parts[:-1]):
        if part.casefold().endswith(".tar"):
            shard = Path(*parts[: i + 1])
            if shard.is_file():
                return shard, PurePosixPath(*parts[i + 1 :]).as_posix()
    return None


def read_member(shard: Path, name: str) -> bytes:
    """Return the bytes of one member; several threads may read one shard.

    Raises:
        InputError: The shard has no such member.
    """
    place = index_shard(shard).members.get(name)
    if place is None:
        raise InputError(f"shard `{shard.name}` has no such member")
    offset, size = place
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def index_shard(shard: Path) -> Shard:
    """Return what a shard holds; only headers are read, once for each version of the file.

    Raises:
        InputError: The file is absent.
        FileFormatError: It is no tar file, or a compressed one, which cannot be read at an offset.
    """
    try:
        state = shard.stat()
    except OSError:
        raise InputError(f"shard `{shard.name}` does not exist") from None
    return _index_shard(shard, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _index_shard(shard: Path, modified_ns: int, size: int) -> Shard:
    members: dict[str, tuple[int, int]] = {}
    refused: list[str] = []
    damaged = False
    try:
        with tarfile.open(shard, "r:") as archive:
            try:
                for member in archive:
                    name = _safe_name(member)
                    if name is None:
                        refused.append(member.name)
                    elif name and member.offset_data + member.size <= size:
                        members[name] = (member.offset_data, member.size)
                    elif name:
                        damaged = True
            except tarfile.TarError:
                damaged = True
    except tarfile.TarError as error:
        raise FileFormatError(
            f"`{shard.name}` is not an uncompressed tar file", hint="unpack .tar.gz shards with gunzip"
        ) from error
    # A whole archive ends with a block of zeros after its last member; tarfile does not ask for it.
    return Shard(members, tuple(refused), damaged or size % tarfile.BLOCKSIZE != 0)


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
