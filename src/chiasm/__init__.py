"""CLIP for medical images: pretrain, classify, search and explain, offline and with honest statistics.

The public names load lazily (PEP 562): ``import chiasm`` imports neither torch nor NumPy-heavy modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Callable

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


def _load(
    name_or_path: Any,
    *,
    device: Any = "cpu",
    allow_code: bool = False,
    pretrained: Any = None,
    family: str | None = None,
    activation: str | None = None,
) -> Encoder:
    """Load an encoder by a name that ``chiasm models`` lists, an address or a path: see :func:`chiasm.load.load`.

    Weights that are absent are missed before torch, which takes seconds, is imported.
    """
    from chiasm.fetch import prepare

    prepare(name_or_path, pretrained=pretrained)
    loader: Callable[..., Encoder] = import_module("chiasm.load").load
    return loader(
        name_or_path,
        device=device,
        allow_code=allow_code,
        pretrained=pretrained,
        family=family,
        activation=activation,
    )


def _create(name: Any, pretrained: Any = None, **options: Any) -> Any:
    """Return model and transforms, as open_clip does: see :func:`chiasm.load.create_model_and_transforms`."""
    from chiasm.fetch import prepare

    prepare(name, pretrained=pretrained)
    return import_module("chiasm.load").create_model_and_transforms(name, pretrained, **options)


#: What fetches weights looks for them before it imports the module, which imports torch. Once somebody has imported
#: ``chiasm.load``, that module itself stands under this name; it can be called just so.
_EARLY = {"load": _load, "create_model_and_transforms": _create}


def __getattr__(name: str) -> Any:
    if name in _EARLY:
        return _EARLY[name]
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'chiasm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
