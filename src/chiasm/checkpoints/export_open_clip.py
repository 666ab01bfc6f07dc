"""A declaration of chiasm's as open_clip's ``open_clip_config.json``; what open_clip cannot express is refused.

In: ``EncoderConfig.to_dict`` and the tokenizer's ``to_dict``. Out: :class:`Exported`, the configuration with the
differences that remain. The tensors' names are made by ``open_clip_names.from_native``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chiasm.checkpoints.open_clip_names import is_timm_shape, needs_custom_text
from chiasm.errors import CheckpointError

TARGET = "open_clip"
#: Names that timm has for plain ViTs and SigLIP's, by (width, blocks, heads, MLP's hidden width).
_SHAPES: Mapping[tuple[int, int, int, int], str] = {
    (192, 12, 3, 768): "tiny",
    (384, 12, 6, 1536): "small",
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
_TIMM_NAMES = frozenset(
    {
        *(f"vit_{size}_patch{p}_{px}" for size in ("small", "base", "large") for p in (16, 32) for px in (224, 384)),
        "vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_small_patch8_224", "vit_base_patch8_224",
        *(f"vit_base_patch16_siglip_{px}" for px in (224, 256, 384, 512)), "vit_base_patch32_siglip_256",
        *(f"vit_large_patch16_siglip_{px}" for px in (256, 384, 512)),
        *(f"vit_so400m_patch14_siglip_{px}" for px in (224, 378, 384)),
        *(f"vit_so400m_patch16_siglip_{px}" for px in (256, 384, 512)),
        *(f"vit_giantopt_patch16_siglip_{px}" for px in (256, 384)),
    }
)  # fmt: skip
#: SigLIP's shapes that timm builds with the tanh form of GELU.
_TANH = ("vit_base_patch32_siglip", "vit_large_patch16_siglip_512", "vit_so400m_patch16_siglip", "vit_giantopt")
TIDIED = "texts are tidied first: mended encoding, no HTML entities, single spaces"


@dataclass(frozen=True)
class Exported:
    """What is written beside the weights.

    Attributes:
        files: Name of a JSON file -> its content.
        differences: What the other format's own code will do otherwise to some inputs; vectors of them differ.
        notes: What it will do otherwise to rare inputs: palettes, transparency, broken encodings.
    """

    files: Mapping[str, Mapping[str, Any]]
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def unfit(target: str, what: str) -> CheckpointError:
    """Return the error for what a format cannot express."""
    return CheckpointError(f"{target} cannot express {what}", hint="`--to chiasm` keeps everything")


def check_whole(config: Mapping[str, Any], target: str) -> None:
    """Raise ``CheckpointError`` for models that only chiasm's own format holds."""
    if config.get("sides", "both") != "both":
        raise unfit(target, f"a model of {config['sides']}s alone")
    if config.get("scale", "learned") != "learned":
        raise unfit(target, "a model without a logit scale")
    if config.get("members") is not None:
        raise unfit(target, "several models side by side")
    for side in ("image", "text"):
        if config[side]["kind"] in ("named", "python"):
            raise unfit(target, f"the {side} tower `{config[side].get('source')}`")
        if side in config["projection"].get("standardize", ()):
            raise unfit(target, f"a standardized {side} tower")
        if config[side].get("lora"):
            raise CheckpointError(f"the {side} tower has low-rank adapters", hint="merge them first: `merge_lora`")


def open_clip_config(config: Mapping[str, Any], tokenizer: Mapping[str, Any], directory: str) -> Exported:
    """Return ``open_clip_config.json`` for a declaration.

    Args:
        config: ``EncoderConfig.to_dict()``.
        tokenizer: ``to_dict()`` of its tokenizer.
        directory: Where it will lie; a Hugging Face text tower without a hub name has its configuration there.

    Raises:
        CheckpointError: Something that open_clip cannot express.
    """
    check_whole(config, TARGET)
    image, text, projection = config["image"], config["text"], config["projection"]
    quick = _quick_gelu(config)
    vision = _timm_vision(config) if is_timm_shape(config) else _vision(config)
    notes: tuple[str, ...] = ()
    words: dict[str, Any]
    files: dict[str, Mapping[str, Any]] = {}
    if text["kind"] == "huggingface":
        words = _huggingface_text(config, directory)
        files["config.json"] = _stated(text)
    else:
        words = _text(config)
    if tokenizer.get("kind") == "huggingface":
        words["hf_tokenizer_name"] = words.get("hf_model_name", directory)
        clean = tokenizer.get("clean")
        if clean not in (None, "whitespace"):
            words["tokenizer_kwargs"] = {"clean": clean}
        notes += (TIDIED,) if clean is None else ()
    elif tokenizer.get("keep") is not None:
        raise unfit(TARGET, "a shortened vocabulary")
    model: dict[str, Any] = {"embed_dim": projection["dim"], "vision_cfg": vision, "text_cfg": words}
    if quick:
        model["quick_gelu"] = True
    if needs_custom_text(config):
        model["custom_text"] = True
    if config.get("logit_bias_init") is not None:
        model["init_logit_bias"] = config["logit_bias_init"]
    preprocess, differences, more = _preprocess(config["preprocess"], image["image_size"])
    files["open_clip_config.json"] = {"model_cfg": model, "preprocess_cfg": preprocess}
    return Exported(files, differences, notes + more)


def _quick_gelu(config: Mapping[str, Any]) -> bool:
    """Whether the one switch that open_clip has for both native towers is on."""
    found = set()
    if config["image"]["kind"] == "vit" and not is_timm_shape(config):
        found.add(config["image"]["activation"])
    if config["text"]["kind"] == "clip":
        found.add(config["text"]["activation"])
    if "swiglu" in found:
        raise unfit(TARGET, "SwiGLU")
    if "quick_gelu" in found and len(found) > 1:
        raise unfit(TARGET, f"different activations in its two towers ({', '.join(sorted(found))})")
    return found == {"quick_gelu"}


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    image, projection = config["image"], config["projection"]
    if image["kind"] == "huggingface":
        raise unfit(TARGET, f"an image tower of transformers (`{image.get('source')}`)")
    if projection["image"] != "linear" or "image" in (projection.get("biased") or ()):
        raise unfit(TARGET, "another projection of its own image towers than one matrix")
    heads = image.get("heads") or (image["width"] if image["kind"] == "vit" else image["width"] * 32) // 64
    result: dict[str, Any] = {"image_size": image["image_size"], "layers": image["layers"], "width": image["width"]}
    if image["kind"] == "resnet":
        if image["pool"] != "attention" or image["width"] * 32 % heads or len(image["layers"]) != 4:
            raise unfit(TARGET, "this ResNet (it has four stages and attention pooling)")
        return result | {"head_width": image["width"] * 32 // heads}
    eps = image["ln_eps"]
    if image["pool"] == "attention" and (eps != 1e-5 or projection["dim"] % 8):
        raise unfit(TARGET, "this attention pooling (it has 8 heads and an epsilon of 1e-5)")
    result |= {"patch_size": image["patch_size"], "head_width": image["width"] // heads}
    if image["mlp_ratio"] != 4.0:
        result["mlp_ratio"] = image["mlp_ratio"]
    if not image["pre_norm"]:
        result["no_ln_pre"] = True
    if image["layer_scale"]:
        result["ls_init_value"] = 1e-5
    if image["pool"] == "mean":
        result["pool_type"] = "avg"
    if image["pool"] == "attention":
        result |= {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 8}
    return result | _details(image["activation"], eps)


def _timm_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    image, projection = config["image"], config["projection"]
    heads = image.get("heads") or image["width"] // 64
    shape = (image["width"], image["layers"], heads, int(image["width"] * image["mlp_ratio"]))
    siglip = image.get("class_token") is False
    name = f"vit_{_SHAPES.get(shape)}_patch{image['patch_size']}{'_siglip' if siglip else ''}_{image['image_size']}"
    activation = "gelu_tanh" if name.startswith(_TANH) else "gelu"
    fits = (
        name in _TIMM_NAMES
        and image["activation"] == activation
        and image["ln_eps"] == 1e-6
        and not (image["pre_norm"] or image["layer_scale"] or image["registers"])
        and (image["pool"] == "map") == siglip
    )
    if not fits:
        raise unfit(TARGET, f"this image tower: timm has no ViT of its shape (width, blocks, heads, MLP {shape})")
    pool = {"cls": "token", "mean": "avg", "map": "map"}[image["pool"]]
    if projection["image"] == "mlp" or (projection["image"] == "none" and pool == "avg"):
        raise unfit(TARGET, "the projection of this image tower")
    result = {
        "image_size": image["image_size"],
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": projection["image"],
    }
    return result | ({"timm_proj_bias": True} if "image" in (projection.get("biased") or ()) else {})


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    text, projection = config["text"], config["projection"]
    pools = {"eot": "argmax", "last": "last", "cls": "first", "appended": "argmax"}
    if text["pool"] not in pools:
        raise unfit(TARGET, f"the pooling `{text['pool']}` of its own text tower")
    if text.get("cls_mask") == "correct":
        raise unfit(TARGET, "the corrected mask of CoCa's token (3.3 has no field for it)")
    if projection["text"] == "mlp":
        raise unfit(TARGET, "an MLP as the projection of its own text tower")
    result: dict[str, Any] = {
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "width": text["width"],
        "heads": text.get("heads") or text["width"] // 64,
        "layers": text["layers"],
    }
    if text["mlp_ratio"] != 4.0:
        result["mlp_ratio"] = text["mlp_ratio"]
    if not text["causal"]:
        result["no_causal_mask"] = True
    if pools[text["pool"]] != "argmax":
        result["pool_type"] = pools[text["pool"]]
    if text["pool"] == "appended":
        result["embed_cls"] = True
    if projection["text"] == "none":
        result["proj_type"] = "none"
    if "text" in (projection.get("biased") or ()):
        result["proj_bias"] = True
    return result | _details(text["activation"], text.get("ln_eps", 1e-5))


def _huggingface_text(config: Mapping[str, Any], directory: str) -> dict[str, Any]:
    text, projection = config["text"], config["projection"]
    stated = _stated(text)
    width = stated.get("hidden_size", stated.get("d_model"))
    pooler = "cls_pooler" if text.get("options", {}).get("pooler") else f"{text['pool']}_pooler"
    pooler = {"cls_pooler": pooler, "mean_pooler": pooler}.get(pooler, "")
    if not text.get("options", {}).get("pooler") and text["pool"] == "cls":
        pooler = "cls_last_hidden_state_pooler"
    if not pooler:
        raise unfit(TARGET, f"the pooling `{text['pool']}` of a text tower of transformers")
    hidden = projection.get("hidden")
    if "text" in (projection.get("biased") or ()) or (hidden and hidden != (width + projection["dim"]) // 2):
        raise unfit(TARGET, "this projection of a text tower of transformers")
    source = str(text.get("source", ""))
    return {
        "hf_model_name": source if source.count("/") == 1 and not source.startswith((".", "/")) else directory,
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": None if projection["text"] == "none" else projection["text"],
        "context_length": text["context_length"],
    }


def _stated(text: Mapping[str, Any]) -> Mapping[str, Any]:
    import json

    stated = text.get("options", {}).get("config")
    values = json.loads(stated) if isinstance(stated, str) else stated
    if not isinstance(values, Mapping):
        raise unfit(TARGET, "a text tower that does not state its configuration")
    return values


def _details(activation: str, eps: float) -> dict[str, Any]:
    result: dict[str, Any] = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    return result | ({"norm_kwargs": {"eps": eps}} if eps != 1e-5 else {})


def _preprocess(stated: Mapping[str, Any], size: int) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    check_preprocess(stated, TARGET, ("shortest", "squash", "longest_pad"), ("bicubic", "bilinear"))
    mode = {"shortest": "shortest", "squash": "squash", "longest_pad": "longest"}[stated["resize"]]
    before = stated["rgb"] == "before_resize"
    rounding = stated.get("crop_rounding") or ("down" if before else "even")
    differences: tuple[str, ...] = ()
    if mode == "shortest" and rounding == "down":
        differences = ("its centre crop lies one pixel further where the margin is odd",)
    notes = ("images are converted to RGB after the resize: palettes and transparency change",) if before else ()
    cfg = {
        "size": size, "mode": "RGB", "mean": list(stated["mean"]), "std": list(stated["std"]),
        "interpolation": stated["interpolation"], "resize_mode": mode, "fill_color": stated["fill"],
    }  # fmt: skip
    return cfg, differences, notes


def check_preprocess(
    stated: Mapping[str, Any], target: str, resizes: tuple[str, ...], filters: tuple[str, ...]
) -> None:
    """Raise ``CheckpointError`` for steps that another library's evaluation transform does not have."""
    for name in ("resize_size", "side_rounding", "grey", "stretch", "second_resize"):
        if stated.get(name) is not None:
            raise unfit(target, f"the preprocessing `{name} = {stated[name]}`")
    if stated.get("cut_bottom"):
        raise unfit(target, "cutting off the bottom of images")
    if stated["resize"] not in resizes or (stated["resize"] == "longest_pad" and stated["crop"] == "center"):
        raise unfit(target, f"the resizing `{stated['resize']}` with the crop `{stated['crop']}`")
    if stated["interpolation"] not in filters:
        raise unfit(target, f"the filter `{stated['interpolation']}`")
