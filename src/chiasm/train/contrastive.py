"""The contrastive step: a batch of pairs in, gradients in the parameters out.

Comes in: a model whose forward pass returns ``image_features``, ``text_features``, ``logit_scale`` (``logit_bias``),
and batches of pixels, tokens and keys. Goes out: gradients and the loss.

Three ways to a larger batch, which are not the same. *Accumulation* sums gradients of batches that never see each
other: less noise, no more negatives. *GradCache* contrasts the whole batch while only a chunk's activations are in
memory; its gradient is that of the whole batch, to rounding, so models whose BatchNorm would see a chunk in place of
the batch are refused. *More processes* contrast the pairs of all of them; BatchNorm sees those of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.losses.contrastive import (
    Gathered,
    Tile,
    clamp_logit_scale,
    info_nce,
    multi_positive_info_nce,
    positive_keys,
    positives_from_keys,
    siglip,
)
from chiasm.train.distributed import Group, finish_gradients, gather_constants, gather_rows, no_sync, wrap
from chiasm.train.precision import arithmetic, training_precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from chiasm.train.recipe import LossConfig, TrainConfig


class TextTokens(Protocol):
    """Token ids (n, tokens) and lengths (n,), as :class:`chiasm.data.tokenizers.Tokens` holds them.

    A cache of features may put float features (n, dim) into ``ids``.
    """

    @property
    def ids(self) -> Tensor:
        """Ids, padded on the right."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each text."""


class Pairs(NamedTuple):
    """One batch of image–text pairs.

    Attributes:
        pixels: (n, 3, height, width) float32, preprocessed; or cached features (n, dim).
        tokens: The texts.
        keys: Pairs with equal keys are right answers to each other.
    """

    pixels: Tensor
    tokens: TextTokens
    keys: Sequence[str]


class PairSource(Protocol):
    """Where batches come from: any class with a length and ``batch``."""

    def __len__(self) -> int:
        """Return the number of pairs."""

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Pairs:
        """Return the pairs of these rows; all randomness comes from ``rng``. Called from several threads."""


def contrastive_loss(
    features: dict[str, Tensor], keys: Sequence[str], *, config: LossConfig, group: Group | None = None
) -> Tensor:
    """Return the loss of unit features, in float32, with the pairs of all processes as negatives.

    Args:
        features: ``image_features`` and ``text_features`` (n, dim), ``logit_scale`` (multiplier), for SigLIP
            ``logit_bias``, for ``text_similarity`` also ``text_guide``.
        keys: Of the n pairs; ``infonce`` does not look at them.
        config: Which loss.
        group: None: this process alone.

    Returns:
        A 0-dim tensor; NaN without a gradient when features or scale are not finite (on every process then).
    """
    group = group or Group()
    image, text = _unit(features["image_features"]), _unit(features["text_features"])
    scale = features["logit_scale"].float()
    tile: Tile = None if config.tile == "full" else config.tile
    by_key = positive_keys(keys).to(image.device) if config.kind != "infonce" and config.positives != "none" else None
    everywhere: Gathered | None = None
    if group.world > 1:
        all_keys = None if by_key is None else gather_constants(by_key, group)
        everywhere = Gathered(gather_rows(image, group), gather_rows(text, group), group.rank * len(image), all_keys)
    checked = (image, text, scale) if everywhere is None else (everywhere.image, everywhere.text, scale)
    if not all(bool(torch.isfinite(t).all()) for t in checked):
        return torch.full((), torch.nan, device=image.device)
    if config.kind == "siglip":
        bias = features["logit_bias"].float()
        return siglip(image, text, scale, bias, keys=by_key, gathered=everywhere, tile=tile)
    if config.text_similarity:
        _check_guide(features, group)
        targets = softened_targets(features["text_guide"], by_key, config=config)
        return multi_positive_info_nce(image, text, scale, targets, tile=tile)
    if by_key is not None:
        return multi_positive_info_nce(image, text, scale, by_key, gathered=everywhere, tile=tile)
    return info_nce(image, text, scale, gathered=everywhere, tile=tile)


def softened_targets(guide: Tensor, keys: Tensor | None, *, config: LossConfig) -> Tensor:
    """Return how right each text is for each image (n, n): the right ones, softened by what resembles them.

    Two images of one disease have different captions, and calling one's caption wrong for the other teaches little.

    Args:
        guide: (n, width) unit features of the texts by a tower that does not train.
        keys: (n,) integers, equal for right answers; None: the diagonal alone.
        config: ``text_similarity`` is the share of the softmax over resemblance, ``text_similarity_scale`` its scale.

    Returns:
        Rows that sum to 1.

    References:
        The idea of softened targets: Gao et al., 2023, SoftCLIP, https://arxiv.org/abs/2303.17561. Deviation: the guide
        is the locked text tower alone.
    """
    guide = guide.detach().float()
    right = torch.eye(len(guide), device=guide.device) if keys is None else positives_from_keys(keys)
    right = right / right.sum(1, keepdim=True)
    alike = torch.softmax(config.text_similarity_scale * guide @ guide.T, dim=1)
    return torch.lerp(right, alike, config.text_similarity)


def _check_guide(features: dict[str, Tensor], group: Group) -> None:
    if "text_guide" not in features:
        raise ConfigError(
            "`loss.text_similarity` needs a locked text tower and its cached features",
            hint="set `text.freeze = true` without `text.lora`, and `run.cache_features = true`",
        )
    if group.world > 1:
        raise ConfigError("`loss.text_similarity` works in one process only", hint="start one process")


def _unit(rows: Tensor) -> Tensor:
    # The model normalises, but under autocast in half precision.
    return rows if rows.dtype in (torch.float32, torch.float64) else F.normalize(rows.float(), dim=-1)


class ContrastiveTask:
    """What the loop trains: a dual encoder on pairs.

    Args:
        model: Forward pass ``(pixels, ids, lengths)`` -> features as :func:`contrastive_loss` wants them.
        config: Loss, precision and chunk size.
        group: The processes; with more than one, what is called is wrapped in DistributedDataParallel, or its weights
            are spread over them (``run.shard``).
        called: Module around ``model`` that is called in its place (``features.LockedSides``); None: ``model``.

    Attributes:
        model: As given, for saving and validating.
        module: What is called in training.
        precision: ``fp32`` or ``bf16``, what ``auto`` means here.
    """

    def __init__(
        self, model: nn.Module, *, config: TrainConfig, group: Group | None = None, called: nn.Module | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.group = group or Group()
        self.module = wrap(called or model, self.group, shard=config.run.shard)
        self.device = next(model.parameters()).device
        self.precision = training_precision(config.optim.precision, self.device)

    def backward(self, batch: Pairs, *, weight: float = 1.0, sync: bool = True) -> float:
        """Add the gradients of ``weight`` × loss to the parameters and return the loss.

        Args:
            batch: This process's part of the batch.
            weight: 1 / number of accumulated batches.
            sync: Whether gradients are exchanged between processes now; only the last accumulated batch needs to.
        """
        batch = self._placed(batch)
        chunk = self.config.optim.grad_cache_chunk
        if chunk is not None and chunk < len(batch.keys):
            value = self._backward_cached(batch, weight, sync, chunk)
        else:
            value = self._backward_whole(batch, weight, sync)
        if sync:
            finish_gradients(self.module, self.group)
        return value

    def after_step(self) -> None:
        """Keep the multiplier of cosines at or below 100."""
        log_scale = getattr(self.model, "logit_scale", None)
        if isinstance(log_scale, nn.Parameter):
            clamp_logit_scale(log_scale)

    def metrics(self) -> dict[str, float]:
        """Return what is worth logging beside the loss."""
        log_scale = getattr(self.model, "logit_scale", None)
        return {} if log_scale is None else {"logit_scale": float(log_scale.detach().exp())}

    def _placed(self, batch: Pairs) -> Pairs:
        if self.device.type == "cpu":
            return batch
        lengths = batch.tokens.lengths
        tokens = _Text(
            batch.tokens.ids.to(self.device, non_blocking=True),
            None if lengths is None else lengths.to(self.device, non_blocking=True),
        )
        return Pairs(batch.pixels.to(self.device, non_blocking=True), tokens, batch.keys)

    def _features(self, batch: Pairs) -> dict[str, Tensor]:
        with arithmetic(self.precision, self.device):
            features: dict[str, Tensor] = self.module(batch.pixels, batch.tokens.ids, batch.tokens.lengths)
        return features

    def _loss(self, features: dict[str, Tensor], keys: Sequence[str]) -> Tensor:
        return contrastive_loss(features, keys, config=self.config.loss, group=self.group)

    def _backward_whole(self, batch: Pairs, weight: float, sync: bool) -> float:
        with nullcontext() if sync else no_sync(self.module):
            loss = self._loss(self._features(batch), batch.keys)
            if loss.requires_grad:
                (loss * weight).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _backward_cached(self, batch: Pairs, weight: float, sync: bool, chunk: int) -> float:
        """Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3.2."""
        _check_batch_statistics(self.model, chunk)
        parts = [slice(i, min(i + chunk, len(batch.keys))) for i in range(0, len(batch.keys), chunk)]
        states, collected = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_random_state(self.device))
                collected.append(self._features(_part(batch, part)))
        features = {
            name: torch.cat([c[name] for c in collected]) if value.ndim else value
            for name, value in collected[0].items()
        }
        leaves = {name: value.detach().requires_grad_() for name, value in features.items()}
        loss = self._loss(leaves, batch.keys)
        if not loss.requires_grad:
            return float(loss)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        after = _random_state(self.device)
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            _set_random_state(states[i], self.device)
            with nullcontext() if sync and is_last else no_sync(self.module):
                again = self._features(_part(batch, part))
                outputs, gradients = [], []
                for name, leaf in leaves.items():
                    if leaf.grad is None or not again[name].requires_grad:
                        continue
                    if leaf.ndim or is_last:  # scale and bias enter the loss once
                        outputs.append(again[name])
                        gradients.append(leaf.grad[part] if leaf.ndim else leaf.grad)
                torch.autograd.backward(outputs, gradients)
        _set_random_state(after, self.device)
        return float(loss.detach())


class _Text(NamedTuple):
    ids: Tensor
    lengths: Tensor | None


def _part(batch: Pairs, part: slice) -> Pairs:
    lengths = batch.tokens.lengths
    tokens = _Text(batch.tokens.ids[part], None if lengths is None else lengths[part])
    return Pairs(batch.pixels[part], tokens, batch.keys[part])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _check_batch_statistics(model: nn.Module, chunk: int) -> None:
    """Refuse layers that would normalise each chunk by itself: neither loss nor gradient would be the batch's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"`optim.grad_cache_chunk` is {chunk}, but `{name}` normalises by the statistics of its batch, which "
                "a chunk does not have",
                hint="leave `grad_cache_chunk` out (`accumulate` saves memory, too), lock the tower with "
                "`freeze = true`, or leave it out of `projection.standardize`",
            )
