"""A data set in memory: samples, the rows that were rejected, and how its columns were understood.

Everything is a value: filters, splits and templates return a new `Dataset` and leave a trace in ``rejected``.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from chiasm.datasets.columns import Columns, is_missing
from chiasm.errors import InputError, UnknownName
from chiasm.io.manifest import Rejected, summarize_rejected, to_json
from chiasm.types import LabelValue, Sample

_NO_LETTERS = string.whitespace + string.punctuation

#: Captions that are instructions to the author, not captions.
PLACEHOLDERS = (
    r"replace this\b",
    r"(please )?(insert|add|enter|type|click)\b.{0,20}\b(caption|description|text|title|here)\b",
    r"(no|without)?\s*(caption|description|title|text|report|image|figure|placeholder)?[\W_]*$",
    r"(todo|tbd|tba|untitled|test|xxx+|lorem ipsum.*)\W*$",
)


@dataclass(frozen=True)
class Dataset:
    """Samples that can be used and rows that cannot.

    Attributes:
        samples: In the order of the source; ids are unique.
        rejected: Rows left out, with the reason; callers write them to ``rejected.jsonl``.
        name: Of the file or folder.
        columns: How a table was understood; None for folders and shards.
    """

    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...] = ()
    name: str = ""
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if len({s.id for s in self.samples}) != len(self.samples):
            raise InputError(f"ids of `{self.name}` are not unique")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, row: int) -> Sample:
        return self.samples[row]

    @cached_property
    def digest(self) -> str:
        """Short hash of ids, texts, groups, labels and splits; it does not depend on where the files lie."""
        hasher = hashlib.sha256()
        for s in self.samples:
            row = [s.id, s.text, s.patient, s.study, s.slide, s.split, dict(sorted(s.labels.items()))]
            hasher.update(to_json(row).encode() + b"\n")
        return hasher.hexdigest()[:12]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the given splits, sorted."""
        return tuple(sorted({s.split for s in self.samples if s.split}))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of all labels, in order of appearance."""
        return tuple(dict.fromkeys(k for s in self.samples for k in s.labels))

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each sample that must stay on one side of a split."""
        return tuple(s.group for s in self.samples)

    def labels(self, name: str) -> tuple[LabelValue, ...]:
        """Return one label of every sample; None means "not labelled".

        Raises:
            UnknownName: No sample has this label.
        """
        if name not in self.label_names:
            raise UnknownName("label", name, self.label_names, hint=f"labels: {', '.join(self.label_names[:12])}")
        return tuple(s.labels.get(name) for s in self.samples)

    def select(self, rows: Sequence[int]) -> Dataset:
        """Return the samples at these rows, in that order; rejected rows are kept in the record."""
        return replace(self, samples=tuple(self.samples[r] for r in rows))

    def subset(self, split: str) -> Dataset:
        """Return the samples of one given split.

        Raises:
            UnknownName: The data set has no such split.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none; make one with `split_by_group`"
            raise UnknownName("split", split, self.splits, hint=f"splits of `{self.name}`: {known}")
        return self.select([i for i, s in enumerate(self.samples) if s.split == split])

    def with_text(self, template: str) -> Dataset:
        """Return the samples with texts made from a template such as ``a histology patch of {label_name}``.

        Holes are names of labels, or ``caption``/``text`` for the present text. A sample with a blank in a hole is
        rejected.

        Raises:
            UnknownName: A hole names no label.
            InputError: The template is malformed, or fits no sample.
        """
        fill = parse_template(template, (*self.label_names, "caption", "text"))

        def render(sample: Sample) -> Sample | None:
            text = fill(lambda hole: sample.labels.get(hole, sample.text if hole in ("caption", "text") else None))
            return None if text is None else replace(sample, text=text)

        return self._keep(render, "a hole of the text template is blank")

    def filter_texts(self, *, min_words: int = 0, placeholders: Sequence[str] = PLACEHOLDERS) -> Dataset:
        """Return the samples without placeholder captions and without captions under ``min_words`` words.

        Args:
            min_words: Words separated by white space; samples without text count as having none.
            placeholders: Regular expressions, matched from the first letter of the text without case.
        """
        pattern = re.compile("|".join(f"(?:{p})" for p in placeholders), re.IGNORECASE) if placeholders else None
        kept = self._keep(
            lambda s: None if pattern and s.text is not None and pattern.match(s.text.lstrip(_NO_LETTERS)) else s,
            "text is a placeholder",
        )
        return kept._keep(
            lambda s: s if len((s.text or "").split()) >= min_words else None, f"text has fewer than {min_words} words"
        )

    def _keep(self, change: Callable[[Sample], Sample | None], reason: str) -> Dataset:
        pairs = [(row, sample, change(sample)) for row, sample in enumerate(self.samples, start=1)]
        rejected = tuple(Rejected(row, old.id, reason) for row, old, new in pairs if new is None)
        samples = tuple(new for _, _, new in pairs if new is not None)
        if not samples and self.samples:
            raise InputError(f"no sample of `{self.name}` is left: {summarize_rejected(rejected)}")
        return replace(self, samples=samples, rejected=self.rejected + rejected)


def parse_template(template: str, known: Sequence[str]) -> Callable[[Callable[[str], object]], str | None]:
    """Return a function that fills the holes ``{name}`` of a template from a lookup, or gives None on a blank.

    Only plain names are holes: no attributes, indices or format codes, so a template cannot reach into objects.

    Raises:
        InputError: Braces do not match, or there is no hole.
        UnknownName: A hole is not in ``known``.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"text template is malformed: {error}", hint="holes look like {label_name}") from None
    holes = [hole for _, hole, _, _ in parts if hole is not None]
    if not holes or any(spec or conversion for _, _, spec, conversion in parts):
        raise InputError("text template has no plain hole", hint="holes look like {label_name}")
    for hole in holes:
        if hole not in known:
            raise UnknownName("hole of the text template", hole, known, hint=f"known: {', '.join(known[:12])}")

    def fill(value_of: Callable[[str], object]) -> str | None:
        out = []
        for literal, hole, _, _ in parts:
            out.append(literal)
            if hole is not None:
                value = value_of(hole)
                if is_missing(value):
                    return None
                out.append(str(value).strip())
        return "".join(out)

    return fill
