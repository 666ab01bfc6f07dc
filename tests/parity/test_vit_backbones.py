"""UNI, kaiko's models, DINO and DINOv2 against timm: same weights in their own files, same pixels, same embeddings.

Reduced depth and width; names, shapes of positions and containers are those of the published files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from chiasm.encoders.base import Encoder, EncoderConfig
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError
from chiasm.load import load

pytestmark = pytest.mark.peer

TIGHT = 1e-5
MISS = 10 * TIGHT
WIDTH, LAYERS, HEADS = 128, 2, 2
#: Name -> the function of timm that makes the architecture, and what its users add.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni2-h": ("vit_giant_patch14_224", {"init_values": 1e-5, "dynamic_img_size": True, "no_embed_class": True,
               "reg_tokens": 8, "mlp_ratio": 2.66667 * 2, "act_layer": nn.SiLU}),
    "kaiko-vits8": ("vit_small_patch8_224", {}),
    "kaiko-vits16": ("vit_small_patch16_224", {}),
    "kaiko-vitb8": ("vit_base_patch8_224", {}),
    "kaiko-vitb16": ("vit_base_patch16_224", {}),
    "kaiko-vitl14": ("vit_large_patch14_reg4_dinov2", {"dynamic_img_size": True}),
    "dino-vits8": ("vit_small_patch8_224", {}),
    "dino-vits16": ("vit_small_patch16_224", {}),
    "dino-vitb8": ("vit_base_patch8_224", {}),
    "dino-vitb16": ("vit_base_patch16_224", {}),
    "dinov2-vits14": ("vit_small_patch14_dinov2", {"dynamic_img_size": True}),
    "dinov2-vitb14": ("vit_base_patch14_dinov2", {"dynamic_img_size": True}),
    "dinov2-vitl14": ("vit_large_patch14_dinov2", {"dynamic_img_size": True}),
    "dinov2-vits14-reg": ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True}),
    "dinov2-vitb14-reg": ("vit_base_patch14_reg4_dinov2", {"dynamic_img_size": True}),
    "dinov2-vitl14-reg": ("vit_large_patch14_reg4_dinov2", {"dynamic_img_size": True}),
    "lunit-vits16": ("vit_small_patch16_224", {}),
}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("pos_embed"):  # neighbours differ, so that every way to resize gives another result
                tensor.copy_(0.5 * noise)
            elif name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")):
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.ndim > 1 and tensor[0].numel() > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.3 * noise)


def timm_model(name: str) -> Any:
    import timm

    architecture, options = TIMM[name]
    if name == "uni2-h":
        options = options | {"mlp_layer": timm.layers.SwiGLUPacked}
    model = timm.create_model(
        architecture, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=0, pretrained=False, **options
    )
    randomise(model)
    return model.eval()


def small(config: EncoderConfig, **image: Any) -> EncoderConfig:
    tower = replace(config.image, width=WIDTH, layers=LAYERS, heads=HEADS, **image)
    return replace(config, image=tower, projection=replace(config.projection, dim=WIDTH))


def file_of(name: str, model: Any) -> dict[str, Tensor]:
    """The state dict as the authors publish it: DINOv2's and kaiko's ViT-L in DINOv2's own names."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if name.startswith("dinov2-") or name == "kaiko-vitl14":
        state["mask_token"] = torch.randn(1, WIDTH)
        if "reg_token" in state:
            state["register_tokens"] = state.pop("reg_token")
            position = torch.randn(1, 1, WIDTH)
            state["cls_token"] = state["cls_token"] - position  # timm folds the class token's position into it
            state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        assert state["pos_embed"].shape == (1, 1370, WIDTH)
    return state


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """A function that writes a file and loads it under the name of its model, whose declaration is made small."""

    def read(name: str, state: dict[str, Any], **image: Any) -> Encoder:
        entry = CATALOG.get(name)
        monkeypatch.setitem(CATALOG._items, name, replace(entry, config=small(entry.config, **image)))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"  # a model maps its file: never write over it
        torch.save(state, path)
        found = load(name, pretrained=path)
        monkeypatch.setitem(CATALOG._items, name, entry)
        return found

    return read


def as_the_authors_resize(name: str, model: Any) -> Any:
    """DINOv2 without registers resizes positions by a rule that timm does not have; timm gets the result."""
    if not name.startswith("dinov2-") or name.endswith("-reg"):
        return model
    side, grid = 37, 16
    positions = model.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = float(grid + 0.1) / side
    resized = F.interpolate(positions, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert resized.shape[-2:] == (grid, grid)
    flat = resized.permute(0, 2, 3, 1).reshape(1, grid**2, -1)
    model.pos_embed = nn.Parameter(torch.cat([model.pos_embed[:, :1], flat], dim=1))
    model.patch_embed.grid_size = (grid, grid)
    return model


def pixels_of(encoder: Encoder) -> Tensor:
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((300, 411), (257, 224))]
    return torch.stack([encoder.preprocess(image) for image in images])


def error(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.abs().clamp(min=float(theirs.pow(2).mean(1).sqrt().min()))
    return float(((ours - theirs).abs() / scale).max())


def embed(model: Any, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(pixels)
        return found


@pytest.mark.parametrize("name", list(TIMM))
def test_embeddings(name: str, loaded: Callable[..., Encoder]) -> None:
    theirs = timm_model(name)
    state = file_of(name, theirs)
    encoder = loaded(name, state)
    pixels = pixels_of(encoder)
    expected = embed(as_the_authors_resize(name, theirs), pixels)
    found = encoder.encode_image(pixels)
    assert error(found, expected) <= TIGHT
    if encoder.config.image.layer_scale:
        with pytest.raises(CheckpointError, match=r"ls_1|layer_scale"):
            loaded(name, state, layer_scale=False)


@pytest.mark.parametrize("name", ["uni", "dinov2-vits14", "kaiko-vitl14"])
def test_each_trap_misses(name: str, loaded: Callable[..., Encoder]) -> None:
    """LayerScale or registers left out, another epsilon, another rule for positions."""
    theirs = timm_model(name)
    with torch.no_grad():  # small activations, as trained patches of even tissue have: epsilon counts
        for tensor in (
            theirs.patch_embed.proj.weight,
            theirs.patch_embed.proj.bias,
            theirs.pos_embed,
            theirs.cls_token,
        ):
            tensor.mul_(0.02)
        if theirs.reg_token is not None:
            theirs.reg_token.mul_(0.02)
        for block in theirs.blocks:
            for scale in (block.ls1.gamma, block.ls2.gamma):
                scale.mul_(0.02)
    state = file_of(name, theirs)
    encoder = loaded(name, state)
    pixels = pixels_of(encoder)
    expected = embed(as_the_authors_resize(name, timm_like(name, theirs)), pixels)
    assert error(encoder.encode_image(pixels), expected) <= 3 * TIGHT
    assert error(loaded(name, state, ln_eps=1e-5).encode_image(pixels), expected) > MISS
    plain = {k: v for k, v in state.items() if ".ls" not in k}
    assert error(loaded(name, plain, layer_scale=False).encode_image(pixels), expected) > MISS
    if encoder.config.image.registers:
        bare = {k: v for k, v in state.items() if k not in ("register_tokens", "reg_token")}
        assert error(loaded(name, bare, registers=0).encode_image(pixels), expected) > MISS
    if name == "dinov2-vits14":
        with torch.inference_mode():
            assert error(encoder.encode_image(pixels), timm_like(name, theirs)(pixels)) > MISS


def timm_like(name: str, model: Any) -> Any:
    copy = timm_model(name)
    copy.load_state_dict(model.state_dict())
    return copy


def test_kaiko_reads_both_forms_of_its_large_model(loaded: Callable[..., Encoder]) -> None:
    """timm's names (registers, positions without the class token) and DINOv2's give one model."""
    theirs = timm_model("kaiko-vitl14")
    one = loaded("kaiko-vitl14", dict(theirs.state_dict()))
    other = loaded("kaiko-vitl14", file_of("kaiko-vitl14", theirs))
    pixels = pixels_of(one)
    assert error(one.encode_image(pixels), other.encode_image(pixels)) <= TIGHT


def test_a_training_checkpoint_gives_the_teacher(loaded: Callable[..., Encoder]) -> None:
    teacher, student = timm_model("dino-vits16"), timm_model("dino-vits16")
    randomise(student, seed=1)
    head = {"head.mlp.0.weight": torch.randn(4, WIDTH), "head.last_layer.weight_g": torch.randn(4, 1)}
    state = {
        "student": {f"module.{k}": v for k, v in ({f"backbone.{k}": v for k, v in student.state_dict().items()} | head).items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | head,
        "epoch": 100, "optimizer": {"state": {}}, "args": {"arch": "vit_small"}, "dino_loss": {"center": torch.randn(1, 4)},
    }  # fmt: skip
    encoder = loaded("dino-vits16", state)
    pixels = pixels_of(encoder)
    assert error(encoder.encode_image(pixels), embed(teacher, pixels)) <= TIGHT
    assert error(encoder.encode_image(pixels), embed(student, pixels)) > MISS


def test_blocks_in_chunks(loaded: Callable[..., Encoder]) -> None:
    """DINOv2's training checkpoints number blocks inside chunks and wrap the backbone."""
    theirs = timm_model("dinov2-vits14")
    names = {k: k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.") for k in theirs.state_dict()}
    wrapped = {f"backbone.{names[k]}": v for k, v in theirs.state_dict().items()}
    wrapped |= {"backbone.mask_token": torch.randn(1, WIDTH), "dino_head.mlp.0.weight": torch.randn(4, WIDTH)}
    encoder = loaded("dinov2-vits14", {"teacher": wrapped})
    pixels = pixels_of(encoder)
    expected = embed(as_the_authors_resize("dinov2-vits14", theirs), pixels)
    assert error(encoder.encode_image(pixels), expected) <= TIGHT


def test_swiglu_is_not_gelu(loaded: Callable[..., Encoder]) -> None:
    """The gate is the first half: with the halves exchanged the model is another one."""
    theirs = timm_model("uni2-h")
    state = dict(theirs.state_dict())
    encoder = loaded("uni2-h", state)
    pixels = pixels_of(encoder)
    expected = embed(theirs, pixels)
    for n in range(LAYERS):
        for part in ("weight", "bias"):
            key = f"blocks.{n}.mlp.fc1.{part}"
            state[key] = torch.cat(state[key].chunk(2)[::-1])
    assert error(loaded("uni2-h", state).encode_image(pixels), expected) > MISS
    with pytest.raises(CheckpointError, match="other shapes"):
        loaded("uni2-h", state, activation="gelu")


def transform_of(name: str) -> Any:
    """The authors' transforms, written with torchvision."""
    from torchvision.transforms import InterpolationMode, v2
    from torchvision.transforms import transforms as v1

    imagenet = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name.startswith("uni"):
        return v1.Compose([v1.Resize(224), v1.CenterCrop(224), v1.ToTensor(), imagenet])
    if name.startswith("dino"):
        bicubic = InterpolationMode.BICUBIC
        return v1.Compose([v1.Resize(256, interpolation=bicubic), v1.CenterCrop(224), v1.ToTensor(), imagenet])
    half = v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    steps = [v2.ToImage(), v2.Resize(size=224), v2.CenterCrop(size=224), v2.ToDtype(torch.float32, scale=True), half]
    return v2.Compose(steps)


@pytest.mark.parametrize("name", ["uni", "uni2-h", "dino-vits16", "dinov2-vits14", "kaiko-vits8", "kaiko-vitl14"])
@pytest.mark.parametrize("size", [(317, 411), (231, 224), (96, 96), (640, 257)])
def test_pixels(name: str, size: tuple[int, int]) -> None:
    from chiasm.data.transforms import image_transform

    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    spec = CATALOG.get(name).config.preprocess
    expected, found = transform_of(name)(image), image_transform(spec)(image)
    # kaiko's README resizes the tensor, in whole numbers of 255; chiasm resizes with Pillow
    tolerance = 1.001 / 255 / 0.5 if name.startswith("kaiko") else 1e-6
    assert float((found - expected).abs().max()) <= tolerance
    for wrong in (
        CATALOG.get("openai/ViT-B-32").config.preprocess,
        CATALOG.get("kaiko-vits16" if "kaiko" not in name else "uni").config.preprocess,
    ):
        assert float((image_transform(wrong)(image) - expected).abs().mean()) > 20 / 255 / 0.5 / 10


def test_phikon_in_the_layout_of_transformers(loaded: Callable[..., Encoder], tmp_path: Path) -> None:
    """A ``ViTModel`` as it was published (the names of transformers 4) and as version 5 names it."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-12,
    )  # fmt: skip
    theirs = ViTModel(config)
    randomise(theirs)
    theirs.train(False)
    new = theirs.state_dict()
    renames = (
        ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    old = {}
    for name, tensor in new.items():
        published = name
        for a, b in renames:
            published = published.replace(a, b)
        old[published] = tensor
    ViTModel(config).save_pretrained(tmp_path / "saved")  # what transformers itself writes has one of the two forms
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert set(file.keys()) in (set(old), set(new))
    for state in (old, new):
        encoder = loaded("phikon", state)
        pixels = pixels_of(encoder)
        with torch.inference_mode():
            expected = theirs(pixel_values=pixels).last_hidden_state[:, 0]
        assert error(encoder.encode_image(pixels), expected) <= TIGHT
    swapped = {k.replace("value", "x").replace("key", "value").replace("x", "key"): v for k, v in old.items()}
    assert error(loaded("phikon", swapped).encode_image(pixels), expected) > MISS


@pytest.mark.parametrize("name", ["uni", "uni2-h", "dino-vits8", "kaiko-vitl14"])
def test_a_users_own_vit_tells_its_shape(name: str, tmp_path: Path) -> None:
    theirs = timm_model(name)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "own.pth")
    encoder = load(tmp_path / "own.pth", family="histo-vit")
    size = encoder.preprocess_spec.size
    assert size == (518 if name == "kaiko-vitl14" else 224)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert error(encoder.encode_image(pixels), embed(theirs, pixels)) <= TIGHT
    assert encoder.dim == WIDTH


@pytest.mark.parametrize("size", [(317, 411), (96, 96)])
def test_pixels_of_phikon(size: tuple[int, int]) -> None:
    """transformers 5 resizes the tensor in whole numbers of 255, chiasm with Pillow: at most one of them apart."""
    from transformers import ViTImageProcessor

    from chiasm.data.transforms import image_transform

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor: Any = ViTImageProcessor(size={"height": 224, "width": 224}, resample=2, image_mean=mean, image_std=std)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)).resize(size)
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    found = image_transform(CATALOG.get("phikon").config.preprocess)(image)
    assert float(((found - expected).abs() * torch.tensor(std)[:, None, None] * 255).max()) <= 1.001
    cropped = image_transform(CATALOG.get("uni").config.preprocess)(image)
    if size[0] != size[1]:
        assert float((cropped - expected).abs().mean()) > 0.05
