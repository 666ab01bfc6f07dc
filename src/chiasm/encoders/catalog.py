"""The models that have a name: a table of configurations and facts. Light: torch is not imported.

In: nothing. Out: :data:`CATALOG`, and :data:`ARCHITECTURES` under open_clip's names. Figures are published ones, each
with its source; chiasm did not measure them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.errors import UnknownName
from chiasm.registry import Registry
from chiasm.types import Preprocess


@dataclass(frozen=True)
class Figure:
    """A published score.

    Attributes:
        task: What was done, on which data.
        metric: Name of the number.
        value: The number; fractions lie in [0, 1].
        source: Where it is printed.
    """

    task: str
    metric: str
    value: float
    source: str


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
        """Short description of the image tower."""
        image = self.config.image
        if image.kind == "vit":
            return f"ViT {image.width}x{image.layers}, patch {image.patch_size}"
        if image.kind == "resnet":
            blocks = "-".join(map(str, image.layers)) if isinstance(image.layers, tuple) else str(image.layers)
            return f"CLIP ResNet {blocks}"
        return f"{image.kind}: {image.source}"

    @property
    def text_tower(self) -> str:
        """Short description of the text tower."""
        text = self.config.text
        return f"CLIP {text.width}x{text.layers}, {text.context_length} tokens" if text.is_native else str(text.source)

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
            "image_size_px": self.image_size_px,
            "activation": self.config.image.activation if self.config.image.kind == "vit" else "relu",
            "tokenizer": dict(self.config.tokenizer),
            "preprocess": self.config.preprocess.to_dict(),
            "parameters": self.parameters,
            "licence": self.licence,
            "gate": self.gate,
            "layout": self.layout,
            "training_data": self.training_data,
            "weights": None if self.weights is None else vars(self.weights),
            "figures": [vars(f) for f in self.figures],
        }


class Catalog(Registry[CatalogEntry]):
    """The table, searchable by name and by alias; plug-ins add to it through ``chiasm.encoders``."""

    def get(self, name: str) -> CatalogEntry:
        """Return the entry called ``name``; a plug-in is imported if needed.

        Raises:
            UnknownName: No entry has this name or alias.
        """
        entry = self.find(name)
        if entry is None:
            short = [a for e in self._items.values() for a in e.aliases if not a.startswith("openai/")]
            known = [*self.names(), *ARCHITECTURES, *short]
            raise UnknownName(self.kind, name, known, hint=self.hint)
        return entry

    def find(self, name: str) -> CatalogEntry | None:
        """Return the entry of a name or alias, or None."""
        if name in self:
            return super().get(name)
        return next((e for e in self._items.values() if name in e.aliases), None)

    def entries(self) -> Iterator[CatalogEntry]:
        """Yield the built-in entries."""
        yield from self._items.values()


CATALOG = Catalog("model", "chiasm.encoders", hint="`chiasm models` lists them; a path to a file or folder also works")


def _clip(image: Mapping[str, Any], *, dim: int, width: int = 512) -> EncoderConfig:
    """OpenAI's shape: a text tower of 12 blocks, 64 channels a head, QuickGELU in both towers."""
    tower = ImageTowerConfig(**image)
    return EncoderConfig(
        image=tower,
        text=TextTowerConfig(width=width, layers=12, heads=width // 64),
        projection=ProjectionConfig(dim=dim),
        preprocess=Preprocess(size=tower.image_size),
    )


def _vit(patch_size: int, *, large: bool = False, image_size: int = 224) -> EncoderConfig:
    size = {"width": 1024, "layers": 24, "heads": 16} if large else {"width": 768, "layers": 12, "heads": 12}
    image = {"kind": "vit", "patch_size": patch_size, "image_size": image_size, **size}
    return _clip(image, dim=768 if large else 512, width=768 if large else 512)


def _resnet(*layers: int, dim: int) -> EncoderConfig:
    return _clip({"kind": "resnet", "layers": layers, "width": 64, "heads": 32}, dim=dim)


#: open_clip's names with QuickGELU, OpenAI's activation.
_OPENAI: Mapping[str, EncoderConfig] = {
    "ViT-B-32": _vit(32),
    "ViT-B-16": _vit(16),
    "ViT-L-14": _vit(14, large=True),
    "ViT-L-14-336": _vit(14, large=True, image_size=336),
    "RN50": _resnet(3, 4, 6, 3, dim=1024),
    "RN101": _resnet(3, 4, 23, 3, dim=512),
}


def with_gelu(config: EncoderConfig) -> EncoderConfig:
    """Return a configuration with exact GELU in both towers: what open_clip's plain names mean."""
    return replace(
        config,
        image=replace(config.image, activation="gelu"),
        text=replace(config.text, activation="gelu"),
    )


#: open_clip's architecture names: without a suffix GELU, with ``-quickgelu`` OpenAI's activation.
ARCHITECTURES: Mapping[str, EncoderConfig] = {
    **{name: with_gelu(config) for name, config in _OPENAI.items()},
    **{f"{name}-quickgelu": config for name, config in _OPENAI.items()},
}

_RESULTS = "open_clip docs/openclip_results.csv"
_ADDRESSES = "openai/CLIP clip/clip.py: the address holds the file's SHA-256"
_MIT = "MIT (repository openai/CLIP); its model card puts deployed use out of scope"
_WEB = "400 million image-text pairs from the internet, not released (Radford et al. 2021, section 2.2)"


def _openai(architecture: str, digest: str, parameters: int, scores: tuple[float, float, float], about: str) -> None:
    file = {"ViT-L-14-336": "ViT-L-14-336px"}.get(architecture, architecture)
    own = {"ViT-L-14-336": "ViT-L/14@336px"}.get(architecture, architecture.replace("-", "/").replace("ViT/", "ViT-"))
    tasks = ("ImageNet-1k zero-shot", "PCam zero-shot (2 classes)", "Camelyon17 zero-shot (2 classes)")
    name = f"openai/{file}"
    url = f"https://openaipublic.azureedge.net/clip/models/{digest}/{file}.pt"
    CATALOG.add(
        name,
        CatalogEntry(
            name=name,
            config=_OPENAI[architecture],
            aliases=tuple(sorted({own, f"openai/{own}", f"openai/{architecture}"} - {name, architecture})),
            weights=WeightSource(_ADDRESSES, url=url, sha256=digest),
            licence=_MIT,
            description=f"OpenAI's CLIP {own}, natural images: {about}",
            training_data=_WEB,
            parameters=parameters,
            figures=tuple(Figure(t, "top-1 accuracy", s, _RESULTS) for t, s in zip(tasks, scores, strict=True)),
        ),
    )


_openai(
    "ViT-B-32",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    151_277_313,
    (0.6332, 0.6224, 0.6061),
    "the fastest",
)
_openai(
    "ViT-B-16",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    149_620_737,
    (0.6834, 0.5072, 0.6808),
    "four times the patches of B/32",
)
_openai(
    "ViT-L-14",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    427_616_513,
    (0.7554, 0.5204, 0.6741),
    "the large one",
)
_openai(
    "ViT-L-14-336",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    427_944_193,
    (0.7656, 0.6073, 0.6456),
    "the large one at a finer resolution, the most accurate on natural images",
)
_openai(
    "RN50",
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    102_007_137,
    (0.5982, 0.6393, 0.5624),
    "a ResNet with attention pooling, older",
)
_openai(
    "RN101",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    119_688_033,
    (0.6228, 0.5819, 0.4723),
    "the deeper ResNet, older",
)
