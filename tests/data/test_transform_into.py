"""The compiled path of the transform against the plain one: the same bits for every declaration, mode, size and decoder."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from chiasm.data import bicubic
from chiasm.data.transforms import ImageTransform, fit_image, image_transform
from chiasm.errors import InputError
from chiasm.io.image import open_image
from chiasm.types import Preprocess

MODES = ("L", "RGB", "RGBA", "P", "1", "CMYK", "LA")
DECLARATIONS = {
    "open_clip": Preprocess(),
    "transformers": Preprocess(rgb="before_resize"),
    "squash": Preprocess(resize="squash", crop="none"),
    "squash and crop": Preprocess(resize="squash", resize_size=256),
    "larger, then crop": Preprocess(resize_size=256),
    "longest": Preprocess(resize="longest_pad", fill=9),
    "longest, then crop": Preprocess(resize="longest_pad", resize_size=256, side_rounding="both_down"),
    "pad": Preprocess(resize="pad_square", fill=200, interpolation="bicubic"),
    "cut": Preprocess(cut_bottom=0.13),
    "grey": Preprocess(grey=True, stretch="min_max"),
    "twice": Preprocess(resize="longest_pad", resize_size=256, second_resize="bicubic_tensor"),
    "bilinear": Preprocess(interpolation="bilinear"),
    "lanczos": Preprocess(interpolation="lanczos", resize="squash"),
    "area": Preprocess(interpolation="area"),
}


def picture(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    draw = np.random.default_rng(seed)
    rgb = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    rgb[: height // 3] = np.where(rgb[: height // 3] > 127, 255, 0)
    alpha = draw.integers(0, 256, (height, width), dtype=np.uint8)
    if mode in ("RGBA", "LA"):
        return Image.fromarray(np.dstack([rgb, alpha])).convert(mode)
    return Image.fromarray(rgb).quantize(40) if mode == "P" else Image.fromarray(rgb).convert(mode)


def plainly(call: Callable[[], Any]) -> Any:
    """What a machine without the compiled file computes."""
    found, bicubic._library = bicubic._library, lambda: None  # type: ignore[assignment]
    try:
        assert not bicubic.available()
        return call()
    finally:
        bicubic._library = found


def into(transform: ImageTransform, image: Image.Image) -> torch.Tensor:
    out = np.full(transform.shape, np.nan, np.float32)
    transform.into(image, out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_every_declaration_and_mode_has_the_same_bits_with_and_without(name: str) -> None:
    p = DECLARATIONS[name]
    p = dataclasses.replace(p, size=56, resize_size=None if p.resize_size is None else 64)
    transform = image_transform(p)
    for mode in MODES:
        for size in ((56, 56), (57, 56), (59, 90), (21, 33), (120, 75), (1, 40), (40, 1)):
            image = picture(mode, size)
            expected = plainly(lambda image=image: transform(image))
            assert torch.equal(transform(image), expected), (mode, size)
            assert torch.equal(into(transform, image), expected), (mode, size)
            theirs = plainly(lambda image=image: fit_image(image, p))
            ours = fit_image(image, p)
            assert (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes()), (mode, size)


@pytest.mark.parametrize("size", [224, 336, 384, 448, 512])
def test_the_usual_sides_have_the_same_bits(size: int) -> None:
    transform = image_transform(Preprocess(size=size))
    for mode, sides in (("RGB", (640, 480)), ("L", (700, 1024)), ("RGB", (300, 311)), ("L", (size, size + 3))):
        image = picture(mode, sides)
        assert torch.equal(into(transform, image), plainly(lambda image=image: transform(image))), (mode, sides)


@given(
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.integers(1, 48),
    st.sampled_from(["L", "RGB", "RGBA", "P"]),
    st.sampled_from(["shortest", "squash", "longest_pad", "pad_square"]),
    st.sampled_from(["after_resize", "before_resize"]),
    st.integers(0, 9),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_law_the_compiled_path_changes_no_bit(
    shape: tuple[int, int], size: int, mode: str, resize: Any, rgb: Any, larger: int, seed: int
) -> None:
    p = Preprocess(size=size, resize=resize, rgb=rgb, resize_size=size + larger)
    transform, image = image_transform(p), picture(mode, shape, seed)
    before = image.tobytes()
    assert torch.equal(into(transform, image), plainly(lambda: transform(image)))
    assert image.tobytes() == before, "the transform changed its input"


def test_tall_strips_and_hostile_sizes_end_as_without_it() -> None:
    for sides in ((2, 201), (3, 333), (201, 2), (1, 300)):
        transform = image_transform(Preprocess(size=24))
        image = picture("RGB", sides)
        assert torch.equal(into(transform, image), plainly(lambda i=image, t=transform: t(i))), sides
    transform = image_transform(Preprocess())
    out = np.empty(transform.shape, np.float32)
    with pytest.raises(InputError, match="a strip of 1 × 60000 pixels would become 224 × 13440000"):
        transform.into(Image.new("L", (1, 60_000)), out)
    squash = image_transform(Preprocess(size=8, resize="squash"))
    wide = Image.new("L", (70_000, 3), 9)  # a side that the compiled code refuses
    assert torch.equal(into(squash, wide), plainly(lambda: squash(wide)))
    for image in (Image.new("I;16", (8, 8)), np.zeros((8, 8), np.uint8)):
        with pytest.raises(InputError):
            transform.into(image, out)  # type: ignore[arg-type]


def test_no_memory_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, image = image_transform(Preprocess(size=24)), picture("RGB", (60, 50))
    expected = transform(image)
    monkeypatch.setattr(bicubic, "_call", lambda *_, **__: False)
    assert torch.equal(transform(image), expected)


@pytest.mark.skipif(not bicubic.available(), reason="the resize was not compiled here")
def test_the_compiled_path_is_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    real = bicubic._call
    monkeypatch.setattr(bicubic, "_call", lambda *a, **k: calls.append(a) or real(*a, **k))
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("Pillow resized"))
    for p in (Preprocess(), Preprocess(resize="squash"), Preprocess(resize="longest_pad"), Preprocess(grey=True)):
        for mode in ("L", "RGB"):
            image_transform(p)(picture(mode, (300, 250)))
    assert len(calls) == 8
    with pytest.raises(pytest.fail.Exception):
        image_transform(Preprocess())(picture("P", (300, 250)))


def test_a_row_of_a_batch_is_filled_and_its_neighbours_are_not() -> None:
    transform = image_transform(Preprocess(size=32))
    batch = np.full((4, 3, 32, 32), 7, np.float32)
    transform.into(picture("RGB", (90, 60)), batch[2])
    assert (batch[[0, 1, 3]] == 7).all()
    assert np.array_equal(batch[2], transform(picture("RGB", (90, 60))).numpy())
    tensor = torch.zeros(2, 3, 32, 32)
    transform.into(picture("L", (90, 60)), tensor.numpy()[1])
    assert torch.equal(tensor[1], transform(picture("L", (90, 60))))
    channels_last = np.zeros((32, 32, 3), np.float32).transpose(2, 0, 1)
    transform.into(picture("L", (90, 60)), channels_last)
    assert np.array_equal(channels_last, tensor[1].numpy())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((3, 32, 31), np.float32), r"float32 array of shape \(3, 32, 32\), got float32 \(3, 32, 31\)"),
        (np.zeros((3, 32, 32), np.float64), "got float64"),
        (np.zeros((1, 3, 32, 32), np.float32), r"got float32 \(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32), "got Tensor"),
        (np.broadcast_to(np.float32(0), (3, 32, 32)), "cannot be written to"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(out: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_transform(Preprocess(size=32)).into(picture("L", (40, 40)), out)


def test_threads_fill_one_batch() -> None:
    transform = image_transform(Preprocess(size=48))
    images = [picture("RGB" if i % 2 else "L", (90 + i, 70), seed=i) for i in range(24)]
    batch = np.zeros((24, *transform.shape), np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(transform.into, images, batch))
    for row, image in zip(batch, images, strict=True):
        assert np.array_equal(row, transform(image).numpy())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_from_file_to_tensor_no_decoder_and_no_kernel_changes_a_bit(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "film.jpg"
    picture(mode, (301, 199)).save(path, quality=90)
    p = Preprocess(size=64)
    with Image.open(path) as image:
        expected = plainly(lambda: image_transform(p)(image))
    assert torch.equal(image_transform(p)(open_image(path)), expected)
    assert torch.equal(plainly(lambda: image_transform(p)(open_image(path))), expected)


def smooth(side: int, mode: str = "RGB") -> Image.Image:
    """Structure of several scales, as of a film or a slide: noise would be the worst case of any reduction."""
    draw = np.random.default_rng(3)
    image = Image.new("RGB", (side, side), (128, 128, 128))
    for k, cells in enumerate((6, 24, 96, 384)):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, coarse.resize((side, side), Image.Resampling.BILINEAR), 1 / (k + 1.0))
    return image.convert(mode)


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    files = {}
    for mode in ("L", "RGB"):
        stream = io.BytesIO()
        smooth(2048, mode).save(stream, "JPEG", quality=90)
        files[mode] = stream.getvalue()
    return files


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_fast_changes_large_jpegs_within_its_stated_bound(large: dict[str, bytes], mode: str) -> None:
    p = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    exact, fast = image_transform(p), image_transform(p, fast=True)
    plain = exact(open_image(large[mode]))
    drafted = fast(open_image(large[mode], draft_px=fast.draft_px))
    by_itself = fast(Image.open(io.BytesIO(large[mode])))
    assert torch.equal(drafted, by_itself)
    difference = (drafted - plain).abs() * 255
    assert not torch.equal(drafted, plain)
    assert float(difference.max()) <= 6.01
    assert float(difference.mean()) <= 0.41
    assert not exact.fast
    assert not ImageTransform(p).fast
    assert exact.draft_px is None
    assert "fast=True" in repr(fast)
    assert "fast" not in repr(exact)


def test_fast_on_thin_lines_and_uneven_sides_stays_within_its_stated_bound() -> None:
    p = Preprocess()
    lines = Image.new("L", (2048, 2048), 0)
    for x in range(0, 2048, 37):
        ImageDraw.Draw(lines).line((x, 0, 2048 - x, 2048), fill=255, width=3)
    for image, bound in ((lines, 23), (smooth(2048).crop((0, 0, 2047, 1535)), 10)):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        plain = np.asarray(fit_image(open_image(stream.getvalue()), p)).astype(int)
        drafted = np.asarray(fit_image(open_image(stream.getvalue(), draft_px=448), p)).astype(int)
        assert 0 < np.abs(plain - drafted).max() <= bound


def test_fast_changes_nothing_else(tmp_path: Path) -> None:
    exact, fast = image_transform(Preprocess(size=64)), image_transform(Preprocess(size=64), fast=True)
    assert fast.draft_px == 128
    for name, sides in (("film.png", (600, 500)), ("small.jpg", (255, 300)), ("film.bmp", (600, 500))):
        picture("RGB", sides).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert torch.equal(fast(image), exact(open_image(tmp_path / name))), name
        assert torch.equal(fast(open_image(tmp_path / name, draft_px=128)), exact(open_image(tmp_path / name)))
    picture("RGB", (600, 500)).save(tmp_path / "large.jpg")
    decoded = open_image(tmp_path / "large.jpg")
    assert torch.equal(fast(decoded), exact(decoded)), "a decoded image is not decoded again"
    with Image.open(tmp_path / "large.jpg") as image:
        assert not torch.equal(fast(image), exact(decoded))
    for wrong in (np.zeros((8, 8), np.uint8), None):
        with pytest.raises(InputError, match="expected a Pillow image"):
            fast(wrong)  # type: ignore[arg-type]


def test_a_sample_can_be_opened_smaller(tmp_path: Path) -> None:
    import tarfile

    from chiasm.datasets.images import open_image_path, open_sample_image
    from chiasm.types import Sample

    path = tmp_path / "film.jpg"
    picture("RGB", (300, 200)).save(path)
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(path, "film.jpg")
    for where in (path, tmp_path / "shard.tar" / "film.jpg"):
        assert open_image_path(where, draft_px=100).size == (150, 100)
        assert open_sample_image(Sample(id="a", image=where), draft_px=50).size == (75, 50)
        assert open_sample_image(Sample(id="a", image=where)).size == (300, 200)
