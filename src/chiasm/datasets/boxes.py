"""Boxes beside a table: ``boxes.json`` says where findings lie in which image.

The form is ``{"images": {"images/1.png": [{"label": "nodule", "box": [x0, y0, x1, y1]}, ...]}}``, in pixels of the image
file; image names are those of the table. Phantoms are saved with such a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from chiasm.errors import FileFormatError
from chiasm.types import Box

BOXES_NAME = "boxes.json"


def read_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Return the boxes of each image, by its name in the table.

    Raises:
        FileFormatError: The file is not of the form above, or a box has no area.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {str(name): tuple(_box(entry) for entry in entries) for name, entries in images.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"`{path.name}` does not hold boxes of images", hint='write {"images": {name: [{"label", "box"}]}}'
        ) from error


def _box(entry: Mapping[str, object]) -> Box:
    corners = entry["box"]
    if not isinstance(corners, list):
        raise ValueError("box is no list")
    x0, y0, x1, y1 = (float(c) for c in corners)
    if not (x0 < x1 and y0 < y1):
        raise ValueError("box has no area")
    return Box(x0, y0, x1, y1, str(entry.get("label", "")))
