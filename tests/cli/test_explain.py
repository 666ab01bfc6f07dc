"""`chiasm explain` beyond one picture: pages, boxes, terms, tables; what does not go together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("default::chiasm.data.tokens.TruncationWarning")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    labels = {
        name: {"positive": [f"a film with {name}"], "negative": [f"no {name}"]}
        for name in ("effusion", "pneumothorax", "cardiomegaly", "consolidation", "nodule")
    }
    path.write_text(json.dumps({"labels": labels}))
    return path


def first_image(table: Path) -> Path:
    return sorted((table.parent / "images").glob("*.png"))[0]


def test_methods_side_by_side(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    found = chiasm(
        "explain", first_image(phantom_table), "left effusion", "nodule", "--against", "normal", "--methods",
        "similarity,attention", "--box", "2,2,20,20", "--curves", "--page", page, "--model", model_dir, "--json",
    )  # fmt: skip
    maps = found["image"]["maps"]
    assert [(m["text"], m["method"]) for m in maps] == [
        (text, method) for text in ("left effusion", "nodule") for method in ("similarity", "attention")
    ]
    assert all(0 <= m["boxes"]["pointing_game"] <= 1 for m in maps)
    assert all(len(m["curves"]["deletion"]) == 21 for m in maps)
    assert [c["method"] for c in found["image"]["baselines"][0]] == ["random", "centre"]
    html = page.read_text()
    for part in ("left effusion", "Deletion and insertion", "Run card", "not a medical device"):
        assert part in html
    assert str(tmp_path) not in html
    assert found["run_card"]["rows"] == {"images": 1}


def test_nearest_terms_of_image_and_region(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    image, words = first_image(phantom_table), tmp_path / "words.txt"
    words.write_text("[a]\nfilm\neffusion\n[b]\nnodule\n")
    plain = chiasm("explain", image, "--terms", words, "--model", model_dir)
    assert "without --reference" in plain
    reference = phantom_table.parent / "many.csv"
    lines = ["filepath,patient_id,id"]
    lines += [f"images/{p.name},q{k},{p.stem}-{k}" for k in range(4) for p in sorted(image.parent.glob("*.png"))]
    reference.write_text("\n".join(lines) + "\n")
    page = tmp_path / "t.html"
    found = chiasm(
        "explain", image, "--terms", words, "--region", "4,4,30,40", "--reference", reference, "--limit", "40", "--page",
        page, "--model", model_dir, "--json",
    )  # fmt: skip
    assert set(found["terms"]) == {"whole image", "region"}
    for listed in found["terms"].values():
        assert listed["ranked_by"] == "z"
        assert {t["term"] for t in listed["terms"]} == {"film", "effusion", "nodule"}
        z = [t["z"] for t in listed["terms"]]
        assert z == sorted(z, reverse=True)
    assert found["image"] is None
    assert "Nearest terms" in page.read_text()


def test_all_methods_on_a_table(
    chiasm: Run, model_dir: Path, phantom_table: Path, prompts: Path, tmp_path: Path
) -> None:
    page = tmp_path / "m.html"
    common = (
        "explain",
        "--table",
        phantom_table,
        "--labels-file",
        prompts,
        "--methods",
        "similarity",
        "--model",
        model_dir,
    )
    found = chiasm(*common, "--fidelity", "--curves", "--limit", "6", "--examples", "2", "--page", page, "--json")
    assert set(found["methods"]) == {"similarity", "centre"}
    scored = found["methods"]["similarity"]
    assert found["n"] == 6
    assert scored["pointing_game"]["chance"] > 0
    assert scored["gain_over_centre"]["difference"]["n"] == 6
    assert scored["fidelity"]["n"] == 12
    assert scored["deletion_gain"]["chance"] == 0
    assert found["boxes_without_prompts"] >= 0
    html = page.read_text()
    assert html.count("<img") == 4  # two examples: the image and one map each
    assert "chest-0000" not in html  # no id of a patient
    moved = tmp_path / "boxes.json"
    (phantom_table.parent / "boxes.json").rename(moved)
    try:
        assert "--boxes" not in chiasm(*common, "--limit", "6", code=1)
        again = chiasm(*common, "--boxes", moved, "--limit", "6", "--json")
    finally:
        moved.rename(phantom_table.parent / "boxes.json")
    assert again["methods"]["similarity"]["pointing_game"] == scored["pointing_game"]


def test_a_box_beside_one_picture(chiasm: Run, model_dir: Path, phantom_table: Path, tmp_path: Path) -> None:
    image, out = first_image(phantom_table), tmp_path / "h.png"
    found = chiasm("explain", image, "nodule", "--box", "0,0,48,48", "--model", model_dir, "--out", out, "--json")
    assert found["boxes"]["pointing_game"] == 1.0
    assert "pointing game 1.00 (chance 1.00)" in chiasm(
        "explain", image, "nodule", "--box", "0,0,48,48", "--model", model_dir, "--out", out
    )


def test_refusals(chiasm: Run, model_dir: Path, phantom_table: Path, prompts: Path) -> None:
    image, model = first_image(phantom_table), ("--model", model_dir)
    table = ("explain", "--table", phantom_table)
    for words, said in (
        (("explain", *model), "one of the two"),
        ((*table, "--labels-file", prompts, "--terms", "chest", *model), "for one image"),
        ((*table, *model), "--labels-file"),
        (("explain", image, "--labels-file", prompts, *model), "are for --table"),
        (("explain", image, "a", "--region", "1,2,3,4", *model), "--terms chest"),
        (("explain", image, "a", "--methods", "all", *model), "--page"),
        (("explain", image, *model), "needs a text"),
        (("explain", image, "a", "--box", "1,2,3", "--page", "x.html", *model), "x0,y0,x1,y1"),
        (("explain", image, "a", "--box", "9,2,3,4", "--page", "x.html", *model), "x0 < x1"),
        (("explain", image, "a", "--box", "0,0,inf,4", "--page", "x.html", *model), "all finite"),
        (("explain", image, "a", "--box", "nan,0,3,4", "--page", "x.html", *model), "all finite"),
        (("explain", image, "a", "--box", "a,b,c,d", "--page", "x.html", *model), "--box must be x0,y0,x1,y1"),
        (("explain", image, "--terms", "chest", "--region", "4,4,4,9", *model), "--region must have x0 < x1"),
        (("explain", image, "a", "--methods", " , ", "--json", *model), "names no method"),
        (("explain", image, "a", "--out", "x.gif", *model), "`--out x.gif` is no picture"),
        (("explain", image, "a", "--reference", phantom_table, *model), "are for --terms"),
        (("explain", image, "a", "--rank", "z", *model), "are for --terms"),
        (("explain", image, "a", "--curves", *model), "several maps need a page"),
        (("explain", image, "a", "b", *model), "several maps need a page"),
        (("explain", image, "a", "--fidelity", *model), "are for --table"),
        (("explain", image, "a", "--boxes", "b.json", *model), "are for --table"),
        ((*table, "a picture", *model), "one of the two"),
        ((*table, "--labels-file", prompts, "--out", "x.png", *model), "for one image"),
        ((*table, "--labels-file", prompts, "--box", "1,2,3,4", *model), "for one image"),
        ((*table, "--labels-file", prompts, "--methods", ",", *model), "names no method"),
        (("explain", image, "--terms", "chset", *model), "did you mean `chest`"),
        (("explain", image, "a", "--methods", "atention", "--json", *model), "did you mean `attention`"),
    ):
        text = chiasm(*words, code=1)
        assert said in text, words
        assert "error: " in text
