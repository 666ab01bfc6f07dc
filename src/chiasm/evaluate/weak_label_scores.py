"""Weak labels beside given ones, finding by finding; and what a probe learns from either.

The given labels are matched by name (``rules.named``): 0/1 columns, or one column of terms joined by ``|`` such as MeSH
headings, where ``Thickening/pleura/mild`` is named by ``thickening`` and by ``thickening/pleura``. A table of terms names positives only, so what it does
not name is taken for negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets.openi import NO_STATEMENT
from chiasm.errors import InputError, missing_column
from chiasm.metrics.agreement import Agreement, agreement
from chiasm.metrics.labels import is_missing
from chiasm.tasks.weak_labels import Blank, Uncertain, WeakLabels
from chiasm.tasks.weak_rules import LabelRules, fold
from chiasm.types import Interval, LabelValue


@dataclass(frozen=True)
class WeakLabelScores:
    """Agreement of weak labels with given ones.

    Attributes:
        findings: Finding -> agreement; a finding without given labels is absent.
        uncertain: Policy for −1.
        blank: Policy for findings that a text does not name.
        kinds: Finding -> given label -> how many texts state, deny, doubt it, or do not name it: what the errors are.
    """

    findings: Mapping[str, Agreement]
    uncertain: str
    blank: str
    kinds: Mapping[str, Mapping[str, Mapping[str, int]]]

    @property
    def macro_f1(self) -> float:
        """Mean F1 over findings that have a positive."""
        known = [self.findings[name].f1.value for name in self.averaged]
        return float(np.mean(known)) if known else float("nan")

    @property
    def averaged(self) -> tuple[str, ...]:
        """Findings that :attr:`macro_f1` is a mean of."""
        return tuple(n for n, a in self.findings.items() if a.positives and np.isfinite(a.f1.value))

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of text for print: finding, positives, precision, recall, F1, F1 of always, kappa."""
        return [
            (name, f"{a.positives}/{a.n}", *(_cell(v) for v in (a.precision, a.recall, a.f1)), f"{a.always:.3f}" if a.positives else "-", _cell(a.kappa))
            for name, a in self.findings.items()
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        macro = self.macro_f1
        return {
            "findings": {name: a.to_dict() for name, a in self.findings.items()},
            "macro_f1": macro if np.isfinite(macro) else None,
            "uncertain": self.uncertain,
            "blank": self.blank,
            "kinds": {name: {g: dict(c) for g, c in kinds.items()} for name, kinds in self.kinds.items()},
        }


def score_weak_labels(
    weak: WeakLabels,
    truth: Mapping[str, NDArray[np.float64]],
    *,
    uncertain: Uncertain = "positive",
    blank: Blank = "negative",
    n_resamples: int = 1000,
    seed: int = 0,
) -> WeakLabelScores:
    """Compare weak labels with given ones.

    Args:
        weak: Of the texts.
        truth: Finding -> 0, 1 or NaN a text, from :func:`given_labels`.
        uncertain: What −1 counts as.
        blank: What a finding that is not named counts as.
        n_resamples: Bootstrap samples per interval.
        seed: Of the bootstrap.

    Raises:
        InputError: No finding has given labels, or a column of another length.
    """
    if wrong := [name for name, column in truth.items() if len(column) != len(weak.ids)]:
        raise InputError(
            f"finding `{wrong[0]}` has {len(truth[wrong[0]])} given labels for {len(weak.ids)} texts",
            hint="one label a text, NaN where it is not known",
        )
    values = weak.resolve(uncertain=uncertain, blank=blank)
    found: dict[str, Agreement] = {}
    for k, name in enumerate(weak.findings):
        if name in truth and (~np.isnan(truth[name]) & ~np.isnan(values[:, k])).any():
            found[name] = agreement(
                truth[name], values[:, k], weak.patients, n_resamples=n_resamples, seed=seed
            )  # fmt: skip
    if not found:
        raise InputError(
            "no finding has both weak and given labels", hint="name the column of terms, or `*` for columns of 0 and 1"
        )
    return WeakLabelScores(found, uncertain, blank, {name: _kinds(weak.column(name), truth[name]) for name in found})


def _kinds(values: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, dict[str, int]]:
    """Return given label -> what the texts say."""
    said = {"stated": values == 1, "denied": values == 0, "doubted": values == -1, "not named": np.isnan(values)}
    return {f"given {g}": {name: int((flags & (truth == g)).sum()) for name, flags in said.items()} for g in (1, 0)}


def given_labels(
    labels: Mapping[str, Sequence[LabelValue]], rules: LabelRules, column: str = "*"
) -> dict[str, NDArray[np.float64]]:
    """Return finding -> 0, 1 or NaN, as a table has them under other names.

    Args:
        labels: Columns of the table.
        rules: Know the names of the findings.
        column: ``*``: columns of 0 and 1 whose name is a finding's; else one column of terms joined by ``|`` (or ``;``).

    Raises:
        InputError: The column is absent, or none of its names is a finding's.
    """
    if column == "*":
        found: dict[str, NDArray[np.float64]] = {}
        for name, values in labels.items():
            finding = rules.named(name)
            flags = _flags(values)
            if finding is not None and flags is not None:
                # Several columns of one finding (nodule, mass): any of them.
                found[finding] = np.fmax(found[finding], flags) if finding in found else flags
        if not found:
            raise InputError(
                "no column of 0 and 1 has the name of a finding", hint=f"findings: {', '.join(rules.columns)}"
            )
        return found
    if column not in labels:
        raise missing_column(column, labels)
    rows = [None if is_missing(v) else _terms(str(v)) - NO_STATEMENT or None for v in labels[column]]
    known = [f for f in rules.findings if not f.hidden and f.terms]
    found = {
        f.name: np.array([np.nan if r is None else float(bool(r & {fold(f.name), *f.terms})) for r in rows])
        for f in known
    }
    if rules.no_finding:
        alone = {"normal", "no finding", fold(rules.no_finding)}
        found[rules.no_finding] = np.array([np.nan if r is None else float(bool(r & alone)) for r in rows])
    found = {name: v for name, v in found.items() if (v == 1).any()}
    if not found:
        raise InputError(
            f"no term of column `{column}` is the name of a finding", hint="add it to `terms` of the rules"
        )
    return found


def _terms(cell: str) -> set[str]:
    """Return the terms of a cell: ``Thickening/pleura/mild`` is ``thickening``, ``thickening/pleura``, ``thickening/mild``."""
    found = set()
    for part in cell.replace(";", "|").split("|"):
        head, *rest = (fold(word) for word in part.split("/"))
        found |= {head, *(f"{head}/{word}" for word in rest)} if head else set()
    return found


def _flags(values: Sequence[LabelValue]) -> NDArray[np.float64] | None:
    """Return a column of 0, 1 and blank as numbers (−1 is left out), None where it holds anything else."""
    words = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "False": 0.0, "True": 1.0, "-1": np.nan, "-1.0": np.nan}
    found = [np.nan if is_missing(v) else words.get(str(v)) for v in values]
    return None if any(v is None for v in found) else np.array(found, dtype=np.float64)


def _cell(value: Interval) -> str:
    return str(value) if np.isfinite(value.value) else "-"
