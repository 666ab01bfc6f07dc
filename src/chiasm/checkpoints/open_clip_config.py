"""open_clip's ``model_cfg`` as a declaration of chiasm's: which fields there are, and what each means here.

In: the mapping in ``open_clip_config.json``, with the weights where their shapes say what names do not. Out: what
``EncoderConfig.from_dict`` reads. A field that changes the computation and is not known here is refused.

References:
    open_clip ``model.py`` (``CLIPVisionCfg``, ``CLIPTextCfg``), ``coca_model.py``, ``timm_model.py``, ``hf_model.py``;
    timm ``vision_transformer.py`` for what the names of its ViTs mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from chiasm.checkpoints.containers import read_json
from chiasm.errors import CheckpointError

#: Fields that change training or bookkeeping alone, or are handled where they belong.
_HARMLESS = frozenset(
    {
        "patch_dropout", "output_tokens", "attn_pooler_queries", "timm_model_pretrained", "timm_drop", "timm_drop_path",
        "hf_model_pretrained", "hf_tokenizer_name", "tokenizer_kwargs", "pos_embed_type", "eos_id", "pad_id",
    }
)  # fmt: skip
_MODEL = frozenset(
    {
        "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "init_logit_scale",
        "init_logit_bias", "nonscalar_logit_scale",
    }
)  # fmt: skip
_VISION = frozenset(
    {
        "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "ls_init_value", "attentional_pool",
        "attn_pooler_heads", "no_ln_pre", "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs",
        "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias",
    }
)  # fmt: skip
_TEXT = frozenset(
    {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "embed_cls", "correct_cls_mask",
        "no_causal_mask", "pool_type", "proj_type", "proj_bias", "act_kwargs", "norm_kwargs", "hf_model_name",
        "hf_proj_type", "hf_pooler_type",
    }
)  # fmt: skip
_TEXT_POOLS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "cls"}
#: Attention heads by the size in a timm name.
_HEADS = {
    "tiny": 3, "small": 6, "medium": 8, "betwixt": 10, "base": 12, "large": 16, "huge": 16, "giant": 16,
    "gigantic": 16, "so400m": 16, "giantopt": 16,
}  # fmt: skip
_TIMM = re.compile(r"vit_([a-z0-9]+)_patch(\d+)((?:_clip(?:_quickgelu)?|_siglip(?:_gap)?)?)_(\d+)(?:\..*)?")
#: SigLIP 2's shapes, which timm builds with the tanh form of GELU.
_TANH = re.compile(r"vit_(base_patch32_siglip|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip|giantopt).*")


def config_of(model: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Any]:
    """Return the declaration of a model of open_clip, without its preprocessing.

    Args:
        model: ``model_cfg``.
        tensors: The weights, in open_clip's names.
        directory: Where the tokenizer and, with a Hugging Face text tower, its ``config.json`` may lie.

    Raises:
        CheckpointError: An unknown field, a value that cannot be expressed, or a tower that chiasm does not read.
    """
    vision, text = _mapping(model, "vision_cfg"), _mapping(model, "text_cfg")
    _check_known("model_cfg", model, _MODEL)
    dim = _integer(model, "embed_dim", None, "model_cfg")
    quick = bool(model.get("quick_gelu"))
    if vision.get("timm_model_name"):
        image, image_projection, image_bias = _timm_image(vision, tensors)
    else:
        image, image_projection, image_bias = _native_image(vision, quick), "linear", False
    projection: dict[str, Any] = {"dim": dim, "image": image_projection}
    words: dict[str, Any]
    if text.get("hf_model_name"):
        words, projection["text"] = _huggingface_text(text, tensors, directory, dim)
        text_bias = False
    else:
        words, projection["text"], text_bias = _native_text(text, quick)
    biased = [side for side, has in (("image", image_bias), ("text", text_bias)) if has]
    config: dict[str, Any] = {
        "image": image,
        "text": words,
        "projection": projection | ({"biased": biased} if biased else {}),
        "tokenizer": tokenizer_of(text, words, directory),
    }
    if model.get("init_logit_bias") is not None or "logit_bias" in tensors:
        config["logit_bias_init"] = float(model.get("init_logit_bias") or 0.0)
    return config


def _native_image(vision: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    _check_known("vision_cfg", vision, _VISION)
    width, head_width = _integer(vision, "width", 768), _integer(vision, "head_width", 64)
    layers = vision.get("layers", 12)
    image: dict[str, Any] = {"image_size": _side(vision.get("image_size", 224)), "width": width, "layers": layers}
    if isinstance(layers, list):
        return image | {"kind": "resnet", "heads": width * 32 // head_width, "pool": "attention"}
    pools = {"tok": "cls", "avg": "mean"}
    pool = pools.get(vision.get("pool_type", "tok"))
    if vision.get("attentional_pool"):
        # Only CoCa's first form of pooling; open_clip calls the two others untested.
        if vision["attentional_pool"] is not True or pool != "cls":
            raise CheckpointError("`vision_cfg.attentional_pool` is not the pooling of CoCa, the one read here")
        if vision.get("attn_pooler_heads", 8) != 8:
            raise CheckpointError(f"`vision_cfg.attn_pooler_heads` is {vision['attn_pooler_heads']}; only 8 is read")
        pool = "attention"
    if pool is None or (pool == "mean" and vision.get("final_ln_after_pool")):
        raise CheckpointError(f"the pooling in `vision_cfg` (`{vision.get('pool_type')}`) is not read by chiasm")
    return image | {
        "kind": "vit",
        "patch_size": _integer(vision, "patch_size", 16),
        "heads": width // head_width,
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "activation": _activation("vision_cfg", vision, quick),
        "pool": pool,
        "pre_norm": not vision.get("no_ln_pre"),
        "ln_eps": _epsilon("vision_cfg", vision),
        "layer_scale": vision.get("ls_init_value") is not None,
    }


def _timm_image(vision: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str, bool]:
    """A ViT of timm: its name says what shapes do not (heads, activation, pooling); ``quick_gelu`` does not reach it."""
    _check_known("vision_cfg", vision, _VISION)
    name = str(vision["timm_model_name"])
    match = _TIMM.fullmatch(name)
    if match is None or match[1] not in _HEADS:
        raise CheckpointError(
            f"the image tower `{name}` of timm is not one that chiasm reads",
            hint="known: `vit_SIZE_patchN[_clip|_clip_quickgelu|_siglip|_siglip_gap]_PIXELS`",
        )
    kind = match[3].strip("_")
    prefix = "visual.trunk."
    patches = _shape(tensors, f"{prefix}patch_embed.proj.weight", 4)
    width = patches[0]
    hidden = _shape(tensors, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0]
    blocks = {int(m[1]) for k in tensors if (m := re.match(r"visual\.trunk\.blocks\.(\d+)\.", k))}
    image = {
        "kind": "vit",
        "image_size": _side(vision.get("image_size", 224)),
        "patch_size": patches[2],
        "width": width,
        "layers": len(blocks),
        "heads": _HEADS[match[1]],
        "mlp_ratio": _ratio(hidden, width),
        "activation": "quick_gelu" if "quickgelu" in kind else "gelu_tanh" if _TANH.fullmatch(name) else "gelu",
        "pool": _timm_pool(vision, kind),
        "pre_norm": kind.startswith("clip"),
        "ln_eps": 1e-5 if kind.startswith("clip") else 1e-6,
        "patch_bias": f"{prefix}patch_embed.proj.bias" in tensors,
        "layer_scale": f"{prefix}blocks.0.ls1.gamma" in tensors,
    }
    if kind.startswith("siglip"):
        image["class_token"] = False
    projection = vision.get("timm_proj", "linear")
    if projection not in ("linear", "none"):
        raise CheckpointError(f"`vision_cfg.timm_proj` is `{projection}`; `linear` and `none` are read")
    return image, projection, bool(vision.get("timm_proj_bias")) and projection == "linear"


def _timm_pool(vision: Mapping[str, Any], kind: str) -> str:
    own = {"siglip": "map", "siglip_gap": "mean"}.get(kind, "cls")
    stated = vision.get("timm_pool", "avg")
    has_projection = vision.get("timm_proj", "linear") == "linear"
    pool = {
        "": own if has_projection else None,
        "token": "cls",
        "avg": "mean" if has_projection else None,
        "map": "map",
    }
    found = pool.get(stated)
    fits = {"cls": ("cls", "mean"), "map": ("map",), "mean": ("mean",)}[own]
    if found is None or found not in fits:
        raise CheckpointError(
            f"`vision_cfg.timm_pool` is `{stated}` for `{vision['timm_model_name']}`, which chiasm does not read"
        )
    return found


def _native_text(text: Mapping[str, Any], quick: bool) -> tuple[dict[str, Any], str, bool]:
    _check_known("text_cfg", text, _TEXT)
    width = _integer(text, "width", 512)
    appended = bool(text.get("embed_cls"))
    pool = "appended" if appended else _TEXT_POOLS.get(text.get("pool_type", "argmax"))
    if pool is None:
        raise CheckpointError(f"`text_cfg.pool_type` is `{text['pool_type']}`, which chiasm does not read")
    words = {
        "kind": "clip",
        "context_length": _integer(text, "context_length", 77),
        "vocab_size": _integer(text, "vocab_size", 49408),
        "width": width,
        "layers": _integer(text, "layers", 12),
        "heads": _integer(text, "heads", 8),
        "mlp_ratio": text.get("mlp_ratio", 4.0),
        "activation": _activation("text_cfg", text, quick),
        "pool": pool,
        "causal": not text.get("no_causal_mask"),
    }
    if appended and text.get("correct_cls_mask"):
        words["cls_mask"] = "correct"
    if _epsilon("text_cfg", text) != 1e-5:
        words["ln_eps"] = _epsilon("text_cfg", text)
    projection = text.get("proj_type", "linear")
    if projection not in ("linear", "none"):
        raise CheckpointError(f"`text_cfg.proj_type` is `{projection}`; `linear` and `none` are read")
    return words, projection, bool(text.get("proj_bias")) and projection == "linear"


def _huggingface_text(
    text: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: Path, dim: int
) -> tuple[dict[str, Any], str]:
    _check_known("text_cfg", text, _TEXT)
    name = str(text["hf_model_name"])
    stated = _huggingface_config(name, tensors, directory)
    default = "cls_pooler" if stated.get("model_type") in ("bert", "m2m_100") else "mean_pooler"
    pooler = text.get("hf_pooler_type", "mean_pooler") or default
    has_pooler = "text.transformer.pooler.dense.weight" in tensors
    pools = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls", "cls_pooler": "cls"}
    if pooler not in pools:
        raise CheckpointError(f"`text_cfg.hf_pooler_type` is `{pooler}`; known: {', '.join(pools)}")
    options: dict[str, Any] = {"config": stated}
    if pooler == "cls_pooler" and has_pooler:
        options["pooler"] = True
    words = {
        "kind": "huggingface",
        "source": Path(name).name if Path(name).is_absolute() else name,
        "context_length": _integer(text, "context_length", 77),
        "pool": pools[pooler],
        "options": options,
    }
    projection = text.get("hf_proj_type", "mlp")
    width = stated.get("hidden_size", stated.get("d_model"))
    if not projection and width == dim:
        projection = "none"
    if projection not in ("linear", "mlp", "none"):
        raise CheckpointError(f"`text_cfg.hf_proj_type` is `{projection}`; `linear` and `mlp` are read")
    return words, projection


def _huggingface_config(name: str, tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Any]:
    """The text tower's configuration: beside the weights or where ``hf_model_name`` points, else BERT's by shape."""
    for folder in (directory, Path(name)):
        file = folder / "config.json"
        if file.is_file():
            stated = read_json(file)
            if isinstance(stated.get("model_type"), str) and "vision_config" not in stated:
                return {k: v for k, v in stated.items() if k not in ("_name_or_path", "architectures", "torch_dtype")}
    prefix = "text.transformer."
    if f"{prefix}embeddings.word_embeddings.weight" not in tensors:
        raise CheckpointError(
            f"the text tower `{name}` states no configuration",
            hint="put its `config.json` into the folder: the shapes of the weights do not tell all of it",
        )
    vocabulary, width = _shape(tensors, f"{prefix}embeddings.word_embeddings.weight", 2)
    layers = {int(m[1]) for k in tensors if (m := re.match(r"text\.transformer\.encoder\.layer\.(\d+)\.", k))}
    if width % 64:
        raise CheckpointError(f"the text tower `{name}` is {width} wide, which does not tell its number of heads")
    config = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "intermediate_size": _shape(tensors, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": _shape(tensors, f"{prefix}embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": _shape(tensors, f"{prefix}embeddings.token_type_embeddings.weight", 2)[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    if "roberta" in name.lower():
        model_type = "xlm-roberta" if "xlm" in name.lower() else "roberta"
        config |= {"model_type": model_type, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    return config


def tokenizer_of(text: Mapping[str, Any], words: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return the declaration of the tokenizer: CLIP's, or the one that lies in the folder."""
    context = words["context_length"]
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    extra = dict(text.get("tokenizer_kwargs") or {})
    clean = extra.pop("clean", None)
    if extra or text.get("tokenizer_mode"):
        what = next(iter(extra), "tokenizer_mode")
        raise CheckpointError(f"the tokenizer's `{what}` in `text_cfg` is not read by chiasm")
    if not name:
        if clean not in (None, "lower"):
            raise CheckpointError(f"CLIP's tokenizer with the cleaning `{clean}` is not read by chiasm")
        return {"kind": "clip", "context_length": context}
    files = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
    here = any((directory / file).is_file() for file in files)
    source = str(directory) if here else str(name)
    return {"kind": "huggingface", "source": source, "context_length": context, "clean": clean or "whitespace"}


def _activation(part: str, stated: Mapping[str, Any], quick: bool) -> str:
    extra = stated.get("act_kwargs") or {}
    if extra == {"approximate": "tanh"} and not quick:
        return "gelu_tanh"
    if extra and extra != {"approximate": "none"}:
        raise CheckpointError(f"`{part}.act_kwargs` is {extra}, which chiasm does not read")
    return "quick_gelu" if quick else "gelu"


def _epsilon(part: str, stated: Mapping[str, Any]) -> float:
    extra = dict(stated.get("norm_kwargs") or {})
    eps = extra.pop("eps", 1e-5)
    if extra or not isinstance(eps, float):
        raise CheckpointError(f"`{part}.norm_kwargs` is {stated.get('norm_kwargs')}, which chiasm does not read")
    return eps


def _ratio(hidden: int, width: int) -> float:
    """A ratio that gives the hidden width back: ``int(width * ratio)`` rounds down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _check_known(part: str, stated: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in stated.items():
        if name not in known and name not in _HARMLESS and value not in (None, False, "", "default", 0, {}):
            raise CheckpointError(f"open_clip model with `{part}.{name}`, which chiasm does not read")


def _integer(stated: Mapping[str, Any], name: str, default: int | None, part: str = "") -> int:
    value = stated.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"`{part + '.' if part else ''}{name}` must be a positive integer, got {value!r}")
    return value


def _side(value: object) -> int:
    sides = value if isinstance(value, list) and value else [value]
    side = sides[0]
    if isinstance(side, bool) or not isinstance(side, int) or side < 1 or any(s != side for s in sides):
        raise CheckpointError(f"`vision_cfg.image_size` must be the side of a square, got {value!r}")
    return side


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"the weights lack `{name}`, which the configuration asks for")
    if tensor.ndim != dimensions or 0 in tensor.shape:
        raise CheckpointError(f"`{name}` has the shape {tuple(tensor.shape)}; expected {dimensions} dimensions")
    return tuple(tensor.shape)


def _mapping(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = parent.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"`open_clip_config.json` lacks `{name}`")
    return value
