"""``chiasm explore``: from a store and from a table to map, page, points and JSON; what is wrong is said early."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.io.store import create_store
from chiasm.types import Embeddings, Space

Run = Callable[..., Any]


def embeddings(modality: Any, n: int = 45) -> Embeddings:
    random = np.random.default_rng(0 if modality == "image" else 1)
    which = np.arange(n) % 3
    vectors = 2 * np.eye(3, 8)[which] + 0.2 * random.normal(size=(n, 8))
    return Embeddings(
        vectors.astype(np.float32), tuple(f"{modality}-{i}" for i in range(n)), Space("made", "0" * 12, "1" * 12, 8),
        modality, normalized=False, texts=tuple(f"report number {i}" for i in range(n)),
        patients=tuple(f"p{i // 3}" for i in range(n)), labels={"organ": tuple("abc"[w] for w in which)},
    ).normalize()  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "both"
    from chiasm.io.store import StoreMetadata

    with create_store(folder, StoreMetadata.of(embeddings("image"))) as made:
        made.append(embeddings("image"))
        made.append(embeddings("text"))
    return folder


def test_a_store_becomes_a_folder(chiasm: Run, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "map"
    found = chiasm(
        "explore", "--store", store, "--method", "pca", "--clusters", "kmeans:3", "--color", "organ", "--out", out,
        "--side", "image", "--seed", 1, "--json",
    )  # fmt: skip
    assert {p.name for p in out.iterdir()} == {
        "map.html", "index.html", "points.csv", "points.parquet", "results.json"
    }  # fmt: skip
    assert found["clustering"]["structure"]["found"]
    assert found["agreement"]["organ"]["scores"]["ari"]["value"] > 0.9
    assert found["run_card"]["seed"] == 1
    assert found["projection"]["faith"]["continuity"]["chance"] < 0.7
    assert json.loads((out / "results.json").read_text())["run_card"] == found["run_card"]
    rows = list(csv.DictReader((out / "points.csv").read_text().splitlines()))
    assert len(rows) == 45
    assert set(rows[0]) == {"id", "modality", "x", "y", "cluster", "organ"}
    assert len({(r["organ"], r["cluster"]) for r in rows}) == 3
    import pyarrow.parquet as pq

    assert pq.read_table(out / "points.parquet").column("id").to_pylist() == [r["id"] for r in rows]
    for name in ("map.html", "index.html", "results.json"):
        assert "report number" not in (out / name).read_text(), "texts only where asked for"
    assert str(tmp_path) not in (out / "index.html").read_text()


def test_both_sides_with_texts(chiasm: Run, store: Path, tmp_path: Path) -> None:
    said = chiasm("explore", "--store", store, "--method", "pca", "--clusters", "none", "--texts", "--out", tmp_path)
    assert "apart (mean cosine across" in said
    assert "leaves most of the space out" in said
    assert "report number 44" in (tmp_path / "map.html").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clustering"] is None
    assert results["projection"]["n"] == 90
    assert list(results["run_card"]["data"]) == ["images", "texts"]


def test_a_table_and_terms(chiasm: Run, phantom_table: Path, model_dir: Path, tmp_path: Path) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("heart\nlung\nbone\n")
    found = chiasm(
        "explore", "--table", phantom_table, "--model", model_dir, "--method", "pca", "--clusters", "kmeans:2",
        "--terms", terms, "--thumbnails", "--color", "effusion", "--side", "image", "--out", tmp_path / "map", "--json",
    )  # fmt: skip
    assert {t["text"] for t in found["terms"][0]} == {"heart", "lung", "bone"}
    assert found["thumbnails"]["shown"] == found["thumbnails"]["of"] == found["projection"]["n"]
    assert "data:image/jpeg" in (tmp_path / "map" / "map.html").read_text()
    assert "Central images" in (tmp_path / "map" / "index.html").read_text()


def test_what_is_wrong_is_said(chiasm: Run, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*words: object) -> str:
        return str(chiasm("explore", *words, "--out", tmp_path / "o", code=1))

    assert "one of the two" in wrong("--method", "pca")
    assert "--method must be tsne, umap or pca" in wrong("--store", store, "--method", "isomap")
    assert "unknown clustering" in wrong("--store", store, "--method", "pca", "--clusters", "ward")
    assert "no label column" in wrong("--store", store, "--method", "pca", "--color", "organs")
    assert "--terms needs" in wrong("--store", store, "--method", "pca", "--terms", "x.txt")
    assert "--side must be" in wrong("--store", store, "--side", "left")
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").write_text("")
    assert "is a file" in wrong("--store", store)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "o").unlink()
    said = wrong("--store", store, "--method", "umap")
    assert "`umap-learn` is not installed" in said
    assert "chiasm[analysis]" in said
    assert "umap" not in sys.modules or not (tmp_path / "o").exists()
