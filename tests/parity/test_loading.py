"""Files as the peers write them themselves, through ``chiasm.load``: same embeddings as the peers' own loaders give."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chiasm.load import load

pytestmark = pytest.mark.peer

TEXTS = ["a chest radiograph", "small left pleural effusion, no pneumothorax", "x"]
#: Against float16 weights that the peer keeps in float16 nothing is lost: both compute in float32 on a CPU.
TIGHT, WITH_BATCH_NORM = 1e-5, 1e-4


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("logit_scale") or not tensor.is_floating_point() or "mask" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(name.endswith("weight") + 0.2 * noise)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs.float()).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_genuine_openai_archive(tmp_path: Path, kind: str) -> None:
    """Made with OpenAI's own code as its published files were: mixed precision, traced, three scalars registered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's own imports
        import clip
        from clip.model import CLIP, convert_weights

    vision = {"vision_layers": 2, "vision_width": 128, "vision_patch_size": 16}
    if kind == "resnet":
        vision = {"vision_layers": (1, 1, 2, 1), "vision_width": 32, "vision_patch_size": None}
    model = CLIP(
        embed_dim=64, image_resolution=64, **vision, context_length=77, vocab_size=49408, transformer_width=128,
        transformer_heads=2, transformer_layers=2,
    )  # fmt: skip
    randomise(model)
    convert_weights(model)
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        delattr(model, name) if hasattr(model, name) else None
        model.register_buffer(name, torch.tensor(value))
    model.eval()
    pixels, ids = torch.randn(2, 3, 64, 64), clip.tokenize(TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = {"forward": (pixels.half(), ids), "encode_image": pixels.half(), "encode_text": ids}
        torch.jit.save(torch.jit.trace_module(model, inputs), str(tmp_path / "ViT-tiny.pt"))
        peer, peer_transform = clip.load(str(tmp_path / "ViT-tiny.pt"), device="cpu")
    ours = load(tmp_path / "ViT-tiny.pt")
    tolerance = WITH_BATCH_NORM if kind == "resnet" else TIGHT
    with torch.inference_mode():
        assert error(ours.encode_image(pixels), peer.encode_image(pixels)) <= tolerance
        assert error(ours.encode_text(TEXTS), peer.encode_text(ids)) <= TIGHT
    assert ours.logit_scale == pytest.approx(float(peer.logit_scale.detach().exp()))
    assert ours.preprocess_spec.size == 64
    assert peer_transform.transforms[0].size == 64


@pytest.mark.parametrize("quick", [False, True])
def test_an_open_clip_hub_folder(tmp_path: Path, quick: bool) -> None:
    import open_clip

    config = {
        "embed_dim": 48,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
    }
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    model = open_clip.CLIP(**config).eval()
    randomise(model)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": stated}))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    peer.eval()
    ours = load(tmp_path)
    from chiasm.testing import make_test_images

    images = make_test_images(3)
    ours_pixels = torch.stack([ours.preprocess(i) for i in images])
    theirs_pixels = torch.stack([transform(i) for i in images])
    assert torch.equal(ours_pixels, theirs_pixels)
    with torch.inference_mode():
        assert error(ours.encode_image(ours_pixels), peer.encode_image(theirs_pixels)) <= TIGHT
        assert error(ours.encode_text(TEXTS), peer.encode_text(open_clip.tokenize(TEXTS))) <= TIGHT


def test_an_open_clip_training_checkpoint(tmp_path: Path) -> None:
    import open_clip

    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=48, vision_cfg=vision, text_cfg=text).eval()
    randomise(model)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    ours = load(tmp_path / "epoch_3.pt", family="open_clip")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert error(ours.encode_image(pixels), model.encode_image(pixels)) <= TIGHT
        wrong = load(tmp_path / "epoch_3.pt", family="openai").encode_image(pixels)
        assert error(wrong, model.encode_image(pixels)) > TIGHT * 10
