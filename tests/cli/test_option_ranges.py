"""Numbers and boxes on the command line of explore, explain, guide and evaluate: ranges, words, and small helpers by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chiasm.cli.explain import FORMATS, _names, parse_box
from chiasm.cli.explore import _check_options, _sides, _write_points
from chiasm.cli.guide import _other_order, _start
from chiasm.errors import InputError
from chiasm.types import Box

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("explore", "--thumbnail-mb", "0"), "--thumbnail-mb"),
        (("explore", "--components", "-1"), "--components"),
        (("explore", "--neighbors", "1"), "--neighbors"),
        (("explore", "--batch-size", "0"), "--batch-size"),
        (("explore", "--perplexity", "many"), "--perplexity"),
        (("explore", "--seed", "-1"), "--seed"),
        (("explore", "--seed", "4294967296"), "--seed"),
        (("explore", "--seed", "x"), "--seed"),
        (("explain", "x.png", "a", "--top-k", "0"), "-k"),
        (("explain", "x.png", "a", "--limit", "0"), "--limit"),
        (("explain", "x.png", "a", "--examples", "-1"), "--examples"),
        (("explain", "x.png", "a", "--seed", "-1"), "--seed"),
        (("guide", "a", "--steps", "0"), "--steps"),
        (("guide", "a", "--cutouts", "0"), "--cutouts"),
        (("guide", "a", "--frames", "0"), "--frames"),
        (("guide", "a", "--size", "7"), "--size"),
        (("guide", "a", "--seed", "-5"), "--seed"),
        (("guide", "a", "--batch-size", "-2"), "--batch-size"),
        (("evaluate",), "Missing argument"),
        (("evaluate", "a.toml", "b.toml"), "b.toml"),
        (("evaluate", "a.toml", "--sed", "1"), "--sed"),
    ],
)
def test_a_number_out_of_range_is_met_before_anything_is_loaded(
    chiasm: Run, words: tuple[str, ...], option: str
) -> None:
    assert option in chiasm(*words, code=2)


@pytest.mark.parametrize(
    ("word", "box"),
    [
        ("0,0,5,9", Box(0, 0, 5, 9)),
        ("1.5, 2 ,3e1,4", Box(1.5, 2, 30, 4)),
        ("-3,-4,5,6", Box(-3, -4, 5, 6)),
    ],
)
def test_a_box_as_it_is_written(word: str, box: Box) -> None:
    assert parse_box(word) == box


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("", "must be x0,y0,x1,y1 in pixels"),
        ("1,2,3", "must be x0,y0,x1,y1 in pixels"),
        ("1,2,3,4,5", "must be x0,y0,x1,y1 in pixels"),
        ("1;2;3;4", "must be x0,y0,x1,y1 in pixels"),
        ("1,2,three,4", "must be x0,y0,x1,y1 in pixels"),
        ("3,2,3,4", "must have x0 < x1 and y0 < y1"),
        ("1,4,3,4", "must have x0 < x1 and y0 < y1"),
        ("5,2,3,4", "must have x0 < x1 and y0 < y1"),
        ("nan,2,3,4", "all finite"),
        ("1,2,inf,4", "all finite"),
        ("-inf,2,3,4", "all finite"),
    ],
)
def test_a_box_that_is_none(word: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_box(word, "--region")
    assert said in caught.value.message
    assert "--region" in caught.value.message
    assert f"`{word}`" in caught.value.message


@given(st.tuples(*[st.floats(-1e4, 1e4)] * 4))
def test_every_box_with_an_area_comes_back(numbers: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = numbers
    word = ",".join(map(repr, numbers))
    if x0 < x1 and y0 < y1:
        assert parse_box(word) == Box(x0, y0, x1, y1)
    else:
        with pytest.raises(InputError):
            parse_box(word)


@pytest.mark.parametrize(
    ("word", "names"),
    [("all", "all"), (" all ", "all"), ("auto", ["auto"]), ("a, b,,c ", ["a", "b", "c"]), ("all,a", ["all", "a"])],
)
def test_names_of_methods(word: str, names: Any) -> None:
    assert _names(word) == names


@pytest.mark.parametrize("word", ["", ",", " , ,"])
def test_no_names_of_methods(word: str) -> None:
    with pytest.raises(InputError, match="names no method") as caught:
        _names(word)
    assert "--methods all" in str(caught.value.hint)


def test_every_ending_is_one_that_pillow_writes() -> None:
    for name in FORMATS.values():
        Image.new("RGB", (3, 3)).save(io.BytesIO(), format=name)


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=3
    ),
    st.integers(0, 9),
)
def test_a_control_has_the_same_words_in_another_order(texts: list[str], seed: int) -> None:
    found = _other_order(texts, seed)
    assert found == _other_order(texts, seed)
    assert len(set(found)) == len(found) <= len(texts)
    wanted = [sorted(t.split()) for t in texts]
    for text in found:
        assert text not in texts
        assert sorted(text.split()) in wanted


@pytest.mark.parametrize("text", ["effusion", "very very", "a"])
def test_a_text_of_one_order_has_no_control(text: str) -> None:
    assert _other_order([text], 0) == []


@pytest.mark.parametrize(("size", "grey"), [(8, True), (33, True), (33, False)])
def test_the_start_is_soft_noise_in_range(size: int, grey: bool) -> None:
    start = _start(None, size, grey, 3)
    assert tuple(start.shape) == (1, 3, size, size)
    assert 0.3 <= float(start.min()) <= float(start.max()) <= 0.7
    assert bool((start[:, 0] == start[:, 1]).all()) == grey
    assert bool((start == _start(None, size, grey, 3)).all())
    assert not bool((start == _start(None, size, grey, 4)).all())


def test_the_start_is_the_picture(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    start = _start(tmp_path / "p.png", 99, True, 0)
    np.testing.assert_allclose(start[0].permute(1, 2, 0).numpy(), values / 255, atol=1e-6)
    Image.new("L", (4, 4), 51).save(tmp_path / "g.png")
    assert _start(tmp_path / "g.png", 99, True, 0).unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("method", "side", "said"),
    [
        ("tsne", "left", "--side must be auto, image, text or both, got `left`"),
        ("isomap", "auto", "--method must be tsne, umap or pca, got `isomap`"),
        ("PCA", "auto", "got `PCA`"),
        ("pca", "", "got ``"),
    ],
)
def test_words_of_explore(tmp_path: Path, method: str, side: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        _check_options(method, side, tmp_path)
    assert said in str(caught.value)
    _check_options("pca", "auto", tmp_path / "absent")


@pytest.mark.parametrize(
    ("side", "there", "found"),
    [
        ("auto", {"image", "text"}, ("image", "text")),
        ("auto", {"image"}, ("image", None)),
        ("auto", {"text"}, ("text", None)),
        ("image", {"image", "text"}, ("image", None)),
        ("text", {"image", "text"}, ("text", None)),
        ("both", {"image", "text"}, ("image", "text")),
        ("both", {"image"}, None),
        ("text", {"image"}, None),
        ("auto", set(), None),
    ],
)
def test_sides_of_a_store(side: str, there: set[str], found: Any) -> None:
    def read(*, side: str) -> str:
        if side not in there:
            raise InputError(f"no {side}")
        return side

    if found is None:
        with pytest.raises(InputError, match="no "):
            _sides(read, side, None, None)
    else:
        assert _sides(read, side, None, None) == found


def test_points_bear_hostile_names_and_keep_their_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from chiasm.evaluate.explore_scores import explore
    from chiasm.types import Embeddings, Space

    ids = ('a,"b"', "line\nbreak", "ünï", "=1+1", "5", "6")
    labels = {"organ, kind": ("x", 'y"', None, "x", "z\n", "x"), "side": ("l", "r", "l", "r", "l", "r")}
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rows = Embeddings(vectors, ids, Space("made", "w", "p", 4), "image", normalized=False, labels=labels)
    found = explore(rows, method="pca")
    _write_points(tmp_path, found)
    table = list(csv.DictReader(io.StringIO((tmp_path / "points.csv").read_text(encoding="utf-8"), newline="")))
    assert tuple(r["id"] for r in table) == ids
    assert [r["organ, kind"] or None for r in table] == list(labels["organ, kind"])
    np.testing.assert_allclose([[float(r["x"]), float(r["y"])] for r in table], found.projection.xy, rtol=1e-6)
    stored = pq.read_table(tmp_path / "points.parquet").to_pydict()
    assert stored["id"] == list(ids)
    assert stored["organ, kind"] == list(labels["organ, kind"])
    assert set(stored) == {"id", "modality", "x", "y", "organ, kind", "side (label)"}
