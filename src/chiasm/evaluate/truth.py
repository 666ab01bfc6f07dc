"""The truth of labels from the columns of a table: one column of class names, several names in one cell, or 0/1 columns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from chiasm.errors import InputError, missing_column
from chiasm.types import LabelValue, Sample


def truth_columns(samples: Sequence[Sample], column: str, labels: Sequence[str]) -> dict[str, tuple[LabelValue, ...]]:
    """Return the truth of each label as 0/1/None.

    ``column`` names a column of class names (``label``), one of several joined by ``|`` (``Finding Labels``), or is
    ``*``: then each label has a 0/1 column of its own name.

    Raises:
        InputError: When the column or a label's column is absent.
    """
    known = sorted({k for s in samples for k in s.labels})
    wanted = list(labels) if column == "*" else [column]
    for name in wanted:
        if name not in known:
            raise missing_column(name, known)
    if column == "*":
        return {label: tuple(s.labels.get(label) for s in samples) for label in labels}
    folded = {label: label.strip().lower() for label in labels}
    truth: dict[str, tuple[LabelValue, ...]] = {}
    rows = [None if s.labels.get(column) is None else str(s.labels[column]).lower().split("|") for s in samples]
    stated = {part.strip() for parts in rows if parts for part in parts}
    for label, name in folded.items():
        if name not in stated:
            # Whoever names a wrong column may have named one of people: its values are counted, not shown.
            near = difflib.get_close_matches(name, stated, n=1)
            flags = stated <= {"0", "1", "0.0", "1.0", "true", "false"}
            raise InputError(
                f"label `{label}` does not occur in column `{column}`"
                + (f"; did you mean `{near[0]}`?" if near else f", which holds {len(stated)} different values"),
                hint='of columns of 0 and 1, one a label, the truth is "*"; without it, one column must hold class names'
                if flags
                else "name the labels as the column does; prompts can say it otherwise in a --labels-file",
            )
        truth[label] = tuple(None if parts is None else int(name in [p.strip() for p in parts]) for parts in rows)
    return truth
