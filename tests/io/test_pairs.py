"""The folder of pairs: what is saved comes back, byte for byte; anything else is refused; targets are what they say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import FileFormatError, InputError, SpaceMismatch
from chiasm.io.pairs import PairFolder, PairHeader, digest_ids, load_pairs, read_pair_header, save_pairs
from chiasm.types import Space

SPACE = Space("made", "a" * 12, "b" * 12, 4)


def make_pairs(n: int = 7, k: int = 3, m: int = 6, *, seed: int = 0, alone: float = 0.3) -> PairFolder:
    rng = np.random.default_rng(seed)
    ids = tuple(f"image-{i}" for i in range(n))
    texts = rng.normal(size=(m, 4)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    counts = np.where(rng.random(n) < alone, 0, rng.integers(1, k + 1, n))
    there = np.arange(k)[None, :] < counts[:, None]
    rows = np.where(there, np.stack([rng.permutation(m)[:k] for _ in range(n)]), -1)
    similarity = np.where(there, -np.sort(-rng.random((n, k)), axis=1), np.nan).astype(np.float32)
    best = np.where(counts > 0, similarity[:, 0], -0.5).astype(np.float32)
    header = PairHeader(
        SPACE, "corpus.txt", "c" * 16, digest_ids(ids), "d" * 16, reports=9, k=k, chunking={"overlap_tokens": 8},
        filters=({"what": "tissue", "kept": 9, "dropped": 2},), min_similarity=0.1, min_similarity_rule="auto",
    )  # fmt: skip
    keys = tuple((f"report-{i // 2}", i % 2) for i in range(m))
    spans = np.stack([np.arange(m), np.arange(m) + 5], axis=1)
    return PairFolder(header, ids, rows, similarity, rng.random(n).astype(np.float32), best, texts, keys, spans)


def assert_equal(one: PairFolder, other: PairFolder) -> None:
    for field in dataclasses.fields(one):
        if field.name != "header":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)
    assert dataclasses.replace(other.header, texts_digest="") == dataclasses.replace(one.header, texts_digest="")


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 1000), alone=st.sampled_from([0.0, 0.5, 1.0]))
def test_saved_pairs_come_back(
    tmp_path_factory: pytest.TempPathFactory, n: int, k: int, seed: int, alone: float
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    pairs = make_pairs(n, k, seed=seed, alone=alone)
    save_pairs(folder, pairs)
    back = load_pairs(folder, corpus_digest="c" * 16, space=SPACE, image_digest=digest_ids(pairs.image_ids))
    assert_equal(pairs, back)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_pairs(folder, back)
    assert first == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_table_reads_without_chiasm(tmp_path: Path) -> None:
    pairs = make_pairs(alone=0.5, seed=1)
    table = pq.read_table(save_pairs(tmp_path, pairs) / "pairs.parquet")
    assert table.column_names == [
        "image_id", "rank", "report_id", "chunk", "start", "end", "similarity", "margin", "content",
    ]  # fmt: skip
    rows = table.to_pylist()
    alone = [r for r in rows if r["rank"] == 0]
    assert len(alone) == int((~pairs.paired).sum()) > 0
    assert all(r["report_id"] is None and r["similarity"] == -0.5 for r in alone)
    assert len(rows) == (pairs.text_rows >= 0).sum() + len(alone)
    row = next(r for r in rows if r["rank"] == 1)
    place = pairs.text_rows[pairs.image_ids.index(row["image_id"]), 0]
    assert (row["report_id"], row["chunk"]) == pairs.text_keys[place]
    assert json.loads((tmp_path / "texts.json").read_text())[place]["start"] == row["start"]
    assert read_pair_header(tmp_path).filters[0]["what"] == "tissue"


def test_order_of_the_images_does_not_matter() -> None:
    assert digest_ids(["a", "b"]) == digest_ids(["b", "a"]) != digest_ids(["a", "bb"])
    assert digest_ids(["a", "b"]) != digest_ids(["a,b"])


def test_another_corpus_encoder_or_image_set_is_refused(tmp_path: Path) -> None:
    save_pairs(tmp_path, make_pairs())
    with pytest.raises(InputError, match=r"another corpus than `corpus.txt`") as found:
        load_pairs(tmp_path, corpus_digest="e" * 16)
    assert found.value.hint is not None
    with pytest.raises(InputError, match="another set of images"):
        load_pairs(tmp_path, image_digest=digest_ids(["image-0"]))
    with pytest.raises(InputError, match="files have changed"):
        load_pairs(tmp_path, content_digest="e" * 16)
    load_pairs(tmp_path, content_digest="d" * 16)
    for other in (Space("made", "x" * 12, "b" * 12, 4), Space("made", "a" * 12, "x" * 12, 4)):
        with pytest.raises(SpaceMismatch, match="were made with"):
            load_pairs(tmp_path, space=other)
    unknown = dataclasses.replace(make_pairs(), header=dataclasses.replace(make_pairs().header, content_digest=""))
    save_pairs(tmp_path, unknown)
    load_pairs(tmp_path, content_digest="e" * 16)


def test_images_that_have_changed_are_refused(tmp_path: Path) -> None:
    made = make_pairs(n=4)
    made = dataclasses.replace(made, contents=tuple(f"{i:016x}" for i in range(4)))
    pairs = load_pairs(save_pairs(tmp_path, made))
    assert_equal(made, pairs)
    ids = ["image-2", "image-0"]
    pairs.check_contents(ids, [f"{2:016x}" + "ab" * 24, f"{0:016x}"])
    with pytest.raises(InputError, match="2 of 2 images are not the files that were paired"):
        pairs.check_contents(ids, [f"{0:016x}", f"{2:016x}"])
    with pytest.raises(InputError, match="1 of 3 images are not in the pairs"):
        pairs.check_contents([*ids, "stranger"], ["", "", ""])
    load_pairs(save_pairs(tmp_path, make_pairs())).check_contents(["image-0"], ["unknown"])


def test_a_pair_that_just_reaches_the_gate_teaches() -> None:
    pairs = make_pairs(alone=0.0)
    gate = float(pairs.similarity[0, 0])
    assert pairs.targets(["image-0"], gate=gate).mask.all()
    assert not pairs.targets(["image-0"], gate=float(np.nextafter(np.float32(gate), np.float32(2)))).mask.any()


def test_damage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pairs"):
        load_pairs(tmp_path)
    good = save_pairs(tmp_path / "good", make_pairs())

    def broken(name: str, content: bytes | None) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    other = save_pairs(tmp_path / "other", make_pairs(seed=1))
    with pytest.raises(FileFormatError, match="not of one run"):  # killed between two files
        load_pairs(broken("texts.npy", (other / "texts.npy").read_bytes()))
    for name, content in (
        ("pairs.parquet", b"PAR1 nothing"),
        ("pairs.parquet", (good / "pairs.parquet").read_bytes()[:-20]),
        ("texts.npy", None),
        ("texts.json", None),
    ):
        with pytest.raises(FileFormatError, match="damaged"):
            load_pairs(broken(name, content))
    pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(FileFormatError, match="not a table of pairs"):
        load_pairs(broken("pairs.parquet", (tmp_path / "t.parquet").read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0].update(rank=9),
        lambda rows: rows[0].update(rank=-1),
        lambda rows: rows[0].update(report_id="another"),
        lambda rows: rows[0].update(report_id=None, rank=1),
        lambda rows: rows[0].update(similarity=float("nan")),
        lambda rows: rows.append(dict(rows[0])),
        lambda rows: rows[0].update(image_id="stranger"),
        lambda rows: rows[0].update(rank=2),
    ],
)
def test_rows_that_contradict_each_other_are_refused(tmp_path: Path, change: Any) -> None:
    save_pairs(tmp_path, make_pairs(k=2, alone=0))
    path = tmp_path / "pairs.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows = [r for r in rows if r["rank"] == 1]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    load_pairs(tmp_path)
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(FileFormatError, match="damaged"):
        load_pairs(tmp_path)


def test_headers_that_cannot_be_used(tmp_path: Path) -> None:
    path = save_pairs(tmp_path, make_pairs()) / "pairs.parquet"
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"chiasm.pairs"])
    for metadata, words in (
        (None, "do not say"),
        (b"{", "do not say"),
        (b"[]", "do not say"),
        (json.dumps({**header, "space": {"no": 1}}).encode(), "do not say"),
        (json.dumps({**header, "format": 2}).encode(), "reads up to 1"),
    ):
        schema = None if metadata is None else {b"chiasm.pairs": metadata}
        pq.write_table(table.replace_schema_metadata(schema), path)
        with pytest.raises(FileFormatError, match=words):
            load_pairs(tmp_path)


def test_targets_of_one_report() -> None:
    pairs = make_pairs(n=20)
    names = [*reversed(pairs.image_ids), pairs.image_ids[0]]
    vectors, similarity, mask = pairs.targets(names)
    rows = pairs.rows_of(names)
    np.testing.assert_array_equal(mask, pairs.paired[rows])
    np.testing.assert_allclose(vectors[mask], pairs.texts[pairs.text_rows[rows, 0]][mask], atol=1e-6)
    assert (vectors[~mask] == 0).all()
    assert (similarity[~mask] == 0).all()
    np.testing.assert_array_equal(similarity[mask], pairs.similarity[rows, 0][mask])
    assert vectors.dtype == similarity.dtype == np.float32


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([None, 0.05, 1.0]),
    gate=st.sampled_from([None, -1.0, 0.4, 1.0]),
    top_k=st.integers(1, 3),
)
def test_targets_equal_their_formula(seed: int, temperature: float | None, gate: float | None, top_k: int) -> None:
    pairs = make_pairs(n=10, seed=seed)
    vectors, _, mask = pairs.targets(pairs.image_ids, top_k=top_k, temperature=temperature, gate=gate)
    for i in range(10):
        kept = [
            (pairs.texts[t], s)
            for t, s in zip(pairs.text_rows[i, :top_k], pairs.similarity[i, :top_k], strict=True)
            if t >= 0 and (gate is None or s >= gate)
        ]
        assert mask[i] == bool(kept)
        if kept:
            weights = np.exp([0.0 if temperature is None else float(s) / temperature for _, s in kept])
            mean = (weights[:, None] * np.stack([v for v, _ in kept])).sum(axis=0) / weights.sum()
            np.testing.assert_allclose(vectors[i], mean / np.linalg.norm(mean), atol=1e-5)
            assert np.linalg.norm(vectors[i]) == pytest.approx(1, abs=1e-6)


def test_opposite_texts_do_not_cancel_into_nothing() -> None:
    pairs = make_pairs(n=1, k=2, m=2, alone=0)
    texts = np.array([[1, 0, 0, 0], [-1, 0, 0, 0]], np.float32)
    pairs = dataclasses.replace(pairs, texts=texts, text_rows=np.array([[1, 0]]), similarity=np.array([[0.5, 0.5]], np.float32))  # fmt: skip
    assert pairs.targets(pairs.image_ids, top_k=2).vectors.tolist() == [[-1, 0, 0, 0]]


def test_targets_refuse() -> None:
    pairs = make_pairs()
    with pytest.raises(InputError, match="2 of 3 images are not in the pairs") as found:
        pairs.targets(["image-0", "secret", "x"])
    assert "secret" not in str(found.value)
    with pytest.raises(InputError, match="between 1 and 3"):
        pairs.targets(pairs.image_ids, top_k=4)
    with pytest.raises(InputError, match="temperature"):
        pairs.targets(pairs.image_ids, temperature=0)
    with pytest.raises(InputError, match="gate"):
        pairs.targets(pairs.image_ids, gate=2)
    assert pairs.targets([]).vectors.shape == (0, 4)
    none = dataclasses.replace(make_pairs(alone=1), texts=np.zeros((0, 4), np.float32), text_keys=())
    assert not none.targets(none.image_ids).mask.any()
    assert pairs.report_numbers.tolist() == [0, 0, 1, 1, 2, 2]
