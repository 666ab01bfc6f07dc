"""How fast, how small and how exact are the contrastive losses beside open_clip's and beside one logit matrix?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/loss.py           the rows of the speed table
    PYTHONPATH=src .venv-peers/bin/python benchmarks/loss.py --all     N = 1024 ... 16384, SigLIP and several positives
                                                                       too; keeps results/loss.json
    ... --all --quick                     N = 256 and 1024, half a minute; keeps nothing
    ... --tiles 64 128 256 512 --sizes 4096     compares tile sizes

Forward and backward, float32, D = 512, logit scale 14.28. The peer is open_clip's loss (with ``--all`` its formula written
out where it cannot be imported: two logit matrices, cross-entropy); "one matrix" is the formula of transformers. Ratios
are peer ÷ ours. ``loss_memory_16k`` is the ratio of the peaks of one step in fresh processes. The error is that of the
gradient against float64, at the scale of the row and at 100, divided by the peer's own: 1 means no worse than it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import cases  # noqa: E402 (after wait_passively)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from chiasm.losses.contrastive import info_nce, multi_positive_info_nce, siglip  # noqa: E402

try:
    from open_clip.loss import ClipLoss, SigLipLoss
except ImportError:
    ClipLoss = SigLipLoss = None

DIM = 512
SCALE = 14.28
SIZES = (1024, 2048, 4096, 8192, 16384)
QUICK_SIZES = (256, 1024)
RESULT = Path(__file__).parent / "results" / "loss.json"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def peer_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    if ClipLoss is not None:
        return ClipLoss()(image, text, scale)
    labels = torch.arange(len(image))
    by_image, by_text = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


def one_matrix(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """transformers 5.23, modeling_clip.py, clip_loss."""
    logits, labels = text @ image.T * scale, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def peer_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    bias = torch.tensor(-10.0)
    if SigLipLoss is not None:
        return SigLipLoss()(image, text, scale, bias)
    labels = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def keys_of(n: int) -> Tensor:
    """A quarter as many captions as pairs, as in reports with stock phrases."""
    return torch.randint(0, n // 4, (n,), generator=torch.Generator().manual_seed(1))


def dense_soft(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Several positives as users write them: one matrix of logits, one of probabilities."""
    keys = keys_of(len(image))
    targets = (keys.unsqueeze(1) == keys).to(image.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


#: family -> name -> loss; the first of a family is the base of its ratios, the last is what users get.
FAMILIES: dict[str, dict[str, Loss]] = {
    "info_nce": {
        "open_clip": peer_info_nce,
        "one matrix": one_matrix,
        "ours kept": lambda i, t, s: info_nce(i, t, s, tile=None),
        "ours tiled": lambda i, t, s: info_nce(i, t, s, tile=256),
        "ours auto": info_nce,
    },
    "siglip": {"open_clip": peer_siglip, "ours auto": lambda i, t, s: siglip(i, t, s, -10.0)},
    "several positives": {
        "dense": dense_soft,
        "ours auto": lambda i, t, s: multi_positive_info_nce(i, t, s, keys_of(len(i))),
    },
}


def make_pairs(n: int, dim: int, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """Unrelated pairs, or texts that are their image plus ``noise``."""
    random = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, dim, generator=random), dim=1)
    text = torch.randn(n, dim, generator=random)
    if noise is not None:
        text = image + noise * text / math.sqrt(dim)
    return image, F.normalize(text, dim=1)


def step(loss: Loss, image: Tensor, text: Tensor, scale: float = SCALE) -> list[Tensor]:
    """One forward and backward; returns both gradients."""
    inputs = image.detach().requires_grad_(), text.detach().requires_grad_()
    loss(*inputs, torch.tensor(scale, dtype=image.dtype, requires_grad=True)).backward()
    return [x.grad for x in inputs if x.grad is not None]


def error(loss: Loss, exact: Loss, image: Tensor, text: Tensor, scale: float = SCALE) -> float:
    """Relative error of the features' gradient against float64."""
    truth = torch.cat(step(exact, image.double(), text.double(), scale))
    return float((torch.cat(step(loss, image, text, scale)).double() - truth).norm() / truth.norm())


def time_family(family: str, n: int, repetitions: int) -> list[dict[str, object]]:
    losses = dict(FAMILIES[family])
    if n > 8192:
        losses = {name: loss for name, loss in losses.items() if name not in ("ours kept", "ours tiled")}
    image, text = make_pairs(n, DIM)
    timings = timing.interleave(
        {name: lambda loss=loss: step(loss, image, text) for name, loss in losses.items()},
        repetitions,
        loops=max(1, 512 // n),
    )
    names = list(losses)
    rows: list[dict[str, object]] = []
    for name in names:
        found = timing.ratio(timings[names[0]], timings[name])
        second = timing.ratio(timings[names[1]], timings[name])["cpu"] if family == "info_nce" else None
        wrong = error(losses[name], FAMILIES[family]["ours auto"], image, text) if n <= 4096 else None
        rows.append(
            {"loss": family, "N": n, "who": name}
            | {f"{k} x" if k in ("cpu", "wall", "best_cpu") else k: v for k, v in found.items()}
            | {"cpu x one matrix": second, "gradient error": wrong}
        )
    return rows


def exactness(scales: tuple[float, ...] = (14.28, 30.0, 50.0, 100.0)) -> list[dict[str, object]]:
    """Gradient errors where the truth is hard to hit: the log-space form in float64 is the reference."""
    rows: list[dict[str, object]] = []
    for kind, noise in (("random pairs", None), ("nearly solved", 0.5)):
        image, text = make_pairs(512, 512, noise)
        for scale in scales:
            rows.append({"batch": kind, "scale": scale} | {
                name: error(loss, info_nce, image, text, scale) for name, loss in FAMILIES["info_nce"].items()
            })  # fmt: skip
    return rows


def memory_of(family: str, n: int) -> list[dict[str, object]]:
    """Peak of one step in a fresh process each."""
    names = [name for name in FAMILIES[family] if name != "ours tiled"]
    peaks = {name: timing.run_fresh([__file__, "--memory", family, name, str(n)]).output for name in names}
    base = peaks[names[0]]
    return [
        {"loss": family, "N": n, "who": name, "peak extra MiB": peak, "base / this": round(base / max(peak, 0.1), 1)}
        for name, peak in peaks.items()
    ]


def measure_memory(family: str, name: str, n: int) -> float:
    """The child's part of :func:`memory_of`."""
    loss = FAMILIES[family][name]
    small, large = make_pairs(64, DIM), make_pairs(n, DIM)
    return timing.peak_extra_mb(lambda: step(loss, *large), lambda: step(loss, *small))


PEER = "open_clip_torch ClipLoss"
RIVAL = "transformers clip_loss, one logit matrix"
#: Pairs of the gradient check: enough for the tiled form.
CHECKED = 2304
#: Both errors are a rounding of float32 at the larger scale, so a tenth is no difference.
NO_WORSE = 1.1


def relative_error(n: int) -> tuple[float, dict[str, float]]:
    """Return our gradient's error ÷ the peer's, the worse of two scales, and the errors themselves."""
    image, text = make_pairs(n, DIM)
    losses = {"chiasm": info_nce, "peer": peer_info_nce}
    found = {
        f"{name} at {scale:g}": error(loss, info_nce, image, text, scale)
        for scale in (SCALE, 100.0) for name, loss in losses.items()
    }  # fmt: skip
    worst = max(found[f"chiasm at {scale:g}"] / found[f"peer at {scale:g}"] for scale in (SCALE, 100.0))
    return round(worst, 4), found


def time_row(name: str, n: int, repetitions: int) -> cases.Case:
    pairs = make_pairs(n, DIM)
    losses = {PEER: peer_info_nce, RIVAL: one_matrix, "chiasm": info_nce}
    timings = timing.interleave({k: lambda loss=loss: step(loss, *pairs) for k, loss in losses.items()}, repetitions)
    worst, errors = relative_error(CHECKED)
    return cases.compare(
        name, PEER, timings, error=worst, error_kind="gradient error ÷ the peer's", error_bound=NO_WORSE,
        rivals={RIVAL: 1.05 if n <= 4096 else 1.1}, details={"gradient_errors": errors},
    )  # fmt: skip


def memory_row(name: str, n: int) -> cases.Case:
    """Peaks of fresh processes, one call each; both ratios hold the ratio of the peaks."""
    names = {PEER: "open_clip", RIVAL: "one matrix", "chiasm": "ours auto"}
    peaks = {
        k: float(str(timing.run_fresh([__file__, "--memory", "info_nce", v, str(n)]).output)) for k, v in names.items()
    }
    worst, errors = relative_error(CHECKED)
    base, rival = (round(peaks[k] / peaks["chiasm"], 2) for k in (PEER, RIVAL))
    return cases.Case(
        name, base, base, PEER, 1, worst, "gradient error ÷ the peer's", NO_WORSE, (cases.Rival(RIVAL, rival, rival),), None,
        {"peak_extra_mib": peaks, "gradient_errors": errors, "ratio_of": "peak memory"},
    )  # fmt: skip


def table_rows(options: argparse.Namespace) -> None:
    """Measure the rows of the speed table."""
    if ClipLoss is None:
        raise SystemExit("open_clip is not installed; run this with .venv-peers/bin/python (`make peers`)")
    rows = {
        "loss_4k": lambda: time_row("loss_4k", 4096, options.repetitions),
        "loss_8k": lambda: time_row("loss_8k", 8192, options.repetitions),
        "loss_memory_16k": lambda: memory_row("loss_memory_16k", 16384),
    }
    found = [make() for name, make in rows.items() if name in (options.case or rows)]
    cases.report("loss", found, options, ["open_clip_torch", "transformers"])


def compare_tiles(sizes: list[int], tiles: list[int]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in sizes:
        pairs = make_pairs(n, DIM)
        losses: dict[str, Loss] = {str(t): lambda i, x, s, t=t: info_nce(i, x, s, tile=t) for t in tiles}
        found = timing.interleave({k: lambda f=f, pairs=pairs: step(f, *pairs) for k, f in losses.items()}, 5)
        rows += [{"N": n, "tile": k, "cpu x": timing.ratio(found[str(tiles[0])], t)["cpu"]} for k, t in found.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument("--all", action="store_true", help="all families and sizes in place of the rows of the table")
    parser.add_argument("--quick", action="store_true", help="two small sizes, three repetitions, no file")
    parser.add_argument("--sizes", type=int, nargs="+", help="batch sizes instead of the usual ones")
    parser.add_argument("--tiles", type=int, nargs="+", help="only compare these tile sizes")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    parser.add_argument("--memory", nargs=3, metavar=("FAMILY", "WHO", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        family, name, n = options.memory
        print(measure_memory(family, name, int(n)))
        return
    if not (options.all or options.tiles):
        table_rows(options)
        return
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    if options.tiles:
        rows = compare_tiles(list(sizes), options.tiles)
        timing.print_table("tile sizes, forward + backward, ratio to the first", rows)
        timing.finish({"tiles": rows}, None)
        return
    machine = timing.describe_machine(["chiasm", "torch", "open_clip_torch"])
    machine["threads"] = torch.get_num_threads()
    machine["peer"] = "open_clip" if ClipLoss is not None else "open_clip's formula"
    times: list[dict[str, object]] = []
    memory: list[dict[str, object]] = []
    title = f"forward + backward, float32, D = {DIM}, {machine['threads']} threads, peer: {machine['peer']}"
    for n in sizes:
        repetitions = 3 if options.quick or n > 8192 else 5 if n > 2048 else 9
        families = [f for f in FAMILIES if f == "info_nce" or n <= 8192]
        rows = [row for family in families for row in time_family(family, n, repetitions)]
        timing.print_table(f"time: {title}", rows)
        times += rows
        if n >= 4096:
            rows = [row for family in families for row in memory_of(family, n)]
            timing.print_table("peak extra memory of one step, fresh processes", rows)
            memory += rows
    errors = exactness((14.28, 100.0) if options.quick else (14.28, 30.0, 50.0, 100.0))
    timing.print_table("gradient error against float64, N = 512", errors)
    result = {"question": "loss", "machine": machine, "time": times, "memory": memory, "gradient_error": errors}
    timing.finish(result, None if options.quick or options.sizes else RESULT)


if __name__ == "__main__":
    main()
