"""A zip archive around one weight file, the form in which MedCLIP is handed out.

In: a path. Out: the path of the weight file inside, unpacked to a temporary folder that is gone after use. The names
in the archive are never used as paths, a link is no file, and what unfolds is bounded, so an archive can neither write
somewhere nor fill the disk.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from chiasm.checkpoints.storages import DAMAGED, ZIP_ERRORS, check_names
from chiasm.errors import CheckpointError

WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
#: Trained weights hardly compress: float32 to nine tenths. More than this is no weight file.
MAX_RATIO = 8
FREE_BYTES = 64 * 2**20


def weight_member(path: Path) -> zipfile.ZipInfo | None:
    """Return the record that is the one weight file in an archive, or None where there is none or there are several.

    Raises:
        CheckpointError: A damaged archive, or records that no honest archive has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except ZIP_ERRORS as error:
        raise CheckpointError(f"`{path.name}` is a damaged zip archive", hint=DAMAGED) from error
    check_names(path, infos)
    found = [
        info
        for info in infos
        if PurePosixPath(info.filename).suffix in WEIGHT_SUFFIXES and not info.filename.startswith("__MACOSX/")
    ]
    return found[0] if len(found) == 1 and not found[0].is_dir() else None


@contextmanager
def unpacked(path: Path, member: zipfile.ZipInfo) -> Iterator[Path]:
    """Unpack one record to a temporary folder, checksum verified; the folder is removed afterwards.

    Tensors that were mapped from the file stay readable: the system keeps its pages for as long as they are in use.

    Raises:
        CheckpointError: Encrypted, damaged, or far larger than what it was packed to.
    """
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CheckpointError(f"`{path.name}`: the record with the weights is a link")
    if member.file_size > FREE_BYTES + MAX_RATIO * path.stat().st_size:
        raise CheckpointError(f"`{path.name}` would unfold to {member.file_size:,} bytes, which weights never do")
    with tempfile.TemporaryDirectory(prefix="chiasm-", ignore_cleanup_errors=True) as folder:
        inner = Path(folder) / path.name
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as source, inner.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)  # zipfile stops at the stated size and checks the checksum
        except (*ZIP_ERRORS, zlib.error) as error:
            raise CheckpointError(
                f"`{path.name}` cannot be unpacked: {type(error).__name__}",
                hint=f"{DAMAGED}, or unpack it yourself and give the weight file inside",
            ) from error
        yield inner
