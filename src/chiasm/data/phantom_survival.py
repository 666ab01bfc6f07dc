"""Survival times of synthetic patients, drawn from a hazard that is stated in full so that it can be checked.

The hazard of patient i at t days is Weibull with proportional hazards:

    h_i(t) = (k / s) (t / s)^(k - 1) exp(eta_i),    eta_i = sum_j beta_j x_ij

with shape k, scale s (days), and x_ij = 1 when finding j is in the patient's FIRST image, else 0. Hence the cumulative
hazard is H_i(t) = (t / s)^k exp(eta_i), H_i(T_i) is exponential with mean 1, and exp(beta_j) is a hazard ratio.
Censoring is independent of everything: uniform between two bounds. What is observed is the earlier of the two times,
rounded up to whole days, and whether it was the event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from chiasm.types import LabelValue


@dataclass(frozen=True)
class StatedHazard:
    """The hazard that survival times were drawn from.

    Attributes:
        shape: Weibull shape k.
        scale_days: Weibull scale s of a patient without any finding.
        coefficients: Log hazard ratio beta of each finding of the first image.
        censoring_days: Bounds of the uniform censoring time.
    """

    shape: float
    scale_days: float
    coefficients: Mapping[str, float] = field(default_factory=dict)
    censoring_days: tuple[float, float] = (365.0, 3650.0)

    def linear_predictor(self, labels: Mapping[str, LabelValue]) -> float:
        """Return eta of a patient from the labels (0/1) of the first image; higher is worse."""
        return float(sum(beta * float(labels.get(name) or 0) for name, beta in self.coefficients.items()))

    def cumulative(self, days: float, labels: Mapping[str, LabelValue]) -> float:
        """Return the cumulative hazard H(days) of a patient."""
        return float((days / self.scale_days) ** self.shape * math.exp(self.linear_predictor(labels)))

    def draw(self, rng: np.random.Generator, labels: Mapping[str, LabelValue]) -> tuple[float, float]:
        """Return the time of the event and the time of censoring, in days (only the earlier is ever seen)."""
        scaled = rng.standard_exponential() * math.exp(-self.linear_predictor(labels))
        return float(self.scale_days * scaled ** (1 / self.shape)), float(rng.uniform(*self.censoring_days))

    def observe(self, rng: np.random.Generator, labels: Mapping[str, LabelValue]) -> tuple[int, int]:
        """Return what is seen of a patient: whole days and 1 for the event or 0 for censoring."""
        event_days, censored_days = self.draw(rng, labels)
        return max(1, math.ceil(min(event_days, censored_days))), int(event_days <= censored_days)


CHEST_HAZARD = StatedHazard(
    shape=1.25,
    scale_days=4200.0,
    coefficients={
        "oedema": 1.1,
        "effusion": 0.8,
        "nodule": 0.7,
        "cardiomegaly": 0.6,
        "consolidation": 0.5,
        "device": 0.3,
        "pneumothorax": 0.2,
    },
)
TISSUE_HAZARD = StatedHazard(
    shape=1.1,
    scale_days=5000.0,
    coefficients={"tumour": 0.7, "high_grade": 0.9, "necrosis": 0.6, "mitoses": 0.4, "lymphocytes": -0.5},
)
