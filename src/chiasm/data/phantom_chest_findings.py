"""Findings of the synthetic chest films: which a patient has at each visit, and how each changes a film.

Planning (:func:`plan_visits`) knows no pixel: it draws names, sides, sites, severities and places that do not hide each
other. Drawing (:func:`draw_findings`) changes a :class:`~chiasm.data.phantom_chest.Film` and returns the true regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chiasm.data.phantom_chest import ChestAnatomy, Film, View, develop, f32, make_anatomy, make_view, open_film
from chiasm.data.phantom_drawing import (
    Field,
    Finding,
    Region,
    Strokes,
    coarse_noise,
    make_region,
    smooth_curve,
    soft_step,
)

# Probability of each finding at a visit, before the rules below; about what the table of a set shows.
CHEST_PREVALENCE = {
    "pneumothorax": 0.24,
    "effusion": 0.21,
    "consolidation": 0.20,
    "nodule": 0.20,
    "cardiomegaly": 0.21,
    "oedema": 0.23,
    "device": 0.20,
}
# Balanced on purpose (real pacemakers sit on the left mostly): laterality must be read from the image.
SIDES = {
    "pneumothorax": {"left": 0.5, "right": 0.5},
    "effusion": {"left": 0.42, "right": 0.42, "bilateral": 0.16},
    "consolidation": {"left": 0.44, "right": 0.44, "bilateral": 0.12},
    "nodule": {"left": 0.5, "right": 0.5},
    "device": {"left": 0.5, "right": 0.5},
    "oedema": {"bilateral": 1.0},
}
SEVERITIES = ("mild", "moderate", "severe")
# Range of ``Finding.extent`` for each severity: ratio, height, gap, radius or strength (body units).
EXTENTS = {
    "cardiomegaly": ((0.555, 0.59), (0.60, 0.65), (0.66, 0.72)),
    "effusion": ((0.115, 0.150), (0.18, 0.26), (0.30, 0.42)),
    "pneumothorax": ((0.045, 0.060), (0.075, 0.105), (0.125, 0.175)),
    "consolidation": ((0.085, 0.100), (0.105, 0.130), (0.135, 0.165)),
    "nodule": ((0.032, 0.038), (0.039, 0.048), (0.049, 0.060)),
    "oedema": ((0.38, 0.50), (0.55, 0.72), (0.78, 0.95)),
}
# Height of the zones, as fractions of the lung from apex to dome.
ZONES = {"upper": (0.22, 0.36), "mid": (0.44, 0.60), "lower": (0.70, 0.84)}
MAX_FINDINGS = 3
KEEP = 0.6  # a finding (or its absence) stays until the next visit with this probability, else it is drawn afresh
MM_PER_UNIT = 350.0  # a film is about 35 cm wide


def plan_visits(rng: np.random.Generator, anatomy: ChestAnatomy, visits: int) -> list[tuple[Finding, ...]]:
    """Draw the findings of each visit; those that stay keep their side, place and shape."""
    planned: list[tuple[Finding, ...]] = []
    for visit in range(visits):
        before = {f.name: f for f in planned[-1]} if visit else {}
        names = []
        for name, probability in CHEST_PREVALENCE.items():
            stays = visit > 0 and rng.random() < KEEP
            fresh = rng.random() < probability
            if (name in before) if stays else fresh:
                names.append(name)
        if "pneumothorax" in names and "oedema" in names:
            names.remove("pneumothorax" if rng.random() < 0.5 else "oedema")
        while len(names) > MAX_FINDINGS:
            names.pop(int(rng.integers(len(names))))
        current: list[Finding] = []
        for name in names:
            current.append(
                _plan(
                    rng,
                    name,
                    anatomy=anatomy,
                    others=current,
                    enlarged="cardiomegaly" in names,
                    before=before.get(name),
                )
            )
        planned.append(tuple(current))
    return planned


def _plan(
    rng: np.random.Generator,
    name: str,
    *,
    anatomy: ChestAnatomy,
    others: Sequence[Finding],
    enlarged: bool,
    before: Finding | None,
) -> Finding:
    """Draw one finding so that those already planned do not hide it."""
    grade = int(rng.choice(3, p=(0.34, 0.38, 0.28)))
    severity = "" if name in ("device", "nodule") else SEVERITIES[grade]
    extent = float(rng.uniform(*EXTENTS[name][grade])) if name in EXTENTS else 0.0
    seed = int(rng.integers(2**31))
    blocked = {f.side for f in others if f.name == "pneumothorax"} if name not in ("device", "oedema") else set()
    sides = {s: p for s, p in SIDES.get(name, {"": 1.0}).items() if not blocked or s not in (*blocked, "bilateral")}
    side = str(rng.choice(list(sides), p=np.array(list(sides.values())) / sum(sides.values())))
    kind, site, place = _variant(rng, name, severity), "", (0.0, 0.0)
    if before is not None and before.side in sides:
        side, kind, seed = before.side, before.kind, before.seed
        if name in ("nodule", "device"):
            extent = before.extent
    if name == "pneumothorax":
        site = "apical" if kind == "apical" else "apicolateral"
    if name in ("consolidation", "nodule"):
        taken = _hidden_zones(side, others, enlarged=enlarged)
        free = [z for z in ZONES if z not in taken] or ["upper"]
        site = str(rng.choice(free))
        reach = extent if name == "nodule" else 0.6 * extent
        place = _place(rng, anatomy, zone=site, side=side, reach=reach, enlarged=enlarged)
        if before is not None and before.side == side and before.site in free:
            site, place = before.site, before.place
    return Finding(name, side, site, severity, kind, extent, place, seed)


def _variant(rng: np.random.Generator, name: str, severity: str) -> str:
    """Draw the variant of a finding."""
    if name == "device":
        return str(rng.choice(["pacemaker", "jugular", "subclavian"], p=[0.5, 0.27, 0.23]))
    if name == "pneumothorax":
        return "apical" if severity == "mild" and rng.random() < 0.6 else "apicolateral"
    if name == "nodule":
        return str(rng.choice(["solid", "calcified", "cavitating"], p=[0.62, 0.20, 0.18]))
    if name == "consolidation":
        return "lobar" if rng.random() < 0.35 else "patchy"
    if name == "oedema":
        return "interstitial" if severity == "mild" else "alveolar"
    return ""


def _hidden_zones(side: str, others: Sequence[Finding], *, enlarged: bool) -> set[str]:
    """Return the zones of a side in which a small shadow would be lost."""
    sides = {"left", "right"} if side == "bilateral" else {side}
    hidden = {"lower"} if enlarged and "left" in sides else set()
    for other in others:
        if not sides & set(other.sides):
            continue
        if other.name == "effusion":
            hidden |= {"mild": {"lower"}, "moderate": {"lower"}, "severe": {"lower", "mid"}}[other.severity]
        if other.name == "consolidation":
            hidden.add(other.site)
    return hidden


def _place(
    rng: np.random.Generator, anatomy: ChestAnatomy, *, zone: str, side: str, reach: float, enlarged: bool
) -> tuple[float, float]:
    """Draw a place (distance from the spine, height) in a zone, beside the heart and inside the wall."""
    height = anatomy.lung_top + (anatomy.dome - anatomy.lung_top) * rng.uniform(*ZONES[zone])
    up = max(0.0, (0.66 - height) / (0.66 - anatomy.lung_top))
    lateral = 0.055 + (anatomy.lung_width - 0.055) * (1 - up**2.6) ** 0.62
    heart = 2 * anatomy.lung_width * (0.62 if enlarged else anatomy.heart_ratio)
    medial = 0.10
    if zone == "lower":
        medial = (0.66 if side in ("left", "bilateral") else 0.36) * heart
    elif zone == "mid":
        medial = (0.42 if side in ("left", "bilateral") else 0.30) * heart
    low, high = medial + reach, lateral - reach - 0.012
    across = rng.uniform(low, high) if high > low else 0.5 * (medial + lateral)
    return float(across), float(height)


def draw_findings(film: Film, findings: Sequence[Finding]) -> tuple[Region, ...]:
    """Draw every finding into the film and return where it lies, one region a side."""
    order = ("cardiomegaly", "oedema", "consolidation", "nodule", "effusion", "pneumothorax", "device")
    regions: list[Region | None] = []
    for finding in sorted(findings, key=lambda f: order.index(f.name)):
        if finding.name == "cardiomegaly":
            heart = (
                (film.heart > 0.5) & (film.dome > -0.02) & (np.abs(film.y - _heart_centre(film)) < _heart_half(film))
            )
            regions.append(make_region(finding, heart))
        elif finding.name == "device":
            regions.append(make_region(finding, _draw_device(film, finding)))
        else:
            draw = _DRAWERS[finding.name]
            for side in finding.sides:
                shadow = draw(film, finding, side)
                regions.append(make_region(finding, (shadow > 0.5) & (film.heart < 0.6), side=side))
    return tuple(r for r in regions if r is not None)


def _heart_half(film: Film) -> float:
    return 0.78 * film.heart_ratio * film.anatomy.lung_width


def _heart_centre(film: Film) -> float:
    return film.anatomy.dome + film.anatomy.dome_step - film.view.breath + 0.03 - _heart_half(film)


def _draw_effusion(film: Film, finding: Finding, side: str) -> Field:
    """Fill the pleural space from below; the fluid climbs along the chest wall (meniscus)."""
    a = film.anatomy
    step = a.dome_step if side == "left" else 0.0
    sulcus = a.dome + step - film.view.breath + 1.0 * a.dome_depth
    height = finding.extent + (0.35 * a.dome_depth if finding.severity == "mild" else 0.25 * a.dome_depth)
    inward = np.clip(f32(1) - film.across * f32(1 / a.lung_width), 0, 1)
    rise, steep = (0.17, 5.0) if finding.severity == "mild" else (0.055 + 0.16 * finding.extent, 7.0)
    top = f32(sulcus - height) + f32(rise) * (f32(1) - np.exp(inward * f32(-steep)))
    fluid = soft_step(film.y - top, 0.016) * film.side(side)
    film.air *= f32(1) - f32(0.97) * fluid
    filled: Field = fluid * film.lung
    film.added += f32(0.06) * filled
    return filled


def _draw_pneumothorax(film: Film, finding: Finding, side: str) -> Field:
    """Let the lung fall away from the wall: a fine pleural line, and no vessel beyond it."""
    a, gap = film.anatomy, finding.extent
    apical = finding.site == "apical"
    top = a.lung_top + (2.1 * gap if apical else 1.5 * gap)
    width = a.lung_width + 0.002 if apical else a.lung_width - gap
    up = np.clip((f32(0.66) - film.y) / f32(0.66 - top), 0, 1)
    lateral = f32(0.05) + f32(width - 0.05) * (f32(1) - up**2.4) ** f32(0.62)
    depth = lateral - film.across
    here = film.side(side) * film.lung
    rim: Field = here * soft_step(-depth, 0.006)
    near = depth * f32(1 / 0.0052)
    line = here * np.exp(-(near * near)) * soft_step(film.wall - f32(0.012), 0.006)
    inside = here - rim
    film.marks *= f32(1) - rim
    film.air *= f32(1) + f32(0.20) * rim - f32(0.05 + 1.1 * gap) * inside
    film.added += f32(0.15) * line
    return rim


def _draw_consolidation(film: Film, finding: Finding, side: str) -> Field:
    """Fill air spaces in a ragged patch; the bronchi stay open in it, a fissure may bound it below."""
    rng = np.random.default_rng([finding.seed, side == "left"])
    radius, (across, height) = finding.extent, finding.place
    if finding.side == "bilateral" and side == "left":
        height += float(rng.uniform(-0.03, 0.03))
    noise = coarse_noise(rng, film.size_px, 9) * f32(0.52) + coarse_noise(rng, film.size_px, 24) * f32(0.30)
    u, v = (film.across - f32(across)) * f32(0.88 / radius), (film.y - f32(height)) * f32(1.1 / radius)
    filled = soft_step(f32(0.72) - u * u - v * v + noise, 0.70)
    if finding.kind == "lobar" and finding.site == "upper":
        floor = f32(height + 0.45 * radius) - f32(0.10) * (film.across - f32(across)) - film.y
        filled *= soft_step(floor, 0.006)
    filled *= film.lung * film.side(side)
    density = f32(0.78 + 0.17 * rng.random())
    film.air *= f32(1) - density * filled * (f32(1) - f32(0.35) * film.vessels)
    film.marks *= f32(1) - filled
    shadow: Field = filled
    return shadow


def _draw_nodule(film: Film, finding: Finding, side: str) -> Field:
    """Add a round shadow: solid, calcified (denser) or cavitating (a ring)."""
    rng = np.random.default_rng(finding.seed)
    radius, (across, height) = finding.extent, finding.place
    aspect, tilt = rng.uniform(0.85, 1.15), rng.uniform(0, np.pi)
    c, s = f32(np.cos(tilt)), f32(np.sin(tilt))
    sign = 1.0 if side == "left" else -1.0
    dx, dy = film.x - f32(sign * across), film.y - f32(height)
    u, v = (dx * c + dy * s) * f32(aspect / radius), (dy * c - dx * s) * f32(1 / (aspect * radius))
    away = u * u + v * v
    ball: Field = soft_step(f32(1) - away, 0.22)
    shadow = ball * (f32(0.65) + f32(0.35) * np.sqrt(np.clip(f32(1) - away, 0, 1)))
    if finding.kind == "cavitating":
        shadow = shadow * (f32(1) - f32(0.85) * soft_step(f32(0.30) - away, 0.18))
    film.added += f32({"calcified": 0.50, "cavitating": 0.56}.get(finding.kind, 0.54)) * shadow
    return ball


def _draw_oedema(film: Film, finding: Finding, side: str) -> Field:
    """Haze both lungs around the hila, widen the vessels, add septal lines at the bases."""
    rng = np.random.default_rng([finding.seed, side == "left"])
    strength = f32(finding.extent)
    dx, dy = (film.across - f32(0.135)) * f32(1 / 0.125), (film.y - f32(0.45)) * f32(1 / 0.185)
    noise = coarse_noise(rng, film.size_px, 22) * f32(0.22)
    wing = soft_step(f32(1.0) - dx * dx - dy * dy + noise, 0.85) * film.lung * film.side(side)
    here = film.lung * film.side(side)
    film.air *= f32(1) - strength * (f32(0.62) * wing + f32(0.14) * here)
    film.marks += f32(1.5) * strength * here
    strokes = Strokes(film.size_px)
    sign = 1.0 if side == "left" else -1.0
    for _ in range(int(6 + 8 * finding.extent)):
        x = film.anatomy.lung_width - 0.012
        y = float(rng.uniform(0.50, 0.69))
        line = np.array([(sign * x, y), (sign * (x - rng.uniform(0.03, 0.05)), y + rng.uniform(-0.004, 0.01))])
        strokes.line(film.view.to_image(line), 0.005, 1.0)
    film.added += strokes.field() * here * (f32(0.11) + f32(0.06) * strength)
    shadow: Field = wing
    return shadow


def _draw_device(film: Film, finding: Finding) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Draw a pacemaker with its leads, or a central venous catheter that ends in the superior vena cava."""
    rng = np.random.default_rng(finding.seed)
    a, view = film.anatomy, film.view
    s = 1.0 if finding.side == "left" else -1.0
    jitter = rng.normal(0, 0.006, (8, 2))
    vein, atrium = (-0.046, 0.285), (-0.060, 0.47)
    wires, metal = Strokes(film.size_px), Strokes(film.size_px)
    if finding.kind == "pacemaker":
        centre = np.array([s * rng.uniform(0.225, 0.265), rng.uniform(0.225, 0.265)])
        tilt, w, h = s * rng.uniform(-0.1, 0.5), 0.048, 0.042
        turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        # A superellipse is a box with round corners.
        outline = np.stack(
            [
                np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.6 * w,
                np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** 0.6 * h,
            ],
            1,
        )
        c, q = np.cos(tilt), np.sin(tilt)
        outline = outline @ np.array([[c, q], [-q, c]]) + centre
        metal.polygon(view.to_image(outline), 1.0)
        out = (float(centre[0]) - s * 0.02, float(centre[1]) - 0.04)
        apex = (0.33 * film.heart_ratio * 2 * a.lung_width, a.dome - view.breath - 0.035)
        for tip in ([(-0.045, a.dome - 0.10), apex], [(-0.085, 0.50)]):
            knots = [out, (s * 0.155, 0.175), (s * 0.07, 0.205), vein, atrium, *tip]
            points = smooth_curve([(x + dx, y + dy) for (x, y), (dx, dy) in zip(knots, jitter, strict=False)])
            points[0] = out
            wires.line(view.to_image(points), 0.0120, 0.95)
            wires.disc(tuple(view.to_image(points[-1:])[0]), 0.008, 1.0)
    else:
        top = [(s * 0.105, -0.03), (s * 0.085, 0.10), (s * 0.055, 0.20)]
        if finding.kind == "subclavian":
            top = [(s * 0.43, 0.24), (s * 0.31, 0.175), (s * 0.19, 0.165), (s * 0.075, 0.205)]
        knots = [*top, vein, (-0.050, float(rng.uniform(0.37, 0.43)))]
        points = smooth_curve([(x + dx, y + dy) for (x, y), (dx, dy) in zip(knots, jitter, strict=False)])
        wires.line(view.to_image(points), 0.0150, 1.0)
        wires.disc(tuple(view.to_image(points[:1])[0]), 0.014, 1.0)
    thin, thick = wires.field(), metal.field()
    film.added += f32(0.52) * thin * (f32(1) - thick) + f32(0.62) * thick
    return (thin > 0.3) | (thick > 0.5)


_DRAWERS = {
    "effusion": _draw_effusion,
    "pneumothorax": _draw_pneumothorax,
    "consolidation": _draw_consolidation,
    "nodule": _draw_nodule,
    "oedema": _draw_oedema,
}


def make_chest_patient(
    anatomy_rng: np.random.Generator, visit_rngs: Sequence[np.random.Generator], size_px: int
) -> list[tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], tuple[Finding, ...], tuple[Region, ...]]]:
    """Return image, findings and regions of every visit of one patient."""
    anatomy = make_anatomy(anatomy_rng)
    films = []
    for findings, rng in zip(plan_visits(anatomy_rng, anatomy, len(visit_rngs)), visit_rngs, strict=True):
        view: View = make_view(rng, anatomy)
        large = next((f.extent for f in findings if f.name == "cardiomegaly"), None)
        film = open_film(anatomy, view, size_px, heart_ratio=large)
        regions = draw_findings(film, findings)
        films.append((develop(film, rng), findings, regions))
    return films
