"""The page of a search: every number of the JSON, no text unless asked, hostile texts as text, one patient without an interval."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from chiasm.errors import ChiasmError, InputError, UnknownName
from chiasm.evaluate.page import Gallery, Page, render_page
from chiasm.evaluate.probe_scores import ProbeGroup, ProbeScores, score_probes
from chiasm.evaluate.retrieval_page import _plain, make_retrieval_page
from chiasm.evaluate.run_card import RunCard
from chiasm.evaluate.search_relevance import (
    Relevance,
    number_keys,
    relevant_by_keys,
    relevant_by_labels,
    same_keys,
    same_words,
)
from chiasm.evaluate.search_scores import (
    DirectionScores,
    NoRightAnswer,
    SearchScores,
    arrow,
    best_ranks,
    constant_recall,
    count_answers,
    recall_curve,
    score_search,
)
from chiasm.metrics.bootstrap import Comparison
from chiasm.tasks.contradictions import Probe
from chiasm.types import Embeddings, Interval, Space

NAN = float("nan")
CARD = RunCard("chiasm retrieval", {"image": "ab"}, {"image": 9}, "m@w.p/3", 1)


def interval(value: float, chance: float | None) -> Interval:
    return Interval(value, value - 0.011, value + 0.022, 7, chance)


def direction(**changes: Any) -> DirectionScores:
    values: dict[str, Any] = {
        "recall": {1: interval(0.101, 0.011), 10: interval(0.555, 0.111)}, "median_rank": interval(8.5, 40.5),
        "n_queries": 1007, "n_unanswerable": 13, "corpus_size": 2345, "majority": {1: 0.021, 10: 0.222},
        "mean_reciprocal_rank": interval(0.303, 0.033), "average_precision": interval(0.404, 0.044),
        "average_precision_at_r": interval(0.252, 0.025), "ndcg": interval(0.606, 0.066),
        "constant": {"average_precision": 0.047, "average_precision_at_r": 0.028, "ndcg": 0.069, "mean_reciprocal_rank": 0.038},
        "exclude": "patient", "right_answers": 3.4, "ranks": np.array([1.0, 3.0, 10.0]),
    }  # fmt: skip
    return DirectionScores(**{**values, **changes})


def scores(**changes: Any) -> SearchScores:
    values: dict[str, Any] = {
        "directions": {"image_to_image": direction()},
        "keys": ("kind",),
        "left_out": {"text_to_text": "no texts"},
    }
    return SearchScores(**{**values, **changes})


def group(**changes: Any) -> ProbeGroup:
    kinds = {"left called right": interval(0.571, 0.5), "right called left": interval(0.572, 0.5)}
    gain = Comparison(interval(0.083, None), 0.0123)
    values = {"wins": interval(0.573, 0.5), "kinds": kinds, "always": 0.514, "blind": interval(0.495, 0.5), "gain": gain,
              "corrected": interval(0.586, 0.5)}  # fmt: skip
    return ProbeGroup(**{**values, **changes})


def rows(
    vectors: Any,
    modality: Any = "image",
    *,
    labels: Any = None,
    patients: Any = None,
    texts: Any = None,
    ids: Any = None,
) -> Embeddings:
    values = np.asarray(vectors, dtype=np.float32)
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    names = ids or tuple(f"secret-{i}" for i in range(len(values)))
    return Embeddings(values, names, Space("t", "w", "p", values.shape[1]), modality, labels=labels or {},
                      patients=patients, texts=texts)  # fmt: skip


def both(images: Embeddings, texts: Embeddings | None = None) -> Any:
    return {"image": images, "text": texts if texts is not None else images}.__getitem__


def plain(page: Page) -> str:
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", render_page(page), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text)))


def test_every_number_of_the_json_stands_on_the_page() -> None:
    found = scores()
    text = plain(make_retrieval_page(found, both(rows(np.eye(3))), CARD))
    for measure, (value, constant) in found.directions["image_to_image"].measures().items():
        last = "–" if constant is None else f"{constant:.3f}"
        assert f"{measure} {value} {value.chance:.3f} {last}" in text, measure
    for words in ("1,007 queries, 2,345 rows searched, 3.4 right answers", "13 queries without a right answer",
                  "everything but the query's own patient", "Not measured: text → text (no texts).", "same kind as the",
                  "one answer list for all: 0.222", CARD.digest):  # fmt: skip
        assert words in text, words
    assert "Keep this page" not in text, "no examples were asked for"
    graded = plain(make_retrieval_page(scores(graded=True), both(rows(np.eye(3))), CARD))
    assert "shares findings with kind of the query" in graded


def test_the_json_is_strict_and_has_all_parts() -> None:
    document = json.loads(json.dumps(scores().to_dict(), allow_nan=False))
    assert set(document) == {"image_to_image", "keys", "graded", "left_out"}
    found = document["image_to_image"]
    assert found["n_unanswerable"] == 13
    assert found["constant"]["ndcg"] == 0.069
    text = json.dumps(found)
    for number in ("0.101", "0.555", "0.404", "0.252", "0.606", "0.303", "8.5", "40.5"):
        assert number in text
    assert "ranks" not in found, "one number a query is no summary"


def test_depths_that_were_not_scored_are_named() -> None:
    found = direction()
    assert (found.recall_at_1.value, found.recall_at_10.value) == (0.101, 0.555)
    with pytest.raises(UnknownName, match="unknown depth of recall `5`"):
        _ = found.recall_at_5
    without = scores(directions={"image_to_image": direction(recall={3: interval(0.3, 0.1)}, majority={3: 0.1})})
    page = make_retrieval_page(without, both(rows(np.eye(3))), CARD)
    assert page.key_numbers == ()
    assert "R@3" in plain(page)


def test_probes_on_the_page() -> None:
    probes = ProbeScores({"laterality": group()}, 44, 1234)
    text = plain(make_retrieval_page(scores(), both(rows(np.eye(3))), CARD, probes=probes))
    g = probes.groups["laterality"]
    assert f"laterality {g.wins} 7 {g.blind} 0.514 {g.corrected}" in text
    for kind, value in g.kinds.items():
        assert f"– {kind} {value} 7" in text
    assert "The image decides in part on laterality: +0.083 [+0.072, +0.105] against the mean image, p = 0.012." in text
    assert "1,234 sentences of 44 images" in text


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Comparison(Interval(0.1, 0.01, 0.2, 7), 0.049), "The image decides in part"),
        (Comparison(Interval(0.1, 0.01, 0.2, 7), 0.05), "Nothing shows that the image decides"),
        (Comparison(Interval(-0.1, -0.2, -0.01, 7), 0.001), "Nothing shows that the image decides"),
        (Comparison(Interval(0.0, 0.0, 0.0, 7), 1.0), "+0.000 [+0.000, +0.000] against the mean image, p = 1.000."),
        (
            Comparison(Interval(0.1, NAN, NAN, 7), NAN),
            "+0.100 (too few patients for an interval) against the mean image.",
        ),
    ],
)
def test_what_is_claimed_of_probes(gain: Comparison, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("interval_dots", "recall_curves"):
        monkeypatch.setattr(f"chiasm.evaluate.retrieval_page.{name}", lambda *_, **__: "<svg></svg>")
    probes = ProbeScores({"laterality": group(gain=gain)}, 4, 12)
    text = plain(make_retrieval_page(scores(), both(rows(np.eye(3))), CARD, probes=probes))
    assert words in text
    assert "nan" not in text


def test_one_patient_has_no_interval() -> None:
    images = rows(np.eye(4), patients=("p",) * 4)
    probes = [Probe(i, "left called right", "left", "right") for i in range(4)]
    found = score_probes(images, probes, lambda s: rows(np.eye(4)[: len(s)], "text"), n_resamples=20)
    gain = found.groups["laterality"].gain
    assert not np.isfinite([gain.p_value, gain.difference.low]).any()
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.groups["laterality"].wins.value == (1 + 0 + 0.5 + 0.5) / 4, "ties are one half"


HOSTILE = "<script>alert(1)</script> <img src=x onerror=y>"


def test_hostile_texts_are_text() -> None:
    texts = rows(np.eye(3), "text", texts=(HOSTILE, "{{ 3*3333 }}", "é" * 300))
    images = rows(np.eye(3))
    found = score_search(both(images, texts), n_resamples=5, directions=["text_to_image", "image_to_text"])
    page = make_retrieval_page(found, both(images, texts), CARD, examples=3)
    drawn = render_page(page)
    assert "<script>" not in drawn
    assert "<img src=x" not in drawn
    assert "9999" not in re.sub(r"<svg.*?</svg>|base64,[^\"]*", "", drawn, flags=re.DOTALL)
    assert "secret" not in drawn, "no id of a row"
    gallery = next(b for s in page.sections for b in s.blocks if isinstance(b, Gallery))
    assert len(gallery.rows) == 6
    lines = [line for _, pictures in gallery.rows for p in pictures for line in p.lines]
    assert max(map(len, lines)) == 160
    assert any(line.endswith("é…") for line in lines)


@pytest.mark.parametrize(("value", "expected"), [(None, "–"), (0.12345, "0.123"), (0.0, "0.000")])
def test_numbers_without_an_interval(value: float | None, expected: str) -> None:
    assert _plain(value) == expected


# --- what is right ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A  b\n C", "a b c"), ("", None), ("  ", None), (None, None), ("ß", "ss"), ("É", "é"), ("x\u00a0y", "x y")],
)
def test_words_are_compared_without_case_and_spacing(text: str | None, expected: str | None) -> None:
    assert same_words(text) == expected


def test_keys_by_hand() -> None:
    left, right = number_keys("k", (("a", None, "b"), ("b", None, "c", "a")), 3, 4)
    a, nobody, b = left.tolist()
    assert right.tolist() == [b, -2, max(right), a]
    assert (nobody, len({a, b, int(right[2])})) == (-1, 3), "missing keys never agree"
    with pytest.raises(InputError, match="key `k` has 1 and 2 values for 1 and 3 rows"):
        number_keys("k", (("a",), ("a", "b")), 1, 3)


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("none", [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]),
        ("self", [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]),
        ("patient", [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]),
    ],
)
def test_the_same_class_by_hand(exclude: str, expected: list[list[int]]) -> None:
    images = rows(np.eye(4), labels={"k": ("a", "a", "b", "a")}, patients=("p", "p", "q", "r"))
    relevance = relevant_by_labels(images, images, ["k"], exclude=exclude)
    assert relevance.gains(np.arange(4)).tolist() == expected
    assert relevance.gains(np.array([3])).tolist() == [expected[3]]
    assert not relevance.graded


@pytest.mark.parametrize(
    ("cells", "worth"),
    [
        (("x|y", "x|y"), 1),
        (("x|y", "x"), 1 / 2),
        (("x|y|z", "x|y"), 2 / 3),
        (("x|y", "z"), 0),
        (("x | y", "y|x"), 1),
        (("x|", "x"), 1),
        (("x|y", None), 0),
        (("|", "|"), 1),
        ((None, "|"), 0),
        (("|", None), 0),
    ],
)
def test_shared_findings_by_hand(cells: tuple[str, str | None], worth: float) -> None:
    images = rows(np.eye(3)[:2], labels={"k": cells})
    gains = relevant_by_labels(images, images, ["k"]).gains(np.arange(2))
    assert gains[0, 1] == pytest.approx(worth)
    assert gains[1, 0] == gains[0, 1], "as much one way as the other"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10_000))
def test_jaccard_is_that_of_sets(n: int, findings: int, seed: int) -> None:
    flags = np.random.default_rng(seed).integers(0, 2, (n, findings))
    labels = {f"f{j}": tuple(int(v) for v in flags[:, j]) for j in range(findings)} | {"zero": (0,) * n}
    images = rows(np.eye(max(n, 2))[:n], labels=labels)
    gains = relevant_by_labels(images, images, list(labels)).gains(np.arange(n))
    sets = [{j for j in range(findings) if row[j]} for row in flags]
    expected = [[len(a & b) / len(a | b) if a | b else 1 for b in sets] for a in sets]
    np.testing.assert_allclose(gains, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: relevant_by_labels(r, r, []), "no label column"),
        (lambda r: relevant_by_labels(r, r, ["kk"]), "did you mean `k`"),
        (lambda r: relevant_by_labels(r, r, ["k", "n"]), "`k` has 3 values that are not 0, 1 or blank"),
        (lambda r: relevant_by_labels(r, r, ["k"], exclude="all"), "unknown value of exclude `all`"),
        (lambda r: same_keys(r, r, ["colour"]), "unknown kind of sameness `colour`"),
        (lambda r: relevant_by_keys(r, r, {"x": ((1, 2), (1, 2, 3))}), "key `x` has 2 and 3 values"),
        (lambda r: score_search(both(r), directions=["a_to_b"]), "unknown direction"),
        (
            lambda r: score_search(both(r), directions=["image_to_image"], relevant_by=["k"], ks=[]),
            "at least 1, got []",
        ),
        (lambda r: score_search(both(r), directions=["text_to_image"], ks=[0, 1]), "at least 1, got [0, 1]"),
        (lambda r: score_search(both(r), directions=["image_to_image"]), "no query has a right answer"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, message: str) -> None:
    images = rows(np.eye(3), labels={"k": ("a", "b", "a"), "n": (0, 1, 1)})
    with pytest.raises(ChiasmError, match=re.escape(message)):
        call(images)


# --- what is measured ---


def naive_constant(gains: np.ndarray, k: int) -> float:
    """Greedy: the row that serves most queries not served yet, k times."""
    left = gains[gains.any(1)]
    n = len(left)
    for _ in range(k):
        if len(left):
            left = left[~left[:, left.sum(0).argmax()]]
    return 1 - len(left) / n


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_one_list_for_all_by_hand(n: int, kinds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    words = tuple(f"k{v}" for v in random.integers(0, kinds, n))
    images = rows(np.eye(n), labels={"k": words})
    relevance = relevant_by_labels(images, images, ["k"], exclude="self")
    right, allowed, worth = count_answers(relevance, n)
    gains = relevance.gains(np.arange(n)) > 0
    np.testing.assert_array_equal(right, gains.sum(1))
    np.testing.assert_array_equal(allowed, n - 1)
    np.testing.assert_allclose(worth, gains.sum(0))
    if right.any():
        found = constant_recall(relevance, right, (1, 2, 30))
        assert found == pytest.approx({k: naive_constant(gains, k) for k in (1, 2, 30)})


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 12), st.integers(0, 10_000))
def test_ndcg_of_shared_findings_equals_scikit_learn(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = tuple("|".join(["all", *random.choice(list("xyz"), 2, replace=False)]) for _ in range(n))
    images, texts = (
        rows(random.normal(size=(n, 5)), labels={"k": cells}),
        rows(random.normal(size=(n, 5)), "text", labels={"k": cells}),
    )
    found = score_search(both(images, texts), directions=["text_to_image"], relevant_by=["k"], n_resamples=2)
    gains = relevant_by_labels(texts, images, ["k"]).gains(np.arange(n))
    expected = ndcg_score(gains, texts.vectors @ images.vectors.T, k=10)
    assert found.directions["text_to_image"].ndcg.value == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(9)))
def test_scores_ignore_the_order_of_rows_and_a_rotation(seed: int, order: list[int]) -> None:
    random = np.random.default_rng(seed)
    vectors, words = random.normal(size=(9, 4)), tuple(random.choice(list("ab"), 9))
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    one = rows(vectors, labels={"k": words}, patients=tuple("ppqqrrsst"))
    other = rows(
        (vectors @ turn)[order], labels={"k": tuple(words[i] for i in order)}, ids=tuple(f"secret-{i}" for i in order),
        patients=tuple("ppqqrrsst"[i] for i in order),
    )  # fmt: skip
    found = []
    for images in (one, other):
        try:
            found.append(score_search(both(images), directions=["image_to_image"], relevant_by=["k"], n_resamples=2))
        except NoRightAnswer:
            found.append(None)
    if found[0] is None or found[1] is None:
        assert found[0] is found[1]
        return
    a, b = (f.directions["image_to_image"] for f in found)
    for name, (value, constant) in a.measures().items():
        assert value.value == pytest.approx(b.measures()[name][0].value, abs=1e-9)
        assert value.chance == pytest.approx(b.measures()[name][0].chance)
        if name.startswith("R@"):
            assert constant == pytest.approx(b.measures()[name][1])


def test_blocks_give_what_one_matrix_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    images = rows(random.normal(size=(30, 6)), labels={"k": tuple(random.choice(list("abc"), 30))})
    relevance = relevant_by_labels(images, images, ["k"], exclude="self")
    whole = best_ranks(images.vectors, images.vectors, relevance)
    monkeypatch.setattr("chiasm.evaluate.search_scores._BLOCK_VALUES", 70)
    parts = best_ranks(images.vectors, images.vectors, relevance)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])


def test_a_collapsed_model_is_at_chance_in_any_order() -> None:
    """Hundreds of numbers that are not exact in binary: rounding must not order rows that are equal."""
    vector = np.random.default_rng(0).normal(size=(1, 384))
    images, texts = (rows(np.repeat(vector, 203, 0), m) for m in ("image", "text"))
    found = score_search(both(images, texts), directions=["text_to_image"], same=["pair"], n_resamples=2)
    chances = {name: value.chance for name, (value, _) in found.directions["text_to_image"].measures().items()}
    measures = {name: value for name, (value, _) in found.directions["text_to_image"].measures().items()}
    for name in ("mAP", "mAP@R", "nDCG@10", "median rank"):
        assert measures.pop(name).value == pytest.approx(chances[name])
    assert all(value.value <= value.chance for value in measures.values()), "never rewarded"


@pytest.mark.parametrize(
    ("ranks", "size", "ends"),
    [([1.0], 1, (1, 1.0)), ([1.0, 4.0], 4, (4, 1.0)), ([2.5], 3, (3, 1.0)), ([5.0, 1.0], 4, (4, 0.5))],
)
def test_curves_of_recall(ranks: Sequence[float], size: int, ends: tuple[int, float]) -> None:
    depths, recall = recall_curve(np.array(ranks), size)
    assert (depths[0], depths[-1], recall[-1]) == (1, *ends)
    assert (np.diff(depths) > 0).all()
    assert (np.diff(recall) >= 0).all()


def test_directions_in_words() -> None:
    assert arrow("text_to_image") == "text → image"
    assert Relevance(("k",)).size == 0
