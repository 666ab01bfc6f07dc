"""What CLIP-IT's heads cost beside the backbone: weights and operations, counted, and compared with the formula.

In: a classifier. Out: :class:`Cost`. Operations are counted while the model runs, by torch's
``torch.utils.flop_counter`` (two per multiply-add of matrix products and convolutions; attention written out as
products; norms, activations and biases are left out, as is usual).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.classifier import VisionClassifier
from chiasm.encoders.base import ImageTowerConfig, TextTowerConfig
from chiasm.encoders.heads import HeadsConfig, extra_multiplications, extra_parameters
from chiasm.errors import InputError

COUNTED_BY = "torch.utils.flop_counter, two per multiply-add, attention written out as products"


@dataclass(frozen=True)
class Cost:
    """Weights and operations of a classifier and of its parts.

    Attributes:
        backbone_parameters: Of the tower, adapters merged.
        unimodal_parameters: Tower and ``h_v``: what a classifier without CLIP-IT has.
        parameters: Of the classifier as trained.
        exported_parameters: Of the classifier as exported, folded.
        formula_parameters: What the specification says that the heads add (2.7).
        unimodal_flops: Per image.
        flops: Per image, as trained.
        exported_flops: Per image, as exported.
        formula_flops: Two per multiply-add that the specification says the heads add.
        counted_by: How operations were counted.
    """

    backbone_parameters: int
    unimodal_parameters: int
    parameters: int
    exported_parameters: int
    formula_parameters: int
    unimodal_flops: int
    flops: int
    exported_flops: int
    formula_flops: int
    counted_by: str = COUNTED_BY

    @property
    def agrees(self) -> bool:
        """Whether what was counted is the unimodal classifier plus the formula, to the last weight and operation."""
        return (
            self.parameters - self.unimodal_parameters == self.formula_parameters
            and self.flops - self.unimodal_flops == self.formula_flops
        )

    @property
    def overhead(self) -> float:
        """Weights that the exported heads add, as a fraction of the unimodal classifier."""
        return (self.exported_parameters - self.unimodal_parameters) / self.unimodal_parameters

    @property
    def overhead_trained(self) -> float:
        """The same before folding: the formula over the unimodal classifier."""
        return self.formula_parameters / self.unimodal_parameters

    @property
    def overhead_flops(self) -> float:
        """Operations that the exported heads add, as a fraction of the unimodal classifier's."""
        return (self.exported_flops - self.unimodal_flops) / self.unimodal_flops

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with the derived fractions."""
        return {
            **asdict(self),
            "agrees": self.agrees,
            "overhead": self.overhead,
            "overhead_trained": self.overhead_trained,
            "overhead_flops": self.overhead_flops,
        }


def measure_cost(trained: VisionClassifier, exported: VisionClassifier) -> Cost:
    """Count weights and operations.

    Args:
        trained: With unfolded heads and merged adapters.
        exported: The same, folded or not.
    """
    config: HeadsConfig = trained.heads.config  # type: ignore[assignment]
    example = example_input(trained, 1)
    backbone = _parameters(trained.tower) if trained.tower is not None else 0
    vision: nn.Module = trained.heads.vision
    features = torch.zeros(1, config.width, device=trained.device)
    tower_flops = 0 if trained.tower is None else count_flops(trained.tower, example)
    return Cost(
        backbone_parameters=backbone,
        unimodal_parameters=backbone + _parameters(vision),
        parameters=backbone + _parameters(trained.heads),
        exported_parameters=_parameters(exported),
        formula_parameters=extra_parameters(config),
        unimodal_flops=tower_flops + count_flops(vision, features),
        flops=count_flops(trained, example),
        exported_flops=tower_flops + count_flops(exported.heads, features),
        formula_flops=2 * extra_multiplications(config),
    )


def count_flops(module: nn.Module, inputs: Tensor) -> int:
    """Return the operations of one forward pass in eval mode."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    was_training = module.training
    module.eval()
    try:
        # The fused attention of a CPU is unknown to torch's counter, which would count it as nothing.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(inputs)
    finally:
        module.train(was_training)
    return int(counter.get_total_flops())


def transformer_flops(config: ImageTowerConfig | TextTowerConfig, dim: int, *, tokens: int | None = None) -> int:
    """Return the operations of one image or one text in a native transformer, by formula: two per multiply-add.

    The whole forward pass is counted, as model FLOP utilisation wants it, also where the last block may leave out rows
    that nobody reads. A linear layer of a gate (SwiGLU) has half of its inputs.

    Args:
        config: A native ViT with class-token or mean pooling, or CLIP's text tower.
        dim: Dimensions of the joint space.
        tokens: Of the text; None: its context. Of an image it follows from the declaration.

    Raises:
        InputError: Another kind of tower: :func:`count_flops` counts it while it runs.
    """
    image = isinstance(config, ImageTowerConfig)
    if config.kind not in ("vit", "clip") or (image and config.pool not in ("cls", "mean")):
        raise InputError(
            f"there is no formula for a `{config.kind}` tower pooled by `{config.pool}`",
            hint="`count_flops` counts the operations of any module",
        )
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    first = 0
    if isinstance(config, ImageTowerConfig):
        patches = (config.image_size // config.patch_size) ** 2
        first = patches * 3 * config.patch_size**2 * width
        tokens = patches + config.registers + (config.class_token is not False)
    elif tokens is None:
        tokens = config.context_length
    assert isinstance(config.layers, int)
    assert tokens is not None
    inner = hidden // 2 if config.activation == "swiglu" else hidden
    block = tokens * (4 * width**2 + width * (hidden + inner)) + 2 * tokens**2 * width
    return 2 * (first + config.layers * block + width * dim)


def example_input(classifier: VisionClassifier, batch: int, *, seed: int = 0) -> Tensor:
    """Return random input of the classifier's shape: pixels as after ``mean`` and ``std``, or features.

    The same numbers for the same seed in every process on a CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    if classifier.config is None:
        shape: tuple[int, ...] = (batch, classifier.heads.config.width)
    else:
        side = classifier.config.preprocess.size
        shape = (batch, 3, side, side)
    return torch.randn(shape, generator=generator).to(classifier.device)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
