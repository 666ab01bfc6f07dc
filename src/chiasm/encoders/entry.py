"""What is said about a model that has a name: its declaration, its files, what is known about it.

In: nothing. Out: :class:`CatalogEntry`, of which ``encoders.models`` holds one file per family. torch is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from chiasm.encoders.base import EncoderConfig


@dataclass(frozen=True)
class Figure:
    """A published score.

    Attributes:
        task: What was done, on which data.
        metric: Name of the number.
        value: The number; fractions lie in [0, 1].
        source: Where it is printed.
        on: Key of the data set (``models/datasets.toml``); empty in figures of plug-ins.
        kind: How the number came to be: ``zero-shot`` without any label, ``retrieval`` of the partner; with labels
            ``probe`` (linear classifier on frozen features), ``neighbours`` (k nearest), ``slide`` (aggregation over
            a slide) or ``fine-tuned``.
    """

    task: str
    metric: str
    value: float
    source: str
    on: str = ""
    kind: Literal["zero-shot", "retrieval", "probe", "neighbours", "slide", "fine-tuned"] = "zero-shot"


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from: an address, a repository of the Hugging Face hub, or somebody to ask.

    Attributes:
        source: Where this is printed.
        url: Official address of the file.
        sha256: Of the file at ``url``.
        repository: Name on the hub.
        files: In the repository: what to fetch (glob patterns); the weights' file first.
        revision: Documented revision of the repository; empty: none is known, the one of the first download counts.
        ask: For weights that are handed out on request: where to ask, and for which file.
    """

    source: str
    url: str = ""
    sha256: str = ""
    repository: str = ""
    files: tuple[str, ...] = ()
    revision: str = ""
    ask: str = ""

    @property
    def file_name(self) -> str:
        """Name of the weights' file."""
        return self.url.rsplit("/", 1)[-1] or (self.files[0] if self.files else "")


@dataclass(frozen=True)
class CatalogEntry:
    """One model: what it is, where its weights come from, what is known about it.

    What is known (licence, gate, description, training data, figures) lies in ``models/facts.toml`` and is joined by
    name when the catalog hands the entry out (``encoders.facts``); a plug-in states it here.

    Attributes:
        name: Its name in chiasm.
        config: Its configuration.
        aliases: Other names that ``load`` understands.
        layout: Key layout of its files (``checkpoints.layouts``).
        weights: Where the files come from; None when that is not known.
        licence: Of the weights.
        gate: ``open``: anybody may download; ``agreement``: after accepting terms with an account; ``request``: handed
            out by the authors.
        description: One sentence.
        training_data: What it was trained on, with the source.
        parameters: Number of weights.
        figures: Published scores.
    """

    name: str
    config: EncoderConfig
    aliases: tuple[str, ...] = ()
    layout: str = "openai"
    weights: WeightSource | None = None
    licence: str = ""
    gate: Literal["open", "agreement", "request"] = "open"
    description: str = ""
    training_data: str = ""
    parameters: int = 0
    figures: tuple[Figure, ...] = field(default=())

    @property
    def image_tower(self) -> str:
        """Short description of the image tower; empty where there is none."""
        image = self.config.image
        if not self.config.has_image:
            return ""
        if image.kind == "vit":
            return f"ViT {image.width}x{image.layers}, patch {image.patch_size}"
        if image.kind == "resnet":
            blocks = "-".join(map(str, image.layers)) if isinstance(image.layers, tuple) else str(image.layers)
            return f"CLIP ResNet {blocks}"
        return f"{image.kind}: {image.source}"

    @property
    def text_tower(self) -> str:
        """Short description of the text tower; empty where there is none."""
        text = self.config.text
        if not self.config.has_text:
            return ""
        return f"CLIP {text.width}x{text.layers}, {text.context_length} tokens" if text.is_native else str(text.source)

    @property
    def activation(self) -> str | None:
        """Activation of a native image tower, else of a native text tower; None: others have their own."""
        if self.config.has_image:
            return {"vit": self.config.image.activation, "resnet": "relu"}.get(self.config.image.kind)
        return self.config.text.activation if self.config.text.is_native else None

    @property
    def dim(self) -> int:
        """Dimensions of the joint space."""
        return self.config.projection.dim

    @property
    def image_size_px(self) -> int:
        """Side of the input."""
        return self.config.image.image_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "description": self.description,
            "image_tower": self.image_tower,
            "text_tower": self.text_tower,
            "dim": self.dim,
            "image_size_px": self.image_size_px if self.config.has_image else None,
            "activation": self.activation,
            "tokenizer": dict(self.config.tokenizer) if self.config.has_text else None,
            "preprocess": self.config.preprocess.to_dict() if self.config.has_image else None,
            "parameters": self.parameters,
            "licence": self.licence,
            "gate": self.gate,
            "layout": self.layout,
            "training_data": self.training_data,
            "weights": None if self.weights is None else vars(self.weights),
            "figures": [vars(f) for f in self.figures],
        }
