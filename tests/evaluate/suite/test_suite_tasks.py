"""Neighbours are scikit-learn's, shots are distinct patients, a protocol gives what the task gives when called directly."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import ConfigError, InputError
from chiasm.evaluate.suite.neighbours import Neighbours
from chiasm.evaluate.suite.questions import ask, read_question
from chiasm.evaluate.suite.rows import read_rows
from chiasm.evaluate.suite.settings import DataEntry, Suite
from chiasm.evaluate.suite.tasks import _shots
from chiasm.evaluate.suite.vectors import ModelVectors


def test_neighbours_are_those_of_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 5)), np.tile([0, 1, 2], 20)
    x += y[:, None]
    queries = random.normal(size=(40, 5)) + 1
    ours = Neighbours((7,)).fit(x, y, [str(i) for i in range(60)])
    theirs = KNeighborsClassifier(7, metric="cosine").fit(x, y)
    shares = theirs.predict_proba(queries)
    # The smoothed logits order classes as the shares do, ties alike.
    assert ours.logits(queries) == pytest.approx(np.log(shares * 7 + 1 / 3))
    assert ours.chosen_ == {"k": 7}


def test_k_is_chosen_on_other_patients() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(80, 3)), random.integers(2, size=80)
    x[:, 0] += 3 * y
    patients = [f"p{i // 2}" for i in range(80)]
    found = Neighbours((1, 9, 500)).fit(x, y, patients)
    assert found.chosen_["k"] in (1, 9, 60)  # 500 is more than there are rows
    assert found.validated_on_ == 20


def test_shots_are_distinct_patients_and_all_classes_have_them() -> None:
    codes = np.array([0, 0, 0, 1, 1, 1, 1, -1])
    patients = ["a", "a", "b", "a", "c", "d", "e", "f"]
    for draw in range(20):
        rows = _shots(codes, patients, 2, [0, draw, 0])
        assert sorted(codes[rows]) == [0, 0, 1, 1]
        assert len({patients[r] for r in rows}) == 4
    with pytest.raises(InputError, match="3 shots"):
        _shots(codes, patients, 3, [0, 0, 0])


def test_a_protocol_gives_what_it_gives_called_directly(suite: Suite, tmp_path: Path) -> None:
    from chiasm.embed import embed_texts
    from chiasm.tasks.protocol import get_protocol
    from chiasm.tasks.protocol_prompts import make_prompts
    from chiasm.tasks.protocol_run import run_protocol

    name, labels = "chexzero-chexpert14", ("Cardiomegaly", "Edema")
    rows = read_rows("films", suite.data["films"], seed=0)
    vectors = ModelVectors("one", suite.models["one"], suite, tmp_path)
    images = vectors.images(rows).select(np.arange(20))
    entry = DataEntry(source="x", labels=labels, truth="*", protocol=name)
    found = ask(read_question(entry), vectors)(images)
    protocol = get_protocol(name)
    embed = partial(embed_texts, vectors.encoder, normalize=not protocol.needs_raw_texts("published"))
    direct = run_protocol(protocol, images, embed, prompts=make_prompts(protocol, list(labels)), mode="multi")
    assert (found.protocol, found.labels) == (name, labels)
    np.testing.assert_allclose(found.probabilities, direct.probabilities, atol=1e-6)


@pytest.mark.parametrize("name", ["mi-zero", "conch-slides", "gloria-chexpert5x200"])
def test_a_protocol_that_needs_more_than_one_vector_is_refused(suite: Suite, name: str) -> None:
    with pytest.raises(ConfigError, match="more than one vector"):
        read_question(dataclasses.replace(suite.data["films"], protocol=name))
