"""A tiny retriever, and recipes on phantoms that run in a second or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.config import build
from chiasm.distill.recipe import DistillRecipe

STAGE = {"steps": 6, "batch_size": 16, "lr": 1e-2}
TOWER = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def retriever_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both sides, drawn at random."""
    from chiasm.load import save_encoder
    from chiasm.testing import TinyEncoder

    folder = tmp_path_factory.mktemp("retriever") / "tiny"
    save_encoder(TinyEncoder(0, context_length=64), folder)
    return folder


@pytest.fixture(scope="session")
def phantom_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue phantoms as files with a table."""
    from chiasm.data.phantoms import make_tissue_phantoms

    return make_tissue_phantoms(24, seed=1, size_px=32).save(tmp_path_factory.mktemp("tissue"))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return {n: v for n, v in result.items() if v is not None}


@pytest.fixture
def phantom_recipe(retriever_dir: Path) -> Callable[..., DistillRecipe]:
    """Recipe on phantoms: ``phantom_recipe(fuse={"kd_weight": 2.0})``."""
    base = {
        "name": "tiny",
        "data": {
            "phantoms": "tissue", "patients": 24, "phantom_size": 32, "phantom_seed": 1, "label": "tumour",
            "validation": 0.25, "test": 0.25,
        },
        "pairing": {"encoder": str(retriever_dir), "phantom_reports": 10},
        "backbone": {"image": TOWER},
        "unimodal": STAGE,
        "text": STAGE,
        "fuse": STAGE,
    }  # fmt: skip

    def make(**changes: Any) -> DistillRecipe:
        return build(DistillRecipe, merged(base, changes))

    return make


@pytest.fixture
def synthetic_recipe() -> Callable[..., DistillRecipe]:
    """Recipe on made-up features."""
    full = {"steps": 10, "batch_size": "full", "lr": 1e-2}
    base = {
        "name": "made_up", "data": {"synthetic": {"train": 40, "test": 120, "reports": 50}}, "unimodal": full,
        "text": full, "fuse": {**full, "kd_weight": 10.0, "kd_warmup_steps": 5},
    }  # fmt: skip

    def make(**changes: Any) -> DistillRecipe:
        return build(DistillRecipe, merged(base, changes))

    return make
