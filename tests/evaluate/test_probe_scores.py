"""Minimal pairs: a model that reads, one that prefers, one that knows nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chiasm.errors import InputError, SpaceMismatch
from chiasm.evaluate.probe_scores import score_probes
from chiasm.tasks.contradictions import make_probes
from chiasm.types import Embeddings, Space

#: Axis 0: effusion or not; axis 1: left or right; axis 2: nothing.
TEXTS = ("There is a left effusion.", "No effusion.", "There is a right effusion.", "No effusion.") * 5


def embed(vectors: Any, modality: Any = "image", space: str = "a") -> Embeddings:
    values = np.asarray(vectors, dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Embeddings(values, tuple(str(i) for i in range(len(values))), Space(space, "w", "p", 3), modality)


def sentence_vector(text: str, bias: float) -> list[float]:
    no, left, right = (word in text.lower() for word in ("no ", "left", "right"))
    return [(-1.0 if no else 1.0), float(left) - float(right), 1.0 + bias * (not no)]


def score(images: Embeddings, bias: float = 0.0, space: str = "a") -> Any:
    def sentences(texts: Sequence[str]) -> Embeddings:
        return embed([sentence_vector(t, bias) for t in texts], "text", space)

    return score_probes(images, make_probes(TEXTS), sentences, n_resamples=200)


def test_a_model_that_reads_wins_everywhere() -> None:
    images = embed([[-1 if "No" in t else 1, 0.7 * ("left" in t) - 0.7 * ("right" in t), 0.3] for t in TEXTS])
    found = score(images)
    negation, sides = found.groups["negation"], found.groups["laterality"]
    assert negation.wins.value == negation.corrected.value == sides.wins.value == 1
    assert (negation.wins.chance, negation.wins.n, sides.wins.n, found.images) == (0.5, 20, 10, 20)
    assert negation.gain.difference.value > 0.3
    assert negation.gain.p_value < 0.02
    assert set(sides.kinds) == {"left called right", "right called left"}
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.table()) == 8


def test_a_biased_model_is_seen() -> None:
    """It likes sentences without “no”, whatever the image: half of the wins, all of them without the image, too."""
    images = embed([[0.3, 0.0, 1.0]] * len(TEXTS))
    negation = score(images, bias=3.0).groups["negation"]
    assert {k: v.value for k, v in negation.kinds.items()} == {"present finding denied": 1, "absent finding claimed": 0}
    assert negation.wins.value == negation.blind.value == negation.always == 0.5
    assert negation.gain.difference.value == 0
    assert negation.corrected.value == 0.5, "one image for all says nothing once the preference is gone"


def test_noise_stays_at_chance() -> None:
    rng = np.random.default_rng(0)
    found = score(embed(rng.normal(size=(len(TEXTS), 3))))
    for group in found.groups.values():
        assert group.wins.low <= 0.5 <= group.wins.high


def test_what_makes_no_sense_is_refused() -> None:
    images = embed(np.eye(3))
    with pytest.raises(InputError, match="no sentence"):
        score_probes(images, (), lambda _: images)
    with pytest.raises(InputError, match="row 19 of 3"):
        score(images)
    with pytest.raises(SpaceMismatch):
        score(embed(np.ones((20, 3))), space="b")
