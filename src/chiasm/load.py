"""A name or a path to an encoder: the one way in, whatever the file format.

In: a catalog name, a model folder (chiasm's, transformers', open_clip's) or a weight file. Out: :class:`Encoder`.
Native towers are built without memory (on the meta device) and take the file's memory-mapped tensors as they are;
they draw nothing at random, the load is strict, and nothing in a file is run. Half precision becomes float32.

Names and order of :func:`create_model_and_transforms`, :func:`get_tokenizer` and :func:`list_models` are open_clip's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from chiasm import fetch
from chiasm.checkpoints import huggingface, native, open_clip, openai, transformers_models
from chiasm.checkpoints.containers import read_state_dict
from chiasm.checkpoints.layouts import LAYOUTS, read_parts, refused_shapes
from chiasm.checkpoints.open_clip_names import is_open_clip
from chiasm.encoders.activation import activations_of, with_activation
from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import ARCHITECTURES, CATALOG, CatalogEntry
from chiasm.encoders.device import find_device
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.ensemble import join_members
from chiasm.encoders.fill import filled_model
from chiasm.encoders.fitting import fitting_hint
from chiasm.errors import CheckpointError, ConfigError, InputError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from chiasm.data.augment import Augment
    from chiasm.data.tokenizers import Tokenizer

__all__ = ["create_model_and_transforms", "get_tokenizer", "list_models", "load", "save_encoder"]

_log = logging.getLogger("chiasm")


@dataclass(frozen=True)
class _Source:
    """What was found: tensors under the model's names, and what to build for them."""

    name: str
    config: EncoderConfig
    tensors: Mapping[str, Tensor]


def load(
    name_or_path: str | Path | Sequence[str | Path],
    *,
    device: str | torch.device = "cpu",
    allow_code: bool = False,
    pretrained: str | Path | None = None,
    family: str | None = None,
    activation: str | None = None,
    precision: str = "fp32",
) -> Encoder:
    """Load an encoder with its preprocessing, tokenizer and scale.

    Args:
        name_or_path: A name (``openai/ViT-B-32``; ``chiasm models`` lists them), a model folder, a weight file,
            ``hf-hub:org/repo[@revision]`` or ``open_clip:NAME/TAG``. What is absent is downloaded (``chiasm.fetch``).
            Several of one kind are an ensemble, whose cosines are the mean of its members' (CheXzero's ten files).
        device: Where the weights go.
        allow_code: Whether a tower that a model folder names as ``package.module:factory`` may be imported and run.
        pretrained: With a name: the weight file or folder, or the tag ``openai`` (with open_clip's names any of its
            tags); None: ``$CHIASM_HOME/models`` (``~/.cache/chiasm/models``), else its official source.
        family: With a file or folder: whose weights they are, which names and shapes cannot tell. A name of the
            catalog (``chexzero``), or for any CLIP in OpenAI's key layout ``openai`` (QuickGELU) or ``open_clip``
            (GELU).
        activation: ``quick_gelu``, ``gelu`` or ``gelu_tanh``: what the native towers were trained with, in place of
            what the file or folder states. For fine-tunes of OpenAI's weights whose configuration forgot
            ``quick_gelu``; the log and ``chiasm doctor --model`` tell which activation is used.
        precision: Arithmetic of the encoder's vectors: ``fp32``, ``bf16`` (mixed), ``int8`` or ``auto`` (the fastest of
            the first two on this machine); see ``encoders.precision``. The weights stay float32.

    Returns:
        The encoder, in eval mode, its weights in float32.

    Raises:
        UnknownName: No model of that name, or no such family.
        InputError: This machine has no such device; an ensemble of different models, or of one twice.
        CheckpointError: Weights absent, foreign, damaged, or not those of the model; nothing in a file is run.
        ConfigError: A tower is code and ``allow_code`` is false, or an unknown ``activation`` or ``precision``.
    """
    if activation is not None and family is None:
        first = name_or_path if isinstance(name_or_path, (str, Path)) else next(iter(name_or_path), "")
        family = _family_of(first, activation)
    if family is not None and family not in openai.FAMILIES and CATALOG.find(family) is None:
        known = [*openai.FAMILIES, *CATALOG.names()]
        raise UnknownName("family", family, known, hint="`openai`, `open_clip`, or a name that `chiasm models` lists")
    place = find_device(device)
    source = _find_all(name_or_path, pretrained, family)
    if activation is not None:
        source = replace(source, config=with_activation(source.config, activation))
    _log.info("`%s`: %s", source.name, activations_of(source.config))
    model = filled_model(source.config, source.tensors, allow_code=allow_code)
    return Encoder(model.to(place), source.config, name=source.name, precision=precision)


def _family_of(name_or_path: str | Path, activation: str) -> str | None:
    """The family that stands for a bare state dict's activation; it is overridden, so any will do."""
    path = _home(str(name_or_path))
    described = (path.parent / open_clip.CONFIG_FILE).is_file()
    return "openai" if path.is_file() and not described and activation in ("quick_gelu", "gelu") else None


def _find_all(names: str | Path | Sequence[str | Path], pretrained: str | Path | None, family: str | None) -> _Source:
    """One model, or several side by side."""
    if isinstance(names, (str, Path)):
        return _find(names, pretrained, family)
    if pretrained is not None:
        raise InputError("`pretrained` goes with one name, but several were given", hint="give the files themselves")
    if len({_home(str(name)).resolve() for name in names}) < len(names):
        raise InputError("an ensemble names the same model twice", hint="give each of its files once")
    found = [_find(name, None, family) for name in names]
    if len(found) == 1:
        return found[0]
    if any(s.config.members for s in found):
        raise InputError("an ensemble cannot hold another one", hint="give the files of all members")
    return _Source(*join_members([(s.name, s.config, s.tensors) for s in found]))


def _find(name_or_path: str | Path, pretrained: str | Path | None, family: str | None) -> _Source:
    name = str(name_or_path)
    entry = CATALOG.find(name) if isinstance(name_or_path, str) else None
    if entry is None and name in ARCHITECTURES and isinstance(name_or_path, str):
        return _architecture(name, pretrained, family)
    if entry is not None:
        found = _given(pretrained) if pretrained not in (None, "openai") else fetch.obtain(entry)
        return _read_entry(found, entry, family)
    if fetch.is_address(name_or_path):
        return _from_address(name, pretrained, family)
    path = _home(name)
    if path.exists():
        if pretrained is not None:
            raise InputError("`pretrained` goes with a name, but a path was given")
        named = CATALOG.find(family) if family is not None and family not in openai.FAMILIES else None
        return _read(path, family) if named is None else _read_entry(path, named, None)
    if isinstance(name_or_path, Path) or name.startswith((".", "~", "/")) or path.suffix in fetch.WEIGHT_SUFFIXES:
        raise CheckpointError(f"`{path.name}` does not exist", hint="check the path")
    CATALOG.get(name)  # raises UnknownName with a suggestion
    raise AssertionError


def _from_address(name: str, pretrained: str | Path | None, family: str | None) -> _Source:
    """A repository of the hub, or a name and tag of open_clip; a repository of the catalog is read as its entry says."""
    if pretrained is not None:
        raise InputError("`pretrained` goes with a name, but an address was given")
    meant = fetch.parse_address(name)
    if isinstance(meant, CatalogEntry):
        return _find(meant.name, None, family)
    stated = family is not None and family not in openai.FAMILIES
    entry = CATALOG.find(str(family)) if stated else fetch.entry_of(meant)
    path = fetch.obtain_address(meant, entry=entry)
    if entry is not None:
        return _read_entry(path, entry, None)
    source = _read(path, family)
    if meant.activation:
        source = replace(source, config=with_activation(source.config, meant.activation))
    return source if native.is_model_dir(path) else replace(source, name=meant.repository)


def _architecture(name: str, pretrained: str | Path | None, family: str | None) -> _Source:
    """One of open_clip's names: the architecture, with weights that must be named.

    Where the weights state their activation (OpenAI's archive, a model folder), that counts, not the name's suffix.
    """
    official = CATALOG.get(f"openai/{name.removesuffix('-quickgelu')}")
    if pretrained == "openai":  # as in open_clip, OpenAI's weights bring OpenAI's activation
        return _find(official.name, None, None)
    if pretrained is None:
        raise CheckpointError(
            f"`{name}` is an architecture without weights",
            hint=f"add `pretrained=` (`openai` or a path), or load `{official.name}`",
        )
    if isinstance(pretrained, str) and fetch.is_open_clip_tag(name, pretrained):
        source = _from_address(f"open_clip:{name}/{pretrained}", None, None)
        return _checked(source, source.name, _like(source.config, ARCHITECTURES[name]))
    source = _read(_given(pretrained), family, expected=ARCHITECTURES[name])
    return _checked(source, source.name, _like(source.config, ARCHITECTURES[name]))


def _given(pretrained: str | Path | None) -> Path:
    path = _home(str(pretrained))
    if not path.exists():
        raise CheckpointError(
            f"`pretrained` is `{path.name}`, which is no file, no folder and not the tag `openai`",
            hint="download the weights, then give their path",
        )
    return path


def _home(path: str) -> Path:
    """Return the path with ``~`` replaced, where there is such a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _like(config: EncoderConfig, wanted: EncoderConfig) -> EncoderConfig:
    """``wanted`` with the activations of ``config``."""
    image = replace(wanted.image, activation=config.image.activation)
    return replace(wanted, image=image, text=replace(wanted.text, activation=config.text.activation))


def _checked(source: _Source, name: str, config: EncoderConfig) -> _Source:
    """The source under a name that promises an architecture."""
    for side in ("image", "text", "projection"):
        if getattr(source.config, side) != getattr(config, side):
            raise CheckpointError(
                f"the weights are not those of `{name}`: their {side} side is another one",
                hint="load them by their path alone",
            )
    return replace(source, name=name)


def _read_entry(path: Path, entry: CatalogEntry, family: str | None) -> _Source:
    """Read a file or folder that is said to be a model of the catalog."""
    whole = path.is_dir() and native.is_model_dir(path)
    if whole or entry.layout == openai.LAYOUT.name:
        return _checked(_read(path, family, expected=entry.config), entry.name, entry.config)
    if entry.layout == "open_clip" and _describes_itself(path):
        return _described(_read(path, None), entry)
    layout = LAYOUTS[entry.layout]
    found = read_parts(path, layout)
    with refused_shapes(layout):
        config = entry.config if layout.infer is None else _config(layout.infer(found, entry.config.to_dict()))
        tensors = layout.convert(found, config.to_dict())
    return _Source(entry.name, replace(config, tokenizer=_tokenizer_of(path, entry)), tensors)


def _describes_itself(path: Path) -> bool:
    """Whether a folder says what it holds: open_clip's, or transformers' where nothing of open_clip's is."""
    if (path / open_clip.CONFIG_FILE).is_file():
        return True
    plain = (path / "config.json").is_file() and not any((path / file).is_file() for file in open_clip.WEIGHT_FILES)
    return path.is_dir() and plain


def _described(source: _Source, entry: CatalogEntry) -> _Source:
    """A folder of open_clip said to be a model of the catalog: its sizes must be the model's, the rest is as it states.

    A configuration that forgot ``quick_gelu`` is obeyed too, but not silently.
    """
    found, wanted = source.config, entry.config
    for what in ("kind", "width", "layers", "patch_size", "image_size"):
        if getattr(found.image, what) != getattr(wanted.image, what):
            raise CheckpointError(
                f"the weights are not those of `{entry.name}`: `image.{what}` is {getattr(found.image, what)}, not "
                f"{getattr(wanted.image, what)}",
                hint="load them by their path alone",
            )
    if found.text.kind != wanted.text.kind or found.projection.dim != wanted.projection.dim:
        raise CheckpointError(f"the weights are not those of `{entry.name}`: their text side is another one")
    if found.text.is_native and found.text.activation != wanted.text.activation:
        _log.warning(
            "`%s` was trained with %s, its folder states %s and is obeyed; `activation=` changes that",
            entry.name,
            wanted.text.activation,
            found.text.activation,
        )
    return replace(source, name=entry.name)


def _tokenizer_of(path: Path, entry: CatalogEntry) -> Mapping[str, Any]:
    """The tokenizer's declaration: from the files beside the weights, else from the repository that has the vocabulary."""
    stated = entry.config.tokenizer
    if stated.get("kind") != "huggingface" or not entry.config.has_text:
        return stated
    beside = path if path.is_dir() else path.parent
    if any((beside / name).is_file() for name in fetch.VOCABULARIES):
        return {**stated, "source": str(beside)}
    own = entry.weights is not None and entry.weights.repository == stated.get("source")
    folder = None if own else fetch.obtain_tokenizer(str(stated.get("source", "")))
    return stated if folder is None else {**stated, "source": str(folder)}


def _read(path: Path, family: str | None, expected: EncoderConfig | None = None) -> _Source:
    """Read a folder or a file; ``expected`` states the activation of a bare state dict."""
    if path.is_file() and path.name == native.WEIGHTS_FILE and native.is_model_dir(path.parent):
        path = path.parent  # the file inside chiasm's own folder, whose description lies beside it
    if path.is_file() and (path.parent / open_clip.CONFIG_FILE).is_file() and family in (None, "open_clip"):
        tensors, config = open_clip.read_model_dir(path.parent, path)
        return _Source(path.stem, _config(config), tensors)
    if path.is_file():
        return _read_file(path, family, expected)
    name = path.resolve().name
    if native.is_model_dir(path):
        found = native.read_model_dir(path)
        return _Source(found.name, _config(found.config), found.tensors)
    if native.is_model_dir(path, form=native.CLASSIFIER):
        raise CheckpointError(
            f"folder `{path.name}` holds a vision classifier, not an encoder",
            hint="`chiasm classify` uses it, `chiasm export --vision-only` exports it; `chiasm.classifier.load_classifier`",
        )
    if (path / open_clip.CONFIG_FILE).is_file():
        tensors, config = open_clip.read_model_dir(path)
    elif (path / "config.json").is_file():
        tensors, config = transformers_models.read_model_dir(path)
    else:
        raise CheckpointError(
            f"folder `{path.name}` holds no model",
            hint=f"expected `{native.DESCRIPTION_FILE}`, `{open_clip.CONFIG_FILE}` or `config.json` in it",
        )
    return _Source(name, _config(config), tensors)


def _read_file(path: Path, family: str | None, expected: EncoderConfig | None) -> _Source:
    state = read_state_dict(path)
    tensors: dict[str, Tensor] = state.tensors
    if huggingface.is_huggingface_layout(tensors):
        tensors = huggingface.to_openai(tensors)
    if not openai.is_openai_layout(tensors) or "text.cls_emb" in tensors:  # CoCa's sizes are not all in its weights
        raise CheckpointError(
            f"`{path.name}` holds {len(tensors)} tensors, but not those of a CLIP in a layout that chiasm knows",
            hint=f"put its `{open_clip.CONFIG_FILE}` beside it"
            if is_open_clip(tensors)
            else fitting_hint(tensors) or "for a model folder, give the folder instead of the file inside",
        )
    tensors = openai.tidy(tensors)
    if family is not None:
        activation = openai.FAMILIES[family]
    elif state.container == "torchscript":  # only OpenAI publishes CLIP in this form
        activation = openai.FAMILIES["openai"]
    elif expected is not None:
        activation = expected.text.activation
    else:
        raise CheckpointError(
            f"`{path.name}` is a bare state dict, which does not say whose it is; the wrong activation would change "
            "every embedding a little and unnoticed",
            hint="add `family=`: `openai` for OpenAI's weights and what was tuned from them (QuickGELU), `open_clip` "
            "for models of open_clip without `-quickgelu` in their name (GELU)",
        )
    config = _config(openai.config_from_state_dict(tensors, activation=activation))
    name = path.stem
    if state.container == "torchscript":
        name = next((e.name for e in CATALOG.entries() if e.config == config), name)
    return _Source(name, config, tensors)


def _config(values: Mapping[str, Any]) -> EncoderConfig:
    try:
        return EncoderConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"the model states an impossible configuration: {error.message}") from error


def save_encoder(
    encoder: Encoder,
    directory: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> Path:
    """Write an encoder as a model folder that :func:`load` reads anywhere; atomic.

    Towers of transformers are stored with their configuration and tokenizers with their vocabulary, so nothing else is
    needed. A tower that is code stays a reference to it. Adapters that were merged are gone from the declaration too.

    Args:
        encoder: What to write; its name becomes the folder's model name.
        directory: Created, or its model replaced.
        training: JSON values about how the weights came to be.
        recipe: Text of the resolved recipe.

    Raises:
        CheckpointError: The files cannot be written; what was there before is intact.
    """
    config = encoder.model.stored_config
    if config.has_text:
        config = replace(config, tokenizer=encoder.tokenizer.to_dict())
    adapted = [name for name in encoder.model.state_dict() if "lora_" in name]
    if not any(name.startswith("visual.") for name in adapted):  # never adapted, or merged since
        config = replace(config, image=replace(config.image, lora=None))
    if all(name.startswith("visual.") for name in adapted):
        config = replace(config, text=replace(config.text, lora=None))
    return native.save_model_dir(
        directory,
        encoder.model.state_dict(),
        name=encoder.name,
        config=config.to_dict(),
        training=training,
        recipe=recipe,
    )


def create_model_and_transforms(
    name: str | Path,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    augment: Augment | None = None,
    allow_code: bool = False,
    family: str | None = None,
) -> tuple[DualEncoder, Callable[[Image], Tensor], Callable[[Image], Tensor]]:
    """Return ``(model, preprocess_train, preprocess_val)``, as open_clip does.

    Args:
        name: An architecture of open_clip (``ViT-B-32``; :func:`list_models`), or whatever :func:`load` takes.
        pretrained: ``openai``, or the path of a weight file or folder. None with an architecture's name: weights drawn
            from torch's global generator, as in open_clip, with a message to the log.
        device: Where the weights go.
        augment: What ``preprocess_train`` may vary; None: only a random crop of 90 to 100 % of the area, as in
            open_clip. Its randomness comes from torch's global generator.
        allow_code: See :func:`load`.
        family: See :func:`load`.

    Deviation from open_clip: the model is in eval mode; call ``model.train()`` to train it.
    """
    from chiasm.data.augment import Augment as AugmentClass
    from chiasm.data.augment import augmentation
    from chiasm.data.transforms import image_transform

    if pretrained is None and name in ARCHITECTURES:
        _log.warning("no weights were named for `%s`: they are drawn at random", name)
        model = build_encoder_model(ARCHITECTURES[str(name)]).eval().to(device)
    else:
        model = load(name, pretrained=pretrained, device=device, allow_code=allow_code, family=family).model
    varied = augmentation(augment or AugmentClass(), model.config.preprocess)

    def preprocess_train(image: Image) -> Tensor:
        # A generator of its own for each image: worker processes are seeded by torch, not by NumPy.
        return varied(image, np.random.default_rng(int(torch.randint(2**62, ()))))

    return model, preprocess_train, image_transform(model.config.preprocess)


def get_tokenizer(name: str | Path) -> Tokenizer:
    """Return the tokenizer of an architecture, of a catalog name, or of a model folder.

    Raises:
        UnknownName: No model of that name.
        CheckpointError: A folder that holds no model.
    """
    from chiasm.data.tokenizers import make_tokenizer

    entry = CATALOG.find(name) if isinstance(name, str) else None
    if entry is not None:
        return make_tokenizer(entry.config.tokenizer)
    if name in ARCHITECTURES:
        return make_tokenizer(ARCHITECTURES[str(name)].tokenizer)
    path = Path(name).expanduser()
    if path.is_dir() and not native.is_model_dir(path):
        return make_tokenizer(_read(path, None).config.tokenizer)
    if path.exists():
        return make_tokenizer(_config(native.read_description(path)["config"]).tokenizer)
    return make_tokenizer(CATALOG.get(str(name)).config.tokenizer)


def list_models() -> list[str]:
    """Return all names that :func:`create_model_and_transforms` takes: architectures and the catalog."""
    return sorted({*ARCHITECTURES, *CATALOG.names()})


class _CallableModule(ModuleType):
    """Lets ``chiasm.load(...)`` work although importing this module puts it under that very name of the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Encoder:
        return load(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
