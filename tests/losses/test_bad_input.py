"""What the losses refuse, and that the message says what was got."""

from __future__ import annotations

import pytest
import torch

from chiasm.errors import InputError
from chiasm.losses.contrastive import Gathered, info_nce, multi_positive_info_nce, positive_keys, siglip

GOOD = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1)


def with_value(value):
    bad = GOOD.clone()
    bad[1, 2] = value
    return bad


def losses():
    return [
        info_nce,
        lambda i, t, s: siglip(i, t, s, -10.0),
        lambda i, t, s: multi_positive_info_nce(i, t, s, torch.arange(len(i))),
    ]


@pytest.mark.parametrize("loss", losses())
@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (GOOD[:0], GOOD[:0], "batch is empty"),
        (GOOD[:, :0], GOOD[:, :0], "batch is empty"),
        (GOOD, GOOD[:3], r"\(4, 3\) and text features \(3, 3\)"),
        (GOOD, GOOD[:, :2], "same shape"),
        (GOOD[0], GOOD[0], "float matrix"),
        (GOOD.long(), GOOD.long(), "int64"),
        (with_value(torch.nan), GOOD, "NaN or infinite"),
        (GOOD, with_value(torch.inf), "NaN or infinite"),
    ],
)
def test_features(loss, image, text, message):
    with pytest.raises(InputError, match=message):
        loss(image, text, 10.0)


@pytest.mark.parametrize("loss", losses())
@pytest.mark.parametrize("scale", [torch.nan, torch.inf, torch.tensor([1.0, 2.0])])
def test_logit_scale(loss, scale):
    with pytest.raises(InputError, match="logit scale"):
        loss(GOOD, GOOD, scale)


def test_logit_bias():
    with pytest.raises(InputError, match="logit bias is not finite"):
        siglip(GOOD, GOOD, 10.0, torch.nan)


@pytest.mark.parametrize("tile", [0, -1, 2.5, "all", True])
def test_tile(tile):
    with pytest.raises(InputError, match="tile must be"):
        info_nce(GOOD, GOOD, 10.0, tile=tile)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.arange(3), "4 integers"),
        (torch.rand(4), "integers, got float32"),
        (torch.eye(3), r"got shape \(3, 3\)"),
        (torch.ones(4, 4, 4), "got shape"),
        (-torch.eye(4), "not negative"),
        (torch.eye(4) * torch.nan, "finite"),
        (torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])), "1 row"),
        (torch.tensor([[1.0, 0, 0, 0]] * 4), r"3 column\(s\)"),
    ],
)
def test_targets(targets, message):
    with pytest.raises(InputError, match=message):
        multi_positive_info_nce(GOOD, GOOD, 10.0, targets)


def test_gathered():
    everyone = Gathered(GOOD, GOOD, offset=3)
    few, keys = GOOD[:2], torch.arange(2)
    for loss in (
        lambda: info_nce(few, few, 10.0, gathered=everyone),
        lambda: siglip(few, few, 10.0, 0.0, gathered=everyone),
        lambda: multi_positive_info_nce(few, few, 10.0, keys, gathered=everyone),
    ):
        with pytest.raises(InputError, match="offset 3"):
            loss()
    with pytest.raises(InputError, match="keys are missing"):
        multi_positive_info_nce(few, few, 10.0, keys, gathered=Gathered(GOOD, GOOD))
    foreign = Gathered(GOOD, GOOD, keys=torch.arange(10, 14))
    with pytest.raises(InputError, match="no positive"):
        multi_positive_info_nce(few, few, 10.0, keys, gathered=foreign)


def test_keys_of_rows_without_a_caption_are_refused_without_showing_values():
    with pytest.raises(InputError, match="row 1 must be text or an integer, got NoneType"):
        positive_keys(["secret", None])
