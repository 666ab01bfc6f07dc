"""BERT, Swin and ResNet as plain functions of torch on the names in published files, for the golden fixtures.

Written from the papers and the specification of the files, not from chiasm's code nor any peer's. ``w`` holds the
tensors; names are joined to ``base``. Batch norm and LayerNorm are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random numbers for all names, the same on every machine: matrices, vectors and batch statistics."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in sorted(shapes.items()):
        noise = draw.standard_normal(shape)
        if name.endswith(("position_ids", "relative_position_index", "num_batches_tracked")):
            found[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if name.endswith("logit_scale"):
            noise = np.array(4.0)
        elif name.endswith("running_var"):
            noise = 0.5 + np.abs(noise)
        elif "embeddings.weight" in name or len(shape) == 1:
            noise = (1 + 0.2 * noise) if name.endswith("weight") and len(shape) == 1 else 0.3 * noise
        else:
            noise = noise * (2.0 / np.prod(shape[1:])) ** 0.5
        found[name] = torch.from_numpy(np.asarray(noise, dtype=np.float32))
    return found


def linear_shapes(base: str, out: int, into: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{base}.weight": (out, into)} | ({f"{base}.bias": (out,)} if bias else {})


def norm_shapes(base: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{base}.weight": (width,), f"{base}.bias": (width,)}


def linear(w: Weights, base: str, x: Tensor) -> Tensor:
    y = x @ w[f"{base}.weight"].T
    return y + w[f"{base}.bias"] if f"{base}.bias" in w else y


def layer_norm(w: Weights, base: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{base}.weight"] + w[f"{base}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


# BERT ---------------------------------------------------------------------------------------------------------------


def bert_shapes(base: str, s: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names in files of transformers before 4.31, which saved ``position_ids``; with the pooler."""
    width, inner = s["width"], s["mlp_width"]
    found: dict[str, tuple[int, ...]] = {
        f"{base}embeddings.position_ids": (1, s["positions"]),
        f"{base}embeddings.word_embeddings.weight": (s["vocab_size"], width),
        f"{base}embeddings.position_embeddings.weight": (s["positions"], width),
        f"{base}embeddings.token_type_embeddings.weight": (2, width),
        **norm_shapes(f"{base}embeddings.LayerNorm", width),
        **linear_shapes(f"{base}pooler.dense", width, width),
    }
    for i in range(s["layers"]):
        block = f"{base}encoder.layer.{i}."
        for part in ("query", "key", "value"):
            found |= linear_shapes(f"{block}attention.self.{part}", width, width)
        found |= linear_shapes(f"{block}attention.output.dense", width, width)
        found |= norm_shapes(f"{block}attention.output.LayerNorm", width)
        found |= linear_shapes(f"{block}intermediate.dense", inner, width)
        found |= linear_shapes(f"{block}output.dense", width, inner) | norm_shapes(f"{block}output.LayerNorm", width)
    return found


def bert(w: Weights, base: str, s: Mapping[str, int], ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Hidden states: the embeddings and the output of every block, (batch, tokens, width); eps 1e-12, post-norm."""
    n, width, heads = ids.shape[1], s["width"], s["heads"]
    x = w[f"{base}embeddings.word_embeddings.weight"][ids]
    x = (
        x
        + w[f"{base}embeddings.position_embeddings.weight"][:n]
        + w[f"{base}embeddings.token_type_embeddings.weight"][0]
    )
    x = layer_norm(w, f"{base}embeddings.LayerNorm", x, 1e-12)
    states = [x]
    for i in range(s["layers"]):
        block = f"{base}encoder.layer.{i}."
        q, k, v = (linear(w, f"{block}attention.self.{p}", x) for p in ("query", "key", "value"))
        outs = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / (width // heads) ** 0.5
            scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
            outs.append(scores.softmax(-1) @ v[..., part])
        attended = linear(w, f"{block}attention.output.dense", torch.cat(outs, -1))
        x = layer_norm(w, f"{block}attention.output.LayerNorm", x + attended, 1e-12)
        inner = linear(w, f"{block}output.dense", gelu(linear(w, f"{block}intermediate.dense", x)))
        x = layer_norm(w, f"{block}output.LayerNorm", x + inner, 1e-12)
        states.append(x)
    return states


# ResNet -------------------------------------------------------------------------------------------------------------


def resnet_shapes(base: str, layers: tuple[int, ...], width: int) -> dict[str, tuple[int, ...]]:
    """torchvision's names of a ResNet of bottlenecks, without ``fc``."""

    def bn(name: str, n: int) -> dict[str, tuple[int, ...]]:
        parts = {f"{name}.{p}": (n,) for p in ("weight", "bias", "running_mean", "running_var")}
        return {**parts, f"{name}.num_batches_tracked": ()}

    found = {f"{base}conv1.weight": (width, 3, 7, 7), **bn(f"{base}bn1", width)}
    channels = width
    for stage, count in enumerate(layers):
        planes = width * 2**stage
        for i in range(count):
            block = f"{base}layer{stage + 1}.{i}."
            for j, (out, into, k) in enumerate(
                ((planes, channels, 1), (planes, planes, 3), (4 * planes, planes, 1)), 1
            ):
                found |= {f"{block}conv{j}.weight": (out, into, k, k), **bn(f"{block}bn{j}", out)}
            if i == 0:
                found |= {f"{block}downsample.0.weight": (4 * planes, channels, 1, 1)}
                found |= bn(f"{block}downsample.1", 4 * planes)
            channels = 4 * planes
    return found


def resnet(w: Weights, base: str, layers: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """The map of every stage; the stride is in the 3×3 convolution."""

    def bn(name: str, y: Tensor) -> Tensor:
        mean, var, scale, shift = (
            w[f"{name}.{p}"][:, None, None] for p in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.max_pool2d(bn(f"{base}bn1", F.conv2d(x, w[f"{base}conv1.weight"], stride=2, padding=3)).relu(), 3, 2, 1)
    maps = []
    for stage, count in enumerate(layers):
        for i in range(count):
            block, stride = f"{base}layer{stage + 1}.{i}.", 2 if stage and not i else 1
            y = bn(f"{block}bn1", F.conv2d(x, w[f"{block}conv1.weight"])).relu()
            y = bn(f"{block}bn2", F.conv2d(y, w[f"{block}conv2.weight"], stride=stride, padding=1)).relu()
            y = bn(f"{block}bn3", F.conv2d(y, w[f"{block}conv3.weight"]))
            if f"{block}downsample.0.weight" in w:
                x = bn(f"{block}downsample.1", F.conv2d(x, w[f"{block}downsample.0.weight"], stride=stride))
            x = (x + y).relu()
        maps.append(x)
    return maps


# Swin ---------------------------------------------------------------------------------------------------------------


def swin_shapes(base: str, s: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """transformers' names up to version 4."""
    width, window = s["embed_dim"], s["window_size"]
    patches = f"{base}embeddings.patch_embeddings.projection"
    found: dict[str, tuple[int, ...]] = {
        f"{patches}.weight": (width, 3, s["patch_size"], s["patch_size"]),
        f"{patches}.bias": (width,),
        **norm_shapes(f"{base}embeddings.norm", width),
    }
    for stage, depth in enumerate(s["depths"]):
        n = width * 2**stage
        for i in range(depth):
            block = f"{base}encoder.layers.{stage}.blocks.{i}."
            found |= norm_shapes(f"{block}layernorm_before", n) | norm_shapes(f"{block}layernorm_after", n)
            for part in ("query", "key", "value"):
                found |= linear_shapes(f"{block}attention.self.{part}", n, n)
            found[f"{block}attention.self.relative_position_bias_table"] = (
                (2 * window - 1) ** 2,
                s["num_heads"][stage],
            )
            found[f"{block}attention.self.relative_position_index"] = (window**2, window**2)
            found |= linear_shapes(f"{block}attention.output.dense", n, n)
            found |= linear_shapes(f"{block}intermediate.dense", 4 * n, n) | linear_shapes(
                f"{block}output.dense", n, 4 * n
            )
        if stage + 1 < len(s["depths"]):
            merge = f"{base}encoder.layers.{stage}.downsample"
            found |= linear_shapes(f"{merge}.reduction", 2 * n, 4 * n, bias=False) | norm_shapes(f"{merge}.norm", 4 * n)
    return found | norm_shapes(f"{base}layernorm", width * 2 ** (len(s["depths"]) - 1))


def swin(w: Weights, base: str, s: Mapping[str, Any], pixels: Tensor, trap: str = "") -> Tensor:
    """Tokens of the last stage after the last norm, (batch, n, width); eps 1e-5."""
    patches = f"{base}embeddings.patch_embeddings.projection"
    x = F.conv2d(pixels, w[f"{patches}.weight"], w[f"{patches}.bias"], stride=s["patch_size"]).permute(0, 2, 3, 1)
    x = layer_norm(w, f"{base}embeddings.norm", x, 1e-5)
    for stage, depth in enumerate(s["depths"]):
        for i in range(depth):
            block = f"{base}encoder.layers.{stage}.blocks.{i}."
            shifted = i % 2 == 1 and x.shape[1] > s["window_size"] and trap != "no_shift"
            y = layer_norm(w, f"{block}layernorm_before", x, 1e-5)
            x = x + _window_attention(w, f"{block}attention.", s["num_heads"][stage], s["window_size"], y, shifted)
            y = layer_norm(w, f"{block}layernorm_after", x, 1e-5)
            x = x + linear(w, f"{block}output.dense", gelu(linear(w, f"{block}intermediate.dense", y)))
        if stage + 1 < len(s["depths"]):
            merge = f"{base}encoder.layers.{stage}.downsample"
            corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = linear(w, f"{merge}.reduction", layer_norm(w, f"{merge}.norm", torch.cat(corners, -1), 1e-5))
    return layer_norm(w, f"{base}layernorm", x.flatten(1, 2), 1e-5)


def _window_attention(w: Weights, base: str, heads: int, window: int, x: Tensor, shifted: bool) -> Tensor:
    """Attention inside of windows; places are compared as they lie on the original map, so rolled ones never meet."""
    side, width = x.shape[1], x.shape[3]
    window = min(window, side)
    region = torch.arange(side)
    if shifted:
        x = x.roll((-(window // 2), -(window // 2)), (1, 2))
        region = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - window // 2).long()
    out = torch.zeros_like(x)
    table = w[f"{base}self.relative_position_bias_table"]
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    delta = place[:, None] - place[None, :] + window - 1
    bias = table[delta[..., 0] * (2 * window - 1) + delta[..., 1]]  # (places, places, heads)
    for top in range(0, side, window):
        for left in range(0, side, window):
            part = x[:, top : top + window, left : left + window].flatten(1, 2)
            q, k, v = (linear(w, f"{base}self.{p}", part) for p in ("query", "key", "value"))
            names = torch.cartesian_prod(region[top : top + window], region[left : left + window])
            apart = (names[:, None] != names[None, :]).any(-1) if shifted else torch.zeros(1, dtype=torch.bool)
            outs = []
            for h in range(heads):
                cut = slice(h * width // heads, (h + 1) * width // heads)
                scores = q[..., cut] @ k[..., cut].transpose(1, 2) / (width // heads) ** 0.5 + bias[..., h]
                outs.append(scores.masked_fill(apart, float("-inf")).softmax(-1) @ v[..., cut])
            mixed = linear(w, f"{base}output.dense", torch.cat(outs, -1))
            out[:, top : top + window, left : left + window] = mixed.unflatten(1, (window, window))
    return out.roll((window // 2, window // 2), (1, 2)) if shifted else out


def rows(values: Tensor) -> list[Any]:
    """Nested lists with nine digits."""
    if values.ndim > 1:
        return [rows(v) for v in values]
    return [float(f"{x:.9g}") for x in values.tolist()]
