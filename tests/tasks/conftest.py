"""Embeddings for the tests of tasks: made directions, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import ArrayLike

from chiasm.types import Embeddings, Modality, Space

settings.register_profile("untimed", deadline=None)  # first calls import and allocate
settings.load_profile("untimed")


def space_of(dim: int, name: str = "made") -> Space:
    return Space(name, "0" * 12, "1" * 12, dim)


def embeddings(
    vectors: ArrayLike, modality: Modality = "image", *, name: str = "made", prefix: str = "r", **fields: Any
) -> Embeddings:
    array = np.asarray(vectors, dtype=np.float32)
    fields.setdefault("normalized", False)
    ids = tuple(f"{prefix}{i}" for i in range(len(array)))
    return Embeddings(array, ids, space_of(array.shape[1], name), modality, **fields)


def text_embedder(directions: Mapping[str, ArrayLike], **fields: Any) -> Callable[[list[str]], Embeddings]:
    """Embed known texts by looking them up."""

    def embed(texts: list[str]) -> Embeddings:
        return embeddings([directions[t] for t in texts], "text", texts=tuple(texts), **fields)

    return embed


@pytest.fixture(scope="session")
def make() -> Callable[..., Embeddings]:
    return embeddings


@pytest.fixture(scope="session")
def embedder() -> Callable[..., Callable[[list[str]], Embeddings]]:
    return text_embedder
