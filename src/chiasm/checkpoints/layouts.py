"""The table of key layouts: how the names in a published weight file become the names of chiasm's model.

In: a file or folder and the name of a layout. Out: tensors under the model's names. A layout says how it is recognised,
which files hold it, and how it is converted to a stated configuration; it never decides whose weights they are, because
keys cannot tell that (OpenAI's B/32, CheXzero and QuiltNet share theirs): the catalog's entry does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from chiasm.checkpoints import (
    biovil,
    conch,
    convnext,
    gloria,
    huggingface_vit,
    medclip,
    open_clip_names,
    openai,
    own_backbone,
    resnet,
    swin,
    text_encoders,
    timm,
)
from chiasm.checkpoints.containers import read_state_dict
from chiasm.checkpoints.huggingface import read_weights
from chiasm.checkpoints.layout import Layout
from chiasm.errors import CheckpointError

_ALL = (
    openai.LAYOUT,
    timm.LAYOUT,
    timm.DINO_LAYOUT,
    biovil.LAYOUT,
    biovil.TEXT_LAYOUT,
    conch.LAYOUT,
    huggingface_vit.LAYOUT,
    resnet.LAYOUT,
    medclip.LAYOUT,
    gloria.LAYOUT,
    open_clip_names.LAYOUT,
    own_backbone.VIT_LAYOUT,
    own_backbone.RESNET_LAYOUT,
    swin.LAYOUT,
    convnext.LAYOUT,
    text_encoders.BERT_LAYOUT,
    text_encoders.MEGATRON_LAYOUT,
    text_encoders.T5_LAYOUT,
)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _ALL}


def find_layout(tensors: Mapping[str, Tensor]) -> Layout | None:
    """Return the layout whose names these are, or None."""
    return next((layout for layout in LAYOUTS.values() if layout.matches(tensors)), None)


@contextmanager
def refused_shapes(layout: Layout) -> Iterator[None]:
    """Turn what torch says of tensors of impossible shapes, while they are converted, into an error about the file.

    Raises:
        CheckpointError: In the place of torch's and Python's own errors.
    """
    try:
        yield
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the weights have tensors of shapes that the layout `{layout.name}` does not have"
        ) from error


def read_parts(path: str | Path, layout: Layout) -> dict[str, Tensor]:
    """Return all tensors of a model from a file, or from the files of a folder that the layout names.

    Raises:
        CheckpointError: A file is absent, damaged, or holds another layout.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    if path.is_file():
        if len(layout.parts) > 1:
            names = ", ".join(f"`{candidates[0]}`" for candidates in layout.parts.values())
            raise CheckpointError(
                f"`{path.name}` is one of {len(layout.parts)} parts of this model", hint=f"give the folder with {names}"
            )
        tensors = dict(read_state_dict(path).tensors)
    else:
        for prefix, candidates in layout.parts.items():
            tensors.update({f"{prefix}{k}": v for k, v in _read_first(path, candidates).items()})
    if not layout.matches(tensors):
        other = find_layout(tensors)
        what = f"their names are those of the layout `{other.name}`" if other else "chiasm does not know their names"
        raise CheckpointError(f"the weights in `{path.name}` are not in the layout `{layout.name}`: {what}")
    return tensors


def _read_first(folder: Path, candidates: Sequence[str]) -> Mapping[str, Tensor]:
    """The tensors of the first file of a folder that fits a pattern, or of the shards that an index of it lists."""
    for pattern in candidates:
        files = sorted(f for f in folder.glob(pattern) if f.is_file())
        if len(files) > 1:
            raise CheckpointError(
                f"folder `{folder.name}` holds {len(files)} weight files: `{files[0].name}`, `{files[1].name}` …",
                hint="give one of them, or a list of them for an ensemble",
            )
        if files:
            return read_state_dict(files[0]).tensors
        if (folder / f"{pattern}.index.json").is_file():
            return read_weights(folder, (pattern,))
    raise CheckpointError(f"folder `{folder.name}` lacks weights", hint=f"expected one of: {', '.join(candidates)}")
