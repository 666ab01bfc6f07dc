"""How fast is CLIP's ResNet-50 in mixed bfloat16 beside open_clip's in float32, with the same weights?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/resnet.py --json

Eight images, ``encoder.encode_image``. Random weights as open_clip draws them (the last batch norm of each block starts
at zero, so blocks are identities) flatter both speed of convergence and error; the row's bound was promised for them.
``details`` holds the same errors for livelier weights, batch norms set to the statistics of images and the last ones
open, which say more: there the error of open_clip in pure bfloat16 stands beside ours.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import cases
import timing

timing.wait_passively()

import open_clip  # noqa: E402 (after wait_passively)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from chiasm.encoders.base import Encoder  # noqa: E402
from chiasm.encoders.build import build_encoder_model  # noqa: E402
from chiasm.encoders.models.openai import ARCHITECTURES  # noqa: E402

BATCH = 8
PEER = "open_clip_torch fp32"
PURE = "open_clip_torch pure bf16, channels last"
LAST = "open_clip_torch fp32, channels last"


def images(count: int, seed: int) -> Tensor:
    """Images with structure at every scale, as photographs have it, of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(count, 3, side, side, generator=generator) for side in (3, 7, 14, 28, 56, 112, 224)]
    pixels = sum(F.interpolate(layer, (224, 224), mode="bicubic") for layer in layers)
    assert isinstance(pixels, Tensor)
    return pixels / pixels.std((1, 2, 3), keepdim=True)


def enliven(tower: nn.Module, gain: float) -> None:
    """Open the last batch norm of every block and set all statistics to those of images."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if name.endswith("bn3") and "layer" in name:
                nn.init.constant_(module.weight, gain)
            module.train()
            module.momentum = None
            module.reset_running_stats()
    tower(images(16, 2))
    tower.eval()


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """1 - the smallest cosine, plain and with the mean embedding taken away, and the largest relative difference."""
    found, truth = found.double(), truth.double()
    mean = truth.mean(0)
    return {
        "cos": 1 - float(F.cosine_similarity(found, truth).min()),
        "centred": 1 - float(F.cosine_similarity(found - mean, truth - mean).min()),
        "max": float((found - truth).abs().max() / truth.abs().max()),
    }


def ours(peer: nn.Module, precision: str) -> Encoder:
    """Our encoder with open_clip's weights."""
    config = replace(ARCHITECTURES["RN50"], sides="image")
    model = build_encoder_model(config, seed=0).eval()
    model.load_state_dict({f"visual.{k}": v for k, v in peer.state_dict().items()}, strict=True)
    return Encoder(model, config, name="random-RN50", precision=precision).prepare()


def pure_bf16(peer: nn.Module) -> nn.Module:
    return copy.deepcopy(peer).to(torch.bfloat16, memory_format=torch.channels_last)


def measure(options: argparse.Namespace) -> cases.Case:
    torch.manual_seed(0)
    peer: nn.Module = open_clip.create_model("RN50", pretrained=None).visual.eval()
    mixed, plain, pure = ours(peer, "bf16"), ours(peer, "fp32"), pure_bf16(peer)
    last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    pixels = images(BATCH, 1)
    swapped = pixels.contiguous(memory_format=torch.channels_last)
    timings = timing.interleave(
        {
            PEER: lambda: peer(pixels),
            LAST: lambda: last(swapped),
            PURE: lambda: pure(swapped.bfloat16()),
            "fp32 folded": lambda: plain.encode_image(pixels),
            "chiasm": lambda: mixed.encode_image(pixels),
        },
        options.repetitions,
    )
    truth = peer(pixels)
    found = errors(mixed.encode_image(pixels), truth)
    details: dict[str, object] = {
        "centred_error": found["centred"],
        "peer_pure_bf16": errors(pure(swapped.bfloat16()).float(), truth),
        "fp32_folded_max_error": errors(plain.encode_image(pixels), truth)["max"],
        "fp32_folded_ratio_cpu": timing.ratio(timings[PEER], timings["fp32 folded"])["cpu"],
    }
    enliven(peer, 0.2)
    truth = peer(pixels)
    details["lively_weights"] = {
        "bf16": errors(ours(peer, "bf16").encode_image(pixels), truth),
        "fp32": errors(ours(peer, "fp32").encode_image(pixels), truth),
        PURE: errors(pure_bf16(peer)(swapped.bfloat16()).float(), truth),
    }
    return cases.compare(
        "rn50_bf16_b8", PEER, timings, error=found["cos"], error_kind="1 - min cos", error_bound=1e-5,
        rivals={PURE: None, LAST: None}, details=details,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    options = parser.parse_args()
    with torch.inference_mode():
        found = [measure(options)] if not options.case or "rn50_bf16_b8" in options.case else []
    cases.report("resnet", found, options, ["open_clip_torch"])


if __name__ == "__main__":
    main()
