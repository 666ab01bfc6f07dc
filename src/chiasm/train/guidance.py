"""CLIP as a guide: a differentiable loss of pixels for texts, and a small optimiser that follows it.

Comes in: an encoder, texts, pixels in [0, 1]. Goes out: a loss whose gradient says how the pixels must change to fit the
texts better. Anything that makes images can be steered by it: a diffusion pipeline calls it on its present estimate
(docs/how-to/guidance.md), :func:`optimise_pixels` on the pixels themselves.

Images made in this way are no medical evidence. They show what raises a model's score, which need not look like the
finding at all, and must never be taken for, or mixed with, pictures of patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from chiasm.data.tensor_transforms import fit_tensor
from chiasm.errors import InputError, TrainingError, UnknownName
from chiasm.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from chiasm.encoders.base import Encoder

Distance = Literal["cosine", "spherical"]


class Cut(NamedTuple):
    """A square of the image: its corner and side, in pixels; side 0 is the whole image, whatever its shape."""

    x_px: int
    y_px: int
    side_px: int


WHOLE = Cut(0, 0, 0)


class ClipGuidance:
    """A loss of pixels: how far they are from texts, seen through an encoder.

    The loss of an image is the weighted mean of ``1 - cosine`` over the texts and over cutouts, less the same for the
    texts against. Parameters of the encoder get no gradient, whatever the caller does with the loss. With one cutout, the
    whole image, it equals 1 - the encoder's own cosine: to rounding at the model's size, to about 0.01 where the image is
    resized, since Pillow rounds to 8 bits on the way (docs/lab-notes.md, 2026-11-21).

    Args:
        encoder: With both sides. It is used in eval mode and left as it is.
        texts: What the image shall fit; several pull together.
        against: What it shall not fit.
        weights: One positive number a text; equal by default.
        cutouts: How many squares are seen at each call; the first is always the whole image, so 1 is the whole alone.
            Random cutouts keep the optimiser from hiding its changes at one scale.
        smallest: Least side of a cutout, as a share of the shorter side.
        noise: Standard deviation of noise on the cutouts after the first, in grey values of [0, 1].
        distance: ``cosine``, or ``spherical``: 2·arcsin²(‖a - b‖ / 2), which pulls evenly at every angle.
        seed: Of cutouts and noise.

    Raises:
        InputError: No text, an empty one, weights that do not fit, or numbers out of range.

    References:
        Crowson et al. 2022, "VQGAN-CLIP", section 3, https://arxiv.org/abs/2204.08583: cutouts and the spherical
        distance. Deviations: no flips, which would exchange left and right; no colour jitter.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: str | Sequence[str],
        *,
        against: Sequence[str] = (),
        weights: Sequence[float] | None = None,
        cutouts: int = 16,
        smallest: float = 0.5,
        noise: float = 0.02,
        distance: Distance = "cosine",
        seed: int = 0,
    ) -> None:
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts)
        self.against = tuple(against)
        numbers = [1.0] * len(self.texts) if weights is None else [float(w) for w in weights]
        if not self.texts or not all(t.strip() for t in (*self.texts, *self.against)):
            raise InputError("guidance needs texts, got an empty one")
        if len(numbers) != len(self.texts) or not all(math.isfinite(w) and w > 0 for w in numbers):
            raise InputError(f"{len(self.texts)} texts need as many positive weights, got {len(numbers)}")
        if cutouts < 1 or not 0 < smallest <= 1 or noise < 0:
            raise InputError(
                f"cutouts must be at least 1, smallest in (0, 1], noise not negative; got {cutouts}, {smallest}, {noise}"
            )
        if distance not in ("cosine", "spherical"):
            raise UnknownName("distance", distance, ("cosine", "spherical"))
        self.encoder = encoder
        self.cutouts, self.smallest, self.noise, self.distance = cutouts, smallest, noise, distance
        self._shares = torch.tensor(numbers) / sum(numbers)
        unit = F.normalize(encoder.encode_text([*self.texts, *self.against]).float().clone(), dim=-1)
        self._positive, self._negative = unit[: len(self.texts)], unit[len(self.texts) :]
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, pixels: Tensor, *, cuts: Sequence[Cut] | None = None) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            pixels: (batch, 3, height, width) in [0, 1], on any device; gradients flow back to them.
            cuts: What to look at; by default drawn anew at each call.
        """
        return self.per_image(pixels, cuts=cuts).mean()

    def per_image(self, pixels: Tensor, *, cuts: Sequence[Cut] | None = None) -> Tensor:
        """Return the loss of each image, (batch,)."""
        chosen = self.draw(pixels.shape[-2], pixels.shape[-1]) if cuts is None else list(cuts)
        if not chosen:
            raise InputError("guidance needs at least one cutout")
        views = [self._view(pixels, cut, first=k == 0) for k, cut in enumerate(chosen)]
        vectors = self._embed(torch.cat(views))
        positive, negative, shares = (t.to(vectors) for t in (self._positive, self._negative, self._shares))
        loss: Tensor = (self._distances(vectors, positive) * shares).sum(1)
        if len(negative):
            loss = loss - self._distances(vectors, negative).mean(1)
        return loss.view(len(chosen), len(pixels)).mean(0)

    def cosines(self, pixels: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """Return the cosines of whole images with texts, without gradients: (batch, texts).

        Args:
            pixels: As for the loss.
            texts: By default those that guide.
        """
        with torch.no_grad():
            vectors = self._embed(self._view(pixels, WHOLE, first=True))
            if texts is None:
                own: Tensor = vectors @ self._positive.to(vectors).T
                return own
            unit = F.normalize(self.encoder.encode_text(list(texts)).float().clone(), dim=-1)
            found: Tensor = vectors @ unit.to(vectors).T
            return found

    def draw(self, height_px: int, width_px: int) -> list[Cut]:
        """Return the cutouts of one call: the whole image, then random squares."""
        short, found = min(height_px, width_px), [WHOLE]
        least = max(1, math.ceil(self.smallest * short))
        for _ in range(self.cutouts - 1):
            side = self._integer(least, short)
            found.append(Cut(self._integer(0, width_px - side), self._integer(0, height_px - side), side))
        return found

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self._generator))

    def _view(self, pixels: Tensor, cut: Cut, *, first: bool) -> Tensor:
        part = pixels
        if cut.side_px:
            part = pixels[:, :, cut.y_px : cut.y_px + cut.side_px, cut.x_px : cut.x_px + cut.side_px]
        if self.noise and not first:
            drawn = torch.randn(part.shape, generator=self._generator)
            part = part + self.noise * drawn.to(part)
        seen: Tensor = fit_tensor(part, self.encoder.preprocess_spec)
        return seen

    def _embed(self, inputs: Tensor) -> Tensor:
        """Return unit vectors; detached parameters, so that only the pixels get a gradient."""
        visual = self.encoder.model.image_side()
        was_training = visual.training
        visual.eval()
        try:
            fixed = {name: p.detach() for name, p in (*visual.named_parameters(), *visual.named_buffers())}
            dtype = next((p.dtype for p in fixed.values() if p.is_floating_point()), inputs.dtype)
            vectors: Tensor = functional_call(visual, fixed, (inputs.to(self.encoder.device, dtype),))
        finally:
            visual.train(was_training)
        exact = vectors if vectors.dtype == torch.float64 else vectors.float()
        return F.normalize(exact, dim=-1)

    def _distances(self, vectors: Tensor, texts: Tensor) -> Tensor:
        if self.distance == "cosine":
            return 1 - vectors @ texts.T
        chord = torch.linalg.vector_norm(vectors[:, None] - texts[None], dim=-1)
        angle: Tensor = (chord / 2).clamp(max=1 - 1e-7).arcsin()
        return 2 * angle.square()


def guidance_loss(encoder: Encoder, pixels: Tensor, texts: str | Sequence[str], **options: Any) -> Tensor:
    """Return the loss of pixels for texts: :class:`ClipGuidance` in one call; ``options`` are its arguments.

    Texts are embedded again at every call; keep a :class:`ClipGuidance` where the same texts guide many steps.
    """
    return ClipGuidance(encoder, texts, **options)(pixels)


@dataclass(frozen=True)
class GuidedImages:
    """What the optimiser made.

    Attributes:
        pixels: The last images, (batch, 3, height, width) in [0, 1].
        frames: (step, images) from the start to the end.
        losses: The loss at each step, before it.
        followed: Texts whose cosines were followed: those that guided, then the controls.
        cosines: (frames, followed): mean over the batch, at each frame.
    """

    pixels: Tensor
    frames: tuple[tuple[int, Tensor], ...]
    losses: tuple[float, ...]
    followed: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]

    def gain(self, text: str) -> float:
        """Return by how much the cosine with a followed text rose."""
        column = self.followed.index(text)
        return self.cosines[-1][column] - self.cosines[0][column]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without pixels."""
        return {
            "steps": len(self.losses),
            "losses": list(self.losses),
            "frames": [step for step, _ in self.frames],
            "followed": list(self.followed),
            "cosines": [list(row) for row in self.cosines],
            "gains": {text: self.gain(text) for text in self.followed},
        }


def optimise_pixels(
    guidance: ClipGuidance,
    start: Tensor,
    *,
    steps: int = 150,
    lr: float = 0.02,
    total_variation: float = 0.5,
    stay: float = 0.0,
    grey: bool = False,
    controls: Sequence[str] = (),
    frames: int = 8,
    progress: Progress | None = None,
) -> GuidedImages:
    """Change pixels by Adam until they fit the guidance's texts.

    Args:
        guidance: The loss.
        start: (batch, 3, height, width) in [0, 1]: noise, a grey field, or an image.
        steps: Of Adam.
        lr: Step of Adam, in grey values of [0, 1].
        total_variation: Weight of the mean absolute difference of neighbouring pixels; smooths.
        stay: Weight of the mean squared difference from the start; keeps an image recognisable.
        grey: Whether the three channels stay equal, as in a chest film.
        controls: Texts that do not guide, whose cosines are followed.
        frames: How many images are kept besides the first.
        progress: Told after every step.

    Raises:
        InputError: Numbers out of range or a start that is no batch of images in [0, 1].
        TrainingError: The loss is no number.
    """
    if steps < 1 or not 0 < lr < math.inf or total_variation < 0 or stay < 0 or frames < 1:
        raise InputError("steps and frames must be at least 1, lr positive, total_variation and stay not negative")
    if start.ndim != 4 or start.shape[1] != 3 or not bool(((start >= 0) & (start <= 1)).all()):
        raise InputError(f"the start must be (batch, 3, height, width) in [0, 1], got shape {tuple(start.shape)}")
    first = start.detach().clone()
    pixels = first.mean(1, keepdim=True) if grey else first.clone()
    pixels.requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=lr)
    followed = (*guidance.texts, *controls)
    kept = {round(steps * (k + 1) / frames) for k in range(frames)} | {steps}
    shots = [(0, _colour(pixels))]
    cosines = [_row(guidance, shots[0][1], followed)]
    losses: list[float] = []
    progress = progress or SilentProgress()
    progress.start(steps, "following the guide")
    try:
        for step in range(1, steps + 1):
            image = pixels.expand(-1, 3, -1, -1)
            loss = guidance(image) + total_variation * variation_of(image) + stay * (image - first).square().mean()
            if not bool(torch.isfinite(loss)):
                raise TrainingError(f"the loss of step {step} is no number", hint="a smaller --lr")
            optimiser.zero_grad()
            (pixels.grad,) = torch.autograd.grad(loss, [pixels])
            optimiser.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
            losses.append(float(loss.detach()))
            progress.advance(loss=losses[-1])
            if step in kept:
                shots.append((step, _colour(pixels)))
                cosines.append(_row(guidance, shots[-1][1], followed))
    finally:
        progress.finish()
    return GuidedImages(shots[-1][1], tuple(shots), tuple(losses), followed, tuple(cosines))


def variation_of(pixels: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, a scalar (Rudin et al. 1992, anisotropic)."""
    return pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()


def _colour(pixels: Tensor) -> Tensor:
    return pixels.detach().expand(-1, 3, -1, -1).clone()


def _row(guidance: ClipGuidance, pixels: Tensor, texts: Sequence[str]) -> tuple[float, ...]:
    return tuple(guidance.cosines(pixels, texts).mean(0).tolist())
