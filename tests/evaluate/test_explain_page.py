"""Figures and pages of explanations: drawn for every case, the same each time, quiet about patients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import InputError
from chiasm.evaluate.explain_figures import BOX_COLOUR, curve_lines, method_dots, overlay_picture
from chiasm.evaluate.explain_image import explain_image, score_boxes
from chiasm.evaluate.explain_page import image_page, methods_page
from chiasm.evaluate.explain_scores import Case, score_methods
from chiasm.evaluate.explain_terms import region_terms
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.explain.curves import Curves
from chiasm.explain.heatmap import HeatMap
from chiasm.testing import TinyEncoder, make_test_images
from chiasm.types import Box, Interval, Sample

CARD = RunCard("chiasm explain", {"images": "0" * 12}, {"images": 1}, "tiny", 0)


def planted(size: tuple[int, int] = (80, 40)) -> HeatMap:
    values = np.zeros((4, 8), np.float32)
    values[1, 6] = 1
    return HeatMap(values, size, (0.0, 0.0, float(size[0]), float(size[1])), "planted", "x")


def test_scores_of_one_map() -> None:
    heat = planted()
    right, wrong = score_boxes(heat, [Box(60, 10, 70, 20)]), score_boxes(heat, [Box(0, 0, 10, 10)])
    assert (right.hit, wrong.hit) == (1.0, 0.0)
    assert right.chance == pytest.approx(100 / 3200)
    assert right.contrast > 0 > wrong.contrast
    assert right.iou > wrong.iou == 0


def test_box_and_cross_are_drawn_where_they_belong() -> None:
    image = Image.new("L", (80, 40), 0)
    plain = np.asarray(overlay_picture(image, None, [Box(20, 10, 40, 30)], width_px=160))
    colour = np.array([int(BOX_COLOUR[k : k + 2], 16) for k in (1, 3, 5)])
    rows, columns = np.nonzero((plain == colour).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 59, 40, 79)
    drawn = np.asarray(overlay_picture(image, planted(), width_px=160))
    rows, columns = np.nonzero((drawn == 255).all(-1))
    x, y = planted().peak()
    assert abs(rows.mean() - 2 * (y + 0.5)) <= 1.5
    assert abs(columns.mean() - 2 * (x + 0.5)) <= 1.5
    flat = replace(planted(), values=np.zeros((2, 2), np.float32))
    assert not (np.asarray(overlay_picture(image, flat, width_px=160)) == 255).all(-1).any()


def test_figures_are_the_same_each_time() -> None:
    rows = np.linspace(1, 0, 6)[None].repeat(2, 0)
    curves = [Curves(name, rows, rows[:, ::-1], "blur") for name in ("layer_cam", "random", "centre")]
    assert curve_lines(curves) == curve_lines(curves)
    number = Interval(0.5, 0.4, 0.6, 9, 0.1)
    dots = {"a": {"all": number, "large": Interval(0.7, float("nan"), float("nan"), 3)}, "b": {"all": number}}
    assert method_dots(dots, xlabel="x", chance=0.1).startswith("<svg")


def test_a_page_with_one_image_and_hostile_texts() -> None:
    image = make_test_images(1)[0]
    text = '<script>alert(1)</script> & "effusion"'
    found = explain_image(TinyEncoder(), image, [text], methods=["similarity"], boxes=[Box(0, 0, 20, 20)])
    html = render_page(image_page(found, CARD))
    assert "<script>alert" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<img") == 2
    with pytest.raises(InputError, match="got none"):
        explain_image(TinyEncoder(), image, [])


def test_a_page_of_a_set_shows_no_patient_unless_asked() -> None:
    images = make_test_images(6)
    cases = [
        Case(lambda k=k: images[k], "nodule", ("a nodule",), ("no nodule",), (Box(1, 1, 30, 30),), f"secret-{k}")
        for k in range(6)
    ]
    encoder = TinyEncoder()
    scores = score_methods(encoder, cases, methods=["similarity"], n_resamples=50)
    html = render_page(methods_page(scores, CARD, encoder="tiny"))
    assert "<img" not in html
    assert "secret" not in html
    assert "knowing the text alone" in " ".join(html.split())
    heats = [explain_image(encoder, images[0], ["a nodule"], methods=["similarity"]).rows[0][0].heat]
    assert render_page(methods_page(scores, CARD, examples=[(cases[0], heats)])).count("<img") == 2


def test_the_own_patient_is_known_by_file_or_copy(tmp_path: Path) -> None:
    samples = []
    for k, image in enumerate(make_test_images(26)):
        image.resize((64, 64)).save(tmp_path / f"{k}.png")
        samples.append(Sample(f"s{k}", tmp_path / f"{k}.png", patient=f"p{k // 2}"))
    (tmp_path / "copy.png").write_bytes((tmp_path / "4.png").read_bytes())
    words = tmp_path / "w.txt"
    words.write_text("film\nnodule\n")
    image = Image.open(tmp_path / "copy.png")
    encoder = TinyEncoder()
    for own, expected in ((tmp_path / "4.png", 24), (tmp_path / "copy.png", 24), (None, 26)):
        found = region_terms(encoder, image, words, region=Box(0, 0, 30, 30), reference=samples, own=own)
        assert [name for name, _ in found] == ["whole image", "region"]
        assert [listed.n_reference for _, listed in found] == [expected, expected]
    tall = [*samples, Sample("tall", tmp_path / "tall.png", patient="q")]  # the model's crop misses the place
    Image.new("RGB", (20, 200)).save(tmp_path / "tall.png")
    found = region_terms(encoder, image, words, region=Box(0, 0, 60, 9), reference=tall, own=None)
    assert [listed.n_reference for _, listed in found] == [27, 26]
    alone = region_terms(encoder, image, words)
    assert alone[0][1].ranked_by == "cosine"
