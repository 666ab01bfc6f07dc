"""For tests, documentation and authors of plug-ins: a tiny real encoder, and checks that any encoder must pass.

In: an encoder or a reader. Out: nothing, or an ``AssertionError`` that says which law is broken. ``TinyEncoder`` and
the phantoms (``chiasm.data.phantoms``) stand wherever a test needs a model or data; nothing is mocked.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.errors import ChiasmError
from chiasm.types import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

#: Texts of several lengths, one of them longer than most contexts' first half.
TEXTS = (
    "a chest radiograph",
    "Small left pleural effusion. No pneumothorax.",
    "x",
    "Haematoxylin and eosin stain: invasive ductal carcinoma, grade 2, with lymphocytes at the margin.",
)
TOLERANCE = 1e-4


def TinyEncoder(seed: int = 0, *, kind: str = "vit", context_length: int = 32) -> Encoder:  # noqa: N802
    """Return a small real encoder with random weights: 32 px, 24 dimensions, about 100,000 weights.

    Its tokenizer is CLIP's with the bytes and the pieces of :data:`TEXTS` alone, so any text can be encoded.

    Args:
        seed: Of the weights; the same seed gives the same encoder everywhere.
        kind: ``vit`` (4×4 patches) or ``resnet``.
        context_length: Tokens per text.
    """
    from chiasm.data.tokenizers import ClipTokenizer

    tokenizer = ClipTokenizer.compact_from(TEXTS, context_length=context_length)
    if kind == "vit":
        image = ImageTowerConfig(kind="vit", image_size=32, patch_size=8, width=32, layers=2, heads=4)
    else:
        image = ImageTowerConfig(kind="resnet", image_size=32, width=8, layers=(1, 1), heads=4)
    config = EncoderConfig(
        image=image,
        text=TextTowerConfig(
            context_length=context_length, vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4
        ),
        projection=ProjectionConfig(dim=24),
        tokenizer=tokenizer.to_dict(),
        preprocess=Preprocess(size=32),
    )
    return Encoder(build_encoder_model(config, seed=seed), config, name=f"tiny-{kind}-{seed}")


def make_test_images(count: int = 3, *, seed: int = 0) -> list[Image]:
    """Return colour images of differing sizes, each unlike the others."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize((70 + 13 * i, 50 + 29 * i), Image.Resampling.BICUBIC))
    return images


def check_encoder(encoder: Encoder, *, tolerance: float = TOLERANCE) -> None:
    """Assert the laws of an encoder.

    Shapes and types; the same result twice; a row does not depend on the other rows of its batch, nor a text on its
    padding (a tower that says ``padding_counts``, as MedCLIP's does: on nothing but how far its batch is padded); unit norms on request; empty batches; patch features where the tower has them; the logit scale is a
    multiplier; the space changes with the weights and with nothing else; saving and loading is the identity, and
    loading draws nothing at random.

    Args:
        encoder: What to check; its weights are left as they were.
        tolerance: Largest difference between a row in two batches, relative to the largest value of the row.

    Raises:
        AssertionError: A law is broken; the message says which.
    """
    from chiasm.data.tokens import TruncationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # a context may be shorter than the texts
        _check_all(encoder, tolerance)


def _check_all(encoder: Encoder, tolerance: float) -> None:
    images, texts = make_test_images(3), list(TEXTS)
    if encoder.config.sides != "both":
        _check_one_side(encoder, images, texts, tolerance)
        return
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    size = encoder.preprocess_spec.size
    assert pixels.shape == (3, 3, size, size), f"preprocess gives {tuple(pixels.shape[1:])}, not (3, {size}, {size})"
    assert pixels.dtype == torch.float32, f"preprocess gives {pixels.dtype}"
    _check_side(encoder, "images", lambda rows: encoder.encode_image(pixels[rows]), 3, tolerance)
    tokens = encoder.tokenizer.encode(texts)
    _check_tokens(encoder, tokens)
    _check_texts(encoder, texts, tolerance)
    for what, raw, unit in (
        ("images", encoder.encode_image(pixels), encoder.encode_image(pixels, normalize=True)),
        ("texts", encoder.encode_text(texts), encoder.encode_text(texts, normalize=True)),
    ):
        norms = unit.float().norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-3), (
            f"normalised {what} have norms {norms.tolist()}"
        )
        expected = nn.functional.normalize(raw, dim=-1)
        assert torch.allclose(unit, expected, atol=1e-3), f"normalising {what} changes their direction"
    mixed = encoder.encode([texts[0], images[0], texts[1]], normalize_embeddings=True)
    assert np.shape(mixed) == (3, encoder.dim), "`encode` of a mixed list has a wrong shape"
    scale = encoder.logit_scale
    assert scale is None or 1.0 <= scale <= 100.0 + 1e-3, f"logit scale {scale}: a multiplier lies in [1, 100]"
    _check_patches(encoder, pixels)
    _check_space(encoder)
    _check_saving(encoder, pixels, texts)


def _check_one_side(encoder: Encoder, images: list[Image], texts: list[str], tolerance: float) -> None:
    assert encoder.logit_scale is None, "a backbone without the other side has no logit scale"
    if encoder.config.has_image:
        pixels = torch.stack([encoder.preprocess(image) for image in images])
        _check_side(encoder, "images", lambda rows: encoder.encode_image(pixels[rows]), 3, tolerance)
        _check_patches(encoder, pixels)
    else:
        _check_tokens(encoder, encoder.tokenizer.encode(texts))
        _check_texts(encoder, texts, tolerance)
        size = encoder.preprocess_spec.size
    try:
        if encoder.config.has_image:
            encoder.encode_text(texts)
        else:
            encoder.encode_image(torch.zeros(1, 3, size, size))
    except ChiasmError:
        pass
    else:
        raise AssertionError("the side that does not exist gives vectors")
    _check_space(encoder)
    _check_saving(encoder, pixels if encoder.config.has_image else None, texts)


def _check_texts(encoder: Encoder, texts: list[str], tolerance: float) -> None:
    """As for images; a text tower with ``padding_counts`` (MedCLIP's) may see how long the longest text of a batch is."""
    trunk = getattr(encoder.model.text, "transformer", None)
    longest = None
    if getattr(trunk, "padding_counts", False):
        longest = int(encoder.tokenizer.encode(texts).lengths.argmax())
    _check_side(
        encoder, "texts", lambda rows: encoder.encode_text([texts[i] for i in rows]), len(texts), tolerance, longest
    )


def _check_side(
    encoder: Encoder,
    what: str,
    embed: Callable[[Sequence[int]], Tensor],
    count: int,
    tolerance: float,
    companion: int | None = None,
) -> None:
    """``companion`` is the row that must be in every batch for the others to keep their results."""
    rows = list(range(count))
    together = embed(rows)
    assert together.shape == (count, encoder.dim), (
        f"{what}: shape {tuple(together.shape)}, not ({count}, {encoder.dim})"
    )
    assert together.is_floating_point(), f"{what}: type {together.dtype}"
    assert bool(torch.isfinite(together).all()), f"{what}: not all numbers are finite"
    assert torch.equal(together, embed(rows)), f"{what}: the same input gives two results"
    assert float((together[0] - together[1]).abs().max()) > 0, f"{what}: two inputs give one embedding"
    for row in rows:
        alone = embed([row] if companion is None else [row, companion])[0]
        difference = float((alone - together[row]).abs().max() / together[row].abs().max())
        assert difference <= tolerance, (
            f"{what}: row {row} changes by {difference:.1e} with the other rows of its batch"
        )
    assert embed([]).shape == (0, encoder.dim), f"{what}: an empty batch has shape {tuple(embed([]).shape)}"


def _check_tokens(encoder: Encoder, tokens: Any) -> None:
    ids, lengths = tokens.ids, tokens.lengths
    assert ids.dtype == torch.int64, f"token ids are {ids.dtype}"
    assert ids.shape[1] <= encoder.config.text.context_length, "token ids are wider than the context"
    assert int(ids.min()) >= 0, "token ids are negative"
    assert int(ids.max()) < encoder.tokenizer.vocab_size, "token ids exceed the vocabulary"
    assert bool(((lengths >= 1) & (lengths <= ids.shape[1])).all()), "lengths do not fit the ids"
    by_ids, by_text = encoder.encode_text(tokens), encoder.encode_text(list(TEXTS))
    assert torch.allclose(by_ids, by_text, rtol=1e-3, atol=1e-5), "tokens and their texts give different embeddings"


def _check_patches(encoder: Encoder, pixels: Tensor) -> None:
    try:
        patches = encoder.patch_features(pixels)
    except ChiasmError:
        return  # a tower without patch tokens says so
    assert patches.ndim == 4, f"patch features have shape {tuple(patches.shape)}, not (batch, rows, columns, dim)"
    assert patches.shape[0] == len(pixels), "patch features of another number of images"
    assert patches.shape[3] == encoder.dim, "patch features of another dimension than the space"
    assert bool(torch.isfinite(patches).all()), "patch features are not finite"


def _check_space(encoder: Encoder) -> None:
    space = encoder.space
    assert space.dim == encoder.dim, f"the space has {space.dim} dimensions, the encoder {encoder.dim}"
    assert encoder.space == space, "the space changes without reason"
    parameter = next(p for p in encoder.model.parameters() if p.is_floating_point() and p.numel())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1e-3)
        assert encoder.space != space, "the space does not notice changed weights"
        parameter.copy_(kept)
    assert encoder.space == space, "the space is not a function of the weights"


def _check_saving(encoder: Encoder, pixels: Tensor | None, texts: list[str]) -> None:
    from chiasm.load import load, save_encoder

    with tempfile.TemporaryDirectory() as folder:
        save_encoder(encoder, Path(folder) / "model")
        state = torch.random.get_rng_state()
        with _Draws() as draws:
            again = load(Path(folder) / "model", allow_code=True).to(encoder.device)
        assert not draws.names, f"loading draws at random: {', '.join(sorted(draws.names))}"
        assert torch.equal(state, torch.random.get_rng_state()), "loading moves torch's random generator"
        if encoder.model.dtype == torch.float32:
            assert again.space == encoder.space, (
                f"saving and loading changes the space: {encoder.space} to {again.space}"
            )
            if pixels is not None:
                assert torch.equal(again.encode_image(pixels), encoder.encode_image(pixels)), "saved: images differ"
            if encoder.config.has_text:
                assert torch.equal(again.encode_text(texts), encoder.encode_text(texts)), "saved: texts differ"
        if encoder.config.has_text:
            assert again.tokenizer.encode_ids(texts) == encoder.tokenizer.encode_ids(texts), "saved: token ids differ"
        assert again.preprocess_spec == encoder.preprocess_spec, "saved: the preprocessing differs"


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the random operations that run while it is active."""

    _RANDOM = frozenset(
        {"normal", "normal_", "uniform_", "bernoulli", "bernoulli_", "random_", "exponential_", "cauchy_"}
        | {"log_normal_", "geometric_", "multinomial"}
        | {"rand", "randn", "randint", "randperm", "rand_like", "randn_like"}
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        found = func(*args, **(kwargs or {}))
        # without memory nothing is drawn, and one number may be a seed
        if name in self._RANDOM and isinstance(found, Tensor) and not found.is_meta and found.numel() > 1:
            self.names.add(name)
        return found


def check_reader(samples: Sequence[Any]) -> None:
    """Assert the laws of what a data-set reader returns: a non-empty sequence of ``Sample`` with unique ids.

    Every sample has an image or a text; an image that is named exists; group keys are not empty.

    Raises:
        AssertionError: A law is broken; the message names the row, never its content.
    """
    from chiasm.types import Sample

    assert len(samples) > 0, "the reader found no samples"
    seen: set[str] = set()
    for row, sample in enumerate(samples):
        assert isinstance(sample, Sample), f"row {row} is {type(sample).__name__}, not Sample"
        assert sample.id, f"row {row} has an empty id"
        assert sample.id not in seen, f"row {row} repeats an id"
        seen.add(sample.id)
        assert sample.image is not None or sample.text, f"row {row} has neither image nor text"
        assert sample.image is None or sample.image.exists(), f"row {row} names an image that does not exist"
        assert sample.group, f"row {row} has no group"


def save_openai_archive(state: dict[str, Tensor], path: str | Path, *, half: bool = True) -> Path:
    """Write a state dict as OpenAI publishes CLIP: a TorchScript archive in mixed precision with three extra scalars.

    For tests of readers; torch itself makes the archive, from a module that has these names and no use.

    Args:
        state: Names and tensors in OpenAI's layout.
        path: Where to write.
        half: Store matrices of linear and convolution layers in float16, as OpenAI does.
    """
    root = _Carrier()
    kept_float = ("ln_", "bn", "embedding", "logit_scale", "running_", "num_batches")
    for name, tensor in state.items():
        # Batch norm inside `downsample` is called `1`: only matrices and their biases are halved by OpenAI.
        is_float = any(k in name for k in kept_float) or "downsample.1" in name
        halved = half and not is_float and tensor.is_floating_point()
        _place(root, name, tensor.detach().clone().half() if halved else tensor.detach().clone())
    for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are what they are
        methods = {"forward": torch.ones(1), "encode_image": torch.ones(1), "encode_text": torch.ones(1)}
        torch.jit.save(torch.jit.trace_module(root.eval(), methods), str(path))  # type: ignore[no-untyped-call]
    return Path(path)


class _Carrier(nn.Module):
    """A node of a tree of parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x * 1

    encode_image = encode_text = forward


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, leaf = name.split(".")
    node = root
    for part in parents:
        if part not in dict(node.named_children()):
            node.add_module(part, _Carrier())
        node = node.get_submodule(part)
    if tensor.is_floating_point() and "running_" not in leaf:
        node.register_parameter(leaf, nn.Parameter(tensor))
    else:
        node.register_buffer(leaf, tensor)
