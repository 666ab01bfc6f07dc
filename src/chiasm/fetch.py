"""A name to files on this machine: the cache, the hub's addresses, and what to do where there is no network.

In: an entry of the catalog, ``hf-hub:org/repo[@revision]`` or ``open_clip:NAME/TAG``. Out: the path of a weight file or
model folder in ``$CHIASM_HOME/models``. What is there is used without any request. What is absent is fetched from its
official source, verified and recorded in ``fetched.json``: a repository at the documented revision, else at the one of
the first download. Weights that are handed out on request are never asked for; the error says who gives them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from chiasm.encoders.catalog import ARCHITECTURES, CATALOG, CatalogEntry
from chiasm.errors import CheckpointError, FileFormatError, InputError, UnknownName
from chiasm.io.download import DownloadError, check_reach, download
from chiasm.io.hub import COMMIT, endpoint, file_address, read_listing
from chiasm.progress import Progress, RichProgress

if TYPE_CHECKING:
    from chiasm.checkpoints.layout import Layout

HUB, OPEN_CLIP = "hf-hub:", "open_clip:"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".torch", ".zip")
RECORD = "fetched.json"
#: In a repository of which nothing is documented: the weights, the first that are there; an index stands for its parts.
HUB_WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: And everything small that a model folder may need: configuration, tokenizer, licence. Code is never fetched.
HUB_BESIDES = (
    "encoder.json", "recipe.toml", "config.json", "open_clip_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "LICEN[CS]E*", "NOTICE*", "README.md",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.txt", "spiece.model")
_log = logging.getLogger("chiasm")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")
LOCK_S = 3600.0


@dataclass(frozen=True)
class HubAddress:
    """A repository of the Hugging Face hub.

    Attributes:
        repository: ``org/name``.
        revision: Commit, branch or tag; empty: the recorded one.
        activation: What open_clip's table says of the tag's weights; empty: the folder says it itself.
    """

    repository: str
    revision: str = ""
    activation: str = ""

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def models_folder() -> Path:
    """Return the folder of the weights on this machine: ``$CHIASM_HOME/models``."""
    return Path(os.environ.get("CHIASM_HOME") or "~/.cache/chiasm").expanduser() / "models"


def is_address(name: object) -> bool:
    """Return whether a name is an address of the hub or of open_clip rather than a name of the catalog."""
    return isinstance(name, str) and name.startswith((HUB, OPEN_CLIP))


def parse_address(name: str) -> HubAddress | CatalogEntry:
    """Return what an address means; ``open_clip:NAME/openai`` is an entry of the catalog.

    Raises:
        InputError: Not ``hf-hub:org/repo[@revision]``.
        UnknownName: No such name and tag in open_clip's table.
    """
    if name.startswith(OPEN_CLIP):
        return _open_clip_address(name.removeprefix(OPEN_CLIP))
    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (revision and not _is_revision(revision)) or ".." in repository:
        raise InputError(f"`{name}` is no address of the hub", hint="expected `hf-hub:org/repo` or `…/repo@revision`")
    return HubAddress(repository, revision)


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text


def is_open_clip_tag(name: str, tag: str) -> bool:
    """Return whether open_clip's table has weights of this tag for a name."""
    return f"{name.removesuffix('-quickgelu')}/{tag}" in _open_clip_table()["repositories"]


def _open_clip_table() -> dict[str, Any]:
    return tomllib.loads((files("chiasm.encoders.models") / "open_clip_hub.toml").read_text(encoding="utf-8"))


def _open_clip_address(name: str) -> HubAddress | CatalogEntry:
    model, _, tag = name.partition("/")
    if tag == "openai":
        return CATALOG.get(f"openai/{model.removesuffix('-quickgelu')}")
    table = _open_clip_table()
    plain = f"{model.removesuffix('-quickgelu')}/{tag}"
    repository = table["repositories"].get(plain)
    quick = plain in table["activation"]["quick_gelu"]
    if repository is None or (model.endswith("-quickgelu") and not quick):
        raise UnknownName(
            "name and tag of open_clip", name, table["repositories"],
            hint="give the repository that holds the weights: `hf-hub:org/repo`",
        )  # fmt: skip
    return HubAddress(repository, activation="quick_gelu" if quick else "")


def entry_of(address: HubAddress) -> CatalogEntry | None:
    """Return the entry of the catalog whose weights lie in a repository, or None.

    Raises:
        InputError: Several entries have their weights there, and none has its name.
    """
    found = [e for e in CATALOG.entries() if e.weights is not None and e.weights.repository == address.repository]
    called = [e for e in found if address.repository in e.aliases]
    if len(found) > 1 and len(called) != 1:
        names = ", ".join(f"`{e.name}`" for e in found)
        raise InputError(f"`{HUB}{address}` holds the weights of {names}", hint="load one of these names")
    return CATALOG.get((called or found)[0].name) if found else None


def cached(entry: CatalogEntry) -> Path | None:
    """Return the file or folder of an entry in the cache: ``models/NAME`` with or without a suffix, or its repository.

    No request is made.
    """
    folder = models_folder()
    stems = [entry.name, entry.name.rsplit("/", 1)[-1]]
    if entry.weights is not None and entry.weights.url:  # in repositories many files have the same name
        stems.append(entry.weights.file_name.rsplit(".", 1)[0])
    for stem in dict.fromkeys(stems):
        for suffix in ("", *WEIGHT_SUFFIXES):
            path = folder / f"{stem}{suffix}"
            if path.is_file() or (not suffix and path.is_dir() and any(path.iterdir())):
                return path
    if entry.weights is not None and entry.weights.repository:
        found = cached_repository(HubAddress(entry.weights.repository, entry.weights.revision))
        return found if found is not None and _is_whole(found, entry) else None
    return None


def _is_whole(folder: Path, entry: CatalogEntry) -> bool:
    """Whether a folder holds all weights of an entry; another entry may have fetched other files of the repository."""
    layout = _layout_of(entry)
    if layout is None:
        return True
    patterns = layout.parts.values()
    return all(any(any(folder.glob(e)) for p in part for e in (p, f"{p}.index.json")) for part in patterns)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in HUB_WEIGHTS)


def _layout_of(entry: CatalogEntry) -> Layout | None:
    from chiasm.checkpoints.layouts import LAYOUTS

    return LAYOUTS.get(entry.layout)


def cached_repository(address: HubAddress) -> Path | None:
    """Return the folder of a repository in the cache, at the revision asked for or recorded; no request is made."""
    commit = address.revision
    if not COMMIT.fullmatch(commit):
        commit = str(_record().get(f"{HUB}{address}", {}).get("revision", ""))
    path = _repository_folder(address.repository) / commit
    return path if COMMIT.fullmatch(commit) and path.is_dir() else None


def prepare(model: str | Path, *, pretrained: str | Path | None = None) -> None:
    """Bring the files of a name or an address, before anybody imports torch; paths are left to the loader.

    Raises:
        ChiasmError: As :func:`obtain`, :func:`obtain_address` and :func:`parse_address`; a name that nobody knows.
    """
    if not isinstance(model, str) or pretrained not in (None, "openai"):
        return
    meant = parse_address(model) if is_address(model) else CATALOG.find(model)
    if isinstance(meant, CatalogEntry):
        obtain(meant)
    elif meant is not None:
        obtain_address(meant, entry=entry_of(meant))
    elif model not in ARCHITECTURES and not _may_be_a_path(model):
        CATALOG.get(model)


def _may_be_a_path(name: str) -> bool:
    """Whether a name that the catalog does not have may be meant as a file, a folder or a pattern."""
    return name.startswith((".", "~", "/")) or "*" in name or name.endswith(WEIGHT_SUFFIXES) or os.path.exists(name)


def obtain(entry: CatalogEntry, *, progress: Progress | None = None) -> Path:
    """Return the weights of an entry, fetched if they are absent and free to fetch.

    Raises:
        CheckpointError: Absent and out of reach, refused, or handed out on request only; says where to get them.
    """
    found = cached(entry)
    if found is not None:
        return found
    source = entry.weights
    if source is None or not (source.url or source.repository) or entry.gate == "request":
        raise absent(entry)
    try:
        if source.repository:
            address = HubAddress(source.repository, source.revision)
            check_reach(endpoint())
            return _fetch_repository(address, source.files, _wants_all(entry), progress)
        return _fetch_file(entry, progress)
    except DownloadError as error:
        raise absent(entry, error) from error


def obtain_address(address: HubAddress, *, entry: CatalogEntry | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of a repository, fetched if it is absent; ``entry`` says which of its files are wanted.

    Raises:
        CheckpointError: Absent and out of reach, or refused; says where to get it.
    """
    found = cached_repository(address)
    if found is not None and (_is_whole(found, entry) if entry is not None else _has_weights(found)):
        return found
    try:
        check_reach(endpoint())
        if entry is not None and entry.weights is not None:
            return _fetch_repository(address, entry.weights.files, _wants_all(entry), progress)
        return _fetch_repository(address, (), False, progress)
    except DownloadError as error:
        place = f"{endpoint()}/{address.repository}"
        raise CheckpointError(
            f"`{HUB}{address}` is not on this machine: {error.message}",
            hint=_account(error, place) + f"get its files from {place} and give the folder, or where there is a "
            f"network: `chiasm bundle {HUB}{address} DIR`, then load DIR here",
        ) from error


def obtain_tokenizer(repository: str, *, progress: Progress | None = None) -> Path | None:
    """Return a folder with the vocabulary that a model shares with another repository, fetched if it can be.

    None where it is neither here nor within reach: images can be embedded without it.
    """
    address = HubAddress(repository)
    found = cached_repository(address)
    if found is not None and any((found / name).is_file() for name in VOCABULARIES):
        return found
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        return None
    try:
        check_reach(endpoint())
        return _fetch_repository(address, (), False, progress, weights=False)
    except CheckpointError as error:
        _log.info("no tokenizer from `%s`: %s", repository, error.message)
        return None


def absent(entry: CatalogEntry, error: DownloadError | None = None) -> CheckpointError:
    """Return the error for weights that are not here: where they are, under which terms, how to bring them."""
    message = f"the weights of `{entry.name}` are not on this machine"
    if error is not None:
        message += f": {error.message}"
    source = entry.weights
    terms = (
        f" (licence: {entry.licence or 'see its source'}; "
        + {
            "open": "open to anybody)",
            "agreement": "after accepting its terms with an account)",
            "request": "handed out by its authors)",
        }[entry.gate]
    )
    bundle = f"; or where there is a network: `chiasm bundle {entry.name} DIR`, then load DIR here"
    here = (
        f"`load({entry.name!r}, pretrained='/path/to/it')` (in commands `--model /path/to/it --family {entry.name}`), "
        f"or put it into {models_folder()} named `{entry.name.rsplit('/', 1)[-1]}`, with its own ending"
    )
    carry = f"; `chiasm bundle {entry.name} DIR --pretrained /path/to/it` makes a folder for other machines"
    if source is None:
        return CheckpointError(
            f"{message}: none were released under this name, or chiasm knows no address of them",
            hint=f"give the path of your own: {here}{carry}; `chiasm models {entry.name}` says what is known",
        )
    place = source.url or (f"{endpoint()}/{source.repository}" if source.repository else "")
    if source.ask or entry.gate == "request" or not place:
        ask = source.ask or f"ask its authors: {source.source}"
        return CheckpointError(message, hint=f"{ask}{terms}, then {here}{carry}")
    return CheckpointError(message, hint=f"{_account(error, place)}get {place}{terms}, then {here}{bundle}")


def recorded(entry: CatalogEntry) -> dict[str, Any]:
    """Return what is recorded of the first download of an entry: revision or SHA-256, address, date; or nothing."""
    source = entry.weights
    if source is None:
        return {}
    if source.repository:
        return dict(_record().get(f"{HUB}{HubAddress(source.repository, source.revision)}", {}))
    return dict(_record().get(_file_key(entry), {}))


def _file_key(entry: CatalogEntry) -> str:
    """Where the file of an entry lies in the cache: under its published name, which several entries may share."""
    assert entry.weights is not None
    file = PurePosixPath(urlsplit(entry.weights.url).path)
    return f"{entry.name}{file.suffix}" if file.stem == entry.name.rsplit("/", 1)[-1] else file.name


def _account(error: DownloadError | None, place: str) -> str:
    if error is not None and error.status in (401, 403):
        return f"accept the terms at {place} with an account, create a token there and set HF_TOKEN; or "
    return ""


def _wants_all(entry: CatalogEntry) -> bool:
    layout = _layout_of(entry)
    return layout is not None and len(layout.parts) > 1


def _fetch_file(entry: CatalogEntry, progress: Progress | None) -> Path:
    source = entry.weights
    assert source is not None
    check_reach(source.url)
    name = _file_key(entry)
    target = models_folder() / name
    with _lock(name):
        if not target.is_file():
            known = source.sha256 or str(_record().get(name, {}).get("sha256", ""))
            bar = progress or RichProgress(unit="MB")
            found = download(source.url, target, sha256=known, progress=bar)
            _note(name, {"sha256": found, "url": source.url})
    return target


def _fetch_repository(
    address: HubAddress, wanted: Sequence[str], every: bool, progress: Progress | None, *, weights: bool = True
) -> Path:
    with _lock(address.repository):
        key = f"{HUB}{address}"
        recorded = str(_record().get(key, {}).get("revision", ""))
        commit, known, headers = read_listing(address.repository, recorded or address.revision or "main")
        target = _repository_folder(address.repository) / commit
        staging = target.with_name(f"{commit}.partial")
        bar = progress or RichProgress(unit="MB")

        def bring(name: str) -> Path:
            if not (target / name).is_file() and not (staging / name).is_file():
                url = file_address(address.repository, commit, name)
                download(url, staging / name, headers=headers, progress=bar, **known[name])
            return next(folder / name for folder in (target, staging) if (folder / name).is_file())

        for name in _chosen(list(known), wanted, every, weights):
            path = bring(name)
            for part in _parts_of(path, known) if name.endswith(".index.json") else ():
                bring(part)
        _settle(staging, target)
        _note(key, {"revision": commit, "url": f"{endpoint()}/{address.repository}"})
    return target


def _settle(staging: Path, target: Path) -> None:
    """Give the fetched files their place: all at once, or into a folder that lacked them, an index after its parts."""
    if not target.is_dir():
        staging.replace(target)
        return
    for path in sorted(staging.rglob("*"), key=lambda p: p.name.endswith(".index.json")):
        if path.is_file():
            place = target / path.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    shutil.rmtree(staging, ignore_errors=True)


def _chosen(names: Sequence[str], wanted: Sequence[str], every: bool, weights: bool) -> list[str]:
    """Which files to fetch: of several forms of the weights the first that is there, unless all are parts of one."""
    heavy: list[str] = []
    besides = list(HUB_BESIDES)
    for pattern in wanted or HUB_WEIGHTS:
        matches = sorted(n for n in names if fnmatchcase(n, pattern))
        found = [n for n in matches if n.endswith((*WEIGHT_SUFFIXES, ".index.json"))]
        besides += [n for n in matches if n not in found]
        if every or not heavy:
            heavy += found
    if weights and not heavy:
        raise DownloadError("the repository holds no weights that chiasm reads")
    others = [n for n in names if n not in heavy and any(fnmatchcase(n, p) for p in besides)]
    return [*sorted(others), *(heavy if weights else [])]


def _parts_of(index: Path, known: Mapping[str, Any]) -> list[str]:
    from chiasm.checkpoints.containers import read_json

    listed = read_json(index).get("weight_map")
    names = sorted({str(v) for v in listed.values()}) if isinstance(listed, dict) else []
    missing = [n for n in names if n not in known or "/" in n]
    if not names or missing:
        raise DownloadError(f"`{index.name}` of the repository lists parts that it does not hold")
    return names


def _repository_folder(repository: str) -> Path:
    return models_folder() / "hub" / repository.replace("/", "--")


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """One process at a time fetches one thing; the others wait and then find it."""
    folder = models_folder() / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name.replace('/', '--')}.lock", timeout=LOCK_S)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"another process has been fetching `{name}` for an hour", hint="end it") from error
    except OSError as error:
        raise CheckpointError(
            f"the cache cannot be written: {error.strerror or type(error).__name__}",
            hint="set CHIASM_HOME to a folder of yours",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _record() -> dict[str, dict[str, Any]]:
    try:
        value = json.loads((models_folder() / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"`{RECORD}` in the cache is damaged", hint=f"remove {models_folder() / RECORD}"
        ) from error
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _note(key: str, values: Mapping[str, Any]) -> None:
    """Record what was fetched first under a name; later downloads of it must be the same."""
    with _lock(RECORD):
        record = _record()
        if key in record:
            return
        record[key] = {**values, "date": datetime.now(UTC).date().isoformat()}
        path = models_folder() / RECORD
        following = path.with_name(f"{RECORD}.next")
        following.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        following.replace(path)
