"""Few-shot on phantoms, whose truth is known: curves rise to it, shuffled labels stay at chance, texts help where they fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from chiasm.data.phantoms import PhantomSet, make_chest_phantoms
from chiasm.metrics.classification import auroc, balanced_accuracy
from chiasm.tasks.k_shot import Draws, draw_episodes, embedding_method, run_episodes
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.zero_shot import TextClassifier
from chiasm.types import Embeddings, Space

SEEDS = (0, 1)
SPACE = Space("pixels", "0" * 12, "1" * 12, 256)


@pytest.fixture(scope="module")
def phantoms() -> PhantomSet:
    return make_chest_phantoms(110, seed=11, size_px=32)


@pytest.fixture(scope="module")
def films(phantoms: PhantomSet) -> Embeddings:
    """Raw pixels less their mean: an encoder that knows nothing, yet sees what is drawn."""
    pixels = phantoms.images.reshape(-1, 16, 2, 16, 2).astype(np.float32).mean(axis=(2, 4)).reshape(-1, 256)
    return Embeddings(
        pixels - pixels.mean(axis=1, keepdims=True),
        tuple(s.id for s in phantoms.samples),
        SPACE,
        "image",
        normalized=False,
        patients=tuple(s.patient for s in phantoms.samples),
    )


def draws_of(phantoms: PhantomSet, label: str, *, shuffle: bool = False, few: bool = False) -> Draws:
    """Return draws for one finding; ``shuffle`` deals its labels out to other patients."""
    truth = [int(s.labels[label] or 0) for s in phantoms.samples]
    patients = [s.group for s in phantoms.samples]
    if shuffle:
        names = sorted(set(patients))
        other = dict(zip(names, np.random.default_rng(3).permutation(names), strict=True))
        first = dict(zip(reversed(patients), reversed(truth), strict=True))
        truth = [first[str(other[p])] for p in patients]
    test = [int(p.split("-")[1]) % 3 == 0 for p in patients]
    return draw_episodes(
        truth, patients, test, shots=(1, None) if few else (1, 4, None), seeds=SEEDS[:1] if few else SEEDS
    )


def curve(draws: Draws, films: Embeddings, method: str, texts: TextClassifier | None = None) -> list[float]:
    """Return the mean AUROC over seeds for each number of shots."""
    truth = draws.truth[draws.test]
    answers = run_episodes(draws, {method: embedding_method(method, films, draws, texts=texts)})
    return [float(np.mean([auroc(truth, a.probabilities[:, 1]) for a in answers if a.shots == k])) for k in draws.shots]


@pytest.mark.parametrize(("label", "reached"), [("oedema", 0.93), ("cardiomegaly", 0.85)])
def test_curves_rise_to_what_is_drawn(phantoms: PhantomSet, films: Embeddings, label: str, reached: float) -> None:
    """Oedema veils the lungs and a large heart is large: pixels tell both, so that all rows must reach them."""
    draws = draws_of(phantoms, label)
    found = curve(draws, films, "linear-probe")
    assert found[0] < found[1] + 0.03
    assert found[1] < found[2]
    assert found[2] > reached
    prototypes = curve(draws, films, "prototypes-centred")
    assert prototypes[2] > reached - 0.1


def test_labels_dealt_out_to_other_patients_teach_nothing(phantoms: PhantomSet, films: Embeddings) -> None:
    found = curve(draws_of(phantoms, "oedema", shuffle=True), films, "linear-probe")
    assert all(abs(value - 0.5) < 0.2 for value in found)


def texts_for(films: Embeddings, phantoms: PhantomSet, label: str, *, swapped: bool = False) -> TextClassifier:
    """Return "texts" that say what oracle patients show: the mean pixels with and without a finding."""
    truth = np.array([int(s.labels[label] or 0) for s in phantoms.samples])
    unit = films.normalize().vectors
    means = [unit[truth == c].mean(axis=0) for c in ((1, 0) if swapped else (0, 1))]
    centred = np.stack(means) - np.mean(means, axis=0)
    directions = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    prompts = PromptSet((LabelPrompts("0", ("absent",)), LabelPrompts("1", ("present",))))
    return TextClassifier(prompts, directions.astype(np.float32), None, SPACE, 20.0)


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f", "clip-adapter", "text-probe"])
def test_good_texts_are_worth_many_shots(phantoms: PhantomSet, films: Embeddings, method: str) -> None:
    draws = draws_of(phantoms, "oedema", few=True)
    texts = texts_for(films, phantoms, "oedema")
    zero = curve(draws, films, "zero-shot", texts)
    found = curve(draws, films, method, texts)
    assert zero[0] == pytest.approx(zero[1])  # learns nothing
    assert found[0] > curve(draws, films, "linear-probe")[0]
    assert found[0] > zero[0] - 0.15
    assert found[1] > 0.85


@pytest.mark.parametrize("method", ["tip-adapter", "text-probe"])
def test_wrong_texts_are_overruled_by_many_labels(phantoms: PhantomSet, films: Embeddings, method: str) -> None:
    """Texts that say the opposite: zero-shot is worse than a coin, the adapter sees it on validation patients."""
    draws = draws_of(phantoms, "oedema", few=True)
    texts = texts_for(films, phantoms, "oedema", swapped=True)
    assert curve(draws, films, "zero-shot", texts)[1] < 0.4
    assert curve(draws, films, method, texts)[1] > 0.75


def test_test_patients_are_the_same_for_all_seeds_and_shots(phantoms: PhantomSet) -> None:
    draws = draws_of(phantoms, "effusion")
    assert len({tuple(e.test.tolist()) for e in draws.episodes}) == 1
    scored = {e.patients[i] for e in draws.episodes for i in e.test}
    learned: set[str] = {e.patients[i] for e in draws.episodes for rows in (e.train, e.validation) for i in rows}
    assert not scored & learned
    for e in draws.episodes:
        if e.shots is not None:
            drawn: Sequence[str] = [e.patients[i] for i in np.concatenate([e.train, e.validation])]
            assert len(set(drawn)) == len(drawn)  # enough patients: one image each


def test_a_guess_is_worth_chance(phantoms: PhantomSet) -> None:
    draws = draws_of(phantoms, "oedema")
    truth = draws.truth[draws.test]
    assert balanced_accuracy(truth, np.zeros(len(truth), dtype=int)) == 0.5
