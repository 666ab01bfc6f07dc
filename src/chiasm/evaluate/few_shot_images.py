"""What a few-shot curve must beat: a small CNN without pretraining, and six colour numbers with the nearest centroid.

In: the samples behind the embeddings (images that can be opened) and the draws of ``tasks.k_shot``. Out: methods of that
protocol. Both see the episode's validation rows too, as labelled images to learn from: they have no other use for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.datasets.images import open_sample_image
from chiasm.errors import InputError
from chiasm.tasks.k_shot import Draws, Episode, Method
from chiasm.types import Embeddings, Sample

FROM_SCRATCH, COLOUR = "from-scratch", "colour"
IMAGE_FILE_METHODS = (FROM_SCRATCH, COLOUR)
_COLOUR_SIDE = 32


def samples_of(images: Embeddings) -> tuple[Sample, ...]:
    """Return a sample with id, path and patient for each row.

    Raises:
        InputError: Rows that name no image file.
    """
    paths = images.paths or (None,) * len(images)
    absent = sum(p is None for p in paths)
    if absent:
        raise InputError(
            f"{absent} of {len(paths)} rows name no image file",
            hint="methods that look at pixels need the image files; give --table, or leave them out",
        )
    groups = images.groups
    return tuple(
        Sample(id=images.ids[i], image=Path(p), patient=groups[i]) for i, p in enumerate(paths) if p is not None
    )


def from_scratch_method(
    samples: Sequence[Sample],
    draws: Draws,
    *,
    image_size: int = 64,
    epochs: int = 30,
    min_steps: int = 120,
    augment: str = "chest",
) -> Method:
    """Return the CNN without pretraining; its epoch is chosen on patients of the rows that it learns from.

    Args:
        samples: All rows, in the order of the draws.
        draws: From :func:`chiasm.tasks.k_shot.draw_episodes`.
        image_size: Side in pixels.
        epochs: At most.
        min_steps: Few shots get more epochs until the optimiser has made so many steps.
        augment: Preset of :class:`~chiasm.data.augment.Augment`.
    """
    from chiasm.train.from_scratch import FromScratch, decode_images

    pixels = decode_images(samples, image_size)
    names = [f"{i:04d}" for i in range(len(draws.classes))]  # sorted as the classes are

    def method(episode: Episode) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
        rows = np.concatenate([episode.train, episode.validation])
        network = FromScratch(
            image_size=image_size, epochs=epochs, min_steps=min_steps, augment=augment, seed=episode.seed
        )
        network.fit(pixels[rows], [names[t] for t in draws.truth[rows]], [episode.patients[i] for i in rows])
        answer = np.asarray(network.predict_proba(pixels[episode.test]), dtype=np.float64)
        return answer, {"epoch": int(network.best_epoch_)}

    return method


def colour_method(samples: Sequence[Sample], draws: Draws) -> Method:
    """Return the floor: mean and spread of red, green and blue at 32 × 32 pixels, standardised, nearest class centroid."""
    numbers = colour_numbers(samples)

    def method(episode: Episode) -> tuple[NDArray[np.float64], Mapping[str, Any]]:
        rows = np.concatenate([episode.train, episode.validation])
        mean, std = numbers[rows].mean(axis=0), np.maximum(numbers[rows].std(axis=0), 1e-9)
        x, answered = (numbers[rows] - mean) / std, (numbers[episode.test] - mean) / std
        y = draws.truth[rows]
        centroids = np.stack([x[y == c].mean(axis=0) for c in range(len(draws.classes))])
        distance = np.linalg.norm(answered[:, None] - centroids[None], axis=2)
        weights = np.exp(distance.min(axis=1, keepdims=True) - distance)
        return weights / weights.sum(axis=1, keepdims=True), {}

    return method


def colour_numbers(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Return mean and standard deviation of R, G and B in [0, 1] at 32 × 32 pixels, shape (n, 6)."""
    found = []
    for sample in samples:
        small = open_sample_image(sample).convert("RGB").resize((_COLOUR_SIDE, _COLOUR_SIDE))
        pixels = np.asarray(small, dtype=np.float64).reshape(-1, 3) / 255
        found.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)]))
    return np.stack(found)
