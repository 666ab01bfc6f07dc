"""Distillation of text into an image classifier: how far a predicted text embedding is from the report's.

Comes in: predicted embeddings (batch, dim), target embeddings of the same shape, and which rows have a text. Goes out: a
scalar, the mean over the rows that have one; exactly 0, with zero gradients, when none has.

Notable choice: targets are constants. Every function cuts them off the graph itself, because a target that is trained
towards the prediction and anchored by nothing collapses to one vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import InputError


def cosine_kd(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return mean(1 - cos(target, predicted)), in [0, 2]; the lengths of both do not matter.

    Args:
        predicted: (batch, dim).
        target: (batch, dim); no gradient flows into it.
        mask: (batch,), False where a row has no text; None: all have one.

    Raises:
        InputError: Shapes that differ.

    References:
        Karimian et al. 2025, CLIP-IT, arXiv:2504.16181. Deviation: the target is detached.
    """
    rows = _with_text(predicted, target, mask)
    if rows is None:
        return nothing(predicted)
    return (1 - F.cosine_similarity(*rows, dim=-1)).mean()


def mse_kd(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared distance of the unit vectors, in [0, 4]: twice :func:`cosine_kd`.

    Args and errors: as :func:`cosine_kd`.
    """
    rows = _with_text(predicted, target, mask)
    if rows is None:
        return nothing(predicted)
    one, other = (F.normalize(r, dim=-1) for r in rows)
    return (one - other).square().sum(dim=-1).mean()


def relational_kd(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of the batch's two cosine matrices, over pairs of different rows, in [0, 4].

    Any rotation of the targets gives the same loss: only who resembles whom is taught. Fewer than two rows with text
    teach nothing.

    Args and errors: as :func:`cosine_kd`.

    References:
        Park et al. 2019, Relational Knowledge Distillation, arXiv:1904.05068. Deviation: cosines instead of distances.
    """
    rows = _with_text(predicted, target, mask)
    if rows is None or len(rows[0]) < 2:
        return nothing(predicted)
    one, other = (F.normalize(r, dim=-1) for r in rows)
    n = len(one)
    difference = (one @ one.T - other @ other.T).square()
    return (difference.sum() - difference.diagonal().sum()) / (n * (n - 1))


def logit_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), at least 0.

    Args:
        student: (batch, classes), logits on the predicted embedding.
        teacher: (batch, classes), logits on the target; no gradient flows into it.
        temperature: T; the factor T² keeps the gradients' size.
        mask: As :func:`cosine_kd`.

    Raises:
        InputError: Shapes that differ, or a temperature that is not positive.

    References:
        Hinton et al. 2015, arXiv:1503.02531.
    """
    if temperature <= 0:
        raise InputError(f"the temperature of distillation must be positive, got {temperature}")
    rows = _with_text(student, teacher, mask)
    if rows is None:
        return nothing(student)
    one, other = (F.log_softmax(r / temperature, dim=-1) for r in rows)
    return F.kl_div(one, other, reduction="batchmean", log_target=True) * temperature**2


def classification(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits, in nats.

    Args:
        logits: (batch, classes), unnormalised.
        labels: (batch,), class numbers.
        class_weights: (classes,); the mean is then the weighted one. None: all rows count alike.
    """
    return F.cross_entropy(logits, labels, weight=class_weights)


def ref_compat(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of the softmax *output*, as the published code of CLIP-IT computes it: to compare only.

    It takes probabilities for logits, so that a perfect answer still costs log(1 + (C - 1) / e): .3133, .7437 and 1.3720
    for 2, 4 and 9 classes. Its small gradients shift the balance towards the distillation term.

    Args: as :func:`classification`.
    """
    return F.cross_entropy(logits.softmax(dim=-1), labels, weight=class_weights)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Return n / (present classes · count) for each class of labels (n,): every class then weighs alike; absent ones 0."""
    counts = torch.bincount(labels, minlength=classes).to(torch.get_default_dtype())
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp_min(1))
    return torch.where(present, weights, torch.zeros_like(weights))


def nothing(like: Tensor) -> Tensor:
    """Return 0 that still hangs on ``like``, so that its gradients are zeros instead of absent."""
    return (like * 0).sum()


def _with_text(predicted: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the rows that have a text, the target cut off the graph; None when there is none."""
    if predicted.shape != target.shape or predicted.ndim != 2:
        raise InputError(
            f"predicted and target must share one shape (batch, dim), got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}"
        )
    target = target.detach()
    if mask is not None:
        if mask.shape != predicted.shape[:1]:
            raise InputError(f"the mask must have shape ({len(predicted)},), got {tuple(mask.shape)}")
        predicted, target = predicted[mask], target[mask]
    return (predicted, target) if len(predicted) else None
