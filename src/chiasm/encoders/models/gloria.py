"""GLoRIA with ResNet-50.

References: marshuang80/gloria ``gloria/gloria.py``, ``gloria/models/gloria_model.py`` and ``configs/``; Huang et al.
2021, "GLoRIA: A multimodal global-local representation learning framework for label-efficient medical image recognition".
The released ResNet-18 is not offered: its own code cannot build it.
"""

from __future__ import annotations

from chiasm.encoders.base import EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.entry import CatalogEntry, WeightSource
from chiasm.types import Preprocess

#: A file of more than one channel is read as grey; OpenCV and Pillow weigh colours alike, up to rounding.
PREPROCESS = Preprocess(
    resize="longest_pad",
    resize_size=256,
    side_rounding="shorter_down",
    interpolation="area",
    grey=True,
    crop_rounding="even",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
ENTRIES = (
    CatalogEntry(
        name="gloria",
        config=EncoderConfig(
            image=ImageTowerConfig(kind="named", source="gloria"),
            text=TextTowerConfig(kind="named", source="gloria", context_length=97),
            projection=ProjectionConfig(dim=768, image="none", text="none"),
            tokenizer={
                "kind": "huggingface",
                "source": "emilyalsentzer/Bio_ClinicalBERT",
                "context_length": 97,
                "clean": "report",
            },
            preprocess=PREPROCESS,
            scale="none",
        ),
        aliases=("gloria-resnet50",),
        layout="gloria",
        weights=WeightSource(
            "marshuang80/gloria README.md and gloria/gloria.py",
            ask="the authors' folder https://stanfordmedicine.box.com/s/j5h7q99f3pfi7enc0dom73m4nsm6yzvh, "
            "file `chexpert_resnet50.ckpt`",
        ),
    ),
)
