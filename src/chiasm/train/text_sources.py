"""A recipe's text tower by the name that the catalog gives it.

In: the declaration of a model whose ``text.source`` (and ``tokenizer.source``) may be a text encoder's name, such as
``bioclinicalbert`` or ``t5-base``. Out: the same with the folder of its files, fetched where that is needed and allowed.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import ConfigError
from chiasm.fetch import obtain


def with_text_files(config: EncoderConfig) -> EncoderConfig:
    """Return the declaration with folders in the place of names of text encoders; other sources are left alone.

    Raises:
        CheckpointError: Weights that are absent and out of reach; says where to get them.
        ConfigError: A model that is no text encoder, or weights without the files that describe them.
    """
    text, tokenizer = config.text, dict(config.tokenizer)
    if text.kind != "huggingface" or text.options.get("config") is not None:
        return config
    entry = CATALOG.find(text.source or "")
    if entry is None:
        return config
    if entry.config.sides != "text" or entry.config.text.kind != "huggingface":
        raise ConfigError(
            f"`text.source` is `{text.source}`, which is no text encoder", hint="`start` takes whole models"
        )
    folder = obtain(entry)
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the files of `{entry.name}` lack `config.json`", hint="put it beside the weights")
    if tokenizer.get("kind") == "huggingface" and tokenizer.get("source") in (entry.name, *entry.aliases):
        tokenizer["source"] = str(folder)
    return replace(config, text=replace(text, source=str(folder)), tokenizer=tokenizer)
