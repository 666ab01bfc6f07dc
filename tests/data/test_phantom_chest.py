"""Chest films: anatomy, convention of sides, and that every finding is where its box says, and visible there."""

import numpy as np
import pytest

from chiasm.data.phantom_chest import develop, make_anatomy, make_view, open_film
from chiasm.data.phantom_chest_findings import EXTENTS, draw_findings, plan_visits
from chiasm.data.phantom_drawing import Finding, Region
from chiasm.data.phantoms import PhantomSet, make_chest_phantoms

SEVERITIES = ("mild", "moderate", "severe")


@pytest.fixture(scope="module")
def films() -> PhantomSet:
    return make_chest_phantoms(160, seed=21, size_px=96)


def test_boxes_lie_inside_the_image_and_fit_their_masks_tightly(films: PhantomSet) -> None:
    for regions in films.regions:
        for r in regions:
            b = r.box
            assert 0 <= b.x0_px < b.x1_px <= 96
            assert 0 <= b.y0_px < b.y1_px <= 96
            assert r.crop.shape == (b.y1_px - b.y0_px, b.x1_px - b.x0_px)
            assert r.crop[0].any()
            assert r.crop[-1].any()
            assert r.crop[:, 0].any()
            assert r.crop[:, -1].any()
            whole = r.mask(96)
            assert whole.sum() == r.crop.sum()
            assert b.label == r.finding


def test_every_finding_has_a_region_on_each_of_its_sides(films: PhantomSet) -> None:
    for sample, regions in zip(films.samples, films.regions, strict=True):
        for name in ("cardiomegaly", "effusion", "pneumothorax", "consolidation", "nodule", "oedema", "device"):
            mine = [r for r in regions if r.finding == name]
            assert bool(mine) == bool(sample.labels[name]), (sample.id, name)
            if name in ("effusion", "pneumothorax", "consolidation", "nodule"):
                assert {r.side for r in mine} == {s for s in ("left", "right") if sample.labels[f"{name}_{s}"]}
        merged = films.masks(films.samples.index(sample))
        assert set(merged) == {r.finding for r in regions}


def test_the_patients_left_is_on_the_images_right(films: PhantomSet) -> None:
    hearts = []
    for regions in films.regions:
        for r in regions:
            middle = np.flatnonzero(r.mask(96).any(axis=0)).mean()
            if r.side == "left" and r.finding != "device":
                assert middle > 46
            elif r.side == "right" and r.finding != "device":
                assert middle < 50
            elif r.finding == "cardiomegaly":
                hearts.append((r.box.x0_px + r.box.x1_px) / 2)
    assert np.mean(hearts) > 51  # the apex points to the image's right


def test_the_normal_heart_lies_left_and_is_less_than_half_of_the_thorax() -> None:
    for patient in range(12):
        rng = np.random.default_rng([5, patient])
        anatomy = make_anatomy(rng)
        film = open_film(anatomy, make_view(rng, anatomy), 128)
        shadow = (film.heart > 0.5) & (film.dome > 0) & (film.y > 0.45)
        left, right = film.x[shadow].max(), -film.x[shadow].min()
        assert left > 1.2 * right
        assert 0.36 < (left + right) / (2 * anatomy.lung_width) < 0.52
        large = open_film(anatomy, make_view(np.random.default_rng(0), anatomy), 128, heart_ratio=0.65)
        shadow = (large.heart > 0.5) & (large.dome > 0) & (large.y > 0.45)
        assert (large.x[shadow].max() - large.x[shadow].min()) / (2 * anatomy.lung_width) > 0.55


def test_a_normal_film_shows_dark_lungs_bright_middle_and_dark_air_outside() -> None:
    for patient in range(8):
        rng = np.random.default_rng([6, patient])
        anatomy = make_anatomy(rng)
        view = make_view(rng, anatomy)
        film = open_film(anatomy, view, 128)
        grey = develop(film, rng).astype(float)
        lungs = grey[(film.air > 0.95) & (film.heart < 0.05)]
        heart = grey[(film.heart > 0.9) & (film.dome > 0)]
        belly = grey[(film.dome < -0.05) & (film.across < 0.2) & (film.y < 0.9)]
        assert lungs.mean() + 35 < min(heart.mean(), belly.mean())
        assert lungs.std() > 5  # ribs and vessels


def one(name: str, severity: str, side: str) -> Finding:
    kind = {"nodule": "solid", "consolidation": "patchy", "oedema": "alveolar"}.get(name, "")
    site = {"pneumothorax": "apicolateral", "nodule": "upper", "consolidation": "mid"}.get(name, "")
    extent = float(np.mean(EXTENTS[name][SEVERITIES.index(severity)]))
    place = (0.20, 0.27) if name == "nodule" else (0.24, 0.42)
    return Finding(name, side, site, severity, kind, extent, place, seed=3)


def pair(finding: Finding, patient: int) -> tuple[np.ndarray, np.ndarray, tuple[Region, ...]]:
    """The same film without and with a finding: same anatomy, exposure and grain."""
    films = []
    regions: tuple[Region, ...] = ()
    for present in (False, True):
        rng = np.random.default_rng([8, patient])
        anatomy = make_anatomy(rng)
        ratio = finding.extent if present and finding.name == "cardiomegaly" else None
        film = open_film(anatomy, make_view(rng, anatomy), 128, heart_ratio=ratio)
        if present:
            regions = draw_findings(film, [finding])
        films.append(develop(film, rng).astype(float))
    return films[0], films[1], regions


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["effusion", "pneumothorax", "consolidation", "nodule"])
def test_a_finding_changes_the_film_inside_its_mask_and_hardly_elsewhere(name: str, side: str, severity: str) -> None:
    for patient in range(3):
        without, present, (region,) = pair(one(name, severity, side), patient)
        mask = region.mask(128)
        change = present - without
        inside = change[mask].mean()
        assert mask.sum() >= 20
        if name == "pneumothorax":
            # Darker, and smoother: no vessels beyond the pleural line.
            assert inside < -4
        else:
            assert inside > 12
        half = np.zeros_like(mask)
        half[:, :58] = True
        other = half if side == "left" else half[:, ::-1]
        assert np.abs(change[other]).mean() < 1.0


@pytest.mark.parametrize("severity", SEVERITIES)
def test_oedema_brightens_both_lungs(severity: str) -> None:
    without, present, regions = pair(one("oedema", severity, "bilateral"), 1)
    assert {r.side for r in regions} == {"left", "right"}
    for r in regions:
        assert (present - without)[r.mask(128)].mean() > 10


def test_a_worse_effusion_is_larger() -> None:
    areas = [pair(one("effusion", s, "right"), 2)[2][0].crop.sum() for s in SEVERITIES]
    assert areas[0] * 1.5 < areas[1] < areas[2] / 1.3


@pytest.mark.parametrize("kind", ["pacemaker", "jugular", "subclavian"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_devices_are_brighter_than_anything_under_them_and_end_near_the_heart(kind: str, side: str) -> None:
    without, present, (region,) = pair(Finding("device", side, kind=kind, seed=4), 1)
    mask = region.mask(128)
    assert (present - without)[mask].mean() > 15
    assert np.abs((present - without)[~mask]).mean() < 0.6
    across = np.flatnonzero(mask.any(axis=0)) / 128
    # The entry lies on the side that is named; the tip crosses or touches the middle.
    assert (across.max() > 0.53) if side == "left" else (across.min() < 0.47)
    assert across.min() < 0.53
    if kind != "jugular":
        assert (across.max() > 0.68) if side == "left" else (across.min() < 0.32)


def test_nodules_have_the_size_that_was_planned() -> None:
    for severity in SEVERITIES:
        finding = one("nodule", severity, "right")
        _, _, (region,) = pair(finding, 0)
        width, height = region.crop.shape[::-1]
        assert 2 * finding.extent * 128 * 0.75 < (width + height) / 2 < 2 * finding.extent * 128 * 1.3 + 1
        assert 5 <= max(width, height) <= 15


def test_small_shadows_are_not_hidden_by_larger_ones() -> None:
    for patient in range(300):
        rng = np.random.default_rng([9, patient])
        for findings in plan_visits(rng, make_anatomy(rng), 2):
            by_name = {f.name: f for f in findings}
            assert len(findings) <= 3
            assert len(by_name) == len(findings)
            gap = by_name.get("pneumothorax")
            for f in findings:
                if gap and f.name in ("effusion", "consolidation", "nodule"):
                    assert gap.side not in f.sides
            fluid, nodule = by_name.get("effusion"), by_name.get("nodule")
            if fluid and nodule and nodule.side in fluid.sides:
                assert nodule.site != "lower"


def test_a_patient_keeps_the_anatomy_and_often_the_findings() -> None:
    kept = total = 0
    for patient in range(200):
        rng = np.random.default_rng([10, patient])
        first, second = plan_visits(rng, make_anatomy(rng), 2)
        for f in first:
            total += 1
            later = next((g for g in second if g.name == f.name), None)
            kept += later is not None
    assert 0.5 < kept / total < 0.85
    films = make_chest_phantoms(40, seed=1, size_px=64, images_per_patient=(2, 2)).images.reshape(80, -1).astype(float)
    unit = films - films.mean(1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert np.mean([alike[2 * i, 2 * i + 1] for i in range(40)]) > np.mean(alike[::2, 1::2]) + 0.03
