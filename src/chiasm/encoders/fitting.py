"""Whose weights could these be? The models of the catalog whose names and shape a file has.

In: tensors. Out: names, for a hint: a state dict never says whose it is (kaiko's and DINO's ViT-S/16 are alike), so
nothing is chosen from them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from chiasm.checkpoints import own_backbone
from chiasm.checkpoints.layouts import LAYOUTS
from chiasm.encoders.catalog import CATALOG
from chiasm.errors import CheckpointError

#: What tells one ViT from another.
_SHAPE = ("width", "layers", "patch_size", "registers", "layer_scale", "activation")


def fitting_models(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the catalog's models that have these tensors' names and, for a ViT, their shape.

    The generic names for a user's own backbone come last.
    """
    shape = None
    if own_backbone.VIT_LAYOUT.matches(tensors):
        try:
            shape = own_backbone.infer_vit(tensors, CATALOG.get("histo-vit").config.to_dict())["image"]
        except CheckpointError:
            return []
    own, names = [], []
    for entry in CATALOG.entries():
        layout = LAYOUTS.get(entry.layout)
        if layout is None or not layout.matches(tensors):
            continue
        if layout in (own_backbone.VIT_LAYOUT, own_backbone.RESNET_LAYOUT):
            own.append(entry.name)
        elif shape is None or all(getattr(entry.config.image, k) == shape[k] for k in _SHAPE):
            names.append(entry.name)
    return names + own


def fitting_hint(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what to type to say whose weights they are; None where no model of the catalog has such names."""
    names = fitting_models(tensors)
    if not names:
        return None
    shown = ", ".join(f"`{n}`" for n in names[:8])
    return f"say whose weights they are, which names and shapes cannot tell: `family=` one of {shown}"
