"""The compiled resize: Pillow's bits for every size, crop, content and set of instructions, or no answer at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from chiasm.data import bicubic
from chiasm.data.bicubic import Placement
from chiasm.io import compiled

ROOT = Path(__file__).parents[2]
needs_compiled = pytest.mark.skipif(not bicubic.available(), reason="the resize was not compiled here")


def noise(shape: tuple[int, ...], seed: int = 0, *, extreme: bool = False) -> NDArray[np.uint8]:
    """Noise; ``extreme`` has only 0 and 255, whose weighted sums leave the range at both ends."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, shape, dtype=np.uint8)
    return np.where(pixels > 127, 255, 0).astype(np.uint8) if extreme else pixels


def by_pillow(pixels: NDArray[np.uint8], p: Placement) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels).resize((p.width, p.height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((p.left, p.top, p.left + p.kept_width, p.top + p.kept_height)))


def centred(shape: tuple[int, ...], side: int) -> Placement:
    height, width = shape[:2]
    long = int(side * max(height, width) / min(height, width))
    width, height = (side, long) if width <= height else (long, side)
    return Placement(width, height, round((width - side) / 2), round((height - side) / 2), side, side)


def test_where_it_was_compiled_it_agrees_with_pillow() -> None:
    """Otherwise a broken kernel would step aside, and every test below with it."""
    assert bicubic.available() == (bicubic._load(Path(bicubic.__file__).parent) is not None)


@needs_compiled
@pytest.mark.parametrize("side", [1, 2, 16, 17, 63, 64, 65, 112, 224, 336, 384, 448, 512])
def test_centre_crops_of_every_usual_side(side: int) -> None:
    shapes = ((480, 640, 3), (640, 480), (299, 500, 3), (37, 61, 3), (61, 37), (224, 224, 3), (225, 224), (227, 224, 3))
    for shape in shapes:
        pixels, p = noise(shape, side), centred(shape, side)
        result = bicubic.resize(pixels, p)
        assert result is not None
        assert np.array_equal(result, by_pillow(pixels, p)), shape


@needs_compiled
@pytest.mark.parametrize(
    "shape", [(1024, 1024), (2048, 1500), (1100, 1300, 3), (1, 900), (90, 1), (1, 1, 3), (3, 700, 3)]
)
def test_large_images_strips_and_single_pixels(shape: tuple[int, ...]) -> None:
    for extreme in (False, True):
        pixels = noise(shape, extreme=extreme)
        for side in (7, 96, 224):
            p = Placement(side, side, 0, 0, side, side)
            result = bicubic.resize(pixels, p)
            assert result is not None
            assert np.array_equal(result, by_pillow(pixels, p)), side


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.uint8], Placement]:
    sides = st.integers(1, 90)
    height, width, to_height, to_width = (draw(sides) for _ in range(4))
    if draw(st.integers(0, 5)) == 0:
        to_height = height
    if draw(st.integers(0, 5)) == 0:
        to_width = width
    kept_width, kept_height = draw(st.integers(1, to_width)), draw(st.integers(1, to_height))
    left, top = draw(st.integers(0, to_width - kept_width)), draw(st.integers(0, to_height - kept_height))
    shape = (height, width, 3) if draw(st.booleans()) else (height, width)
    pixels = noise(shape, draw(st.integers(0, 2**32)), extreme=draw(st.booleans()))
    return pixels, Placement(to_width, to_height, left, top, kept_width, kept_height)


@needs_compiled
@given(cases())
@settings(max_examples=400, deadline=None)
def test_law_every_crop_of_every_resize_has_the_bits_of_pillow(case: tuple[NDArray[np.uint8], Placement]) -> None:
    pixels, p = case
    library = bicubic._library()
    assert library is not None
    theirs = by_pillow(pixels, p)
    for wide in range(bicubic._widest() + 1):
        ours = np.full_like(theirs, 77)
        assert bicubic._call(library, pixels, p, picture=ours, wide=wide)
        assert np.array_equal(ours, theirs), wide


@needs_compiled
@given(cases())
@settings(max_examples=150, deadline=None)
def test_law_planes_are_the_table_of_the_picture(case: tuple[NDArray[np.uint8], Placement]) -> None:
    pixels, p = case
    table = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    # Framed on all sides: C writes its planes and nothing beside them.
    frame = np.full((5, p.kept_height, p.kept_width), np.nan, np.float32)
    out = frame[1:4]
    assert bicubic.resize_to_planes(pixels, p, table=table, out=out)
    picture = by_pillow(pixels, p)
    for c in range(3):
        assert np.array_equal(out[c], table[c][picture if picture.ndim == 2 else picture[..., c]])
    assert np.isnan(frame[0]).all()
    assert np.isnan(frame[4]).all()


@needs_compiled
def test_a_resize_of_a_fractional_box_would_be_another_picture() -> None:
    """The trap: cropping the source and resizing that is faster, and off by a little."""
    pixels = noise((480, 640, 3))
    p = centred(pixels.shape, 224)
    box = (p.left * 640 / p.width, 0, (p.left + 224) * 640 / p.width, 480)
    boxed = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC, box=box))
    ours = bicubic.resize(pixels, p)
    assert not np.array_equal(boxed, ours)


@needs_compiled
@pytest.mark.parametrize("shape", [(201, 2, 3), (369, 3), (101, 1), (60_000, 1)])
def test_tall_strips_are_left_to_pillow(shape: tuple[int, ...]) -> None:
    """Pillow resizes them vertically first, which rounds differently."""
    p = Placement(13, 71, 0, 0, 13, 71)
    assert bicubic.resize(noise(shape), p) is None
    assert bicubic.resize(noise((shape[0], shape[0] // 100 + 1, *shape[2:])), p) is not None


@needs_compiled
@pytest.mark.parametrize(
    "p",
    [
        Placement(0, 8, 0, 0, 1, 1),
        Placement(8, -8, 0, 0, 1, 1),
        Placement(8, 8, 0, 0, 0, 8),
        Placement(8, 8, 1, 0, 8, 8),
        Placement(8, 8, 0, 1, 8, 8),
        Placement(8, 8, -1, 0, 8, 8),
        Placement(8, 8, 0, -1, 8, 8),
        Placement(8, 8, 0, 0, 9, 8),
        Placement(8, 8, 2**31, 0, 8, 8),
        Placement(65_537, 8, 0, 0, 8, 8),
        Placement(8, 2**40, 0, 0, 8, 8),
    ],
)
def test_sizes_that_do_not_fit_never_reach_the_compiled_code(p: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bicubic, "_call", lambda *_, **__: pytest.fail("reached"))
    assert bicubic.resize(noise((10, 10)), p) is None
    out = np.zeros((3, 8, 8), np.float32)
    assert not bicubic.resize_to_planes(noise((10, 10)), p, table=np.zeros((3, 256), np.float32), out=out)


@needs_compiled
def test_arrays_of_another_kind_never_reach_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bicubic, "_call", lambda *_, **__: pytest.fail("reached"))
    p = Placement(8, 8, 0, 0, 8, 8)
    good = noise((10, 10))
    for bad in (
        good[:, ::2],
        good.astype(np.uint16),
        noise((10, 10, 4)),
        noise((10, 10, 1)),
        noise((10,)),
        noise((0, 10)),
        noise((70_000, 700))[:, :0],
        np.zeros((1, 65_537), np.uint8),
        noise((20, 10)).T,
        good.tolist(),
    ):
        assert bicubic.resize(bad, p) is None
    table, out = np.zeros((3, 256), np.float32), np.zeros((3, 8, 8), np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for wrong in (
        {"table": table[:, :255]},
        {"table": table.astype(np.float64)},
        {"table": np.zeros((256, 3), np.float32).T},
        {"out": out[:, :, :7]},
        {"out": out.astype(np.float64)},
        {"out": np.zeros((3, 8, 16), np.float32)[..., ::2]},
        {"out": np.zeros((3, 9, 8), np.float32)},
        {"out": frozen},
    ):
        assert not bicubic.resize_to_planes(good, p, **({"table": table, "out": out} | wrong))  # type: ignore[arg-type]


@needs_compiled
def test_threads_share_it_and_its_input_stays_as_it_was() -> None:
    images = [noise((90 + i, 130, 3), i) for i in range(16)]
    copies = [image.copy() for image in images]
    p = Placement(40, 30, 3, 2, 30, 20)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda pixels: bicubic.resize(pixels, p), images * 4))
    for k, result in enumerate(results):
        assert result is not None
        assert np.array_equal(result, by_pillow(copies[k % 16], p))
    assert all(np.array_equal(a, b) for a, b in zip(images, copies, strict=True))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is remembered of the compiled code is forgotten before and after."""
    bicubic._library.cache_clear()
    bicubic._widest.cache_clear()
    yield
    bicubic._library.cache_clear()
    bicubic._widest.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("how", ["absent", "other bits", "no memory"])
def test_without_compiled_code_it_says_no(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "absent":
        monkeypatch.setattr(compiled, "EXTENSION_SUFFIXES", [".nothing"])
    elif how == "no memory":
        monkeypatch.setattr(bicubic, "_call", lambda *_, **__: False)
    else:
        real = Image.Image.resize
        turned = lambda image, *a, **k: real(image, *a, **k).transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # noqa: E731
        monkeypatch.setattr(Image.Image, "resize", turned)
        if bicubic._load(Path(bicubic.__file__).parent) is None:
            pytest.skip("the resize was not compiled here")
    assert not bicubic.available()
    assert bicubic._widest() == 0
    p = Placement(8, 8, 0, 0, 8, 8)
    assert bicubic.resize(noise((10, 10)), p) is None
    table, out = np.zeros((3, 256), np.float32), np.zeros((3, 8, 8), np.float32)
    assert not bicubic.resize_to_planes(noise((10, 10)), p, table=table, out=out)


def test_a_file_that_is_no_library_is_passed_over(tmp_path: Path) -> None:
    for suffix in compiled.EXTENSION_SUFFIXES:
        (tmp_path / f"_bicubic{suffix}").write_bytes(b"no library")
    assert bicubic._load(tmp_path) is None
    assert bicubic._load(tmp_path / "absent") is None


compiler = shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(compiler is None or sys.platform != "linux", reason="no C compiler here")
def test_the_source_compiles_without_a_warning_and_another_version_is_refused(tmp_path: Path) -> None:
    source = (ROOT / "src/chiasm/data/bicubic.c").read_text()
    assert "#define VERSION 1 " in source
    path = tmp_path / "other.c"
    path.write_text(source.replace("#define VERSION 1 ", "#define VERSION 2 "))
    library = tmp_path / f"_bicubic{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([str(compiler), *flags, str(path), "-o", str(library), "-lm"], check=True, capture_output=True)
    assert bicubic._load(tmp_path) is None


def test_the_compiled_file_is_optional_and_never_committed() -> None:
    assert "optional=True" in (ROOT / "setup.py").read_text()
    assert "-ffp-contract=off" in (ROOT / "setup.py").read_text()
    assert "*.so" in (ROOT / ".gitignore").read_text().split()
