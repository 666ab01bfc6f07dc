"""The fast form of the native text tower: the module's own numbers, whatever stands beside a text in its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chiasm.encoders.adapters import apply_lora, merge_lora
from chiasm.encoders.base import Encoder, LoraConfig, ProjectionConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.ensemble import EnsembleModel
from chiasm.encoders.inference import packed, ragged, text
from chiasm.encoders.inference.engine import Engine, text_form
from chiasm.encoders.inference.packed import NotPackable
from chiasm.encoders.text import TextTransformer, text_features
from chiasm.errors import InputError

Make = Callable[..., Any]
LAW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TRIMMED: list[dict[str, Any]] = [{}, {"pool": "mean"}, {"activation": "gelu"}]
WHOLE: list[dict[str, Any]] = [
    {"causal": False},
    {"causal": False, "pool": "mean"},
    {"pool": "last"},
    {"pool": "last", "causal": False, "activation": "gelu_tanh"},
    {"pool": "cls", "causal": False},
    {"pool": "appended"},
    {"pool": "appended", "cls_mask": "correct"},
]


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def off_angle(a: Tensor, b: Tensor) -> float:
    return float((1 - torch.cosine_similarity(a.double(), b.double())).max())


@pytest.fixture(params=["packed", "plain"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With oneDNN's packed layers, and as if torch had none."""
    if request.param == "plain":

        def absent() -> tuple[Any, Any]:
            raise AttributeError("no such operator")

        monkeypatch.setattr(packed, "_operators", absent)
    packed.can_pack.cache_clear()
    yield request.param
    packed.can_pack.cache_clear()


@pytest.mark.parametrize("shape", TRIMMED + WHOLE)
@pytest.mark.parametrize("known", [True, False])
def test_it_equals_the_module(tiny: Make, make_texts: Make, shape: dict[str, Any], known: bool, operators: str) -> None:
    model = tiny(text=shape)
    lengths = [4, 16, 2, 9, 9, 5]
    ids, sizes = make_texts(lengths), torch.tensor(lengths) if known else None
    with torch.inference_mode():
        expected = model.encode_text(ids, sizes)
        engine = Engine(model, "fp32")
        assert "text" not in engine.plain
        assert engine._text._blocks[0]._out.packed == (operators == "packed")  # type: ignore[union-attr]
        found = engine.encode_text(ids, sizes)
        assert found.dtype == torch.float32
        assert worst(found, expected) < 1e-5
        unit = engine.encode_text(ids, sizes, normalize=True)
        assert worst(unit, model.encode_text(ids, sizes, normalize=True)) < 1e-5


@pytest.mark.parametrize("shape", TRIMMED + WHOLE)
def test_mixed_bfloat16_keeps_the_direction(tiny: Make, make_texts: Make, shape: dict[str, Any]) -> None:
    model = tiny(text=shape)
    lengths = torch.tensor([4, 16, 2, 9, 9, 5])
    ids = make_texts(lengths.tolist())
    with torch.inference_mode():
        expected, found = model.encode_text(ids, lengths), Engine(model, "bf16").encode_text(ids, lengths)
    assert found.dtype == torch.float32
    assert 0 < off_angle(found, expected) < 2e-4


@given(st.lists(st.integers(2, 16), min_size=2, max_size=8), st.randoms(), st.integers(0, 999))
@LAW
def test_a_text_has_one_vector(tiny: Make, make_texts: Make, lengths: list[int], random: Any, seed: int) -> None:
    """Alone, in any batch and in any order, trimmed beforehand or not; and it is the module's."""
    model = tiny(text={"pool": "mean"} if seed % 2 else {})
    ids, sizes = make_texts(lengths, seed=seed), torch.tensor(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        together = form(ids, sizes)
        assert worst(together, model.encode_text(ids, sizes)) < 1e-5
        assert worst(torch.cat([form(ids[i : i + 1], sizes[i : i + 1]) for i in order]), together[order]) < 1e-5
        assert worst(form(ids[order], sizes[order]), together[order]) < 1e-5
        assert worst(form(ids[:, : max(lengths)], None), together) < 1e-5


@given(st.integers(1, 40), st.integers(0, 99))
@LAW
def test_how_a_batch_is_cut_changes_nothing(tiny: Make, make_texts: Make, max_rows: int, seed: int) -> None:
    lengths = [2, 16, 7, 7, 3, 12, 2]
    ids = make_texts(lengths, seed=seed)
    for shape in ({}, {"causal": False}, {"pool": "appended"}):
        model = tiny(text=shape)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            form = text_form(model, torch.float32)
            whole = form(ids, torch.tensor(lengths))
            for name in ("ragged_packs", "padded_packs"):
                plain = getattr(ragged, name)
                patch.setattr(text, name, lambda i, s, plain=plain: plain(i, s, max_rows))
            assert worst(form(ids, torch.tensor(lengths)), whole) < 1e-5


@pytest.mark.parametrize("shape", WHOLE[:5])
def test_leaving_out_padding_that_is_seen_would_be_wrong(tiny: Make, make_texts: Make, shape: dict[str, Any]) -> None:
    """The negative test: these towers must keep their context, and a form that trims them gives other vectors."""
    model = tiny(text=shape)
    ids, lengths = make_texts([4, 9]), torch.tensor([4, 9])
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        assert isinstance(form, text.PackedText)
        right = form(ids, lengths)
        with pytest.raises(InputError, match="sees its padding"):
            form(ids[:, :9], lengths)
        (pack,) = ragged.ragged_packs(ids, lengths)
        trimmed = ragged.in_order(iter([pack]), form._embed, 2)
        assert worst(trimmed, right) > 1e-3


def test_the_wrong_row_would_be_another_vector(tiny: Make, make_texts: Make) -> None:
    model = tiny()
    ids, lengths = make_texts([4, 9]), torch.tensor([4, 9])
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        right = form(ids, lengths)
        assert worst(form(ids, lengths - 1), right) > 1e-3  # one before the end
        assert worst(form(ids, lengths), form(ids, None)) == 0
        two_ends = ids.clone()
        two_ends[1, 3] = 99  # the first end counts where lengths are not given
        assert worst(form(two_ends, None)[1:], model.encode_text(two_ends)[1:]) < 1e-5
        assert worst(form(two_ends, None)[1:], form(two_ends, lengths)[1:]) > 1e-3


def test_padding_is_never_read(tiny: Make, make_texts: Make) -> None:
    """Not even looked up: what stands behind a text may be no id at all."""
    form = text_form(tiny(), torch.float32)
    ids, lengths = make_texts([4, 9, 16]), torch.tensor([4, 9, 16])
    with torch.inference_mode():
        right = form(ids, lengths)
        ids[torch.arange(16) >= lengths[:, None]] = 10**6
        assert torch.equal(form(ids, lengths), right)


@pytest.mark.parametrize("lengths", [[16], [16] * 5, [1], [1, 1], [2, 16, 1]])
def test_lengths_at_the_edges(tiny: Make, lengths: list[int]) -> None:
    model = tiny()
    ids, sizes = torch.randint(1, 99, (len(lengths), 16)), torch.tensor(lengths)
    with torch.inference_mode():
        assert worst(text_form(model, torch.float32)(ids, sizes), model.encode_text(ids, sizes)) < 1e-5


@pytest.mark.parametrize("shape", [{}, {"causal": False}, {"pool": "last"}, {"pool": "appended"}])
@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (torch.ones(2, 16), None),
        (torch.ones(16, dtype=torch.long), None),
        (torch.ones(2, 18, dtype=torch.long), None),
        (torch.ones(2, 9, dtype=torch.long), None),
        (torch.ones(2, 16, dtype=torch.long), None),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([0, 3])),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([3, 17])),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([3])),
        (torch.ones(2, 0, dtype=torch.long), None),
    ],
)
def test_it_refuses_what_the_module_refuses(
    tiny: Make, shape: dict[str, Any], ids: Tensor, lengths: Tensor | None
) -> None:
    model = tiny(text=shape)
    form = text_form(model, torch.float32)

    def outcome(call: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor | str:
        try:
            return call(ids, lengths)
        except InputError as error:
            return f"{error}"

    with torch.inference_mode():
        expected, found = outcome(model.encode_text), outcome(form)
    if isinstance(expected, str) or isinstance(found, str):
        assert expected == found
    else:
        assert worst(found, expected) < 1e-5


def test_ids_outside_of_the_vocabulary_are_refused(tiny: Make) -> None:
    form = text_form(tiny(), torch.float32)
    for bad in (100, -1):
        ids = torch.full((2, 16), 5)
        ids[1, 2] = bad
        with torch.inference_mode(), pytest.raises(IndexError):
            form(ids, torch.tensor([4, 4]))


@pytest.mark.parametrize("shape", [{}, {"pool": "mean"}, {"causal": False}, {"pool": "appended"}])
def test_no_texts(tiny: Make, shape: dict[str, Any]) -> None:
    engine = Engine(tiny(text=shape), "fp32")
    empty = torch.zeros(0, 16, dtype=torch.long)
    for lengths in (None, torch.zeros(0, dtype=torch.long)):
        assert engine.encode_text(empty, lengths).shape == (0, 20)


def test_a_place_that_a_tokenizer_keeps_for_the_appended_token(tiny: Make, make_texts: Make) -> None:
    """CONCH's tokenizer gives one column more; padding in the middle of a text hides it, as in the module."""
    model = tiny(text={"pool": "appended"})
    ids = make_texts([4, 15, 9])
    ids[1, 3] = 0
    wide = torch.cat([ids, torch.zeros(3, 1, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        form = text_form(model, torch.float32)
        assert worst(form(wide, None), model.encode_text(wide)) < 1e-5
        assert torch.equal(form(wide, None), form(ids, None))


def test_projections_of_every_kind(make_config: Make, make_texts: Make, scramble: Make) -> None:
    ids, lengths = make_texts([4, 16, 9]), torch.tensor([4, 16, 9])
    for projection in (
        ProjectionConfig(dim=20, text="mlp"),
        ProjectionConfig(dim=20, biased=("text",)),
        ProjectionConfig(dim=20, standardize=("text",)),
        ProjectionConfig(dim=24, text="none"),
    ):
        model = build_encoder_model(dataclasses.replace(make_config(), projection=projection), seed=0)
        scramble(model)
        model.eval()
        with torch.inference_mode():
            engine = Engine(model, "fp32")
            assert "text" not in engine.plain
            assert worst(engine.encode_text(ids, lengths), model.encode_text(ids, lengths)) < 1e-5


def test_an_ensemble(tiny: Make, make_config: Make, make_texts: Make) -> None:
    model = EnsembleModel([tiny(seed=0), tiny(seed=1)], dataclasses.replace(make_config(), members=2)).eval()
    ids, lengths = make_texts([4, 16, 9]), torch.tensor([4, 16, 9])
    with torch.inference_mode():
        assert worst(Engine(model, "fp32").encode_text(ids, lengths), model.encode_text(ids, lengths)) < 1e-5


def test_an_adapted_or_hooked_tower_runs_as_it_is(tiny: Make, make_texts: Make) -> None:
    ids, lengths = make_texts([4, 9]), torch.tensor([4, 9])
    adapted = tiny()
    apply_lora(adapted.transformer, LoraConfig(rank=2))
    for parameter in adapted.transformer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    hooked = tiny()
    hooked.transformer.resblocks[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    for model in (adapted, hooked):
        with torch.inference_mode():
            engine = Engine(model, "fp32")
            assert engine.plain["text"]
            assert torch.equal(engine.encode_text(ids, lengths), model.encode_text(ids, lengths))
    assert parametrize.is_parametrized(adapted.transformer.resblocks[0].attn)
    merge_lora(adapted)
    with torch.inference_mode():
        engine = Engine(adapted, "fp32")
        assert "text" not in engine.plain
        assert worst(engine.encode_text(ids, lengths), adapted.encode_text(ids, lengths)) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.token_embedding, "max_norm", 1.0), "rescales"),
        (lambda m: setattr(m, "text_plan", dataclasses.replace(m.text_plan, pool="cls")), "sees only itself"),
        (lambda m: m.transformer.half(), "float16"),
        (lambda m: setattr(m, "ln_final", nn.LayerNorm(24)), "LayerNorm"),
        (lambda m: setattr(m, "token_embedding", nn.Sequential(m.token_embedding)), "Sequential"),
    ],
)
def test_what_cannot_be_mapped_is_said(tiny: Make, change: Callable[[Any], None], reason: str) -> None:
    model = tiny()
    change(model)
    with pytest.raises(NotPackable, match=reason):
        text_form(model, torch.float32)


def test_a_model_that_encodes_in_its_own_way_is_asked_itself(tiny: Make, make_texts: Make) -> None:
    class Doubling(DualEncoder):
        def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = False) -> Tensor:
            return 2 * super().encode_text(ids, lengths, normalize)

    model = tiny()
    ids = make_texts([4, 9])
    with torch.inference_mode():
        expected = 2 * model.encode_text(ids)
        model.__class__ = Doubling
        engine = Engine(model, "fp32")
        assert "Doubling" in engine.plain["text"]
        assert torch.equal(engine.encode_text(ids), expected)


def test_a_tower_on_its_own(tiny: Make, make_config: Make, make_texts: Make) -> None:
    """The parts may lie in a ``TextTransformer`` or at the top of a model; both are read by one function."""
    tower = TextTransformer(make_config().text, None)
    tower.init_weights(torch.Generator().manual_seed(0))
    ids, lengths = make_texts([4, 9]), torch.tensor([4, 9])
    with torch.inference_mode():
        form = text.PackedText(tower, dtype=torch.float32)  # type: ignore[arg-type]
        assert worst(form(ids, lengths), text_features(tower, ids, lengths)) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["token_embedding.weight", "positional_embedding", "text_projection", "ln_final.bias",
                                  "transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.2.ln_2.weight"])  # fmt: skip
def test_changed_weights_are_seen_at_the_next_call(tiny: Make, make_config: Make, make_texts: Make, name: str) -> None:
    model = tiny()
    encoder = Encoder(model, make_config(), name="tiny").prepare()
    ids = make_texts([4, 9])
    before = encoder.encode_text(ids)
    with torch.no_grad():
        model.get_parameter(name).add_(0.05 * torch.randn(model.get_parameter(name).shape))
    after = encoder.encode_text(ids)
    with torch.inference_mode():
        assert worst(after, model.encode_text(ids)) < 1e-5
    assert worst(after, before) > 1e-4


def test_no_row_is_worked_on_in_vain(tiny: Make, make_texts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that enter the linear layers: the texts' own tokens, and behind the last attention the pooled ones."""
    seen: list[tuple[int, int]] = []
    plain = packed.PackedLinear.__call__

    def counted(self: packed.PackedLinear, x: Tensor) -> Tensor:
        seen.append((len(x), self.out_features))
        return plain(self, x)

    form = text_form(tiny(), torch.float32)
    monkeypatch.setattr(packed.PackedLinear, "__call__", counted)
    with torch.inference_mode():
        form(make_texts([3, 9, 5]), torch.tensor([3, 9, 5]))
    assert seen[:8] == [(17, 72), (17, 24), (17, 96), (17, 24)] * 2
    assert seen[8:] == [(3, 24), (17, 48), (3, 24), (3, 96), (3, 24)]
