"""Descriptions of chiasm's own folders that state giants, nonsense or names of the hub are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import CheckpointError
from chiasm.load import load, save_encoder
from chiasm.testing import TinyEncoder


def test_hostile_descriptions(tmp_path: Path) -> None:
    """A model folder from anywhere: absurd sizes cost no time and no memory, and mistakes are named."""
    save_encoder(TinyEncoder(0), tmp_path)
    good = json.loads((tmp_path / "encoder.json").read_text())

    def with_config(**change: Any) -> None:
        config = {k: (v | change[k] if isinstance(v, dict) and k in change else v) for k, v in good["config"].items()}
        (tmp_path / "encoder.json").write_text(json.dumps(good | {"config": config}))
        load(tmp_path)

    huge = {"kind": "huggingface", "source": "x"}
    bert = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"image": {"layers": 10**9}}, "states 1000000000 layers"),
        ({"image": {"width": 2**40, "heads": 1}}, "do not fit|cannot be built"),
        ({"text": {"width": 2**62, "heads": 1}}, "do not fit|cannot be built"),
        ({"image": {"kind": "swin"}}, "impossible configuration"),
        ({"image": {"surprise": 1}}, "unknown field `image.surprise`"),
        ({"text": {"vocab_size": 3}}, "do not fit"),
        ({"text": {**huge, "options": {"config": bert | {"num_hidden_layers": 10**8}}}}, "beyond|layers"),
        ({"text": {**huge, "options": {"config": bert | {"hidden_size": 10**12}}}}, "beyond"),
    )
    for change, message in refused:
        with pytest.raises(CheckpointError, match=message):
            with_config(**change)
    for options in ({}, {"config": "{"}, {"config": 3}):  # a name alone would be looked up on the hub
        with pytest.raises(CheckpointError, match="without stating its configuration"):
            with_config(text={**huge, "options": options})
