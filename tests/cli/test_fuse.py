"""`chiasm fuse` on a store: all arms, a page, and plain words when something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.io.store import save_embeddings
from chiasm.types import Embeddings, Space


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    n = 120
    truth = rng.integers(0, 2, n)
    ids = tuple(f"r{i}" for i in range(n))
    labels = {
        "outcome": tuple("?" if i < 6 else ("died" if t else "left") for i, t in enumerate(truth)),
        "age": tuple(
            int(50 + 10 * t + 8 * e) if i % 5 else None
            for i, (t, e) in enumerate(zip(truth, rng.normal(size=n), strict=True))
        ),
        "name": tuple(f"n{i}" for i in range(n)),
        "blank": ("?", None, "none", "unknown", "NaN", "") * (n // 6),
    }
    path = tmp_path_factory.mktemp("fuse") / "store"
    space = Space("m", "w", "p", 8)
    sides = []
    for modality in ("image", "text"):
        vectors = rng.normal(size=(n, 8)).astype(np.float32) + 0.6 * truth[:, None]
        sides.append(Embeddings(vectors, ids, space, modality, normalized=False, labels=labels,
                                patients=tuple(f"p{i // 2}" for i in range(n))))  # fmt: skip
    save_embeddings(path, *sides)
    return path


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["fuse", *[str(w) for w in words]])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_all_arms_with_a_page(store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("--store", store, "--label", "outcome", "--clinical", "age", "--folds", 3, "--repeats", 1)
    code, text = call(*words, "--out", page, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert list(found["arms"]) == ["image", "text", "clinical", "early fusion", "late fusion"]
    assert sum(found["rows"].values()) == 114, "rows whose outcome is `?` are not labelled"
    assert found["arms"]["early fusion"]["auroc"]["value"] > 0.8
    assert found["run_card"]["settings"]["clinical"] == ["age"]
    assert "Did fusion help?" in page.read_text()
    code, text = call(*words)
    assert "late fusion − clinical" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--label", "outcome", "--clinical", "name"), "120 different words|114 different words"),
        (("--label", "other"), "no label column `other`"),
        (("--label", "outcome", "--use", "image,sound"), "--use names `image,sound`"),
        (("--label", "outcome", "--use", "image,clinical"), "no column was given"),
        (("--label", "outcome", "--use", "image", "--clinical", "age"), "--use leaves it out"),
        (("--label", "name", "--use", "image"), "has 1 patients"),
        (("--label", "outcome", "--clinical", "age,outcome"), "`outcome` is what --label asks for"),
        (("--label", "blank"), "no row has a label in column `blank`"),
        (("--label", "outcome", "--use", ""), "--use names ``"),
        (("--label", "outcome", "--use", "image", "--folds", "200"), "got 200 folds"),
        (("--label", "outcome", "--use", "image", "--split", "test"), "no label column `split`"),
        (("--label", "outcome", "--use", "image", "--group", "ward"), "no label column `ward`"),
        (("--label", "outcome", "--use", "image", "--column", "id=x"), "are for tables"),
        (("--label", "outcome", "--use", "image", "--root", "films"), "are for tables"),
    ],
)
def test_plain_words(store: Path, words: tuple[str, ...], message: str) -> None:
    import re

    code, text = call("--store", store, *words)
    assert code == 1
    assert re.search(message, text), text
    assert "hint:" in text


def test_the_card_tells_labels_and_modalities_apart(store: Path) -> None:
    def digest(*words: object) -> str:
        code, text = call("--store", store, "--folds", 2, "--repeats", 1, "--json", *words)
        assert code == 0, text
        return str(json.loads(text)["run_card"]["digest"])

    image = ("--label", "outcome", "--use", "image")
    same = digest(*image)
    assert digest(*image) == same
    others = [
        digest(*image, "--seed", 1),
        digest(*image, "--folds", 3),
        digest(*image, "--components", 3),
        digest("--label", "outcome", "--use", "image,clinical", "--clinical", "age"),
        digest("--label", "outcome", "--use", "text"),
    ]
    assert len({same, *others}) == 6
