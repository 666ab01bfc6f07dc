"""Figures of prompts: deterministic drawings that bear gaps, single labels and long names."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chiasm.evaluate.prompts_figures import arms_per_label, cosine_matrix, losses, short, validation_against_test
from chiasm.types import Interval

NAN = math.nan


def number(value: float, *, gap: bool = False) -> Interval:
    return Interval(value, NAN if gap else value - 0.1, NAN if gap else value + 0.1, 9, 0.5)


def is_svg(text: str) -> bool:
    return (
        text.startswith("<svg")
        and text.rstrip().endswith("</svg>")
        and "nan" not in text.lower().replace("finance", "")
    )


def test_arms_stand_beside_each_other() -> None:
    values = {
        "oedema": {"chosen": number(0.8), "all": number(0.7)},
        "nodule": {"chosen": number(0.6), "all": number(0.5)},
    }
    drawn = arms_per_label(values, xlabel="AUROC")
    assert is_svg(drawn)
    assert drawn == arms_per_label(values, xlabel="AUROC")
    other = {**values, "nodule": {"chosen": number(0.65), "all": number(0.5)}}
    assert drawn != arms_per_label(other, xlabel="AUROC")


def test_a_number_without_an_interval_is_drawn_as_a_dot() -> None:
    with_gap = arms_per_label({"a": {"chosen": number(0.8, gap=True)}}, xlabel="AUROC")
    whole = arms_per_label({"a": {"chosen": number(0.8)}}, xlabel="AUROC")
    assert is_svg(with_gap)
    assert len(with_gap) < len(whole)


@pytest.mark.parametrize("count", [1, 2, 14, 40])
def test_cosines_of_few_and_of_many_labels(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = [f"label {k} with a name that is far too long for an axis" for k in range(count)]
    drawn = cosine_matrix((rows @ rows.T).tolist(), labels)
    assert is_svg(drawn)


def test_points_without_a_score_are_left_out() -> None:
    points = {"a": [(0.6, 0.5), (0.7, 0.72)], "b": [], "c": [(NAN, 0.5)]}
    assert is_svg(validation_against_test({"a": points["a"], "b": points["b"]}, metric="AUROC"))
    assert validation_against_test(points, metric="AUROC").startswith("<svg")
    assert is_svg(validation_against_test({}, metric="AUROC"))


def test_losses_without_validation_have_one_curve() -> None:
    both = losses([{"train_loss": 1.0, "validation_loss": 1.2}, {"train_loss": 0.5, "validation_loss": 0.9}], 1)
    one = losses([{"train_loss": 1.0, "validation_loss": NAN}, {"train_loss": 0.5, "validation_loss": NAN}], 1)
    assert is_svg(both)
    assert is_svg(one)
    assert len(one) < len(both)


def test_long_names_are_cut_at_a_word() -> None:
    assert short("a chest film") == "a chest film"
    cut = short("word " * 40)
    assert len(cut) <= 46
    assert cut.endswith(" …")
