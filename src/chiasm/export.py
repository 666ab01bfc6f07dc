"""An encoder as another library's folder, bit by bit: open_clip's, transformers', or chiasm's own.

In: a loaded encoder. Out: a folder that the other library reads, whose vectors are the same for the same pixels and
token ids. What a format cannot express is refused before anything is written; what its own code prepares otherwise is
told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from chiasm.checkpoints import export_huggingface, open_clip_names
from chiasm.checkpoints.export_open_clip import Exported, open_clip_config
from chiasm.encoders.base import Encoder
from chiasm.errors import CheckpointError, InputError

Target = Literal["open_clip", "huggingface", "chiasm"]
TARGETS: tuple[Target, ...] = ("open_clip", "huggingface", "chiasm")
_WEIGHTS = {"open_clip": "open_clip_model.safetensors", "huggingface": "model.safetensors"}


def export_encoder(
    encoder: Encoder, directory: str | Path, *, to: Target, accept_differences: bool = False
) -> tuple[str, ...]:
    """Write an encoder into a new folder in another library's form.

    Args:
        encoder: What to write.
        directory: New or empty. open_clip finds the configuration of a Hugging Face text tower there, so it should not
            be moved when that has no name on the hub.
        to: ``open_clip``: ``open_clip_config.json`` and ``open_clip_model.safetensors``, for
            ``create_model('local-dir:...')``; ``huggingface``: ``CLIPModel``, ``SiglipModel`` or
            ``VisionTextDualEncoderModel`` with image processor and tokenizer; ``chiasm``: as :func:`save_encoder`.
        accept_differences: Write also where the other library's own preprocessing cannot be made equal.

    Returns:
        What the other library's own preprocessing does differently, one sentence each.

    Raises:
        CheckpointError: A model that the format cannot express, or a preprocessing whose difference was not accepted.
        InputError: An unknown format, or a folder that holds something.
    """
    if to not in TARGETS:
        raise InputError(f"unknown format `{to}`", hint=f"one of: {', '.join(TARGETS)}")
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"`{directory.name}` is there already", hint="give a new or empty folder")
    if to == "chiasm":
        from chiasm.load import save_encoder

        save_encoder(encoder, directory)
        return ()
    state = {name: tensor.detach().cpu() for name, tensor in encoder.model.state_dict().items()}
    if any("lora_" in name or ".parametrizations." in name for name in state):
        raise CheckpointError("the encoder has low-rank adapters", hint="merge them first: `merge_lora`")
    config = encoder.model.stored_config.to_dict()
    tokenizer = encoder.tokenizer.to_dict() if encoder.config.has_text else {}
    tensors: dict[str, Tensor]
    if to == "open_clip":
        exported = open_clip_config(config, tokenizer, str(directory))
        tensors = open_clip_names.from_native(state, config)
    else:
        tensors, exported = export_huggingface.huggingface_folder(config, state, tokenizer)
    if exported.differences and not accept_differences:
        raise CheckpointError(
            f"{to} would prepare images otherwise: {'; '.join(exported.differences)}",
            hint="`--accept-differences` writes the model all the same; prepare images with chiasm for equal vectors",
        )
    _write(directory, _WEIGHTS[to], tensors, exported, _tokenizer_files(tokenizer, encoder, to))
    return exported.differences + exported.notes


def _write(
    directory: Path, weights: str, tensors: Mapping[str, Tensor], exported: Exported, files: Mapping[str, str]
) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for name, content in exported.files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
    save_file(own, str(directory / weights), metadata={"format": "pt"})


def _tokenizer_files(tokenizer: Mapping[str, Any], encoder: Encoder, to: Target) -> dict[str, str]:
    """The tokenizer as transformers reads it; open_clip has CLIP's own."""
    if tokenizer.get("kind") == "huggingface":
        from chiasm.data.huggingface_tokenizer import HuggingFaceTokenizer

        own = encoder.tokenizer
        assert isinstance(own, HuggingFaceTokenizer)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": own.context_length,
            "pad_token": tokenizer["pad_token"],
        }
        if to == "huggingface" and own.clean is not None:
            settings["chiasm_clean"] = own.clean
        content = json.dumps(tokenizer["tokenizer"], ensure_ascii=False)
        return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    if tokenizer.get("kind") != "clip" or to != "huggingface":
        return {}
    from chiasm.data.byte_pairs import BytePairs

    pairs = BytePairs()
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {piece: i for i, piece in enumerate([*pairs.pieces, start, end])}
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer["context_length"], "bos_token": start,
        "eos_token": end, "pad_token": end, "unk_token": end,
    }  # fmt: skip
    merges = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in pairs.merges)]) + "\n"
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": merges,
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
