"""Texts of unequal lengths as one matrix: what the packs hold, and that attention stays inside of a text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiasm.encoders.inference.ragged import Pack, in_order, padded_packs, ragged_packs

LAW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
WIDTH, HEADS = 8, 2


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_ids(lengths: list[int], tokens: int = 9) -> Tensor:
    """Ids that say where they stand: 100 · text + place, 0 on padding."""
    ids = 100 * torch.arange(1, len(lengths) + 1)[:, None] + torch.arange(tokens)
    return torch.where(torch.arange(tokens) < torch.tensor(lengths)[:, None], ids, 0)


def one_text(qkv: Tensor, causal: bool) -> Tensor:
    """Attention of one text, written out: (tokens, 3 · width) -> (tokens, width)."""
    q, k, v = (t.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for t in qkv.chunk(3, dim=1))
    scores = q @ k.transpose(1, 2) / (WIDTH // HEADS) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def rows_of(pack: Pack) -> list[slice]:
    return [slice(a, b + 1) for a, b in zip(pack.firsts.tolist(), pack.lasts.tolist(), strict=True)]


@given(LENGTHS, st.integers(1, 30))
@LAW
def test_packs_hold_every_token_once_and_no_padding(lengths: list[int], max_rows: int) -> None:
    packs = list(ragged_packs(make_ids(lengths), torch.tensor(lengths), max_rows))
    assert sorted(t for pack in packs for t in pack.texts.tolist()) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack.ids) <= max(max_rows, *lengths)
        assert sum(n * length for n, length in pack.groups) == len(pack.ids) == len(pack.positions)
        sizes = [length for n, length in pack.groups for _ in range(n)]
        assert sizes == sorted(sizes)
        assert len({length for _, length in pack.groups}) == len(pack.groups)
        for text, rows, size in zip(pack.texts.tolist(), rows_of(pack), sizes, strict=True):
            assert size == lengths[text]
            assert pack.ids[rows].tolist() == [100 * (text + 1) + place for place in range(size)]
            assert pack.positions[rows].tolist() == list(range(size))


@given(LENGTHS, st.integers(1, 30), st.booleans())
@LAW
def test_padded_packs_keep_every_column(lengths: list[int], max_rows: int, hide: bool) -> None:
    ids = make_ids(lengths)
    packs = list(padded_packs(ids, torch.tensor(lengths) if hide else None, max_rows))
    assert torch.equal(torch.cat([pack.ids.view(-1, 9) for pack in packs]), ids)
    assert torch.cat([pack.texts for pack in packs]).tolist() == list(range(len(lengths)))
    for pack in packs:
        assert len(pack.ids) <= max(max_rows, 9)
        assert pack.positions.view(-1, 9)[-1].tolist() == list(range(9))
        assert pack.ids[pack.firsts].tolist() == [100 * (t + 1) for t in pack.texts.tolist()]
        if pack.seen is not None:
            assert pack.seen.sum((1, 2, 3)).tolist() == [lengths[t] for t in pack.texts.tolist()]
        else:
            assert not hide or min(lengths) == 9


@given(LENGTHS, st.booleans(), st.integers(0, 99))
@LAW
def test_attention_stays_inside_of_a_text(lengths: list[int], causal: bool, seed: int) -> None:
    (pack,) = ragged_packs(make_ids(lengths), torch.tensor(lengths))
    qkv = torch.randn(len(pack.ids), 3 * WIDTH, generator=torch.Generator().manual_seed(seed))
    expected = torch.cat([one_text(qkv[rows], causal) for rows in rows_of(pack)])
    torch.testing.assert_close(pack.attend(qkv, HEADS, causal=causal), expected, rtol=1e-5, atol=1e-6)
    whole = torch.cat([one_text(qkv[rows], False) for rows in rows_of(pack)])
    for wanted in (pack.firsts, pack.lasts):
        found = pack.attend_one(qkv[wanted, :WIDTH], qkv[:, WIDTH:], HEADS)
        torch.testing.assert_close(found, whole[wanted], rtol=1e-5, atol=1e-6)


@given(LENGTHS, st.integers(0, 99))
@LAW
def test_hidden_padding_gives_what_no_padding_gives(lengths: list[int], seed: int) -> None:
    ids, sizes = make_ids(lengths), torch.tensor(lengths)
    (padded,) = padded_packs(ids, sizes)
    qkv = torch.randn(len(padded.ids), 3 * WIDTH, generator=torch.Generator().manual_seed(seed))
    found = padded.attend(qkv, HEADS, causal=False).view(len(ids), 9, WIDTH)
    one = padded.attend_one(qkv[padded.firsts, :WIDTH], qkv[:, WIDTH:], HEADS)
    for text, size in enumerate(lengths):
        alone = one_text(qkv.view(len(ids), 9, -1)[text, :size], False)
        torch.testing.assert_close(found[text, :size], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[text], alone[0], rtol=1e-5, atol=1e-6)


def test_a_mask_of_its_own_takes_the_place_of_the_causal_one() -> None:
    """What each token sees may be said token by token (CoCa); one query then sees what the last token sees."""
    (pack,) = padded_packs(make_ids([9, 9]), None)
    seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen |= torch.eye(9, dtype=torch.bool)
    masked = Pack(pack.texts, pack.groups, pack.ids, pack.positions, pack.firsts, pack.lasts, seen)
    qkv = torch.randn(18, 3 * WIDTH, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv.view(2, 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(18, -1)
    torch.testing.assert_close(masked.attend(qkv, HEADS, causal=True), expected)
    found = masked.attend_one(qkv[pack.lasts, :WIDTH], qkv[:, WIDTH:], HEADS)
    torch.testing.assert_close(found, expected[pack.lasts], rtol=1e-5, atol=1e-6)


@given(LENGTHS, st.integers(1, 30))
@LAW
def test_sums_and_means_and_the_order_of_the_batch(lengths: list[int], max_rows: int) -> None:
    ids, sizes = make_ids(lengths), torch.tensor(lengths)
    for work, expected in ((Pack.sums, ids.sum(1)), (Pack.means, ids.sum(1) / sizes)):
        found = in_order(
            ragged_packs(ids, sizes, max_rows),
            lambda pack, work=work: work(pack, pack.ids[:, None].double()),
            len(ids),
        )
        torch.testing.assert_close(found, expected[:, None].double())


def test_many_texts_are_cut_by_tokens() -> None:
    """Thousands of texts at once: no pack exceeds the limit, nor is any needlessly small."""
    lengths = [1 + i % 77 for i in range(3000)]
    packs = list(ragged_packs(make_ids(lengths, tokens=77), torch.tensor(lengths)))
    rows = [len(pack.ids) for pack in packs]
    assert max(rows) <= 8192
    assert len(rows) == pytest.approx(sum(lengths) / 8192, abs=1.5)
