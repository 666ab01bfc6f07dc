"""Laws of the losses: what must not change them, what must, and that tiles and processes do not show."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.losses.contrastive import (
    LOG_100,
    Gathered,
    clamp_logit_scale,
    info_nce,
    multi_positive_info_nce,
    positive_keys,
    positives_from_keys,
    siglip,
)

sizes = st.integers(1, 24)
dims = st.integers(1, 12)
scales = st.floats(0.5, 100)
seeds = st.integers(0, 2**31)
laws = settings(max_examples=25, deadline=None)


def pairs(n, dim, seed, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, n, dim, generator=random, dtype=torch.float64)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def some_keys(n, seed, groups):
    return torch.randint(0, groups, (n,), generator=torch.Generator().manual_seed(seed))


def every_loss(image, text, scale, keys, tile="auto"):
    """The losses in their various forms, as one vector."""
    dense = positives_from_keys(keys) * torch.rand(len(keys), len(keys), generator=torch.Generator().manual_seed(1))
    dense = dense + torch.eye(len(keys))
    return torch.stack([
        info_nce(image, text, scale, tile=tile),
        siglip(image, text, scale, -3.0, tile=tile),
        siglip(image, text, scale, -3.0, keys=keys, tile=tile),
        multi_positive_info_nce(image, text, scale, keys, tile=tile),
        multi_positive_info_nce(image, text, scale, dense, tile=tile),
    ])  # fmt: skip


@laws
@given(sizes, dims, scales, seeds, st.integers(1, 8))
def test_order_of_the_pairs_does_not_matter(n, dim, scale, seed, groups):
    image, text = pairs(n, dim, seed)
    keys = some_keys(n, seed, groups)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    before = every_loss(image, text, scale, keys)[:4]
    after = every_loss(image[order], text[order], scale, keys[order])[:4]
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@laws
@given(sizes, dims, scales, seeds)
def test_images_and_texts_may_change_places(n, dim, scale, seed):
    image, text = pairs(n, dim, seed)
    keys = some_keys(n, seed, 4)
    torch.testing.assert_close(
        every_loss(text, image, scale, keys)[:4], every_loss(image, text, scale, keys)[:4], rtol=1e-9, atol=1e-12
    )


@laws
@given(st.integers(2, 24), dims, scales, seeds)
def test_rotating_the_space_does_not_matter(n, dim, scale, seed):
    image, text = pairs(n, dim, seed)
    rotation, _ = torch.linalg.qr(
        torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )
    keys = some_keys(n, seed, 4)
    torch.testing.assert_close(
        every_loss(image @ rotation, text @ rotation, scale, keys),
        every_loss(image, text, scale, keys),
        rtol=1e-8,
        atol=1e-10,
    )


@laws
@given(sizes, dims, scales, seeds, st.integers(1, 30), st.integers(1, 8))
def test_tiles_do_not_show(n, dim, scale, seed, tile, groups):
    """Value and every gradient of the tiled form equal those of the kept matrix."""
    found = []
    for size in (tile, None, "auto"):
        image, text = (x.requires_grad_() for x in pairs(n, dim, seed))
        multiplier = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        losses = every_loss(image, text, multiplier, some_keys(n, seed, groups), tile=size)
        (losses * torch.arange(1.0, 6.0, dtype=torch.float64)).sum().backward()
        found.append((losses.detach(), image.grad, text.grad, multiplier.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@laws
@given(sizes, dims, st.floats(0.5, 20), seeds, st.integers(1, 8))
def test_values_and_gradients_equal_the_plain_formulas(plain, n, dim, scale, seed, groups):
    image, text = pairs(n, dim, seed)
    keys = some_keys(n, seed, groups)
    dense = positives_from_keys(keys).double() * torch.rand(n, n, dtype=torch.float64) + torch.eye(n)
    bias = torch.tensor(-2.0, dtype=torch.float64)
    couples = [
        (lambda i, t, s, b: info_nce(i, t, s), lambda i, t, s, b: plain.info_nce(i, t, s)),
        (siglip, plain.siglip),
        (
            lambda i, t, s, b: multi_positive_info_nce(i, t, s, keys),
            lambda i, t, s, b: plain.soft(i, t, s, positives_from_keys(keys).double()),
        ),
        (lambda i, t, s, b: multi_positive_info_nce(i, t, s, dense), lambda i, t, s, b: plain.soft(i, t, s, dense)),
    ]
    for ours, theirs in couples:
        results = []
        for loss in (ours, theirs):
            inputs = [x.clone().requires_grad_() for x in (image, text, torch.tensor(scale).double(), bias)]
            value = loss(*inputs)
            value.backward()
            results.append([value.detach(), *(x.grad for x in inputs if x.grad is not None)])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@laws
@given(sizes, dims, scales, seeds)
def test_unique_keys_are_info_nce(n, dim, scale, seed):
    image, text = pairs(n, dim, seed)
    keys = torch.randperm(n)
    expected = info_nce(image, text, scale)
    torch.testing.assert_close(multi_positive_info_nce(image, text, scale, keys), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        multi_positive_info_nce(image, text, scale, torch.eye(n)), expected, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        siglip(image, text, scale, -1.0, keys=keys), siglip(image, text, scale, -1.0), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("labels", [1, 2, 3, 7, 30, 60])
@pytest.mark.parametrize("tile", [7, None])
def test_few_labels_and_many_labels(plain, labels, tile):
    """From every pair positive to one positive a row: a list of pairs at one end, a mask at the other."""
    image, text = pairs(60, 9, labels)
    keys = torch.arange(60) % labels
    matrix = positives_from_keys(keys).double()

    def run(loss):
        inputs = [x.clone().requires_grad_() for x in (image, text, torch.tensor(12.0).double())]
        value = loss(*inputs)
        value.backward()
        return [value.detach(), *(x.grad for x in inputs)]

    expected = run(lambda i, t, s: plain.soft(i, t, s, matrix))
    for targets in (keys, matrix, 3 * matrix):
        found = run(lambda i, t, s, targets=targets: multi_positive_info_nce(i, t, s, targets, tile=tile))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@laws
@given(sizes, dims, scales, seeds, st.floats(0.01, 50))
def test_weights_of_targets_are_relative(n, dim, scale, seed, factor):
    image, text = pairs(n, dim, seed)
    targets = torch.rand(n, n, dtype=torch.float64) + 0.01
    torch.testing.assert_close(
        multi_positive_info_nce(image, text, scale, factor * targets),
        multi_positive_info_nce(image, text, scale, targets),
        rtol=1e-9,
        atol=1e-12,
    )


@laws
@given(sizes, dims, scales, seeds, st.integers(1, 6))
def test_entropy_of_the_targets_is_the_floor(n, dim, scale, seed, groups):
    image, text = pairs(n, dim, seed)
    keys = some_keys(n, seed, groups)
    floor = positives_from_keys(keys).sum(1).log().mean().item()
    assert multi_positive_info_nce(image, text, scale, keys).item() >= floor - 1e-6
    assert info_nce(image, text, scale).item() >= 0
    assert siglip(image, text, scale, -1.0).item() >= 0


@laws
@given(st.integers(1, 60), scales)
def test_features_without_information_cost_log_n(n, scale):
    same = torch.ones(n, 1, dtype=torch.float64)
    assert info_nce(same, same, scale).item() == pytest.approx(math.log(n), abs=1e-9)
    assert multi_positive_info_nce(same, same, scale, torch.arange(n)).item() == pytest.approx(math.log(n), abs=1e-9)


def test_sharper_scale_lowers_the_loss_of_right_pairs_and_raises_that_of_wrong_ones():
    image = torch.eye(8)
    right = [info_nce(image, image, s).item() for s in (1.0, 10.0, 100.0)]
    wrong = [info_nce(image, image.roll(1, 0), s).item() for s in (1.0, 10.0, 100.0)]
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)


@pytest.mark.parametrize("tile", [3, None, "auto"])
def test_gradcheck(tile):
    image, text = (x.requires_grad_() for x in pairs(7, 5, 3))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    keys = torch.tensor([0, 1, 0, 2, 2, 2, 3])
    dense = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense[dense < 0.5] = 0
    dense += torch.eye(7)
    everyone = Gathered(*pairs(11, 5, 4), offset=2)

    def gathered(i, t):
        around = Gathered(
            torch.cat([everyone.image[:2], i, everyone.image[9:]]),
            torch.cat([everyone.text[:2], t, everyone.text[9:]]),
            offset=2,
            keys=torch.cat([torch.tensor([0, 9]), keys, torch.tensor([2, 8])]),
        )
        return (
            info_nce(i, t, scale, gathered=around, tile=tile),
            multi_positive_info_nce(i, t, scale, keys, gathered=around, tile=tile),
            siglip(i, t, scale, bias, gathered=around, tile=tile),
        )

    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, tile=tile), (image, text, scale))
    for target in (keys, dense):
        assert torch.autograd.gradcheck(
            lambda i, t, s, target=target: multi_positive_info_nce(i, t, s, target, tile=tile), (image, text, scale)
        )
    for k in (None, keys):
        assert torch.autograd.gradcheck(
            lambda i, t, s, b, k=k: siglip(i, t, s, b, keys=k, tile=tile), (image, text, scale, bias)
        )
    assert torch.autograd.gradcheck(gathered, (image, text))


@laws
@given(st.integers(1, 8), st.integers(1, 4), dims, scales, seeds)
def test_mean_over_processes_is_the_loss_of_the_whole_batch(local, processes, dim, scale, seed):
    """Rows local, columns gathered with gradient: losses and gradients add up to those of one process."""
    n = local * processes
    keys = some_keys(n, seed, 5)
    whole = [x.requires_grad_() for x in pairs(n, dim, seed)]
    split = [x.detach().clone().requires_grad_() for x in whole]

    def one(i, t):
        return torch.stack([
            info_nce(i, t, scale),
            multi_positive_info_nce(i, t, scale, keys),
            siglip(i, t, scale, -1.0),
            siglip(i, t, scale, -1.0, keys=keys),
        ])  # fmt: skip

    def many(i, t):
        losses = []
        for rank in range(processes):
            mine = slice(rank * local, (rank + 1) * local)
            all_of_them = Gathered(i, t, offset=mine.start, keys=keys)
            a, b = i[mine], t[mine]
            losses.append(torch.stack([
                info_nce(a, b, scale, gathered=all_of_them, tile=3),
                multi_positive_info_nce(a, b, scale, keys[mine], gathered=all_of_them, tile=3),
                siglip(a, b, scale, -1.0, gathered=all_of_them, tile=3),
                siglip(a, b, scale, -1.0, keys=keys[mine], gathered=all_of_them, tile=3),
            ]))  # fmt: skip
        return torch.stack(losses).mean(0)

    expected, found = one(*whole), many(*split)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    expected.sum().backward()
    found.sum().backward()
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tile", [16, None])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_locked_sides_get_no_gradient_and_change_nothing(wanted, tile):
    image, text = pairs(40, 6, 0, torch.float32)
    keys = some_keys(40, 0, 9)
    full = [x.clone().requires_grad_() for x in (image, text, torch.tensor(9.0))]
    part = [x.clone().requires_grad_(w) for x, w in zip((image, text, torch.tensor(9.0)), wanted, strict=True)]
    every_loss(*full, keys, tile=tile).sum().backward()
    every_loss(*part, keys, tile=tile).sum().backward()
    for a, b, w in zip(part, full, wanted, strict=True):
        if w:
            torch.testing.assert_close(a.grad, b.grad)
        else:
            assert a.grad is None


def test_without_gradients():
    image, text = pairs(30, 6, 0, torch.float32)
    keys = some_keys(30, 0, 9)
    expected = every_loss(image.clone().requires_grad_(), text, 10.0, keys)
    with torch.no_grad():
        quiet = every_loss(image.clone().requires_grad_(), text, 10.0, keys)
    with torch.inference_mode():
        inference = every_loss(image, text, 10.0, keys)
    assert not quiet.requires_grad
    assert torch.equal(quiet, expected.detach())
    assert torch.equal(inference, expected.detach())


def test_backward_twice_and_weighted():
    image, text = (x.requires_grad_() for x in pairs(20, 6, 0, torch.float32))
    loss = every_loss(image, text, 10.0, some_keys(20, 0, 5)).sum()
    loss.backward(retain_graph=True)
    once = image.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(image.grad, 4 * once)


def test_autocast_does_not_reach_the_loss():
    image, text = pairs(64, 32, 0, torch.float32)
    keys = some_keys(64, 0, 20)

    def run(autocast):
        inputs = [x.clone().requires_grad_() for x in (image, text)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = every_loss(*inputs, 60.0, keys, tile=20)
            losses.sum().backward()
        return [losses.detach(), *(x.grad for x in inputs)]

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_half_precision_features_are_cast_first():
    image, text = pairs(32, 16, 0, torch.bfloat16)
    image.requires_grad_()
    loss = info_nce(image, text, torch.tensor(50.0, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, info_nce(image.float(), text.float(), 50.0))
    loss.backward()
    assert image.grad.dtype == torch.bfloat16


def test_same_bits_every_time():
    image, text = pairs(300, 16, 0, torch.float32)
    keys = some_keys(300, 0, 40)

    def run():
        inputs = [x.clone().requires_grad_() for x in (image, text)]
        every_loss(*inputs, 60.0, keys, tile=64).sum().backward()
        return torch.cat([x.grad for x in inputs])

    assert torch.equal(run(), run())


def test_clamp_of_the_logit_scale():
    parameter = torch.nn.Parameter(torch.tensor(9.0))
    clamp_logit_scale(parameter)
    assert parameter.item() == pytest.approx(LOG_100)
    assert parameter.exp().item() <= 100.001
    parameter.data.fill_(-1.0)
    clamp_logit_scale(parameter)
    assert parameter.item() == 0.0
    parameter.data.fill_(2.5)
    clamp_logit_scale(parameter)
    assert parameter.item() == 2.5
    assert parameter.requires_grad


def test_keys_of_captions_and_studies():
    keys = positive_keys(["Clear lungs.", "clear  lungs. ", "Effusion.", 7, 7, "7"])
    assert keys.dtype == torch.int64
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys.tolist())) == 4
    # Hashes agree between processes, so the number itself is part of the contract.
    assert positive_keys(["Effusion."]).item() == keys[2].item()
    assert positives_from_keys(keys).sum().item() == 4 + 1 + 4 + 1
    assert positives_from_keys([1, 2], [2, 2, 3]).tolist() == [[0, 0, 0], [1, 1, 0]]


def test_two_texts_of_one_study_attract_its_images_instead_of_repelling_them():
    image, text = torch.eye(8)[:4].requires_grad_(), torch.eye(8)[4:]
    keys = torch.tensor([0, 0, 1, 2])
    (single,) = torch.autograd.grad(info_nce(image, text, 10.0), image)
    (several,) = torch.autograd.grad(multi_positive_info_nce(image, text, 10.0, keys), image)
    towards_the_other_text = text[1]
    assert (single[0] @ towards_the_other_text).item() > 0
    assert (several[0] @ towards_the_other_text).item() < 0
    assert (several[2] @ towards_the_other_text).item() > 0
