"""Cut tensors out of PyTorch's files: memory-mapped, sizes checked against the file before anything is allocated.

In: a path, the numbers that its pickle states (:class:`~chiasm.checkpoints.pickle_reader.TensorRef`). Out: tensors
that share the file's pages (private mapping: writing to them never reaches the file). Both layouts that ``torch.save``
has written since 2018 are known: the zip archive (also TorchScript's) and the older stream of pickles.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chiasm.checkpoints.pickle_reader import MAX_PICKLE_BYTES, StorageRef, TensorRef, read_pickle
from chiasm.errors import CheckpointError

#: torch's storage classes; other names (quantised types, user classes) are refused.
DTYPES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}
#: Tied weights may appear under several names; more than this is a trick to make a small file large in memory.
MAX_EXPANSION = 8
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
#: What ``zipfile`` raises of damaged archives.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    EOFError,
    KeyError,
    OSError,
)

DAMAGED = "download or copy it again"


@dataclass(frozen=True)
class Extent:
    """Where a storage's bytes lie in the file; ``crc`` is the checksum that a zip archive states, else None."""

    start: int
    size: int
    crc: int | None = None


class NotPytorch(CheckpointError):
    """A sound zip archive that is not PyTorch's."""


class Archive:
    """A PyTorch zip archive: records by name, without extracting anything.

    Records must be stored uncompressed, as PyTorch stores them, so a small file cannot unfold into a large one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except ZIP_ERRORS as error:
            raise CheckpointError(f"`{path.name}` is a damaged zip archive", hint=DAMAGED) from error
        check_names(path, infos)
        self.infos = {info.filename: info for info in infos}
        if len(self.infos) != len(infos):
            raise CheckpointError(f"`{path.name}` holds two records of one name")
        roots = [n.removesuffix("data.pkl") for n in self.infos if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise NotPytorch(
                f"`{path.name}` is a zip archive, but not one that PyTorch wrote",
                hint="unpack it and give the weight file inside",
            )
        self.root = roots[0]

    @property
    def is_torchscript(self) -> bool:
        """Whether the archive also holds code (which is never run)."""
        return f"{self.root}constants.pkl" in self.infos

    def extent(self, name: str) -> Extent:
        """Return where the bytes of a record lie, checked against the size of the file."""
        info = self.infos.get(self.root + name)
        if info is None:
            raise CheckpointError(f"`{self.path.name}` lacks the record `{name}`", hint=DAMAGED)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"`{self.path.name}`: the record `{name}` is compressed; PyTorch never does that")
        header = b""
        if 0 <= info.header_offset < self.size:
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                header = file.read(30)
        if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
            raise CheckpointError(f"`{self.path.name}`: the record `{name}` has no header", hint=DAMAGED)
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_size + extra_size
        if start + info.file_size > self.size:
            raise CheckpointError(f"`{self.path.name}`: the record `{name}` reaches beyond the file", hint=DAMAGED)
        return Extent(start, info.file_size, info.CRC)

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small record, checksum verified."""
        extent = self.extent(name)
        if extent.size > limit:
            raise CheckpointError(f"`{self.path.name}`: the record `{name}` has {extent.size:,} bytes, above {limit:,}")
        with self.path.open("rb") as file:
            file.seek(extent.start)
            data = file.read(extent.size)
        if zlib.crc32(data) != extent.crc:
            raise CheckpointError(f"`{self.path.name}`: the record `{name}` is damaged (checksum)", hint=DAMAGED)
        return data


def check_names(path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse records that only an attack has: names that leave the archive, and links. Nothing is extracted anyway.

    Raises:
        CheckpointError: There is one.
    """
    for info in infos:
        parts = info.filename.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or parts[0].endswith(":"):
            raise CheckpointError(f"`{path.name}` holds a record whose name leaves the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise CheckpointError(f"`{path.name}` holds a link in place of a record")


class TensorCutter:
    """Turns references into tensors over one private mapping of the file."""

    def __init__(self, path: Path, locate: Callable[[StorageRef], Extent]) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._locate = locate
        self._file = torch.UntypedStorage.from_file(str(path), False, self.size)
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._claimed = 0

    def _storage(self, ref: StorageRef, itemsize: int) -> torch.UntypedStorage:
        if ref.key not in self._storages:
            extent = self._locate(ref)
            piece = self._file[extent.start : extent.start + extent.size]
            if extent.crc is not None and zlib.crc32(_bytes_of(piece)) != extent.crc:
                raise CheckpointError(f"`{self.path.name}`: the weights are damaged (checksum)", hint=DAMAGED)
            # A tensor must start at a multiple of its element size; the older layout does not align.
            self._storages[ref.key] = piece if extent.start % 16 == 0 else piece.clone()
        storage = self._storages[ref.key]
        if ref.numel * itemsize > storage.nbytes():
            raise CheckpointError(f"`{self.path.name}`: a tensor states more elements than the file holds")
        return storage

    def cut(self, ref: TensorRef, name: str) -> torch.Tensor:
        """Return the tensor ``name``.

        Raises:
            CheckpointError: Unknown element type, or a shape that does not fit what the file holds.
        """
        dtype = DTYPES.get(ref.storage.dtype)
        if dtype is None:
            raise CheckpointError(f"`{self.path.name}`: `{name}` has the element type {ref.storage.dtype}")
        numel = math.prod(ref.shape)
        last = sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True)) if numel else -1
        if numel > ref.storage.numel or ref.offset + last + 1 > ref.storage.numel:
            raise CheckpointError(
                f"`{self.path.name}`: `{name}` has the shape {ref.shape}, its storage has {ref.storage.numel} elements"
            )
        self._claimed += numel * dtype.itemsize
        if self._claimed > MAX_EXPANSION * self.size:
            raise CheckpointError(f"`{self.path.name}`: its tensors claim more than {MAX_EXPANSION} times its size")
        storage = self._storage(ref.storage, dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, ref.offset, ref.shape, ref.stride)


def _bytes_of(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def read_zip(path: Path) -> tuple[Any, TensorCutter, bool]:
    """Return the pickled value of a PyTorch zip archive, the cutter of its tensors, and whether it is TorchScript."""
    import io

    archive = Archive(path)
    if f"{archive.root}byteorder" in archive.infos and archive.read("byteorder", 16) != b"little":
        raise CheckpointError(f"`{path.name}` was written on a big-endian machine, which is not supported")
    value = _read_named(path, io.BytesIO(archive.read("data.pkl", MAX_PICKLE_BYTES)))
    cutter = TensorCutter(path, lambda ref: archive.extent(f"data/{ref.key}"))
    return value, cutter, archive.is_torchscript


class _Window:
    """A bounded view of a mapped file for the interpreter: a line or a value cannot swallow the weights."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._end = min(len(data), MAX_PICKLE_BYTES)

    def read(self, n: int, /) -> bytes:
        return self._data.read(max(0, min(n, self._end - self._data.tell())))

    def readline(self) -> bytes:
        start = self._data.tell()
        stop = self._data.find(b"\n", start, min(self._end, start + 4096))
        return self._data.read(stop + 1 - start) if stop >= 0 else b""

    def tell(self) -> int:
        return self._data.tell()


def read_legacy(path: Path) -> tuple[Any, TensorCutter]:
    """Return the pickled value of a file of ``torch.save`` before 1.6, and the cutter of its tensors."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        window = _Window(data)
        if _read_named(path, window) != LEGACY_MAGIC:
            raise CheckpointError(f"`{path.name}` is a pickle, but not one of `torch.save`")
        _protocol, system = _read_named(path, window), _read_named(path, window)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(f"`{path.name}` was written on a big-endian machine, which is not supported")
        value = _read_named(path, window)
        refs = _storage_refs(value)
        keys = _read_named(path, window)
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
            raise CheckpointError(f"`{path.name}`: the list of storages is damaged", hint=DAMAGED)
        extents: dict[str, Extent] = {}
        position = data.tell()
        for key in keys:
            if position + 8 > size or key not in refs:
                raise CheckpointError(f"`{path.name}` ends before its weights do", hint=DAMAGED)
            (numel,) = struct.unpack("<q", data[position : position + 8])
            dtype = DTYPES.get(refs[key].dtype)
            if dtype is None:
                raise CheckpointError(f"`{path.name}`: a tensor has the element type {refs[key].dtype}")
            if numel != refs[key].numel or position + 8 + numel * dtype.itemsize > size:
                raise CheckpointError(f"`{path.name}` ends before its weights do", hint=DAMAGED)
            extents[key] = Extent(position + 8, numel * dtype.itemsize)
            position += 8 + numel * dtype.itemsize

    def locate(ref: StorageRef) -> Extent:
        if ref.key not in extents:
            raise CheckpointError(f"`{path.name}` lacks the storage of a tensor", hint=DAMAGED)
        return extents[ref.key]

    return value, TensorCutter(path, locate)


def _storage_refs(value: Any) -> dict[str, StorageRef]:
    """Every storage that a value refers to, at any depth, each container visited once."""
    found: dict[str, StorageRef] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, TensorRef):
            found[item.storage.key] = item.storage
        elif isinstance(item, StorageRef):
            found[item.key] = item
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                todo.extend(item.values())
            elif isinstance(item, (list, tuple)):
                todo.extend(item)
            elif hasattr(item, "state"):
                todo.extend((item.state, item.arguments))
    return found


def _read_named(path: Path, stream: Any) -> Any:
    try:
        return read_pickle(stream)
    except CheckpointError as error:
        raise CheckpointError(f"`{path.name}`: {error.message}", hint=error.hint or DAMAGED) from error
