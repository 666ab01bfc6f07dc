"""How fast is the exact pairing of images with reports, and how much memory does it take?

    python benchmarks/pairing.py           100,000 images × 10,000 reports; keeps benchmarks/results/pairing.json
    python benchmarks/pairing.py --quick   4,000 × 2,000; keeps nothing
    python benchmarks/pairing.py --json    one JSON line per case on standard output

Random unit vectors, 512 dimensions, best report of every image. Peers: the reference's loop, which takes one image at a
time, multiplies it with all reports, sums, and asks for the maximum and for its place; the same loop with a matrix
product instead (a kinder reading of it); and faiss's flat index, the usual exact search. Loops are run on a sample of the
images that the output states, ours on the same sample for the ratio and on all images besides; nothing is extrapolated.
The ratio is of CPU time (all threads), with wall time beside it.
Agreement with the best report in float64 stands beside each time. faiss lives in the second environment (`make peers`):
PYTHONPATH=src .venv-peers/bin/python benchmarks/pairing.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import numpy as np  # noqa: E402 (after wait_passively)
import torch  # noqa: E402

from chiasm.pairing import fastest_product  # noqa: E402
from chiasm.tasks.pairing import pair  # noqa: E402
from chiasm.types import Embeddings, Space  # noqa: E402

try:
    import faiss
except ImportError:
    faiss = None

DIM = 512
FLOOR = 50.0
RESULT = Path(__file__).parent / "results" / "pairing.json"
SPACE = Space("random", "0" * 12, "0" * 12, DIM)
Best = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_units(n: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def ours(images: np.ndarray, reports: np.ndarray, **options: object) -> np.ndarray:
    def embeddings(rows: np.ndarray, modality: str) -> Embeddings:
        return Embeddings(rows, tuple(map(str, range(len(rows)))), SPACE, modality)  # type: ignore[arg-type]

    options = {"product": fastest_product()} | options
    found = pair(embeddings(images, "image"), embeddings(reports, "text"), report_of=np.arange(len(reports)), **options)
    return found.report_rows[:, 0]


def reference_loop(images: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """The similarity of CLIP-IT's map.py for each image: product with all reports, sum, maximum, place of it."""
    index, texts = [], torch.from_numpy(reports)
    for image in torch.from_numpy(images):
        similarity = (image[None] * texts).sum(dim=1)
        similarity.max().item()
        index.append(similarity.argmax().item())
    return np.asarray(index)


def product_loop(images: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """One image at a time, but as a product of a vector and a matrix."""
    index, texts = [], torch.from_numpy(reports)
    for image in torch.from_numpy(images):
        value, place = (texts @ image).max(dim=0)
        value.item()
        index.append(place.item())
    return np.asarray(index)


def faiss_flat(images: np.ndarray, reports: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatIP(DIM)
    index.add(reports)
    return index.search(images, 1)[1][:, 0]


def truth(images: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """The best report in float64."""
    wide = reports.astype(np.float64).T
    parts = [images[i : i + 512].astype(np.float64) @ wide for i in range(0, len(images), 512)]
    return np.concatenate([p.argmax(axis=1) for p in parts])


def compare(name: str, peer: Best, images: np.ndarray, reports: np.ndarray, repetitions: int) -> dict[str, object]:
    answers: dict[str, np.ndarray] = {}

    def keep(who: str, best: Best) -> None:
        answers[who] = best(images, reports)

    found = timing.interleave(
        {name: lambda: keep(name, peer), "ours": lambda: keep("ours", ours)}, repetitions
    )  # fmt: skip
    ratio = timing.ratio(found[name], found["ours"])
    exact = truth(images, reports)
    return {
        "case": name,
        "images timed": len(images),
        "reports": len(reports),
        "peer cpu ms/image": round(1e3 * statistics.median(found[name].cpu_s) / len(images), 4),
        "ours cpu ms/image": round(1e3 * statistics.median(found["ours"].cpu_s) / len(images), 4),
        "cpu x": ratio["cpu"],
        "wall x": ratio["wall"],
        "peer cpu/wall": round(found[name].cpu_per_wall, 2),
        "ours cpu/wall": ratio["cpu_per_wall"],
        "repetitions": repetitions,
        "peer agrees": round(float((answers[name] == exact).mean()), 6),
        "ours agrees": round(float((answers["ours"] == exact).mean()), 6),
    }


def whole(images: np.ndarray, reports: np.ndarray, **options: object) -> dict[str, object]:
    """One run on everything, not warmed up."""
    wall, cpu = time.perf_counter(), time.process_time()
    ours(images, reports, **options)
    return {
        "case": "ours, all images" + "".join(f", {k}={v}" for k, v in options.items()),
        "images": len(images),
        "reports": len(reports),
        "wall s": round(time.perf_counter() - wall, 2),
        "cpu s": round(time.process_time() - cpu, 2),
    }


def memory_of(n: int, m: int) -> list[dict[str, object]]:
    """Peak of one call above images and reports, in fresh processes; all similarities at once beside it."""
    rows: list[dict[str, object]] = []
    for images in (n // 4, n):
        peak = timing.run_fresh([__file__, "--memory", str(images), str(m)]).output
        dense = round(images * m * 4 / 2**20)
        rows.append(
            {"case": "memory", "images": images, "reports": m, "peak extra MiB": peak, "all at once MiB": dense}
        )
    return rows


def measure_memory(n: int, m: int) -> float:
    images, reports = make_units(n, 0), make_units(m, 1)
    return timing.peak_extra_mb(lambda: ours(images, reports), lambda: ours(images[:64], reports[:64]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, no file")
    parser.add_argument("--json", action="store_true", help="one JSON line per case instead of one for all")
    parser.add_argument("--images", type=int, help="instead of 100,000")
    parser.add_argument("--reports", type=int, help="instead of 10,000")
    parser.add_argument("--sample", type=int, help="images that the loops are run on")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch and faiss (default: their own choice)")
    parser.add_argument("--memory", nargs=2, type=int, metavar=("IMAGES", "REPORTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        if faiss is not None:
            faiss.omp_set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(*options.memory))
        return
    n, m, sample = (4_000, 2_000, 400) if options.quick else (100_000, 10_000, 5_000)
    n, m, sample = options.images or n, options.reports or m, options.sample or sample
    machine = timing.describe_machine(["chiasm", "numpy", "torch", "faiss-cpu"])
    machine["threads"] = torch.get_num_threads()
    images, reports = make_units(n, 0), make_units(m, 1)
    part = images[: min(sample, n)]
    rows = [
        compare("reference loop", reference_loop, part, reports, 3),
        compare("loop of products", product_loop, part, reports, 3),
    ]
    if faiss is not None:
        rows.append(compare("faiss flat", faiss_flat, images[: 5 * len(part)], reports, 3))
    timing.print_table("best report of each image; ratios are peer ÷ ours on the same images", rows)
    full = [whole(images, reports)]
    if not options.quick:
        full += [whole(images, reports, k=5), whole(images, reports, correction="csls")]
    timing.print_table("all images", full)
    memory = memory_of(n, m)
    timing.print_table("peak extra memory, fresh processes", memory)
    reached = float(str(rows[0]["cpu x"]))
    result = {
        "question": "pairing",
        "machine": machine,
        "dim": DIM,
        "compare": rows,
        "whole": full,
        "memory": memory,
        "floor": {
            "reference loop, cpu x": FLOOR,
            "wall x": rows[0]["wall x"],
            "reached": reached,
            "met": reached >= FLOOR,
        },
    }
    if options.json:
        for row in [*rows, *full, *memory]:
            print(json.dumps(row))
    kept = options.quick or options.images or options.reports or options.sample
    timing.finish(result, None if kept else RESULT)


if __name__ == "__main__":
    main()
