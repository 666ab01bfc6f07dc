"""Nearest terms: hubs lose against a null, the numbers equal a derivation by hand, hostile vocabularies are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import FileFormatError, InputError, SpaceMismatch, UnknownName
from chiasm.tasks.terms import load_vocabulary, nearest_terms, vocabulary_names
from chiasm.types import Embeddings, Space

SPACE = Space("made", "0" * 16, "1" * 12, 16)


def embeddings(
    vectors: np.ndarray, *, texts: list[str] | None = None, prefix: str = "i", space: Space = SPACE
) -> Embeddings:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple(f"{prefix}{k}" for k in range(len(unit)))
    return Embeddings(
        unit.astype(np.float32),
        ids,
        space,
        "image" if texts is None else "text",
        texts=None if texts is None else tuple(texts),
    )


def a_world(seed: int = 0, n: int = 60) -> tuple[Embeddings, Embeddings, np.ndarray]:
    """Images = a shared direction + their own finding + noise; terms = the findings, and a hub on the shared direction."""
    rng = np.random.default_rng(seed)
    shared = np.eye(16)[0]
    findings = np.eye(16)[1:9]
    own = rng.integers(0, 8, n)
    images = 2 * shared + findings[own] + 0.1 * rng.normal(size=(n, 16))
    words = np.vstack([findings + 0.2 * shared, shared])
    return embeddings(images), embeddings(words, texts=[f"finding {k}" for k in range(8)] + ["film"], prefix="t"), own


def test_a_hub_wins_by_cosine_and_loses_against_the_null() -> None:
    images, terms, own = a_world()
    by_cosine = nearest_terms(images, terms, k=1)
    assert {found.terms[0].term for found in by_cosine} == {"film"}
    assert by_cosine[0].ranked_by == "cosine"
    assert by_cosine[0].n_reference == 0
    by_null = nearest_terms(images, terms, images, k=1)
    right = [found.terms[0].term == f"finding {k}" for found, k in zip(by_null, own, strict=True)]
    assert np.mean(right) > 0.95  # the hub's cosine hardly varies, so once in a while its z is large by chance
    assert by_null[0].n_reference == 59  # without itself


def test_the_numbers_by_hand() -> None:
    images, terms, _ = a_world(1, 30)
    found = nearest_terms(images, terms, images, k=9, rank_by="excess")[3]
    other = [k for k in range(30) if k != 3]
    for score in found.terms:
        column = terms.texts.index(score.term)  # type: ignore[union-attr]
        cosines = images.vectors.astype(float) @ terms.vectors[column].astype(float)
        assert score.cosine == pytest.approx(cosines[3], abs=1e-6)
        assert score.expected == pytest.approx(cosines[other].mean(), abs=1e-6)
        assert score.z == pytest.approx((cosines[3] - cosines[other].mean()) / cosines[other].std(ddof=1), abs=1e-4)
        assert score.p_value == pytest.approx((1 + (cosines[other] >= cosines[3]).sum()) / 30)
    assert [s.excess for s in found.terms] == sorted((s.excess for s in found.terms), reverse=True)
    json.dumps([f.to_dict() for f in nearest_terms(images, terms)], allow_nan=False)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(9)), st.integers(1, 9))
def test_the_order_of_the_vocabulary_does_not_matter(order: list[int], k: int) -> None:
    images, terms, _ = a_world()
    plain = nearest_terms(images.select([0, 1]), terms, images, k=k)
    shuffled = nearest_terms(images.select([0, 1]), terms.select(order), images, k=k)
    assert [[t.term for t in f.terms] for f in plain] == [[t.term for t in f.terms] for f in shuffled]


def test_p_values_are_uniform_when_there_is_nothing_to_find() -> None:
    rng = np.random.default_rng(0)
    images = embeddings(rng.normal(size=(300, 16)))
    terms = embeddings(rng.normal(size=(40, 16)), texts=[f"t{k}" for k in range(40)], prefix="t")
    found = nearest_terms(images.select(range(50)), terms, images, k=40)
    p = np.array([t.p_value for f in found for t in f.terms])
    assert abs((p <= 0.05).mean() - 0.05) < 0.03
    assert p.min() >= 1 / 300


def test_own_patient_is_left_out() -> None:
    images, terms, _ = a_world(n=40)
    from dataclasses import replace

    doubled = replace(images, patients=tuple(f"p{k // 2}" for k in range(40)))
    assert nearest_terms(doubled, terms, doubled, k=1)[0].n_reference == 38
    few = replace(images.select(range(21)), patients=tuple(f"p{k // 2}" for k in range(21)))
    with pytest.raises(InputError, match="19 rows of other patients"):
        nearest_terms(few, terms, few)


def test_built_in_vocabularies() -> None:
    assert set(vocabulary_names()) >= {"chest", "pathology", "medical"}
    for name in vocabulary_names():
        found = load_vocabulary(name)
        assert len(found) >= 40
        assert len(set(map(str.casefold, found.terms))) == len(found), name
        assert all(found.categories)
    assert "pleural effusion" in load_vocabulary("chest").terms


def test_files_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff# mine\nspot\n\n[colour]\nred\n red \nblue\n", encoding="utf-8")
    found = load_vocabulary(path)
    assert found.terms == ("spot", "red", "blue")
    assert found.categories == ("", "colour", "colour")
    path.write_bytes(b"\xff\xfe\x00bad\xd8")
    with pytest.raises(FileFormatError, match="UTF-8"):
        load_vocabulary(path)
    path.write_text("# nothing\n[x]\n")
    with pytest.raises(InputError, match="no term"):
        load_vocabulary(path)
    with pytest.raises(UnknownName, match="did you mean `chest`"):
        load_vocabulary("chset")


def test_refusals() -> None:
    images, terms, _ = a_world()
    with pytest.raises(InputError, match="no texts"):
        nearest_terms(images, images)
    with pytest.raises(InputError, match="needs a reference"):
        nearest_terms(images, terms, rank_by="z")
    with pytest.raises(InputError, match="k must"):
        nearest_terms(images, terms, k=0)
    with pytest.raises(UnknownName):
        nearest_terms(images, terms, images, rank_by="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected at least 20"):
        nearest_terms(images, terms, images.select(range(10)))
    with pytest.raises(InputError, match="vocabulary of"):
        nearest_terms(images, terms, vocabulary=load_vocabulary("chest"))
    foreign = embeddings(np.eye(16), texts=list("abcdefghijklmnop"), space=Space("other", "2" * 16, "1" * 12, 16))
    with pytest.raises(SpaceMismatch):
        nearest_terms(images, foreign)
