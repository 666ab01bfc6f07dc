"""What a search for prompts found: the choice, what it is worth on other patients, and how much of it is luck.

Frozen results of ``tasks.prompt_search``; pages and commands read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chiasm.metrics.compare import PairedTest
from chiasm.tasks.prompt_grid import Metric
from chiasm.tasks.prompts import PromptSet
from chiasm.tasks.zero_shot import Mode
from chiasm.types import Interval


@dataclass(frozen=True)
class Single:
    """One option on its own, with all options of the other kind."""

    option: str
    kind: str
    validation: float
    test: float


@dataclass(frozen=True)
class ProblemSearch:
    """What the search found for one label, or for all classes together.

    Attributes:
        name: The label.
        templates: Chosen templates (of the first class, where classes share them).
        synonyms: Chosen names: label -> names.
        prompts: The chosen prompts of its labels.
        candidates: Choices that there are.
        tried: Choices that were scored.
        searched: Whether the rows that choose have both classes; if not, the plain ensemble is kept.
        validation: Score of the winner on the rows that chose it.
        validation_plain: Of the plain ensemble there.
        test: Score of the winner on the other rows, with interval.
        test_plain: Of the plain ensemble there.
        difference: Winner less plain ensemble on the other rows; p by Holm over the labels.
        optimism: ``validation`` less ``test`` of the winner; patients of both sides are drawn.
        reselected: 5th, 50th and 95th percentile of what the winners of redrawn validation patients score on test.
        winner_share: Share of the redraws in which the same choice wins.
        winners: Different choices that win at least once.
        option_share: Option -> share of the redraws whose winner has it.
        singles: Every option on its own: the spread of single templates and names.
        majority: Score of always saying the most frequent class, where that is not chance.
    """

    name: str
    templates: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]]
    prompts: PromptSet
    candidates: int
    tried: int
    searched: bool
    validation: Interval
    validation_plain: Interval
    test: Interval
    test_plain: Interval
    difference: PairedTest
    optimism: Interval
    reselected: tuple[float, float, float]
    winner_share: float
    winners: int
    option_share: dict[str, float]
    singles: tuple[Single, ...]
    majority: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        intervals = ("validation", "validation_plain", "test", "test_plain", "difference", "optimism")
        kept = ("name", "candidates", "tried", "searched", "winner_share", "winners", "option_share", "majority")
        return {
            **{name: getattr(self, name) for name in kept},
            "templates": list(self.templates),
            "synonyms": {label: list(names) for label, names in self.synonyms.items()},
            **{name: getattr(self, name).to_dict() for name in intervals},
            "reselected": list(self.reselected),
            "singles": [vars(single) for single in self.singles],
        }


@dataclass(frozen=True)
class PromptSearch:
    """The result of a search over all labels.

    Attributes:
        mode: ``multi`` or ``single``.
        metric: What was maximised.
        problems: One a label in ``multi``, one in ``single``.
        prompts: The chosen prompts of all labels.
        plain: The plain ensemble.
        test: Mean over the labels of the winners' test score.
        test_plain: Of the plain ensemble.
        difference: The first less the second, on the same resamples of patients.
        p_value: Of no difference, by the resamples.
        optimism: Mean over the labels.
        choose_rows: Rows that chose.
        test_rows: Rows that score.
        choose_patients: Patients among the first.
        test_patients: Patients among the second.
    """

    mode: Mode
    metric: Metric
    problems: tuple[ProblemSearch, ...]
    prompts: PromptSet
    plain: PromptSet
    test: Interval
    test_plain: Interval
    difference: Interval
    p_value: float
    optimism: float
    choose_rows: int
    test_rows: int
    choose_patients: int
    test_patients: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the chosen prompts in chiasm's own form."""
        counts = ("choose_rows", "test_rows", "choose_patients", "test_patients", "p_value", "optimism")
        return {
            "mode": self.mode,
            "metric": self.metric,
            **{name: getattr(self, name) for name in counts},
            **{name: getattr(self, name).to_dict() for name in ("test", "test_plain", "difference")},
            "problems": [p.to_dict() for p in self.problems],
            "prompts": self.prompts.to_dict(),
        }
