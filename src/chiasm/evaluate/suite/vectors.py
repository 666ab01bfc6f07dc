"""What the models of a suite say about its data sets, computed once and kept: image, text and prompt vectors.

In: a :class:`ModelEntry` and :class:`DataRows`. Out: :class:`~chiasm.types.Embeddings`, from a store in the folder of the
run where they were computed before. A model is loaded only when a vector is missing; a killed run goes on in the middle
of a store. After this no task needs a model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import chiasm
from chiasm.errors import InputError
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.settings import ModelEntry, Suite, expanded
from chiasm.io.manifest import write_bytes_atomic, write_json_atomic
from chiasm.io.store import open_store, save_embeddings
from chiasm.progress import Progress
from chiasm.types import Embeddings, Modality, Space, digest_of

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder

#: Side of the small picture behind the floor ``colours``, in pixels.
COLOURS_PX = 32


@dataclass(frozen=True)
class Identity:
    """What is to be known of a model without loading it: the space, the sides and the scale."""

    space: Space
    has_text: bool
    logit_scale: float | None = None
    logit_bias: float | None = None
    members: int = 1


@dataclass
class ModelVectors:
    """One model of a suite: loaded when a vector is missing, and not before.

    Args:
        name: Key in the suite.
        entry: What the suite says of it.
        suite: For device, batch size and seed.
        folder: Of the run; vectors lie in ``vectors/``.

    Attributes:
        embedded: How many (data set, modality) pairs were embedded now, for tests and the summary.
    """

    name: str
    entry: ModelEntry
    suite: Suite
    folder: Path
    embedded: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def encoder(self) -> Encoder:
        """The loaded model.

        Raises:
            ChiasmError: It cannot be loaded.
        """
        if self.entry.floor == "random":
            return _random_encoder(self.suite.seed)
        from chiasm.fetch import prepare
        from chiasm.load import load

        source = self._source()
        prepare(source)
        return load(source, device=self.suite.device, family=self.entry.family)

    @cached_property
    def identity(self) -> Identity:
        """What the keys need; files that have not changed since are not loaded again."""
        if self.entry.floor == "colours":
            return Identity(Space("colours", "none", f"mean-std-{COLOURS_PX}px", 6), False)
        stated = None if self.entry.source is None else _fingerprint(self._source(), self.entry.family)
        path = self.folder / "models" / f"{stated}.json"
        if stated is not None and (known := _read_identity(path)) is not None:
            return known
        e = self.encoder
        found = Identity(e.space, e.config.has_text, e.logit_scale, e.logit_bias, e.members)
        if stated is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, asdict(found))
        return found

    @property
    def space(self) -> Space:
        """Identity of the vectors: it changes with the weights and the preprocessing."""
        return self.identity.space

    @property
    def has_text(self) -> bool:
        """Whether the model can embed a sentence."""
        return self.identity.has_text

    def _source(self) -> str:
        return expanded(self.entry.source or "", f"models.{self.name}.source")

    def path(self, rows: DataRows) -> Path:
        """Return the folder of the store of a data set."""
        key = [self.space.to_dict(), rows.digests["images"], rows.digests["texts"]]
        return self.folder / "vectors" / digest_of(key, 24)

    def images(self, rows: DataRows, progress: Progress | None = None) -> Embeddings:
        """Return the image vectors of a data set, in its order; rows whose image cannot be read are absent."""
        return self._read(rows, "image", progress)

    def texts(self, rows: DataRows, progress: Progress | None = None) -> Embeddings:
        """Return the vectors of the data set's texts; rows without one are absent."""
        if not self.has_text:
            raise no_text_tower(self.name)
        return self._read(rows, "text", progress)

    def is_stored(self, rows: DataRows, modality: Modality) -> bool:
        """Return whether a data set was embedded before, wholly."""
        return (self.path(rows) / f"{modality}.done").is_file()

    def _read(self, rows: DataRows, modality: Modality, progress: Progress | None) -> Embeddings:
        path = self.path(rows)
        if not self.is_stored(rows, modality):
            self._embed(rows, modality, path, progress)
        with open_store(path) as store:
            stored = set(store.ids(modality))
            found = store.read(modality, ids=[s.id for s in rows.samples if s.id in stored])
        by_id = {s.id: s for s in rows.samples}
        # Groups and labels are the suite's: a store may be older than its columns.
        return replace(found, patients=tuple(by_id[i].group for i in found.ids), labels={})

    def _embed(self, rows: DataRows, modality: Modality, path: Path, progress: Progress | None) -> None:
        if self.entry.floor == "colours":
            save_embeddings(path, colour_vectors(rows, self.space))
        else:
            from chiasm.embed import embed_to_store

            bare = [replace(s, labels={}) for s in rows.samples]
            embed_to_store(
                self.encoder, bare, path, modalities=(modality,), batch_size=self.suite.batch_size, progress=progress
            )
        write_bytes_atomic(path / f"{modality}.done", b"")
        self.embedded.append((rows.name, modality))

    def sentences(self, texts: Sequence[str], *, normalize: bool = True) -> Embeddings:
        """Return the vectors of prompts, from the folder of the run where they were computed before."""
        if not self.has_text:
            raise no_text_tower(self.name)
        key = digest_of([self.space.to_dict(), list(texts), normalize], 24)
        path = self.folder / "prompts" / f"{key}.npy"
        vectors = _read_array(path, (len(texts), self.space.dim))
        if vectors is None:
            from chiasm.embed import embed_texts

            # One batch, so that a prompt is padded as it would be in any other order of work.
            options: dict[str, Any] = {"batch_size": max(len(texts), 1), "normalize": normalize}
            vectors = embed_texts(self.encoder, list(texts), **options).vectors
            buffer = io.BytesIO()
            np.save(buffer, vectors, allow_pickle=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, buffer.getvalue())
        return Embeddings(
            vectors, tuple(str(i) for i in range(len(texts))), self.space, "text", normalized=normalize,
            logit_scale=self.identity.logit_scale, logit_bias=self.identity.logit_bias, texts=tuple(texts),
            members=self.identity.members,
        )  # fmt: skip


def no_text_tower(model: str) -> InputError:
    """Return the error of a task that needs sentences, with a model that cannot embed them."""
    return InputError(
        f"model `{model}` has no text tower, so it knows no sentences",
        hint="linear_probe, knn, prototype and few_shot work without one",
    )


def lookup(known: Embeddings) -> Callable[[list[str]], Embeddings]:
    """Return a function from texts to their rows of ``known``, as tasks want it.

    Raises:
        InputError: When called with a text that is not known.
    """
    place = {text: i for i, text in enumerate(known.texts or ())}

    def embed(texts: list[str]) -> Embeddings:
        absent = sum(t not in place for t in texts)
        if absent:
            raise InputError(f"{absent} of {len(texts)} prompts were not embedded")
        found = known.select([place[t] for t in texts])
        return replace(found, ids=tuple(str(i) for i in range(len(texts))))

    return embed


def colour_vectors(rows: DataRows, space: Space) -> Embeddings:
    """Return mean and standard deviation of R, G and B at 32 x 32 pixels, in [0, 1]: what colours alone tell."""
    from chiasm.datasets import open_sample_image
    from chiasm.errors import ChiasmError

    kept: list[int] = []
    vectors: list[NDArray[np.float32]] = []
    for row, sample in enumerate(rows.samples):
        try:
            image = open_sample_image(sample).convert("RGB").resize((COLOURS_PX, COLOURS_PX))
        except (ChiasmError, OSError):
            continue
        pixels = np.asarray(image, dtype=np.float32).reshape(-1, 3) / 255
        vectors.append(np.concatenate([pixels.mean(0), pixels.std(0)]))
        kept.append(row)
    if not kept:
        raise InputError(f"no image of data set `{rows.name}` can be read")
    return Embeddings(np.stack(vectors), tuple(rows.samples[r].id for r in kept), space, "image", normalized=False)


def _random_encoder(seed: int) -> Encoder:
    """Return a small tower without training, the floor of an architecture: 64 px, 128 features."""
    from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig
    from chiasm.encoders.build import build_encoder_model
    from chiasm.types import Preprocess

    config = EncoderConfig(
        image=ImageTowerConfig(kind="vit", image_size=64, patch_size=8, width=128, layers=4, heads=4),
        projection=ProjectionConfig(dim=128, image="none"),
        sides="image",
        scale="none",
        preprocess=Preprocess(size=64, resize="squash", crop="none"),
    )
    return Encoder(build_encoder_model(config, seed=seed).eval(), config, name=f"random-{seed}")


def _fingerprint(source: str, family: str | None) -> str | None:
    """Return a digest of names, sizes and times of a model's files; None where they are not known."""
    from chiasm import fetch
    from chiasm.encoders.catalog import CATALOG

    path: Path | None = Path(source)
    if not Path(source).exists():
        entry = CATALOG.find(source)
        path = None if entry is None else fetch.cached(entry)
    if path is None or not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stated = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return digest_of([stated, family, chiasm.__version__], 24)


def _read_identity(path: Path) -> Identity | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Identity(**{**values, "space": Space.from_dict(values["space"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_array(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    try:
        found: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and np.isfinite(found).all() else None
