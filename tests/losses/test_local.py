from __future__ import annotations

import pytest
import torch

from chiasm.errors import InputError
from chiasm.losses.local import attention_similarity, local_contrastive_loss, peer_word_counts


def features(images: int = 3, texts: int = 4, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    draw = torch.Generator().manual_seed(0)
    regions = torch.randn(images, dim, 3, 2, generator=draw)
    words = torch.zeros(texts, 9, dim)
    counts = [1 + i % 5 for i in range(texts)]
    for i, n in enumerate(counts):
        words[i, : n + 2] = torch.randn(n + 2, dim, generator=draw)
    return regions, words, counts


def test_a_pair_does_not_depend_on_the_others() -> None:
    regions, words, counts = features()
    whole = attention_similarity(regions, words, counts)
    assert whole.shape == (3, 4)
    one = attention_similarity(regions[1:2], words[2:3], counts[2:3])
    assert torch.allclose(whole[1, 2], one[0, 0], atol=1e-6)
    assert attention_similarity(regions, words[:0], []).shape == (3, 0)
    assert attention_similarity(regions[:0], words, counts).shape == (0, 4)


def test_the_largest_possible_value_is_five() -> None:
    """A word that equals every region has a cosine of 1 with its context."""
    regions = torch.ones(1, 4, 2, 2)
    words = torch.ones(1, 3, 4)
    assert attention_similarity(regions, words, [1]).item() == pytest.approx(5.0)
    assert attention_similarity(regions, -words, [1]).item() == pytest.approx(-5.0)


def test_gradients_are_right() -> None:
    regions, words, counts = features(2, 2, 3)
    regions, words = regions.double().requires_grad_(), words.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: local_contrastive_loss(r, w, counts[:2]), (regions, words))


def test_the_loss_is_least_where_words_lie_on_their_own_image() -> None:
    torch.manual_seed(0)
    directions = torch.eye(3)
    regions = directions[:, :, None, None].expand(3, 3, 2, 2)
    words = directions[:, None].repeat(1, 4, 1)
    right = local_contrastive_loss(regions, words, [2, 2, 2])
    wrong = local_contrastive_loss(regions, words.roll(1, 0), [2, 2, 2])
    assert float(right) < 0.01 < float(wrong)


def test_the_published_count_is_of_characters() -> None:
    assert peer_word_counts(["severe edema", "[a]", "x" * 200], 97).tolist() == [12, 2, 96]
    with pytest.raises(InputError, match="text 1 is empty"):
        peer_word_counts(["a", "["], 97)


def test_what_does_not_fit_is_refused() -> None:
    regions, words, counts = features()
    with pytest.raises(InputError, match="do not fit"):
        attention_similarity(regions, words[:, :, :3], counts)
    with pytest.raises(InputError, match="do not fit"):
        attention_similarity(regions, words, counts[:2])
    with pytest.raises(InputError, match="expected 1 to 8"):
        attention_similarity(regions, words, [0, 1, 1, 1])
    with pytest.raises(InputError, match="expected 1 to 8"):
        attention_similarity(regions, words, [9, 1, 1, 1])
