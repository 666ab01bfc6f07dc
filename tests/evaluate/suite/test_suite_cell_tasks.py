"""Every task of a suite on vectors made by hand: what comes out is what the metric or library gives, and tests stay tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ConfigError, InputError
from chiasm.evaluate.suite import tasks as module
from chiasm.evaluate.suite.neighbours import _nearest, _votes
from chiasm.evaluate.suite.results import TaskResult
from chiasm.evaluate.suite.rows import DataRows
from chiasm.evaluate.suite.settings import DataEntry
from chiasm.evaluate.suite.tasks import (
    SUITE_TASKS,
    Cell,
    FewShotSettings,
    NeighbourSettings,
    NoSettings,
    ProbeSettings,
    RetrievalSettings,
    SurvivalSettings,
)
from chiasm.metrics.calibration import expected_calibration_error
from chiasm.metrics.classification import auroc
from chiasm.types import Embeddings, Sample, Space

SPACE = Space("made", "w" * 8, "p" * 8, 6)
#: Rows of each part, in this order; two rows a patient.
TRAIN, VAL, TEST = 40, 20, 40


def cell_of(
    truth: np.ndarray, *, mode: str = "single", seed: int = 0, strength: float = 1.5, val: int = VAL, **fields: Any
) -> Cell:
    """Vectors around the direction of their first true label, and noise."""
    n = len(truth)
    random = np.random.default_rng(seed)
    parts = tuple("train" if k < TRAIN else "val" if k < TRAIN + val else "test" for k in range(n))
    samples = tuple(
        Sample(f"s{k}", patient=f"p{k // 2}", labels={"days": 30.0 + 2 * (k // 2), "event": (k // 2) % 2})
        for k in range(n)
    )
    labels = tuple("abcdef"[: truth.shape[1]])
    entry = DataEntry(source="x", labels=labels, truth="*", mode=mode)  # type: ignore[arg-type]
    digests = dict.fromkeys(("images", "texts", "rows", "truth", "parts"), "0")
    rows = DataRows("made", entry, samples, (), parts, truth, mode, {}, digests)
    place = np.eye(truth.shape[1], 6)[np.nan_to_num(truth).argmax(1)]
    vectors = strength * place * (np.nan_to_num(truth).max(1) > 0)[:, None] + random.normal(size=(n, 6))
    images = Embeddings(
        vectors.astype(np.float32), tuple(s.id for s in samples), SPACE, "image", normalized=False, patients=rows.groups
    )
    given: dict[str, Any] = {"zero_shot": None, "texts": None, "seed": 0, "n_resamples": 10, **fields}
    return Cell(rows, images, **given)


def classes(count: int = 3, seed: int = 1) -> np.ndarray:
    return np.eye(count)[np.random.default_rng(seed).integers(count, size=TRAIN + VAL + TEST)]


def findings(seed: int = 1) -> np.ndarray:
    truth = (np.random.default_rng(seed).random((TRAIN + VAL + TEST, 2)) < 0.4).astype(float)
    truth[[3, 50, 70], 0] = np.nan
    return truth


def ran(kind: str, cell: Cell, wanted: Any = None) -> TaskResult:
    task = SUITE_TASKS.get(kind)
    return task.run(cell, task.settings() if wanted is None else wanted)


FITTED = [
    ("linear_probe", ProbeSettings((0.1, 1.0))),
    ("prototype", NoSettings()),
    ("knn", NeighbourSettings((1, 5))),
    ("few_shot", FewShotSettings(shots=3, draws=2)),
    ("few_shot", FewShotSettings(shots=3, draws=2, method="linear_probe")),
]


@pytest.mark.parametrize(("kind", "wanted"), FITTED)
@pytest.mark.parametrize("mode", ["single", "multi"])
def test_answers_never_see_the_truth_of_test_rows(kind: str, wanted: Any, mode: str) -> None:
    truth = classes() if mode == "single" else findings()
    turned = truth.copy()
    turned[TRAIN + VAL :] = np.roll(truth[TRAIN + VAL :], 1, axis=1)
    before = ran(kind, cell_of(truth, mode=mode), wanted)
    cell = cell_of(truth, mode=mode)
    after = ran(kind, dataclasses.replace(cell, data=dataclasses.replace(cell.data, truth=turned)), wanted)
    np.testing.assert_array_equal(before.answers, after.answers)
    assert before.chosen == after.chosen
    assert before.main.value.value != after.main.value.value


@pytest.mark.parametrize(("kind", "wanted"), FITTED)
def test_a_test_row_is_answered_by_itself(kind: str, wanted: Any) -> None:
    """Other test rows are no part of the answer: dropping half of them changes nothing for the rest."""
    cell = cell_of(classes())
    whole = ran(kind, cell, wanted)
    kept = [k for k in range(TRAIN + VAL + TEST) if k < TRAIN + VAL or k % 2]
    half = ran(kind, dataclasses.replace(cell, images=cell.images.select(kept)), wanted)
    np.testing.assert_array_equal(half.rows, whole.rows[1::2])
    np.testing.assert_allclose(half.answers, whole.answers[1::2], atol=1e-9)


@pytest.mark.parametrize(("kind", "wanted"), FITTED)
def test_rows_are_those_of_the_test_part_with_their_truth(kind: str, wanted: Any) -> None:
    result = ran(kind, cell_of(classes()), wanted)
    assert result.rows.tolist() == list(range(TRAIN + VAL, TRAIN + VAL + TEST))
    np.testing.assert_array_equal(result.truth, classes()[TRAIN + VAL :])
    assert result.main.value.n == TEST
    json.dumps(result.to_dict(), allow_nan=False)


def test_prototypes_by_hand() -> None:
    cell = cell_of(classes(2))
    result = ran("prototype", cell)
    unit = cell.images.vectors / np.linalg.norm(cell.images.vectors, axis=1, keepdims=True)
    said = [unit[:TRAIN][classes(2)[:TRAIN, k] == 1].mean(0) for k in range(2)]
    near = np.stack([unit[TRAIN + VAL :] @ (m / np.linalg.norm(m)) for m in said], axis=1)
    by_hand = auroc(classes(2)[TRAIN + VAL :, 0], near[:, 0] - near[:, 1])
    assert result.main.value.value == pytest.approx(by_hand)
    shares = (near.argmax(1) == classes(2)[TRAIN + VAL :].argmax(1)).mean()
    assert result.numbers["accuracy"].value.value == pytest.approx(shares)


def test_a_class_that_was_never_trained_is_never_said() -> None:
    truth = classes(3)
    truth[:TRAIN][truth[:TRAIN, 2] == 1] = [1, 0, 0]
    result = ran("prototype", cell_of(truth))
    assert (result.answers[:, 2] < result.answers[:, :2].min()).all()
    assert np.ptp(result.answers[:, 2]) == 0
    assert result.numbers["auroc c"].value.value == 0.5


def test_a_finding_without_both_sides_in_training_is_told() -> None:
    truth = findings()
    truth[:TRAIN, 1] = 0
    result = ran("prototype", cell_of(truth, mode="multi"))
    assert "`b` has one class only among the training rows and is not fitted" in result.notes
    assert (result.answers[:, 1] == 0).all()
    assert result.numbers["auroc b"].value.value == 0.5


def test_where_choices_were_made_is_said() -> None:
    """Validation rows of one class cannot choose: then training patients are held back, and the note says so."""
    notes = {}
    for name, truth, val in (("all", findings(), VAL), ("one", findings(), VAL), ("none", findings(), 0)):
        if name == "one":
            truth[TRAIN : TRAIN + VAL, 1] = 0
        notes[name] = ran("knn", cell_of(truth, mode="multi", val=val), NeighbourSettings((1, 5))).notes[0]
    assert notes["all"] == "fitted on 40 rows; choices on 20 validation rows"
    assert notes["none"] == "fitted on 40 rows; choices on a quarter of the training patients"
    assert notes["one"] == (
        "fitted on 40 rows; choices on 20 validation rows, of 1 labels whose validation rows have one class only on a "
        "quarter of the training patients"
    )


def test_settings_are_chosen_on_the_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.evaluate.suite import neighbours

    seen = []
    searched = neighbours.Neighbours._search

    def spy(self: Any, x: Any, y: Any, x_held: Any, y_held: Any) -> Any:
        seen.append((len(x), len(x_held)))
        return searched(self, x, y, x_held, y_held)

    monkeypatch.setattr(neighbours.Neighbours, "_search", spy)
    ran("knn", cell_of(classes()), NeighbourSettings((1, 5)))
    assert seen == [(TRAIN, VAL)]


def zero_shot_of(scores: np.ndarray, probabilities: np.ndarray) -> Callable[[Embeddings], Any]:
    @dataclasses.dataclass
    class Found:
        scores: np.ndarray
        probabilities: np.ndarray
        notes: tuple[str, ...] = ("asked by hand",)

    return lambda images: Found(scores, probabilities)


def test_zero_shot_and_calibration_by_hand() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([1, 1], size=TEST)
    cell = cell_of(classes(2), zero_shot=zero_shot_of(np.log(probabilities), probabilities))
    truth = classes(2)[TRAIN + VAL :]
    zero = ran("zero_shot", cell)
    assert zero.main.value.value == pytest.approx(auroc(truth[:, 0], probabilities[:, 0]))
    assert zero.notes == ("asked by hand",)
    calibration = ran("calibration", cell)
    assert calibration.main.value.value == pytest.approx(
        expected_calibration_error(truth.argmax(1).tolist(), probabilities)
    )
    assert calibration.numbers["brier"].value.value == pytest.approx(((probabilities - truth)[:, 1] ** 2).mean())
    share = truth[:, 0].mean()
    assert calibration.numbers["brier"].majority == pytest.approx(share * (1 - share))  # a constant's Brier score
    assert {n.better for n in calibration.numbers.values()} == {"lower"}
    three = np.full((TEST, 3), 1 / 3)
    constant = ran("calibration", cell_of(classes(3), zero_shot=zero_shot_of(three, three)))
    shares = classes(3)[TRAIN + VAL :].mean(0)
    assert constant.numbers["brier"].majority == pytest.approx(1 - (shares**2).sum())
    assert constant.numbers["brier"].value.value == pytest.approx(2 / 3)


def texts_of(cell: Cell, *, partner: list[int], rows: list[int]) -> Callable[[], Embeddings]:
    """Texts of rows of the data set; each has the vector of another row's image."""
    ids = tuple(f"s{r}" for r in rows)
    images = cell.images
    vectors = images.vectors[partner]
    words = tuple(f"text {p}" for p in partner)
    return lambda: Embeddings(
        vectors, ids, SPACE, "text", normalized=False, patients=tuple(f"p{r // 2}" for r in rows), texts=words
    )


def test_retrieval_by_hand() -> None:
    cell = cell_of(classes())
    tested = list(range(TRAIN + VAL, TRAIN + VAL + TEST))
    right = dataclasses.replace(cell, texts=texts_of(cell, partner=[0, *tested], rows=[0, *tested]))
    result = ran("retrieval", right, RetrievalSettings((1, 5)))
    assert result.rows.tolist() == tested  # the training row's text is no query
    assert result.main.value.value == 1.0
    assert result.notes == ("40 images are searched",)
    assert set(result.numbers) == {
        f"{side} {what}" for side in ("text to image", "image to text") for what in ("R@1", "R@5", "median rank")
    }
    turned = dataclasses.replace(
        cell, texts=texts_of(cell, partner=[*tested[10:20], *tested[:10], *tested[20:]], rows=tested)
    )
    wrong = ran("retrieval", turned, RetrievalSettings((1,)))
    assert wrong.answers[:, 0].tolist() == [0.0] * 20 + [1.0] * 20
    assert wrong.main.value.value == pytest.approx(0.5)
    some = dataclasses.replace(cell, texts=texts_of(cell, partner=[0, 1], rows=[0, 1]))
    with pytest.raises(InputError, match="no test row of data set `made` has a text"):
        ran("retrieval", some)


def test_survival_without_a_readable_test_image_is_an_error_not_a_crash() -> None:
    pytest.importorskip("sksurv")
    cell = cell_of(classes())
    wanted = SurvivalSettings("days", "event")
    assert ran("survival", cell, wanted).main.value.n == TEST // 2  # patients
    blind = dataclasses.replace(cell, images=cell.images.select(list(range(TRAIN + VAL))))
    with pytest.raises(InputError, match="no image of the test rows of data set `made` can be read"):
        ran("survival", blind, wanted)
    for settings_, column in (
        (SurvivalSettings("weeks", "event"), "weeks"),
        (SurvivalSettings("days", "died"), "died"),
    ):
        with pytest.raises(InputError, match=f"no column `{column}`") as caught:
            ran("survival", cell, settings_)
        assert caught.value.hint == "columns: days, event"


def test_survival_never_sees_the_follow_up_of_test_patients() -> None:
    pytest.importorskip("sksurv")
    cell, wanted = cell_of(classes()), SurvivalSettings("days", "event")
    later = tuple(
        dataclasses.replace(s, labels={"days": 500.0 - 3 * (k // 2), "event": 1}) if k >= TRAIN + VAL else s
        for k, s in enumerate(cell.data.samples)
    )
    turned = dataclasses.replace(cell, data=dataclasses.replace(cell.data, samples=later))
    before, after = ran("survival", cell, wanted), ran("survival", turned, wanted)
    assert before.truth.tolist() != after.truth.tolist()
    np.testing.assert_allclose(before.answers, after.answers)
    assert before.chosen == after.chosen
    assert before.notes[0].startswith("fitted on 30 patients with 15 events; tested on 10 events")


@pytest.mark.parametrize("kind", ["linear_probe", "prototype", "knn", "few_shot"])
def test_without_readable_training_images(kind: str) -> None:
    cell = cell_of(classes())
    blind = dataclasses.replace(cell, images=cell.images.select(list(range(TRAIN, TRAIN + VAL + TEST))))
    with pytest.raises(InputError, match="data set `made` has no training rows") as caught:
        ran(kind, blind)
    assert "fractions" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbeSettings((1.0, 0.0)), "`cs` must be positive"),
        (lambda: NeighbourSettings(()), "`ks` must be numbers"),
        (lambda: NeighbourSettings((3, 0)), "`ks` must be numbers"),
        (lambda: FewShotSettings(shots=0), "`shots` and `draws`"),
        (lambda: FewShotSettings(draws=0), "`shots` and `draws`"),
        (lambda: FewShotSettings(c=0.0), "`c` positive"),
        (lambda: RetrievalSettings(()), "`ks` must be depths"),
        (lambda: RetrievalSettings((5, -1)), "`ks` must be depths"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_columns_are_log_odds_within_a_row() -> None:
    logits = np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    odds = module._columns(logits, np.arange(3), (0, 1, 2), "single")
    shares = np.exp(logits)
    np.testing.assert_allclose(odds, np.log(shares / (1 - shares)))
    np.testing.assert_allclose(module._columns(logits + 9.0, np.arange(3), (0, 1, 2), "single"), odds)
    np.testing.assert_allclose(
        module._columns(logits[:, :2], np.arange(2), (1,), "multi")[:, 0], logits[:, 1] - logits[:, 0]
    )


@pytest.mark.parametrize(
    ("truth", "mode", "problems"),
    [
        ([[1, 0], [0, 1], [np.nan, np.nan]], "single", [((0, 1), [0, 1, -1])]),
        ([[1, 0], [np.nan, 1], [1, 1]], "multi", [((0,), [1, -1, 1]), ((1,), [0, 1, 1])]),
    ],
)
def test_problems(truth: Any, mode: str, problems: Any) -> None:
    found = module._problems(np.asarray(truth, dtype=float), mode)
    assert [(columns, codes.tolist()) for columns, codes in found] == problems


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_shots_are_whole_or_refused(rows: list[tuple[int, int]], shots: int, seed: int) -> None:
    codes, groups = np.asarray([c for c, _ in rows]), [str(g) for _, g in rows]
    try:
        chosen = module._shots(codes, groups, shots, [seed])
    except InputError:
        least = min(len({g for c, g in rows if c == code}) for code in np.unique(codes))
        assert least < shots or len(set(groups)) < shots * len(np.unique(codes)) or len(np.unique(codes)) > 1
        return
    assert [int((codes[chosen] == c).sum()) for c in np.unique(codes)] == [shots] * len(np.unique(codes))
    assert len({groups[r] for r in chosen}) == len(chosen)
    assert chosen.tolist() == module._shots(codes, groups, shots, [seed]).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9), st.integers(1, 12))
def test_nearest_rows_by_brute_force(seed: int, n: int, queries: int) -> None:
    random = np.random.default_rng(seed)
    rows, asked = random.normal(size=(n, 3)), random.normal(size=(queries, 3))
    k = min(3, n)
    by_hand = [sorted(range(n), key=lambda r, q=q: (-float(q @ rows[r]), r))[:k] for q in asked]
    assert _nearest(asked, rows, k).tolist() == by_hand


def test_ties_of_neighbours_go_to_the_earlier_row_and_rare_classes_weigh_alike() -> None:
    assert _nearest(np.ones((1, 2)), np.ones((50, 2)), 3).tolist() == [[0, 1, 2]]
    y = np.array([0, 0, 0, 1])
    votes = np.exp(_votes(np.array([[0, 3]]), y, 2)[0]) - 0.5
    np.testing.assert_allclose(votes, [1 / 3 * 2, 1 / 1 * 2])  # one vote of three rows, one of one
