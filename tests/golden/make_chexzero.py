"""Write chexzero.json: embeddings and probabilities of a small CheXzero, by an independent implementation.

Plain functions of torch, Pillow and NumPy, from the specification alone: CheXzero's two resizes, CLIP's two towers with
QuickGELU, and the softmax over a pair of cosines without the logit scale. ``trap`` switches one step to the mistake that
is easily made. Run by `make golden`, never by hand.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

plain = runpy.run_path(str(Path(__file__).with_name("plain_towers.py")))
SEED = 31
SHAPE = {"image_size": 64, "patch_size": 16, "width": 48, "layers": 2, "heads": 3, "dim": 20}
TEXT = {"width": 24, "layers": 2, "heads": 2, "context": 77, "vocab_size": 49408}
SIZES = ((400, 500), (319, 319), (150, 90), (701, 333))
#: Positive and negative prompt of a finding, as CLIP's tokenizer encodes them (start 49406, end 49407).
LABELS = ("Atelectasis", "Pleural Effusion")


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in OpenAI's layout."""
    s, t = SHAPE, TEXT
    found: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (s["width"],),
        "visual.positional_embedding": ((s["image_size"] // s["patch_size"]) ** 2 + 1, s["width"]),
        "visual.conv1.weight": (s["width"], 3, s["patch_size"], s["patch_size"]),
        "visual.proj": (s["width"], s["dim"]),
        "token_embedding.weight": (t["vocab_size"], t["width"]),
        "positional_embedding": (t["context"], t["width"]),
        "text_projection": (t["width"], s["dim"]),
    }
    for name, width in (("visual.ln_pre", s["width"]), ("visual.ln_post", s["width"]), ("ln_final", t["width"])):
        found |= plain["norm_shapes"](name, width)
    for base, width, layers in (("visual.", s["width"], s["layers"]), ("", t["width"], t["layers"])):
        for i in range(layers):
            block = f"{base}transformer.resblocks.{i}."
            found |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            found |= plain["linear_shapes"](f"{block}attn.out_proj", width, width)
            found |= plain["linear_shapes"](f"{block}mlp.c_fc", 4 * width, width)
            found |= plain["linear_shapes"](f"{block}mlp.c_proj", width, 4 * width)
            found |= plain["norm_shapes"](f"{block}ln_1", width) | plain["norm_shapes"](f"{block}ln_2", width)
    return found


def weights() -> dict[str, Tensor]:
    """Random numbers in mixed precision, as the files hold them: half but for norms, embeddings and the scale."""
    kept = ("ln_", "embedding", "logit_scale")
    drawn = plain["drawn"](shapes(), SEED)
    return {k: v if any(part in k for part in kept) else v.half() for k, v in drawn.items()}


def pictures() -> list[Image.Image]:
    """Grey pictures of the sizes of :data:`SIZES`."""
    found = []
    for i, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        noise = np.random.default_rng(SEED + i).integers(-15, 16, (height, width))
        found.append(
            Image.fromarray(np.clip(120 + 90 * np.sin(8 * x + i) * np.cos(6 * y) + noise, 0, 255).astype("uint8"))
        )
    return found


def prepare(image: Image.Image, trap: str = "") -> Tensor:
    """Pixels (3, size, size)."""
    if trap == "openai":
        side, mean, std = SHAPE["image_size"], (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        scale = side / min(image.size)
        small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (small.width - side) // 2, (small.height - side) // 2
        values = torch.from_numpy(np.array(small.crop((left, top, left + side, top + side)), dtype=np.float32)) / 255
        return torch.stack([(values - m) / s for m, s in zip(mean, std, strict=True)])
    ratio = 320.0 / max(image.size)
    new = (round(image.width * ratio), round(image.height * ratio))
    if trap != "rounded":
        new = (int(image.width * ratio), int(image.height * ratio))
    kind = Image.Resampling.BICUBIC if trap == "bicubic" else Image.Resampling.LANCZOS
    square = Image.new("L", (320, 320))
    corner = (0, 0) if trap == "corner" else ((320 - new[0]) // 2, (320 - new[1]) // 2)
    square.paste(image.convert("RGB").resize(new, kind), corner)
    values = torch.from_numpy(np.array(square, dtype=np.float32))
    values = values / 255 if trap == "unit_range" else values
    normal = ((values - 101.48761) / 83.43944).expand(1, 3, -1, -1)
    sides = (SHAPE["image_size"],) * 2
    return F.interpolate(normal, sides, mode="bicubic", align_corners=False, antialias=trap == "antialias")[0]


def encode_image(w: dict[str, Tensor], x: Tensor, trap: str = "") -> Tensor:
    """Embeddings (batch, dim), not normalised, in float32."""
    w = {k: v.float() for k, v in w.items()}
    tokens = F.conv2d(x, w["visual.conv1.weight"], stride=SHAPE["patch_size"]).flatten(2).transpose(1, 2)
    start = w["visual.class_embedding"].expand(len(x), 1, -1)
    tokens = torch.cat([start, tokens], 1) + w["visual.positional_embedding"]
    tokens = plain["layer_norm"](w, "visual.ln_pre", tokens, 1e-5)
    tokens = _blocks(w, "visual.", tokens, SHAPE["layers"], SHAPE["heads"], trap)
    return plain["layer_norm"](w, "visual.ln_post", tokens[:, 0], 1e-5) @ w["visual.proj"]


def encode_text(w: dict[str, Tensor], ids: Tensor, trap: str = "") -> Tensor:
    """Embeddings (batch, dim) at the end token, not normalised, in float32."""
    w = {k: v.float() for k, v in w.items()}
    tokens = w["token_embedding.weight"][ids] + w["positional_embedding"]
    tokens = _blocks(w, "", tokens, TEXT["layers"], TEXT["heads"], trap, causal=True)
    tokens = plain["layer_norm"](w, "ln_final", tokens, 1e-5)
    return tokens[torch.arange(len(ids)), ids.argmax(1)] @ w["text_projection"]


def _blocks(
    w: dict[str, Tensor], base: str, x: Tensor, layers: int, heads: int, trap: str, *, causal: bool = False
) -> Tensor:
    n, width = x.shape[1:]
    hidden = torch.full((n, n), float("-inf")).triu(1) if causal else torch.zeros(n, n)
    for i in range(layers):
        block = f"{base}transformer.resblocks.{i}."
        y = plain["layer_norm"](w, f"{block}ln_1", x, 1e-5)
        q, k, v = (y @ w[f"{block}attn.in_proj_weight"].T + w[f"{block}attn.in_proj_bias"]).chunk(3, -1)
        outs = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / (width // heads) ** 0.5 + hidden
            outs.append(scores.softmax(-1) @ v[..., part])
        x = x + plain["linear"](w, f"{block}attn.out_proj", torch.cat(outs, -1))
        y = plain["linear"](w, f"{block}mlp.c_fc", plain["layer_norm"](w, f"{block}ln_2", x, 1e-5))
        y = plain["gelu"](y) if trap == "gelu" else y * torch.sigmoid(1.702 * y)
        x = x + plain["linear"](w, f"{block}mlp.c_proj", y)
    return x


def probabilities(image: Tensor, positive: Tensor, negative: Tensor, scale: float = 1.0) -> Tensor:
    """p (images, labels): the softmax over the two cosines of each label."""
    unit = F.normalize(image, dim=-1)
    yes, no = (scale * unit @ F.normalize(t, dim=-1).T for t in (positive, negative))
    return yes.exp() / (yes.exp() + no.exp())


def ids() -> Tensor:
    """Prompts `{}` and `no {}` of the labels, (4, 77), written down: byte pairs of CLIP's vocabulary."""
    words = {"atelectasis": (992, 944, 6538, 533), "pleural effusion": (926, 33948, 1490, 9364), "no": (871,)}
    rows = torch.zeros(4, 77, dtype=torch.long)
    for i, names in enumerate(
        (("atelectasis",), ("pleural effusion",), ("no", "atelectasis"), ("no", "pleural effusion"))
    ):
        row = [49406, *(piece for name in names for piece in words[name]), 49407]
        rows[i, : len(row)] = torch.tensor(row)
    return rows


def main() -> None:
    """Write the file."""
    w = weights()
    image = encode_image(w, torch.stack([prepare(p) for p in pictures()]))
    text = encode_text(w, ids())
    found: dict[str, Any] = {
        "seed": SEED,
        "image": plain["rows"](image),
        "text": plain["rows"](text),
        "probabilities": plain["rows"](probabilities(image, text[:2], text[2:])),
    }
    Path(__file__).with_name("chexzero.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
