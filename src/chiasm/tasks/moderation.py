"""Which images may enter: a policy of texts, scores, a decision for each image, and the evidence for it.

In: a :class:`Policy` (texts that describe each category, texts against it, thresholds, an action) and image embeddings.
Out: a frozen :class:`ModerationResult`: for each image ``reject``, ``review`` or ``accept``, and for each category which
text is nearest, at which cosine, and how far the score lies from the threshold.

The score of a category is the cosine of its nearest text less that of the nearest text against it; without texts against
it the cosine alone. From ``threshold`` on the category's action is taken, from ``review`` to ``threshold`` a person must
look. Of several categories the strictest answer counts: reject, then review, then accept, then the policy's default.

A threshold of 0 says "nearer to these texts than to those" and was chosen by nobody; how often that is right depends on
the model, so thresholds are fitted on labelled validation images (:func:`fit_policy`) and then belong to one space. A
model scores only what it has seen the like of: whatever a chest-film model is shown, some chest text is nearest.
``tasks.domain`` asks the images instead of the texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.config import read_toml, to_toml
from chiasm.errors import InputError, SpaceMismatch
from chiasm.metrics.bootstrap import Floats
from chiasm.tasks.operating_point import choose_band, choose_threshold
from chiasm.tasks.zero_shot import check_images, embed_prompts, unit_vectors
from chiasm.types import Embeddings, Space, digest_of

Action = Literal["reject", "review", "accept"]
ACTIONS: tuple[Action, ...] = ("reject", "review", "accept")
"""From the strictest to the mildest."""

_CATEGORY_FIELDS = {"action", "texts", "against", "threshold", "review", "fitted"}
_POLICY_FIELDS = {"name", "default", "categories", "fitted"}


@dataclass(frozen=True)
class Category:
    """One kind of image that a policy looks for.

    Attributes:
        name: Unique in the policy.
        texts: Describe it; the nearest one counts.
        against: Describe what it is not; the nearest one is taken off.
        action: What happens to an image of it.
        threshold: Score from which the action is taken.
        review: Score from which a person must look; None: the same as ``threshold``.
        fitted: Where the thresholds come from; empty when a person wrote them.
    """

    name: str
    texts: tuple[str, ...]
    against: tuple[str, ...] = ()
    action: Action = "reject"
    threshold: float = 0.0
    review: float | None = None
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"category `{self.name}`"
        if not self.name.strip() or not self.texts:
            raise InputError(f"{what} has no name or no text", hint='texts = ["a photograph of a person"]')
        if any(not isinstance(t, str) or not t.strip() for t in (*self.texts, *self.against)):
            raise InputError(f"{what} has an empty text")
        if set(self.texts) & set(self.against):
            raise InputError(f"{what} has the same text for and against it")
        if self.action not in ACTIONS:
            raise InputError(f"{what} has the action `{self.action}`", hint=f"one of {', '.join(ACTIONS)}")
        for value in (self.threshold, *(() if self.review is None else (self.review,))):
            if isinstance(value, bool) or not isinstance(value, int | float) or not -2 <= value <= 2:
                raise InputError(f"thresholds of {what} are differences of cosines, in [-2, 2]; got {value}")
        if self.review is not None and self.review > self.threshold:
            raise InputError(
                f"{what} is reviewed from {self.review} on, which lies above its threshold {self.threshold}"
            )

    @property
    def lower(self) -> float:
        """Score from which anything happens."""
        return self.threshold if self.review is None else self.review

    def to_dict(self) -> dict[str, Any]:
        """Return the fields but the name as plain values."""
        found = {"action": self.action, "texts": list(self.texts), "against": list(self.against),
                 "threshold": self.threshold, "review": self.review, "fitted": dict(self.fitted) or None}  # fmt: skip
        return {k: v for k, v in found.items() if v is not None}


@dataclass(frozen=True)
class Policy:
    """Categories and what happens when none is found.

    Attributes:
        name: Of the policy.
        categories: At least one, with unique names.
        default: Decision when no category is found.
        space: That fitted thresholds belong to; None when none was fitted.
    """

    name: str
    categories: tuple[Category, ...]
    default: Action = "accept"
    space: Space | None = None

    def __post_init__(self) -> None:
        names = [c.name for c in self.categories]
        if not names:
            raise InputError("the policy has no category", hint='[categories."no chest film"]')
        if len(set(names)) < len(names):
            raise InputError("two categories of the policy have one name")
        if self.default not in ACTIONS:
            raise InputError(f"the policy's default is `{self.default}`", hint=f"one of {', '.join(ACTIONS)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The categories' names, in order."""
        return tuple(c.name for c in self.categories)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every distinct text once, in order of first appearance."""
        return tuple(dict.fromkeys(t for c in self.categories for t in (*c.texts, *c.against)))

    @property
    def digest(self) -> str:
        """Short hash that changes with anything in the policy."""
        return digest_of(self.to_dict())

    @property
    def by_hand(self) -> tuple[str, ...]:
        """Categories whose thresholds were fitted to nothing."""
        return tuple(c.name for c in self.categories if not c.fitted)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as :func:`read_policy` reads it."""
        values: dict[str, Any] = {"name": self.name, "default": self.default}
        if self.space is not None:
            values["fitted"] = {"space": self.space.to_dict()}
        return {**values, "categories": {c.name: c.to_dict() for c in self.categories}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`; unknown fields raise ``InputError``."""
        _check_fields(values, _POLICY_FIELDS, "the policy")
        listed = values.get("categories")
        if not isinstance(listed, Mapping):
            raise InputError("the policy has no category", hint='[categories."no chest film"]')
        categories = []
        for name, given in listed.items():
            if not isinstance(given, Mapping):
                raise InputError(f"category `{name}` must be a table", hint=f'[categories."{name}"]')
            _check_fields(given, _CATEGORY_FIELDS, f"category `{name}`")
            plain: dict[str, Any] = {"texts": ()}
            plain |= {k: _texts(v, name) if k in ("texts", "against") else v for k, v in given.items()}
            categories.append(Category(name=str(name), **plain))
        fitted = values.get("fitted") or {}
        try:
            space = Space.from_dict(fitted["space"]) if fitted else None
        except (KeyError, TypeError) as error:
            raise InputError("the policy's `fitted.space` is damaged", hint="fit it anew, or leave it out") from error
        return cls(str(values.get("name", "policy")), tuple(categories), values.get("default", "accept"), space)


def read_policy(path: str | Path) -> Policy:
    """Return the policy of a TOML file.

    Raises:
        InputError: For unknown fields or values that make no sense; also for a file that does not exist.
        ConfigError: For a file that is no TOML.
    """
    return Policy.from_dict(read_toml(path))


def policy_text(policy: Policy) -> str:
    """Return the policy as TOML that :func:`read_policy` reads back."""
    return to_toml(policy.to_dict())


@dataclass(frozen=True, eq=False)
class PolicyVectors:
    """A policy with the unit vectors of its texts; made by :func:`embed_policy`."""

    policy: Policy
    vectors: NDArray[np.float32]
    space: Space

    def rows(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of these texts of the policy."""
        number = {text: k for k, text in enumerate(self.policy.texts)}
        return self.vectors[[number[t] for t in texts]]


def embed_policy(policy: Policy, embed_text: Callable[[list[str]], Embeddings]) -> PolicyVectors:
    """Embed every distinct text of a policy once.

    Args:
        policy: Its texts are embedded.
        embed_text: Texts to embeddings, one row per text in the same order.

    Raises:
        SpaceMismatch: When the policy's thresholds were fitted in another space.
        InputError: When the embeddings do not fit the texts.
    """
    embedded = embed_prompts(list(policy.texts), embed_text)
    if policy.space is not None and policy.space != embedded.space:
        raise SpaceMismatch(
            f"the policy's thresholds were fitted in `{policy.space}`, this model is `{embedded.space}`",
            hint="fit the policy for this model: `chiasm moderate --fit`",
        )
    return PolicyVectors(policy, unit_vectors(embedded, "policy"), embedded.space)


@dataclass(frozen=True)
class Evidence:
    """Why a category says what it says about one image.

    Attributes:
        category: Its name.
        verdict: Its action, ``review``, or None where it says nothing.
        score: Cosine of the nearest text less that of the nearest text against it.
        margin: Score less the score from which anything happens; below 0 nothing does.
        text: The nearest text of the category.
        cosine: With it.
        against: The nearest text against it, where there are such texts.
        against_cosine: With it.
    """

    category: str
    verdict: Action | None
    score: float
    margin: float
    text: str
    cosine: float
    against: str | None
    against_cosine: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class ModerationResult:
    """A decision and its evidence for each image.

    Attributes:
        policy: That was applied.
        scores: float64 (images, categories).
        nearest: int (images, categories): the category's nearest text.
        nearest_against: int (images, categories): the nearest text against it; -1 without such texts.
        cosines: float64 (images, categories), with ``nearest``.
        against_cosines: float64 (images, categories); 0 without such texts.
        decisions: One action an image.
        deciding: (images,) the category that decided; -1 where the default did.
        ids: One per image.
        groups: Patient (or id) of each image.
        space: Where images and texts were compared.
        paths: Image path of each row, where known.
    """

    policy: Policy
    scores: Floats
    nearest: NDArray[np.int64]
    nearest_against: NDArray[np.int64]
    cosines: Floats
    against_cosines: Floats
    decisions: tuple[Action, ...]
    deciding: NDArray[np.int64]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    space: Space
    paths: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def evidence(self, row: int) -> tuple[Evidence, ...]:
        """Return what each category says about an image, in the policy's order."""
        found = []
        for k, category in enumerate(self.policy.categories):
            score, other = float(self.scores[row, k]), int(self.nearest_against[row, k])
            found.append(
                Evidence(
                    category.name,
                    verdict_of(category, score),
                    score,
                    score - category.lower,
                    category.texts[int(self.nearest[row, k])],
                    float(self.cosines[row, k]),
                    category.against[other] if other >= 0 else None,
                    float(self.against_cosines[row, k]) if other >= 0 else None,
                )
            )
        return tuple(found)

    def to_records(self, *, flat: bool = False) -> list[dict[str, Any]]:
        """Return one record an image: id, decision and all evidence; ``flat``: that of the deciding category only.

        Where the default decided, the flat record shows the category that came nearest to saying something.
        """
        records = []
        for i, name in enumerate(self.ids):
            evidence = self.evidence(i)
            k = int(self.deciding[i])
            head: dict[str, Any] = {"id": name, "decision": self.decisions[i], "because": None}
            if k >= 0:
                head["because"] = self.policy.categories[k].name
            if flat:
                shown = evidence[k] if k >= 0 else max(evidence, key=lambda e: e.margin)
                records.append({**head, **{f: v for f, v in shown.to_dict().items() if f != "verdict"}})
            else:
                records.append({**head, "evidence": [e.to_dict() for e in evidence]})
        return records

    def counts(self) -> dict[str, int]:
        """Return how many images got each decision."""
        return {action: sum(d == action for d in self.decisions) for action in ACTIONS}


def verdict_of(category: Category, score: float) -> Action | None:
    """Return what a category says at a score: its action, ``review``, or None."""
    if score >= category.threshold:
        return category.action
    return "review" if score >= category.lower else None


def moderate(images: Embeddings, policy: PolicyVectors) -> ModerationResult:
    """Decide about images by a policy.

    Args:
        images: Image embeddings, raw or normalised.
        policy: From :func:`embed_policy`, in the same space.

    Raises:
        SpaceMismatch: When images and texts come from two spaces.
        InputError: When vectors are damaged or of texts.
    """
    check_images(images, policy.space)
    vectors = unit_vectors(images, "image").astype(np.float64)
    shape = (len(images), len(policy.policy.categories))
    cosines, others = np.zeros(shape), np.zeros(shape)
    nearest, against = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for k, category in enumerate(policy.policy.categories):
        own = vectors @ policy.rows(category.texts).T
        nearest[:, k], cosines[:, k] = own.argmax(axis=1), own.max(axis=1)
        if category.against:
            other = vectors @ policy.rows(category.against).T
            against[:, k], others[:, k] = other.argmax(axis=1), other.max(axis=1)
    scores = cosines - others
    decisions, deciding = _decide(policy.policy, scores)
    return ModerationResult(policy.policy, scores, nearest, against, cosines, others, decisions, deciding, images.ids,
                            images.groups, images.space, images.paths)  # fmt: skip


def select_rows(result: ModerationResult, rows: Sequence[int]) -> ModerationResult:
    """Return the result of these images."""
    index = np.asarray(rows, dtype=np.int64)
    names = ("scores", "nearest", "nearest_against", "cosines", "against_cosines", "deciding")
    return dataclasses.replace(
        result,
        **{name: getattr(result, name)[index] for name in names},
        decisions=tuple(result.decisions[i] for i in rows),
        ids=tuple(result.ids[i] for i in rows),
        groups=tuple(result.groups[i] for i in rows),
        paths=None if result.paths is None else tuple(result.paths[i] for i in rows),
    )


def redecide(result: ModerationResult, policy: Policy) -> ModerationResult:
    """Return the result under other thresholds of the same categories and texts.

    Raises:
        InputError: When categories or texts differ.
    """
    same = [(c.name, c.texts, c.against) for c in policy.categories]
    if same != [(c.name, c.texts, c.against) for c in result.policy.categories]:
        raise InputError("the other policy has other categories or texts", hint="score the images with it")
    decisions, deciding = _decide(policy, result.scores)
    return dataclasses.replace(result, policy=policy, decisions=decisions, deciding=deciding)


def _decide(policy: Policy, scores: Floats) -> tuple[tuple[Action, ...], NDArray[np.int64]]:
    """Return the strictest verdict of each row and the category that gave it by the largest margin."""
    lower = np.array([c.lower for c in policy.categories])
    decisions: list[Action] = []
    deciding = np.full(len(scores), -1, dtype=np.int64)
    for i, row in enumerate(scores):
        verdicts = [verdict_of(c, float(s)) for c, s in zip(policy.categories, row, strict=True)]
        strictest = next((a for a in ACTIONS if a in verdicts), None)
        decisions.append(policy.default if strictest is None else strictest)
        if strictest is not None:
            margins = np.where([v == strictest for v in verdicts], row - lower, -np.inf)
            deciding[i] = int(margins.argmax())
    return tuple(decisions), deciding


def fit_policy(
    result: ModerationResult,
    truth: Mapping[str, ArrayLike],
    *,
    sensitivity: float = 0.95,
    specificity: float = 0.95,
    conservative: bool = False,
    data: str = "",
) -> tuple[Policy, dict[str, str]]:
    """Return the policy with thresholds chosen on labelled validation images.

    A category without ``review`` gets the threshold that finds a share ``sensitivity`` of its images. One with ``review``
    gets the band below which that share is not missed and above which a share ``specificity`` of the others is left alone.

    Args:
        result: Of the validation images.
        truth: Category -> (images,) 0, 1 or NaN/None; categories that are absent keep their thresholds.
        sensitivity: See above.
        specificity: See above.
        conservative: As :func:`chiasm.tasks.operating_point.choose_threshold`.
        data: Digest of the images, for the record.

    Returns:
        The policy, bound to the result's space, and category -> why it could not be fitted.
    """
    fitted, refused = [], {}
    for k, category in enumerate(result.policy.categories):
        if category.name not in truth:
            fitted.append(category)
            refused[category.name] = "no image has a truth of it"
            continue
        labels, scores = np.asarray(truth[category.name], dtype=object), result.scores[:, k]
        try:
            point = choose_threshold(scores, labels, sensitivity=sensitivity, conservative=conservative)
            facts = {"sensitivity": sensitivity, "positives": point.positives, "negatives": point.negatives,
                     "conservative": conservative, "data": data}  # fmt: skip
            if category.review is None:
                fitted.append(dataclasses.replace(category, threshold=point.threshold, fitted=facts))
                continue
            band = choose_band(scores, labels, sensitivity=sensitivity, specificity=specificity,
                               conservative=conservative)  # fmt: skip
            facts["specificity"] = specificity
            fitted.append(dataclasses.replace(category, threshold=band.high, review=band.low, fitted=facts))
        except InputError as error:
            fitted.append(category)
            refused[category.name] = error.message
    made = dataclasses.replace(result.policy, categories=tuple(fitted), space=result.space)
    return (made if any(c.fitted for c in made.categories) else result.policy), refused


def _check_fields(values: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(f"{what} has the unknown field `{unknown[0]}`", hint=f"fields: {', '.join(sorted(known))}")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InputError(f"texts of category `{name}` must be a list", hint='texts = ["a photograph of a person"]')
    return tuple(value)
