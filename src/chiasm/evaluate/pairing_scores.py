"""How good are pairs: similarities, margins, hubs, beside what the same reports give when they are dealt out at random.

Comes in: a :class:`~chiasm.pairing.PairingRun`, and labels for the audit. Goes out: frozen :class:`PairingScores`. Labels
are compared with finished pairs; nothing computed here goes back into them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError
from chiasm.metrics.pairing import Agreement, Hubness, count_images, hubness, label_agreement, quantiles
from chiasm.tasks.pairing import shuffled_reports, similarity_of
from chiasm.types import LabelValue, Sample

if TYPE_CHECKING:
    from chiasm.pairing import PairingRun


@dataclass(frozen=True)
class Audit:
    """Agreement of reports with a label that the pairing never saw.

    Attributes:
        column: Name of the label.
        pairs: Of the pairs.
        shuffled: Of the same reports dealt out at random.
    """

    column: str
    pairs: Agreement
    shuffled: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {"column": self.column, "pairs": self.pairs.to_dict(), "shuffled": self.shuffled.to_dict()}


@dataclass(frozen=True)
class PairingScores:
    """What pairs look like.

    Attributes:
        images: That could be read.
        paired: Of them, with a report.
        rejected: Images that could not be read.
        reports: In the corpus.
        distinct_reports: With a text of their own.
        chunks: Of the distinct reports.
        long_reports: Distinct reports that were longer than the context.
        similarity: float32, (images,): of the best report of each image, also where it was too low.
        random_similarity: float32, (images,): of the report that an image got when the best reports were dealt out at
            random; NaN for images without a report.
        margin: float32, (images,).
        loads: int64, (distinct reports,): images whose best report it is.
        random_loads: The same when each paired image draws a report at random.
        hubness: Of ``loads``.
        random_hubness: Of ``random_loads``.
        chosen_chunks: Chunks of the chosen reports, mean over paired images; NaN without any.
        nearer_than_random: Share of paired images whose report is nearer than the one dealt out at random; ½ by chance.
        min_similarity: What a pair had to reach; None: nothing.
        shared_patients: Patients that have an image and a report; None where one side does not name patients.
        audit: None unless labels were given.
    """

    images: int
    paired: int
    rejected: int
    reports: int
    distinct_reports: int
    chunks: int
    long_reports: int
    similarity: NDArray[np.float32]
    random_similarity: NDArray[np.float32]
    margin: NDArray[np.float32]
    loads: NDArray[np.int64]
    random_loads: NDArray[np.int64]
    hubness: Hubness
    random_hubness: Hubness
    chosen_chunks: float
    nearer_than_random: float
    min_similarity: float | None
    shared_patients: int | None = None
    audit: Audit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return counts, quantiles and scores as plain JSON values; no ids, no texts."""
        return {
            "images": self.images,
            "paired": self.paired,
            "unpaired": self.images - self.paired,
            "rejected": self.rejected,
            "reports": self.reports,
            "distinct_reports": self.distinct_reports,
            "long_reports": self.long_reports,
            "chunks": self.chunks,
            "min_similarity": self.min_similarity,
            "similarity": _known(quantiles(self.similarity)),
            "random_similarity": _known(quantiles(self.random_similarity)),
            "nearer_than_random": self.nearer_than_random if math.isfinite(self.nearer_than_random) else None,
            "margin": _known(quantiles(self.margin)),
            "hubness": self.hubness.to_dict(),
            "random_hubness": self.random_hubness.to_dict(),
            "chosen_chunks": self.chosen_chunks if math.isfinite(self.chosen_chunks) else None,
            "mean_chunks": self.chunks / self.distinct_reports,
            "shared_patients": self.shared_patients,
            "audit": None if self.audit is None else self.audit.to_dict(),
        }


def score_pairing(
    run: PairingRun,
    *,
    samples: Sequence[Sample] = (),
    audit_label: str | None = None,
    seed: int = 0,
    permutations: int = 500,
) -> PairingScores:
    """Measure pairs, and the same pairs shuffled.

    Args:
        run: From :func:`chiasm.pairing.pair_reports`.
        samples: The images with their labels and patients; used for the audit and to count shared patients.
        audit_label: Column of labels to compare with.
        seed: Of what is dealt out at random and of the null.
        permutations: Of the null.

    Raises:
        InputError: No image has such a label.
    """
    pairing = run.pairing
    mixed = shuffled_reports(pairing, seed=seed)
    random_similarity = similarity_of(
        run.images, run.chunks, mixed, report_of=run.report_of, aggregate=run.pairs.header.aggregate  # type: ignore[arg-type]
    )  # fmt: skip
    distinct, sizes = np.unique(run.report_of, return_counts=True)
    loads = count_images(pairing.report_rows[:, 0], len(run.corpus))[distinct]
    paired = int(pairing.paired.sum())
    random_loads = count_images(np.random.default_rng(seed).integers(0, len(distinct), paired), len(distinct))
    own = pairing.similarity[:, 0][pairing.paired]
    other = random_similarity[pairing.paired]
    nearer = float(((own > other) + 0.5 * (own == other)).mean()) if paired else math.nan
    audit = None
    if audit_label is not None:
        labels, groups = _labels(samples, pairing.image_ids, audit_label)
        audit = Audit(
            audit_label,
            label_agreement(pairing.report_rows[:, 0], labels, groups=groups, permutations=permutations, seed=seed),
            label_agreement(mixed, labels, groups=groups, permutations=permutations, seed=seed),
        )
    return PairingScores(
        images=len(pairing),
        paired=paired,
        rejected=len(run.rejected),
        reports=len(run.corpus),
        distinct_reports=len(distinct),
        chunks=len(run.chunks),
        long_reports=int((sizes > 1).sum()),
        similarity=pairing.best_similarity,
        random_similarity=random_similarity,
        margin=pairing.margin,
        loads=loads,
        random_loads=random_loads,
        hubness=hubness(loads),
        random_hubness=hubness(random_loads),
        chosen_chunks=float(loads @ sizes / loads.sum()) if paired else math.nan,
        nearer_than_random=nearer,
        min_similarity=pairing.min_similarity,
        shared_patients=_shared_patients(run, samples),
        audit=audit,
    )


def _shared_patients(run: PairingRun, samples: Sequence[Sample]) -> int | None:
    of_images = {s.patient for s in samples if s.patient is not None}
    of_reports = {r.patient for r in run.corpus if r.patient is not None}
    return len(of_images & of_reports) if of_images and of_reports else None


def _labels(samples: Sequence[Sample], ids: Sequence[str], column: str) -> tuple[list[LabelValue], list[Hashable]]:
    by_id = {s.id: s for s in samples}
    known = sorted({name for s in samples for name in s.labels})
    if column not in known:
        raise InputError(f"the images have no label column `{column}`", hint=f"columns: {', '.join(known) or 'none'}")
    found = [by_id[name] for name in ids]
    return [s.labels.get(column) for s in found], [s.group for s in found]


def _known(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
