"""BERT, MegatronBert and the encoder of T5: many prefixes and two ages of names, one model.

In: the state dict of a folder of transformers, of one converted from TensorFlow, or cut out of a larger model. Out: the
names of transformers' model under ``text.transformer.model.``.

References: transformers ``models/bert``, ``models/megatron_bert``, ``models/t5``; the medical variants' files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chiasm.checkpoints.layout import Layout
from chiasm.errors import CheckpointError

#: What stands before BERT's own names: transformers' heads, CXR-BERT, MedCLIP, GLoRIA, open_clip, training wraps.
BERT_PREFIXES = ("module.", "text.transformer.", "text_encoder.model.", "text_model.model.", "bert.")
T5_PREFIXES = ("module.", "text.transformer.", "transformer.")
#: Entries that files carry and models lack, each with the reason for which it may be dropped.
DROPPED: Mapping[str, str] = {
    "cls.": "the heads of masked language modelling and of the next sentence",
    "classifier.": "a classifier of somebody's fine-tuning: no part of the features",
    "pooler.": "a dense layer on the first token, which none of the poolings reads",
    "decoder.": "T5's decoder writes texts; the encoder reads them",
    "lm_head.": "T5's output layer",
}
#: The same, by the end of the name.
DROPPED_ENDS: Mapping[str, str] = {
    ".position_ids": "counted from 0 by transformers up to 4.30; says nothing",
    ".token_type_ids": "zeros, a buffer of older versions of transformers",
}
#: TensorFlow's words for a norm's parameters -> torch's.
NORMS: Mapping[str, str] = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_WORDS, _SHARED = "embeddings.word_embeddings.weight", "shared.weight"
_TWIN = "encoder.embed_tokens.weight"


def plain_names(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors without prefixes and heads, norms under torch's names."""
    result = {}
    for name, tensor in tensors.items():
        short = name
        for prefix in prefixes:
            short = short.removeprefix(prefix)
        if short.startswith(tuple(DROPPED)) or short.endswith(tuple(DROPPED_ENDS)):
            continue
        for old, new in NORMS.items():
            short = short.removesuffix(old) + new if short.endswith(old) else short
        result[short] = tensor
    return result


def is_bert(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a BERT or MegatronBert, whatever stands before them."""
    return any(_bare(name, BERT_PREFIXES) == _WORDS for name in tensors)


def is_t5(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of a T5, with its decoder or without."""
    names = {_bare(name, T5_PREFIXES) for name in tensors}
    return bool(names & {_SHARED, _TWIN}) and "encoder.block.0.layer.0.SelfAttention.q.weight" in names


def _bare(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def to_bert(tensors: Mapping[str, Tensor], pooler: bool = False) -> dict[str, Tensor]:
    """Return the tensors under the names of ``BertModel`` or ``MegatronBertModel``; the pooler only on request."""
    names = plain_names(tensors, BERT_PREFIXES)
    if pooler:
        bare = {_bare(name, BERT_PREFIXES): tensor for name, tensor in tensors.items()}
        names |= {name: tensor for name, tensor in bare.items() if name.startswith("pooler.")}
    return names


def to_t5(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of ``T5EncoderModel``, the word embedding under both of its names.

    Raises:
        CheckpointError: The two are not equal: one of them would not be used.
    """
    names = plain_names(tensors, T5_PREFIXES)
    words = names.get(_SHARED, names.get(_TWIN))
    if words is None:
        raise CheckpointError(f"the weights lack `{_SHARED}`")
    twin = names.get(_TWIN, words)
    if twin.shape != words.shape or not bool((twin == words).all()):
        raise CheckpointError(f"`{_SHARED}` and `{_TWIN}` differ, though T5 has one word embedding")
    return {**names, _SHARED: words, _TWIN: words}


def _with_model(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    options = config["text"]["options"]
    model = {**options["config"], **values}
    return {**config, "text": {**config["text"], "options": {**options, "config": model}}}


def infer_vocabulary(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the vocabulary and the number of positions that a BERT's tensors have.

    Raises:
        CheckpointError: Embeddings that are missing or no matrices.
    """
    names = to_bert(tensors)
    rows = {}
    for key, name in (("vocab_size", _WORDS), ("max_position_embeddings", "embeddings.position_embeddings.weight")):
        if name not in names or names[name].ndim != 2:
            raise CheckpointError(f"the weights lack the matrix `{name}`")
        rows[key] = names[name].shape[0]
    return _with_model(config, **rows)


def infer_t5(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the vocabulary and the kind of MLP that a T5's tensors have.

    ``wi`` is the first version's ReLU, ``wi_0`` and ``wi_1`` are version 1.1's gated GELU.
    """
    names = to_t5(tensors)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in names
    return _with_model(config, vocab_size=names[_SHARED].shape[0], feed_forward_proj="gated-gelu" if gated else "relu")


def _under(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"text.transformer.model.{name}": tensor for name, tensor in names.items()}


def _convert_bert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return _under(to_bert(tensors, pooler=bool(config["text"]["options"].get("pooler", False))))


def _convert_t5(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return _under(to_t5(tensors))


BERT_LAYOUT = Layout("bert", is_bert, _convert_bert)
#: The same for models whose vocabulary is not fixed by their name.
MEGATRON_LAYOUT = Layout("megatron_bert", is_bert, _convert_bert, infer=infer_vocabulary)
T5_LAYOUT = Layout("t5", is_t5, _convert_t5, infer=infer_t5)
