"""Synthetic patches of tissue in the colours of haematoxylin and eosin (H&E).

A patch is two fields of stain, haematoxylin (nuclei) and eosin (cytoplasm, collagen), turned into colour by the
Beer-Lambert law with the stain vectors of the patient's slide. Stroma, glands, tumour, lymphocytes, necrosis, fat and
mitoses are drawn procedurally; nothing is taken from real images. One patch is about 100 um wide.

References:
    Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009 (stain vectors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from chiasm.data.phantom_drawing import (
    Field,
    Finding,
    Mask,
    Region,
    coarse_noise,
    enlarge,
    make_region,
    pixel_grid,
    soft_step,
)
from chiasm.data.phantom_tissue_cells import (
    Gland,
    Nuclei,
    gland_field,
    gland_nuclei,
    look_up,
    make_glands,
    make_nuclei,
    scatter,
    stamp,
)

f32 = np.float32

HAEMATOXYLIN = (0.60, 0.72, 0.34)
EOSIN = (0.13, 0.80, 0.42)
# Probability of each finding in a patch: without tumour, with low-grade tumour, with high-grade tumour.
TISSUE_PREVALENCE = {
    "glands": (0.30, 0.55, 0.08),
    "lymphocytes": (0.24, 0.22, 0.30),
    "necrosis": (0.09, 0.14, 0.42),
    "mitoses": (0.0, 0.22, 0.78),
    "fat": (0.28, 0.10, 0.06),
}
TUMOUR_PREVALENCE = 0.40
HIGH_GRADE_SHARE = 0.50
FAT_GRID = 64  # fat cells are laid out on a coarse grid and enlarged
KEEP = 0.55  # a finding stays in the patient's next patch with this probability, else it is drawn afresh


@dataclass(frozen=True)
class Stain:
    """The stain of a patient's slide.

    Attributes:
        haematoxylin: Optical density per unit (RGB).
        eosin: Optical density per unit (RGB).
        amount: Strength of both stains.
        light: Colour of empty glass.
    """

    haematoxylin: NDArray[np.float64]
    eosin: NDArray[np.float64]
    amount: tuple[float, float]
    light: NDArray[np.float64]


def make_stain(rng: np.random.Generator) -> Stain:
    """Draw the stain of one slide: bluer, redder, paler or darker."""
    # Red is always absorbed less than green and more than blue, or the nuclei would turn green or brown.
    haematoxylin = np.clip(
        np.array(HAEMATOXYLIN) + rng.normal(0, (0.07, 0.02, 0.05)), (0.47, 0.68, 0.22), (0.63, 0.80, 0.42)
    )
    eosin = np.array(EOSIN) + rng.normal(0, (0.07, 0.03, 0.09))
    return Stain(
        haematoxylin=haematoxylin / np.linalg.norm(haematoxylin),
        eosin=np.clip(eosin, 0.03, None) / np.linalg.norm(eosin),
        amount=(float(rng.uniform(1.0, 2.1)), float(rng.uniform(0.6, 1.6))),
        light=np.array([244.0, 241.0, 243.0]) + rng.normal(0, (4, 3, 4)),
    )


def plan_patches(rng: np.random.Generator, patches: int) -> list[tuple[Finding, ...]]:
    """Draw the findings of a patient's patches; the grade is the patient's."""
    high = bool(rng.random() < HIGH_GRADE_SHARE)
    planned: list[tuple[Finding, ...]] = []
    for patch in range(patches):
        before = {f.name for f in planned[-1]} if patch else set()

        def draw(name: str, probability: float, before: set[str] = before, patch: int = patch) -> bool:
            stays, fresh = patch > 0 and rng.random() < KEEP, rng.random() < probability
            return name in before if stays and probability > 0 else fresh

        tumour = draw("tumour", TUMOUR_PREVALENCE)
        column = 0 if not tumour else 2 if high else 1
        names = ["tumour", "high_grade"][: column if tumour else 0]
        names += [name for name, chances in TISSUE_PREVALENCE.items() if draw(name, chances[column])]
        if {"fat", "necrosis"} <= set(names):
            names.remove("fat" if rng.random() < 0.5 else "necrosis")
        if {"fat", "glands"} <= set(names):
            names.remove("fat" if rng.random() < 0.5 else "glands")
        planned.append(tuple(_plan(rng, name, high=high, names=names) for name in names))
    return planned


def _plan(rng: np.random.Generator, name: str, *, high: bool, names: Sequence[str]) -> Finding:
    """Draw the place and the amount of one finding."""
    amount = int(rng.integers(3))
    severity = ("mild", "moderate", "severe")[amount]
    x, y = (float(v) for v in rng.uniform(0.20, 0.80, 2))
    if name in ("tumour", "high_grade"):
        kind = "glandular" if "glands" in names and not high else "solid" if high else "nested"
        return Finding(name, severity="high" if high else "low", kind=kind, seed=int(rng.integers(2**31)))
    extent = {
        "lymphocytes": (0.20, 0.26, 0.33),
        "necrosis": (0.21, 0.27, 0.34),
        "fat": (0.24, 0.30, 0.37),
        "mitoses": (2.0, 3.0, 5.0),
        "glands": (2.0, 3.0, 4.0) if not high else (1.0, 1.0, 2.0),
    }[name][amount]
    site = _site(x, y) if name in ("lymphocytes", "necrosis", "fat") else ""
    return Finding(name, "", site, severity, "", extent, (x, y), int(rng.integers(2**31)))


def _site(x: float, y: float) -> str:
    """Name the place of a point in the field of view."""
    if abs(x - 0.5) < 0.13 and abs(y - 0.5) < 0.13:
        return "centre"
    across = "left" if x < 0.44 else "right" if x > 0.56 else ""
    down = "upper" if y < 0.44 else "lower" if y > 0.56 else ""
    return f"{down} {across}".strip() if down or across else "centre"


@dataclass
class Patch:
    """One patch while it is composed: fields of shape (size, size).

    Attributes:
        size_px: Side of the patch.
        x: Coordinate across, shape (1, size).
        y: Coordinate down, shape (size, 1).
        haematoxylin: Stain of nuclei and basophilic cytoplasm.
        eosin: Stain of cytoplasm and collagen.
        nuclei: Haematoxylin of the nuclei alone.
        chromatin: Noise around 1 inside nuclei.
        tumour: 1 inside tumour.
        closed: 1 where no further cell may stand (lumen, fat, necrosis).
    """

    size_px: int
    x: Field
    y: Field
    haematoxylin: Field
    eosin: Field
    nuclei: Field
    chromatin: Field
    tumour: Field
    closed: Field


def open_patch(rng: np.random.Generator, size_px: int) -> tuple[Patch, float]:
    """Lay down the stroma: wavy collagen with clefts. Returns the patch and the direction of the fibres."""
    x, y = pixel_grid(size_px)
    flow = float(rng.uniform(0, math.pi))
    along = x * f32(-math.sin(flow)) + y * f32(math.cos(flow))
    warp = coarse_noise(rng, size_px, 6)
    fine = coarse_noise(rng, size_px, 20)
    fibres = np.sin(along * f32(rng.uniform(55, 95)) + f32(3.2) * warp + f32(0.9) * fine)
    fibres += f32(0.5) * np.sin(along * f32(150) + f32(5.0) * warp - f32(1.4) * fine)
    loose = rng.uniform(-0.35, 0.35)
    cleft = soft_step(-fibres - f32(0.95 - loose), 0.35)
    dense = f32(rng.uniform(0.36, 0.72))
    eosin = (dense + f32(0.10) * fibres + f32(0.07) * warp) * (f32(1) - f32(0.72) * cleft)
    shape = (size_px, size_px)
    chromatin = f32(1) + f32(0.22) * coarse_noise(rng, size_px, 72)
    return (
        Patch(
            size_px=size_px,
            x=x,
            y=y,
            haematoxylin=f32(0.05) + f32(0.02) * fine,
            eosin=eosin,
            nuclei=np.zeros(shape, dtype=f32),
            chromatin=np.clip(chromatin, f32(0.45), f32(1.5)),
            tumour=np.zeros(shape, dtype=f32),
            closed=np.zeros(shape, dtype=f32),
        ),
        flow,
    )


def _blob(patch: Patch, finding: Finding, *, soft: float) -> Field:
    """Return a ragged patch (0..1) around the place of a finding."""
    rng = np.random.default_rng(finding.seed)
    noise = coarse_noise(rng, patch.size_px, 8) * f32(0.28) + coarse_noise(rng, patch.size_px, 18) * f32(0.10)
    u = (patch.x - f32(finding.place[0])) * f32(1 / finding.extent)
    v = (patch.y - f32(finding.place[1])) * f32(1 / finding.extent)
    return soft_step(f32(0.95) - u * u - v * v + noise, soft)


def _draw_tumour(patch: Patch, rng: np.random.Generator, finding: Finding) -> None:
    """Fill nests (low grade) or sheets (high grade) with tumour cytoplasm, with a cleft around them."""
    size = patch.size_px
    noise = coarse_noise(rng, size, 4) + f32(0.45) * coarse_noise(rng, size, 10)
    high = finding.severity == "high"
    # The threshold is a rank: nests fill about half of the patch, sheets about two thirds.
    share = rng.uniform(0.58, 0.75) if high else rng.uniform(0.42, 0.60)
    level = f32(np.quantile(noise, 1 - share))
    nests = soft_step(noise - level, 0.10)
    cleft = soft_step(noise - level + f32(0.22), 0.10) - nests
    texture = coarse_noise(rng, size, 40)
    # Cytoplasm from nearly clear to pink; more basophilic in high grade.
    cytoplasm = f32(rng.uniform(0.18, 0.50)) + f32(0.06) * texture
    basophilic = f32(rng.uniform(0.08, 0.26) if high else rng.uniform(0.05, 0.18))
    patch.eosin *= f32(1) - f32(0.75) * cleft
    patch.eosin += nests * (cytoplasm - patch.eosin)
    patch.haematoxylin += nests * (basophilic + f32(0.04) * texture - patch.haematoxylin)
    np.maximum(patch.tumour, nests, out=patch.tumour)


def _tumour_nuclei(patch: Patch, rng: np.random.Generator, *, high: bool) -> Nuclei:
    """Fill the tumour with nuclei: even and small (low grade), crowded and pleomorphic (high grade)."""
    if high:
        points = scatter(rng, 0.098, 0.34)
        nuclei = make_nuclei(rng, points, radius=0.042, spread=0.26, aspect=1.3, look=(0.98, 0.20, 0.55, 1.5))
    else:
        points = scatter(rng, 0.083, 0.26)
        nuclei = make_nuclei(rng, points, radius=0.0275, spread=0.09, aspect=1.2, look=(0.92, 0.05, 0.40, 1.0))
    return nuclei.select((look_up(patch.tumour, points) > 0.6) & (look_up(patch.closed, points) < 0.4))


def _draw_gland(patch: Patch, rng: np.random.Generator, gland: Gland) -> Mask:
    """Draw one gland and return its mask."""
    ratio, window = gland_field(gland, patch.size_px)
    edge = 0.05
    body = soft_step(f32(1.0) - ratio, edge)
    lumen = soft_step(f32(gland.lumen) - ratio, 0.07)
    membrane = np.clip(f32(1) - np.abs(ratio - f32(1.04)) * f32(14), 0, 1)
    eosin, haem = patch.eosin[window], patch.haematoxylin[window]
    apical = np.clip((f32(1.0) - ratio) * f32(1.4), 0, 1)
    eosin += body * (f32(0.50 if gland.malignant else 0.46) - f32(0.16) * apical - eosin)
    haem += body * (f32(0.20 if gland.malignant else 0.10) - haem)
    eosin += membrane * (f32(0.58) - eosin) * (f32(1) - body)
    eosin *= f32(1) - lumen
    haem *= f32(1) - lumen
    np.maximum(patch.closed[window], body, out=patch.closed[window])
    if gland.malignant:
        np.maximum(patch.tumour[window], body, out=patch.tumour[window])
    patch.nuclei[window] *= f32(1) - body
    stamp(patch.nuclei, gland_nuclei(rng, gland), patch.chromatin)
    patch.nuclei[window] *= f32(1) - soft_step(f32(gland.lumen * 0.9) - ratio, 0.06)
    mask = np.zeros(patch.eosin.shape, dtype=np.bool_)
    mask[window] = body > 0.5
    return mask


def _draw_necrosis(patch: Patch, rng: np.random.Generator, area: Field) -> None:
    """Replace cells by granular pink debris with fragments of nuclei."""
    size = patch.size_px
    grain = coarse_noise(rng, size, 30) * f32(0.07) + coarse_noise(rng, size, 64) * f32(0.09)
    patch.eosin += area * (f32(0.66) + grain - patch.eosin)
    patch.haematoxylin += area * (f32(0.05) + f32(0.4) * np.abs(grain) - patch.haematoxylin)
    patch.nuclei *= f32(1) - area
    points = scatter(rng, 0.062, 0.5)
    keep = (look_up(area, points) > 0.75) & (rng.random(len(points)) < 0.34)
    dust = make_nuclei(rng, points, radius=0.0105, spread=0.35, aspect=1.3, look=(1.1, 0.1, 0.0, 0.0))
    stamp(patch.nuclei, dust.select(keep), patch.chromatin)
    np.maximum(patch.closed, area, out=patch.closed)


def _draw_fat(patch: Patch, rng: np.random.Generator, area: Field) -> None:
    """Replace tissue by empty fat cells with thin walls."""
    points = scatter(rng, 0.19, 0.16)
    x, y = pixel_grid(FAT_GRID)
    away = (x - points[:, 0, None, None]) ** 2 + (y - points[:, 1, None, None]) ** 2
    near = np.sqrt(np.partition(away, 1, axis=0)[:2])
    # The wall is where the two nearest centres are equally far: a Voronoi pattern.
    wall = np.clip(f32(1.05) - enlarge(near[1] - near[0], patch.size_px) * f32(50), 0, 1)
    hole = area * (f32(1) - wall)
    patch.eosin *= f32(1) - f32(0.98) * hole
    patch.haematoxylin *= f32(1) - f32(0.97) * hole
    patch.eosin += area * wall * (f32(0.42) - patch.eosin)
    patch.nuclei *= f32(1) - area
    np.maximum(patch.closed, area, out=patch.closed)


def _draw_lymphocytes(patch: Patch, rng: np.random.Generator, area: Field) -> None:
    """Crowd small, round, dark nuclei into an area, thinning out around it."""
    points = scatter(rng, 0.050, 0.30)
    crowd = look_up(area, points)
    keep = (rng.random(len(points)) < f32(0.04) * (crowd > 0.02) + f32(0.86) * crowd) & (
        look_up(patch.closed, points) < 0.5
    )
    cells = make_nuclei(rng, points, radius=0.0205, spread=0.08, aspect=1.06, look=(1.42, 0.0, 0.08, 0.0))
    patch.nuclei *= f32(1) - f32(0.85) * area * (patch.closed < 0.5)
    patch.eosin *= f32(1) - f32(0.30) * area
    stamp(patch.nuclei, cells.select(keep), patch.chromatin)
    np.maximum(patch.closed, area, out=patch.closed)


def _draw_vessel(patch: Patch, rng: np.random.Generator) -> None:
    """Draw a small vessel with red cells: no finding, but what every field of view has."""
    waves = np.stack([rng.normal(0, (0.22, 0.06, 0.03)), rng.uniform(0, 2 * math.pi, 3)], axis=1)
    x, y, radius, bloody = rng.uniform((0.1, 0.1, 0.045, 0.0), (0.9, 0.9, 0.085, 1.0))
    vessel = Gland((float(x), float(y)), float(radius), waves, 0.8, False)
    cells = scatter(rng, 0.048, 0.28)
    if look_up(np.maximum(patch.tumour, patch.closed), np.array([[x, y]], dtype=f32))[0] > 0.2:
        return
    ratio, window = gland_field(vessel, patch.size_px)
    body, lumen = soft_step(f32(1.0) - ratio, 0.10), soft_step(f32(0.80) - ratio, 0.12)
    patch.eosin[window] += body * (f32(0.62) - patch.eosin[window])
    patch.eosin[window] *= f32(1) - f32(0.95) * lumen
    patch.haematoxylin[window] *= f32(1) - lumen
    inside = np.hypot(cells[:, 0] - x, cells[:, 1] - y) < 0.66 * radius
    blood = np.zeros_like(patch.eosin)
    stamp(
        blood,
        make_nuclei(rng, cells, radius=0.022, spread=0.06, aspect=1.1, look=(1.2, 0.0, 0.25, 0.0)).select(
            inside & (bloody < 0.75)
        ),
        np.ones_like(blood),
    )
    np.maximum(patch.eosin, blood, out=patch.eosin)
    np.maximum(patch.closed[window], body, out=patch.closed[window])


def _draw_mitoses(patch: Patch, rng: np.random.Generator, finding: Finding) -> list[Mask]:
    """Draw mitotic figures (metaphase plates, anaphases, prometaphase clumps) in clear cells; one mask each."""
    size = patch.size_px
    candidates = rng.uniform(0.09, 0.91, (60, 2)).astype(f32)
    fits = (look_up(patch.tumour, candidates) > 0.7) & (look_up(patch.closed, candidates) < 0.3)
    order = np.concatenate([np.flatnonzero(fits), np.flatnonzero(look_up(patch.tumour, candidates) * ~fits > 0.7)])
    chosen: list[NDArray[np.float32]] = []
    for k in order:
        if len(chosen) < round(finding.extent) and all(np.hypot(*(candidates[k] - c)) > 0.17 for c in chosen):
            chosen.append(candidates[k])
    if not chosen:
        chosen = [np.array(finding.place, dtype=f32)]
    masks: list[Mask] = []
    for place in chosen:
        local = np.random.default_rng([finding.seed, len(masks)])
        away = np.hypot(patch.x - place[0], patch.y - place[1])
        clear = soft_step(f32(0.060) - away, 0.014)
        patch.nuclei *= f32(1) - clear
        patch.haematoxylin *= f32(1) - f32(0.75) * clear
        patch.eosin += clear * (f32(0.26) - patch.eosin)
        patch.eosin += f32(0.25) * np.clip(f32(1) - np.abs(away - f32(0.060)) * f32(110), 0, 1)
        figure = np.zeros((size, size), dtype=f32)
        stamp(figure, _mitotic_figure(local, place), np.clip(patch.chromatin, 0.85, 1.3))
        np.maximum(patch.nuclei, figure, out=patch.nuclei)
        masks.append(away < f32(0.058))
    return masks


def _mitotic_figure(rng: np.random.Generator, place: NDArray[np.float32]) -> Nuclei:
    """Return the dark plates or clumps of one mitosis."""
    angle = float(rng.uniform(0, math.pi))
    phase = rng.choice(["metaphase", "anaphase", "prometaphase"])
    normal = np.array([-math.sin(angle), math.cos(angle)])
    if phase == "prometaphase":
        offsets = rng.normal(0, 0.014, (5, 2))
        radii = np.tile([0.017, 0.013], (5, 1)) * rng.uniform(0.8, 1.2, (5, 1))
    else:
        apart = [0.0] if phase == "metaphase" else [-0.021, 0.021]
        offsets = np.array([normal * d for d in apart])
        radii = np.tile([0.043, 0.0135 if phase == "metaphase" else 0.0105], (len(apart), 1))
    n = len(offsets)
    dark = np.full(n, 1.75, dtype=f32)
    return Nuclei(
        place=(place + offsets).astype(f32),
        radii=radii.astype(f32),
        angle=np.full(n, angle, dtype=f32),
        density=dark,
        ragged=rng.uniform(-0.2, 0.2, n).astype(f32),
        pale=np.zeros(n, dtype=f32),
        nucleolus=np.zeros(n, dtype=f32),
    )


def draw_patch(
    rng: np.random.Generator, stain: Stain, findings: Sequence[Finding], size_px: int
) -> tuple[NDArray[np.uint8], tuple[Region, ...]]:
    """Return one patch (size, size, 3) and the true regions of its findings."""
    patch, flow = open_patch(rng, size_px)
    by_name = {f.name: f for f in findings}
    masks: list[tuple[Finding, Mask]] = []
    tumour = by_name.get("tumour")
    if tumour:
        _draw_tumour(patch, rng, tumour)
    if "glands" in by_name:
        finding = by_name["glands"]
        for gland in make_glands(rng, round(finding.extent), malignant=tumour is not None):
            masks.append((finding, _draw_gland(patch, rng, gland)))
    areas: dict[str, Field] = {}
    for name, draw in (("fat", _draw_fat), ("necrosis", _draw_necrosis)):
        if name in by_name:
            areas[name] = _blob(patch, by_name[name], soft=0.14)
            draw(patch, rng, areas[name])
    for _ in range(int(rng.integers(0, 3))):
        _draw_vessel(patch, rng)
    _draw_fibroblasts(patch, rng, flow)
    if tumour:
        stamp(patch.nuclei, _tumour_nuclei(patch, rng, high=tumour.severity == "high"), patch.chromatin)
    if "lymphocytes" in by_name:
        areas["lymphocytes"] = _blob(patch, by_name["lymphocytes"], soft=0.5)
        _draw_lymphocytes(patch, rng, areas["lymphocytes"])
    if "mitoses" in by_name:
        masks += [(by_name["mitoses"], mask) for mask in _draw_mitoses(patch, rng, by_name["mitoses"])]
    masks += [(by_name[name], area > 0.5) for name, area in areas.items()]
    masks += [(by_name[name], patch.tumour > 0.5) for name in ("tumour", "high_grade") if name in by_name]
    regions = [make_region(finding, mask) for finding, mask in masks]
    return _develop(patch, rng, stain), tuple(r for r in regions if r is not None)


def _draw_fibroblasts(patch: Patch, rng: np.random.Generator, flow: float) -> None:
    """Strew thin dark nuclei along the fibres of the stroma, and a few resting lymphocytes."""
    points = scatter(rng, float(rng.uniform(0.075, 0.14)), 0.48)
    angle = np.full(len(points), flow) + 0.25 * rng.standard_normal(len(points))
    spindles = make_nuclei(
        rng, points, radius=0.0175, spread=0.15, aspect=3.4, angle=angle.astype(f32), look=(0.95, 0.06, 0.1, 0.0)
    )
    free = (look_up(patch.tumour, points) < 0.2) & (look_up(patch.closed, points) < 0.2)
    stamp(patch.nuclei, spindles.select(free & (rng.random(len(points)) < 0.72)), patch.chromatin)


def _develop(patch: Patch, rng: np.random.Generator, stain: Stain) -> NDArray[np.uint8]:
    """Turn the two stains into colour, slightly out of focus, with the grain of a camera.

    The grain is the last thing drawn from ``rng``: everything before it is the same at any size.
    """
    uneven = f32(1) + f32(0.05) * coarse_noise(rng, patch.size_px, 3)
    strong = rng.uniform(0.85, 1.18, 2)
    focus, noise = rng.uniform(0.30, 0.75) * patch.size_px / 128, rng.uniform(1.5, 4.0)
    blue = (np.clip(patch.haematoxylin, 0, None) * f32(0.8) + patch.nuclei) * uneven * f32(stain.amount[0] * strong[0])
    pink = np.clip(patch.eosin, 0, None) * (f32(1) - f32(0.35) * np.clip(patch.nuclei, 0, 1))
    pink = pink * uneven * f32(stain.amount[1] * strong[1])
    colour = np.empty((patch.size_px, patch.size_px, 3), dtype=f32)
    for k in range(3):
        density = blue * f32(stain.haematoxylin[k]) + pink * f32(stain.eosin[k])
        colour[..., k] = f32(stain.light[k]) * np.exp(-density)
    sharp = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
    seen = np.asarray(sharp.filter(ImageFilter.GaussianBlur(focus)), dtype=f32)
    grain = rng.standard_normal(seen.shape, dtype=f32) * f32(noise)
    return np.clip(seen + grain, 0, 255).astype(np.uint8)


def make_tissue_patient(
    patient_rng: np.random.Generator, patch_rngs: Sequence[np.random.Generator], size_px: int
) -> list[tuple[NDArray[np.uint8], tuple[Finding, ...], tuple[Region, ...]]]:
    """Return image, findings and regions of every patch of one patient (one slide, one stain)."""
    stain = make_stain(patient_rng)
    patches = []
    for findings, rng in zip(plan_patches(patient_rng, len(patch_rngs)), patch_rngs, strict=True):
        image, regions = draw_patch(rng, stain, findings, size_px)
        patches.append((image, findings, regions))
    return patches
