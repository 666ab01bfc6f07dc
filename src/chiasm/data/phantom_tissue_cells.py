"""Cells of the synthetic tissue patches: where nuclei stand and how they are stamped into the haematoxylin field.

All positions and radii are in the unit square of the patch. Parameters are drawn for every candidate before any is
dropped, so that the sequence of random numbers does not depend on the size in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.data.phantom_drawing import Field, Mask

f32 = np.float32
Points = NDArray[np.float32]


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of one kind, one entry each.

    Attributes:
        place: Centres (n, 2), x and y.
        radii: Half axes (n, 2), long and short.
        angle: Direction of the long axis, radians.
        density: Haematoxylin at the rim.
        ragged: How far the outline departs from an ellipse.
        pale: How much lighter the middle is (vesicular nuclei).
        nucleolus: Haematoxylin of the nucleolus, 0 for none.
    """

    place: Points
    radii: Points
    angle: Field
    density: Field
    ragged: Field
    pale: Field
    nucleolus: Field

    def select(self, keep: Mask) -> Nuclei:
        """Return the nuclei where ``keep`` holds."""
        return Nuclei(*(np.asarray(getattr(self, name))[keep] for name in self.__dataclass_fields__))


def scatter(rng: np.random.Generator, spacing: float, jitter: float) -> Points:
    """Return points (n, 2) on a jittered hexagonal grid that covers the unit square and a margin."""
    across, down = round(1 / spacing) + 3, round(1 / (spacing * 0.87)) + 3
    rows, columns = np.mgrid[0:down, 0:across].astype(f32)
    x = (columns + (rows % 2) * f32(0.5) - f32(1.0)) * f32(spacing)
    y = (rows - f32(1.0)) * f32(spacing * 0.87)
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    moved: Points = points + rng.uniform(-jitter, jitter, points.shape).astype(f32) * f32(spacing)
    return moved


def look_up(field: Field, place: Points) -> Field:
    """Return the values of a field at points of the unit square (the nearest pixel, clamped to the edge)."""
    size = len(field)
    index = np.clip((place * size).astype(np.int64), 0, size - 1)
    values: Field = field[index[:, 1], index[:, 0]]
    return values


def make_nuclei(
    rng: np.random.Generator,
    place: Points,
    *,
    radius: float,
    spread: float,
    aspect: float,
    angle: Field | None = None,
    look: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0),
) -> Nuclei:
    """Draw nuclei at the given places.

    Args:
        rng: Source of randomness.
        place: Centres (n, 2).
        radius: Mean of the geometric mean of the half axes.
        spread: Relative standard deviation of the radius (pleomorphism).
        aspect: Mean ratio of long to short axis.
        angle: Direction of the long axes; random when absent.
        look: Density, raggedness, paleness of the middle, density of the nucleolus.
    """
    n = len(place)
    size = radius * np.exp(spread * rng.standard_normal(n))
    size = np.clip(size, 0.55 * radius, 2.1 * radius)
    stretch = np.sqrt(np.clip(aspect * np.exp(0.12 * rng.standard_normal(n)), 1.0, 5.0))
    turned = rng.uniform(0, math.pi, n)
    density, ragged, pale, nucleolus = look
    if angle is not None:
        turned = angle + 0.25 * rng.standard_normal(n)
    return Nuclei(
        place=place.astype(f32),
        radii=np.stack([size * stretch, size / stretch], axis=1).astype(f32),
        angle=turned.astype(f32),
        density=(density * rng.uniform(0.8, 1.2, n)).astype(f32),
        ragged=(ragged * rng.uniform(-1, 1, n)).astype(f32),
        pale=(pale * rng.uniform(0.5, 1.3, n)).astype(f32),
        nucleolus=(nucleolus * (rng.random(n) < 0.75)).astype(f32),
    )


def stamp(haematoxylin: Field, nuclei: Nuclei, chromatin: Field) -> None:
    """Draw the nuclei into the field, keeping the darker of two that overlap.

    ``chromatin`` is noise around 1 that makes the nuclei granular.
    """
    size = len(haematoxylin)
    reach = nuclei.radii[:, 0] * f32(1.2)
    inside = (nuclei.place > -reach[:, None]) & (nuclei.place < 1 + reach[:, None])
    seen = nuclei.select(inside[:, 0] & inside[:, 1])
    if not len(seen.place):
        return
    drawn = np.zeros_like(haematoxylin)
    # Small and large nuclei apart: the window of each batch is as large as its largest nucleus.
    long = seen.radii[:, 0]
    split = long > 0.5 * (long.min() + long.max())
    batches = [seen] if len(long) < 24 or long.max() < 1.3 * long.min() else [seen.select(~split), seen.select(split)]
    for batch in batches:
        half = math.ceil(float(batch.radii.max()) * size * 1.2) + 1
        corner = np.floor(batch.place * f32(size) - f32(0.5)).astype(np.int64)
        values = _draw_nuclei(batch, corner, half, size)
        for (x, y), value in zip(corner.tolist(), values, strict=True):
            y0, x0 = max(0, y - half), max(0, x - half)
            window = drawn[y0 : y + half + 1, x0 : x + half + 1]
            piece = value[y0 - y + half :, x0 - x + half :][: window.shape[0], : window.shape[1]]
            np.maximum(window, piece, out=window)
    np.maximum(haematoxylin, drawn * chromatin, out=haematoxylin)


def _draw_nuclei(nuclei: Nuclei, corner: NDArray[np.int64], half: int, size: int) -> Field:
    """Return one window (2 half + 1 square) of haematoxylin for each nucleus, around the pixel of its centre."""
    offset = nuclei.place * f32(size) - f32(0.5) - corner.astype(f32)
    steps = np.arange(-half, half + 1, dtype=f32)
    dx = (steps[None, :] - offset[:, :1])[:, None, :]
    dy = (steps[None, :] - offset[:, 1:])[:, :, None]
    c, s = np.cos(nuclei.angle)[:, None, None], np.sin(nuclei.angle)[:, None, None]
    long, short = nuclei.radii[:, 0, None, None] * f32(size), nuclei.radii[:, 1, None, None] * f32(size)
    u, v = dx * (c / long) + dy * (s / long), dy * (c / short) - dx * (s / short)
    uu, vv = u * u, v * v
    away = uu + vv
    if nuclei.ragged.any():
        # A third harmonic without trigonometry: cos(3 t) r^3 = u^3 - 3 u v^2.
        away += nuclei.ragged[:, None, None] * u * (uu - f32(3) * vv)
    # One pixel of soft edge, whatever the size.
    edge = np.clip((f32(1) - away) * (f32(0.5) * short) + f32(0.5), 0, 1)
    inner = np.clip(away, 0, 1)
    pale = nuclei.pale[:, None, None]
    value: Field = edge * nuclei.density[:, None, None] * (f32(1) - pale + pale * inner)
    if nuclei.nucleolus.any():
        spot = np.clip(f32(1.6) - away * f32(14), 0, 1)
        np.maximum(value, spot * nuclei.nucleolus[:, None, None], out=value)
    return value


@dataclass(frozen=True)
class Gland:
    """A gland (or a malignant imitation of one): a ring of epithelium around a lumen.

    Attributes:
        centre: x and y.
        radius: Of the basement membrane, on average.
        waves: Amplitude and phase of the harmonics 2, 3 and 4 of the outline (3, 2).
        lumen: Radius of the lumen as a fraction.
        malignant: Larger, crowded, stratified nuclei.
    """

    centre: tuple[float, float]
    radius: float
    waves: NDArray[np.float64]
    lumen: float
    malignant: bool

    def outline(self, angle: Field) -> Field:
        """Return the radius of the basement membrane in each direction."""
        wave = sum(
            (a * np.cos(k * angle + p) for k, (a, p) in enumerate(self.waves.tolist(), start=2)),
            start=np.zeros_like(angle),
        )
        return np.asarray(f32(self.radius) * (f32(1) + wave), dtype=f32)


def make_glands(rng: np.random.Generator, count: int, *, malignant: bool) -> list[Gland]:
    """Draw glands that do not overlap (malignant ones may stand back to back)."""
    glands: list[Gland] = []
    low, high = (0.15, 0.25) if malignant else (0.14, 0.21)
    for _ in range(count * 14):
        if len(glands) == count:
            break
        radius = float(rng.uniform(low, high))
        centre = (float(rng.uniform(0.12, 0.88)), float(rng.uniform(0.12, 0.88)))
        wild = 0.13 if malignant else 0.05
        waves = np.stack([rng.normal(0, wild, 3) / (1, 1.5, 2), rng.uniform(0, 2 * math.pi, 3)], axis=1)
        gland = Gland(centre, radius, waves, float(rng.uniform(0.30, 0.55)), malignant)
        room = 0.95 if malignant else 1.08
        if all(math.dist(centre, g.centre) > room * (radius + g.radius) for g in glands):
            glands.append(gland)
    return glands


def gland_field(gland: Gland, size_px: int) -> tuple[Field, tuple[slice, slice]]:
    """Return the distance from the centre as a fraction of the outline, in the window around the gland."""
    reach = gland.radius * 1.55
    x0, x1 = (int(np.clip((gland.centre[0] + d) * size_px, 0, size_px)) for d in (-reach, reach))
    y0, y1 = (int(np.clip((gland.centre[1] + d) * size_px, 0, size_px)) for d in (-reach, reach))
    dx = ((np.arange(x0, x1, dtype=f32) + f32(0.5)) / f32(size_px) - f32(gland.centre[0]))[None, :]
    dy = ((np.arange(y0, y1, dtype=f32) + f32(0.5)) / f32(size_px) - f32(gland.centre[1]))[:, None]
    ratio: Field = np.sqrt(dx * dx + dy * dy) / gland.outline(np.arctan2(dy, dx))
    return ratio, (slice(y0, y1), slice(x0, x1))


def gland_nuclei(rng: np.random.Generator, gland: Gland) -> Nuclei:
    """Line the gland with nuclei: one basal row in a benign gland, crowded uneven rows in a malignant one."""
    rows = [(0.80, 0.0)] if not gland.malignant else [(0.86, 0.05), (0.66, 0.06)]
    places, angles = [], []
    for level, loose in rows:
        step = 0.042 if not gland.malignant else 0.052
        count = max(5, round(2 * math.pi * gland.radius * level / step))
        turn = (np.arange(count) + rng.uniform(-0.22, 0.22, count)) * (2 * math.pi / count)
        away = gland.outline(turn.astype(f32)) * (level + loose * rng.standard_normal(count))
        places.append(np.stack([gland.centre[0] + away * np.cos(turn), gland.centre[1] + away * np.sin(turn)], axis=1))
        angles.append(turn)
    place, angle = np.concatenate(places).astype(f32), np.concatenate(angles).astype(f32)
    if gland.malignant:
        return make_nuclei(
            rng, place, radius=0.0285, spread=0.16, aspect=1.5, angle=angle, look=(1.02, 0.08, 0.35, 1.25)
        )
    return make_nuclei(rng, place, radius=0.0215, spread=0.07, aspect=1.65, angle=angle, look=(1.0, 0.0, 0.2, 0.0))
