"""The fast form of BERT text towers: the tower's own numbers for every pooling, and a plain tower where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.encoders.adapters import apply_lora
from chiasm.encoders.base import Encoder, EncoderConfig, LoraConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.inference import bert, packed
from chiasm.encoders.inference.engine import Engine, text_form
from chiasm.encoders.inference.packed import NotPackable
from chiasm.encoders.inference.ragged import padded_packs
from chiasm.errors import InputError

CONTEXT, VOCABULARY = 16, 60
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 24,
}  # fmt: skip
OPTIONS = {"width": 32, "layers": 3, "heads": 4, "mlp_width": 48, "vocab_size": VOCABULARY, "positions": 24}
LENGTHS = [4, 16, 2, 9, 9, 5]
LAW = settings(max_examples=12, deadline=None)


def huggingface(pool: str = "cls", *, pooler: bool = False, **change: Any) -> dict[str, Any]:
    options = {"config": BERT | change} | ({"pooler": True} if pooler else {})
    return {"kind": "huggingface", "source": "bert", "pool": pool, "options": options}


def named(name: str, **change: Any) -> dict[str, Any]:
    return {"kind": "named", "source": name, "options": OPTIONS | change}


TOWERS: dict[str, dict[str, Any]] = {
    "biomedclip": huggingface(),
    "mean": huggingface("mean"),
    "eot": huggingface("eot"),
    "last": huggingface("last"),
    "pooler": huggingface(pooler=True),
    "pooler of a tower that pools last": huggingface("last", pooler=True),
    "cxr-bert": named("cxr_bert", output_dim=24),
    "gloria": named("gloria"),
    "gloria, all layers": named("gloria", last_layers=4),
    "medclip": named("medclip"),
    "medclip of one block": named("medclip", layers=1),
    "medclip-masked": named("medclip", masked_mean=True),
}
#: Its vectors depend on the longest text of the batch, by definition.
BY_BATCH = ("medclip", "medclip of one block")


def make_config(tower: dict[str, Any], **change: Any) -> EncoderConfig:
    text = TextTowerConfig(context_length=CONTEXT, **tower | change)
    tokenizer = {"kind": "huggingface", "source": "bert", "context_length": CONTEXT}
    return EncoderConfig(text=text, projection=ProjectionConfig(dim=20), sides="text", tokenizer=tokenizer)


def make_model(tower: dict[str, Any], **change: Any) -> DualEncoder:
    torch.set_num_threads(1)
    model = build_encoder_model(make_config(tower, **change), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def make_texts(lengths: list[int], *, seed: int = 0, pad: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, sizes = torch.randint(1, VOCABULARY, (len(lengths), CONTEXT), generator=generator), torch.tensor(lengths)
    ids[torch.arange(CONTEXT) >= sizes[:, None]] = pad
    return ids, sizes


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_it_equals_the_tower(name: str) -> None:
    model = make_model(TOWERS[name])
    ids, sizes = make_texts(LENGTHS)
    with torch.inference_mode():
        expected = model.encode_text(ids, sizes)
        engine = Engine(model, "fp32")
        assert engine.plain == {}
        for lengths in (sizes, None):  # padding is found where no lengths are given
            assert worst(engine.encode_text(ids, lengths), expected) < 1e-5
        mixed = Engine(model, "bf16").encode_text(ids, sizes)
        assert mixed.dtype == torch.float32
        assert 0 < float((1 - torch.cosine_similarity(mixed.double(), expected.double())).max()) < 2e-4
        assert engine.encode_text(ids[:0], sizes[:0]).shape == (0, 20)
        assert worst(engine.encode_text(ids[1:2], sizes[1:2]), model.encode_text(ids[1:2], sizes[1:2])) < 1e-5


@pytest.mark.parametrize("name", ["biomedclip", "gloria", "medclip"])
def test_without_packed_layers_the_vectors_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> tuple[Any, Any]:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed, "_operators", absent)
    packed.can_pack.cache_clear()
    try:
        test_it_equals_the_tower(name)
    finally:
        packed.can_pack.cache_clear()


@pytest.mark.parametrize("name", [n for n in sorted(TOWERS) if n not in BY_BATCH and "one" not in n])
def test_a_text_has_one_vector(name: str) -> None:
    model = make_model(TOWERS[name])
    form = text_form(model, torch.float32)

    @given(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=6), st.randoms(), st.integers(0, 999))
    @LAW
    def law(lengths: list[int], random: Any, seed: int) -> None:
        ids, sizes = make_texts(lengths, seed=seed)
        order = list(range(len(lengths)))
        random.shuffle(order)
        with torch.inference_mode():
            together = form(ids, sizes)
            assert worst(together, model.encode_text(ids, sizes)) < 1e-5
            assert worst(form(ids[order], sizes[order]), together[order]) < 1e-5
            assert worst(torch.cat([form(ids[i : i + 1], sizes[i : i + 1]) for i in order]), together[order]) < 1e-5

    law()


def test_medclip_still_depends_on_the_longest_text_of_its_batch() -> None:
    model = make_model(TOWERS["medclip"])
    form = text_form(model, torch.float32)
    ids, sizes = make_texts([4, 9, 16])
    with torch.inference_mode():
        for rows in ([0], [0, 1], [0, 2], [2, 0, 1]):
            assert worst(form(ids[rows], sizes[rows]), model.encode_text(ids[rows], sizes[rows])) < 1e-5
        assert worst(form(ids[:1], sizes[:1]), form(ids, sizes)[:1]) > 1e-3


@pytest.mark.parametrize("name", ["medclip", "last", "biomedclip", "mean"])
def test_batches_cut_into_packs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows a pack may have; padding is kept to the longest text of the whole batch."""
    model = make_model(TOWERS[name])
    ids, sizes = make_texts(LENGTHS)
    form = text_form(model, torch.float32)
    with torch.inference_mode():
        expected = model.encode_text(ids, sizes)
        for max_rows in (1, 20, 33):
            for cut in ("ragged_packs", "padded_packs"):
                plain = getattr(bert, cut)
                monkeypatch.setattr(bert, cut, lambda i, s, plain=plain, n=max_rows: plain(i, s, n))
            assert worst(form(ids, sizes), expected) < 1e-5
            monkeypatch.undo()


def test_padding_that_is_read_must_stay() -> None:
    """The negative test: pooling the last position of a trimmed text gives another vector."""
    ids, sizes = make_texts([4, 9])
    model = make_model(TOWERS["last"])
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        assert isinstance(form, bert.PackedBertTower)
        right = form(ids, sizes)
        form._reading = form._reading._replace(padded=False)
        assert worst(form(ids, sizes), right) > 1e-3


def test_padding_that_is_not_hidden_changes_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TOWERS["medclip"])
    ids, sizes = make_texts([4, 9])
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        right = form(ids, sizes)
        monkeypatch.setattr(bert, "padded_packs", lambda ids, lengths: padded_packs(ids, None))
        assert worst(form(ids, sizes), right) > 1e-3


@pytest.mark.parametrize("name", ["biomedclip", "gloria", "mean"])
def test_padding_is_never_read(name: str) -> None:
    form = text_form(make_model(TOWERS[name]), torch.float32)
    ids, sizes = make_texts(LENGTHS)
    wild, _ = make_texts(LENGTHS, pad=10**6)
    with torch.inference_mode():
        assert torch.equal(form(wild, sizes), form(ids, sizes))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(act: str) -> None:
    model = make_model(huggingface("mean", hidden_act=act))
    ids, sizes = make_texts(LENGTHS)
    with torch.inference_mode():
        assert worst(text_form(model, torch.float32)(ids, sizes), model.encode_text(ids, sizes)) < 1e-5


def test_the_recorders_of_transformers_are_no_hooks_of_a_user() -> None:
    """GLoRIA's tower asks for hidden states, for which transformers hangs hooks into the model for good."""
    model = make_model(TOWERS["gloria"])
    ids, sizes = make_texts(LENGTHS)
    with torch.inference_mode():
        expected = model.encode_text(ids, sizes)
        layers: Any = model.text.transformer.model.encoder.layer  # type: ignore[union-attr]
        assert layers[0]._forward_hooks
        assert worst(text_form(model, torch.float32)(ids, sizes), expected) < 1e-5
        layers[0].register_forward_hook(lambda module, args, output: output * 2)
        engine = Engine(model, "fp32")
        assert "hooks" in engine.plain["text"]
        assert torch.equal(engine.encode_text(ids, sizes), model.encode_text(ids, sizes))


def bert_of(model: DualEncoder) -> Any:
    return model.text.transformer.model  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.text.transformer.half(), "float16"),
        (lambda m: setattr(bert_of(m).config, "is_decoder", True), "decodes"),
        (lambda m: setattr(bert_of(m).config, "_attn_implementation", "my_own"), "my_own"),
        (lambda m: setattr(bert_of(m).config, "hidden_act", "mish"), "mish"),
        (lambda m: setattr(bert_of(m).embeddings.word_embeddings, "max_norm", 1.0), "rescales"),
        (lambda m: setattr(bert_of(m).encoder.layer[1].output, "LayerNorm", nn.Identity()), "Identity"),
        (lambda m: bert_of(m).encoder.layer[2].register_forward_pre_hook(lambda *a: None), "hooks"),
        (lambda m: apply_lora(m.text.transformer, LoraConfig(rank=2)), "Linear"),
        (lambda m: setattr(m.text.transformer, "pool", "attention"), "attention"),
        (lambda m: setattr(m.text, "transformer", nn.Identity()), "Identity"),
    ],
)
def test_what_cannot_be_mapped_is_said(change: Callable[[Any], object], reason: str) -> None:
    model = make_model(huggingface())
    change(model)
    with pytest.raises(NotPackable, match=reason):
        text_form(model, torch.float32)


@pytest.mark.parametrize("kind", ["roberta", "t5"])
def test_another_encoder_runs_as_it_is(kind: str) -> None:
    small = {
        "roberta": {k: v for k, v in BERT.items() if k != "model_type"},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY},
    }[kind]
    tower = {"kind": "huggingface", "source": kind, "options": {"config": {"model_type": kind, **small}}}
    model = build_encoder_model(make_config(tower), seed=0).eval()
    ids, sizes = make_texts([4, 9])
    with torch.inference_mode():
        engine = Engine(model, "fp32")
        assert engine.plain["text"]
        assert torch.equal(engine.encode_text(ids, sizes), model.encode_text(ids, sizes))


@pytest.mark.parametrize("name", ["biomedclip", "medclip", "last"])
def test_it_refuses_what_the_tower_refuses(name: str) -> None:
    model = make_model(TOWERS[name])
    form = text_form(model, torch.float32)
    ids, _ = make_texts([4, 9])
    long = torch.ones(2, 30, dtype=torch.long)
    for tokens, lengths in ((ids, torch.tensor([0, 3])), (ids, torch.tensor([3, 17])), (ids, torch.tensor([3]))):
        with torch.inference_mode():
            with pytest.raises(InputError) as expected:
                model.encode_text(tokens, lengths)
            with pytest.raises(InputError) as found:
                form(tokens, lengths)
            assert str(found.value) == str(expected.value)
    with torch.inference_mode():  # more tokens than there are positions
        for call in (model.encode_text, form):
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                call(long, torch.tensor([30, 5]))
        for call in (model.encode_text, form):
            with pytest.raises(IndexError):
                call(ids + VOCABULARY, torch.tensor([4, 9]))


@pytest.mark.parametrize(
    "weight",
    ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "encoder.layer.0.output.dense.bias",
     "embeddings.token_type_embeddings.weight", "encoder.layer.2.attention.output.LayerNorm.weight"],
)  # fmt: skip
def test_changed_weights_are_seen_at_the_next_call(weight: str) -> None:
    model = make_model(TOWERS["mean"])
    encoder = Encoder(model, make_config(TOWERS["mean"]), name="tiny").prepare()
    ids, _ = make_texts([4, 9])
    before = encoder.encode_text(ids)
    with torch.no_grad():
        parameter = bert_of(model).get_parameter(weight)
        parameter.add_(0.1 * torch.randn(parameter.shape))
    with torch.inference_mode():
        assert worst(encoder.encode_text(ids), model.encode_text(ids)) < 1e-5
        assert worst(encoder.encode_text(ids), before) > 1e-4


def test_no_row_is_worked_on_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the linear layers: the texts' own tokens; behind the last attention one a text."""
    seen: list[tuple[int, int]] = []
    plain = packed.PackedLinear.__call__

    def counted(self: packed.PackedLinear, x: Tensor) -> Tensor:
        seen.append((len(x), self.out_features))
        return plain(self, x)

    form = text_form(make_model(TOWERS["biomedclip"]), torch.float32)
    ids, sizes = make_texts([3, 9, 5])
    monkeypatch.setattr(packed.PackedLinear, "__call__", counted)
    with torch.inference_mode():
        form(ids, sizes)
    assert seen == [(17, 96), (17, 32), (17, 48), (17, 32)] * 2 + [(3, 32), (17, 64), (3, 32), (3, 48), (3, 32)]
