"""What is known about a public data set before anything is read: classes, sizes, splits, licence, where it comes from.

Facts are values beside the reader of each data set; `chiasm.datasets.named` puts them into one table. A fact that
nobody could verify is left out, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from chiasm.errors import InputError

ValRule = Literal["official", "reference", "none"]
Kind = Literal["classes", "findings"]


@dataclass(frozen=True)
class DatasetFacts:
    """One public data set.

    Attributes:
        name: By which `chiasm.datasets.named.open_dataset` opens it.
        title: The name it was published under.
        classes: Values of the label ``label``, where the place of a class is its number; or, of ``findings``, the labels
            themselves, each 1, 0 or None.
        words: Class -> what to call it in a prompt, the first one preferred.
        tile_px: Width and height of an image; None where they differ.
        magnification: Of the objective that the pixels correspond to, ``20x``; None where unknown.
        um_per_px: Micrometres per pixel; None where unknown.
        sizes: Split -> number of images of the complete data set.
        val: Where the ``val`` split comes from: ``official`` from the data set's authors, ``reference`` made by the
            rule of CLIP-IT's reference code, ``none``: hold out a part of ``train``.
        split_rule: How the splits come about.
        licence: Of the images.
        page: Where to get it.
        citation: Whom to cite.
        layout: What lies where, one line.
        tissue: Keyword that picks reports of the same tissue out of a corpus by their site; None: of several tissues.
        cautions: What a reader of a result must know.
        sources: Field -> where its facts were read.
        needs_groups: Whether a split by image leaks unless the caller groups images first.
        kind: ``classes``: every image has one class, the label ``label``. ``findings``: several labels an image, each
            named as in ``classes``: 1 present, 0 absent, None not labelled.
        columns: Labels beside the classes: age, sex, view ..., for tables of subgroups.
        texts: Whether samples may have texts.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    tile_px: tuple[int, int] | None
    magnification: str | None
    um_per_px: float | None
    sizes: Mapping[str, int]
    val: ValRule
    split_rule: str
    licence: str
    page: str
    citation: str
    layout: str
    tissue: str | None
    cautions: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    needs_groups: bool = False
    kind: Kind = "classes"
    columns: tuple[str, ...] = ()
    texts: bool = False

    def class_number(self, label: str) -> int:
        """Return the number of a class.

        Raises:
            InputError: The data set has no such class.
        """
        if label not in self.classes:
            raise InputError(f"`{self.name}` has no class `{label}`", hint=f"classes: {', '.join(self.classes)}")
        return self.classes.index(label)

    def missing(self, what: str, *, hint: str | None = None) -> InputError:
        """Return the error for a file or folder that is not there: which, from where, and where it should lie.

        Args:
            what: Sentence about the file, ``file `x.h5` is missing``.
            hint: What to do instead of downloading.
        """
        return InputError(
            f"{self.title}: {what}; expected {self.layout}", hint=hint or f"get the data set from {self.page}"
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise when an option has none of its values.

    Raises:
        InputError: With the values that it may have.
    """
    if value not in known:
        raise InputError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got `{value}`")
