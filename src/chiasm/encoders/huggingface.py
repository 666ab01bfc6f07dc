"""Any vision model or text encoder of transformers as a tower.

In: a tower's declaration whose ``source`` is a model folder, ``package:name/folder`` or a hub name, and whose
``options`` may hold ``config``. Out: modules with ``output_dim``. With ``options.config`` the tower is built from it
with drawn weights and the source is only its name; so a saved model is rebuilt without the place it came from.
Remote code is never run. A source whose weights do not cover the model is refused rather than completed at random.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.encoders.vit import check_pixels
from chiasm.errors import CheckpointError, ConfigError
from chiasm.io.download import is_offline, is_reachable
from chiasm.io.hub import endpoint
from chiasm.io.package_files import find_package_file, is_package_source

#: Fields of a transformers configuration that say where and how it was loaded, not what the model is.
_PROVENANCE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "architectures")
_OPTIONS: Mapping[str, frozenset[str]] = {
    "image": frozenset({"config"}),
    "text": frozenset({"config", "pooler"}),
}


class HuggingFaceImageTower(nn.Module):
    """A vision model of transformers.

    Args:
        model: Gives ``last_hidden_state``, tokens (batch, n, width) or a feature map (batch, width, rows, columns).
        config: The declaration. ``pool``: ``none`` takes the model's own ``pooler_output``, ``cls`` the first token,
            ``mean`` the mean of the patches (class and register tokens left out).

    Attributes:
        output_dim: Width of the output.
        stored: A declaration that rebuilds this architecture without the source.
    """

    def __init__(self, model: nn.Module, config: ImageTowerConfig) -> None:
        super().__init__()
        self.model = model
        self.pool = config.pool
        self.image_size = config.image_size
        self.stored = replace(config, options={"config": _stored_config(model)}, source=_public_name(config.source))
        native = getattr(model.config, "image_size", None)
        resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._extra = {"interpolate_pos_encoding": True} if resizes and native != config.image_size else {}
        with _evaluated(model), torch.inference_mode():
            try:
                output = self._run(torch.zeros(1, 3, config.image_size, config.image_size))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"the image tower cannot take images of {config.image_size} pixels") from error
        hidden = output.last_hidden_state
        self.output_dim = int(hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2])
        tokens = hidden.shape[1]
        # Class and register tokens stand before the patches, and are fewer than what the next square would need.
        self._first_patch = 0 if hidden.ndim == 4 else tokens - math.isqrt(tokens) ** 2
        self._check_pool(output)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, output_dim)."""
        check_pixels(pixels, self.image_size)
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, self.output_dim)
        output = self._run(pixels)
        if self.pool == "none":
            pooled: Tensor = output.pooler_output
            return pooled.flatten(1)
        if self.pool == "cls":
            first: Tensor = output.last_hidden_state[:, 0]
            return first
        return self._patches(output).mean((1, 2))

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Return the last layer's vector of every patch, (batch, rows, columns, output_dim).

        Under ``pool = "mean"`` their mean is the tower's output; under ``none`` a model's own pooler (a norm, a dense
        layer) is not applied to them.
        """
        check_pixels(pixels, self.image_size)
        return self._patches(self._run(pixels))

    def _run(self, pixels: Tensor) -> Any:
        return self.model(pixel_values=pixels, **self._extra)

    def _patches(self, output: Any) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:
            return hidden.permute(0, 2, 3, 1)
        patches = hidden[:, self._first_patch :]
        side = math.isqrt(patches.shape[1])
        return patches.reshape(patches.shape[0], side, side, patches.shape[2])

    def _check_pool(self, output: Any) -> None:
        kind = type(self.model).__name__
        pooled = getattr(output, "pooler_output", None)
        if self.pool == "none" and (pooled is None or pooled.flatten(1).shape[1] != self.output_dim):
            raise ConfigError(f"{kind} has no pooled output of its own", hint='set `image.pool = "cls"` or `"mean"`')
        if self.pool == "cls" and self._first_patch == 0:
            raise ConfigError(f"{kind} has no class token", hint='set `image.pool = "mean"` or `"none"`')
        if self.pool == "attention":
            raise ConfigError("`image.pool` is `attention`, which only native towers know")


class HuggingFaceTextTower(nn.Module):
    """A text encoder of transformers.

    Args:
        model: Takes ``input_ids`` and ``attention_mask``, gives ``last_hidden_state`` (batch, tokens, width).
        config: The declaration. ``pool``: ``mean`` over the text's own tokens, ``cls`` the first token, ``eot`` the
            text's last token, ``last`` the last position. ``options.pooler = true`` takes the model's ``pooler_output``
            instead (BERT's dense layer and tanh on the first token).

    Attributes:
        output_dim: Width of the output.
        pad_id: The id that fills texts up.
        stored: A declaration that rebuilds this architecture without the source.
    """

    def __init__(self, model: nn.Module, config: TextTowerConfig) -> None:
        super().__init__()
        self.model = model
        self.pool = config.pool
        self.pooler = bool(config.options.get("pooler", False))
        options = {"config": _stored_config(model)} | ({"pooler": True} if self.pooler else {})
        self.stored = replace(config, options=options, source=_public_name(config.source))
        self.output_dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.pad_id = int(getattr(model.config, "pad_token_id", None) or 0)
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and config.context_length > positions:
            raise ConfigError(
                f"`text.context_length` is {config.context_length}, {type(model).__name__} reads at most {positions}"
            )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, output_dim) for ids and mask (batch, tokens); the mask is 1 on the text's own tokens."""
        if len(ids) == 0:
            return torch.zeros(0, self.output_dim, device=ids.device)
        output = self.model(input_ids=ids, attention_mask=mask)
        hidden: Tensor = output.last_hidden_state
        if self.pooler:
            pooled: Tensor = output.pooler_output
            return pooled
        if self.pool == "cls":
            return hidden[:, 0]
        if self.pool == "last":
            return hidden[:, -1]
        if self.pool == "eot":
            return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        inside = mask[..., None].to(hidden.dtype)
        return (hidden * inside).sum(1) / inside.sum(1)


def build_huggingface_image_tower(config: ImageTowerConfig) -> HuggingFaceImageTower:
    """Return a vision model of transformers as a tower.

    Raises:
        ConfigError: An unknown option, a source that is absent or no vision model, or a pooling that it lacks.
        CheckpointError: Weights that do not cover the model.
    """
    _check_options("image", config.options)
    pooler = config.pool == "none"
    return HuggingFaceImageTower(_model("image", config.source, config.options.get("config"), pooler), config)


def build_huggingface_text_tower(config: TextTowerConfig) -> HuggingFaceTextTower:
    """Return a text encoder of transformers as a tower; of encoder-decoders (T5) the encoder.

    Raises:
        ConfigError: An unknown option, a source that is absent or no text encoder, or a context that is too long.
        CheckpointError: Weights that do not cover the model.
    """
    _check_options("text", config.options)
    pooler = bool(config.options.get("pooler", False))
    return HuggingFaceTextTower(_model("text", config.source, config.options.get("config"), pooler), config)


def _check_options(side: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS[side]:
            known = ", ".join(sorted(_OPTIONS[side]))
            raise ConfigError(f"unknown field `{side}.options.{name}`", hint=f"known fields: {known}")


def _model(side: Literal["image", "text"], source: str | None, stated: object, pooler: bool) -> nn.Module:
    if stated is not None:
        config = _parsed_config(side, stated)
        kind, keywords = _model_class(config), _pooling(_model_class(config), pooler)
        return kind(config, **keywords)  # type: ignore[no-any-return]
    assert source is not None
    return _pretrained(side, source, pooler)


def _parsed_config(side: str, stated: object) -> Any:
    from transformers import AutoConfig

    try:
        values: dict[str, Any] = dict(json.loads(stated)) if isinstance(stated, str) else dict(stated)  # type: ignore[call-overload]
        return _without_kernels(AutoConfig.for_model(values.pop("model_type"), **values))
    except KeyError as error:
        raise ConfigError(f"`{side}.options.config` states no `model_type`") from error
    except _config_errors() as error:
        raise ConfigError(f"`{side}.options.config` is no configuration of transformers: {error}") from error


def _pretrained(side: str, source: str, pooler: bool) -> nn.Module:
    from transformers import AutoConfig

    folder = _local_folder(source)
    name = str(folder) if folder else source
    # The hub's client would wait for up to a minute where there is no network.
    offline = folder is not None or is_offline() or _is_cached(source) or not is_reachable(endpoint())
    common = {"local_files_only": offline, "trust_remote_code": False}
    try:
        config = _without_kernels(AutoConfig.from_pretrained(name, **common))
        if hasattr(config, "text_config") and hasattr(config, "vision_config"):
            raise ConfigError(
                f"`{side}.source` is a whole {config.model_type} model, not a tower",
                hint="`chiasm.load` reads whole models",
            )
        kind = _model_class(config)
        with _quiet():
            model, info = kind.from_pretrained(
                name, config=config, output_loading_info=True, dtype=torch.float32, **_pooling(kind, pooler), **common
            )
    except _config_errors() as error:
        where = "folder" if folder else "folder, nor a name in the local cache of the hub"
        raise ConfigError(
            f"`{side}.source` `{_public_name(source)}` is no readable {where} of a model of transformers",
            hint="give a folder with `config.json` and `model.safetensors`",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing or info.get("mismatched_keys"):
        raise CheckpointError(
            f"the weights of `{_public_name(source)}` do not cover {kind.__name__}: {len(missing)} are missing "
            f"({', '.join(missing[:2])} …)",
            hint='where only the pooler is missing, choose another `pool` than `"none"`',
        )
    return model  # type: ignore[no-any-return]


def _without_kernels(config: Any) -> Any:
    """Let transformers choose its own attention: a configuration may name code on the hub, which would be run."""
    config._attn_implementation = None
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = None
    return config


def _model_class(config: Any) -> Any:
    """The encoder class for a configuration: of encoder-decoders the encoder alone."""
    from transformers import AutoModel, AutoModelForTextEncoding

    for auto in (AutoModelForTextEncoding, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ConfigError(f"transformers has no encoder for the model type `{config.model_type}`")


def _pooling(kind: Any, pooler: bool) -> dict[str, bool]:
    has_switch = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": pooler} if has_switch else {}


def _config_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    strict = getattr(errors, "StrictDataclassError", ValueError)
    return (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError, strict)


def _local_folder(source: str) -> Path | None:
    if is_package_source(source):
        return find_package_file(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError(f"the tower's folder `{folder.name}` does not exist")
    return None


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return True  # no name of the hub: do not ask it


def _stored_config(model: nn.Module) -> dict[str, Any] | str:
    """The model's configuration as plain values; as JSON text where a null matters, which declarations drop."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in _PROVENANCE}  # type: ignore[union-attr, operator]
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    without_nulls = _without_nulls(plain)
    rebuilt = _parsed_config("tower", without_nulls).to_dict()
    same = all(json.dumps(rebuilt.get(k), default=str) == json.dumps(v) for k, v in plain.items())
    return without_nulls if same else json.dumps(plain)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _public_name(source: str | None) -> str:
    """A source without the folders of this machine."""
    if source is None or is_package_source(source):
        return source or "transformers"
    folder = Path(source).expanduser()
    return folder.name if folder.is_dir() or folder.is_absolute() else source


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and tables; what is missing is reported by our own error."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
