"""CLIP for medical images: pretrain, classify, search and explain, offline and with honest statistics.

The public names load lazily (PEP 562): ``import chiasm`` imports neither torch nor NumPy-heavy modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chiasm.embed import embed_images, embed_texts
    from chiasm.encoders.base import Encoder
    from chiasm.errors import ChiasmError
    from chiasm.io.store import open_store
    from chiasm.load import create_model_and_transforms, get_tokenizer, list_models, load
    from chiasm.types import Embeddings, Interval, Preprocess, Sample, Space

_PUBLIC = {
    "load": "chiasm.load",
    "create_model_and_transforms": "chiasm.load",
    "get_tokenizer": "chiasm.load",
    "list_models": "chiasm.load",
    "Encoder": "chiasm.encoders.base",
    "embed_images": "chiasm.embed",
    "embed_texts": "chiasm.embed",
    "open_store": "chiasm.io.store",
    "ChiasmError": "chiasm.errors",
    "Embeddings": "chiasm.types",
    "Interval": "chiasm.types",
    "Preprocess": "chiasm.types",
    "Sample": "chiasm.types",
    "Space": "chiasm.types",
}

__all__ = [
    "ChiasmError",
    "Embeddings",
    "Encoder",
    "Interval",
    "Preprocess",
    "Sample",
    "Space",
    "__version__",
    "create_model_and_transforms",
    "embed_images",
    "embed_texts",
    "get_tokenizer",
    "list_models",
    "load",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'chiasm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
