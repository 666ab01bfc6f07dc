"""Tissue patches: colours of H&E, one stain a patient, and that every finding is where its box says."""

import numpy as np
import pytest

from chiasm.data.phantom_drawing import Finding
from chiasm.data.phantom_tissue import draw_patch, make_stain, plan_patches
from chiasm.data.phantom_tissue_cells import gland_field, make_glands, make_nuclei, scatter, stamp
from chiasm.data.phantoms import PhantomSet, make_tissue_phantoms


@pytest.fixture(scope="module")
def patches() -> PhantomSet:
    return make_tissue_phantoms(110, seed=31, size_px=96)


def test_colours_are_those_of_haematoxylin_and_eosin(patches: PhantomSet) -> None:
    for image in patches.images.astype(float):
        red, green, blue = image.reshape(-1, 3).mean(0)
        assert red > green + 5  # pink to purple: green is what both stains absorb
        assert blue > green + 3
        assert 70 < image.mean() < 245
        grey = image.mean(2)
        dark = image[grey <= np.quantile(grey, 0.02)].mean(0)
        assert dark[2] > dark[1]  # nuclei are blue to purple
        assert dark[2] > dark[0] - 25


def test_stains_vary_between_patients_and_not_within() -> None:
    images = make_tissue_phantoms(40, seed=3, size_px=64, images_per_patient=(2, 2)).images.astype(float)
    hue = images.reshape(40, 2, -1, 3)
    # Ratio of blue to red where there is stroma or cytoplasm: independent of how many nuclei there are.
    ratio = np.array([[np.median(p[:, 2] / np.maximum(p[:, 0], 1)) for p in pair] for pair in hue])
    within = np.abs(ratio[:, 0] - ratio[:, 1]).mean()
    between = np.abs(ratio[:, 0] - np.roll(ratio[:, 1], 1)).mean()
    assert between > 1.3 * within
    assert ratio.std() > 0.03


def test_boxes_lie_inside_the_image_and_fit_their_masks(patches: PhantomSet) -> None:
    for sample, regions in zip(patches.samples, patches.regions, strict=True):
        assert {r.finding for r in regions} == {f for f in patches.findings if sample.labels[f]}
        for r in regions:
            b = r.box
            assert 0 <= b.x0_px < b.x1_px <= 96
            assert 0 <= b.y0_px < b.y1_px <= 96
            assert r.crop[0].any()
            assert r.crop[:, -1].any()
            assert r.mask(96).sum() == r.crop.sum()


def test_mitoses_are_small_lie_in_tumour_and_are_dark(patches: PhantomSet) -> None:
    seen = 0
    for row, regions in enumerate(patches.regions):
        tumour = patches.masks(row).get("tumour")
        grey = patches.images[row].astype(float).mean(2)
        for r in regions:
            if r.finding != "mitoses":
                continue
            seen += 1
            assert 5 <= max(r.crop.shape) <= 14
            assert tumour is not None
            centre = (int((r.box.y0_px + r.box.y1_px) / 2), int((r.box.x0_px + r.box.x1_px) / 2))
            assert tumour[max(0, centre[0] - 3) : centre[0] + 4, max(0, centre[1] - 3) : centre[1] + 4].any()
            assert grey[r.mask(96)].min() < np.quantile(grey, 0.10)
    assert seen > 20


def patch(*findings: Finding, seed: int = 0, size: int = 128) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    image, regions = draw_patch(rng, make_stain(np.random.default_rng(100 + seed)), findings, size)
    masks = {}
    for r in regions:
        masks[r.finding] = masks.get(r.finding, np.zeros((size, size), bool)) | r.mask(size)
    return image.astype(float), masks


@pytest.mark.parametrize("seed", range(4))
def test_findings_look_as_they_should(seed: int) -> None:
    place = {"place": (0.5, 0.5), "seed": 7}
    image, masks = patch(Finding("fat", extent=0.3, **place), seed=seed)
    assert np.median(image[masks["fat"]]) > 215  # empty glass
    image, masks = patch(Finding("lymphocytes", severity="severe", extent=0.3, **place), seed=seed)
    red = image[..., 0]
    assert red[masks["lymphocytes"]].mean() < red[~masks["lymphocytes"]].mean() - 25
    image, masks = patch(Finding("necrosis", severity="severe", extent=0.3, **place), seed=seed)
    inside = image[masks["necrosis"]].mean(0)
    assert inside[0] > inside[1] + 20  # pink
    image, masks = patch(Finding("tumour", severity="high", seed=7), seed=seed)
    assert image[masks["tumour"]].mean() < image[~masks["tumour"]].mean() - 15
    assert 0.4 < masks["tumour"].mean() < 0.9
    image, masks = patch(Finding("glands", severity="severe", extent=4.0, seed=7), seed=seed)
    assert np.quantile(image[masks["glands"]].mean(1), 0.95) > 225  # open lumina


def test_high_grade_nuclei_are_larger_and_more_uneven_than_low_grade_ones() -> None:
    rng = np.random.default_rng(0)
    points = scatter(rng, 0.1, 0.3)
    low = make_nuclei(rng, points, radius=0.0275, spread=0.09, aspect=1.2)
    high = make_nuclei(rng, points, radius=0.042, spread=0.26, aspect=1.3)
    area_low, area_high = low.radii.prod(1), high.radii.prod(1)
    assert area_high.mean() > 1.8 * area_low.mean()
    assert area_high.std() / area_high.mean() > 2 * area_low.std() / area_low.mean()


def test_points_cover_the_square() -> None:
    points = scatter(np.random.default_rng(1), 0.1, 0.3)
    for x in np.linspace(0, 1, 9):
        for y in np.linspace(0, 1, 9):
            assert np.hypot(points[:, 0] - x, points[:, 1] - y).min() < 0.13


def test_nuclei_at_the_edge_and_outside_are_clipped_not_wrapped() -> None:
    rng = np.random.default_rng(2)
    places = np.array([[0.0, 0.5], [1.0, 1.0], [-0.01, -0.01], [3.0, 0.5], [-2.0, 0.2]], dtype=np.float32)
    field = np.zeros((64, 64), dtype=np.float32)
    stamp(field, make_nuclei(rng, places, radius=0.05, spread=0.0, aspect=1.0), np.ones_like(field))
    assert field[32, 0] > 0.5
    assert field[63, 63] > 0.5
    assert field[0, 0] > 0.3
    assert field[32, 10:].max() == 0
    assert field[5:25].max() == 0
    before = field.copy()
    stamp(field, make_nuclei(rng, places[:0], radius=0.05, spread=0.0, aspect=1.0), np.ones_like(field))
    assert np.array_equal(field, before)


def test_a_stamped_nucleus_has_the_area_of_its_ellipse() -> None:
    place = np.array([[0.5, 0.5]], dtype=np.float32)
    nucleus = make_nuclei(np.random.default_rng(3), place, radius=0.1, spread=0.0, aspect=2.0)
    field = np.zeros((256, 256), dtype=np.float32)
    stamp(field, nucleus, np.ones_like(field))
    expected = np.pi * nucleus.radii.prod() * 256**2
    assert (field > 0.5 * field.max()).sum() == pytest.approx(expected, rel=0.06)


def test_benign_glands_do_not_overlap() -> None:
    for seed in range(10):
        glands = make_glands(np.random.default_rng(seed), 4, malignant=False)
        assert glands
        cover = np.zeros((96, 96))
        for g in glands:
            ratio, window = gland_field(g, 96)
            cover[window] += ratio < 0.9
        assert cover.max() == 1


def test_the_grade_belongs_to_the_patient_and_mitoses_to_tumour() -> None:
    for patient in range(200):
        planned = plan_patches(np.random.default_rng([12, patient]), 4)
        grades = {f.severity for findings in planned for f in findings if f.name == "tumour"}
        assert len(grades) <= 1
        for findings in planned:
            names = {f.name for f in findings}
            assert "mitoses" not in names or "tumour" in names
            assert not {"fat", "glands"} <= names
            assert ("high_grade" in names) == ("tumour" in names and grades == {"high"})
