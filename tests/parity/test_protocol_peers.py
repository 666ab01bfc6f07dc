"""Prompts and sums of published protocols beside open_clip's own."""

from __future__ import annotations

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
