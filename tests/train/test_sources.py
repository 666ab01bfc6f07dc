from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.augment import Augment, augmentation
from chiasm.data.tokenizers import ClipTokenizer
from chiasm.data.transforms import image_transform
from chiasm.errors import FileFormatError, InputError
from chiasm.io.manifest import RejectLog
from chiasm.train.augmentation import BatchTransform
from chiasm.train.images import images_of, readable
from chiasm.train.pairs import PairTable
from chiasm.train.recipe import DataConfig
from chiasm.train.sources import ArrayImages, FileImages, PairRows
from chiasm.train.texts import RenderedText, TokenTable
from chiasm.types import Preprocess, Sample

SPEC = Preprocess(size=16)


def arrays(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)


def table(folder, n=6, size=24, broken=()):
    samples = []
    for i, image in enumerate(arrays(n, size)):
        path = folder / f"{i}.png"
        Image.fromarray(image).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
        samples.append(Sample(f"row-{i}", image=path, text=f"text {i}", patient=f"p{i // 2}", study=f"s{i // 3}"))
    return PairTable(tuple(samples), tuple(RenderedText((s.text,), s.text) for s in samples))


def test_pairs_hold_what_was_asked_for():
    tokens = TokenTable([[f"a {i}", f"b {i}"] for i in range(5)], ClipTokenizer(6))
    images = ArrayImages(arrays(5), BatchTransform(SPEC, Augment.preset("chest")))
    keys = list("vwxyz")
    rows = np.array([3, 1])
    held_out = PairRows(images, tokens, keys, train=False)
    pairs = held_out.batch(rows, np.random.default_rng(0))
    assert pairs.keys == ["y", "w"]
    assert torch.equal(pairs.pixels[0], image_transform(SPEC)(Image.fromarray(images.images[3])))
    assert pairs.tokens.ids.tolist() == ClipTokenizer(6).encode(["b 3", "b 1"]).ids.tolist()
    again = held_out.batch(rows, np.random.default_rng(1))
    assert torch.equal(pairs.pixels, again.pixels), "nothing is random in validation"
    train = PairRows(images, tokens, keys)
    one, two, other = (train.batch(rows, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    assert len(train) == 5
    with pytest.raises(InputError, match="do not belong together"):
        PairRows(images, tokens, keys[:-1])


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 16, 16), np.float32), np.zeros((16, 16), np.uint8)]
)
def test_arrays_of_another_size_are_refused(bad):
    with pytest.raises(InputError, match="images in memory must be uint8"):
        ArrayImages(bad, BatchTransform(SPEC))


def test_files_equal_the_transforms_whatever_the_threads(tmp_path):
    pairs = table(tmp_path)
    plain, augmented = image_transform(SPEC), augmentation(Augment.preset("chest"), SPEC)
    rows = np.array([4, 0, 2])
    made = []
    for workers in (1, 3):
        files = FileImages(pairs.open, plain, augmented=augmented, workers=workers)
        still, kept = files(rows, None)
        assert kept.tolist() == [0, 1, 2]
        assert torch.equal(still, torch.stack([plain(pairs.open(r)) for r in rows]))
        made.append(files(rows, np.random.default_rng(3))[0])
    assert torch.equal(*made)
    assert not torch.equal(made[0], still)


def test_unreadable_files_are_noted_once_and_left_out_or_fatal(tmp_path):
    pairs = table(tmp_path, broken=(2,))
    rejects = RejectLog()
    files = FileImages(pairs.open, image_transform(SPEC), rejects=rejects, samples=pairs.samples)
    source = PairRows(files, TokenTable([t.variants for t in pairs.texts], ClipTokenizer(6)), pairs.keys("caption"))
    for _ in range(2):
        batch = source.batch(np.array([1, 2, 3]), np.random.default_rng(0))
        assert len(batch.pixels) == len(batch.tokens.ids) == 2
        assert batch.keys == ["text 1", "text 3"]
    assert [(r.row, r.id) for r in rejects] == [(2, "row-2")]
    assert "2.png" not in next(iter(rejects)).reason
    with pytest.raises(InputError, match="no image of a batch"):
        files(np.array([2]), None)
    strict = FileImages(pairs.open, image_transform(SPEC))
    with pytest.raises(FileFormatError):
        strict(np.array([1, 2]), None)


def test_images_go_to_memory_when_they_fit(tmp_path):
    pairs = table(tmp_path, broken=(4,))
    reference = torch.stack([image_transform(SPEC)(pairs.open(r)) for r in (0, 1, 2, 3, 5)])
    for mode in ("auto", "always"):
        rejects = RejectLog()
        images, usable = images_of(
            pairs, SPEC, data=DataConfig(source="x", in_memory=mode), augment=None, rejects=rejects
        )
        assert isinstance(images, ArrayImages)
        assert [s.id for s in usable.samples] == [f"row-{i}" for i in (0, 1, 2, 3, 5)]
        assert [r.id for r in rejects] == ["row-4"]
        assert "row-4" not in next(iter(rejects)).reason
        assert torch.equal(images(np.arange(5), None)[0], reference)
    rejects = RejectLog()
    images, usable = images_of(
        pairs, SPEC, data=DataConfig(source="x", in_memory="never"), augment=None, rejects=rejects
    )
    assert isinstance(images, FileImages)
    assert (len(usable), len(rejects)) == (6, 0), "files are looked at when they are met"
    assert torch.equal(images(np.arange(6), None)[0], reference)
    data = DataConfig(source="x", on_bad_row="fail")
    with pytest.raises(FileFormatError):
        images_of(pairs, SPEC, data=data, augment=None, rejects=RejectLog())
    everything = table(tmp_path, broken=range(6))
    with pytest.raises(InputError, match="no image can be read"):
        images_of(everything, SPEC, data=DataConfig(source="x"), augment=None, rejects=RejectLog())


def test_what_can_be_read_is_remembered_until_a_file_changes(tmp_path):
    pairs, cache = table(tmp_path, broken=(1, 4)), tmp_path / "cache"
    for _ in range(2):
        rejects = RejectLog()
        usable = readable(pairs, rejects=rejects, fail=False, cache=cache)
        assert [s.id for s in usable.samples] == ["row-0", "row-2", "row-3", "row-5"]
        assert [r.id for r in rejects] == ["row-1", "row-4"]
    assert len(list(cache.iterdir())) == 1
    table(tmp_path, size=30)
    assert len(readable(pairs, rejects=RejectLog(), fail=False, cache=cache)) == 6


def test_grey_and_colour_images_share_a_table(tmp_path):
    pairs = table(tmp_path)
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "1.png")
    images, _ = images_of(pairs, SPEC, data=DataConfig(source="x"), augment=None, rejects=RejectLog())
    expected = torch.stack([image_transform(SPEC)(pairs.open(r)) for r in range(6)])
    assert torch.equal(images(np.arange(6), None)[0], expected)


def test_keys_by_caption_group_or_row(tmp_path):
    pairs = table(tmp_path)
    assert pairs.keys("caption") == [f"text {i}" for i in range(6)]
    assert pairs.keys("group") == ["s0", "s0", "s0", "s1", "s1", "s1"]
    assert pairs.keys("none") == [f"row-{i}" for i in range(6)]
    part = pairs.select([4, 0])
    assert [s.id for s in part.samples] == ["row-4", "row-0"]
    assert part.digest != pairs.digest


@pytest.mark.parametrize(("processors", "threads"), [(1, 2), (2, 2), (6, 6), (64, 8)])
def test_images_are_decoded_by_as_many_threads_as_there_are_processors(monkeypatch, processors, threads):
    """Two threads starve a model that runs on sixteen; hundreds would only hold memory."""
    from chiasm.train import images

    monkeypatch.setattr(images, "available_cpus", lambda: processors)
    assert images.decoders() == threads
