"""A model to a folder that loads anywhere without a network, and back: is the folder still what was written?

In: whatever ``chiasm.load`` takes. Out: chiasm's model folder (weights in float32, towers, tokenizer with its
vocabulary, preprocessing) with the protocols published for the model, what its source says about its licence, and
``SHA256SUMS``. The folder is written beside its place, loaded, compared with the original, and only then moved there.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm import fetch
from chiasm.checkpoints import native
from chiasm.encoders.catalog import CATALOG, CatalogEntry
from chiasm.errors import CheckpointError, FileFormatError, InputError
from chiasm.load import load, save_encoder

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder

SUMS = "SHA256SUMS"
NOTICE = "NOTICE.txt"
PROMPTS = "protocols.json"
#: Papers of the source that go along; larger ones are no papers.
PAPERS = ("LICEN[CS]E*", "NOTICE*", "README.md", "meta.yaml")
MAX_PAPER_BYTES = 2**20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


@dataclass(frozen=True)
class Bundle:
    """What was written.

    Attributes:
        directory: The folder.
        name: Name of the encoder.
        space: Its space; the same as the original's.
        files: File name -> SHA-256.
        size_bytes: Of all files.
        protocols: Names of the protocols in it.
        papers: Licence and description files that came from the source.
        licence: Of the weights, where the catalog knows it.
    """

    directory: Path
    name: str
    space: str
    files: Mapping[str, str]
    size_bytes: int
    protocols: tuple[str, ...]
    papers: tuple[str, ...]
    licence: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "directory": self.directory.name, "files": dict(self.files),
                "protocols": list(self.protocols), "papers": list(self.papers)}  # fmt: skip


def write_bundle(
    model: str | Path | Sequence[str | Path],
    directory: str | Path,
    *,
    family: str | None = None,
    pretrained: str | Path | None = None,
    activation: str | None = None,
) -> Bundle:
    """Write a model as a folder that loads offline, and check it by loading it.

    Args:
        model: Whatever :func:`chiasm.load` takes; fetched if it is a name and absent. Several files are an ensemble.
        directory: The folder to write; it must not exist, or be empty.
        family: See :func:`chiasm.load`.
        pretrained: See :func:`chiasm.load`.
        activation: See :func:`chiasm.load`.

    Raises:
        InputError: The folder holds something, or the model has a tower that is code of somebody's own.
        CheckpointError: The model cannot be loaded or written, or what was written does not load as the same.
    """
    out = Path(directory).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`{out.name}` exists and is not empty", hint="name a new folder")
    if not isinstance(model, (str, Path)) and len(model) == 1:
        model = model[0]
    encoder = load(model, family=family, pretrained=pretrained, activation=activation)
    if "python" in (encoder.config.image.kind, encoder.config.text.kind):
        raise InputError(f"a tower of `{encoder.name}` is code in a package of your own, which a bundle cannot hold")
    single = model if isinstance(model, (str, Path)) else ""
    entry = _entry_of(single, encoder, family)
    try:
        staging = out.parent / f".{out.name}-{secrets.token_hex(4)}.next"
        staging.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        save_encoder(encoder, staging)
        protocols = _write_protocols(staging, encoder, entry)
        papers = _copy_papers(_origin_of(single, entry, pretrained), staging)
        (staging / NOTICE).write_text(_notice(encoder, entry), encoding="utf-8")
        sums = {name: _sha256(staging / name) for name in _names(staging)}
        (staging / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
        check_bundle(staging)
        _check_same(encoder, staging)
        size = sum((staging / name).stat().st_size for name in [*sums, SUMS])
        if out.exists():
            out.rmdir()
        staging.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    licence = entry.licence if entry is not None else ""
    return Bundle(out, encoder.name, str(encoder.space), sums, size, protocols, papers, licence)


def check_bundle(directory: str | Path) -> dict[str, str]:
    """Compare every file of a bundle with ``SHA256SUMS`` and return file name -> SHA-256.

    Raises:
        FileFormatError: No bundle, a file that is absent, changed or not listed, or a list that leaves the folder.
    """
    folder = Path(directory).expanduser()
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise FileFormatError(f"`{folder.name}` is no bundle: it has no `{SUMS}`") from error
    stated: dict[str, str] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match[2].startswith(("/", "\\")) or ".." in match[2].replace("\\", "/").split("/"):
            raise FileFormatError(f"`{SUMS}` of `{folder.name}` is damaged")
        stated[match[2]] = match[1]
    found = set(_names(folder)) - {SUMS}
    problems = [f"lacks `{n}`" for n in sorted(set(stated) - found)]
    problems += [f"holds `{n}`, which is not listed" for n in sorted(found - set(stated))]
    problems += [f"holds a changed `{n}`" for n in sorted(found & set(stated)) if _sha256(folder / n) != stated[n]]
    if problems:
        raise FileFormatError(f"the bundle `{folder.name}` {problems[0]}", hint="copy it again")
    return stated


def is_bundle(directory: str | Path) -> bool:
    """Return whether a folder is a bundle."""
    return (Path(directory) / SUMS).is_file() and native.is_model_dir(directory)


def _entry_of(model: str | Path, encoder: Encoder, family: str | None) -> CatalogEntry | None:
    """The catalog's entry of what was loaded, by its name, its family or its repository."""
    for name in (str(model), encoder.name, family):
        found = CATALOG.find(name) if name else None
        if found is not None:
            return found
    if fetch.is_address(model):
        meant = fetch.parse_address(str(model))
        return meant if isinstance(meant, CatalogEntry) else fetch.entry_of(meant)
    return None


def _origin_of(model: str | Path, entry: CatalogEntry | None, pretrained: str | Path | None) -> Path | None:
    """The folder that the weights came from, whose papers go along; nothing for an ensemble's files."""
    if not str(model):
        return None
    if fetch.is_address(model):
        meant = fetch.parse_address(str(model))
        path = fetch.cached_repository(meant) if isinstance(meant, fetch.HubAddress) else None
    elif pretrained not in (None, "openai"):
        path = Path(str(pretrained)).expanduser()
    elif entry is not None and CATALOG.find(str(model)) is not None:
        path = fetch.cached(entry)
    else:
        path = Path(model).expanduser()
    return path if path is not None and path.is_dir() else None


def _write_protocols(folder: Path, encoder: Encoder, entry: CatalogEntry | None) -> tuple[str, ...]:
    """Write what was published for the model: templates, prompts and how they are added up."""
    from chiasm.tasks.protocol import protocols

    names = (encoder.name, entry.name if entry is not None else None)
    fitting = {name: p for name, p in protocols().items() if p.fits(*names)} if encoder.config.sides == "both" else {}
    if fitting:
        values = [p.to_dict() for p in fitting.values()]
        (folder / PROMPTS).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tuple(fitting)


def _copy_papers(origin: Path | None, folder: Path) -> tuple[str, ...]:
    names = []
    for pattern in PAPERS if origin is not None else ():
        assert origin is not None
        for path in sorted(origin.glob(pattern)):
            if path.is_file() and path.stat().st_size <= MAX_PAPER_BYTES and path.name != NOTICE:
                (folder / "source").mkdir(exist_ok=True)
                shutil.copyfile(path, folder / "source" / path.name)
                names.append(path.name)
    return tuple(names)


def _notice(encoder: Encoder, entry: CatalogEntry | None) -> str:
    lines = [
        f"{encoder.name}", "",
        f"Space: {encoder.space}. Load it with `chiasm.load(FOLDER)`; no network is needed.",
        "Research use only: chiasm and its models are no medical devices.", "",
    ]  # fmt: skip
    if entry is None:
        return "\n".join([*lines, "The licence of these weights is not known to chiasm: ask whoever gave them.", ""])
    source = entry.weights
    gate = {"open": "open to anybody", "agreement": "after accepting its terms with an account",
            "request": "handed out by its authors"}[entry.gate]  # fmt: skip
    lines += [entry.description, f"Licence: {entry.licence or 'see its source'}", f"Access: {gate}"]
    if entry.gate != "open":
        lines.append("Passing these weights on may not be allowed: read the licence before you copy this folder.")
    if entry.training_data:
        lines.append(f"Trained on: {entry.training_data}")
    if source is not None:
        place = source.url or (f"https://huggingface.co/{source.repository}" if source.repository else "")
        lines += [f"Source: {source.source}", *([f"Weights: {place}"] if place else [])]
        recorded = fetch.recorded(entry)
        lines += [f"Fetched: {k} {v}" for k, v in recorded.items()]
    return "\n".join([line for line in lines if line is not None] + [""])


def _check_same(encoder: Encoder, folder: Path) -> None:
    """Load the folder and compare: the same space, the same vectors."""
    again = load(folder)
    if again.space != encoder.space:
        raise CheckpointError(f"the bundle has the space {again.space}, not {encoder.space}")
    for what, first, second in zip(("images", "texts"), _probe(encoder), _probe(again), strict=True):
        if first is not None and (second is None or not np.array_equal(first, second, equal_nan=True)):
            raise CheckpointError(f"the bundle gives other vectors for {what}")


def _probe(encoder: Encoder) -> tuple[Any, Any]:
    from PIL import Image

    ramp = np.add.outer(np.arange(97), np.arange(131)).astype(np.uint8)
    images = encoder.encode([Image.fromarray(ramp).convert("RGB")]) if encoder.config.has_image else None
    texts = encoder.encode(["chest radiograph", "x"]) if encoder.config.has_text else None
    return images, texts


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"`{out.name}` cannot be written: {error.strerror or type(error).__name__}",
        hint="free some space or choose another place; nothing was left behind",
    )
