"""How fast is the image tower, ViT-B/32, beside open_clip's with the same weights?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/image_tower.py --json
    ... --case image_fp32_b8 --compile       with open_clip under torch.compile, frozen, as a rival: half a minute more

Random weights of OpenAI's shape, those into attention and into the MLP times 1.5 so that both matter; random images. Ours
is what users call, ``encoder.encode_image``. Each row holds one precision and one batch; the peer is always open_clip in
float32, as its users call it, and rivals are what a careful user could have at the same precision. Plain cosines between
outputs of a random tower flatter, so the row also says how far off they are once the mean embedding is taken away.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import cases
import timing

timing.wait_passively()

import open_clip  # noqa: E402 (after wait_passively)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from random_model import make_encoder  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from chiasm.encoders.base import Encoder  # noqa: E402

Call = Callable[[Tensor], Tensor]
PEER = "open_clip_torch fp32"
PACKAGES = ["open_clip_torch", "transformers", "onnxruntime"]
#: What the rows of a precision may be off by, and what is measured.
BOUNDS = {
    "fp32": (1e-5, "max difference / max value"),
    "bf16": (1e-4, "1 - min cos"),
    "int8": (5e-4, "1 - min cos"),
}
CENTRED_BOUNDS = {"bf16": 1e-3, "int8": 1e-2}
#: Images of which the errors are told; half of them of a hundredth of the contrast.
CHECKED = 32


def open_clip_tower(encoder: Encoder) -> nn.Module:
    """open_clip's own image tower with the encoder's weights."""
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    state = {k.removeprefix("visual."): v for k, v in encoder.model.state_dict().items() if k.startswith("visual.")}
    model.visual.load_state_dict(state)
    return model.visual


def transformers_tower(encoder: Encoder) -> Call:
    """The CLIP of transformers, SDPA, read from the folder that chiasm writes for it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, projection_dim=512, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=32, hidden_act="quick_gelu", attn_implementation="sdpa",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(_renamed(encoder.model.visual.state_dict(), model.state_dict()))  # type: ignore[union-attr]
    return lambda pixels: model(pixel_values=pixels).image_embeds


def _renamed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a native tower under the names of transformers."""
    at = "vision_model."
    out = {
        f"{at}embeddings.class_embedding": ours["class_embedding"],
        f"{at}embeddings.patch_embedding.weight": ours["conv1.weight"],
        f"{at}embeddings.position_embedding.weight": ours["positional_embedding"],
        "visual_projection.weight": ours["proj"].T,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        out |= {
            f"{at}pre_layrnorm.{kind}": ours[f"ln_pre.{kind}"],
            f"{at}post_layernorm.{kind}": ours[f"ln_post.{kind}"],
        }
        for i in range(12):
            mine, block = f"transformer.resblocks.{i}.", f"{at}encoder.layers.{i}."
            out |= {f"{block}{new}.{kind}": ours[f"{mine}{old}.{kind}"] for old, new in names.items()}
            parts = ours[f"{mine}attn.in_proj_{kind}"].chunk(3)
            out |= {f"{block}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", parts, strict=True)}
    return {k: v for k, v in (theirs | out).items() if k in theirs}


def onnx_tower(encoder: Encoder) -> Call:
    """ONNX Runtime, float32, on the graph of our own tower."""
    import onnxruntime
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        path = Path(folder) / "tower.onnx"
        example, batch = torch.zeros(2, 3, 224, 224), torch.export.Dim("batch")
        torch.onnx.export(
            encoder.model.visual, (example,), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False,
            external_data=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])


def compiled_tower(encoder: Encoder, precision: str) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    tower = open_clip_tower(encoder).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    found = torch.compile(tower, dynamic=False)
    return lambda pixels: found(pixels.to(next(tower.parameters()).dtype)).float()


def images(count: int) -> Tensor:
    """Random images, every second one of little contrast, so that one scale for a whole batch would show."""
    pixels = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    pixels[1::2] *= 0.1
    return pixels


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest difference relative to the largest value, and 1 - the smallest cosine, plain and centred."""
    mean = truth.mean(0)
    found, truth = found.double(), truth.double()
    return {
        "max": float((found - truth).abs().max() / truth.abs().max()),
        "cos": 1 - float(F.cosine_similarity(found, truth).min()),
        "centred": 1 - float(F.cosine_similarity(found - mean, truth - mean).min()),
    }


def measure(name: str, encoder: Encoder, peer: nn.Module, options: argparse.Namespace) -> cases.Case:
    """One row."""
    _, precision, batch_name = name.split("_")
    batch = int(batch_name[1:])
    pixels, some = images(batch), images(CHECKED)
    ours = encoder.with_precision(precision).prepare()
    if precision == "int8":
        ours.check_precision(images(64))  # before the clock runs: the first 64 images are encoded in float32 too
    rivals: dict[str, Call] = {}
    if precision == "bf16":
        half = open_clip_tower(encoder).bfloat16()
        rivals["open_clip_torch pure bf16"] = lambda x: half(x.bfloat16()).float()
    elif batch == 8 and precision == "fp32":
        rivals["transformers fp32 SDPA"] = transformers_tower(encoder)
    elif precision == "int8":
        rivals["chiasm bf16"] = encoder.with_precision("bf16").prepare().encode_image
    if options.onnx and precision != "bf16":
        rivals["onnxruntime fp32, our graph"] = onnx_tower(encoder)
    if options.compile and precision != "int8":
        rivals[f"open_clip_torch {precision} compiled"] = compiled_tower(encoder, precision)
    with torch.inference_mode():
        found = {
            n: torch.cat([call(x) for x in some.split(8)]) for n, call in {"": ours.encode_image, **rivals}.items()
        }
        truth = torch.cat([peer(x) for x in some.split(8)])
        calls: dict[str, Call] = {PEER: peer, "chiasm": ours.encode_image, **rivals}
        timings = timing.interleave(
            {n: lambda call=call: call(pixels) for n, call in calls.items()},
            max(options.repetitions, 7), loops=max(1, 8 // batch),
        )  # fmt: skip
    off = {n: errors(vectors, truth) for n, vectors in found.items()}
    bound, kind = BOUNDS[precision]
    error = off[""]["max" if precision == "fp32" else "cos"]
    if off[""]["centred"] > CENTRED_BOUNDS.get(precision, 1e-6):
        error = max(error, bound * 2)  # the second bound is missed: the row has no speed
    details = {
        "cos_error": off[""]["cos"], "centred_cos_error": off[""]["centred"],
        "rival_errors": {n: off[n] for n in rivals}, "loops": max(1, 8 // batch),
    }  # fmt: skip
    return cases.compare(
        name, PEER, timings, error=error, error_kind=kind, error_bound=bound,
        rivals=dict.fromkeys(rivals), details=details,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument(
        "--compile", action="store_true", help="also open_clip under torch.compile, frozen (slow start)"
    )
    parser.add_argument("--onnx", action="store_true", help="also ONNX Runtime on our graph (half a minute to export)")
    options = parser.parse_args()
    encoder = make_encoder("image")
    peer = open_clip_tower(encoder)
    names = [n for n in cases.SCRIPTS["image_tower"] if not options.case or n in options.case]
    cases.report("image_tower", [measure(n, encoder, peer, options) for n in names], options, PACKAGES)


if __name__ == "__main__":
    main()
