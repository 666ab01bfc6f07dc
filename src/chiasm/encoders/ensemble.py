"""Several models with one face: their unit vectors stand side by side.

In: pixels and ids for all members alike. Out: (batch, members · dim), the members' unit vectors one behind the other,
divided by the square root of their number. So rows have unit norm and the cosine of two rows is the mean of the members'
cosines. Who needs every member's own cosine, as CheXzero's protocol does, cuts the vectors apart again
(``tasks.aggregation.split_members``).

Reference: Tiu et al. 2022, CheXzero, which averages ten checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.encoders.base import EncoderConfig
from chiasm.encoders.dual import DualEncoder
from chiasm.encoders.vit import PatchMode
from chiasm.errors import InputError

PREFIX = "members."


class EnsembleModel(DualEncoder):
    """Models of one configuration.

    Args:
        models: At least two.
        config: Theirs, with ``members``.

    Attributes:
        members: The models.
    """

    def __init__(self, models: Sequence[DualEncoder], config: EncoderConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.visual = self.text = None
        self.members = nn.ModuleList(models)

    @property
    def logit_scale(self) -> Tensor | None:  # type: ignore[override]
        """Logarithm of the mean of the members' multipliers; None where they have none.

        It is right for the mean cosine only as far as the members agree; the published protocols of ensembles do not
        use it.
        """
        scales = [m.logit_scale.exp() for m in self.models() if m.logit_scale is not None]
        return torch.stack(scales).mean().log() if scales else None

    @property
    def logit_bias(self) -> Tensor | None:  # type: ignore[override]
        """Mean of the members' biases; None where they have none."""
        biases: list[Tensor] = [m.logit_bias for m in self.models() if m.logit_bias is not None]
        return torch.stack(biases).mean() if biases else None

    @property
    def stored_config(self) -> EncoderConfig:
        """The declaration to save beside the weights; see :class:`DualEncoder`."""
        return dataclasses.replace(self.models()[0].stored_config, members=len(self.members))

    def encode_image(self, images: Tensor, normalize: bool = False, *, prior: Tensor | None = None) -> Tensor:
        """Return (batch, members · dim) of unit norm, whatever ``normalize`` says."""
        return side_by_side([m.encode_image(images, prior=prior) for m in self.models()])

    def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Return (batch, members · dim) of unit norm, whatever ``normalize`` says."""
        return side_by_side([m.encode_text(ids, lengths) for m in self.models()])

    def patch_features(self, images: Tensor, normalize: bool = True, mode: PatchMode = "auto") -> Tensor:
        """Return (batch, rows, columns, members · dim), each of unit norm, whatever ``normalize`` says."""
        return side_by_side([m.patch_features(images, mode=mode) for m in self.models()])

    def forward(self, images: Tensor, ids: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Refuse: an ensemble is not trained as one."""
        raise InputError("an ensemble cannot be trained", hint="train its members one by one")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`DualEncoder.set_grad_checkpointing`."""
        for member in self.models():
            member.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode of every member."""
        self.training = self.members.training = mode
        for member in self.models():
            member.train(mode)
        return self

    def image_side(self) -> nn.Module:
        """Refuse: there are several."""
        raise InputError("an ensemble has no single image tower", hint="load one of its members to look inside")

    def models(self) -> list[DualEncoder]:
        """Return the members."""
        return [m for m in self.members if isinstance(m, DualEncoder)]


def join_members(
    parts: Sequence[tuple[str, EncoderConfig, Mapping[str, Tensor]]],
) -> tuple[str, EncoderConfig, dict[str, Tensor]]:
    """Return name, configuration and tensors of an ensemble for those of its members.

    Raises:
        InputError: Fewer than two members, or members of different kinds.
    """
    if len(parts) < 2:
        raise InputError(f"an ensemble needs at least two models, got {len(parts)}")
    name, config, _ = parts[0]
    for other, found, _ in parts[1:]:
        if dataclasses.replace(found, tokenizer=config.tokenizer) != config:
            raise InputError(
                f"the models of an ensemble must be of one kind; `{other}` differs from `{name}`",
                hint="load them one by one, and compare what each of them says",
            )
    names = {part[0] for part in parts}
    joined = {
        f"{PREFIX}{i}.{key}": tensor for i, (_, _, tensors) in enumerate(parts) for key, tensor in tensors.items()
    }
    shared = name if len(names) == 1 else "ensemble"
    return f"{shared}-x{len(parts)}", dataclasses.replace(config, members=len(parts)), joined


def side_by_side(vectors: Sequence[Tensor]) -> Tensor:
    """Return the members' vectors, each (batch, dim), as one of unit norm: (batch, members · dim)."""
    return torch.cat([F.normalize(v, dim=-1) for v in vectors], dim=-1) / math.sqrt(len(vectors))
