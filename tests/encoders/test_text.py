from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.text import TextTransformer, text_features
from chiasm.errors import InputError

Make = Callable[..., Any]
LAW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def untrimmed(model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """The same tower, written out at full context: what open_clip computes."""
    x = model.token_embedding(ids) + model.positional_embedding
    x = model.transformer(x, causal=model.text_plan.causal)
    rows = model.ln_final(x)
    if model.text_plan.pool == "eot":
        pooled = rows[torch.arange(len(ids)), lengths - 1]
    else:
        pooled = torch.stack([row[:n].mean(0) for row, n in zip(rows, lengths.tolist(), strict=True)])
    out: Tensor = pooled @ model.text_projection
    return out


@pytest.mark.parametrize("pool", ["eot", "mean"])
@given(st.lists(st.integers(2, 16), min_size=1, max_size=6), st.integers(0, 1000))
@LAW
def test_trimming_is_exact(tiny: Make, make_texts: Make, pool: str, lengths: list[int], seed: int) -> None:
    model = tiny(text={"pool": pool})
    ids = make_texts(lengths, seed=seed)
    with torch.inference_mode():
        assert worst(model.encode_text(ids), untrimmed(model, ids, torch.tensor(lengths))) < 1e-5


def test_trimming_is_exact_in_double_precision_and_in_gradient(tiny: Make, make_texts: Make) -> None:
    model = tiny().double()
    lengths = [3, 9, 5]
    ids = make_texts(lengths)
    weights = torch.randn(3, 20, dtype=torch.float64)
    parts = [p for n, p in model.named_parameters() if not n.startswith(("visual", "logit"))]
    ours = torch.autograd.grad((model.encode_text(ids) * weights).sum(), parts)
    full = torch.autograd.grad((untrimmed(model, ids, torch.tensor(lengths)) * weights).sum(), parts)
    for a, b in zip(ours, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.permutations(range(5)), st.integers(0, 1000))
@LAW
def test_a_text_is_the_same_alone_and_in_any_batch(tiny: Make, make_texts: Make, order: list[int], seed: int) -> None:
    model = tiny()
    ids = make_texts([2, 16, 5, 9, 3], seed=seed)
    with torch.inference_mode():
        together = model.encode_text(ids)
        alone = torch.cat([model.encode_text(ids[i : i + 1]) for i in range(5)])
        assert worst(alone, together) < 1e-5
        assert worst(model.encode_text(ids[order]), together[order]) < 1e-5


@given(st.integers(0, 99), st.integers(0, 1000))
@LAW
def test_padding_is_never_seen(tiny: Make, make_texts: Make, pad: int, seed: int) -> None:
    model = tiny()
    lengths = [4, 9]
    plain, other = make_texts(lengths, seed=seed), make_texts(lengths, seed=seed, pad=pad)
    with torch.inference_mode():
        same = model.encode_text(plain, torch.tensor(lengths)), model.encode_text(other, torch.tensor(lengths))
        assert worst(*same) < 1e-6
        assert worst(model.encode_text(plain), same[0]) < 1e-6  # the end of text is found without lengths


def test_ids_may_come_already_trimmed(tiny: Make, make_texts: Make) -> None:
    model = tiny()
    ids = make_texts([4, 9])
    with torch.inference_mode():
        assert torch.equal(model.encode_text(ids[:, :9]), model.encode_text(ids))


@pytest.mark.parametrize("text", [{"causal": False}, {"pool": "last"}, {"causal": False, "pool": "mean"}])
def test_a_tower_that_sees_its_padding_is_not_trimmed(tiny: Make, make_texts: Make, text: dict[str, Any]) -> None:
    model = tiny(text=text)
    assert not model.text_plan.can_trim
    lengths = torch.tensor([4, 9])
    ids = make_texts([4, 9])
    padded = make_texts([4, 9], pad=7)
    with torch.inference_mode():
        assert worst(model.encode_text(padded, lengths), model.encode_text(ids, lengths)) > 1e-3
        with pytest.raises(InputError, match="sees its padding"):
            model.encode_text(ids[:, :9], lengths)


def test_trimming_where_padding_is_seen_would_be_wrong(tiny: Make, make_texts: Make) -> None:
    """The negative test: forced trimming of a tower without causal mask changes its embeddings."""
    model = tiny(text={"causal": False})
    ids = make_texts([4, 9])
    with torch.inference_mode():
        right = model.encode_text(ids)
        model.text_plan = dataclasses.replace(model.text_plan, context_length=9)
        assert worst(model.encode_text(ids[:, :9]), right) > 1e-3


def test_later_tokens_change_nothing_and_earlier_ones_do(tiny: Make, make_texts: Make) -> None:
    model = tiny()
    ids = make_texts([8])
    lengths = torch.tensor([5])
    later, earlier = ids.clone(), ids.clone()
    later[0, 6] = (later[0, 6] + 1) % 90
    earlier[0, 1] = (earlier[0, 1] + 1) % 90
    with torch.inference_mode():
        base = model.encode_text(ids, lengths)
        assert torch.equal(model.encode_text(later, lengths), base)
        assert worst(model.encode_text(earlier, lengths), base) > 1e-3


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (torch.ones(2, 16), None, "integers"),
        (torch.ones(16, dtype=torch.long), None, "shape"),
        (torch.ones(2, 17, dtype=torch.long), None, "at most 16"),
        (torch.ones(2, 16, dtype=torch.long), None, "no end-of-text token 99"),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([3]), r"expected \(2,\)"),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([0, 3]), "lengths run from 0"),
        (torch.ones(2, 16, dtype=torch.long), torch.tensor([3, 17]), "to 17"),
    ],
)
def test_impossible_input_is_refused(tiny: Make, ids: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny().encode_text(ids, lengths)


def test_the_message_holds_no_token_of_the_text(tiny: Make) -> None:
    with pytest.raises(InputError) as caught:
        tiny().encode_text(torch.full((1, 16), 73))
    assert "73" not in str(caught.value)


def test_empty_batch(tiny: Make) -> None:
    assert tiny().encode_text(torch.zeros(0, 16, dtype=torch.long)).shape == (0, 20)


@pytest.mark.parametrize("text", [{}, {"pool": "mean"}, {"pool": "last"}, {"causal": False, "pool": "cls"}])
def test_gradient_reaches_every_parameter(tiny: Make, make_texts: Make, text: dict[str, Any]) -> None:
    model = tiny(text=text).train()
    model.encode_text(make_texts([4, 16, 9])).pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual", "logit")):
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, name


def test_gradcheck_in_double_precision(tiny: Make, make_texts: Make) -> None:
    shape = {"context_length": 5, "vocab_size": 7, "width": 4, "heads": 2, "layers": 2}
    model = tiny(text=shape, dim=3).double()
    ids = make_texts([3, 4], context=5, vocab=7)
    names = [n for n, _ in model.named_parameters() if not n.startswith(("visual", "logit"))]
    values = tuple(dict(model.named_parameters())[n] for n in names)
    tower = TextTransformer(model.config.text, 3).double()

    def with_weights(*weights: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(tower, dict(zip(names, weights, strict=True)), (ids,))
        return out

    assert torch.autograd.gradcheck(with_weights, values, fast_mode=True)


def test_checkpointing_changes_no_gradient(tiny: Make, make_texts: Make) -> None:
    model = tiny().train()
    parts = [p for n, p in model.named_parameters() if not n.startswith(("visual", "logit"))]
    ids = make_texts([4, 9])
    plain = torch.autograd.grad(model.encode_text(ids).square().sum(), parts)
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(model.encode_text(ids).square().sum(), parts)
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)


def test_the_tower_alone_equals_its_parts_in_the_dual_encoder(make_config: Make, make_texts: Make) -> None:
    config = make_config()
    model = build_encoder_model(config, seed=0).eval()
    tower = TextTransformer(config.text, 20).eval()
    tower.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("visual", "logit"))})
    ids = make_texts([4, 9])
    assert torch.equal(tower(ids), model.encode_text(ids))
    assert torch.equal(text_features(tower, ids), tower(ids))
