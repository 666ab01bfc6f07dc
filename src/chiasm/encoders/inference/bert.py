"""BERT text towers for inference: packed layers, no padding, and of the last block what is pooled.

In: a tower that stands on transformers' ``BertModel`` (any of the hub's, BiomedCLIP's, BioViL's, GLoRIA's, MedCLIP's)
with its projection. Out: a callable (ids, lengths) -> (batch, output_dim), float32, as the tower itself gives them.

BERT masks padding out of every attention, so leaving it out changes nothing for the texts' own tokens. Towers that read
a padded position (``pool = "last"``, MedCLIP as published, whose mean counts padding) keep their padding and the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chiasm.encoders.dual import ProjectedTextTower
from chiasm.encoders.inference.blocks import Attend, AttendFew
from chiasm.encoders.inference.packed import Activation, NotPackable, PackedLinear
from chiasm.encoders.inference.ragged import Pack, in_order, padded_packs, ragged_packs

#: Where transformers' own hooks come from: they note hidden states when asked to, and change nothing.
_RECORDER = "transformers.utils.output_capturing"
#: Names of transformers' activations that oneDNN knows.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
}  # fmt: skip


class PackedBertBlock:
    """A ``BertLayer`` with packed weights: attention, then an MLP, each before the LayerNorm of its sum.

    Args:
        layer: Its weights are copied.
        activation: Of its MLP.
        dtype: Of the linear layers.
        few: Whether only chosen rows of its output will be read (:meth:`few`).

    Raises:
        NotPackable: A part that is not transformers' own.
    """

    def __init__(self, layer: Any, activation: Activation, *, dtype: torch.dtype, few: bool = False) -> None:
        attention, attended = layer.attention.self, layer.attention.output
        _require(layer, "BertLayer")
        _require(layer.attention, "BertAttention")
        _require(attention, "BertSelfAttention")
        for module, name in ((attended, "BertSelfOutput"), (layer.intermediate, "BertIntermediate")):
            _require(module, name)
        _require(layer.output, "BertOutput")
        linears = (attention.query, attention.key, attention.value)
        for linear in (*linears, attended.dense, layer.intermediate.dense, layer.output.dense):
            _require(linear, "Linear")
        self.ln_1, self.ln_2 = attended.LayerNorm, layer.output.LayerNorm
        for norm in (self.ln_1, self.ln_2):
            _require(norm, "LayerNorm")
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        width = weight.shape[1]
        parts = [slice(0, width), slice(width, None)] if few else [slice(None)]
        self._qkv = [PackedLinear(weight[part], bias[part], dtype=dtype) for part in parts]
        self._out = PackedLinear(attended.dense.weight, attended.dense.bias, dtype=dtype)
        fc, proj = layer.intermediate.dense, layer.output.dense
        self._fc = PackedLinear(fc.weight, fc.bias, dtype=dtype, activation=activation)
        self._proj = PackedLinear(proj.weight, proj.bias, dtype=dtype)

    def all(self, x: Tensor, attend: Attend) -> Tensor:
        """Return all rows behind the block, (n, width) float32."""
        return self._finish(x, attend(self._qkv[0](x)))

    def few(self, x: Tensor, rows: Tensor, attend: AttendFew) -> Tensor:
        """Return some rows behind the block, (m, width); see :meth:`PackedBlock.few`."""
        asking = x[rows]
        return self._finish(asking, attend(self._qkv[0](asking), self._qkv[1](x)))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.ln_1(x + self._out(attended))
        normed: Tensor = self.ln_2(x + self._proj(self._fc(x)))
        return normed


class PackedBert:
    """A ``BertModel`` with packed weights; its embeddings and norms are shared with it.

    Args:
        model: In eval mode.
        dtype: Of the linear layers.
        few: Whether of the last block only chosen rows are read.

    Raises:
        NotPackable: Not exactly transformers' ``BertModel`` as an encoder, or adapted, hooked or half-precision parts.

    Attributes:
        positions: Tokens that it can read.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, few: bool) -> None:
        _require(model, "BertModel")
        _require(model.encoder, "BertEncoder")
        config, embeddings = model.config, model.embeddings
        if config.is_decoder or config.add_cross_attention:
            raise NotPackable("a BERT that decodes")
        if config._attn_implementation not in (None, "eager", "sdpa"):
            raise NotPackable(f"attention by `{config._attn_implementation}`")
        if config.hidden_act not in _ACTIVATIONS:
            raise NotPackable(f"the activation `{config.hidden_act}`")
        _require(embeddings, "BertEmbeddings")
        tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
        for table in tables:
            _require(table, "Embedding")
            if table.max_norm is not None:
                raise NotPackable("an embedding rescales its rows")
        _require(embeddings.LayerNorm, "LayerNorm")
        self._words, self._norm = embeddings.word_embeddings, embeddings.LayerNorm
        # Every token is of the first kind, as the model has it where nobody says otherwise.
        self._places = tables[1].weight + tables[2].weight[0]
        self.positions = len(self._places)
        self.heads: int = config.num_attention_heads
        layers, activation = list(model.encoder.layer), _ACTIVATIONS[config.hidden_act]
        self._few = few
        self._blocks = [
            PackedBertBlock(layer, activation, dtype=dtype, few=few and i == len(layers) - 1)
            for i, layer in enumerate(layers)
        ]

    def rows(self, pack: Pack, wanted: Tensor) -> Tensor:
        """Return some rows behind the last block, (m, width); of a model that was packed with ``few``."""
        x = self._embed(pack)
        for block in self._blocks[:-1]:
            x = block.all(x, partial(pack.attend, heads=self.heads, causal=False))
        return self._blocks[-1].few(x, wanted, partial(pack.attend_one, heads=self.heads))

    def layers(self, pack: Pack) -> Iterator[Tensor]:
        """Yield the embeddings and what every block gives, each (rows, width); of a model packed without ``few``."""
        x = self._embed(pack)
        yield x
        for block in self._blocks:
            x = block.all(x, partial(pack.attend, heads=self.heads, causal=False))
            yield x

    @property
    def depth(self) -> int:
        """How many tensors :meth:`layers` yields."""
        return len(self._blocks) + 1

    def _embed(self, pack: Pack) -> Tensor:
        embedded: Tensor = self._norm(self._words(pack.ids) + self._places[pack.positions])
        return embedded


class PackedBertTower:
    """A BERT text tower with its projection.

    Args:
        tower: What it is; its projection is shared.
        dtype: Of the linear layers in the blocks.

    Raises:
        NotPackable: A tower that is none of those whose pooling is known here.
    """

    def __init__(self, tower: ProjectedTextTower, *, dtype: torch.dtype) -> None:
        _require(tower, "ProjectedTextTower")
        self._tower = tower
        self._reading = _reading(tower.transformer, dtype)

    def __call__(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the embeddings (batch, output_dim), float32, not normalised; see :class:`ProjectedTextTower`."""
        tower, reading = self._tower, self._reading
        embedded: Tensor
        lengths = tower.text_lengths(ids, lengths)
        columns = ids.shape[1] if len(ids) and ids.ndim == 2 else 0
        if columns and (tower.can_trim or reading.cuts):
            columns = int(lengths.max())
        if not 1 <= columns <= reading.bert.positions:  # an empty batch, or the tower says what is wrong
            embedded = tower(ids, lengths)
            return embedded
        ids = ids[:, :columns]
        packs = padded_packs(ids, lengths) if reading.padded else ragged_packs(ids, lengths)
        embedded = tower.proj(in_order(packs, reading.pool, len(ids)))
        return embedded


class _Reading(NamedTuple):
    """How a tower reads its BERT.

    Attributes:
        bert: Packed.
        pool: A pack -> (n, width), before the projection.
        padded: Whether padded positions are read, so that they have to be there.
        cuts: Whether the tower itself cuts a batch to its longest text.
    """

    bert: PackedBert
    pool: Callable[[Pack], Tensor]
    padded: bool = False
    cuts: bool = False


def _reading(trunk: Any, dtype: torch.dtype) -> _Reading:
    from chiasm.encoders.biovil import CxrBertTextTower
    from chiasm.encoders.gloria import GloriaTextTower
    from chiasm.encoders.huggingface import HuggingFaceTextTower
    from chiasm.encoders.medclip import MedClipTextTower

    kinds = (HuggingFaceTextTower, CxrBertTextTower, GloriaTextTower, MedClipTextTower)
    _require(trunk, *(kind.__name__ for kind in kinds))
    if isinstance(trunk, HuggingFaceTextTower):
        return _huggingface(trunk, dtype)
    if isinstance(trunk, CxrBertTextTower):
        bert = PackedBert(trunk.bert, dtype=dtype, few=True)
        return _Reading(bert, lambda pack: trunk.cls_projection_head(bert.rows(pack, pack.firsts)))
    bert = PackedBert(trunk.model, dtype=dtype, few=False)
    if isinstance(trunk, GloriaTextTower):
        return _Reading(bert, lambda pack: _gloria(bert, pack, trunk.last_layers) / trunk.slots)
    return _Reading(bert, lambda pack: _medclip(bert, pack), padded=trunk.padding_counts, cuts=True)


def _huggingface(trunk: Any, dtype: torch.dtype) -> _Reading:
    mean = trunk.pool == "mean" and not trunk.pooler
    bert = PackedBert(trunk.model, dtype=dtype, few=not mean)
    if mean:
        return _Reading(bert, lambda pack: pack.means(_last(bert.layers(pack))))
    if trunk.pooler:
        pooler = trunk.model.pooler
        return _Reading(bert, lambda pack: pooler(bert.rows(pack, pack.firsts)[:, None]))
    if trunk.pool == "cls":
        return _Reading(bert, lambda pack: bert.rows(pack, pack.firsts))
    if trunk.pool not in ("eot", "last"):
        raise NotPackable(f"pooling by `{trunk.pool}`")
    return _Reading(bert, lambda pack: bert.rows(pack, pack.lasts), padded=trunk.pool == "last")


def _gloria(bert: PackedBert, pack: Pack, last_layers: int) -> Tensor:
    """The last layers added up, over all tokens of each text."""
    layers = islice(bert.layers(pack), bert.depth - last_layers, None)
    return pack.sums(reduce(torch.add, layers))


def _medclip(bert: PackedBert, pack: Pack) -> Tensor:
    """The mean of the first, the second and the last block over the tokens that the pack keeps."""
    wanted = (1, min(2, bert.depth - 1), bert.depth - 1)
    picked = [x for i, x in enumerate(bert.layers(pack)) for _ in range(wanted.count(i))]
    return pack.means(reduce(torch.add, picked) / len(wanted))


def _last(layers: Iterator[Tensor]) -> Tensor:
    *_, last = layers
    return last


def _require(module: nn.Module, *kinds: str) -> None:
    """Raise ``NotPackable`` unless a module is of exactly one of these classes, without foreign hooks, in float32."""
    kind = type(module)
    if kind.__name__ not in kinds or kind.__module__.split(".")[0] not in ("torch", "transformers", "chiasm"):
        raise NotPackable(f"{kind.__name__} is not {' or '.join(kinds)}")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks):
        raise NotPackable(f"a {kind.__name__} has hooks")
    if "forward" in module.__dict__:
        raise NotPackable(f"a {kind.__name__} has a forward of its own")
    for tensor in module.parameters(recurse=False):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise NotPackable(f"weights are {tensor.dtype} on {tensor.device}")
