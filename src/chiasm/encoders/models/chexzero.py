"""CheXzero: OpenAI's ViT-B/32, trained further on chest radiographs and their impressions.

References: rajpurkarlab/CheXzero ``zero_shot.py``, ``data_process.py``, ``model.py``; Tiu et al. 2022, "Expert-level
detection of pathologies from unannotated chest X-ray images via self-supervised learning". The ten files are plain state
dicts in OpenAI's key layout. ``logit_scale`` is in them, but the published protocol does not use it.
"""

from __future__ import annotations

from dataclasses import replace

from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.encoders.models.openai import ARCHITECTURES
from chiasm.types import Preprocess

#: The published pipeline stores 320 × 320 pixels as grey values of 0 to 255, normalises those, and resizes the tensor
#: without antialiasing (torchvision 0.11's default). It converts colour images to grey after the first resize, here it
#: is done before: grey files, as radiographs are, give the same numbers.
PREPROCESS = Preprocess(
    resize="longest_pad",
    resize_size=320,
    side_rounding="both_down",
    interpolation="lanczos",
    grey=True,
    second_resize="bicubic_tensor",
    mean=(101.48761 / 255,) * 3,
    std=(83.43944 / 255,) * 3,
)
ENTRIES = (
    CatalogEntry(
        name="chexzero",
        config=replace(ARCHITECTURES["ViT-B-32-quickgelu"], preprocess=PREPROCESS),
        layout="open_clip",
        weights=WeightSource(
            "rajpurkarlab/CheXzero README.md and notebooks",
            ask="the authors' Google Drive folder, linked from the README of rajpurkarlab/CheXzero; ten files "
            "`best_64_5e-05_original_22000_0.864.pt` and the like",
        ),
        parameters=151_277_313,
    ),
)
