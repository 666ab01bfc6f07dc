"""From a folder of JPEGs to embeddings on disk, each side in a fresh process as its users start it.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/embed_folder.py --json
    ... --images 200 --repetitions 3                     a look at it
    ... --case embed_folder embed_folder_fp32            chiasm in float32 too

Ours is the command ``chiasm embed FOLDER`` with nothing but model and output named, so the precision is what it chooses
on this machine (the row tells it), and the vectors lie in a store that survives a kill. The peer is the loop of
clip-retrieval with open_clip in float32: a ``DataLoader`` with two worker processes, batches of 32, vectors to ``.npy``
and paths to Parquet; the rival is the same loop in pure bfloat16. Start-up, loading the model and writing count on all
sides; CPU time is that of the process and of its workers. ViT-B/32 with the same random weights, 2,000 pictures of
640 x 480 with structure of several scales, quality 90, in the file cache. A round of 2,000 takes minutes, so three
repetitions are enough; the round that is not counted embeds 64.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import cases
import timing

OURS = "from chiasm.cli.main import main; main()"
#: The loop of clip-retrieval's mapper and writer, without its services.
PEER = """
import sys
from pathlib import Path
import numpy as np, open_clip, pandas, torch
from PIL import Image

class Folder(torch.utils.data.Dataset):
    def __init__(self, folder, transform):
        self.paths, self.transform = sorted(Path(folder).iterdir()), transform
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        return {"image": self.transform(Image.open(self.paths[i])), "path": str(self.paths[i])}

if __name__ == "__main__":
    folder, weights, out, precision = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=weights, precision=precision)
    model.eval()
    loader = torch.utils.data.DataLoader(Folder(folder, transform), batch_size=32, num_workers=2)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    vectors, paths = [], []
    with torch.inference_mode():
        for batch in loader:
            features = model.encode_image(batch["image"].to(dtype)).float()
            features /= features.norm(dim=-1, keepdim=True)
            vectors.append(features.numpy())
            paths.extend(batch["path"])
    for name in ("img_emb", "metadata"):
        (out / name).mkdir(parents=True)
    np.save(out / "img_emb" / "img_emb_0.npy", np.concatenate(vectors))
    pandas.DataFrame({"image_path": paths}).to_parquet(out / "metadata" / "metadata_0.parquet")
"""
PEER_NAME, RIVAL = "open_clip_torch fp32, DataLoader", "open_clip_torch pure bf16, DataLoader"
OURS_NAMES = {"embed_folder": "chiasm", "embed_folder_fp32": "chiasm fp32"}
WARM_UP = 64


def make_model(folder: Path) -> tuple[Path, Path]:
    """Write the same random ViT-B/32 as a chiasm model folder and as a file for open_clip."""
    import torch
    from safetensors.torch import save_file

    from chiasm.encoders.base import Encoder
    from chiasm.load import create_model_and_transforms, save_encoder

    torch.manual_seed(0)
    model, _, _ = create_model_and_transforms("ViT-B-32")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attn.in_proj_weight", "mlp.c_fc.weight")):
                weight.mul_(1.5)
    save_encoder(Encoder(model, model.config, name="random-ViT-B-32"), folder / "model")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder / "model", folder / "open_clip_model.safetensors"


def make_images(folder: Path, n: int) -> Path:
    """Write ``n`` different pictures of 640 x 480: windows of forty larger ones, each with its own light."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    grounds = []
    for _ in range(min(40, n)):
        ground = Image.new("RGB", (960, 720), (128, 128, 128))
        for k, cells in enumerate((4, 15, 60, 240)):
            coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            ground = Image.blend(ground, coarse.resize(ground.size, Image.Resampling.BICUBIC), 1 / (k + 1.5))
        grounds.append(ground)
    folder.mkdir()
    for i in range(n):
        left, top = int(draw.integers(0, 320)), int(draw.integers(0, 240))
        window = grounds[i % len(grounds)].crop((left, top, left + 640, top + 480))
        gain = draw.uniform(0.6, 1.2)
        window.point(lambda v, gain=gain: int(min(255, v * gain))).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def run(arguments: Sequence[str | Path]) -> tuple[float, float]:
    """Run a fresh Python process to its end; return CPU seconds (its own and its workers') and wall seconds."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env={**os.environ, **timing.PASSIVE}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"a candidate failed:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def commands(names: Sequence[str], images: Path, model: tuple[Path, Path], out: Path) -> dict[str, list[str | Path]]:
    """Return what each candidate runs; each writes into ``out / its name``."""
    script = out.parent / "peer.py"
    script.write_text(PEER)
    ours: list[str | Path] = ["-c", OURS, "embed", images, "--model", model[0], "--modality", "image", "--out"]
    every: dict[str, list[str | Path]] = {
        "chiasm": [*ours, out / "chiasm"],
        "chiasm fp32": [*ours, out / "chiasm fp32", "--precision", "fp32"],
        PEER_NAME: [script, images, model[1], out / PEER_NAME, "fp32"],
        RIVAL: [script, images, model[1], out / RIVAL, "pure_bf16"],
    }
    return {name: every[name] for name in names}


def measure(candidates: Mapping[str, Sequence[str | Path]], repetitions: int, out: Path) -> dict[str, timing.Timing]:
    """Run every candidate once in turn, ``repetitions`` times; the results of the last round stay in ``out``."""
    timings = {name: timing.Timing() for name in candidates}
    for _ in range(repetitions):
        for name, arguments in candidates.items():
            shutil.rmtree(out / name, ignore_errors=True)
            cpu, wall = run(arguments)
            timings[name].cpu_s.append(cpu)
            timings[name].wall_s.append(wall)
    return timings


def furthest_cosine(store: Path, peer: Path) -> tuple[float, str]:
    """Return 1 - the smallest cosine between our vector and the peer's of the same file, and our precision."""
    import numpy as np
    import pandas

    from chiasm.io.store import open_store

    opened = open_store(store)
    ours, precision = opened.read("image", columns=["path"]), opened.metadata.precision
    theirs = np.load(peer / "img_emb" / "img_emb_0.npy").astype(np.float64)
    names = [Path(p).name for p in pandas.read_parquet(peer / "metadata" / "metadata_0.parquet")["image_path"]]
    place = {Path(p or "").name: i for i, p in enumerate(ours.paths or ())}
    if sorted(place) != sorted(names):
        raise RuntimeError("the two sides embedded different files")
    mine = ours.vectors[[place[n] for n in names]].astype(np.float64)
    cosines = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    return float(1 - cosines.min()), precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.set_defaults(repetitions=3)
    parser.add_argument("--images", type=int, default=2000, help="JPEGs in the folder")
    options = parser.parse_args()
    timing.wait_passively()
    rows = [name for name in OURS_NAMES if name in (options.case or ["embed_folder"])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out, model = folder / "out", make_model(folder)
        images, few = make_images(folder / "images", options.images), make_images(folder / "few", WARM_UP)
        names = [*(OURS_NAMES[row] for row in rows), PEER_NAME, RIVAL]
        measure(commands(names, few, model, out), 1, out)
        timings = measure(commands(names, images, model, out), options.repetitions, out)
        found = []
        for row in rows:
            error, precision = furthest_cosine(out / OURS_NAMES[row], out / PEER_NAME)
            per_second = [round(options.images / min(t.wall_s), 1) for t in timings.values()]
            details = {
                "images": options.images, "precision": precision, "images_per_second": dict(zip(timings, per_second, strict=True))
            }  # fmt: skip
            found.append(
                cases.compare(
                    row, PEER_NAME, timings, ours=OURS_NAMES[row], error=error, error_kind="1 - min cosine",
                    error_bound=1e-4, rivals={RIVAL: None}, details=details,
                )
            )  # fmt: skip
    cases.report("embed_folder", found, options, ["open_clip_torch", "pillow", "lancedb"])


if __name__ == "__main__":
    main()
