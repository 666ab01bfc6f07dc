"""What does one training step of CLIP cost beside open_clip: forward, contrastive loss and backward?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/train_step.py
    ... --case train_bf16 --repetitions 3 --threads 1
    ... --device cuda --batch 256 --peak-tflops 990     model FLOP utilisation on a GPU

ViT-B/32 (QuickGELU), captions of 20 to 30 tokens padded to 77 as the tokenizers give them, the same random weights on
both sides. Ours is the step of ``chiasm train``: ``ContrastiveTask.backward``, and in ``with_optimizer`` also gradient
clipping and AdamW as ``train.loop`` does them; open_clip's side is what its training script does. The error of fp32 is
the larger one of loss and gradient; that of bf16 is that of the gradient, over all parameters and relative to open_clip's in fp32, and may
not exceed what open_clip's own bf16 has. (The loss of one batch differs by luck in bf16; both are among the details.)
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import timing

timing.wait_passively()

import cases  # noqa: E402 (after wait_passively)
import open_clip  # noqa: E402
import torch  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from chiasm.data.tokens import Tokens  # noqa: E402
from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig  # noqa: E402
from chiasm.encoders.build import build_encoder_model  # noqa: E402
from chiasm.encoders.dual import DualEncoder  # noqa: E402
from chiasm.train.contrastive import ContrastiveTask, Pairs  # noqa: E402
from chiasm.train.distributed import clip_gradients  # noqa: E402
from chiasm.train.machine import prepare_for_training  # noqa: E402
from chiasm.train.optim import make_optimizer  # noqa: E402
from chiasm.train.precision import training_precision  # noqa: E402
from chiasm.train.recipe import OptimConfig, TrainConfig  # noqa: E402

Step = Callable[[], float]
FP32, BF16 = "open_clip_torch fp32", "open_clip_torch bf16 autocast"
#: Relative differences to open_clip in fp32 that rounding explains.
LOSS_BOUND = GRADIENT_BOUND = 1e-5


def make_models(device: str) -> tuple[nn.Module, DualEncoder]:
    """Return open_clip's model and ours with its weights, both in training mode."""
    torch.manual_seed(0)
    peer: nn.Module = open_clip.create_model("ViT-B-32-quickgelu", device=device).train()
    ours = build_encoder_model(
        EncoderConfig(ImageTowerConfig(), TextTowerConfig(), ProjectionConfig(dim=512)), device="cpu", seed=0
    ).to(device)
    ours.load_state_dict(peer.state_dict())
    return peer, prepare_for_training(ours)


def make_batch(n: int, device: str) -> Pairs:
    """Return ``n`` pairs of noise, with captions of 20 to 30 tokens."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 31, (n,), generator=random)
    ids = torch.zeros(n, 77, dtype=torch.long)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[:length] = torch.randint(1, 49406, (length,), generator=random)
        row[0], row[length - 1] = 49406, 49407
    pixels = torch.randn(n, 3, 224, 224, generator=random)
    return Pairs(pixels.to(device), Tokens(ids.to(device), lengths.to(device)), [str(i) for i in range(n)])


def peer_step(model: nn.Module, batch: Pairs, *, bf16: bool, optimizer: torch.optim.Optimizer | None = None) -> Step:
    """One step as open_clip's training script takes it."""
    loss_of, kind = ClipLoss(), batch.pixels.device.type

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext():
            image, text, scale = model(batch.pixels, batch.tokens.ids)[:3]
            loss: Tensor = loss_of(image, text, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return float(loss.detach())

    return step


def our_step(model: DualEncoder, batch: Pairs, *, precision: Any, with_optimizer: bool = False) -> Step:
    """One step as ``chiasm train`` takes it."""
    config = OptimConfig(precision=precision, lr=1e-12)
    task = ContrastiveTask(model, config=TrainConfig(optim=config))
    optimizer = make_optimizer(model, config) if with_optimizer else None

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = task.backward(batch)
        if optimizer is not None:
            clip_gradients([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            task.after_step()
        return loss

    return step


def result_of(model: nn.Module, step: Step) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of one step."""
    loss = step()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, found


def difference(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the relative distance of two sets of gradients."""
    if found.keys() != truth.keys():
        return math.inf
    squares = sum(float((found[n] - truth[n]).double().square().sum()) for n in truth)
    return math.sqrt(squares / sum(float(t.double().square().sum()) for t in truth.values()))


def count_flops(step: Step) -> int:
    """Return floating-point operations of a step, a multiplication and an addition counting as two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(name: str, options: argparse.Namespace) -> cases.Case:
    """Measure one row; the exactness first, since a wrong gradient has no speed."""
    bf16 = name == "train_bf16"
    precision = "bf16" if bf16 else "fp32"
    peer, model = make_models(options.device)
    batch = make_batch(options.batch, options.device)
    true_loss, truth = result_of(peer, peer_step(peer, batch, bf16=False))
    loss, gradient = result_of(model, our_step(model, batch, precision=precision))
    loss_error, distance = abs(loss - true_loss) / abs(true_loss), difference(gradient, truth)
    peers_error, peers_distance = LOSS_BOUND, GRADIENT_BOUND
    if bf16:
        peers_loss, peers_gradient = result_of(peer, peer_step(peer, batch, bf16=True))
        peers_error, peers_distance = abs(peers_loss - true_loss) / abs(true_loss), difference(peers_gradient, truth)
    flops = {"chiasm": count_flops(our_step(model, batch, precision=precision)),
             "open_clip": count_flops(peer_step(peer, batch, bf16=bf16))}  # fmt: skip
    steps = {FP32: peer_step(peer, batch, bf16=False), "chiasm": our_step(model, batch, precision=precision)}
    if bf16:
        steps[BF16] = peer_step(peer, batch, bf16=True)
    calls: dict[str, Callable[[], object]] = {n: synchronised(s, options.device) for n, s in steps.items()}
    timings = timing.interleave(calls, options.repetitions)
    seconds = statistics.median(timings["chiasm"].wall_s)
    rate = flops["chiasm"] / seconds / 1e12
    details: dict[str, object] = {
        "batch": options.batch, "device": options.device, "loss": loss, "loss_fp32": true_loss,
        "loss_difference": loss_error, "loss_bound": peers_error, "gradient_difference": distance,
        "gradient_bound": peers_distance, "flops_per_step": flops, "tflops_achieved": round(rate, 4),
        "model_flop_utilisation": round(rate / options.peak_tflops, 4) if options.peak_tflops else None,
        "auto_trains_in": training_precision("auto", options.device),
    }  # fmt: skip
    if options.with_optimizer:
        peers_optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-12, betas=(0.9, 0.98), eps=1e-6)
        both = timing.interleave(
            {"peer": synchronised(peer_step(peer, batch, bf16=bf16, optimizer=peers_optimizer), options.device),
             "chiasm": synchronised(our_step(model, batch, precision=precision, with_optimizer=True), options.device)},
            max(3, options.repetitions // 2),
        )  # fmt: skip
        details["with_optimizer"] = timing.ratio(both["peer"], both["chiasm"])
    error, bound, kind = max(loss_error, distance), LOSS_BOUND, "relative difference of loss, gradient"
    if bf16:
        error, bound, kind = distance, peers_distance, "relative gradient difference"
    return cases.compare(
        name, BF16 if bf16 else FP32, timings, error=error, error_kind=kind, error_bound=bound,
        rivals={FP32: None} if bf16 else None, details=details,
    )  # fmt: skip


def synchronised(step: Step, device: str) -> Step:
    """Return a step that has ended on the device when it returns."""

    def run() -> float:
        value = step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return value

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the utilisation")
    parser.add_argument("--with-optimizer", action="store_true", help="also clipping and AdamW, as a detail")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    names = [n for n in cases.SCRIPTS["train_step"] if not options.case or n in options.case]
    cases.report("train_step", [measure(n, options) for n in names], options, ["open_clip_torch"])


if __name__ == "__main__":
    main()
