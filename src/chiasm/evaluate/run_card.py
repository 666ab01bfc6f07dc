"""What a result was computed from: data, split, weights, prompts, settings, versions, seed and time, as digests.

Comes in: the embeddings (or samples) and settings of a run. Goes out: a :class:`RunCard` that every result carries in
its JSON and every page prints at its end. It holds digests and counts, never an identifier of a patient: two runs with
equal cards saw the same rows, in the same parts, through the same model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from chiasm import __version__
from chiasm.evaluate.page import Section, Table
from chiasm.types import Embeddings, digest_of

#: Packages whose version can change a number.
PACKAGES = ("numpy", "scipy", "scikit-learn", "torch")


@dataclass(frozen=True)
class RunCard:
    """What a number rests on.

    Attributes:
        command: What was run, as a person would type it, without paths of the machine.
        data: Name -> digest of the rows (ids, vectors, groups, labels) that entered.
        rows: Name -> how many rows that were.
        split: Digest of which row was in which part, or None where there are no parts.
        model: The space, ``encoder@weights.preprocessing/dim``, with the precision unless that is fp32; or a sentence.
        prompts: Digest of the prompts, or None.
        settings: Every setting that can change the numbers, as JSON values.
        seed: Of everything drawn at random.
        seconds: Wall time, or None.
        versions: Package -> version.
    """

    command: str
    data: Mapping[str, str]
    rows: Mapping[str, int]
    model: str
    seed: int
    split: str | None = None
    prompts: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Short hash of all but command, time and versions: equal for a repeated run."""
        kept = ("data", "rows", "model", "seed", "split", "prompts", "settings")
        return digest_of({name: getattr(self, name) for name in kept})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the digest as plain JSON values."""
        return {**dataclasses.asdict(self), "digest": self.digest}

    def section(self) -> Section:
        """Return the end of a page: a table of all fields."""
        rows: list[tuple[object, ...]] = [("command", self.command), ("model", self.model)]
        rows += [
            (f"rows of {name}", f"{self.rows.get(name, 0):,}, digest {digest}") for name, digest in self.data.items()
        ]
        rows += [("split", self.split)] if self.split else []
        rows += [("prompts", self.prompts)] if self.prompts else []
        rows += [(name, value) for name, value in self.settings.items()]
        rows += [("seed", self.seed)]
        rows += [("time", f"{self.seconds:.1f} s")] if self.seconds is not None else []
        rows += [("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())), ("card", self.digest)]
        return Section(
            title="Run card",
            intro="What the numbers were computed from. A repeated run has the same card.",
            blocks=(Table(columns=("what", "value"), rows=tuple(rows)),),
        )


def make_run_card(
    command: str,
    embeddings: Mapping[str, Embeddings],
    *,
    seed: int,
    split: Sequence[object] | None = None,
    prompts: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> RunCard:
    """Return the card of a run on embeddings.

    Args:
        command: What was run, without paths.
        embeddings: Name (``images``, ``texts``) -> the rows that entered.
        seed: Of everything drawn at random.
        split: The part of each row.
        prompts: The sentences, where there were some.
        settings: Everything else that can change a number, as JSON values.
        seconds: Wall time.
    """
    spaces = dict.fromkeys(
        str(e.space) + ("" if e.precision == "fp32" else f" in {e.precision}") for e in embeddings.values()
    )
    return RunCard(
        command=command,
        data={name: digest_of_rows(e) for name, e in embeddings.items()},
        rows={name: len(e) for name, e in embeddings.items()},
        model=", ".join(spaces) or "none",
        seed=seed,
        split=None if split is None else digest_of([None if part is None else str(part) for part in split]),
        prompts=None if prompts is None else digest_of(list(prompts)),
        settings=dict(settings or {}),
        seconds=seconds,
        versions=package_versions(),
    )


def digest_of_rows(embeddings: Embeddings) -> str:
    """Return 12 hex digits over ids, groups, labels and the vectors rounded to float16, in their order.

    Vectors whose largest number float16 cannot hold are divided by it first.
    """
    named = {
        "ids": list(embeddings.ids),
        "patients": list(embeddings.patients or ()),
        "labels": {name: [v if v is None else str(v) for v in column] for name, column in embeddings.labels.items()},
    }
    digest = hashlib.sha256(digest_of(named, 64).encode())
    vectors = embeddings.vectors
    largest = float(np.abs(vectors[np.isfinite(vectors)]).max(initial=0.0))
    if largest and not 1e-3 < largest < 6e4:  # numbers of a table that float16 cannot hold
        digest.update(f"{largest:.3e}".encode())
        vectors = vectors / np.float32(largest)
    digest.update(vectors.astype("<f2").tobytes())
    return digest.hexdigest()[:12]


def package_versions() -> dict[str, str]:
    """Return the versions of chiasm, Python and the packages that can change a number."""
    found = {"chiasm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
