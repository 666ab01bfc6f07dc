"""The arms of the argument: what each control takes away, as a table.

Every arm shares data, splits, order of batches and number of steps with the others, so that a difference between two of
them has one cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["none", "pairs", "shuffled", "random", "prompts", "own", "label"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: As printed.
        fused: Whether there are heads beyond ``h_v``.
        targets: Where the text embeddings come from that ``h_d`` learns.
        lora: Whether the tower is adapted although the recipe locks it.
        warm_start: Whether ``h_t`` may start from the text stage.
        sentence: What it is, for readers who do not know the paper.
        standard: Part of every ``--controls``.
    """

    name: str
    fused: bool
    targets: TargetKind
    sentence: str
    lora: bool = False
    warm_start: bool = True
    standard: bool = True


_ALL = (
    Arm("unimodal", False, "none", "A linear classifier on the features of the locked backbone: images only."),
    Arm(
        "unimodal_lora", False, "none",
        "The same classifier, and the backbone adapted with low-rank updates for as many steps as CLIP-IT gets: "
        "images only.",
        lora=True,
    ),
    Arm(
        "lambda0", True, "none",
        "The heads of CLIP-IT without any text (λ = 0): what the additional layers and steps do by themselves.",
        warm_start=False,
    ),
    Arm("clip_it", True, "pairs", "Each training image learns to predict the embedding of the report paired with it."),
    Arm(
        "shuffled", True, "shuffled",
        "The same reports dealt out to the training images at random: text without meaning for the image.",
    ),
    Arm(
        "random_text", True, "random",
        "Pairs as they are, but each report's embedding replaced by a random vector: what the grouping of images by the "
        "retriever does without the language.",
    ),
    Arm(
        "prompt_text", True, "prompts",
        "Instead of reports one sentence a class, paired by the retriever without looking at labels.",
    ),
    Arm("paired", True, "own", "Each image's own report, where there is one: the upper bound of pairing."),
    Arm(
        "label_leak", True, "label",
        "The sentence of the image's true label: not label-free, shown for comparison only.",
        standard=False,
    ),
    Arm(
        "no_warm_start", True, "pairs", "CLIP-IT with a text head drawn at random.", warm_start=False, standard=False,
    ),
)  # fmt: skip
ARMS = {arm.name: arm for arm in _ALL}
STANDARD = tuple(arm.name for arm in _ALL if arm.standard)
