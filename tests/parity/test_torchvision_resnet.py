"""Our torchvision-layout ResNet against torchvision's own, all parameters and statistics drawn at random."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.encoders.classic_resnet import ClassicResNet

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("default"),  # the peers warn about their own dependencies
]
pytest.importorskip("torchvision", reason="needs the environment made by `make peers`")


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw everything, batch statistics and one-dimensional parameters too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if "running_var" in name or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / tensor[0].numel()) ** 0.5)
    return model.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().clamp(min=float(theirs.pow(2).mean().sqrt()))
    return float(((ours - theirs).abs() / scale).max())


@pytest.mark.parametrize("block", ["Bottleneck", "BasicBlock"])
def test_equal_to_torchvision(block: str) -> None:
    from torchvision.models import resnet

    theirs = randomised(resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1]))
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    ours = ClassicResNet((1, 2, 1, 1), block={"Bottleneck": "bottleneck", "BasicBlock": "basic"}[block]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert error(ours(pixels), theirs(pixels)) <= 1e-5
        wrong = ours.feature_maps(pixels)[-1].amax((2, 3))
        assert error(wrong, theirs(pixels)) > 1e-2
        ours.bn1.running_mean.zero_()
        assert error(ours(pixels), theirs(pixels)) > 1e-3
