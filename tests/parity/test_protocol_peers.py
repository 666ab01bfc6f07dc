"""Prompts and sums of published protocols beside open_clip's and hi-ml's own."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from chiasm.tasks.prompts import fill
from chiasm.tasks.protocol import get_protocol
from chiasm.tasks.protocol_prompts import make_prompts
from chiasm.tasks.protocol_run import run_protocol
from chiasm.types import Embeddings, Space

pytestmark = pytest.mark.peer


def test_openai_templates_are_open_clips() -> None:
    pytest.importorskip("open_clip")
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    ours = get_protocol("openai-imagenet").templates
    for name in ("tench", "kite (bird of prey)"):
        assert [fill(t, name) for t in ours] == [template(name) for template in OPENAI_IMAGENET_TEMPLATES]


def test_the_classifier_is_open_clips() -> None:
    """Same vectors of the same prompts: the same classifier weights and the same logits."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    names = ["tench", "kite (bird of prey)", "x_y"]
    table: dict[str, torch.Tensor] = {}

    def vector(text: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(table))
        return table.setdefault(text, torch.randn(16, generator=generator) * (1 + len(table) % 7))

    class Model(torch.nn.Module):
        def encode_text(self, texts: list[str], normalize: bool = False) -> torch.Tensor:
            rows = torch.stack([vector(t) for t in texts])
            return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows

    class Texts(list):  # type: ignore[type-arg]
        def to(self, _: object) -> list[str]:
            return list(self)

    theirs = open_clip.build_zero_shot_classifier(
        Model(), Texts, [n.replace("_", " ") for n in names], OPENAI_IMAGENET_TEMPLATES, num_classes_per_batch=None
    )
    space = Space("made", "0", "1", 16)
    images = Embeddings(np.random.default_rng(0).normal(size=(4, 16)), tuple("abcd"), space, "image", normalized=False)

    def embed(texts: list[str]) -> Embeddings:
        rows = np.stack([vector(t).numpy() for t in texts])
        return Embeddings(rows, tuple(map(str, range(len(texts)))), space, "text", normalized=False, logit_scale=100.0)

    protocol = get_protocol("openai-imagenet")
    result = run_protocol(protocol, images, embed, prompts=make_prompts(protocol, names))
    expected = 100 * torch.nn.functional.normalize(torch.from_numpy(images.vectors), dim=-1) @ theirs
    np.testing.assert_allclose(result.logits, expected.numpy(), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def hi_ml() -> Any:
    """BioViL's inference engine, which imports readers of medical files that it does not need here."""
    pytest.importorskip("torchvision", reason="needs the environment made by `make peers`")
    absent = [name for name in ("pydicom", "SimpleITK", "skimage") if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["skimage"].io = types.ModuleType("io")  # type: ignore[attr-defined]
    try:
        return pytest.importorskip("health_multimodal.vlp.inference_engine", reason="hi-ml-multimodal is not installed")
    finally:
        for name in absent:
            del sys.modules[name]


def engine_of(hi_ml: Any, **parts: Any) -> Any:
    """The engine around given embeddings; the authors' own code does the rest."""
    silent = types.SimpleNamespace(training=False)
    image = types.SimpleNamespace(model=silent, resize_size=512, crop_size=480, transform=None, **parts)
    text = types.SimpleNamespace(model=silent, get_embeddings_from_prompt=parts.get("texts"))
    return hi_ml.ImageTextInferenceEngine(image, text)


def test_biovils_scores_are_hi_mls(hi_ml: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    table: dict[str, torch.Tensor] = {}

    def raw(texts: list[str], normalize: bool = True) -> torch.Tensor:
        rows = [table.setdefault(t, torch.randn(16, generator=generator) * (1 + len(table))) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1) if normalize else torch.stack(rows)

    protocol = get_protocol("biovil-rsna")
    label = make_prompts(protocol).prompts.labels[0]
    theirs = [
        [
            engine_of(
                hi_ml, texts=raw, get_projected_global_embedding=lambda k: seen[k]
            ).get_similarity_score_from_raw_data(k, list(side))
            for side in (label.positive, label.negative)
        ]
        for k in range(5)
    ]
    space = Space("made", "0", "1", 16)

    def embed(texts: list[str]) -> Embeddings:
        rows = raw(texts, normalize=False).numpy()
        return Embeddings(rows, tuple(map(str, range(len(texts)))), space, "text", normalized=False)

    result = run_protocol(protocol, Embeddings(seen.numpy(), tuple("abcde"), space, "image"), embed)
    assert result.negative_cosines is not None
    ours = np.concatenate([result.cosines, result.negative_cosines], axis=1)
    np.testing.assert_allclose(ours, theirs, atol=2e-7)


@pytest.mark.parametrize(("width", "height"), [(700, 512), (512, 901), (1023, 611), (480, 480), (2991, 2020)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_biovils_heat_map_is_hi_mls(hi_ml: Any, width: int, height: int, interpolation: Any) -> None:
    from chiasm.evaluate.local_similarity import heat_map_on_image

    generator = torch.Generator().manual_seed(width)
    patches = torch.nn.functional.normalize(torch.randn(15, 15, 16, generator=generator), dim=-1)
    text = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator), dim=-1)
    engine = engine_of(
        hi_ml,
        texts=lambda *_, **__: text,
        get_projected_patch_embeddings=lambda _: (patches, (width, height)),
    )
    theirs = engine.get_similarity_map_from_raw_data(None, "x", interpolation=interpolation)
    ours = heat_map_on_image(
        (patches @ text[0]).numpy(), (width, height), crop_px=480, resize_px=512, interpolation=interpolation
    )
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
