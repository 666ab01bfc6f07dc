"""The page of an exploration: what it must say, in what cases, and what it must not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import InputError, SpaceMismatch
from chiasm.evaluate.explore_figures import static_map
from chiasm.evaluate.explore_map import MapColumn
from chiasm.evaluate.explore_page import explore_page, map_notes
from chiasm.evaluate.explore_scores import Exploration, explore
from chiasm.evaluate.page import render_page
from chiasm.evaluate.run_card import make_run_card
from chiasm.tasks.clustering import ClusterSettings
from chiasm.types import Embeddings, Space

QUICK = ClusterSettings(k=3, resamples=4, null_draws=20)


def rows(n: int = 60, *, modality: Any = "image", shift: float = 0.0, space: str = "made", **fields: Any) -> Embeddings:
    random = np.random.default_rng(0 if modality == "image" else 1)
    which = np.arange(n) % 3
    vectors = 2 * np.eye(3, 10)[which] + 0.15 * random.normal(size=(n, 10))
    vectors[:, 9] += shift
    fields.setdefault(
        "labels", {"organ": tuple("abc"[w] for w in which), "note": tuple(f"secret {i}" for i in range(n))}
    )
    fields.setdefault("patients", tuple(f"p{i // 2}" for i in range(n)))
    return Embeddings(
        vectors.astype(np.float32), tuple(f"{modality}-{i}" for i in range(n)), Space(space, "0" * 12, "1" * 12, 10),
        modality, normalized=False, **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Exploration:
    return explore(rows(), clusters=QUICK, method="pca")


def html(found: Exploration, **fields: Any) -> str:
    card = make_run_card("chiasm explore", {"images": found.embeddings}, seed=0)
    return render_page(explore_page(found, card, **fields))


def test_the_page_says_what_must_be_said(found: Exploration) -> None:
    text = html(found)
    for words in ("Trustworthiness", "continuity", "Stable structure", "largest patient", "Run card", "leaves most of the"
                  " space out", "adjusted Rand", "one cluster for all", "not a medical device", "97.5 % of chance"):  # fmt: skip
        assert words in text, words
    assert "secret" not in text, "free text is no class"
    assert found.left_out == ("note",)
    assert found.agreement["organ"].scores["ari"].value > 0.95
    assert found.majority["organ"] == pytest.approx(1 / 3)
    json.dumps(found.to_dict(), allow_nan=False)
    assert "secret" not in json.dumps(found.to_dict())


def test_no_structure_is_a_warning() -> None:
    noise = rows(labels={})
    noise = Embeddings(
        np.random.default_rng(0).normal(size=(60, 10)).astype(np.float32), noise.ids, noise.space, "image",
        normalized=False,
    )  # fmt: skip
    found = explore(noise, clusters=QUICK, method="pca")
    text = html(found)
    assert 'class="note warning">No stable structure' in text
    assert any(n.tone == "warning" and "no stable structure" in n.text for n in map_notes(found))
    assert [c.name for c in found.columns] == ["cluster"]


def test_rows_in_no_cluster_are_told(found: Exploration) -> None:
    random = np.random.default_rng(2)
    one = rows()
    scattered = np.concatenate([one.vectors, random.normal(size=(20, 10)).astype(np.float32)])
    labels = {"organ": (*one.labels["organ"], *["a", "b"] * 10)}
    both = Embeddings(scattered, tuple(map(str, range(80))), one.space, "image", normalized=False, labels=labels)
    found = explore(both, clusters=ClusterSettings("hdbscan", resamples=3, null_draws=3), method="pca")
    assert found.clustering is not None
    assert found.clustering.noise > 0
    text = html(found)
    assert "rows in a cluster" in text
    assert "in none" in text
    assert found.agreement_inside["organ"].scores["ari"].value > found.agreement["organ"].scores["ari"].value
    assert "none" in found.cluster_names


def test_images_and_texts_share_a_map() -> None:
    found = explore(rows(), rows(30, modality="text", shift=3.0), clusters=QUICK, method="pca")
    assert len(found.projection) == 90
    assert [c.name for c in found.columns] == ["cluster", "organ", "side"]
    text = html(found)
    assert "triangles are texts" in text
    assert "lie " in text
    assert "apart (mean cosine across" in text
    assert found.cluster_names[-1] is None
    assert found.columns[0].missing == "not clustered"
    with pytest.raises(SpaceMismatch):
        explore(rows(), rows(30, modality="text", space="other"), method="pca")


def test_without_clusters_or_labels() -> None:
    found = explore(rows(labels={}, patients=None), method="pca")
    assert [c.name for c in found.columns] == ["all"]
    text = html(found)
    assert "no clusters" in text
    assert "Agreement" not in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_wrong_columns() -> None:
    with pytest.raises(InputError, match="no label column `orgn`") as caught:
        explore(rows(), colour=["orgn"], method="pca")
    assert "organ" in (caught.value.hint or "")
    with pytest.raises(InputError, match="too many different texts"):
        explore(rows(), colour=["note"], method="pca")


def test_a_label_may_be_called_cluster() -> None:
    found = explore(rows(labels={"cluster": tuple("ab" * 30)}), clusters=QUICK, method="pca")
    assert [c.name for c in found.columns] == ["cluster", "cluster (label)"]
    assert list(found.agreement) == ["cluster (label)"]


def test_terms_describe_clusters() -> None:
    one = rows()
    terms = Embeddings(
        np.eye(3, 10, dtype=np.float32), ("0", "1", "2"), one.space, "text", texts=("lung", "liver", "knee")
    )
    found = explore(one, clusters=QUICK, terms=terms, method="pca")
    assert found.terms is not None
    assert {t[0][0] for t in found.terms} == {"lung", "liver", "knee"}
    assert "nearest terms" in html(found)


def test_medoids_only_where_asked_for(found: Exploration, tmp_path: Path) -> None:
    assert '<img src="data:' not in html(found)
    Image.new("L", (40, 30), 99).save(tmp_path / "a.png")
    text = html(found, pictures=[str(tmp_path / "a.png")] * len(found.embeddings))
    assert text.count('<img src="data:') == 18
    assert "pictures of patients" in text
    gone = html(found, pictures=[str(tmp_path / "gone.png")] * len(found.embeddings))
    assert '<img src="data:' not in gone
    assert str(tmp_path) not in gone


def test_static_map_of_hostile_names() -> None:
    column = MapColumn("$x$ <b>", ("_hidden", "a$b$", "<script>x</script>"), np.asarray([0, 1, 2, -1], dtype=np.int16))
    drawn = static_map(np.eye(4)[:, :2], column)
    assert "<script" not in drawn
    assert drawn == static_map(np.eye(4)[:, :2], column)
