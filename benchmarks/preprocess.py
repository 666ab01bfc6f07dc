"""From image files to a normalised batch of 224 x 224 pixels, on two cores: JPEG 640 x 480, CXR as PNG, large JPEGs.

Ours: two threads that open files and write into one preallocated batch. The peer: open_clip's evaluation transform in a
torch ``DataLoader`` with two worker processes, whose CPU time counts and whose start is part of every call (hundreds of
images each, so that it does not weigh much); beside it the same transform in two threads, which need no start, and
torchvision's transforms of tensors in two threads, which are faster and differ by one grey value. The error is the
largest difference between our tensors and open_clip's, and has to be 0.

The pictures are synthetic: structure of several scales and a little noise; files of quality 90 in the file cache.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/preprocess.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import timing

timing.wait_passively()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from open_clip.transform import image_transform as open_clip_transform  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from chiasm.data import bicubic  # noqa: E402
from chiasm.data.transforms import ImageTransform, image_transform  # noqa: E402
from chiasm.io.decoded import DecodedImage  # noqa: E402
from chiasm.io.image import open_image  # noqa: E402
from chiasm.types import Preprocess  # noqa: E402

PEER = "open_clip_torch transform, DataLoader"
THREADED = "open_clip_torch transform, 2 threads"
INEXACT = "torchvision v2 on tensors, 2 threads (inexact)"
DECODING = "Pillow decoding alone, 2 threads"
WORKERS, BATCH, FILES = 2, 32, 8


@dataclass(frozen=True)
class Kind:
    """One row: what the files are, and how many images a call prepares."""

    name: str
    width: int
    height: int
    mode: str
    suffix: str
    images: int


KINDS = (
    Kind("preprocess_jpeg", 640, 480, "RGB", ".jpg", 512),
    Kind("preprocess_cxr", 1024, 1024, "L", ".png", 256),
    Kind("preprocess_jpeg_2048", 2048, 2048, "RGB", ".jpg", 64),
)


def make_picture(kind: Kind, seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    size = (kind.width, kind.height)
    image = Image.new("RGB", size, (128, 128, 128))
    for k, cells in enumerate((5, 20, 80, 320)):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, coarse.resize(size, Image.Resampling.BICUBIC), 1 / (k + 1.5))
    grain = draw.normal(0, 3, (kind.height, kind.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)).convert(kind.mode)


def make_files(kind: Kind, folder: Path, images: int) -> list[Path]:
    """Write eight files and name each of them as often as a call of ``images`` images needs."""
    paths = [folder / f"{kind.name}-{seed}{kind.suffix}" for seed in range(FILES)]
    for seed, path in enumerate(paths):
        make_picture(kind, seed).save(path, quality=90)
    return [paths[i % FILES] for i in range(images)]


class Files(torch.utils.data.Dataset[Any]):
    """What a user of open_clip writes."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]))


def by_data_loader(paths: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
    loader = torch.utils.data.DataLoader(Files(paths, transform), batch_size=BATCH, num_workers=WORKERS)
    for batch in loader:
        assert batch.shape[1:] == (3, 224, 224)


def by_threads(pool: ThreadPoolExecutor, paths: Sequence[Path], load: Callable[[Path], torch.Tensor]) -> None:
    for first in range(0, len(paths), BATCH):
        torch.stack(list(pool.map(load, paths[first : first + BATCH])))


def by_chiasm(
    pool: ThreadPoolExecutor, paths: Sequence[Path], transform: ImageTransform, batch: np.ndarray[Any, Any]
) -> None:
    def load(path: Path, row: np.ndarray[Any, Any]) -> None:
        transform.into(open_image(path, draft_px=transform.draft_px), row)

    for first in range(0, len(paths), BATCH):
        list(pool.map(load, paths[first : first + BATCH], batch))


def on_tensors(image: Image.Image) -> torch.Tensor:
    """torchvision's faster form: the resize works on a tensor, not on a Pillow image."""
    return TENSOR_TRANSFORM(v2.functional.pil_to_tensor(image).expand(3, -1, -1))


TENSOR_TRANSFORM = v2.Compose([
    v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
    v2.CenterCrop(224),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(Preprocess().mean, Preprocess().std),
])  # fmt: skip


def worst(paths: Sequence[Path], ours: ImageTransform, theirs: Callable[[Image.Image], torch.Tensor]) -> float:
    """Largest difference of normalised values over the distinct files."""
    row = np.empty(ours.shape, np.float32)
    errors = []
    for path in paths[:FILES]:
        ours.into(open_image(path, draft_px=ours.draft_px), row)
        errors.append(float((torch.from_numpy(row) - theirs(Image.open(path))).abs().max()))
    return max(errors)


def measure(kind: Kind, folder: Path, repetitions: int, images: int) -> cases.Case:
    paths = make_files(kind, folder, images)
    theirs = open_clip_transform(224, is_train=False)
    ours, fast = image_transform(Preprocess()), image_transform(Preprocess(), fast=True)
    batch = np.zeros((BATCH, *ours.shape), np.float32)
    with ThreadPoolExecutor(WORKERS) as pool:
        candidates: dict[str, Callable[[], object]] = {
            PEER: lambda: by_data_loader(paths, theirs),
            "chiasm": lambda: by_chiasm(pool, paths, ours, batch),
            THREADED: lambda: by_threads(pool, paths, lambda path: theirs(Image.open(path))),
            INEXACT: lambda: by_threads(pool, paths, lambda path: on_tensors(Image.open(path))),
            DECODING: lambda: list(pool.map(lambda path: Image.open(path).load(), paths)),
        }
        if kind.suffix == ".jpg":
            candidates["chiasm fast"] = lambda: by_chiasm(pool, paths, fast, batch)
        timings = timing.interleave(candidates, repetitions)
    details: dict[str, object] = {
        "images": images,
        "file_kb": round(sum(path.stat().st_size for path in paths[:FILES]) / FILES / 1024),
        "compiled_resize": bicubic.available(),
        "decoded_by_pillow": not isinstance(open_image(paths[0]), DecodedImage),
        "decoding_share": round(sum(timings[DECODING].cpu_s) / sum(timings["chiasm"].cpu_s), 2),
    }
    if kind.suffix == ".jpg":
        details["fast_ratio_cpu"] = round(sum(timings[PEER].cpu_s) / sum(timings["chiasm fast"].cpu_s), 2)
        # In grey values, on the widest of the three scales.
        details["fast_error_255"] = round(worst(paths, fast, theirs) * max(Preprocess().std) * 255, 1)
    return cases.compare(
        kind.name, PEER, timings, error=worst(paths, ours, theirs), error_kind="largest difference", error_bound=0.0,
        rivals={THREADED: None, INEXACT: None}, details=details,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument("--images", type=int, help="images a call, instead of enough to hide the start of workers")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of each of the two threads; workers of a DataLoader have one each anyway
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            if not options.case or kind.name in options.case:
                rows.append(measure(kind, Path(folder), options.repetitions, options.images or kind.images))
    cases.report("preprocess", rows, options, ["open_clip_torch", "torchvision", "pillow", "simplejpeg", "isal"])


if __name__ == "__main__":
    main()
