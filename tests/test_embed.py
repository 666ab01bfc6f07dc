from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from chiasm.data.tokens import TruncationWarning
from chiasm.datasets import load_table
from chiasm.embed import embed_images, embed_texts, embed_to_store
from chiasm.encoders.base import Encoder
from chiasm.errors import InputError, SpaceMismatch
from chiasm.io.manifest import RejectLog, read_jsonl
from chiasm.io.store import open_store
from chiasm.testing import TinyEncoder
from chiasm.types import Sample


class Watched(Encoder):
    """The tiny real encoder; it notes the size of every batch and can be interrupted before one."""

    def __init__(self, context: int = 12, seed: int = 0) -> None:
        tiny = TinyEncoder(seed, context_length=context)
        super().__init__(tiny.model, tiny.config, name="tiny")
        self.seen: list[int] = []
        self.at_batch: Callable[[int], None] = lambda k: None

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        self.at_batch(len(self.seen))
        self.seen.append(len(pixels))
        return super().encode_image(pixels, normalize)

    def encode_text(self, tokens: Any, normalize: bool = False) -> Tensor:
        self.seen.append(len(tokens.ids))
        return super().encode_text(tokens, normalize)


class Notes:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total: int | None, description: str) -> None:
        self.calls.append(("start", total, description))

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.calls.append(("advance", n))

    def finish(self) -> None:
        self.calls.append(("finish",))


def encoder(**options: int) -> Watched:
    return Watched(**options)


@pytest.fixture(autouse=True)
def one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test stops or counts batch by batch; tests/test_embed_streams.py has several at a time."""
    monkeypatch.setattr("chiasm.embed_streams.ENCODERS", 1)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(11):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
        samples.append(
            Sample(
                id=f"s{i}", image=path, text=f"text {i % 4}", patient=f"p{i // 2}",
                labels={"age": 40 + i, "edema": None}, split="train" if i < 8 else "test",
            )
        )  # fmt: skip
    return samples


@pytest.mark.parametrize("workers", [0, 3])
def test_images_come_back_in_order_with_what_is_known_of_them(pictures: list[Sample], workers: int) -> None:
    notes = Notes()
    found = embed_images(encoder(), pictures, batch_size=4, workers=workers, progress=notes)
    assert found.ids == tuple(f"s{i}" for i in range(11))
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-6)
    e = encoder()
    one = e.encode_image(e.preprocess(Image.open(pictures[7].image or ""))[None], normalize=True)
    np.testing.assert_allclose(found.vectors[7], one[0].numpy(), rtol=1e-5)
    assert found.space == e.space
    assert (found.modality, found.normalized, found.logit_scale, found.logit_bias) == (
        "image", True, e.logit_scale, None,
    )  # fmt: skip
    assert found.labels == {
        "age": tuple(range(40, 51)), "edema": (None,) * 11, "split": ("train",) * 8 + ("test",) * 3,
    }  # fmt: skip
    assert found.patients == tuple(f"p{i // 2}" for i in range(11))
    assert found.paths == tuple(str(s.image) for s in pictures)
    assert notes.calls[0] == ("start", 11, "embedding images")
    assert notes.calls[-1] == ("finish",)
    assert sum(c[1] for c in notes.calls if c[0] == "advance") == 11


def test_paths_and_pillow_images_are_taken_too(pictures: list[Sample]) -> None:
    expected = embed_images(encoder(), pictures)
    paths = [s.image for s in pictures if s.image]
    np.testing.assert_array_equal(embed_images(encoder(), paths).vectors, expected.vectors)
    np.testing.assert_array_equal(embed_images(encoder(), [str(p) for p in paths]).vectors, expected.vectors)
    opened = [Image.open(p) for p in paths]
    found = embed_images(encoder(), opened)
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    assert found.ids == tuple(str(i) for i in range(11))
    assert found.paths is None
    with pytest.raises(InputError, match="cannot embed a int"):
        embed_images(encoder(), [3])  # type: ignore[list-item]
    assert len(embed_images(encoder(), [])) == 0
    with pytest.raises(InputError, match="1 ids of 2 samples are repeated"):
        embed_images(encoder(), [paths[0], paths[0]])
    with pytest.raises(InputError, match="batch_size"):
        embed_images(encoder(), paths, batch_size=0)


def test_texts_come_back_in_order_and_equal_ones_cost_once() -> None:
    e = encoder(context=40)
    texts = ["a longer text than others", "b", "ccc", "b", "dd", "a longer text than others"]
    found = embed_texts(e, texts, batch_size=2)
    assert found.texts == tuple(texts)
    assert found.ids == tuple("012345")
    assert sum(e.seen) == 4
    np.testing.assert_array_equal(found.vectors[1], found.vectors[3])
    for i, text in enumerate(texts):
        single = embed_texts(encoder(context=40), [text]).vectors[0]
        np.testing.assert_allclose(found.vectors[i], single, rtol=1e-5, atol=1e-6)
    assert len(embed_texts(e, [])) == 0
    with pytest.raises(InputError, match="batch_size"):
        embed_texts(e, texts, batch_size=0)


def test_raw_texts_keep_their_lengths() -> None:
    encoder = TinyEncoder()
    raw, unit = embed_texts(encoder, ["a", "b", "c d"], normalize=False), embed_texts(encoder, ["a", "b", "c d"])
    assert (raw.normalized, unit.normalized) == (False, True)
    np.testing.assert_allclose(raw.vectors, encoder.encode_text(["a", "b", "c d"]).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(raw.normalize().vectors, unit.vectors, atol=1e-6)
    assert np.abs(np.linalg.norm(raw.vectors, axis=1) - 1).max() > 1e-2


def test_truncation_is_told_once_with_its_count() -> None:
    with pytest.warns(TruncationWarning, match="3 of 4 texts are longer than 12 tokens") as caught:
        embed_texts(encoder(), ["x" * 20, "x" * 20, "short", "y" * 13], batch_size=1)
    assert len(caught) == 1


def broken(pictures: list[Sample]) -> list[Sample]:
    assert pictures[2].image is not None
    assert pictures[5].image is not None
    pictures[2].image.write_bytes(b"")
    pictures[5].image.write_bytes(pictures[5].image.read_bytes()[:50])
    pictures[9] = replace(pictures[9], image=None, text="  ")
    return pictures


def test_bad_rows_are_never_silent(pictures: list[Sample]) -> None:
    samples = broken(pictures)
    rejects = RejectLog()
    found = embed_images(encoder(), samples, batch_size=3, rejects=rejects)
    assert found.ids == tuple(f"s{i}" for i in range(11) if i not in (2, 5, 9))
    assert [r.id for r in rejects] == ["s2", "s5", "s9"]
    assert all("png" not in r.reason for r in rejects)
    with pytest.warns(UserWarning, match="of 11 rows, 3 rows rejected: "):
        embed_images(encoder(), samples)
    with pytest.raises(InputError, match="row 2 of the data cannot be loaded"):
        embed_images(encoder(), samples, on_bad="fail")
    with pytest.raises(InputError, match="none of 1 rows can be embedded"):
        embed_images(encoder(), [samples[2]], rejects=rejects)
    with pytest.warns(UserWarning, match="1 row rejected: 1 text is empty"):
        assert len(embed_texts(encoder(), samples)) == 10
    with pytest.raises(InputError, match="row 9 of the data cannot be embedded: text is empty"):
        embed_texts(encoder(), samples, on_bad="fail")


def test_vectors_that_are_not_finite_are_an_error(pictures: list[Sample], tmp_path: Path) -> None:
    e = encoder()
    with torch.no_grad():
        next(e.model.visual.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="`tiny` gave vectors with NaN"):
        embed_images(e, pictures)
    with pytest.raises(InputError, match="NaN"):
        embed_to_store(e, pictures, tmp_path / "s")
    assert open_store(tmp_path / "s").count() == 0


def test_a_store_holds_both_modalities_and_a_second_run_adds_nothing(pictures: list[Sample], tmp_path: Path) -> None:
    done = embed_to_store(encoder(), pictures, tmp_path / "s", batch_size=4)
    assert (done.added, done.present, len(done.rejected)) == ({"image": 11, "text": 11}, {"image": 0, "text": 0}, 0)
    store = open_store(tmp_path / "s")
    for modality, made in (("image", embed_images), ("text", embed_texts)):
        read, expected = store.read(modality), made(encoder(), pictures, batch_size=4)  # type: ignore[arg-type, operator]
        np.testing.assert_array_equal(read.vectors, expected.vectors)
        assert (read.ids, read.texts, read.paths) == (expected.ids, expected.texts, expected.paths)
        assert dict(read.labels) == dict(expected.labels)
    assert store.metadata.preprocess == encoder().preprocess_spec.to_dict()
    e = encoder()
    again = embed_to_store(e, pictures, tmp_path / "s", batch_size=4)
    assert (again.added, again.present, e.seen) == ({"image": 0, "text": 0}, {"image": 11, "text": 11}, [])
    assert "11 were there" in again.sentence()
    with pytest.raises(InputError, match="already"):
        embed_to_store(encoder(), pictures, tmp_path / "s", resume=False)
    with pytest.raises(SpaceMismatch):
        embed_to_store(encoder(seed=1), pictures, tmp_path / "s")
    more = [*pictures, replace(pictures[0], id="new")]
    assert embed_to_store(encoder(), more, tmp_path / "s", modalities=("text",)).added == {"text": 1}


def test_one_store_holds_vectors_of_one_precision(pictures: list[Sample], tmp_path: Path) -> None:
    plain = encoder()
    mixed = plain.with_precision("bf16")
    first = embed_to_store(mixed, pictures[:4], tmp_path / "s")
    assert (first.precision, open_store(tmp_path / "s").metadata.precision) == ("bf16", "bf16")
    with pytest.raises(InputError, match="holds vectors computed in bf16, the encoder computes in fp32") as caught:
        embed_to_store(plain, pictures, tmp_path / "s")
    assert caught.value.hint == "go on with precision bf16, or choose another folder"
    assert plain.seen == []
    assert not (tmp_path / "s" / "rejected.jsonl").read_text()
    assert embed_to_store(mixed, pictures, tmp_path / "s").added == {"image": 7, "text": 7}
    embed_to_store(plain, pictures, tmp_path / "p")
    assert open_store(tmp_path / "p").metadata.precision == "fp32"
    with pytest.raises(InputError, match="computed in fp32, the encoder computes in bf16"):
        embed_to_store(mixed, pictures, tmp_path / "p")


def test_a_run_tells_its_speed_threads_and_precision(pictures: list[Sample], tmp_path: Path) -> None:
    done = embed_to_store(encoder(), pictures, tmp_path / "s", modalities=("image",), workers=3)
    assert set(done.per_second) == {"image"}
    assert done.per_second["image"] >= round(11 / done.seconds, 1)
    assert done.threads == {"model": torch.get_num_threads(), "decoding": 3}
    assert json.loads(json.dumps(done.to_dict()))["per_second"] == dict(done.per_second)
    assert done.to_dict()["precision"] == "fp32"
    assert " a second; fp32, " in done.sentence()
    texts = embed_to_store(encoder(), pictures, tmp_path / "s")
    assert set(texts.per_second) == {"text"}, "nothing added has no speed"
    assert set(embed_to_store(encoder(), pictures, tmp_path / "s", modalities=("text",)).threads) == {"model"}


def test_a_modality_that_no_sample_has_is_passed_over(pictures: list[Sample], tmp_path: Path) -> None:
    texts = [replace(s, image=None) for s in pictures]
    assert embed_to_store(encoder(), texts, tmp_path / "s").added == {"text": 11}
    with pytest.raises(InputError, match="no sample has an image"):
        embed_to_store(encoder(), texts, tmp_path / "t", modalities=("image",))
    with pytest.raises(InputError, match="repeated"):
        embed_to_store(encoder(), [texts[0], texts[0]], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_rejected_rows_of_table_and_images_are_listed_beside_the_store(pictures: list[Sample], tmp_path: Path) -> None:
    broken(pictures)
    rows = "".join(f"images/{i}.png,words {i}\n" for i in range(12))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    notes = Notes()
    done = embed_to_store(encoder(), load_table(tmp_path / "t.csv"), tmp_path / "s", batch_size=2, progress=notes)
    listed = read_jsonl(tmp_path / "s" / "rejected.jsonl")
    assert [r["id"] for r in listed] == [r.id for r in done.rejected]
    assert {r["id"] for r in listed} == {"images/2.png", "images/5.png", "images/11.png"}
    assert done.added == {"image": 9, "text": 11}
    summary = done.to_dict()
    assert summary["rejected"] == 3
    assert json.loads(json.dumps(summary))["reasons"]["image file is missing"] == 1
    assert "images/" not in done.sentence()
    assert [c[1] for c in notes.calls if c[0] == "start"] == [11, 11]
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    repaired = embed_to_store(encoder(), load_table(tmp_path / "t.csv"), tmp_path / "s", batch_size=2)
    assert repaired.added == {"image": 1, "text": 0}
    assert len(read_jsonl(tmp_path / "s" / "rejected.jsonl")) == 2


def test_the_first_bad_row_may_stop_the_run_and_what_went_before_is_kept(
    pictures: list[Sample], tmp_path: Path
) -> None:
    samples = broken(pictures)
    kept = [samples[i] for i in (0, 1, 3, 4, 6)]
    for _ in range(2):
        with pytest.raises(InputError, match="row 5 of the data"):
            embed_to_store(encoder(), [*kept, samples[5]], tmp_path / "s", batch_size=1, on_bad="fail")
    assert open_store(tmp_path / "s").ids("image") == ("s0", "s1", "s3", "s4", "s6")


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_ctrl_c_keeps_whole_batches_and_says_how_to_go_on(
    pictures: list[Sample], tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed_images(encoder(), pictures, batch_size=4)
    e = encoder()

    def stop(batch: int) -> None:
        if batch == stop_at:
            raise KeyboardInterrupt

    e.at_batch = stop
    with pytest.raises(KeyboardInterrupt, match=rf"interrupted: {4 * stop_at} of 22 rows are stored; the same command"):
        embed_to_store(e, pictures, tmp_path / "s", batch_size=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("chiasm-loader")]
    assert open_store(tmp_path / "s").count() == 4 * stop_at
    rest = encoder()
    embed_to_store(rest, pictures, tmp_path / "s", batch_size=4)
    assert rest.seen[: 3 - stop_at] == [4, 4, 3][stop_at:]
    np.testing.assert_array_equal(open_store(tmp_path / "s").read("image").vectors, expected.vectors)


def test_old_chunks_are_committed_on_the_way(
    pictures: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for(counts: list[int]) -> Callable[[int], None]:
        """Before each batch, wait until its writer has stored what it should have by now, and no more."""

        def check(batch: int) -> None:
            until = time.monotonic() + 20
            while (n := open_store(tmp_path / "s").count()) < counts[batch % len(counts)] and time.monotonic() < until:
                time.sleep(0.01)
            seen.append(n)

        return check

    e = encoder()
    seen: list[int] = []
    e.at_batch = wait_for([0, 0, 4, 4, 8, 8])
    monkeypatch.setattr("chiasm.embed.CHUNK_ROWS", 4)
    embed_to_store(e, pictures, tmp_path / "s", batch_size=2, modalities=("image",))
    assert seen == [0, 0, 4, 4, 8, 8]
    monkeypatch.setattr("chiasm.embed.CHUNK_SECONDS", -1.0)
    e.at_batch = wait_for([11, 15, 19])
    seen.clear()
    more = [replace(s, id=s.id + "x") for s in pictures]
    embed_to_store(e, more, tmp_path / "s", batch_size=4, modalities=("image",))
    assert seen == [11, 15, 19]


def test_a_second_writer_is_refused_before_it_works(pictures: list[Sample], tmp_path: Path) -> None:
    embed_to_store(encoder(), pictures[:2], tmp_path / "s")
    with open_store(tmp_path / "s") as store:
        store.lock()
        e = encoder()
        with pytest.raises(InputError, match="another process writes"):
            embed_to_store(e, pictures, tmp_path / "s")
        assert e.seen == []


def test_a_full_disk_keeps_what_is_done_and_the_next_run_ends_the_job(
    pictures: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real failure of the file system: files may not grow beyond 9 kB, so one large chunk does not fit."""
    monkeypatch.setattr("chiasm.embed.CHUNK_ROWS", 20)
    many = [replace(s, id=f"{s.id}-{k}") for k in range(20) for s in pictures]
    assert embed_to_store(encoder(), many[:11], tmp_path / "s", modalities=("image",)).added == {"image": 11}
    monkeypatch.setattr("chiasm.embed.CHUNK_ROWS", 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(InputError, match="the disk is full: the store could not be written"):
            embed_to_store(encoder(), many, tmp_path / "s", modalities=("image",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_store(tmp_path / "s").count() == 11
    done = embed_to_store(encoder(), many, tmp_path / "s", modalities=("image",))
    assert (done.added, done.present) == ({"image": 209}, {"image": 11})
    assert open_store(tmp_path / "s").ids("image") == tuple(s.id for s in many)
