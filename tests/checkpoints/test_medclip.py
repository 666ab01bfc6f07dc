"""MedCLIP's archives load and agree with an independent implementation (tests/golden/make_medclip.py); traps fail it."""

from __future__ import annotations

import io
import json
import runpy
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chiasm.checkpoints.medclip import DROPPED
from chiasm.data.tokens import Tokens
from chiasm.encoders.base import Encoder, ProjectionConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError
from chiasm.load import load
from chiasm.types import Preprocess

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "medclip.json").read_text())
make = runpy.run_path(str(GOLDEN / "make_medclip.py"))
TOLERANCE = {"swin": 1e-5, "resnet": 1e-4}
NAMES = {"swin": "medclip-swin", "resnet": "medclip-resnet"}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """Write the zip archive as it is published, then load it as a small MedCLIP."""

    def make_encoder(
        tower: str = "swin", tensors: dict[str, Tensor] | None = None, *, masked_mean: bool = False
    ) -> Encoder:
        entry = CATALOG.get(NAMES[tower])
        config = entry.config
        options = {"config": {**config.image.options.get("config", {}), **make["SWIN"]}}
        if tower == "resnet":
            options = make["RESNET"]
        text = replace(config.text, context_length=20, options={**make["BERT"], "masked_mean": masked_mean})
        config = replace(
            config,
            image=replace(config.image, image_size=64, options=options),
            text=text,
            projection=ProjectionConfig(dim=make["DIM"]),
            tokenizer={**config.tokenizer, "context_length": 20},
            preprocess=replace(config.preprocess, size=64),
        )
        monkeypatch.setitem(CATALOG._items, "small", replace(entry, name="small", aliases=(), config=config))
        buffer = io.BytesIO()
        torch.save(make["weights"](tower) if tensors is None else tensors, buffer)
        with zipfile.ZipFile(tmp_path / "pretrained.zip", "w") as archive:
            archive.writestr("pytorch_model.bin", buffer.getvalue())
        return load(tmp_path / "pretrained.zip", family="small")

    return make_encoder


def error(ours: Tensor, expected: Any) -> float:
    theirs = expected if isinstance(expected, Tensor) else torch.tensor(expected)
    scale = torch.maximum(theirs.abs(), theirs.square().mean(1, keepdim=True).sqrt())
    return float(((ours - theirs).abs() / scale).max())


def tokens(pad_to: int | None = None) -> Tokens:
    ids, lengths = make["ids"]()
    if pad_to is not None:
        ids = torch.nn.functional.pad(ids, (0, pad_to - ids.shape[1]))
    return Tokens(ids, lengths)


@pytest.mark.parametrize("tower", ["swin", "resnet"])
def test_images_agree(read: Callable[..., Encoder], tower: str) -> None:
    ours = read(tower).encode_image(make["pixels"]())
    assert error(ours, EXPECTED[f"image_{tower}"]) <= TOLERANCE[tower]


@pytest.mark.parametrize("pad_to", [None, 20])
def test_texts_agree_however_far_the_tokenizer_pads(read: Callable[..., Encoder], pad_to: int | None) -> None:
    """Our tokenizer pads to the full context; the published mean runs to the longest text of the batch."""
    assert error(read().encode_text(tokens(pad_to)), EXPECTED["text"]) <= 1e-5


def test_a_text_depends_on_the_length_of_its_batch_as_published(read: Callable[..., Encoder]) -> None:
    encoder, (ids, lengths) = read(), make["ids"]()
    alone = encoder.encode_text(Tokens(ids[:1], lengths[:1]))
    assert error(alone, EXPECTED["text_alone"]) <= 1e-5
    assert error(alone, EXPECTED["text"][:1]) > 1e-2


def test_the_masked_mean_is_offered_by_name(read: Callable[..., Encoder]) -> None:
    encoder, (ids, lengths) = read(masked_mean=True), make["ids"]()
    assert error(encoder.encode_text(tokens()), EXPECTED["text_masked"]) <= 1e-5
    assert error(encoder.encode_text(Tokens(ids[:1], lengths[:1])), EXPECTED["text_alone"]) <= 1e-5
    assert encoder.config.digest != read().config.digest


@pytest.mark.parametrize("trap", ["masked", "cls", "last_four", "from_zero"])
def test_each_text_trap_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    theirs = make["encode_text"](make["weights"]("swin"), *make["ids"](), trap)
    assert error(read().encode_text(tokens()), theirs) > 1e-3


def test_padding_to_the_full_context_fails_the_tolerance(read: Callable[..., Encoder]) -> None:
    padded, lengths = tokens(20)[:2]
    theirs = make["encode_text"](make["weights"]("swin"), padded, lengths)
    assert error(read().encode_text(tokens()), theirs) > 1e-3


@pytest.mark.parametrize("trap", ["no_shift", "first_token"])
def test_each_image_trap_fails_the_tolerance(read: Callable[..., Encoder], trap: str) -> None:
    pixels = make["pixels"]()
    theirs = make["encode_image"](make["weights"]("swin"), "swin", pixels, trap)
    assert error(read().encode_image(pixels), theirs) > 1e-3


def test_swapped_query_and_key_fail_the_tolerance(read: Callable[..., Encoder]) -> None:
    """What a wrong line in the table of names would do."""
    swapped = {}
    for name, tensor in make["weights"]("swin").items():
        other = name.replace("self.value", "self.VALUE").replace("self.query", "self.value")
        swapped[other.replace("self.VALUE", "self.query")] = tensor
    ours = read(tensors=swapped).encode_image(make["pixels"]())
    assert error(ours, EXPECTED["image_swin"]) > 1e-3


def test_a_downsample_moved_by_one_stage_is_not_loaded(read: Callable[..., Encoder]) -> None:
    """timm's place of it: a file with these names is another layout, and is refused."""
    moved = {k.replace("layers.0.downsample", "layers.1.downsample"): v for k, v in make["weights"]("swin").items()}
    with pytest.raises(CheckpointError, match="downsample"):
        read(tensors=moved)


def test_the_other_image_tower_is_refused(read: Callable[..., Encoder]) -> None:
    with pytest.raises(CheckpointError):
        read("swin", make["weights"]("resnet"))
    with pytest.raises(CheckpointError):
        read("resnet", make["weights"]("swin"))


def test_what_may_be_absent_or_besides(read: Callable[..., Encoder]) -> None:
    """Files of newer transformers lack the buffers; everything else is needed, and nothing else is taken."""
    whole = make["weights"]("resnet")
    lean = {k: v for k, v in whole.items() if not k.endswith((*DROPPED, "num_batches_tracked"))}
    assert len(lean) < len(whole)
    assert error(read("resnet", lean).encode_image(make["pixels"]()), EXPECTED["image_resnet"]) <= 1e-4
    with pytest.raises(CheckpointError, match="surprise"):
        read("resnet", {**whole, "text_model.surprise": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"layer2"):
        read("resnet", {k: v for k, v in whole.items() if "layer2.1.conv2" not in k})


def test_the_scale_is_clamped_as_the_reference_clamps_it(read: Callable[..., Encoder]) -> None:
    assert read().logit_scale == pytest.approx(float(torch.tensor(4.0).exp()))
    large = read(tensors={**make["weights"]("swin"), "logit_scale": torch.tensor(5.3)})
    assert large.logit_scale == pytest.approx(100.0, rel=1e-5)


def test_the_wrong_resize_shows(read: Callable[..., Encoder]) -> None:
    from chiasm.data.transforms import image_transform
    from chiasm.testing import make_test_images

    encoder, image = read(), make_test_images(1)[0]
    right = encoder.encode_image(encoder.preprocess(image))
    for wrong in (Preprocess(64), replace(encoder.preprocess_spec, interpolation="bilinear")):
        assert error(encoder.encode_image(image_transform(wrong)(image)), right) > 1e-3


def test_patches_average_to_the_image(read: Callable[..., Encoder]) -> None:
    for tower in ("swin", "resnet"):
        encoder, pixels = read(tower), make["pixels"]()
        patches = encoder.patch_features(pixels, normalize=False)
        assert error(patches.mean((1, 2)), encoder.encode_image(pixels)) < 1e-4


def test_the_published_shapes() -> None:
    from chiasm.encoders.named import build_named_tower

    config = CATALOG.get("medclip-swin").config
    with torch.device("meta"):
        text = build_named_tower(config.text)
    assert sum(p.numel() for p in text.parameters()) == 108_310_272 - 768 * 769  # BioClinicalBERT without its pooler
    assert (config.projection.dim, text.output_dim, config.text.context_length) == (512, 768, 77)


def test_strings_go_the_published_way(read: Callable[..., Encoder], tmp_path: Path) -> None:
    """BioClinicalBERT's vocabulary beside the archive: lower case, WordPiece, cut at the context, padded to the longest."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "mild",
        "ed",
        "##ema",
        "at",
        "base",
        *(f"p{i}" for i in range(80)),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    encoder = read()
    texts = [" Mild  EDEMA at base", "edema"]
    rows = [[2, 5, 6, 7, 8, 9, 3], [2, 6, 7, 3]]
    assert encoder.tokenizer.encode_ids(texts) == rows
    table = torch.tensor([rows[0], rows[1] + [0] * 3])
    theirs = make["encode_text"](make["weights"]("swin"), table, torch.tensor([7, 4]))
    assert error(encoder.encode_text(texts), theirs) <= 1e-5
    one = make["encode_text"](make["weights"]("swin"), torch.tensor([rows[1]]), torch.tensor([4]))
    assert error(encoder.encode_text("edema"), one) <= 1e-5
    with pytest.warns(Warning, match="lost their ends"):
        assert encoder.encode_text("mild " * 40).shape == (1, make["DIM"])


def test_both_published_resizes_have_a_name() -> None:
    """The authors' processor is bicubic, their evaluation bilinear; the weights are the same."""
    for name in ("medclip-swin", "medclip-resnet"):
        user, figures, masked = (CATALOG.get(f"{name}{end}") for end in ("", "-bilinear", "-masked"))
        assert (user.config.preprocess.interpolation, figures.config.preprocess.interpolation) == (
            "bicubic",
            "bilinear",
        )
        assert user.weights == figures.weights == masked.weights
        assert masked.config.text.options == {"masked_mean": True}
        assert masked.description != user.description
