"""What ``chiasm explore`` shows: every number of its JSON on the page, names as text, and laws of maps and columns."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, ConfigError, InputError, UnknownName
from chiasm.evaluate.explore_figures import _short, choice_of_k, labels_in_clusters
from chiasm.evaluate.explore_map import MOST_CLASSES, MapColumn, _inside_script, map_column, render_map
from chiasm.evaluate.explore_page import _commonest, explore_page, map_notes
from chiasm.evaluate.explore_scores import Exploration, explore
from chiasm.evaluate.page import Figure, Note, Page, Table, render_page
from chiasm.evaluate.run_card import make_run_card
from chiasm.tasks.cluster_structure import Candidate, _by_size, _p_value, _redrawn
from chiasm.tasks.clustering import ClusterSettings, parse_clusters
from chiasm.types import Embeddings, Space

EVIL = "<script>alert(1)</script>"
QUICK = ClusterSettings(k=3, resamples=3, null_draws=4)


def made(n: int = 60, *, labels: Any = None, seed: int = 0) -> Embeddings:
    random = np.random.default_rng(seed)
    which = np.arange(n) % 3
    vectors = 2 * np.eye(3, 8)[which] + 0.15 * random.normal(size=(n, 8))
    columns = (
        {"organ": tuple("abc"[w] for w in which), "age": tuple(float(k) for k in range(n))}
        if labels is None
        else labels
    )
    return Embeddings(
        vectors.astype(np.float32), tuple(f"secret-{k}" for k in range(n)), Space("made", "w", "p", 8), "image",
        normalized=False, patients=tuple(f"person-{k // 2}" for k in range(n)), labels=columns,
        texts=tuple(f"words-{k}" for k in range(n)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Exploration:
    return explore(made(), clusters=QUICK, method="pca")


def page_of(found: Exploration) -> Page:
    return explore_page(found, make_run_card("chiasm explore", {"images": found.embeddings}, seed=0))


@pytest.fixture(scope="module")
def page(found: Exploration) -> Page:
    return page_of(found)


def tables(page: Page, title: str) -> list[Table]:
    return [b for s in page.sections if s.title == title for b in s.blocks if isinstance(b, Table)]


def test_every_agreement_of_the_json_is_on_the_page(found: Exploration, page: Page) -> None:
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    (table,) = tables(page, "Agreement with labels")
    rows: dict[str, dict[str, Any]] = {}
    column = ""
    for heading, score, *rest in table.rows:
        column = str(heading).split(" (")[0] or column
        rows.setdefault(column, {})[str(score)] = rest
    assert set(rows) == set(document["agreement"]) == {"organ", "age"}
    for name, agreement in document["agreement"].items():
        for score, (value, chance, high, trivial) in rows[name].items():
            number = agreement["scores"][score]
            assert value == f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"
            assert chance == f"{round(number['chance'], 3) + 0.0:.3f}"
            assert high == f"{round(number['null_high'], 3) + 0.0:.3f}"
            if score == "purity":
                assert trivial == f"{agreement['majority']:.3f}"
    assert document["agreement"]["organ"]["majority"] == pytest.approx(1 / 3)
    assert f"p = {document['agreement']['organ']['p_value']:.3f}" in str(table.rows[0][0])


def test_every_cluster_of_the_json_is_on_the_page(found: Exploration, page: Page) -> None:
    document = found.to_dict()["clustering"]
    (table,) = tables(page, "Clusters")
    assert len(table.rows) == len(document["clusters"]) == 3
    for row, cluster in zip(table.rows, document["clusters"], strict=True):
        cells = dict(zip(table.columns, row, strict=True))
        assert (cells["cluster"], cells["rows"], cells["patients"]) == (
            cluster["cluster"],
            str(cluster["rows"]),
            str(cluster["patients"]),
        )
        assert cells["largest patient"] == f"{100 * cluster['largest_patient']:.0f} %"
        assert cells["found again"] == f"{cluster['jaccard']:.3f}"
        assert str(cells["mostly (organ)"]).endswith(" 100 %")
    assert sum(c["rows"] for c in document["clusters"]) == 60
    assert {str(r[table.columns.index("mostly (organ)")])[0] for r in table.rows} == set("abc")


def test_key_numbers_are_those_of_the_json(found: Exploration, page: Page) -> None:
    keys = {k.name: k.interval for k in page.key_numbers}
    assert keys["trustworthiness of the map"] == found.projection.faith.trustworthiness
    assert keys["continuity of the map"] == found.projection.faith.continuity
    assert found.clustering is not None
    assert keys["stability of clusters"].value == found.clustering.structure.stability
    assert keys["silhouette"] == found.clustering.silhouette
    assert keys["agreement with organ"] == found.agreement["organ"].scores["ari"]


def test_no_row_is_on_page_or_in_numbers(found: Exploration, page: Page) -> None:
    html = render_page(page)
    for word in ("secret-", "person-", "words-"):
        assert word not in html
    numbers = json.dumps(found.to_dict())
    assert "person-" not in numbers
    assert "words-" not in numbers
    assert all("secret" not in n.text for n in map_notes(found))


def test_names_of_columns_and_classes_are_text() -> None:
    labels = {EVIL: tuple(("$\\frac{$", "<b>x</b>", "_c")[k % 3] for k in range(60))}
    found = explore(made(labels=labels), clusters=QUICK, method="pca")
    html = render_page(page_of(found))
    assert "<script" not in html
    assert "<b>x" not in html
    assert "&lt;script&gt;" in html
    text = render_map(
        found.projection.xy, found.projection.ids, found.columns, title=EVIL, subtitle=EVIL, notes=[Note(EVIL)]
    )
    assert text.count("<script") == text.count("</script>") == 2  # its own script and its data


@given(
    st.recursive(st.text() | st.none() | st.integers(-9, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=6)
)
def test_data_of_the_map_cannot_leave_its_element(value: Any) -> None:
    text = _inside_script(value)
    assert not {"<", ">", "&"} & {*text}
    assert text.isascii()
    assert json.loads(text) == value


@settings(max_examples=60)
@given(
    st.lists(
        st.none() | st.sampled_from(["a", "b", "<i>"]) | st.booleans() | st.integers(0, 5), min_size=1, max_size=30
    )
)
def test_a_column_gives_each_value_back(values: list[Any]) -> None:
    column = map_column("x", values)
    if column is None:
        assert all(v is None for v in values)
        return
    for value, code in zip(values, column.codes.tolist(), strict=True):
        assert (code < 0) == (value is None)
        # 1 and True are one class
        assert (
            value is None
            or column.categories[code] == str(value)
            or {column.categories[code], str(value)} in ({"1", "True"}, {"0", "False"})
        )
    assert len(set(column.codes.tolist()) - {-1}) == len(column.categories)


@settings(max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=13, max_size=80, unique=True))
def test_bands_rise_and_hold_every_number(values: list[float]) -> None:
    column = map_column("x", values)
    assert column is not None
    assert column.ordered
    assert (np.diff(column.codes[np.argsort(values)]) >= 0).all()
    assert column.codes.min() == 0
    assert column.codes.max() <= len(column.categories) - 1
    assert len(column.categories) <= 6


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([None, None], None),
        ([], None),
        (["a"], ("a",)),
        (["b", "a", None, "b"], ("a", "b")),
        ([math.nan, "a"], ("a",)),
        ([f"t{k}" for k in range(MOST_CLASSES + 1)] * 9, None),  # too many classes
        ([f"t{k}" for k in range(20)], None),  # nearly every row has another
        ([f"t{k:02d}" for k in range(20)] * 3, tuple(f"t{k:02d}" for k in range(20))),
        ([0.5, 0.25, 0.5], ("0.25", "0.5")),
    ],
)
def test_what_can_be_coloured_by(values: list[Any], classes: tuple[str, ...] | None) -> None:
    column = map_column("x", values)
    assert (None if column is None else column.categories) == classes


@pytest.mark.parametrize(
    ("codes", "mask", "text"),
    [
        ([0, 0, 1, -1], [1, 1, 1, 1], "a 67 %"),
        ([0, 0, 1, -1], [0, 0, 1, 1], "b 100 %"),
        ([0, 0, 1, -1], [0, 0, 0, 1], "–"),
        ([0, 1, 0, 1], [1, 1, 1, 1], "a 50 %"),
    ],
)
def test_the_commonest_label_of_a_cluster(codes: list[int], mask: list[int], text: str) -> None:
    column = MapColumn("x", ("a", "b"), np.asarray(codes, dtype=np.int16))
    assert _commonest(column, np.asarray(mask, dtype=bool)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "a"),
        ("$5 and $6", "$5 and $6"),
        ("_x", "\u200b_x"),
        ("y" * 30, "y" * 30),
        ("y" * 31, "y" * 29 + "…"),
        ("", ""),
    ],
)
def test_legend_entries(text: str, shown: str) -> None:
    assert _short(text) == shown


def test_the_choice_of_k_bears_numbers_that_are_none() -> None:
    candidates = [Candidate(2, 0.4, 0.1, 0.9), Candidate(3, math.nan, math.nan, math.nan)]
    assert choice_of_k(candidates, 2).startswith("<svg")
    column = MapColumn("x", ("a",), np.asarray([-1, -1], dtype=np.int16))
    assert labels_in_clusters(np.asarray([-1, 0]), column, names=["cluster 1", "in none"]).startswith("<svg")


@pytest.mark.parametrize(
    ("clusters", "numbered"),
    [
        ([5, 5, 9, 9, 9], [1, 1, 0, 0, 0]),
        ([2, 1, 1, 2], [0, 1, 1, 0]),  # equal sizes: by their first row
        ([-1, 3, -1], [-1, 0, -1]),
        ([-1, -1], [-1, -1]),
    ],
)
def test_clusters_are_numbered_by_size(clusters: list[int], numbered: list[int]) -> None:
    assert _by_size(np.asarray(clusters)).tolist() == numbered


@pytest.mark.parametrize(
    ("null", "p"),
    [
        ([[0.1, 0.1]] * 9, 1 / 10),
        ([[0.1, 0.1]] * 8 + [[0.1, 0.9]], 2 / 10),  # the best of all k counts
        ([[0.5, 0.5]] * 9, 10 / 10),
        ([[math.nan, math.nan]] * 9, 1 / 10),  # clouds without clusters lead by nothing
    ],
)
def test_the_p_value_of_structure(null: Any, p: float) -> None:
    candidates = (Candidate(2, 0.4, 0.1, 0.9), Candidate(3, 0.3, 0.1, 0.9))
    assert _p_value(candidates, 0, np.asarray(null)) == pytest.approx(p)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(0, 99))
def test_patients_are_drawn_whole_and_once(groups: list[int], seed: int) -> None:
    numbered = np.unique(groups, return_inverse=True)[1]
    rows = _redrawn(numbered, np.random.default_rng(seed))
    assert len(set(rows.tolist())) == len(rows) > 0
    assert {int(g) for g in numbered[rows]}.isdisjoint(numbered[np.setdiff1d(np.arange(len(groups)), rows)].tolist())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("kmeans", "kmeans"),
        ("kmeans:8", "kmeans:8"),
        (" K-Means:3 ", "kmeans:3"),
        ("hdbscan", "hdbscan"),
        ("hdbscan:15", "hdbscan:15"),
    ],
)
def test_clusters_as_they_are_written(text: str, name: str) -> None:
    assert parse_clusters(text).name == name


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("ward", UnknownName, "unknown clustering `ward`"),
        ("", UnknownName, "unknown clustering"),
        ("kmeans:x", InputError, "whole number after the colon, got `x`"),
        ("kmeans:-3", InputError, "got `-3`"),
        ("kmeans:2.5", InputError, "got `2.5`"),
        ("kmeans:1", ConfigError, "clusters.k must be at least 2, got 1"),
        ("kmeans:0", ConfigError, "clusters.k must be at least 2, got 0"),
        ("hdbscan:1", ConfigError, "clusters.min_cluster_size must be at least 2, got 1"),
    ],
)
def test_clusters_that_cannot_be(text: str, kind: type[ChiasmError], message: str) -> None:
    with pytest.raises(kind) as caught:
        parse_clusters(text)
    assert message in str(caught.value)


def test_the_order_of_rows_moves_no_number(found: Exploration) -> None:
    order = np.random.default_rng(0).permutation(60)
    mixed = explore(made().select(order), clusters=QUICK, method="pca")
    for name in found.agreement:
        for score, number in found.agreement[name].scores.items():
            assert mixed.agreement[name].scores[score].value == pytest.approx(number.value)
    assert mixed.projection.faith.trustworthiness.value == pytest.approx(
        found.projection.faith.trustworthiness.value, abs=1e-6
    )
    np.testing.assert_allclose(np.abs(mixed.projection.xy), np.abs(found.projection.xy[order]), atol=1e-4)


def test_labels_move_neither_map_nor_clusters(found: Exploration) -> None:
    other = explore(made(labels={"organ": ("z",) * 30 + ("y",) * 30}), clusters=QUICK, method="pca")
    assert found.clustering is not None
    assert other.clustering is not None
    np.testing.assert_array_equal(other.clustering.clusters, found.clustering.clusters)
    np.testing.assert_array_equal(other.projection.xy, found.projection.xy)


def test_figures_have_captions_that_say_what_they_show(page: Page) -> None:
    captions = [b.caption for s in page.sections for b in s.blocks if isinstance(b, Figure)]
    assert captions[:2] == ["PCA, coloured by cluster.", "PCA, coloured by organ."]
    assert sum("in each cluster" in c for c in captions) == 2


def test_bands_by_hand() -> None:
    column = map_column("x", [float(k) for k in range(13)])
    assert column is not None
    assert column.codes.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        5,
    ]  # a number on an edge belongs above, the last below
    assert column.categories == ("0 to 2", "2 to 4", "4 to 6", "6 to 8", "8 to 10", "10 to 12")


def test_each_cluster_has_its_own_largest_patient(found: Exploration) -> None:
    assert found.clustering is not None
    shares = dataclasses.replace(found.clustering, largest_patient=(0.1, 0.2, 0.3))
    (table,) = tables(page_of(dataclasses.replace(found, clustering=shares)), "Clusters")
    assert [row[table.columns.index("largest patient")] for row in table.rows] == ["10 %", "20 %", "30 %"]


def test_the_commonest_label_is_counted_among_labelled_rows() -> None:
    labels = {"organ": ("a",) * 12 + ("b",) * 8 + (None,) * 40}
    found = explore(made(labels=labels), clusters=ClusterSettings(k=3, resamples=2, null_draws=1), method="pca")
    assert found.majority["organ"] == pytest.approx(12 / 20)
    assert found.agreement["organ"].scores["purity"].n == 20
