"""Image regions compared with words: GLoRIA's local similarity and BioViL's text-conditioned heat map.

In: an encoder whose towers keep regions (``image_locals``) and words (``word_features``). Out: arrays. Protocols see only
these arrays (``tasks.protocol_run``), never the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

#: What BioViL resizes the shorter side to before its crop, in pixels.
BIOVIL_RESIZE_PX = 512


def heat_map_on_image(
    values: NDArray[Any],
    image_size: tuple[int, int],
    *,
    crop_px: int,
    resize_px: int = BIOVIL_RESIZE_PX,
    sigma: float = 1.5,
    interpolation: Literal["nearest", "bilinear"] = "nearest",
) -> NDArray[np.float32]:
    """Return BioViL's heat map on the original image, float32 (height, width), NaN where the model did not look.

    Args:
        values: Cosines of the projected patches with the text, (rows, columns).
        image_size: Width and height of the image, in pixels.
        crop_px: Side of the model's input: 480 for BioViL, 448 for BioViL-T.
        resize_px: Length of the shorter side before the crop.
        sigma: Of the blur, in cells of the grid.
        interpolation: How cells become pixels; the published default is ``nearest``.

    References:
        microsoft/hi-ml, hi-ml-multimodal: ``gaussian_filter``, ``interpolate`` to a square of
        int(crop × min(height, width) / resize) pixels, margins of which the smaller half lies left and above.
    """
    import torch
    import torch.nn.functional as F
    from scipy.ndimage import gaussian_filter

    width, height = image_size
    side = int(crop_px * min(height, width) / resize_px)
    if np.ndim(values) != 2 or side < 1:
        raise InputError(f"a map of shape {np.shape(values)} cannot be laid on an image of {width} × {height} pixels")
    if interpolation not in ("nearest", "bilinear"):
        raise UnknownName("interpolation", interpolation, ("nearest", "bilinear"))
    blurred = torch.from_numpy(gaussian_filter(np.asarray(values, np.float32), sigma=sigma, order=0))
    options: dict[str, Any] = {} if interpolation == "nearest" else {"align_corners": False}
    square = F.interpolate(blurred[None, None], size=(side, side), mode=interpolation, **options)[0, 0].numpy()
    full = np.full((height, width), np.nan, dtype=np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    full[top : top + side, left : left + side] = square
    return full


def text_heat_map(
    encoder: Encoder,
    image: Image,
    text: str | Sequence[str],
    *,
    sigma: float = 1.5,
    interpolation: Literal["nearest", "bilinear"] = "nearest",
) -> NDArray[np.float32]:
    """Return BioViL's text-conditioned heat map of an image: float32 (height, width), NaN where the model did not look.

    Several texts are one ensemble: the mean of their raw embeddings, as BioViL takes it. ``explain(..., method="biovil")``
    gives the same values as a :class:`~chiasm.explain.heatmap.HeatMap`, which interpolates and knows no NaN.

    Raises:
        InputError: The text is empty, or the image tower has no patch vectors.
    """
    import torch
    import torch.nn.functional as F

    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(t.strip() for t in texts):
        raise InputError("a heat map needs a text, got an empty one")
    patches = encoder.patch_features(encoder.preprocess(image), normalize=True)[0].float()
    direction = F.normalize(encoder.encode_text(texts).float().mean(0), dim=0)
    with torch.inference_mode():
        values = (patches @ direction).cpu().numpy()
    spec = encoder.preprocess_spec
    resized = getattr(spec, "resize_size", None) or spec.size
    return heat_map_on_image(
        values, image.size, crop_px=spec.size, resize_px=resized, sigma=sigma, interpolation=interpolation
    )


def has_local_features(encoder: Any) -> bool:
    """Return whether both towers of an encoder keep what the comparison of regions with words needs."""
    return all(
        tower is not None and hasattr(tower, name) for tower, name in zip(_trunks(encoder), _METHODS, strict=True)
    )


_METHODS = ("image_locals", "word_features")


def _trunks(encoder: Any) -> tuple[Any, Any]:
    """Return the towers themselves, without the projections behind them; None where there is none."""
    model = getattr(encoder, "model", None)
    visual, text = getattr(model, "visual", None), getattr(model, "text", None)
    return getattr(visual, "trunk", visual), getattr(text, "transformer", text)


def local_similarities(
    encoder: Encoder,
    images: Sequence[Sample | Path | str],
    texts: Sequence[str],
    *,
    words: Literal["words", "characters"] = "words",
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """Return GLoRIA's local similarity of every image with every text: float32 (images, texts).

    Args:
        encoder: One whose towers keep regions and words (:func:`has_local_features`).
        images: Samples or paths; each is decoded and passed through the tower once.
        texts: Prompts.
        words: ``words`` compares the image with the words of a text; ``characters`` with as many slots as the text has
            characters, as the published code does, empty slots included.
        batch_size: Images or texts per forward pass.

    Raises:
        InputError: The encoder has no such towers, or a text has no word.
        FileFormatError: An image cannot be read.
    """
    import torch

    from chiasm.datasets.images import open_sample_image
    from chiasm.losses.local import attention_similarity, peer_word_counts

    if not has_local_features(encoder):
        raise InputError(f"`{encoder.name}` does not keep image regions and words", hint="GLoRIA's towers do")
    if words not in ("words", "characters"):
        raise UnknownName("way to count words", words, ("words", "characters"))
    visual, text = _trunks(encoder)
    tokens = encoder.tokenizer.encode(list(texts))
    text.read_vocabulary(encoder.tokenizer)
    found: list[NDArray[np.float32]] = []
    encoder.model.eval()
    with torch.inference_mode():
        parts = [
            text.word_features(
                tokens.ids[k : k + batch_size].to(encoder.device), tokens.mask[k : k + batch_size].to(encoder.device)
            )
            for k in range(0, len(texts), batch_size)
        ]
        features = torch.cat([part[0] for part in parts]).float()
        counts = torch.cat([part[1] for part in parts])
        if words == "words" and len(counts) and int(counts.min()) < 1:
            raise InputError(
                f"prompt `{texts[int(counts.argmin())]}` has no word left for the comparison: GLoRIA drops sentences of one word",
                hint="give prompts of two words or more",
            )
        if words == "characters":
            counts = peer_word_counts(texts, features.shape[1])
        for start in range(0, len(images), batch_size):
            batch = [
                i if isinstance(i, Sample) else Sample(str(i), Path(i)) for i in images[start : start + batch_size]
            ]
            pixels = torch.stack([encoder.preprocess(open_sample_image(sample)) for sample in batch])
            regions = visual.image_locals(pixels.to(encoder.device, encoder.model.dtype)).float()
            found.append(attention_similarity(regions, features, counts).cpu().numpy())
    return np.concatenate(found) if found else np.zeros((0, len(texts)), np.float32)
