"""Contrastive losses between images and texts: symmetric InfoNCE, SigLIP, InfoNCE with several or soft positives.

Comes in: two float matrices of L2-normalised features, whose row ``i`` belong together, and the logit scale as a
multiplier (already exponentiated). Goes out: a 0-dim tensor to call ``backward`` on.

Features are cast to float32 whatever the autocast state (float64 stays float64). Small batches use one matrix of
logits, large ones never hold it. Each function takes local rows and gathered columns for training in several
processes: see :class:`Gathered`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chiasm.errors import InputError
from chiasm.losses.pairs import Diagonal, PairList, counts_of
from chiasm.losses.sigmoid import TiledSigLIP
from chiasm.losses.soft_targets import DenseTargets, KeyTargets, TiledSoftInfoNCE
from chiasm.losses.tiled import Plan, TiledInfoNCE

LOG_100 = math.log(100.0)
"""Largest logarithm of the logit scale: CLIP's own clamp."""

SIGLIP_LOGIT_SCALE = 10.0
"""Initial multiplier of SigLIP."""

SIGLIP_LOGIT_BIAS = -10.0
"""Initial bias of SigLIP."""

ONE_MATRIX_LOGITS = 2048 * 2048
"""``tile="auto"`` keeps the logits for the backward pass up to this many (16 MiB); see ``benchmarks/loss.py``."""

PAIRS_PER_ROW = 16
"""Up to this many positives a row on average, they are kept in a list; more are found again in each tile."""

TILE_ROWS = 256
TILE_LOGITS = 2**22

Tile = int | Literal["auto"] | None


@dataclass(frozen=True)
class Gathered:
    """The features of all processes, for a loss over the whole batch of which this process holds some rows.

    Row ``i`` of the local features is row ``offset + i`` here. The gathering must pass gradients back (sum over the
    processes), and the mean of the processes' losses is then the loss of the whole batch.

    Attributes:
        image: (m, D) image features of every process, in the order of their ranks.
        text: (m, D) text features, in the same order.
        offset: Where the local rows begin.
        keys: (m,) keys of every process, for losses that use keys.
    """

    image: Tensor
    text: Tensor
    offset: int = 0
    keys: Tensor | None = None


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    gathered: Gathered | None = None,
    tile: Tile = "auto",
) -> Tensor:
    """Return CLIP's symmetric loss: mean cross-entropy of finding the text of each image and the image of each text.

    Args:
        image: (n, D) L2-normalised image features; row ``i`` belongs to row ``i`` of ``text``.
        text: (n, D) L2-normalised text features.
        logit_scale: Multiplier of the cosines (not its logarithm), at most 100 by :func:`clamp_logit_scale`.
        gathered: The features of all processes, when there are several.
        tile: Rows of logits in memory at a time, computed again in the backward pass; ``None`` keeps all of them for it
            (faster by a sixth, n² numbers); ``"auto"`` keeps them up to :data:`ONE_MATRIX_LOGITS`.

    Returns:
        A 0-dim tensor ≥ 0; log n for features without information, 0 for a batch of one pair.

    Raises:
        InputError: For an empty batch, shapes that do not fit, or features or a scale that are not finite.

    References:
        Radford et al., 2021, figure 3, https://arxiv.org/abs/2103.00020. Deviation from open_clip: loss and gradient of
        nearly solved batches keep their digits at a logit scale of 100; float32 cross-entropy gives 0 and noise there.
    """
    image, text, scale = _checked(image, text, logit_scale)
    if gathered is None:
        return _apply(TiledInfoNCE, image, text, scale, Diagonal(len(image)), _plan(tile, len(image), len(text)))
    all_image, all_text, _ = _checked(gathered.image, gathered.text, logit_scale)
    _check_rows(image, all_image, gathered.offset)
    plan, pairs = _plan(tile, len(image), len(all_text), both=False), Diagonal(len(image), gathered.offset)
    to_text = _apply(TiledInfoNCE, image, all_text, scale, pairs, plan)
    to_image = _apply(TiledInfoNCE, text, all_image, scale, pairs, plan)
    return (to_text + to_image) / 2


def multi_positive_info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    targets: Tensor,
    *,
    gathered: Gathered | None = None,
    tile: Tile = "auto",
) -> Tensor:
    """Return InfoNCE in which an image may have several texts and a text several images, or soft targets.

    Medical batches hold duplicate captions, and a study has several images: those pairs are not negatives.

    Args:
        image: (n, D) L2-normalised image features.
        text: (n, D) L2-normalised text features.
        logit_scale: Multiplier of the cosines (not its logarithm).
        targets: Either (n,) integer keys, where rows with equal keys belong together (see :func:`positive_keys`; memory
            stays O(n · D)), or an (n, n) matrix of non-negative weights, image by text, normalised here over each row
            for images and over each column for texts. It is a constant: no gradient flows into it.
        gathered: The features and keys of all processes, when there are several (keys only).
        tile: As :func:`info_nce`; a matrix of targets, and keys that repeat often, are never kept.

    Returns:
        A 0-dim tensor: the mean of both directions' cross-entropy. Its minimum is the entropy of the targets (log k for
        k equal positives), not 0; with unique keys it equals :func:`info_nce`.

    Raises:
        InputError: For an empty batch, shapes that do not fit, values that are not finite, negative weights, or a row
            or column without any positive.

    References:
        Khosla et al., 2020, equation 2 (L_out), https://arxiv.org/abs/2004.11362, applied across modalities.
    """
    image, text, scale = _checked(image, text, logit_scale)
    if gathered is None:
        plan = _plan(tile, len(image), len(text))
        if targets.ndim == 1:
            keys = _check_keys(targets, len(image))
            return _with_keys(image, text, scale, keys, keys, plan)
        return _apply(TiledSoftInfoNCE, image, text, scale, _check_matrix(targets, image), plan)
    all_image, all_text, _ = _checked(gathered.image, gathered.text, logit_scale)
    _check_rows(image, all_image, gathered.offset)
    local, everywhere = _check_keys(targets, len(image)), _check_keys(gathered.keys, len(all_text))
    plan = _plan(tile, len(image), len(all_text), both=False)
    to_text = _with_keys(image, all_text, scale, local, everywhere, plan)
    to_image = _with_keys(text, all_image, scale, local, everywhere, plan)
    return (to_text + to_image) / 2


def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    keys: Tensor | None = None,
    gathered: Gathered | None = None,
    tile: Tile = "auto",
) -> Tensor:
    """Return the sigmoid loss: every pair of image and text is a yes-or-no question of its own.

    Args:
        image: (n, D) L2-normalised image features.
        text: (n, D) L2-normalised text features.
        logit_scale: Multiplier of the cosines; starts at :data:`SIGLIP_LOGIT_SCALE`.
        logit_bias: Added after the scale; starts at :data:`SIGLIP_LOGIT_BIAS`.
        keys: (n,) integers; rows with equal keys belong together. None: only row ``i`` with row ``i``.
        gathered: The texts (and keys) of all processes, when there are several.
        tile: Rows of logits in memory at a time; ``None`` and ``"auto"`` choose it. Nothing is kept or computed twice.

    Returns:
        A 0-dim tensor ≥ 0: the sum over all pairs divided by the number of images.

    Raises:
        InputError: For an empty batch, shapes that do not fit, or values that are not finite.

    References:
        Zhai et al., 2023, equation 1, https://arxiv.org/abs/2303.15343. Deviation: ``keys`` allow several positives.
    """
    image, text, scale = _checked(image, text, logit_scale)
    bias = _scalar(logit_bias, "logit bias", image)
    offset = 0
    columns, column_keys = text, keys
    if gathered is not None:
        _, columns, _ = _checked(gathered.image, gathered.text, logit_scale)
        offset, column_keys = gathered.offset, gathered.keys
        _check_rows(image, columns, offset)
    flip = None
    if keys is not None:
        by_key = KeyTargets(_check_keys(keys, len(image)), _check_keys(column_keys, len(columns)), image.dtype)

        def flip(values: Tensor, part: slice) -> None:
            values.copy_(torch.where(by_key.is_equal(part), -values, values))

    plan = _plan(tile, len(image), len(columns))
    return _apply(TiledSigLIP, image, columns, scale, bias, Diagonal(len(image), offset), flip, plan)


@torch.no_grad()
def clamp_logit_scale(log_scale: Tensor, *, low: float = 0.0, high: float = LOG_100) -> None:
    """Clamp the logarithm of the logit scale in place after a step, as CLIP does: the multiplier stays in [1, 100]."""
    log_scale.clamp_(low, high)


def positive_keys(values: Iterable[str | int]) -> Tensor:
    """Turn captions, study ids or label names into integer keys that are equal where the values are.

    The keys are hashes, so they agree between processes.

    Args:
        values: One value a row. Strings that differ in spaces at the ends, in case or in runs of spaces are
            the same caption.

    Returns:
        (n,) int64 tensor.

    Raises:
        InputError: For a value that is neither text nor integer; give rows without one a value of their own.
    """
    keys = []
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            raise InputError(
                f"key of row {row} must be text or an integer, got {type(value).__name__}",
                hint="give a row without a caption or study a value of its own, such as its id",
            )
        text = f"i{value}" if isinstance(value, int) else "s" + " ".join(value.split()).casefold()
        keys.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True))
    return torch.tensor(keys, dtype=torch.int64)


def positives_from_keys(keys: Tensor | Sequence[int], columns: Tensor | Sequence[int] | None = None) -> Tensor:
    """Return the dense matrix of targets: 1 where keys are equal, else 0; float32, shape (n, m).

    Only needed to look at or to soften targets: :func:`multi_positive_info_nce` takes the keys themselves.
    """
    rows = torch.as_tensor(keys)
    other = rows if columns is None else torch.as_tensor(columns)
    return (rows.unsqueeze(1) == other).to(torch.float32)


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _checked(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Return features and scale in the dtype of the loss after checking them."""
    for name, features in (("image", image), ("text", text)):
        if features.ndim != 2 or not features.is_floating_point():
            raise InputError(
                f"{name} features must be a float matrix (batch, dim), got {str(features.dtype)[6:]} "
                f"of shape {tuple(features.shape)}"
            )
    if image.shape != text.shape:
        raise InputError(
            f"image features {tuple(image.shape)} and text features {tuple(text.shape)} must have the same shape",
            hint="row i of both must belong together, in the same embedding space",
        )
    if image.numel() == 0:
        raise InputError(f"the batch is empty: features have shape {tuple(image.shape)}")
    dtype = torch.float64 if torch.float64 in (image.dtype, text.dtype) else torch.float32
    image, text = image.to(dtype), text.to(dtype)
    scale = _scalar(logit_scale, "logit scale", image)
    if not bool(torch.isfinite(image.sum() + text.sum())):  # one pass; NaN and infinity survive a sum
        raise InputError(
            "features hold NaN or infinite values", hint="lower the learning rate, or look for a broken image"
        )
    return image, text, scale


def _scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, device=like.device)
    if tensor.numel() != 1:
        raise InputError(f"the {name} must be one number, got shape {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"the {name} is not finite")
    return tensor.reshape(()).to(like.dtype)


def _check_rows(local: Tensor, everywhere: Tensor, offset: int) -> None:
    if local.shape[1] != everywhere.shape[1] or not 0 <= offset <= len(everywhere) - len(local):
        raise InputError(
            f"local features {tuple(local.shape)} at offset {offset} do not fit in {tuple(everywhere.shape)} gathered"
        )


def _check_keys(keys: Tensor | None, n: int) -> Tensor:
    if keys is None:
        raise InputError("keys are missing on one side", hint="pass Gathered(keys=...) together with local keys")
    if keys.ndim != 1 or keys.is_floating_point() or len(keys) != n:
        raise InputError(f"keys must be {n} integers, got {str(keys.dtype)[6:]} of shape {tuple(keys.shape)}")
    return keys


def _with_keys(
    rows: Tensor, columns: Tensor, scale: Tensor, row_keys: Tensor, column_keys: Tensor, plan: Plan
) -> Tensor:
    """Return the loss of targets given by keys, in the form that suits their number."""
    per_row, _ = counts_of(row_keys, column_keys)
    _check_sums(per_row, "row")
    if int(per_row.sum()) <= PAIRS_PER_ROW * len(rows):
        return _apply(TiledInfoNCE, rows, columns, scale, PairList(row_keys, column_keys), plan)
    return _apply(TiledSoftInfoNCE, rows, columns, scale, KeyTargets(row_keys, column_keys, rows.dtype), plan)


def _check_matrix(targets: Tensor, features: Tensor) -> DenseTargets:
    n = len(features)
    if targets.shape != (n, n):
        raise InputError(f"targets must be {n} keys or a ({n}, {n}) matrix, got shape {tuple(targets.shape)}")
    matrix = targets.detach().to(features.dtype)
    if not bool((torch.isfinite(matrix) & (matrix >= 0)).all()):
        raise InputError("targets must be finite and not negative")
    dense = DenseTargets(matrix)
    _check_sums(dense.row_sums, "row")
    _check_sums(dense.column_sums, "column")
    return dense


def _check_sums(sums: Tensor, name: str) -> None:
    empty = int((sums <= 0).sum())
    if empty:
        raise InputError(
            f"{empty} {name}(s) of the targets have no positive", hint="every pair belongs to itself at least"
        )


def _plan(tile: Tile, n: int, m: int, *, both: bool = True) -> Plan:
    """Choose the rows of a tile, and whether the logits are kept for the backward pass."""
    differentiate = torch.is_grad_enabled()
    if tile is None or tile == "auto":
        rows = max(64, min(TILE_ROWS, TILE_LOGITS // m))
        keep = differentiate and (tile is None or n * m <= ONE_MATRIX_LOGITS)
        return Plan(rows, both, keep, differentiate)
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise InputError(f"tile must be a positive number of rows, `auto` or None, got {tile!r}")
    return Plan(tile, both, differentiate=differentiate)
