"""Write gloria.json: embeddings and similarities of a small GLoRIA, by an independent implementation (plain_towers.py).

From the specification alone, word by word and image by image in plain loops. ``trap`` switches one step to the mistake
that is easily made. Run by `make golden`, never by hand.
"""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

plain = runpy.run_path(str(Path(__file__).with_name("plain_towers.py")))
SEED = 29
DIM = 24
UPSAMPLE = 83
RESNET = {"layers": [1, 1, 2, 1], "width": 8}
BERT = {"width": DIM, "layers": 5, "heads": 3, "mlp_width": 40, "vocab_size": 20, "positions": 30}
SLOTS = 21
#: Ids 0 to 3 are [PAD], [UNK], [CLS], [SEP]; the last six continue a word.
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *(f"##{c}" for c in "abcdef")]
TEXTS = ["ab c ja", "d", "iabc h ee f ga bcb"]


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint's state."""
    image, width = "gloria.img_encoder.", RESNET["width"]
    return {
        **plain["resnet_shapes"](f"{image}model.", tuple(RESNET["layers"]), width),
        f"{image}global_embedder.weight": (DIM, 32 * width),
        f"{image}global_embedder.bias": (DIM,),
        f"{image}local_embedder.weight": (DIM, 16 * width, 1, 1),
        **plain["bert_shapes"]("gloria.text_encoder.model.", BERT),
    }


def weights() -> dict[str, Tensor]:
    """Random numbers for all of them."""
    return plain["drawn"](shapes(), SEED)


def pixels() -> Tensor:
    """Three images (3, 3, 64, 64)."""
    return torch.from_numpy(np.random.default_rng(SEED).standard_normal((3, 3, 64, 64)).astype(np.float32))


def row_of(text: str) -> list[int]:
    """Ids of a text, one letter a piece, with [CLS] and [SEP]."""
    found = [2]
    for word in text.split():
        found.extend(PIECES.index(c if i == 0 else f"##{c}") for i, c in enumerate(word))
    return [*found, 3]


def encode_image(w: dict[str, Tensor], x: Tensor, trap: str = "") -> tuple[Tensor, Tensor]:
    """The embeddings (batch, DIM) and those of regions (batch, DIM, rows, columns)."""
    if trap != "no_upsample":
        x = F.interpolate(x, (UPSAMPLE, UPSAMPLE), mode="bilinear", align_corners=trap != "corners")
    maps = plain["resnet"](w, "gloria.img_encoder.model.", tuple(RESNET["layers"]), x)
    if trap == "layer4_regions":
        return torch.zeros(0), maps[3]
    pooled = maps[3].amax((2, 3)) if trap == "max_pool" else maps[3].mean((2, 3))
    regions = torch.einsum("dc,bcij->bdij", w["gloria.img_encoder.local_embedder.weight"][:, :, 0, 0], maps[2])
    bias = 0 if trap == "no_bias" else w["gloria.img_encoder.global_embedder.bias"]
    return pooled @ w["gloria.img_encoder.global_embedder.weight"].T + bias, regions


def encode_text(w: dict[str, Tensor], texts: list[str], trap: str = "") -> tuple[Tensor, Tensor]:
    """The embeddings (batch, DIM) and those of words (batch, SLOTS, DIM)."""
    whole, by_word = [], []
    for text in texts:
        ids = row_of(text)
        n = len(ids)
        padded = torch.tensor([ids + [0] * (SLOTS - n)])
        mask = (torch.arange(SLOTS) < n).long()[None]
        states = plain["bert"](w, "gloria.text_encoder.model.", BERT, padded, mask)
        layers = states[-1:] if trap == "last_layer" else states[-4:]
        summed = torch.stack(layers).sum(0)[0] / (4 if trap == "mean_layers" else 1)
        words: list[Tensor] = []
        for i, vector in zip(ids, summed, strict=False):
            if PIECES[i].startswith("##") and trap != "no_grouping":
                words[-1] = words[-1] + vector
            else:
                words.append(vector)
        slots = torch.zeros(SLOTS, DIM)
        slots[: len(words)] = torch.stack(words)
        divisor = {"mean_words": len(words), "mean_tokens": n}.get(trap, SLOTS)
        whole.append(slots.sum(0) / divisor)
        by_word.append(slots)
    return torch.stack(whole), torch.stack(by_word)


def local(regions: Tensor, words: Tensor, counts: list[int], trap: str = "", *, train: bool = False) -> Tensor:
    """Similarities (images, texts) before any later scale; ``train``: with [CLS], and summed."""
    first = 0 if train or trap == "with_cls" else 1
    found = torch.zeros(len(regions), len(words))
    for i, region in enumerate(regions.flatten(2)):
        for j, (text, n) in enumerate(zip(words, counts, strict=True)):
            chosen = text[first : first + n + int(train)]
            products = [[float(word @ place) for word in chosen] for place in region.T]
            shares = [_softmax(row) for row in products]
            if trap == "no_word_softmax":
                shares = products
            values = []
            for k, word in enumerate(chosen):
                weights_of = _softmax([4.0 * share[k] for share in shares])
                seen = sum((a * place for a, place in zip(weights_of, region.T, strict=True)), torch.zeros(DIM))
                scale = max(float(seen.norm() * word.norm()), 1e-8)
                values.append(5.0 * float(seen @ word) / scale)
            found[i, j] = math.log(sum(math.exp(v) for v in values)) if train else max(values)
    return found


def _softmax(values: list[float]) -> list[float]:
    highest = max(values)
    raised = [math.exp(v - highest) for v in values]
    return [r / sum(raised) for r in raised]


def word_counts() -> list[int]:
    """Words of each text."""
    return [len(text.split()) for text in TEXTS]


def main() -> None:
    """Write the file."""
    w = weights()
    image, regions = encode_image(w, pixels())
    text, words = encode_text(w, TEXTS)
    cut = [min(len(t), SLOTS - 1) for t in TEXTS]
    found: dict[str, Any] = {
        "seed": SEED,
        "image": plain["rows"](image),
        "regions_of_the_first": plain["rows"](regions[0].flatten(1)[:, ::5]),
        "text": plain["rows"](text),
        "words_of_the_first": plain["rows"](words[0, :6]),
        "local": plain["rows"](local(regions, words, word_counts())),
        "local_peer": plain["rows"](local(regions, words, cut)),
        "local_train": plain["rows"](local(regions, words, word_counts(), train=True)),
    }
    Path(__file__).with_name("gloria.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
