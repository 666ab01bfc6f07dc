"""A vision classifier: an image tower, CLIP-IT's heads, class names. No text, no text encoder, no corpus.

In: images (or features, where there was never an image). Out: class probabilities. On disk it is a folder with
``classifier.json`` and ``model.safetensors``, written atomically and read strictly; nothing in it is run. Neither this
module nor what it loads needs transformers, a tokenizer or any other text package, unless the tower itself is a model
of transformers or has adapters of peft that were not merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.checkpoints import native
from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.device import find_device
from chiasm.encoders.fill import fill_module, filled_backbone
from chiasm.encoders.fold import FoldedConfig, FoldedHeads
from chiasm.encoders.heads import DistilledHeads, HeadsConfig
from chiasm.errors import CheckpointError, ConfigError, InputError
from chiasm.io.manifest import RejectLog, to_json
from chiasm.types import Preprocess, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.progress import Progress

__all__ = [
    "ClassifierFacts",
    "Predictions",
    "VisionClassifier",
    "find_classifier",
    "is_classifier",
    "load_classifier",
    "predict_images",
    "save_classifier",
]

#: What is left of an encoder's declaration when its text side is gone.
_IMAGE_FIELDS = ("image", "projection", "preprocess", "sides")
#: Where a run of ``chiasm distill`` keeps its classifier.
RUN_FOLDER = "model"
ClassifierFacts = Mapping[str, Any]


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of some images.

    Attributes:
        ids: One per row: path or position of an image, or the sample's own id.
        classes: Names in the order of the columns.
        probabilities: (n, classes), float64, rows sum to 1.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def best(self) -> tuple[str, ...]:
        """The most probable class of each row; of equal ones the first."""
        return tuple(self.classes[int(i)] for i in self.probabilities.argmax(1))


class VisionClassifier(nn.Module):
    """An image tower with heads.

    Args:
        tower: Pixels (batch, 3, size, size) -> (batch, ``heads.config.width``); None for a classifier of features.
        heads: :class:`DistilledHeads`, or the same folded.
        classes: Names in the order of the logits.
        config: What the tower was built from (only its image side counts); None without a tower.
        projected: Whether the tower's vectors are those of the joint space, or its own output before the projection.
        label: What the classes are of (a column: ``tissue``).
        name: For people.
        temperature: Logits are divided by it before the softmax (Guo et al. 2017); None: 1.
        facts: JSON values about data, training and measured quality; see :func:`save_classifier`.

    Raises:
        InputError: Names, widths or temperature that do not fit.
    """

    def __init__(
        self,
        tower: nn.Module | None,
        heads: DistilledHeads | FoldedHeads,
        *,
        classes: Sequence[str],
        config: EncoderConfig | None = None,
        projected: bool = False,
        label: str = "class",
        name: str = "classifier",
        temperature: float | None = None,
        facts: ClassifierFacts | None = None,
    ) -> None:
        super().__init__()
        if (tower is None) != (config is None):
            raise InputError("a tower and its configuration belong together")
        if len(classes) != heads.config.classes or len(set(classes)) != len(classes):
            raise InputError(f"{len(classes)} class names for {heads.config.classes} logits; each must be there once")
        if temperature is not None and not 0 < temperature < float("inf"):
            raise InputError(f"the temperature must be positive and finite, got {temperature}")
        width = getattr(tower, "output_dim", heads.config.width)
        if width != heads.config.width:
            raise InputError(f"the tower gives {width} numbers an image, the heads take {heads.config.width}")
        self.tower = tower
        self.heads = heads
        self.config = config
        self.projected = projected
        self.classes = tuple(classes)
        self.label = label
        self.name = name
        self.temperature = temperature
        self.facts: dict[str, Any] = dict(facts or {})

    @property
    def preprocess(self) -> Preprocess | None:
        """How images are prepared; None for a classifier of features."""
        return None if self.config is None else self.config.preprocess

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.heads.parameters()).device

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (batch, classes) of pixels (batch, 3, size, size), or of features where there is no tower."""
        features = inputs if self.tower is None else self.tower(inputs)
        out = self.heads(features)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits

    def logits(self, inputs: Tensor | NDArray[Any]) -> Tensor:
        """Return logits (batch, classes) in eval mode and without gradients; see :meth:`forward`.

        Raises:
            InputError: A batch of another shape.
        """
        batch = torch.as_tensor(inputs)
        if self.tower is None and (batch.ndim != 2 or batch.shape[1] != self.heads.config.width):
            raise InputError(
                f"features have shape {tuple(batch.shape)}, this classifier takes (batch, {self.heads.config.width})",
                hint="it was trained on features and knows no image; compute them as for training",
            )
        self.eval()
        with torch.inference_mode():
            found: Tensor = self(batch.to(self.device, torch.float32))
        return found

    def probabilities(self, inputs: Tensor | NDArray[Any]) -> NDArray[np.float64]:
        """Return the softmax of ``logits / temperature``: (batch, classes), float64."""
        logits = self.logits(inputs).double() / (self.temperature or 1.0)
        found: NDArray[np.float64] = logits.softmax(1).cpu().numpy()
        return found

    def predict(
        self,
        images: Sequence[Sample | Path | str | Image] | NDArray[Any] | Tensor,
        *,
        batch_size: int = 32,
        workers: int = 2,
        rejects: RejectLog | None = None,
        progress: Progress | None = None,
    ) -> Predictions:
        """Return class probabilities of images, in order.

        Args:
            images: Samples, paths or Pillow images; for a classifier of features an array (n, width).
            batch_size: Images a forward pass.
            workers: Threads that decode; 0 decodes in this one.
            rejects: Where images are noted that cannot be read; they are left out. None: the first one raises.
            progress: Told about every batch.

        Raises:
            InputError: Nothing can be used; images for a classifier of features, or the reverse.
        """
        if self.tower is None:
            return self._predict_features(images)
        if isinstance(images, np.ndarray | Tensor):
            raise InputError(
                "this classifier takes images, got an array", hint="give paths, or prepared pixels to `probabilities`"
            )
        assert self.config is not None
        return predict_images(
            images,
            self.probabilities,
            classes=self.classes,
            preprocess=self.config.preprocess,
            batch_size=batch_size,
            workers=workers,
            rejects=rejects,
            progress=progress,
        )

    def _predict_features(self, features: Any) -> Predictions:
        if not isinstance(features, np.ndarray | Tensor):
            raise InputError(
                "this classifier was trained on features and knows no image",
                hint=f"give an array of features, shape (n, {self.heads.config.width})",
            )
        found = self.probabilities(features)
        return Predictions(tuple(str(i) for i in range(len(found))), self.classes, found)


def predict_images(
    images: Sequence[Sample | Path | str | Image],
    score: Callable[[Tensor], NDArray[np.float64]],
    *,
    classes: Sequence[str],
    preprocess: Preprocess,
    batch_size: int = 32,
    workers: int = 2,
    rejects: RejectLog | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Decode, prepare and score images; see :meth:`VisionClassifier.predict`.

    Args:
        images: Samples, paths or Pillow images.
        score: Prepared pixels (batch, 3, size, size) -> probabilities (batch, classes).
        classes: Names of the columns.
        preprocess: How images are prepared.
        batch_size: Images a call.
        workers: Threads that decode.
        rejects: Where unreadable images are noted; None: the first one raises.
        progress: Told about every batch.

    Raises:
        InputError: Nothing can be used.
    """
    from chiasm.data.loader import Batches
    from chiasm.data.transforms import image_transform
    from chiasm.progress import SilentProgress

    prepare = image_transform(preprocess)
    pictures = {i: x for i, x in enumerate(images) if not isinstance(x, Sample | Path | str)}
    samples = [_sample(i, x, i in pictures) for i, x in enumerate(images)]

    def read(row: int, _: np.random.Generator) -> Tensor:
        return prepare(pictures[row] if row in pictures else _open(samples[row]))

    on_bad: Any = "fail" if rejects is None else "skip"
    loader = Batches(samples, batch_size=batch_size, load=read, workers=workers, on_bad=on_bad, rejects=rejects)
    bar = progress or SilentProgress()
    ids: list[str] = []
    found = [np.zeros((0, len(classes)))]
    bar.start(len(samples), "classifying")
    try:
        for batch in loader:
            found.append(score(torch.stack(batch.items)))
            ids.extend(samples[row].id for row in batch.rows)
            bar.advance(len(batch.rows))
    finally:
        bar.finish()
    if not ids:
        raise InputError(f"none of {len(samples)} images can be read", hint="give PNG, JPEG or TIFF files")
    return Predictions(tuple(ids), tuple(classes), np.concatenate(found))


def save_classifier(
    directory: str | Path,
    heads: DistilledHeads | FoldedHeads,
    *,
    classes: Sequence[str],
    tower: nn.Module | None = None,
    config: EncoderConfig | None = None,
    projected: bool = False,
    label: str = "class",
    name: str = "classifier",
    temperature: float | None = None,
    facts: ClassifierFacts | None = None,
    recipe: str | None = None,
) -> Path:
    """Write a classifier as a folder, replacing the one that is there; atomic.

    Args:
        directory: Created when absent; other files in it are left alone.
        heads: Trained heads.
        classes: Names in the order of the logits.
        tower: Pixels -> features, as :func:`chiasm.encoders.image_side.build_backbone` or ``without_projection`` give
            it; a whole ``DualEncoder`` may be given, of which the image side is taken. LoRA adapters that are not
            merged are stored as such. None: a classifier of features (no image exists).
        config: Declaration of the encoder that the tower is part of (``encoder.config``), with ``image.lora`` as it was
            applied; its text side is not stored. None without a tower.
        projected: See :class:`VisionClassifier`.
        label: What the classes are of.
        name: For people.
        temperature: See :class:`VisionClassifier`.
        facts: JSON values about how it came to be. Read by ``chiasm classify``: ``data`` (name of the data set),
            ``balanced_accuracy`` (:meth:`chiasm.types.Interval.to_dict` on the test images), ``note`` (one sentence
            that a reader must know, such as labels that were made noisy on purpose). No paths, no patient data.
        recipe: Text of the resolved recipe.

    Returns:
        The directory.

    Raises:
        InputError: Parts that do not fit together.
        CheckpointError: The files cannot be written; what was there before is intact.
    """
    whole: Any = tower
    if hasattr(whole, "image_side"):
        tower = whole.image_side() if projected else _bare(whole.image_side())
    checked = VisionClassifier(
        tower, heads, classes=classes, config=config, projected=projected, label=label, name=name,
        temperature=temperature, facts=facts,
    )  # fmt: skip
    state = checked.state_dict()
    described: dict[str, Any] = {
        "classes": list(checked.classes),
        "label": label,
        "temperature": temperature,
        "projected": projected,
        "tower": None if config is None or tower is None else _image_declaration(config, tower, projected),
    }
    described["folded" if isinstance(heads, FoldedHeads) else "heads"] = heads.config.to_dict()
    return native.save_model_dir(
        directory,
        state,
        name=name,
        config=described,
        training=json.loads(to_json(dict(facts or {}))),
        recipe=recipe,
        form=native.CLASSIFIER,
    )


def load_classifier(
    path: str | Path, *, device: str | torch.device = "cpu", allow_code: bool = False
) -> VisionClassifier:
    """Read a classifier: a run folder of ``chiasm distill``, its ``model/``, or an export.

    Args:
        path: The folder.
        device: Where the weights go.
        allow_code: Whether a tower that is named as ``package.module:factory`` may be imported and run.

    Returns:
        The classifier in eval mode, in float32.

    Raises:
        CheckpointError: Absent, damaged or foreign files, or weights that do not fit; nothing in them is run.
        ConfigError: The tower is code and ``allow_code`` is false.
        InputError: This machine has no such device.
    """
    place = find_device(device)
    found = native.read_model_dir(find_classifier(path), form=native.CLASSIFIER)
    stated = found.config
    try:
        config, heads = _declared(stated)
        tensors = {part: _part(found.tensors, part) for part in ("tower", "heads")}
        if sum(map(len, tensors.values())) != len(found.tensors) or (config is None and tensors["tower"]):
            raise CheckpointError("the weights have parts that are neither tower nor heads")
        fill_module(heads, tensors["heads"])
        projected = stated.get("projected") is True
        tower = None
        if config is not None:
            tower = filled_backbone(config, tensors["tower"], projected=projected, allow_code=allow_code)
        classifier = VisionClassifier(
            tower, heads, classes=[str(c) for c in stated["classes"]], config=config, projected=projected,
            label=str(stated.get("label", "class")), name=found.name, temperature=stated.get("temperature"),
            facts=found.training,
        )  # fmt: skip
    except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, InputError) else f"`{native.CLASSIFIER.file}` is incomplete"
        raise CheckpointError(f"the classifier contradicts itself: {reason}") from error
    return classifier.to(place).eval()


def find_classifier(path: str | Path) -> Path:
    """Return the folder that holds the classifier of a path.

    Raises:
        CheckpointError: There is none.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.name == native.CLASSIFIER.file else given
    for place in (folder, folder / RUN_FOLDER):
        if native.is_model_dir(place, form=native.CLASSIFIER):
            return place
    if native.is_model_dir(folder) or native.is_model_dir(folder / RUN_FOLDER):
        raise CheckpointError(
            f"`{given.name}` holds an encoder, not a classifier", hint="`chiasm zero-shot` classifies with encoders"
        )
    if (folder / "recipe.toml").is_file() and (folder / "stages").is_dir():
        raise CheckpointError(
            f"the run in `{given.name}` has no classifier yet",
            hint="finish it with `chiasm distill ... --resume` (with `--arms`, name `clip_it` as well)",
        )
    raise CheckpointError(
        f"`{given.name}` holds no classifier" if given.exists() else f"`{given.name}` does not exist",
        hint=f"give a run of `chiasm distill` or an export; expected `{native.CLASSIFIER.file}` in it",
    )


def is_classifier(path: str | Path) -> bool:
    """Return whether :func:`load_classifier` finds a classifier there."""
    try:
        find_classifier(path)
    except CheckpointError:
        return False
    return True


def _declared(stated: Mapping[str, Any]) -> tuple[EncoderConfig | None, DistilledHeads | FoldedHeads]:
    """Return what to build; heads without memory, so that a huge number in the file costs nothing."""
    try:
        config = None if stated.get("tower") is None else EncoderConfig.from_dict(stated["tower"])
        with torch.device("meta"):
            if "folded" in stated:
                return config, FoldedHeads(FoldedConfig.from_dict(stated["folded"]))
            return config, DistilledHeads(HeadsConfig.from_dict(stated["heads"]))
    except ConfigError as error:
        raise CheckpointError(f"the classifier states an impossible configuration: {error.message}") from error
    except RuntimeError as error:  # torch's own, of sizes that cannot be
        raise CheckpointError("the classifier states sizes that cannot be") from error


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}


def _image_declaration(config: EncoderConfig, tower: nn.Module, projected: bool) -> dict[str, Any]:
    """The image side of a declaration, complete in itself; adapters that were merged are gone from it."""
    trunk = tower.trunk if projected and hasattr(tower, "trunk") else tower
    adapted = any("lora_" in name for name in tower.state_dict())
    if adapted and config.image.lora is None:
        raise InputError("the tower has adapters that its configuration does not state", hint="set `config.image.lora`")
    image = getattr(trunk, "stored", config.image)
    image = replace(image, freeze=config.image.freeze, lora=config.image.lora if adapted else None)
    values = replace(config, image=image, sides="image", members=None).to_dict()
    return {name: values[name] for name in _IMAGE_FIELDS}


def _bare(visual: nn.Module) -> nn.Module:
    from chiasm.encoders.image_side import without_projection

    return without_projection(visual)


def _open(sample: Sample) -> Image:
    """Decode a sample's image; what reads tars, tables and arrays is imported only where one is given."""
    if sample.image is not None and sample.image.is_file():
        from chiasm.io.image import open_image

        return open_image(sample.image)
    from chiasm.datasets.images import open_sample_image

    return open_sample_image(sample)


def _sample(row: int, item: Any, is_picture: bool) -> Sample:
    if isinstance(item, Sample):
        return item
    return Sample(id=str(row)) if is_picture else Sample(id=str(item), image=Path(item))
