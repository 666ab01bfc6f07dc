"""What does an epoch of distillation cost with cached features, and what with features computed again each time?

    python benchmarks/distill.py            a small ViT and a ViT-S/16 at 224; keeps benchmarks/results/distill.json
    python benchmarks/distill.py --quick    the small ViT alone; keeps nothing
    python benchmarks/distill.py --json     the same, and one line of JSON per case instead of one for all

One epoch of the fuse stage (forward, backward, Adam) of the heads of CLIP-IT with a text embedding of 512 dimensions, two
classes, batches of 64 (16 for the larger tower, which makes "cached" look slower than it is). "recomputed" is what the published code does: the locked tower runs on every image in every
epoch (its text tower, which it runs as well, is left out here, and so is reading and augmenting images). "adapters" trains
low-rank updates of the tower, for which nothing can be cached. Ratios are to "recomputed", bigger is faster; "epochs to
pay" is after how many epochs computing the features once has paid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import numpy as np  # noqa: E402 (after wait_passively)
import torch  # noqa: E402
from torch import nn  # noqa: E402

from chiasm.distill.problem import Problem, Rows  # noqa: E402
from chiasm.distill.recipe import FuseConfig  # noqa: E402
from chiasm.distill.schedule import Plan  # noqa: E402
from chiasm.distill.student import Inputs, Student, all_features, make_heads  # noqa: E402
from chiasm.distill.targets import make_targets  # noqa: E402
from chiasm.distill.tasks import DistillTask  # noqa: E402
from chiasm.distill.trainer import StageTrainer  # noqa: E402
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, LoraConfig  # noqa: E402
from chiasm.encoders.heads import HeadsConfig  # noqa: E402
from chiasm.encoders.image_side import build_backbone  # noqa: E402
from chiasm.types import Preprocess  # noqa: E402

RESULT = Path(__file__).parent / "results" / "distill.json"
TEXT_DIM, CLASSES, BATCH = 512, 2, 64
#: name -> tower, images, repetitions.
CASES = {
    "small ViT, 64 px": (ImageTowerConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4), 512, 5),
    "ViT-S/16, 224 px": (ImageTowerConfig(image_size=224, patch_size=16, width=384, layers=12, heads=6), 16, 3),
}


def draw_problem(images: int, size: int) -> Problem:
    """Random images with labels; nothing held out, so that an epoch is training alone."""
    rng = np.random.default_rng(0)
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))

    def take(rows: np.ndarray, _: np.random.Generator | None) -> torch.Tensor:
        return pixels[torch.from_numpy(rows)]

    ids = tuple(f"image-{i}" for i in range(images))
    train = Rows(ids, ids, rng.integers(CLASSES, size=images), pixels=take)
    none = Rows((), (), np.zeros(0, dtype=np.int64))
    return Problem(("a", "b"), train, none, none, digest="benchmark")


def epoch_of(student: Student, problem: Problem, *, pixels: bool) -> Callable[[], object]:
    """Return a call that trains one epoch; the student's weights move on from call to call."""
    rng = np.random.default_rng(1)
    targets = make_targets(rng.standard_normal((len(problem.train), TEXT_DIM)), np.zeros((0, TEXT_DIM)))
    config = FuseConfig(epochs=1, batch_size=BATCH, monitor="none", eval_every=10**9)
    plan = Plan.of(config, len(problem.train))
    task = DistillTask(student, problem, targets, config, steps=plan.steps, pixels=pixels)
    return lambda: StageTrainer(task, config, plan, seed=0).run()


def time_case(name: str) -> list[dict[str, object]]:
    """Measure one tower."""
    image, images, repetitions = CASES[name]
    declared = EncoderConfig(image=image, preprocess=Preprocess(size=image.image_size), sides="image")
    tower: nn.Module = build_backbone(declared, projected=False, seed=0)
    problem = draw_problem(images, image.image_size)
    heads = HeadsConfig(width=image.width, classes=CLASSES, text_dim=TEXT_DIM)
    locked = Student.adapted(make_heads(heads, 0), tower, lora=None, seed=0)
    adapted = Student.adapted(make_heads(heads, 0), tower, lora=LoraConfig(rank=16, alpha=8.0), seed=0)
    inputs = Inputs(problem.train, pixels=True)
    features = all_features(locked, inputs, batch_size=BATCH).numpy()
    rows = Rows(problem.train.ids, problem.train.groups, problem.train.labels, features)
    cached = Problem(problem.classes, rows, problem.validation, problem.test, digest="cached")
    calls: dict[str, Callable[[], object]] = {
        "recomputed": epoch_of(locked, problem, pixels=True),
        "cached": epoch_of(Student(make_heads(heads, 0)), cached, pixels=False),
        "features once": lambda: all_features(locked, inputs, batch_size=BATCH),
        "adapters": epoch_of(adapted, problem, pixels=True),
    }
    timings = timing.interleave(calls, repetitions)

    def cpu(who: str) -> float:
        return float(np.median(timings[who].cpu_s))

    found: list[dict[str, object]] = []
    for who in calls:
        ratio = timing.ratio(timings["recomputed"], timings[who])
        saved = cpu("recomputed") - cpu("cached")
        found.append({
            "case": name, "images": images, "who": who, "cpu ms/image": 1000 * cpu(who) / images,
            "cpu x": ratio["cpu"], "wall x": ratio["wall"], "cpu_per_wall": ratio["cpu_per_wall"],
            "epochs to pay": cpu("features once") / saved if who == "cached" else None,
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small tower alone, no file")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="one line of JSON per case")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = timing.describe_machine(["chiasm", "torch", "peft"])
    machine["threads"] = torch.get_num_threads()
    measured: list[dict[str, object]] = []
    for name in list(CASES)[:1] if options.quick else CASES:
        rows = time_case(name)
        timing.print_table(f"one epoch of the fuse stage, batches of {BATCH}, {machine['threads']} threads", rows)
        measured += rows
        if options.json:
            print(json.dumps({"question": "distill", "case": name, "rows": rows}), flush=True)
    result = {"question": "distill", "machine": machine, "epoch": measured}
    if options.json:
        if not options.quick:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
        return
    timing.finish(result, None if options.quick else RESULT)


if __name__ == "__main__":
    main()
