"""Public data sets as the images of a recipe: their classes, splits and cautions, and no split that tears tiles apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiasm.datasets.miniature import make_miniature
from chiasm.datasets.named import dataset_facts
from chiasm.distill.data import data_notes, divide, open_images
from chiasm.distill.recipe import DistillData
from chiasm.errors import LeakageError


@pytest.mark.parametrize(
    ("name", "sizes", "rule"),
    [
        ("pcam", (40, 40, 40), "given by the data: val"),
        ("bach", (241, 27, 132), "held out by group"),
        ("bach-clip-it", (254, 14, 132), "given by the data: val"),
        ("crc", (144, 36, 180), "given by the data: val"),
    ],
)
@pytest.mark.filterwarnings("default:.*classes have no:UserWarning")
def test_a_data_set_is_divided_by_its_own_rule(
    name: str, sizes: tuple[int, int, int], rule: str, tmp_path: Path
) -> None:
    facts = dataset_facts(name)
    data = DistillData(source=f"{name}:{make_miniature(name, tmp_path, per_class=20, size_px=8)}")
    images = open_images(data)
    assert (images.classes, images.label, images.tissue) == (facts.classes, "label", facts.tissue)
    assert images.prompts == facts.words
    division = divide(images, data, seed=0)
    found = tuple(len(rows) for rows in (division.train, division.validation, division.test))
    assert all(abs(a - b) <= 1 for a, b in zip(found, sizes, strict=True)), found
    assert division.facts["validation"]["split"] == rule
    assert set(facts.cautions) <= set(data_notes(images, division, data))


def test_tiles_of_lc25000_are_never_torn_apart(tmp_path: Path) -> None:
    root = make_miniature("lc25000", tmp_path, per_class=20, size_px=8)
    data = DistillData(source=f"lc25000:{root}", test=0.3, validation=0.3)
    images = open_images(data)
    division = divide(images, data, seed=1)
    sides = [
        {images.table.samples[r].patient for r in rows} for rows in (division.train, division.validation, division.test)
    ]
    assert all(sides)
    assert not (sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2])
    (root / "lc25000_image_groups.csv").unlink()
    blind = open_images(data)
    with pytest.raises(LeakageError, match=r"many images of one tile, and nothing says which: `data\.test`"):
        divide(blind, data, seed=1)
    split = tuple(replace(s, split="test" if i % 2 else "train") for i, s in enumerate(blind.table.samples))
    given = replace(blind, table=replace(blind.table, samples=split))
    with pytest.raises(LeakageError, match=r"data\.validation"):
        divide(given, data, seed=1)
    assert np.array_equal(blind.labels, images.labels)
