"""The one tree of errors that chiasm raises for what a user can cause.

A message says what is wrong, what was got and what was expected. ``hint`` holds one action that mends it; the
command line prints it on a line of its own. No message carries patient data: paths are shortened to their file
name by the callers that handle clinical files, and values of text columns never appear.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ChiasmError(Exception):
    """Base of every error that chiasm raises on purpose.

    Args:
        message: What is wrong, what was got, what was expected; one sentence, no trailing full stop.
        hint: One action that mends it, without the word "hint".
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class InputError(ChiasmError, ValueError):
    """A value, a table or an image that the user gave cannot be used."""


class FileFormatError(ChiasmError):
    """A file is damaged or is not of the format that it should be."""


def missing_column(name: str, known: Iterable[str], *, of: str = "the table has") -> InputError:
    """Return the error for a label column that does not exist: the nearest name, and all that there are."""
    columns = sorted(known)
    folded = {other.casefold(): other for other in columns}
    given = name.casefold()
    near = difflib.get_close_matches(given, list(folded), n=1, cutoff=0.75) or [c for c in folded if given in c]
    meant = f"; did you mean `{folded[near[0]]}`?" if near and given else ""
    return InputError(f"{of} no label column `{name}`{meant}", hint=f"columns: {', '.join(columns) or 'none'}")


class UnknownName(ChiasmError, LookupError):
    """A name is not registered; the message suggests the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        message = f"unknown {kind} `{name}`"
        folded = {other.casefold(): other for other in sorted(known, reverse=True)}
        near = [folded[k] for k in difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)]
        if near:
            message += f"; did you mean `{near[0]}`?"
        super().__init__(message, hint=hint)
        self.name = name
        self.suggestion = near[0] if near else None


class SpaceMismatch(ChiasmError):
    """Embeddings of two spaces were about to be compared; their similarity has no meaning."""


class CheckpointError(ChiasmError):
    """A weight file cannot be read, is foreign or does not fit the model."""


class ConfigError(ChiasmError):
    """A recipe or a configuration value is wrong; the message names the dotted field."""


class PrecisionRefused(ChiasmError):
    """A precision is too far from float32 on the user's own images; no vectors of it are given."""


class LeakageError(InputError):
    """Patients, studies, slides or near-identical images lie on both sides of a split."""


class TrainingError(ChiasmError):
    """Training cannot go on (a loss that is not a number, say); the last good checkpoint is kept."""


class MissingExtra(ChiasmError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: The package that is missing.
        extra: The extra of chiasm that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"`{package}` is not installed", hint=f"pip install 'chiasm[{extra}]'")
        self.package = package
        self.extra = extra
