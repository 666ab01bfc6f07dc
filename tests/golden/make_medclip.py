"""Write medclip.json: embeddings of small MedCLIPs, by an independent implementation (plain_towers.py).

From the specification alone: Swin's mean token or ResNet's mean place through a projection without bias; the first,
second and last hidden layer of BERT, averaged over all positions, padding included. ``trap`` switches one step to the
mistake that is easily made. Run by `make golden`, never by hand.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

plain = runpy.run_path(str(Path(__file__).with_name("plain_towers.py")))
SEED = 23
DIM = 24
SWIN: dict[str, Any] = {
    "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4, "image_size": 64, "patch_size": 4,
}  # fmt: skip
RESNET = {"layers": [1, 2, 1, 1], "width": 8}
BERT = {"width": 24, "layers": 4, "heads": 3, "mlp_width": 40, "vocab_size": 90, "positions": 20}
LENGTHS = (4, 9, 2)


def shapes(tower: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file of ``swin`` or ``resnet``."""
    found = {"logit_scale": (), **plain["bert_shapes"]("text_model.model.", BERT)}
    found["text_model.projection_head.weight"] = (DIM, BERT["width"])
    if tower == "swin":
        width = SWIN["embed_dim"] * 2 ** (len(SWIN["depths"]) - 1)
        found |= plain["swin_shapes"]("vision_model.model.", SWIN)
        return found | {"vision_model.projection_head.weight": (DIM, width)}
    found |= plain["resnet_shapes"]("vision_model.model.", tuple(RESNET["layers"]), RESNET["width"])
    return found | {"vision_model.model.fc.weight": (DIM, 32 * RESNET["width"])}


def weights(tower: str) -> dict[str, Tensor]:
    """Random numbers for all of them."""
    return plain["drawn"](shapes(tower), SEED)


def pixels() -> Tensor:
    """Two images (2, 3, 64, 64)."""
    return torch.from_numpy(np.random.default_rng(SEED).standard_normal((2, 3, 64, 64)).astype(np.float32))


def ids() -> tuple[Tensor, Tensor]:
    """Texts of the lengths of :data:`LENGTHS`, padded with 0 to the longest, and the lengths."""
    draw = np.random.default_rng(SEED)
    table = np.zeros((len(LENGTHS), max(LENGTHS)), dtype=np.int64)
    for row, length in zip(table, LENGTHS, strict=True):
        row[:length] = draw.integers(3, BERT["vocab_size"], length)
    return torch.from_numpy(table), torch.tensor(LENGTHS)


def encode_image(w: dict[str, Tensor], tower: str, x: Tensor, trap: str = "") -> Tensor:
    """Embeddings (batch, DIM), not normalised."""
    if tower == "swin":
        tokens = plain["swin"](w, "vision_model.model.", SWIN, x, trap)
        pooled = tokens[:, 0] if trap == "first_token" else tokens.mean(1)
        return pooled @ w["vision_model.projection_head.weight"].T
    maps = plain["resnet"](w, "vision_model.model.", tuple(RESNET["layers"]), x)
    return maps[-1].mean((2, 3)) @ w["vision_model.model.fc.weight"].T


def encode_text(w: dict[str, Tensor], table: Tensor, lengths: Tensor, trap: str = "") -> Tensor:
    """Embeddings (batch, DIM), not normalised."""
    mask = (torch.arange(table.shape[1]) < lengths[:, None]).long()
    states = plain["bert"](w, "text_model.model.", BERT, table, mask)
    picked = {"last_four": states[-4:], "from_zero": [states[0], states[1], states[-1]]}.get(
        trap, [states[1], states[2], states[-1]]
    )
    mean = torch.stack(picked).mean(0)
    if trap == "masked":
        inside = mask[..., None].float()
        pooled = (mean * inside).sum(1) / inside.sum(1)
    elif trap == "cls":
        pooled = mean[:, 0]
    else:
        pooled = mean.mean(1)
    return pooled @ w["text_model.projection_head.weight"].T


def main() -> None:
    """Write the file."""
    found: dict[str, Any] = {"seed": SEED, "dim": DIM, "swin": SWIN, "resnet": RESNET, "bert": BERT}
    for tower in ("swin", "resnet"):
        w = weights(tower)
        found[f"image_{tower}"] = plain["rows"](encode_image(w, tower, pixels()))
    table, lengths = ids()
    found["text"] = plain["rows"](encode_text(weights("swin"), table, lengths))
    found["text_alone"] = plain["rows"](encode_text(weights("swin"), table[:1, : LENGTHS[0]], lengths[:1]))
    found["text_masked"] = plain["rows"](encode_text(weights("swin"), table, lengths, "masked"))
    Path(__file__).with_name("medclip.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
