"""What weights are these? A name or a path to checks: container, number types, key layout, family, what does not fit.

In: whatever ``chiasm.load`` takes. Out: checks that are made before the model is built, so that they also answer where
it cannot be. Keys and shapes cannot tell everything: of the models of the catalog all that fit are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chiasm import fetch
from chiasm.checkpoints import huggingface, native, open_clip, openai
from chiasm.checkpoints.containers import read_state_dict, sniff
from chiasm.checkpoints.layouts import LAYOUTS, read_parts
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG, CatalogEntry
from chiasm.errors import CheckpointError, ChiasmError
from chiasm.evaluate.doctor import Check

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 6
CONTAINERS = {
    "safetensors": "safetensors",
    "torch": "PyTorch's zip archive",
    "torch_legacy": "PyTorch's older stream of pickles",
    "torchscript": "TorchScript archive (its code is never run)",
    "zipped": "zip archive around one weight file",
}


@dataclass(frozen=True)
class Fit:
    """How tensors fit a model.

    Attributes:
        missing: Names that the model has and the file lacks.
        unexpected: Names that the file has besides.
        shapes: Names whose shapes differ.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether every tensor has its place."""
        return not (self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = []
        for what, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.shapes),
        ):
            if names:
                more = " …" if len(names) > SHOWN else ""
                parts.append(f"{len(names)} {what}: {', '.join(f'`{n}`' for n in names[:SHOWN])}{more}")
        return "; ".join(parts) or "every tensor has its place"


def check_weights(model: str | Path, *, family: str | None = None, pretrained: str | Path | None = None) -> list[Check]:
    """Return the checks of weights before they become a model.

    Args:
        model: See :func:`chiasm.load`.
        family: Whose weights a file is said to hold.
        pretrained: See :func:`chiasm.load`.

    Raises:
        CheckpointError: Absent, damaged or foreign; the message says what to do.
    """
    path, entry = _locate(model, family, pretrained)
    files = [] if path is None else weight_files(path)
    if path is None or not files:  # let the loader say what it expects
        return []
    tensors = _tensors(path, files, entry)
    kinds = sorted({CONTAINERS[sniff(f)] for f in files})
    numbers = sum(t.numel() for t in tensors.values())
    checks = [
        Check(
            "container",
            "ok",
            f"{' and '.join(kinds)}" + (f" in {len(files)} files" if len(files) > 1 else "")
            + f": {len(tensors)} tensors, {numbers:,} numbers; nothing in it was run",
        ),
        _check_types(tensors),
        _check_finite(tensors),
    ]  # fmt: skip
    return [*checks, *_check_family(path, files, entry, family, tensors)]


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of a folder, or the file itself."""
    if path.is_file():
        return [path]
    suffixes = tuple(s for s in fetch.WEIGHT_SUFFIXES if s != ".zip")
    return sorted(p for p in path.glob("*") if p.is_file() and p.suffix in suffixes and "args" not in p.stem)


def _locate(
    model: str | Path, family: str | None, pretrained: str | Path | None
) -> tuple[Path | None, CatalogEntry | None]:
    named = CATALOG.find(family) if family is not None and family not in openai.FAMILIES else None
    entry = CATALOG.find(model) if isinstance(model, str) else None
    if entry is not None:
        given = pretrained not in (None, "openai")
        return (_existing(str(pretrained)) if given else fetch.obtain(entry)), entry
    if fetch.is_address(model):
        meant = fetch.parse_address(str(model))
        if isinstance(meant, CatalogEntry):
            return fetch.obtain(meant), meant
        entry = named or fetch.entry_of(meant)
        return fetch.obtain_address(meant, entry=entry), entry
    return _existing(pretrained if pretrained is not None else model), named


def _existing(path: str | Path) -> Path | None:
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (RuntimeError, OSError, ValueError):
        return None


def _tensors(path: Path, files: list[Path], entry: CatalogEntry | None) -> dict[str, Tensor]:
    if path.is_file():
        return dict(read_state_dict(path).tensors)
    if entry is not None and not native.is_model_dir(path) and LAYOUTS[entry.layout] is not openai.LAYOUT:
        return read_parts(path, LAYOUTS[entry.layout])
    for names in (open_clip.WEIGHT_FILES, huggingface.WEIGHT_FILES):
        if any((path / n).exists() or (path / f"{n}.index.json").exists() for n in names):
            return dict(huggingface.read_weights(path, names))
    return dict(read_state_dict(files[0]).tensors)


def _check_types(tensors: Mapping[str, Tensor]) -> Check:
    types = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    detail = ", ".join(f"{n} {kind}" for kind, n in types.most_common())
    half = types["float16"] + types["bfloat16"]
    return Check("number types", "ok", detail + ("; half precision becomes float32 on loading" if half else ""))


def _check_finite(tensors: Mapping[str, Tensor]) -> Check:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        return Check("weights", "wrong", f"NaN or infinity in {len(bad)} tensors: `{bad[0]}`",
                     "these weights are damaged; fetch or train them again")  # fmt: skip
    still = [n for n, t in tensors.items() if t.ndim >= 2 and t.numel() > 1 and not bool(t.any())]
    if still:
        return Check("weights", "note", f"{len(still)} matrices are all zero: `{still[0]}`", "did these ever train?")
    return Check("weights", "ok", "all finite, no matrix of zeros")


def _check_family(
    path: Path, files: list[Path], entry: CatalogEntry | None, family: str | None, tensors: Mapping[str, Tensor]
) -> list[Check]:
    if native.is_model_dir(path if path.is_dir() else path.parent):
        return [Check("family", "ok", f"stated by `{native.DESCRIPTION_FILE}`: chiasm's own folder")]
    layouts = [layout.name for layout in LAYOUTS.values() if layout.matches(tensors)]
    if huggingface.is_huggingface_layout(tensors) and not layouts:
        layouts = ["transformers' CLIPModel"]
    checks = []
    if layouts:
        checks.append(Check("key layout", "ok", " or ".join(layouts)))
    else:
        names = ", ".join(f"`{n}`" for n in list(tensors)[:3])
        checks.append(Check("key layout", "note", f"none that chiasm has a name for; it begins with {names}"))
    others = fitting_entries(tensors)
    if entry is not None:
        fit = fit_of(entry, tensors)
        if fit is not None and not fit.is_exact:
            return [*checks, Check("keys", "wrong", f"not those of `{entry.name}`: {fit}", _instead(others))]
        if fit is not None:
            checks.append(Check("keys", "ok", f"exactly those of `{entry.name}`"))
        same = [n for n in others if n != entry.name]
        told = "by its name" if family is None else "by `--family`"
        detail = f"`{entry.name}`, {told}" + (f"; keys would also fit {_listed(same)}" if same else "")
        return [*checks, Check("family", "ok", detail)]
    return [*checks, _check_untold(path, files, family, others)]


def _check_untold(path: Path, files: list[Path], family: str | None, others: list[str]) -> Check:
    """Who says what keys cannot: the activation, the preprocessing, the protocol."""
    for file in (open_clip.CONFIG_FILE, "config.json"):
        if path.is_dir() and (path / file).is_file():
            return Check("family", "ok", f"stated by `{file}` in the folder")
    if family is not None:
        return Check("family", "ok", f"`{family}`, by `--family`: activation {openai.FAMILIES[family]}, OpenAI's "
                     "preprocessing is assumed" + (f"; keys would also fit {_listed(others)}" if others else ""))  # fmt: skip
    if sniff(files[0]) == "torchscript":
        return Check("family", "ok", "OpenAI, who alone publishes CLIP as TorchScript")
    hint = "add `--family` with one of them, or `openai` (QuickGELU) or `open_clip` (GELU) for any other CLIP"
    detail = f"keys and shapes fit {_listed(others)}" if others else "keys fit no model of the catalog"
    return Check("family", "wrong", f"{detail}; they tell neither the activation nor the preprocessing", hint)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _instead(others: list[str]) -> str:
    return f"they are those of {_listed(others)}" if others else "was another file meant?"


def fitting_entries(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the models of the catalog with native towers whose names and shapes these tensors have."""
    found = []
    seen = {tuple(t.shape) for t in tensors.values()}
    for entry in CATALOG.entries():
        image = entry.config.image
        patches = (image.width, 3, image.patch_size, image.patch_size)
        if entry.config.is_native and (image.kind != "vit" or not entry.config.has_image or patches in seen):
            fit = fit_of(entry, tensors)
            if fit is not None and fit.is_exact:
                found.append(entry.name)
    return found


def fit_of(entry: CatalogEntry, tensors: Mapping[str, Tensor]) -> Fit | None:
    """Return how tensors fit a model of the catalog; None where its key layout is not theirs or cannot be told."""
    layout = LAYOUTS.get(entry.layout)
    found: Mapping[str, Tensor] = tensors
    if layout is openai.LAYOUT and huggingface.is_huggingface_layout(tensors):
        try:
            found = huggingface.to_openai(tensors)
        except CheckpointError:
            return None
    if layout is None or not layout.matches(found) or layout.infer is not None:
        return None
    try:
        converted = layout.convert(found, entry.config.to_dict())
        device = "meta" if entry.config.is_native else "cpu"
        model = build_encoder_model(entry.config, seed=0, device=device, draw=False)  # type: ignore[arg-type]
    except (ChiasmError, RuntimeError):
        return None
    expected = model.state_dict()
    shapes = (k for k in expected if k in converted and converted[k].shape != expected[k].shape)
    return Fit(
        tuple(sorted(set(expected) - set(converted))), tuple(sorted(set(converted) - set(expected))), tuple(shapes)
    )
