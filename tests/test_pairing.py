"""From images and reports to pairs: chunks with provenance, a cache by content, label-free to the last byte."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chiasm.pairing as module
from chiasm.datasets.reports import ReportCorpus, read_reports
from chiasm.errors import InputError, SpaceMismatch
from chiasm.io.pairs import digest_ids, load_pairs, save_pairs
from chiasm.pairing import PairingRun, pair_reports
from chiasm.progress import SilentProgress
from chiasm.tasks.pairing import pair
from chiasm.tasks.report_blocks import float32_product
from chiasm.testing import TinyEncoder, make_test_images
from chiasm.types import Embeddings, Sample, Space

LONG = " ".join(f"Sentence {i} tells of gland {i} and stroma." for i in range(14))
TEXTS = ("Glands are crowded.", "Stroma is loose.", LONG, "Glands are crowded.", "Necrosis.", "Lymphocytes abound.")


@pytest.fixture(scope="module")
def encoder() -> Any:
    return TinyEncoder(0)


@pytest.fixture(scope="module")
def corpus() -> ReportCorpus:
    return ReportCorpus.from_texts(TEXTS, name="six")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("images")
    made = []
    for i, image in enumerate(make_test_images(10)):
        image.resize((40, 32)).save(folder / f"{i}.png")
        made.append(Sample(id=f"i{i}", image=folder / f"{i}.png", labels={"y": i % 3}, text="its own", patient="p"))
    return made


def assert_same_pairs(one: PairingRun, other: PairingRun, tmp_path: Path) -> None:
    a, b = save_pairs(tmp_path / "a", one.pairs), save_pairs(tmp_path / "b", other.pairs)
    for file in sorted(a.iterdir()):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    shutil.rmtree(a)
    shutil.rmtree(b)


def test_pairs_know_where_they_come_from(encoder: Any, corpus: ReportCorpus, samples: list[Sample]) -> None:
    run = pair_reports(encoder, samples, corpus, k=3, aggregate="max")
    assert run.distinct_reports == 5
    assert not (run.pairing.report_rows == 3).any(), "of equal texts the first stands for all"
    long = [p for p in run.pieces if p.report == 2]
    assert len(long) > 2
    assert all(LONG[p.start : p.end] == p.text for p in long)
    for row, (report, number) in enumerate(run.pairs.text_keys):
        start, end = run.pairs.text_spans[row]
        text = corpus.reports[corpus.ids.index(report)].text[start:end]
        mine = [p for p in run.pieces if corpus.reports[p.report].id == report]
        assert mine[number].text == text
        vector = encoder.encode_text([text], normalize=True)[0].numpy()
        np.testing.assert_allclose(run.pairs.texts[row], vector, atol=1e-5)
    for i in range(len(samples)):
        for rank in range(3):
            key = run.pairs.text_keys[run.pairs.text_rows[i, rank]]
            assert key[0] == corpus.ids[run.pairing.report_rows[i, rank]]
    header = run.pairs.header
    assert (header.corpus_digest, header.space, header.k) == (corpus.digest, encoder.space, 3)
    assert header.image_digest == digest_ids([s.id for s in samples])
    assert header.chunking["context_length"] == 32
    assert header.min_similarity_rule == "none"


def test_labels_texts_and_patients_of_images_do_not_matter(
    encoder: Any, corpus: ReportCorpus, samples: list[Sample], tmp_path: Path
) -> None:
    one = pair_reports(encoder, samples, corpus, k=2, correction="csls")
    mixed = [
        replace(s, labels={"y": other.labels["y"], "z": 1}, text=None, patient=other.id)
        for s, other in zip(samples, reversed(samples), strict=True)
    ]
    assert_same_pairs(one, pair_reports(encoder, mixed, corpus, k=2, correction="csls"), tmp_path)


def test_the_cache_changes_nothing_and_is_found_by_content(
    encoder: Any, corpus: ReportCorpus, samples: list[Sample], tmp_path: Path
) -> None:
    plain = pair_reports(encoder, samples, corpus)
    assert plain.found == {"text": 0, "image": 0}
    first = pair_reports(encoder, samples, corpus, cache=tmp_path / "cache")
    assert_same_pairs(plain, first, tmp_path)
    again = pair_reports(encoder, samples, corpus, cache=tmp_path / "cache")
    assert again.found == {"text": len(first.pieces), "image": 10}
    assert_same_pairs(first, again, tmp_path)
    moved = tmp_path / "elsewhere.png"
    shutil.copy(samples[4].image or "", moved)
    part = [Sample(id="copy", image=moved), samples[2]]
    other = pair_reports(encoder, part, corpus, k=2, cache=tmp_path / "cache")
    assert other.found == {"text": len(first.pieces), "image": 2}
    np.testing.assert_array_equal(other.images.vectors, first.images.vectors[[4, 2]])
    shutil.copy(samples[5].image or "", moved)  # same name, other content
    changed = pair_reports(encoder, part, corpus, k=2, cache=tmp_path / "cache")
    np.testing.assert_array_equal(changed.images.vectors[0], first.images.vectors[5])
    assert changed.pairs.header.content_digest != other.pairs.header.content_digest
    assert changed.pairs.header.image_digest == other.pairs.header.image_digest
    weights = TinyEncoder(1)
    assert pair_reports(weights, samples, corpus, cache=tmp_path / "cache").found == {"text": 0, "image": 0}


class _Stop(SilentProgress):
    """Ends the run after some images, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.images = False

    def start(self, total: int | None, description: str) -> None:
        self.images = description == "embedding images"

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.left -= n * self.images
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_goes_on(
    encoder: Any, corpus: ReportCorpus, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 4)
    options: dict[str, Any] = {"batch_size": 2, "k": 2}
    whole = pair_reports(encoder, samples, corpus, cache=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        pair_reports(encoder, samples, corpus, cache=tmp_path / "killed", progress=_Stop(7), **options)
    (next((tmp_path / "killed").glob("*/")) / ".shard-1.npy.abc.part").write_bytes(b"half")
    resumed = pair_reports(encoder, samples, corpus, cache=tmp_path / "killed", **options)
    assert resumed.found is not None
    assert resumed.found["text"] == len(whole.pieces)
    assert resumed.found["image"] == 4
    assert_same_pairs(whole, resumed, tmp_path)


def test_images_that_cannot_be_read_are_left_out(
    encoder: Any, corpus: ReportCorpus, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    for name in ("bad", "copy"):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    bad = [
        Sample(id="bad", image=tmp_path / "bad.png"),
        Sample(id="gone", image=tmp_path / "gone.png"),  # a whole part without an image
        samples[0],
        Sample(id="copy", image=tmp_path / "copy.png"),
        Sample(id="none"),
        samples[1],
    ]
    run = pair_reports(encoder, bad, corpus, batch_size=1, cache=tmp_path / "cache")
    assert run.pairing.image_ids == ("i0", "i1")
    assert [(r.row, r.id) for r in run.rejected] == [(0, "bad"), (1, "gone"), (3, "copy"), (4, "none")]
    assert run.pairs.header.image_digest == digest_ids(["i0", "i1"])
    with pytest.raises(InputError, match="none of 1 images"):
        pair_reports(encoder, bad[:1], corpus)


def test_saved_pairs_refuse_another_corpus_and_encoder(
    encoder: Any, corpus: ReportCorpus, samples: list[Sample], tmp_path: Path
) -> None:
    save_pairs(tmp_path, pair_reports(encoder, samples, corpus).pairs)
    load_pairs(tmp_path, corpus_digest=corpus.digest, space=encoder.space, image_digest=digest_ids(f"i{i}" for i in range(10)))  # fmt: skip
    with pytest.raises(InputError, match="another corpus"):
        load_pairs(tmp_path, corpus_digest=ReportCorpus.from_texts([*TEXTS[:-1], "Changed."]).digest)
    with pytest.raises(SpaceMismatch):
        load_pairs(tmp_path, space=TinyEncoder(1).space)
    with pytest.raises(InputError, match="another set of images"):
        load_pairs(tmp_path, image_digest=digest_ids([s.id for s in samples[1:]]))


def test_only_reports_that_passed_the_filter_are_chosen(encoder: Any, samples: list[Sample], tmp_path: Path) -> None:
    rows = [("a", "colon", "Glands are crowded."), ("b", "breast", "Ducts."), ("c", "colon", "Stroma is loose.")]
    table = tmp_path / "r.csv"
    table.write_text("id,tissue,text\n" + "".join(",".join(r) + "\n" for r in rows))
    found = pair_reports(encoder, samples, read_reports(table, tissue="colon"), k=3)
    assert {r for r, _ in found.pairs.text_keys} == {"a", "c"}
    assert (found.pairing.report_rows[:, 2] == -1).all()
    assert found.pairs.header.filters[0]["dropped"] == 1
    with pytest.raises(InputError, match="tissue"):
        read_reports(table, tissue="lung")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.sampled_from([2, 17, 96]), spread=st.sampled_from([1.0, 1e-2, 1e-4]))
def test_a_rougher_product_knows_its_error_and_changes_nothing(seed: int, dim: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=dim)  # the smaller the spread, the more reports lie within the rounding of bf16
    image = (base + rng.normal(size=(30, dim))).astype(np.float32)
    text = (base + spread * rng.normal(size=(90, dim))).astype(np.float32)
    text[60:] = text[:30]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    exact = image.astype(np.float64) @ text.astype(np.float64).T
    for product in (float32_product, module.bfloat16_product):
        rough, error = product(text)(image)
        assert rough.dtype == np.float32
        assert np.abs(rough - exact).max() <= error < 0.05
    space = Space("made", "a", "b", dim)
    images = Embeddings(image, tuple(map(str, range(30))), space, "image")
    chunks = Embeddings(text, tuple(map(str, range(90))), space, "text")
    for options in ({}, {"correction": "csls"}, {"aggregate": "mean"}):
        of = np.arange(90) // (3 if "aggregate" in options else 1)
        one, other = (
            pair(images, chunks, report_of=of, k=4, product=p, block=50, **options)  # type: ignore[arg-type]
            for p in (float32_product, module.bfloat16_product)
        )
        np.testing.assert_array_equal(one.report_rows, other.report_rows)
        np.testing.assert_array_equal(one.similarity, other.similarity)


def test_mapped_vectors_are_compared_without_a_warning(tmp_path: Path) -> None:
    rows = np.eye(4, dtype=np.float32)
    np.save(tmp_path / "v.npy", rows)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    for product in (module.bfloat16_product, module.fastest_product()):
        np.testing.assert_array_equal(product(mapped)(mapped)[0], rows)


def test_one_image_and_one_report(encoder: Any, samples: Sequence[Sample]) -> None:
    run = pair_reports(encoder, samples[:1], ReportCorpus.from_texts(["Necrosis."]))
    assert run.pairs.targets(["i0"]).mask.all()


def test_what_cannot_pair_is_refused(encoder: Any, corpus: ReportCorpus, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="1 of 11 ids"):
        pair_reports(encoder, [*samples, samples[0]], corpus)
    with pytest.raises(InputError, match="too few"):
        pair_reports(encoder, samples, corpus, min_similarity="auto")
