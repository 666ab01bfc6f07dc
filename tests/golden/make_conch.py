"""Write conch.json: inputs' seeds and embeddings of a small CONCH, by an independent implementation.

Plain functions of torch on the published key names, written from the description of the architecture alone (Lu et al.
2024; specification of the file's names and shapes). Nothing of the authors' code or tokenizer is here. ``trap`` switches
one step to the mistake that is easily made. Run by `make golden`, never by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPE: dict[str, int] = {
    "image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 4, "pool_dim": 16, "pool_heads": 4,
    "text_width": 24, "text_layers": 2, "text_heads": 3, "vocab_size": 300, "context": 15,
}  # fmt: skip
SEED = 17
LENGTHS = (2, 5, 9, 14, 15)


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, with the caption pooler and a captioner's remains."""
    s = SHAPE
    width, dim, words = s["width"], s["pool_dim"], s["text_width"]
    patches = (s["image_size"] // s["patch_size"]) ** 2
    found: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.trunk.cls_token": (1, 1, width),
        "visual.trunk.pos_embed": (1, patches + 1, width),
        "visual.trunk.patch_embed.proj.weight": (width, 3, s["patch_size"], s["patch_size"]),
        "visual.trunk.patch_embed.proj.bias": (width,),
        "visual.trunk.norm.weight": (width,),
        "visual.trunk.norm.bias": (width,),
        "visual.proj_contrast": (dim, dim),
        "text.text_projection": (words, dim),
        "text.cls_emb": (words,),
        "text.positional_embedding": (s["context"] + 1, words),
        "text.token_embedding.weight": (s["vocab_size"], words),
        "text.ln_final.weight": (words,),
        "text.ln_final.bias": (words,),
        "text_decoder.cross_attn.0.ln_1.weight": (words,),
    }
    for pool, size, queries in (("contrast", dim, 1), ("caption", width, 5)):
        base = f"visual.attn_pool_{pool}"
        found[f"{base}.query"] = (queries, size)
        found[f"{base}.attn.in_proj_bias"] = (3 * size,)
        if size == width:
            found[f"{base}.attn.in_proj_weight"] = (3 * size, size)
        else:
            found |= {f"{base}.attn.{n}_proj_weight": (size, size if n == "q" else width) for n in "qkv"}
        found |= {f"{base}.attn.out_proj.weight": (size, size), f"{base}.attn.out_proj.bias": (size,)}
        for norm, n in ((f"{base}.ln_q", size), (f"{base}.ln_k", width), (f"visual.ln_{pool}", size)):
            found |= {f"{norm}.weight": (n,), f"{norm}.bias": (n,)}
    for i in range(s["layers"]):
        base = f"visual.trunk.blocks.{i}"
        for name, out, into in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            found |= {f"{base}.{name}.weight": (out, into), f"{base}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            found |= {f"{base}.{name}.weight": (width,), f"{base}.{name}.bias": (width,)}
    for i in range(s["text_layers"]):
        base = f"text.transformer.resblocks.{i}"
        found |= {f"{base}.attn.in_proj_weight": (3 * words, words), f"{base}.attn.in_proj_bias": (3 * words,)}
        for name, out, into in (
            ("attn.out_proj", words, words), ("mlp.c_fc", 4 * words, words), ("mlp.c_proj", words, 4 * words),
        ):  # fmt: skip
            found |= {f"{base}.{name}.weight": (out, into), f"{base}.{name}.bias": (out,)}
        for name in ("ln_1", "ln_2"):
            found |= {f"{base}.{name}.weight": (words,), f"{base}.{name}.bias": (words,)}
    return found


def weights(seed: int = SEED) -> dict[str, Tensor]:
    """Random numbers for all of them, the same on every machine."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in sorted(shapes().items()):
        noise = draw.standard_normal(shape)
        if name == "logit_scale":
            noise = np.array(4.0)
        elif len(shape) > 1:
            noise = noise * (1.5 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise = 0.2 * noise
        found[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    return found


def pixels(seed: int = SEED, size: int = SHAPE["image_size"]) -> Tensor:
    """Three images (3, 3, size, size)."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 3, size, size)).astype(np.float32))


def ids(seed: int = SEED) -> Tensor:
    """Texts of the lengths of :data:`LENGTHS`, one of them full: (5, context), start 1, end 2, padding 0."""
    draw = np.random.default_rng(seed)
    rows = np.zeros((len(LENGTHS), SHAPE["context"]), dtype=np.int64)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[:length] = draw.integers(3, SHAPE["vocab_size"], length)
        row[0], row[length - 1] = 1, 2
    return torch.from_numpy(rows)


def encode_image(w: dict[str, Tensor], x: Tensor, trap: str = "") -> dict[str, Tensor]:
    """Return ``pooled`` (before the projection) and ``embedded``, neither normalised."""
    eps = 1e-3 if trap == "eps" else 1e-6
    patches = F.conv2d(x, w["visual.trunk.patch_embed.proj.weight"], w["visual.trunk.patch_embed.proj.bias"], stride=16)
    rows, columns = patches.shape[2:]
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([w["visual.trunk.cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    tokens = tokens + _positions(w["visual.trunk.pos_embed"], rows, columns, trap)
    for i in range(SHAPE["layers"]):
        b = f"visual.trunk.blocks.{i}."
        h = _norm(w, b + "norm1", tokens, eps)
        h = _attention(h @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"], SHAPE["heads"], None)
        tokens = tokens + h @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        h = _norm(w, b + "norm2", tokens, eps) @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"]
        tokens = tokens + _gelu(h, trap) @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
    if trap != "no_final_norm":
        tokens = _norm(w, "visual.trunk.norm", tokens, eps)
    if trap == "patches_only":
        tokens = tokens[:, 1:]
    pooled = _norm(w, "visual.ln_contrast", _pool(w, tokens, trap), 1e-5)
    embedded = pooled if trap == "no_projection" else pooled @ w["visual.proj_contrast"]
    return {"pooled": pooled, "embedded": embedded}


def _positions(positions: Tensor, rows: int, columns: int, trap: str) -> Tensor:
    stored = SHAPE["image_size"] // SHAPE["patch_size"]
    if rows == stored:
        return positions
    square = positions[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    mode = "bicubic" if trap == "bicubic" else "bilinear"
    small = F.interpolate(square, (rows, columns), mode=mode, align_corners=False, antialias=trap == "antialias")
    return torch.cat([positions[:, :1], small.flatten(2).transpose(1, 2)], dim=1)


def _pool(w: dict[str, Tensor], tokens: Tensor, trap: str) -> Tensor:
    base = "visual.attn_pool_contrast."
    dim, heads = SHAPE["pool_dim"], SHAPE["pool_heads"]
    keys = _norm(w, base + "ln_k", tokens, 1e-5)
    query = _norm(w, base + "ln_q", w[base + "query"], 1e-5)
    bias = w[base + "attn.in_proj_bias"]
    q = query @ w[base + "attn.q_proj_weight"].T + bias[:dim]
    k = keys @ w[base + "attn.k_proj_weight"].T + bias[dim : 2 * dim]
    v = keys @ w[base + "attn.v_proj_weight"].T + bias[2 * dim :]
    outs = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        scores = k[..., part] @ q[0, part] / (dim // heads) ** 0.5
        share = torch.full_like(scores, 1 / scores.shape[1]) if trap == "mean_pool" else scores.softmax(-1)
        outs.append((share[..., None] * v[..., part]).sum(1))
    return torch.cat(outs, dim=-1) @ w[base + "attn.out_proj.weight"].T + w[base + "attn.out_proj.bias"]


def encode_text(w: dict[str, Tensor], tokens: Tensor, trap: str = "") -> Tensor:
    """Return the embeddings of (batch, context) ids, one text at a time, not normalised."""
    found = []
    for row in tokens:
        count = int((row != 0).sum())
        width, context = SHAPE["text_width"], SHAPE["context"]
        last = w["text.cls_emb"][None]
        x = torch.cat([w["text.token_embedding.weight"][row], last]) + w["text.positional_embedding"]
        seen = torch.tril(torch.ones(context + 1, context + 1, dtype=torch.bool))
        # The mask of the padding is put before the class token's own entry instead of behind it: moved by one place.
        real = torch.arange(context) < count
        own = torch.ones(1, dtype=torch.bool)
        seen[-1] = torch.cat([real, own] if trap == "corrected_mask" else [own, real])
        if trap == "no_padding_mask":
            seen[-1] = True
        for i in range(SHAPE["text_layers"]):
            b = f"text.transformer.resblocks.{i}."
            h = _norm(w, b + "ln_1", x, 1e-5) @ w[b + "attn.in_proj_weight"].T + w[b + "attn.in_proj_bias"]
            h = _attention(h[None], SHAPE["text_heads"], seen)[0]
            x = x + h @ w[b + "attn.out_proj.weight"].T + w[b + "attn.out_proj.bias"]
            h = _norm(w, b + "ln_2", x, 1e-5) @ w[b + "mlp.c_fc.weight"].T + w[b + "mlp.c_fc.bias"]
            x = x + _gelu(h, trap) @ w[b + "mlp.c_proj.weight"].T + w[b + "mlp.c_proj.bias"]
        assert x.shape == (context + 1, width)
        place = count - 1 if trap == "end_of_text" else -1
        pooled = _norm(w, "text.ln_final", x[place], 1e-5)
        found.append(pooled @ w["text.text_projection"])
    return torch.stack(found)


def _norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def _gelu(x: Tensor, trap: str) -> Tensor:
    if trap == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def _attention(packed: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    q, k, v = packed.chunk(3, dim=-1)
    width = q.shape[-1]
    outs = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[..., part] @ k[..., part].transpose(-2, -1) / (width // heads) ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(outs, dim=-1)


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{x:.9g}") for x in row] for row in values.tolist()]


def main() -> None:
    """Write the file."""
    w = weights()
    found: dict[str, Any] = {"shape": SHAPE, "seed": SEED}
    for size in (SHAPE["image_size"], SHAPE["image_size"] // 2):
        images = encode_image(w, pixels(size=size))
        found[f"image_{size}"] = {k: _rows(v) for k, v in images.items()}
    found["text"] = _rows(encode_text(w, ids()))
    found["text_corrected_mask"] = _rows(encode_text(w, ids(), "corrected_mask"))
    path = Path(__file__).with_name("conch.json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
