"""CLIPScore equals the paper's formula; exchanged texts give chance; hostile input is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import InputError, SpaceMismatch
from chiasm.tasks.clip_score import clip_score, ref_clip_score, score_agreement
from chiasm.types import Embeddings, Space

SPACE = Space("made", "0" * 16, "1" * 12, 12)


def rows(
    vectors: np.ndarray, *, modality: str = "image", ids: list[str] | None = None, space: Space = SPACE
) -> Embeddings:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    names = tuple(ids or [f"r{k}" for k in range(len(unit))])
    patients = tuple(f"p{int(n[1:]) // 2}" for n in names)
    return Embeddings(unit.astype(np.float32), names, space, modality, patients=patients)  # type: ignore[arg-type]


def pairs(n: int = 80, noise: float = 1.0, seed: int = 0) -> tuple[Embeddings, Embeddings]:
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(n, 12)) + 1.0
    return rows(meaning + noise * rng.normal(size=(n, 12))), rows(meaning, modality="text")


def by_hand(image: np.ndarray, text: np.ndarray, references: list[np.ndarray]) -> tuple[float, float]:
    """The paper's equations for one pair."""
    cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
    score = 2.5 * max(cosine, 0)
    near = max([0.0, *(r @ text / np.linalg.norm(r) / np.linalg.norm(text) for r in references)])
    return score, 2 / (1 / score + 1 / near) if score and near else 0.0


def test_the_papers_equations() -> None:
    images, texts = pairs(20, seed=3)
    rng = np.random.default_rng(1)
    given_references = rows(rng.normal(size=(60, 12)), modality="text", ids=[f"r{k}" for k in range(60)])
    owners = [f"r{k % 20}" for k in range(60)]
    found = score_agreement(images, texts, references=given_references, reference_ids=owners, n_resamples=50)
    assert found.reference is not None
    for k in range(20):
        mine = [given_references.vectors[j].astype(float) for j in range(60) if j % 20 == k]
        score, ref = by_hand(images.vectors[k].astype(float), texts.vectors[k].astype(float), mine)
        assert found.scores[k] == pytest.approx(score, abs=1e-6)
        assert found.reference[k] == pytest.approx(ref, abs=1e-6)
    assert found.mean.value == pytest.approx(found.scores.mean())
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.table()) == 5


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(-1, 1))
def test_laws(cosines: list[float], near: float) -> None:
    scores = clip_score(cosines)
    assert ((scores >= 0) & (scores <= 2.5)).all()
    ref = ref_clip_score(cosines, [near] * len(cosines))
    assert np.isfinite(ref).all()
    low, high = np.minimum(scores, max(near, 0)), np.maximum(scores, max(near, 0))
    assert (ref >= low - 1e-9).all()
    assert (ref <= high + 1e-9).all()


def test_own_texts_win_and_exchanged_ones_are_chance() -> None:
    images, texts = pairs(noise=0.5)
    found = score_agreement(images, texts, n_resamples=200)
    assert found.wins.value > 0.9
    assert found.gain.difference.low > 0
    assert found.mean.chance == pytest.approx(found.exchanged.value)
    rng = np.random.default_rng(0)
    mixed = rows(texts.vectors[rng.permutation(80)], modality="text")
    nothing = score_agreement(images, mixed, n_resamples=200)
    assert nothing.wins.low <= 0.5 <= nothing.wins.high
    assert nothing.gain.difference.low <= 0.02


def test_rows_are_paired_by_id_in_any_order() -> None:
    images, texts = pairs(30)
    order = np.random.default_rng(0).permutation(30)
    a = score_agreement(images, texts, n_resamples=20)
    b = score_agreement(images, texts.select(order), n_resamples=20)
    np.testing.assert_allclose(a.scores, b.scores)
    fewer = score_agreement(images, texts.select(range(25)), n_resamples=20)
    assert fewer.n_missing == 5
    assert fewer.ids == images.ids[:25]


def test_a_patient_who_has_nearly_all_rows_gets_the_only_other_text() -> None:
    from chiasm.tasks.clip_score import _exchange

    image, text = np.random.default_rng(5).normal(size=(2, 300, 12))
    own = (image * text).sum(1)
    other, wins = _exchange(image, text, own, ["many"] * 299 + ["other"], 0)
    only = image[:299] @ text[299]
    np.testing.assert_allclose(other[:299], clip_score(only))
    np.testing.assert_array_equal(wins[:299], (own[:299] > only).astype(float))


def test_refusals() -> None:
    images, texts = pairs(10)
    with pytest.raises(InputError, match="two patients"):
        score_agreement(images.select([0, 1]), texts)
    with pytest.raises(InputError, match="no reference"):
        score_agreement(images, texts, references=texts.select([0]))
    with pytest.raises(InputError, match="with 1 ids"):
        score_agreement(images, texts, references=texts, reference_ids=["r0"])
    other = rows(texts.vectors, modality="text", space=Space("other", "2" * 16, "1" * 12, 12))
    with pytest.raises(SpaceMismatch):
        score_agreement(images, other)


def test_texts_are_exchanged_between_patients_only() -> None:
    """Two patients, each with one meaning: a text of the own patient would win nothing."""
    names = [f"r{k}" for k in range(4)]  # r0 and r1 are of one patient, r2 and r3 of another
    meaning = np.eye(12)[[0, 0, 1, 1]] + 0.1
    found = score_agreement(rows(meaning, ids=names), rows(meaning, modality="text", ids=names), n_resamples=20)
    unit = meaning / np.linalg.norm(meaning, axis=1, keepdims=True)
    assert found.wins.value == 1.0
    assert found.exchanged.value == pytest.approx(2.5 * float(unit[0] @ unit[2]), abs=1e-5)
