"""The set as a whole: determinism, independence of count, labels, prompts, saving."""

import csv
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.phantom_chest import make_anatomy
from chiasm.data.phantom_chest_findings import plan_visits
from chiasm.data.phantoms import CHEST_FINDINGS, TISSUE_FINDINGS, PhantomSet, make_chest_phantoms, make_tissue_phantoms
from chiasm.errors import InputError

MAKERS = {"chest": make_chest_phantoms, "tissue": make_tissue_phantoms}


@pytest.fixture(scope="module", params=["chest", "tissue"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def many(kind: str) -> PhantomSet:
    return MAKERS[kind](200, seed=4, size_px=32)


def same(a: PhantomSet, b: PhantomSet) -> bool:
    return (
        np.array_equal(a.images, b.images)
        and a.samples == b.samples
        and [[r.box for r in rs] for rs in a.regions] == [[r.box for r in rs] for rs in b.regions]
        and all(np.array_equal(a.masks(i)[k], b.masks(i)[k]) for i in range(len(a)) for k in a.masks(i))
    )


def test_the_same_seed_gives_the_same_set_and_another_seed_another(kind: str) -> None:
    make = MAKERS[kind]
    first, again, other = (make(6, seed=s, size_px=64) for s in (1, 1, 2))
    assert same(first, again)
    assert first.images[:3].tobytes() != other.images[:3].tobytes()
    assert [s.text for s in first.samples] != [s.text for s in other.samples]


def test_an_image_does_not_depend_on_how_many_are_asked_for(kind: str) -> None:
    make = MAKERS[kind]
    whole = make(9, seed=3, size_px=48)
    assert same(make(4, seed=3, size_px=48), whole.select([s.patient < f"{kind}-000004" for s in whole.samples]))
    pieces = [make(3, seed=3, size_px=48, first_patient=k) for k in (0, 3, 6)]
    assert same(pieces[0].join(*pieces[1:]), whole)
    assert pieces[0].join(*pieces[1:]).name == whole.name


def test_the_number_of_visits_does_not_change_the_first_ones(kind: str) -> None:
    make = MAKERS[kind]
    one, three = (
        make(4, seed=8, size_px=48, images_per_patient=(1, 1)),
        make(4, seed=8, size_px=48, images_per_patient=(3, 3)),
    )
    assert len(one) == 4
    assert len(three) == 12
    assert np.array_equal(one.images, three.images[::3])
    assert [s.text for s in one.samples] == [s.text for s in three.samples][::3]


def test_the_same_scene_is_drawn_at_any_size(kind: str) -> None:
    make = MAKERS[kind]
    small, large = make(5, seed=6, size_px=64), make(5, seed=6, size_px=128)
    assert [s.text for s in small.samples] == [s.text for s in large.samples]
    assert [s.labels for s in small.samples] == [s.labels for s in large.samples]
    for a, b in zip(small.images, large.images, strict=True):
        reduced = np.asarray(Image.fromarray(b).reduce(2), dtype=float)
        assert np.corrcoef(reduced.ravel(), a.astype(float).ravel())[0, 1] > 0.9
    for ours, theirs in zip(small.regions, large.regions, strict=True):
        for a, b in zip(ours, theirs, strict=False):
            assert a.finding == b.finding
            if a.finding == "mitoses":
                continue  # each stands where there is room, and the rim of the tumour is rounded to pixels
            assert abs(a.box.x0_px * 2 - b.box.x0_px) <= 6
            assert abs(a.box.y1_px * 2 - b.box.y1_px) <= 6


def test_shapes_names_and_groups(kind: str, many: PhantomSet) -> None:
    assert many.images.dtype == np.uint8
    assert many.images.shape == (len(many), 32, 32) + ((3,) if kind == "tissue" else ())
    assert many.image(0).mode == ("L" if kind == "chest" else "RGB")
    assert "synthetic" in many.name
    ids = [s.id for s in many.samples]
    assert len(set(ids)) == len(ids)
    visits: dict[str, list[object]] = {}
    for s in many.samples:
        assert s.group == s.patient
        visits.setdefault(str(s.patient), []).append(s.labels["visit"])
    assert len(visits) == 200
    assert {len(v) for v in visits.values()} == {1, 2, 3}
    assert all(v == list(range(len(v))) for v in visits.values())


def test_every_row_says_that_it_is_synthetic_but_no_report_leaks_a_label(many: PhantomSet) -> None:
    assert all(s.labels["synthetic"] == 1 for s in many.samples)
    for s in many.samples:
        assert s.text
        assert not re.search(r"synthetic|phantom|label|_|\d{4}", s.text)


def test_prevalence_is_in_the_stated_range(kind: str, many: PhantomSet) -> None:
    for name in many.findings:
        share = np.mean([float(s.labels[name] or 0) for s in many.samples])
        low, high = (0.30, 0.50) if name == "tumour" else (0.12, 0.36)
        assert low < share < high, name
    assert many.findings == (CHEST_FINDINGS if kind == "chest" else TISSUE_FINDINGS)


def test_brightness_alone_does_not_solve_the_task(kind: str, many: PhantomSet) -> None:
    pixels = many.images.reshape(len(many), -1).astype(float)
    areas = []
    for name in many.findings:
        truth = np.array([s.labels[name] for s in many.samples], dtype=bool)
        for statistic in (pixels.mean(1), pixels.std(1)):
            ranks = statistic.argsort().argsort()
            area = (ranks[truth].mean() - ranks[~truth].mean()) / len(truth) + 0.5
            areas.append(max(area, 1 - area))
    assert np.mean(areas) < 0.75


def test_labels_follow_from_each_other(kind: str, many: PhantomSet) -> None:
    for s in many.samples:
        labels = s.labels
        if kind == "tissue":
            assert not labels["high_grade"] or labels["tumour"]
            assert not labels["mitoses"] or labels["tumour"]
            continue
        assert labels["no_finding"] == int(not any(labels[f] for f in many.findings if f != "no_finding"))
        for name in ("effusion", "pneumothorax", "consolidation", "nodule", "device"):
            left, right = labels[f"{name}_left"], labels[f"{name}_right"]
            side = {(0, 0): None, (1, 0): "left", (0, 1): "right", (1, 1): "bilateral"}[left, right]
            assert labels[f"{name}_side"] == side
            assert labels[name] == int(side is not None)


def test_sides_are_balanced() -> None:
    counts: dict[tuple[str, str], int] = {}
    for patient in range(900):
        rng = np.random.default_rng([11, patient])
        for finding in plan_visits(rng, make_anatomy(rng), 1)[0]:
            counts[finding.name, finding.side] = counts.get((finding.name, finding.side), 0) + 1
    for name in ("effusion", "pneumothorax", "consolidation", "nodule", "device"):
        left, right = counts[name, "left"], counts[name, "right"]
        # Three standard deviations of a fair coin.
        assert abs(left - right) < 3 * np.sqrt(left + right), name


def test_regions_agree_with_labels(many: PhantomSet) -> None:
    for sample, regions in zip(many.samples, many.regions, strict=True):
        named = {r.finding for r in regions}
        assert named <= {f for f in many.findings if sample.labels[f]}
        assert sample.boxes == tuple(r.box for r in regions)


def test_survival_is_one_per_patient_and_comes_from_the_first_image(many: PhantomSet) -> None:
    first = {s.patient: s for s in many.samples if s.labels["visit"] == 0}
    for s in many.samples:
        assert s.labels["survival_days"] == first[s.patient].labels["survival_days"]
        assert s.labels["event"] == first[s.patient].labels["event"]
    events = sum(int(s.labels["event"] or 0) for s in first.values())
    hazards = [many.stated_hazard.cumulative(float(s.labels["survival_days"] or 0), s.labels) for s in first.values()]
    # Events minus cumulative hazard is a martingale of mean 0 and variance E[H].
    assert abs(events - sum(hazards)) < 3.5 * np.sqrt(sum(hazards))
    assert 0.25 < events / len(first) < 0.75


def test_prompts_cover_every_name_and_use_the_words_of_the_reports(kind: str, many: PhantomSet) -> None:
    assert set(many.prompts) == {*many.findings, *many.laterality}
    spoken = set(re.findall(r"[a-z&-]+", " ".join(s.text or "" for s in many.samples).lower()))
    for name, pair in many.prompts.items():
        assert set(pair) == {"positive", "negative"}
        assert min(len(pair["positive"]), len(pair["negative"])) >= 3, name
        assert not set(pair["positive"]) & set(pair["negative"])
        assert set(re.findall(r"[a-z&-]+", " ".join(pair["positive"] + pair["negative"]).lower())) <= spoken
    assert bool(many.laterality) == (kind == "chest")
    for name in many.laterality:
        side = name.rsplit("_", 1)[1]
        other = {"left": "right", "right": "left"}[side]
        assert all(side in p and other not in p for p in many.prompts[name]["positive"])
        assert all(other in p and side not in p for p in many.prompts[name]["negative"])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_select_keeps_rows_together(many: PhantomSet, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(many) - 1), max_size=6))
    chosen = many.select(rows)
    assert len(chosen) == len(rows)
    for k, row in enumerate(rows):
        assert chosen.samples[k] is many.samples[row]
        assert chosen.regions[k] is many.regions[row]
        assert np.array_equal(chosen.images[k], many.images[row])
    mask = np.zeros(len(many), dtype=bool)
    mask[rows] = True
    assert [s.id for s in many.select(mask).samples] == [many.samples[i].id for i in np.flatnonzero(mask)]


def test_save_and_read_back(kind: str, tmp_path) -> None:
    phantoms = MAKERS[kind](5, seed=2, size_px=40)
    table = phantoms.save(tmp_path / "a")
    phantoms.save(tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == len(phantoms) + 2
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    boxes = json.loads((tmp_path / "a" / "boxes.json").read_text(encoding="utf-8"))
    assert boxes["synthetic"] is True
    for k, (row, sample) in enumerate(zip(rows, phantoms.samples, strict=True)):
        assert (row["title"], row["patient_id"], row["id"]) == (sample.text, sample.patient, sample.id)
        assert "split" not in row
        for name, value in sample.labels.items():
            assert row[name] == ("" if value is None else str(value))
        with Image.open(tmp_path / "a" / row["filepath"]) as image:
            assert np.array_equal(np.asarray(image), phantoms.images[k])
        stored = [tuple(b["box"]) for b in boxes["images"][row["filepath"]]]
        assert stored == [(b.x0_px, b.y0_px, b.x1_px, b.y1_px) for b in sample.boxes]


@pytest.mark.parametrize(
    "wrong",
    [
        {"patients": 0},
        {"seed": -1},
        {"size_px": 8},
        {"size_px": 100_000},
        {"images_per_patient": (0, 2)},
        {"images_per_patient": (3, 2)},
        {"first_patient": -5},
    ],
)
def test_numbers_out_of_range_are_refused(kind: str, wrong: dict) -> None:
    arguments = {"patients": 2, "seed": 0, "size_px": 32} | wrong
    with pytest.raises(InputError, match="expected"):
        MAKERS[kind](arguments.pop("patients"), **arguments)


def test_foreign_or_repeated_sets_cannot_be_joined() -> None:
    chest, tissue = (make(2, seed=0, size_px=32) for make in MAKERS.values())
    with pytest.raises(InputError, match="different kinds"):
        chest.join(tissue)
    with pytest.raises(InputError, match="different kinds"):
        chest.join(make_chest_phantoms(2, seed=0, size_px=40, first_patient=2))
    with pytest.raises(InputError, match="two of the phantom sets"):
        chest.join(chest)
