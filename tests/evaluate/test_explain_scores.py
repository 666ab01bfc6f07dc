"""Scores of heat maps by hand, and their pages: every number of the JSON on the page, no patient, no markup of a user."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import InputError
from chiasm.evaluate import explain_scores as module
from chiasm.evaluate.explain_page import image_page, methods_page
from chiasm.evaluate.explain_scores import COLUMNS, Case, ExplainScores, cases_of, score_methods
from chiasm.evaluate.page import Figure, Note, Page, Table, render_page
from chiasm.evaluate.run_card import RunCard
from chiasm.explain.curves import Curves
from chiasm.explain.fidelity import FidelityReport
from chiasm.explain.heatmap import HeatMap
from chiasm.tasks.prompt_files import parse_prompts
from chiasm.tasks.terms import NearestTerms, TermScore
from chiasm.types import Box, Sample

CARD = RunCard("chiasm explain", {"images": "0" * 12}, {"images": 1}, "tiny", 0)
EVIL = "<script>alert(1)</script>"
#: Where the finding lies in each of six images of 40 x 40 pixels: small, then large boxes.
BOXES = [
    Box(0, 0, 5, 5),
    Box(30, 30, 36, 36),
    Box(16, 16, 22, 22),
    Box(0, 0, 20, 20),
    Box(20, 20, 40, 40),
    Box(0, 20, 20, 40),
]


def peak_at(x: int, y: int) -> HeatMap:
    values = np.zeros((40, 40), np.float32)
    values[y, x] = 1.0
    return HeatMap(values, (40, 40), (0.0, 0.0, 40.0, 40.0), "planted", "a text")


def flat() -> HeatMap:
    return HeatMap(np.zeros((4, 4), np.float32), (40, 40), (0.0, 0.0, 40.0, 40.0), "flat", "a text")


def centre_of(box: Box) -> tuple[int, int]:
    return int(box.x0_px + box.x1_px) // 2, int(box.y0_px + box.y1_px) // 2


DRAWN = {
    "right": [peak_at(*centre_of(box)) for box in BOXES],
    "corner": [peak_at(39, 39) for _ in BOXES],  # in the fifth box only
    "flat": [flat() for _ in BOXES],
}


def cases(label: str = "nodule") -> list[Case]:
    image = Image.new("L", (40, 40), 90)
    return [
        Case(lambda: image, f"{label} {k % 2}", ("a text",), (), (box,), f"secret-{k // 2}")
        for k, box in enumerate(BOXES)
    ]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Score planted maps in place of an encoder's."""
    import chiasm.explain.methods as methods

    own = module._Runner.maps
    monkeypatch.setattr(methods, "methods_for", lambda encoder: tuple(DRAWN))
    monkeypatch.setattr(methods, "choose_method", lambda encoder, name: name)
    monkeypatch.setattr(module._Runner, "maps", lambda self, name: own(self, name) if name == "centre" else DRAWN[name])

    def run(names: Any = "all", found: list[Case] | None = None, **options: Any) -> ExplainScores:
        return score_methods(None, cases() if found is None else found, methods=names, n_resamples=20, **options)  # type: ignore[arg-type]

    return run


def test_the_pointing_game_by_hand(planted: Any) -> None:
    scores = planted()
    assert [m.method for m in scores.methods] == ["right", "corner", "flat", "centre"]
    share = [25 / 1600, 36 / 1600, 36 / 1600, 0.25, 0.25, 0.25]
    values = {m.method: m.all.pointing_game.value for m in scores.methods}
    assert values["right"] == 1.0
    assert values["corner"] == pytest.approx(1 / 6)
    assert values["flat"] == pytest.approx(np.mean(share))  # it points nowhere: as often as a random pixel
    for m in scores.methods:
        assert m.all.pointing_game.chance == pytest.approx(np.mean(share))
        assert (m.all.n, m.all.n_flat) == (6, 6 if m.method == "flat" else 0)
    assert scores.of("corner").large is not None
    assert scores.of("corner").large.pointing_game.value == pytest.approx(1 / 3)  # type: ignore[union-attr]
    assert (scores.n, scores.n_large, scores.n_patients) == (6, 3, 3)
    assert scores.labels == {"nodule 0": 3, "nodule 1": 3}


def test_the_gain_over_the_centre_is_the_difference_of_the_two(planted: Any) -> None:
    scores = planted()
    centre = scores.of("centre")
    assert centre.gain is None
    for name in DRAWN:
        m = scores.of(name)
        assert m.gain is not None
        assert m.gain.difference.value == pytest.approx(m.all.pointing_game.value - centre.all.pointing_game.value)
        assert m.gain_large is not None
        assert m.large is not None
        assert centre.large is not None
        assert m.gain_large.difference.value == pytest.approx(
            m.large.pointing_game.value - centre.large.pointing_game.value
        )


@pytest.mark.parametrize(("share", "large"), [(0.0, 6), (36 / 1600, 5), (0.23, 3), (0.25, 3), (0.26, 0)])
def test_what_counts_as_large(planted: Any, share: float, large: int) -> None:
    scores = planted(["right"], large_from=share)
    assert scores.n_large == large
    assert (scores.of("right").large is None) == (large == 0)
    assert (scores.of("right").gain_large is None) == (large == 0)
    assert scores.to_dict()["large_from"] == share


def test_a_method_is_scored_once_and_unknown_ones_are_named(planted: Any) -> None:
    scores = planted(["right", "right", "flat"])
    assert [m.method for m in scores.methods] == ["right", "flat", "centre"]
    with pytest.raises(InputError, match="`corner` was not scored") as caught:
        scores.of("corner")
    assert caught.value.hint == "scored: right, flat, centre"
    with pytest.raises(InputError, match="no image with a box"):
        planted(["right"], found=[])


def test_the_order_of_cases_does_not_matter(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planted(["right", "corner"]).to_dict()["methods"]
    order = [4, 0, 3, 1, 5, 2]
    turned = {name: [maps[k] for k in order] for name, maps in DRAWN.items()}
    monkeypatch.setattr(module._Runner, "maps", lambda self, name: self.centre if name == "centre" else turned[name])
    after = planted(["right", "corner"], found=[cases()[k] for k in order]).to_dict()["methods"]
    for name in before:
        assert after[name]["pointing_game"]["value"] == pytest.approx(before[name]["pointing_game"]["value"])
        assert after[name]["iou"]["value"] == pytest.approx(before[name]["iou"]["value"])
        assert after[name]["per_label"].keys() == before[name]["per_label"].keys()


def with_curves(scores: ExplainScores) -> ExplainScores:
    down = np.tile(np.linspace(1, 0, 5), (6, 1))
    curves = {m: Curves(m, down * k, down[:, ::-1] * k, "blur") for k, m in enumerate(("random", "right", "centre"), 1)}
    reports = {
        "right": FidelityReport("right", (0.1, -0.3), (0.2, 0.4), (0, 1)),
        "flat": FidelityReport("flat", (0.9,), (0.8,), (0,)),
    }
    return dataclasses.replace(
        scores,
        random_curves=curves["random"],
        methods=tuple(
            dataclasses.replace(
                m, curves=curves.get(m.method), fidelity=reports.get(m.method),
                deletion=m.all.iou if m.method in curves else None, insertion=m.all.iou if m.method in curves else None,
            )
            for m in scores.methods
        ),
    )  # fmt: skip


def tables(page: Page) -> dict[str, Table]:
    return {s.title: b for s in page.sections for b in s.blocks if isinstance(b, Table)}


def test_every_number_of_the_json_is_on_the_page(planted: Any) -> None:
    scores = with_curves(planted())
    document = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    page = methods_page(scores, CARD, encoder="tiny")
    by_method = {row[0]: row for row in tables(page)["All methods"].rows}
    html = render_page(page)
    for name, numbers in document["methods"].items():
        _, game, large, gain, p, iou, contrast, n_flat = map(str, by_method[name])
        assert game.startswith(f"{numbers['pointing_game']['value']:.3f} [{numbers['pointing_game']['low']:.3f}, ")
        assert large.startswith(f"{numbers['large']['pointing_game']['value']:.3f}")
        assert iou.startswith(f"{numbers['iou']['value']:.3f}")
        assert contrast.startswith(
            "nan" if numbers["contrast_to_noise"]["value"] is None else f"{numbers['contrast_to_noise']['value']:.3f}"
        )
        assert n_flat == str(numbers["n_flat"])
        if name == "centre":
            assert (gain, p) == ("–", "–")
        else:
            assert gain.startswith(f"{numbers['gain_over_centre']['difference']['value']:+.3f}")
            assert p == (
                "–"
                if numbers["gain_over_centre"]["p_value"] is None
                else f"{numbers['gain_over_centre']['p_value']:.3f}"
            )
        assert game in html
    labels = {row[0]: row for row in tables(page)["By finding"].rows}
    for label, column in (("nodule 0", 1), ("nodule 1", 2)):
        for name in DRAWN:
            value = document["methods"][name]["per_label"][label]["pointing_game"]
            assert str(labels[name][column]).startswith(f"{value['value']:.3f}")
            assert labels["chance"][column] == f"{value['chance']:.3f}"
    assert [row[0] for row in tables(page)["Deletion and insertion"].rows] == ["right", "centre"]
    assert [row[0::3] for row in tables(page)["Shuffled weights"].rows] == [("right", "passes"), ("flat", "FAILS")]
    assert [row[1] for row in tables(page)["Shuffled weights"].rows] == ["0.20", "0.90"]


def test_the_printed_table_has_a_cell_for_every_column(planted: Any) -> None:
    rows = with_curves(planted()).table()
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert [row[0] for row in rows] == ["right", "corner", "flat", "centre"]
    assert rows[3][3] == "-"  # centre is not compared with itself
    assert rows[1][6:] == ("-", "-", "-")
    assert rows[0][8] == "0.20"
    assert rows[0][3].startswith("+")


def test_a_page_names_its_best_as_chosen_and_shows_no_patient(planted: Any) -> None:
    page = methods_page(planted(), CARD)
    assert [k.name for k in page.key_numbers] == ["pointing game, right", "large findings", "the middle of the picture"]
    assert "chosen on these images" in page.key_numbers[0].note
    html = render_page(page)
    assert "secret" not in html
    assert "<img" not in html
    assert "unnamed" in html
    small = methods_page(planted(["right"], large_from=0.9), CARD)
    assert [k.name for k in small.key_numbers] == ["pointing game, right", "the middle of the picture"]


def test_hostile_labels_are_text(planted: Any) -> None:
    html = render_page(methods_page(planted(found=cases(f"{EVIL} $\\frac{{$")), CARD, encoder=EVIL))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3


def sample(k: int, *labels: str, image: bool = True) -> Sample:
    boxes = tuple(Box(j, j, j + 5, j + 5, label) for j, label in enumerate(labels))
    return Sample(f"s{k}", Path("x.png") if image else None, patient=f"p{k}", boxes=boxes)


@pytest.mark.parametrize(
    ("samples", "found", "unknown"),
    [
        ([sample(0, "nodule")], [("nodule", 1)], {}),
        ([sample(0, "Nodule", "NODULE ", "no_dule")], [("nodule", 3)], {}),  # one finding of three boxes
        ([sample(0, "nodule", "Pleural_Effusion")], [("nodule", 1), ("pleural effusion", 1)], {}),
        ([sample(0, "nodule"), sample(1, "mass", "mass")], [("nodule", 1)], {"mass": 2}),
        ([sample(0, "nodule"), sample(1, "nodule", image=False)], [("nodule", 1)], {}),
        ([sample(0, "nodule"), sample(1)], [("nodule", 1)], {}),
    ],
)
def test_cases_of_a_table(samples: list[Sample], found: Any, unknown: Any) -> None:
    got, left_out = cases_of(samples, parse_prompts(["nodule", "pleural effusion"], pairs=True))
    assert [(c.label, len(c.boxes)) for c in got] == found
    assert left_out == unknown
    assert all(c.texts and c.group.startswith("p") for c in got)


def test_no_case_is_an_error_with_a_hint() -> None:
    with pytest.raises(InputError, match="no image has a box with a label of the prompts") as caught:
        cases_of([sample(0, "mass")], parse_prompts(["nodule"], pairs=True))
    assert "boxes.json" in str(caught.value.hint)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 99))
def test_a_draw_takes_as_many_of_each_label_as_there_are(labels: list[str], limit: int, seed: int) -> None:
    rows = module._drawn(labels, limit, seed)
    assert rows == sorted(set(rows))
    assert len(rows) == min(limit, len(labels))
    assert rows == module._drawn(labels, limit, seed)
    taken = {c: sum(labels[r] == c for r in rows) for c in set(labels)}
    for c, count in taken.items():
        # A label with fewer than another has no row left.
        assert count == labels.count(c) or count >= max(taken.values()) - 1


def term(word: str, z: float) -> TermScore:
    return TermScore(
        word,
        "kind",
        0.25,
        NAN if math.isnan(z) else 0.2,
        NAN if math.isnan(z) else 0.05,
        z,
        NAN if math.isnan(z) else 0.04,
    )


NAN = math.nan


@pytest.mark.parametrize("n_reference", [0, 40])
def test_terms_on_a_page(n_reference: int) -> None:
    listed = NearestTerms(
        "secret-id",
        (term(EVIL, 1.5 if n_reference else NAN), term("lung", -0.5 if n_reference else NAN)),
        "z",
        n_reference,
        99,
    )
    page = image_page(None, CARD, terms=[("whole image", listed), ("region", listed)])
    table = tables(page)["Nearest terms"]
    assert [row[2] for row in table.rows] == ["0.250", "0.250"]
    if n_reference:
        assert [row[3:] for row in table.rows] == [
            ("0.200", "+0.050", "+1.50", "0.040"),
            ("0.200", "+0.050", "-0.50", "0.040"),
        ]
        assert "compared with 40 reference images" in table.caption
    else:
        assert {row[3:] for row in table.rows} == {("–", "–", "–", "–")}
        assert "no reference images" in table.caption
    notes = [b for s in page.sections for b in s.blocks if isinstance(b, Note)]
    assert [n.tone for n in notes] == ["plain" if n_reference else "warning"]
    html = render_page(page)
    assert "<script" not in html
    assert "secret-id" not in html
    assert "of 99 terms" in html


def test_figures_of_the_page_are_drawn_only_where_there_is_something(planted: Any) -> None:
    def figures(page: Page) -> int:
        return sum(isinstance(b, Figure) for s in page.sections for b in s.blocks)

    assert figures(methods_page(planted(), CARD)) == 1
    assert figures(methods_page(with_curves(planted()), CARD)) == 2
    assert [s.title for s in methods_page(planted(), CARD).sections] == ["All methods", "By finding", "Run card"]
