"""Synthetic frontal chest radiographs: anatomy of a patient, geometry of a film, attenuation to grey values.

Radiological convention: the patient faces the reader, so the patient's LEFT is on the image's RIGHT side and the heart
apex points to the image's right.

A film is a sum of attenuations, as in the physics: soft tissue, minus the air of the lungs, plus bone, heart, fluid and
metal; then a film curve, a collimator and noise. Findings change the sum (fluid displaces air, a pneumothorax removes
the vessels), so they overlap as shadows do. Body coordinates: x = 0 at the spine, positive towards the patient's left,
y = 0 at the top of the film, one unit = the side of the film at zoom 1. Nothing here is taken from real images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.data.phantom_drawing import Field, Strokes, coarse_noise, pixel_grid, soft_step

f32 = np.float32


@dataclass(frozen=True)
class ChestAnatomy:
    """What stays the same in all films of a patient (lengths in body units).

    Attributes:
        woman: Breast shadows are drawn.
        habitus: 0 thin to 1 obese: width of the chest wall, haze, contrast.
        lung_width: Half the inner width of the thorax.
        lung_top: Height of the lung apices.
        dome: Height of the right diaphragm dome; the left one lies ``dome_step`` lower.
        dome_step: See ``dome``.
        dome_depth: How far the costophrenic angle lies below the dome.
        heart_ratio: Width of the heart / inner width of the thorax, without disease.
        mediastinum: Half the width of the upper mediastinum.
        knob: Radius of the aortic knob.
        rib_gap: Distance between two ribs.
        rib_phase: Offset of the ribs, in gaps.
        rib_slope: How steeply the anterior ribs descend.
        bone: Density of bone.
        spine_bend: Sideways bend of the spine.
        stomach: Radius of the gastric bubble, 0 for none.
        vessels: Segments (n, 2 points, 2) of the pulmonary vessels of both lungs.
        vessel_widths: Their widths (n,).
    """

    woman: bool
    habitus: float
    lung_width: float
    lung_top: float
    dome: float
    dome_step: float
    dome_depth: float
    heart_ratio: float
    mediastinum: float
    knob: float
    rib_gap: float
    rib_phase: float
    rib_slope: float
    bone: float
    spine_bend: float
    stomach: float
    vessels: NDArray[np.float64]
    vessel_widths: NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """How one film was taken: geometry, exposure, noise.

    Attributes:
        turn: Rotation in the film plane, radians.
        zoom: Magnification.
        shift: Offset of the body, in film sides.
        breath: How far the domes stand above full inspiration.
        centre: Attenuation shown as middle grey.
        contrast: Slope of the film curve.
        noise: Standard deviation of the grain, grey values.
        frame: Width of the collimator on the four sides.
        frame_grey: Grey value of the collimated border.
        marker: Whether the lead marker L is in the picture.
    """

    turn: float
    zoom: float
    shift: tuple[float, float]
    breath: float
    centre: float
    contrast: float
    noise: float
    frame: tuple[float, float, float, float]
    frame_grey: int
    marker: bool

    def to_image(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map body coordinates (..., 2) to the unit square of the film."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        x, y = points[..., 0], points[..., 1] - 0.5
        return np.stack(
            [
                0.5 + self.shift[0] + self.zoom * (c * x - s * y),
                0.5 + self.shift[1] + self.zoom * (s * x + c * y),
            ],
            axis=-1,
        )

    def to_body(self, size_px: int) -> tuple[Field, Field]:
        """Return the body coordinates of every pixel."""
        ix, iy = pixel_grid(size_px)
        c, s = math.cos(self.turn), math.sin(self.turn)
        p, q = (ix - f32(0.5 + self.shift[0])) / f32(self.zoom), (iy - f32(0.5 + self.shift[1])) / f32(self.zoom)
        return p * f32(c) + q * f32(s), q * f32(c) - p * f32(s) + f32(0.5)


def make_anatomy(rng: np.random.Generator) -> ChestAnatomy:
    """Draw the anatomy of one patient."""
    habitus = float(rng.beta(1.6, 2.2))
    segments, widths = _make_vessels(rng)
    return ChestAnatomy(
        woman=bool(rng.random() < 0.48),
        habitus=habitus,
        lung_width=rng.uniform(0.335, 0.385),
        lung_top=rng.uniform(0.085, 0.125),
        dome=rng.uniform(0.665, 0.745) - 0.03 * habitus,
        dome_step=rng.uniform(0.008, 0.038),
        dome_depth=rng.uniform(0.075, 0.125),
        heart_ratio=rng.uniform(0.41, 0.48),
        mediastinum=rng.uniform(0.058, 0.074) + 0.012 * habitus,
        knob=rng.uniform(0.028, 0.043),
        rib_gap=rng.uniform(0.066, 0.078),
        rib_phase=rng.uniform(),
        rib_slope=rng.uniform(0.16, 0.26),
        bone=rng.uniform(0.075, 0.125),
        spine_bend=rng.normal(0, 0.006),
        stomach=rng.uniform(0.025, 0.055) if rng.random() < 0.6 else 0.0,
        vessels=segments,
        vessel_widths=widths,
    )


def make_view(rng: np.random.Generator, anatomy: ChestAnatomy) -> View:
    """Draw the geometry and the exposure of one film."""
    frame = rng.uniform(0.0, 0.045, 4) * (rng.random(4) < 0.4)
    return View(
        turn=rng.normal(0, 0.025),
        zoom=rng.uniform(0.96, 1.13),
        shift=(rng.normal(0, 0.014), rng.normal(0.0, 0.016)),
        breath=float(abs(rng.normal(0, 0.018))),
        centre=rng.uniform(0.56, 0.74) + 0.04 * anatomy.habitus,
        contrast=rng.uniform(3.6, 6.0) - 1.0 * anatomy.habitus,
        noise=rng.uniform(2.0, 5.0) + 2.5 * anatomy.habitus,
        frame=(float(frame[0]), float(frame[1]), float(frame[2]), float(frame[3])),
        frame_grey=int(rng.choice([4, 10, 22])),
        marker=bool(rng.random() < 0.6),
    )


def _make_vessels(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Grow the pulmonary vessels from both hila outwards; every branch bends, forks and thins out."""
    starts, angles = [], []
    for side in (-1.0, 1.0):
        fan = np.linspace(-1.3, 1.5, 8) + rng.normal(0, 0.12, 8)
        for angle in fan:
            starts.append((side * (0.062 + 0.028 * math.cos(angle)), 0.395 - 0.01 * side + 0.075 * math.sin(angle)))
            angles.append(angle if side > 0 else math.pi - angle)
    at, angle = np.array(starts), np.array(angles)
    length, width = rng.uniform(0.028, 0.045, len(at)), rng.uniform(0.0085, 0.0145, len(at))
    bend = rng.normal(0, 0.22, len(at))
    segments, thick = [], []
    for step in range(9):
        end = at + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        segments.append(np.stack([at, end], axis=1))
        thick.append(width)
        fork = np.flatnonzero(rng.random(len(at)) < (0.62 if step < 6 else 0.3))
        turn = rng.uniform(0.35, 0.9, len(fork)) * rng.choice([-1.0, 1.0], len(fork))
        bend = 0.75 * bend + rng.normal(0, 0.11, len(bend))
        at = np.concatenate([end, end[fork]])
        angle = np.concatenate([angle + bend, angle[fork] + turn])
        length = np.concatenate([length, length[fork] * 0.9])
        width = np.concatenate([width * 0.85, width[fork] * 0.62])
        bend = np.concatenate([bend, -0.4 * turn])
        thin = width > 0.0019
        at, angle, length, width, bend = at[thin], angle[thin], length[thin], width[thin], bend[thin]
    return np.concatenate(segments), np.concatenate(thick)


@dataclass
class Film:
    """One film while it is composed: fields of shape (size, size) in body coordinates.

    Attributes:
        anatomy: Of the patient.
        view: Geometry of the film.
        size_px: Side of the film.
        x: Body coordinate, positive towards the patient's left.
        y: Body coordinate, downwards.
        across: Distance from the spine.
        is_left: 1 on the patient's left, else 0.
        wall: Distance to the inner chest wall, positive inside.
        dome: Height above the diaphragm, positive above.
        lung: 1 inside the lungs (also behind the heart), 0 outside, soft edge.
        heart: Thickness of the heart and the great vessels, 0..1.
        air: What the lungs still hold, 0..1: findings displace it.
        marks: Strength of the vessels, 1 without disease: findings raise or remove them.
        added: Attenuation that findings and devices add.
        heart_ratio: Width of the heart / inner width of the thorax, as drawn.
        vessels: The pulmonary vessels, 0..1.
    """

    anatomy: ChestAnatomy
    view: View
    size_px: int
    x: Field
    y: Field
    across: Field
    is_left: Field
    wall: Field
    dome: Field
    lung: Field
    heart: Field
    air: Field
    marks: Field
    added: Field
    heart_ratio: float
    vessels: Field

    def side(self, name: str) -> Field:
        """Return 1 on the named side of the patient."""
        return self.is_left if name == "left" else f32(1) - self.is_left


def open_film(anatomy: ChestAnatomy, view: View, size_px: int, *, heart_ratio: float | None = None) -> Film:
    """Lay out lungs, diaphragm, heart and vessels of one film, before any finding."""
    x, y = view.to_body(size_px)
    a = anatomy
    ratio = a.heart_ratio if heart_ratio is None else heart_ratio
    spine = f32(a.spine_bend) * np.sin(y * f32(5))
    x = x - spine
    across = np.abs(x)
    is_left = (x > 0).astype(f32)
    up = np.clip((f32(0.66) - y) / f32(0.66 - a.lung_top), 0, 1)
    # A superellipse: vertical at the base, round at the apex.
    lateral = f32(0.055) + f32(a.lung_width - 0.055) * (f32(1) - up**2.6) ** f32(0.62)
    wall = lateral - across
    from_crest = across * f32(1 / a.lung_width) - f32(0.42)
    fall = from_crest * from_crest
    crest = f32(a.dome - view.breath) + f32(a.dome_step) * is_left
    dome = crest + f32(a.dome_depth) * (f32(0.9) * fall + f32(6.5) * fall * fall * (from_crest > 0)) - y
    lung = soft_step(wall, 0.010) * soft_step(dome, 0.008) * soft_step(across - f32(0.025), 0.012)
    heart = _draw_heart(a, x, y, ratio, view.breath)
    segments = view.to_image(a.vessels)
    strokes = Strokes(size_px)
    widths = a.vessel_widths * view.zoom
    strokes.segments(segments, widths, 0.34 + 50 * widths)
    return Film(
        anatomy=a,
        view=view,
        size_px=size_px,
        x=x,
        y=y,
        across=across,
        is_left=is_left,
        wall=wall,
        dome=dome,
        lung=lung,
        heart=heart,
        air=lung.copy(),
        marks=np.ones_like(lung),
        added=np.zeros_like(lung),
        heart_ratio=ratio,
        vessels=strokes.field(),
    )


def _ball(x: Field, y: Field, centre: tuple[float, float], radii: tuple[float, float], tilt: float = 0.0) -> Field:
    """Return the squared thickness (0..1) of an ellipsoid seen from the front."""
    c, s = math.cos(tilt), math.sin(tilt)
    dx, dy = x - f32(centre[0]), y - f32(centre[1])
    u = dx * f32(c / radii[0]) + dy * f32(s / radii[0])
    v = dy * f32(c / radii[1]) - dx * f32(s / radii[1])
    squared: Field = np.clip(f32(1) - u * u - v * v, 0, 1)
    return squared


def _draw_heart(a: ChestAnatomy, x: Field, y: Field, ratio: float, breath: float) -> Field:
    """Return the shadow of the heart, the aorta and the upper mediastinum, 0..1."""
    w = ratio * 2 * a.lung_width
    base = a.dome + a.dome_step - breath + 0.030
    gap = f32(1) - _ball(x, y, (0.150 * w, base - 0.34 * w), (0.535 * w, 0.385 * w), 0.58)
    gap *= f32(1) - _ball(x, y, (-0.085 * w, base - 0.40 * w), (0.265 * w, 0.42 * w))
    gap *= f32(1) - _ball(x, y, (0.075 * w, base - 0.70 * w), (0.235 * w, 0.42 * w), -0.12)
    gap *= f32(1) - _ball(x, y, (a.mediastinum * 0.55, 0.280), (a.knob, a.knob * 1.2))
    thick = np.sqrt(f32(1) - gap)
    # A steeper edge than a ball's: blood against air.
    shadow = np.clip(thick * f32(1.7), 0, 1) * f32(0.75) + thick * f32(0.25)
    flank = f32(a.mediastinum) - f32(0.010) * np.sin(y * f32(9)) - np.abs(x - f32(0.004))
    column = soft_step(flank, 0.014) * soft_step(f32(base + 0.02) - y, 0.02) * f32(0.8)
    heart: Field = np.maximum(shadow, column)
    return heart


def _draw_bones(film: Film) -> Field:
    """Return the shadow of ribs, clavicles, scapulae and spine."""
    a, across, y = film.anatomy, film.across, film.y
    u = across * f32(1 / a.lung_width)
    cage = soft_step(film.wall + f32(0.012), 0.010) * soft_step(f32(0.84) - y, 0.06)
    # Ribs stand closer at the apex: the height is stretched there before it is divided into gaps.
    height = (y - f32(a.lung_top)) * f32(1 / a.rib_gap) + f32(a.rib_phase)
    u2 = u * u
    behind = height - (f32(0.35) * u + f32(1.05) * u2 * u2) * f32(0.055 / a.rib_gap)
    posterior = _ribs(behind, 0.36) * soft_step(f32(1.06) - u, 0.06) * soft_step(u - f32(0.10), 0.04)
    before = height - f32(1.4 * 0.055 / a.rib_gap) - (f32(1) - u) * f32(a.rib_slope / a.rib_gap)
    anterior = _ribs(before, 0.42) * soft_step(u - f32(0.42), 0.10)
    ribs = (posterior + f32(0.62) * anterior) * cage

    along = across * f32(1 / 0.36)
    line = f32(0.186) - f32(0.115) * along - f32(0.016) * np.sin(along * f32(6.0))
    offset = np.abs(y - line)
    clavicle = soft_step(f32(0.0105) - offset, 0.005) * soft_step(f32(0.40) - across, 0.01)
    clavicle *= soft_step(across - f32(0.028), 0.008)
    clavicle *= f32(0.75) + f32(2600) * offset * offset
    blade = soft_step(across - f32(0.315) - f32(0.28) * (y - f32(0.22)), 0.012) * soft_step(f32(0.43) - y, 0.05)
    blade *= soft_step(y - f32(0.10), 0.04)
    humerus = np.sqrt(_ball(across, y, (0.455, 0.155), (0.05, 0.055)))

    discs = np.cos(y * f32(2 * math.pi / 0.052))
    spine = soft_step(f32(0.034) - across, 0.008) * (f32(0.85) + f32(0.22) * discs)
    pedicles = np.exp(-(((across - f32(0.019)) * f32(140)) ** 2)) * np.clip(discs, 0, 1) * f32(0.5)
    bones: Field = ribs + f32(1.25) * clavicle + f32(0.5) * blade + f32(0.9) * humerus + f32(1.15) * (spine + pedicles)
    return bones * f32(a.bone)


def _ribs(phase: Field, width: float) -> Field:
    """Return rib profiles of period 1: a plateau with denser cortical edges."""
    off = np.abs(phase - np.floor(phase) - f32(0.5)) * f32(2)
    edge = off * f32(1 / width)
    ribs: Field = soft_step(f32(width) - off, 0.14) * (f32(0.72) + f32(0.38) * edge * edge)
    return ribs


def _draw_body(film: Film) -> Field:
    """Return the thickness of soft tissue without the lungs' air."""
    a, across, y = film.anatomy, film.across, film.y
    trunk = a.lung_width + 0.045 + 0.075 * a.habitus
    neck = 0.105 + 0.03 * a.habitus
    shoulder = 0.505 + 0.06 * a.habitus
    spread = soft_step(y - f32(0.075), 0.085)
    narrow = soft_step(y - f32(0.36), 0.16)
    outline = f32(neck) + f32(shoulder - neck) * spread - f32(shoulder - trunk) * narrow
    inside = soft_step(outline - across, 0.010)
    depth = across / outline
    depth *= depth
    body = inside * (f32(0.66 + 0.14 * a.habitus) + f32(0.28) * (f32(1) - depth))
    arm = f32(0.055 + 0.02 * a.habitus) - np.abs(across - f32(0.46 + 0.03 * a.habitus) - f32(0.17) * (y - f32(0.2)))
    np.maximum(body, soft_step(arm, 0.03) * soft_step(y - f32(0.2), 0.05) * f32(0.55), out=body)
    belly = soft_step(-film.dome, 0.02) * soft_step(film.wall + f32(0.02), 0.03)
    body += belly * f32(0.10)
    if a.woman:
        size = 0.105 + 0.045 * a.habitus
        breast = np.sqrt(_ball(across, y, (a.lung_width * 0.60, 0.60), (size * 1.15, size)))
        body += f32(0.09 + 0.06 * a.habitus) * breast
    if a.stomach:
        below = a.dome + a.dome_step + a.stomach * 0.85 + 0.022
        bubble = _ball(film.x, y, (0.17, below), (a.stomach * 1.5, a.stomach), 0.15)
        body -= f32(0.32) * np.sqrt(bubble) * soft_step(-film.dome - f32(0.012), 0.008)
    return np.asarray(body, dtype=f32)


def develop(film: Film, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Sum the attenuations and turn them into grey values, with collimator, marker and grain.

    The grain is the last thing drawn from ``rng``: everything before it is the same at any size.
    """
    a, view, size = film.anatomy, film.view, film.size_px
    body = _draw_body(film)
    mottle = coarse_noise(rng, size, 14) * f32(0.016) + coarse_noise(rng, size, 44) * f32(0.017)
    displaced = film.air * (f32(1) - f32(0.93) * film.heart)
    depth = np.clip(film.wall * f32(7), 0, 1)
    lungs = displaced * (f32(0.44) + f32(0.10) * depth)
    trachea = soft_step(f32(0.0165) - np.abs(film.x + f32(0.004)), 0.008) * soft_step(f32(0.315) - film.y, 0.02)
    total = body - lungs + f32(0.10) * film.heart * soft_step(film.dome + f32(0.05), 0.05)
    total += _draw_bones(film) * np.clip(body * f32(1.6), 0, 1)
    total += displaced * (film.marks * (f32(0.17) * film.vessels + mottle))
    total -= f32(0.10) * trachea
    total += film.added + mottle * body * f32(0.35)
    level = f32(0.5) + f32(0.5) * np.tanh(f32(view.contrast * 0.5) * (total - f32(view.centre)))
    grey = f32(8) + f32(240) * level
    grain = rng.standard_normal((size, size), dtype=f32)
    grey += (grain + np.roll(grain, 1, axis=0)) * f32(view.noise * 0.7) * (level * (f32(1.6) - level) + f32(0.08))
    if view.marker:
        _draw_marker(grey, view, a)
    _collimate(grey, view)
    film_grey: NDArray[np.uint8] = np.clip(grey, 0, 255).astype(np.uint8)
    return film_grey


def _draw_marker(grey: Field, view: View, anatomy: ChestAnatomy) -> None:
    """Draw the lead letter L beside the patient's left shoulder."""
    size = len(grey)
    x, y, h = 0.925 - view.frame[2], 0.045 + view.frame[0], 0.05 + 0.01 * anatomy.habitus
    top, bottom, left = int(y * size), int((y + h) * size), int(x * size)
    thick = max(1, round(0.011 * size))
    grey[top:bottom, left : left + thick] = 244
    grey[bottom - thick : bottom, left : left + max(2, int(0.03 * size))] = 244


def _collimate(grey: Field, view: View) -> None:
    """Cover the border that the collimator kept from the beam."""
    size = len(grey)
    top, bottom, right, left = (round(w * size) for w in view.frame)
    grey[:top] = view.frame_grey
    grey[size - bottom :] = view.frame_grey
    grey[:, size - right :] = view.frame_grey
    grey[:, :left] = view.frame_grey
