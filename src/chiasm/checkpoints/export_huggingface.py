"""A declaration of chiasm's as a folder of transformers: ``CLIPModel``, ``SiglipModel`` or ``VisionTextDualEncoder``.

In: ``EncoderConfig.to_dict``, tensors in chiasm's names, the tokenizer's ``to_dict``. Out: tensors in transformers'
names and :class:`~chiasm.checkpoints.export_open_clip.Exported`. What none of the three can express is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints import dual_encoder, huggingface, siglip
from chiasm.checkpoints.export_open_clip import Exported, check_preprocess, check_whole, unfit

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
NOT_TIDIED = "texts are not tidied: broken encodings and HTML entities stay"


def huggingface_folder(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Exported]:
    """Return the weights and the JSON files of a folder of transformers, without the tokenizer's.

    Raises:
        CheckpointError: A model that is none of the three.
    """
    check_whole(config, "transformers")
    kinds = {config["image"]["kind"], config["text"]["kind"]}
    if kinds == {"huggingface"}:
        return _dual(config, tensors, tokenizer)
    if kinds == {"vit", "clip"}:
        is_siglip = config["image"]["pool"] == "map"
        return (_siglip if is_siglip else _clip)(config, tensors, tokenizer)
    raise unfit("transformers", f"an image tower `{config['image']['kind']}` beside a text tower "
                                f"`{config['text']['kind']}`")  # fmt: skip


def _clip(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Exported]:
    image, text, projection = config["image"], config["text"], config["projection"]
    needs = {
        "an image tower without a LayerNorm before its blocks": image["pre_norm"],
        "a bias in the patches": not image["patch_bias"],
        "a LayerScale": not image["layer_scale"],
        "register tokens": not image["registers"],
        "an image tower without a class token": image.get("class_token") is not False,
        f"the image pooling `{image['pool']}`": image["pool"] == "cls",
        f"the text pooling `{text['pool']}`": text["pool"] == "eot",
        "a text tower without a causal mask": text["causal"],
        "projections other than two matrices": projection["image"] == projection["text"] == "linear"
        and not projection.get("biased"),
        "a bias of the logits": config.get("logit_bias_init") is None,
        "a tokenizer other than CLIP's whole one": tokenizer.get("kind") == "clip" and tokenizer.get("keep") is None,
        "the activation `swiglu`": image["activation"] in ("quick_gelu", "gelu"),
        f"the text activation `{text['activation']}`": text["activation"] in ("quick_gelu", "gelu"),
    }
    for what, holds in needs.items():
        if not holds:
            raise unfit("transformers' CLIPModel", what)
    dim = projection["dim"]
    stated = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": dim,
        "logit_scale_init_value": config["logit_scale_init"],
        "text_config": {
            **_tower(text), "model_type": "clip_text_model", "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"], "projection_dim": dim,
            "layer_norm_eps": text.get("ln_eps", 1e-5),
            "bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
        "vision_config": {
            **_tower(image), "model_type": "clip_vision_model", "image_size": image["image_size"],
            "patch_size": image["patch_size"], "projection_dim": dim, "layer_norm_eps": image["ln_eps"],
        },
    }  # fmt: skip
    processor, differences, notes = _processor(config["preprocess"], "CLIPImageProcessor")
    files = {"config.json": stated, "preprocessor_config.json": processor}
    return huggingface.to_huggingface(tensors), Exported(files, differences, (*notes, NOT_TIDIED))


def _siglip(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Exported]:
    image, text, projection = config["image"], config["text"], config["projection"]
    needs = {
        "a class token beside a learned query": image.get("class_token") is False,
        "patches without a bias": image["patch_bias"],
        "a LayerNorm before the blocks": not image["pre_norm"],
        "a LayerScale or register tokens": not (image["layer_scale"] or image["registers"]),
        "a projection of images": projection["image"] == "none",
        "a text projection other than linear with a bias": projection["text"] == "linear"
        and tuple(projection.get("biased") or ()) == ("text",),
        "a causal mask": not text["causal"],
        f"the text pooling `{text['pool']}`": text["pool"] == "last",
        "logits without a bias": config.get("logit_bias_init") is not None,
        "the activation `swiglu`": image["activation"] != "swiglu",
        "CLIP's tokenizer": tokenizer.get("kind") == "huggingface",
    }
    for what, holds in needs.items():
        if not holds:
            raise unfit("transformers' SiglipModel", what)
    stated = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            **_tower(text), "model_type": "siglip_text_model", "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"], "projection_size": projection["dim"],
            "layer_norm_eps": text.get("ln_eps", 1e-5), "bos_token_id": None, "eos_token_id": None,
        },
        "vision_config": {
            **_tower(image), "model_type": "siglip_vision_model", "image_size": image["image_size"],
            "patch_size": image["patch_size"], "layer_norm_eps": image["ln_eps"],
        },
    }  # fmt: skip
    processor, differences, notes = _processor(config["preprocess"], "SiglipImageProcessor")
    if tokenizer.get("clean") is not None:
        notes += (f"texts are not cleaned (`{tokenizer['clean']}`) before the tokenizer: clean them yourself",)
    files = {"config.json": stated, "preprocessor_config.json": processor}
    return siglip.from_native(tensors), Exported(files, differences, notes)


def _dual(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Exported]:
    image, text, projection = config["image"], config["text"], config["projection"]
    needs = {
        f"the image pooling `{image['pool']}`": image["pool"] == "none",
        f"the text pooling `{text['pool']}`": bool(text.get("options", {}).get("pooler")),
        "projections other than two matrices": projection["image"] == projection["text"] == "linear"
        and not projection.get("biased"),
        "a bias of the logits": config.get("logit_bias_init") is None,
    }
    for what, holds in needs.items():
        if not holds:
            raise unfit("transformers' VisionTextDualEncoderModel", what)
    parts = {}
    for name, tower in (("vision_config", image), ("text_config", text)):
        stated = tower.get("options", {}).get("config")
        parts[name] = json.loads(stated) if isinstance(stated, str) else dict(stated or {})
    whole = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": dual_encoder.MODEL_TYPE,
        "projection_dim": projection["dim"],
        **parts,
    }
    back = {ours: theirs for theirs, ours in dual_encoder.PREFIXES.items()}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in back if name.startswith(p)), "")
        renamed[back.get(prefix, "") + name.removeprefix(prefix)] = tensor
    processor, differences, notes = _processor(config["preprocess"], "CLIPImageProcessor")
    if tokenizer.get("clean") is not None:
        notes += (NOT_TIDIED,)
    return renamed, Exported({"config.json": whole, "preprocessor_config.json": processor}, differences, notes)


def _tower(tower: Mapping[str, Any]) -> dict[str, Any]:
    width = tower["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower.get("heads") or width // 64,
        "hidden_act": _ACTIVATIONS[tower["activation"]],
    }


def _processor(stated: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    check_preprocess(stated, "transformers", ("shortest", "squash"), tuple(_FILTERS))
    size, crops = stated["size"], stated["resize"] == "shortest"
    before = stated["rgb"] == "before_resize"
    square = {"height": size, "width": size}
    result: dict[str, Any] = {
        "image_processor_type": kind, "do_resize": True, "size": {"shortest_edge": size} if crops else square,
        "resample": _FILTERS[stated["interpolation"]], "do_center_crop": crops, "do_convert_rgb": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(stated["mean"]),
        "image_std": list(stated["std"]),
    }  # fmt: skip
    if crops:
        result["crop_size"] = square
    rounding = stated.get("crop_rounding") or ("down" if before else "even")
    differences: tuple[str, ...] = ()
    if crops and rounding == "even":
        differences = ("its centre crop lies one pixel before where the margin is odd",)
    elif not before and crops:  # transformers' crop, but the file's own order of colours
        result["do_convert_rgb"] = False
    late = not before and result["do_convert_rgb"]
    notes = ("images are converted to RGB before the resize: palettes and transparency change",) if late else ()
    return result, differences, notes
