"""How good a model is on held-out pairs: the loss, retrieval both ways, the choice among few texts.

Comes in: a model and a source of pairs that training never sees. Goes out: plain numbers to select by. Pairs with equal
keys are right answers to each other. Honest intervals for a report come from ``evaluate``; these numbers select.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import TrainingError
from chiasm.metrics.classification import balanced_accuracy
from chiasm.metrics.retrieval import median_rank, ranks_of_relevant, recall_at_k
from chiasm.train.contrastive import PairSource, contrastive_loss
from chiasm.train.precision import arithmetic, training_precision
from chiasm.train.recipe import TrainConfig

#: Up to this many distinct texts, finding an image's own among them is classification.
MAX_CLASSES = 100
RECALLS = (1, 5, 10)


class Validation:
    """Metrics of a model on held-out pairs; call it in eval mode.

    Args:
        model: Forward pass as :class:`chiasm.train.contrastive.ContrastiveTask` wants it.
        source: Held-out pairs.
        config: Loss, precision, batch size, and the limit on pairs.

    Attributes:
        rows: The pairs used: all, or an even sample of ``run.validation_limit``.
    """

    def __init__(self, model: nn.Module, source: PairSource, *, config: TrainConfig) -> None:
        self.model = model
        self.source = source
        self.config = config
        count = min(len(source), config.run.validation_limit)
        chosen = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
        # A fixed shuffle: neighbours in a table are often of one patient, and would be easy or false negatives.
        self.rows = np.random.default_rng(0).permutation(chosen)

    def __call__(self) -> dict[str, float]:
        """Return ``loss``, ``recall_at_1|5|10`` and ``median_rank`` (means of both directions), each direction.

        ``text_choice_accuracy`` is there when images share few texts: the balanced accuracy of finding an image's text
        among the distinct ones, each being the mean of its variants.

        Raises:
            TrainingError: Embeddings that are not numbers: the last step has broken the weights.
        """
        image, text, keys, loss = self._embed()
        broken = int((~(torch.isfinite(image).all(1) & torch.isfinite(text).all(1))).sum())
        if broken:
            raise TrainingError(
                f"{broken} of {len(image)} held-out pairs have embeddings that are not numbers; what was saved before "
                "is kept",
                hint="lower `optim.lr`, lengthen the warm-up, or set `optim.precision` to `fp32`",
            )
        similarity = (image @ text.T).numpy()
        metrics = {"loss": loss}
        codes = np.unique(np.array(keys), return_inverse=True)[1]
        relevant = codes[:, None] == codes[None, :]
        both = []
        for name, matrix, right in (
            ("image_to_text", similarity, relevant),
            ("text_to_image", similarity.T, relevant.T),
        ):
            ranks = ranks_of_relevant(matrix, right)
            values = {f"recall_at_{k}": float(recall_at_k(ranks, k)) for k in RECALLS}
            values["median_rank"] = float(median_rank(ranks))
            both.append(values)
            metrics.update({f"{name}_{k}": v for k, v in values.items()})
        metrics.update({k: (both[0][k] + both[1][k]) / 2 for k in both[0]})
        if 1 < codes.max() + 1 <= min(MAX_CLASSES, len(codes) // 2):
            metrics["text_choice_accuracy"] = _choice_accuracy(image, text, codes)
        return metrics

    def _embed(self) -> tuple[Tensor, Tensor, list[str], float]:
        device = next(self.model.parameters()).device
        precision = training_precision(self.config.optim.precision, device)
        images, texts, keys = [], [], []
        losses, weights = [], []
        size = max(2, self.config.optim.batch_size)
        with torch.no_grad(), arithmetic(precision, device):
            for start in range(0, len(self.rows), size):
                batch = self.source.batch(self.rows[start : start + size], np.random.default_rng(0))
                lengths: Any = batch.tokens.lengths
                features = self.model(
                    batch.pixels.to(device),
                    batch.tokens.ids.to(device),
                    None if lengths is None else lengths.to(device),
                )
                losses.append(float(contrastive_loss(features, batch.keys, config=self.config.loss)))
                weights.append(len(batch.keys))
                images.append(features["image_features"].float().cpu())
                texts.append(features["text_features"].float().cpu())
                keys += list(batch.keys)
        return torch.cat(images), torch.cat(texts), keys, float(np.average(losses, weights=weights))


def _choice_accuracy(image: Tensor, text: Tensor, codes: NDArray[np.int64]) -> float:
    classes = int(codes.max()) + 1
    sums = torch.zeros(classes, text.shape[1]).index_add_(0, torch.from_numpy(codes), text)
    predicted = (image @ nn.functional.normalize(sums, dim=1).T).argmax(1).numpy()
    return float(balanced_accuracy(codes, predicted))
