"""transformers' ``VisionTextDualEncoderModel``: any vision model beside any text encoder, each behind its own pooler.

In: a directory with ``config.json``, weights, and, where present, ``preprocessor_config.json`` and the tokenizer's
files. Out: tensors in chiasm's names and the mapping that ``EncoderConfig.from_dict`` reads. The towers are those of
transformers, so transformers itself maps the names of files, which differ between its versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.checkpoints.containers import read_json
from chiasm.checkpoints.huggingface import preprocess_of, read_weights
from chiasm.errors import CheckpointError

MODEL_TYPE = "vision-text-dual-encoder"
#: transformers' beginning of a name -> chiasm's.
PREFIXES: Mapping[str, str] = {
    "vision_model.": "visual.trunk.model.",
    "text_model.": "text.transformer.model.",
    "visual_projection.": "visual.head.",
    "text_projection.": "text.proj.",
}


def read_model_dir(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a local ``VisionTextDualEncoderModel`` directory.

    Raises:
        CheckpointError: Missing or damaged files, a configuration that transformers does not know, weights that do not
            cover the model, or preprocessing that chiasm cannot express.
    """
    directory = Path(directory)
    stated = read_json(directory / "config.json")
    parts: dict[str, Mapping[str, Any]] = {}
    for name in ("vision_config", "text_config"):
        part = stated.get(name)
        if not isinstance(part, Mapping) or not isinstance(part.get("model_type"), str):
            raise CheckpointError(f"`config.json` in `{directory.name}` states no `{name}` with a `model_type`")
        parts[name] = part
    vision, text = parts["vision_config"], parts["text_config"]
    own = _renamed_by_transformers(stated, read_weights(directory), directory.name)
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        tensors[name if prefix is None else PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    context = _context(directory, text)
    if not (directory / "preprocessor_config.json").is_file():
        raise CheckpointError(
            f"`{directory.name}` lacks `preprocessor_config.json`; towers of any kind have no preprocessing in common",
            hint="save the image processor into the folder",
        )
    preprocess = preprocess_of(read_json(directory / "preprocessor_config.json"))
    config = {
        "image": {
            "kind": "huggingface",
            "source": vision["model_type"],
            "image_size": preprocess["size"],
            "options": {"config": json.dumps(dict(vision))},
        },
        "text": {
            "kind": "huggingface",
            "source": text["model_type"],
            "context_length": context,
            "pool": "cls",
            "options": {"config": json.dumps(dict(text)), "pooler": True},
        },
        "projection": {"dim": stated.get("projection_dim", 512)},
        "tokenizer": {"kind": "huggingface", "source": str(directory), "context_length": context},
        "preprocess": preprocess,
    }
    return tensors, config


def _renamed_by_transformers(
    stated: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: str
) -> dict[str, Tensor]:
    """Return the weights under the names that this version of transformers gives them, without ever touching a hub."""
    import transformers
    from transformers.utils import logging

    untyped: Any = logging
    library: Any = transformers
    level, bars = untyped.get_verbosity(), untyped.is_progress_bar_enabled()
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    try:
        config = library.VisionTextDualEncoderConfig.from_dict(dict(stated))
        for part in (config, config.vision_config, config.text_config):
            part._attn_implementation = None  # a configuration may name code on the hub, which would be run
        model, info = library.VisionTextDualEncoderModel.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True
        )
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"`{folder}` is no dual encoder that transformers knows: {error}") from error
    finally:
        untyped.set_verbosity(level)
        if bars:
            untyped.enable_progress_bar()
    for what, problem in (("missing_keys", "lack"), ("unexpected_keys", "have besides"), ("mismatched_keys", "misfit")):
        names = sorted(str(name) for name in info.get(what) or () if "position_ids" not in str(name))
        if names:
            raise CheckpointError(f"the weights in `{folder}` do not fit: they {problem} {len(names)}: `{names[0]}`")
    return dict(model.state_dict())


def _context(directory: Path, text: Mapping[str, Any]) -> int:
    positions = text.get("max_position_embeddings", 512)
    if not isinstance(positions, int):
        raise CheckpointError("`text_config.max_position_embeddings` must be an integer")
    if "roberta" in str(text["model_type"]):
        positions -= 2  # RoBERTa counts positions from its padding id + 1
    file = directory / "tokenizer_config.json"
    stated = read_json(file).get("model_max_length") if file.is_file() else None
    return min(positions, stated) if isinstance(stated, int) and stated >= 3 else positions
