"""Guided images and CLIPScores to pages.

Comes in: what :func:`chiasm.train.guidance.optimise_pixels` made, or a :class:`~chiasm.tasks.clip_score.ClipScores`. Goes
out: a :class:`~chiasm.evaluate.page.Page`. No text of a table is on a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PilImage

import chiasm
from chiasm.evaluate.figures import ACCENT, COLOURS, SOFT, WARM, draw
from chiasm.evaluate.page import Figure, Gallery, KeyNumber, Note, Page, Picture, Section, Table, picture_source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure
    from PIL.Image import Image
    from torch import Tensor

    from chiasm.evaluate.run_card import RunCard
    from chiasm.tasks.clip_score import ClipScores
    from chiasm.train.guidance import GuidedImages

NO_EVIDENCE = (
    "This picture was made by raising a model's score. It is no medical evidence: it shows what the model rewards, which "
    "need not look like the finding. Never mix such pictures with those of patients."
)
RESEARCH = "Research and teaching only; not a medical device."
_WIDTH_PX = 220


def to_picture(pixels: Tensor) -> Image:
    """Return one image (3, height, width) in [0, 1] as an 8-bit picture."""
    values = pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return PilImage.fromarray(np.rint(values * 255).astype(np.uint8), "RGB")


def guidance_page(found: GuidedImages, texts: Sequence[str], against: Sequence[str], card: RunCard) -> Page:
    """Return the page of one guided image: frames, loss, and the cosines of what guided and what did not.

    Args:
        found: Of a batch, the first image is drawn.
        texts: What guided.
        against: What it was kept from.
        card: What it was made from.
    """
    frames = tuple(
        Picture(
            picture_source(_enlarged(pixels[0])),
            (f"step {step}", f"cosine {row[0]:.3f}"),
            alt=f"the image after {step} steps",
        )
        for (step, pixels), row in zip(found.frames, found.cosines, strict=True)
    )
    rows = tuple(
        (text, "guides" if k < len(texts) else "control", f"{found.cosines[0][k]:.3f}", f"{found.cosines[-1][k]:.3f}",
         f"{found.gain(text):+.3f}")
        for k, text in enumerate(found.followed)
    )  # fmt: skip
    table = Table(("text", "role", "cosine at the start", "at the end", "gain"), rows)
    controls = Note(
        "A control does not guide. Where its cosine rises as much as that of the text, the picture became more like a film "
        "in general, not like what the text says."
    )
    intro = "Against: " + "; ".join(against) + "." if against else "What the optimiser saw at some of its steps."
    return Page(
        title="A picture that a text guided",
        subtitle=NO_EVIDENCE,
        sections=(
            Section("Frames", intro, (Gallery((("; ".join(texts), frames),), "", 150), Note(NO_EVIDENCE, "warning"))),
            Section(
                "Does it follow its text?",
                "Cosines of the whole image, without cutouts.",
                (Figure(_loss_curve(found), "Loss at every step, of random cutouts, smoothed.", wide=False),
                 Figure(_cosine_lines(found, len(texts)), "Cosines; dashed: controls."), table, controls),
            ),
            card.section(),
        ),
        footer=(f"chiasm {chiasm.__version__}.", NO_EVIDENCE, RESEARCH),
    )  # fmt: skip


def score_page(scores: ClipScores, card: RunCard) -> Page:
    """Return the page of CLIPScores of a table."""
    keys = [
        KeyNumber("CLIPScore", scores.mean, "chance: texts of other patients"),
        KeyNumber("own text wins", scores.wins, "against a text of another patient"),
    ]
    if scores.reference_mean is not None:
        keys.append(KeyNumber("RefCLIPScore", scores.reference_mean))
    left_out = f"{scores.n_missing} rows have no partner and were left out." if scores.n_missing else ""
    return Page(
        title="Do images agree with their texts?",
        subtitle=f"{len(scores.ids):,} pairs. The score depends on the encoder and has no absolute scale: read its difference from "
        "exchanged texts, and compare sets under the same encoder only.",
        key_numbers=tuple(keys),
        sections=(
            Section(
                "Scores",
                "2.5 · max(cosine, 0) of every pair (Hessel et al. 2021). " + left_out,
                (
                    Table(("measure", "value [95 % interval]", "pairs", "chance"), tuple(scores.table())),
                    Figure(
                        _histogram(scores), "Scores of the pairs; the line is the mean with texts of other patients."
                    ),
                ),
            ),
            card.section(),
        ),
        footer=(f"chiasm {chiasm.__version__}.", RESEARCH),
    )


def _enlarged(pixels: Tensor) -> Image:
    picture = to_picture(pixels)
    height = max(1, round(picture.height * _WIDTH_PX / picture.width))
    return picture.resize((_WIDTH_PX, height), PilImage.Resampling.BICUBIC)


def _loss_curve(found: GuidedImages) -> str:
    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        losses = np.asarray(found.losses)
        axes.plot(np.arange(1, len(losses) + 1), losses, color=ACCENT, alpha=0.25, linewidth=1)
        width = max(1, len(losses) // 20)
        if len(losses) >= 5 and width > 1:
            smooth = np.convolve(
                np.pad(losses, (width // 2, width - 1 - width // 2), "edge"), np.ones(width) / width, "valid"
            )
            axes.plot(np.arange(1, len(smooth) + 1), smooth, color=ACCENT, linewidth=2)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")

    return draw(4.8, 3.0, paint)


def _cosine_lines(found: GuidedImages, guiding: int) -> str:
    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        steps = [step for step, _ in found.frames]
        for k, text in enumerate(found.followed):
            shown = text if len(text) <= 34 else text[:33] + "…"
            style = "-" if k < guiding else (0, (3, 2))
            values = [row[k] for row in found.cosines]
            axes.plot(steps, values, color=COLOURS[k % len(COLOURS)], linestyle=style, linewidth=2, label=shown)
        axes.set_xlabel("step")
        axes.set_ylabel("cosine")
        axes.legend(fontsize=7.5)

    return draw(4.8, 3.0, paint)


def _histogram(scores: ClipScores) -> str:
    def paint(figure: MatplotlibFigure) -> None:
        axes: Axes = figure.subplots()
        axes.hist(scores.scores, bins=min(40, max(8, len(scores.scores) // 8)), color=ACCENT, alpha=0.8)
        axes.axvline(scores.exchanged.value, color=WARM, linestyle=(0, (4, 2)), linewidth=1.8)
        axes.axvline(scores.mean.value, color=SOFT, linewidth=1.8)
        axes.set_xlabel("CLIPScore   (grey: mean; dashed: mean with exchanged texts)")
        axes.set_ylabel("pairs")

    return draw(6.2, 3.0, paint)
