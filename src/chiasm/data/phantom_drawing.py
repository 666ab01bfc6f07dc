"""Primitives that the synthetic phantoms are drawn with: soft edges, coarse noise, strokes, blurs and regions.

Everything works on float32 fields of shape (size, size) in a unit square, (0, 0) at the top left, so that a phantom
looks the same at any size; only the last grain of noise is drawn per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from chiasm.types import Box

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Strokes are drawn larger and then averaged down: thin lines keep their weight below one pixel.
SUPERSAMPLE = 3


@dataclass(frozen=True)
class Finding:
    """One finding as it was planned, before any pixel: what the label, the report and the drawing agree on.

    Attributes:
        name: Key of the finding (``effusion``); several findings of one name may occur in one image.
        side: ``left``, ``right`` or ``bilateral`` of the patient, empty where there is no side.
        site: Zone or place in words (``upper``, ``apical`` ...), empty where there is none.
        severity: ``mild``, ``moderate`` or ``severe`` (the report has its own words for each), empty where unused.
        kind: Variant (``pacemaker``, ``catheter`` ...), empty where there is one only.
        extent: Size in the unit of its drawing, from the finding's own range.
        place: Position (across, down), in the unit of its drawing.
        seed: Shape of the outline: kept between the visits of a patient.
    """

    name: str
    side: str = ""
    site: str = ""
    severity: str = ""
    kind: str = ""
    extent: float = 0.0
    place: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    @property
    def sides(self) -> tuple[str, ...]:
        """The single sides that it touches."""
        return ("left", "right") if self.side == "bilateral" else (self.side,) if self.side else ()


@dataclass(frozen=True)
class Region:
    """Where a finding lies in one image: its true box and mask.

    Attributes:
        finding: Key of the finding, also the label of ``box``.
        side: Side of this region; a bilateral finding has one region a side.
        site: As planned.
        severity: As planned.
        box: Tight around the mask, in image pixels, right and bottom exclusive.
        crop: The mask inside the box.
    """

    finding: str
    side: str
    site: str
    severity: str
    box: Box
    crop: Mask = field(repr=False)

    def mask(self, size_px: int) -> Mask:
        """Return the mask on the whole image."""
        whole = np.zeros((size_px, size_px), dtype=np.bool_)
        y0, x0 = int(self.box.y0_px), int(self.box.x0_px)
        whole[y0 : y0 + self.crop.shape[0], x0 : x0 + self.crop.shape[1]] = self.crop
        return whole


def make_region(finding: Finding, mask: Mask, *, side: str | None = None) -> Region | None:
    """Return the region of a mask, or None when the mask is empty (the finding lies outside the image)."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return Region(
        finding=finding.name,
        side=finding.side if side is None else side,
        site=finding.site,
        severity=finding.severity,
        box=Box(float(x0), float(y0), float(x1), float(y1), finding.name),
        crop=np.ascontiguousarray(mask[y0:y1, x0:x1]),
    )


def pixel_grid(size_px: int) -> tuple[Field, Field]:
    """Return the coordinates of the pixel centres in the unit square: x of shape (1, size), y of shape (size, 1)."""
    centres = (np.arange(size_px, dtype=np.float32) + np.float32(0.5)) / np.float32(size_px)
    return centres[None, :], centres[:, None]


def soft_step(distance: Field, width: float) -> Field:
    """Return 0 where ``distance`` < -width, 1 where it is > width, and a smooth ramp between."""
    t = np.clip(distance * np.float32(0.5 / width) + np.float32(0.5), 0, 1)
    ramp: Field = t * t * (np.float32(3) - np.float32(2) * t)
    return ramp


def coarse_noise(rng: np.random.Generator, size_px: int, cells: int) -> Field:
    """Return smooth noise of about unit variance that varies over 1/cells of the image, the same at any size."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return enlarge(grid, size_px)


def enlarge(grid: Field, size_px: int) -> Field:
    """Return a coarse field enlarged to (size, size) by bicubic interpolation."""
    image = Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def blur(values: Field, radius_px: float) -> Field:
    """Return the field blurred by an (approximate) Gaussian; values must lie in [0, 1] and are kept to 1/255."""
    image = Image.fromarray((np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius_px)), dtype=np.float32) * np.float32(1 / 255)


@dataclass
class Strokes:
    """Lines, discs and polygons that are collected in the unit square and averaged down once.

    Attributes:
        size_px: Side of the field that :meth:`field` returns.
    """

    size_px: int

    def __post_init__(self) -> None:
        self._side = self.size_px * SUPERSAMPLE
        self._image = Image.new("L", (self._side, self._side))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[tuple[float, float]] | NDArray[np.floating], width: float, value: float) -> None:
        """Draw a polyline of the given width (unit square) and value (0..1)."""
        flat = (np.asarray(points, dtype=np.float64) * self._side).ravel().tolist()
        thick = max(1, round(width * self._side))
        self._draw.line(flat, fill=round(255 * value), width=thick, joint="curve" if thick > 4 else None)

    def segments(
        self, points: NDArray[np.floating], widths: NDArray[np.floating], values: NDArray[np.floating]
    ) -> None:
        """Draw many single segments: points (n, 2, 2), one width and one value each."""
        flat = (points.reshape(-1, 4) * self._side).tolist()
        thick = np.maximum(1, np.rint(widths * self._side)).astype(np.int64).tolist()
        ink = np.rint(np.minimum(values, 1) * 255).astype(np.int64).tolist()
        line = self._draw.line
        for ends, width, fill in zip(flat, thick, ink, strict=True):
            line(ends, fill, width)

    def disc(self, centre: tuple[float, float], radius: float, value: float) -> None:
        """Draw a filled disc."""
        (x, y), r = (centre[0] * self._side, centre[1] * self._side), radius * self._side
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=round(255 * value))

    def polygon(self, points: NDArray[np.floating], value: float) -> None:
        """Draw a filled polygon."""
        self._draw.polygon(
            (np.asarray(points, dtype=np.float64) * self._side).ravel().tolist(), fill=round(255 * value)
        )

    def field(self) -> Field:
        """Return what was drawn, in [0, 1], shape (size, size)."""
        small = self._image.reduce(SUPERSAMPLE)
        return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)


def smooth_curve(knots: Sequence[tuple[float, float]], steps: int = 8) -> NDArray[np.float64]:
    """Return points on the Catmull-Rom curve through the knots, ends included."""
    points = np.asarray(knots, dtype=np.float64)
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - 3 * c + d - a) * t**3))
    return np.vstack([*pieces, points[-1:]])
