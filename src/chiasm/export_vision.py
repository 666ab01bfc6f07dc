"""A trained CLIP-IT classifier to a folder that needs no text, with the proof beside it.

In: a run of ``chiasm distill``. Out: a folder with the classifier in torch's form (adapters merged, heads folded), as
ONNX, and ``PROOF.json``: what it costs beside the formula, how far its logits are from the training model's, and what
happened when it was loaded where no text package can be imported. The folder is written beside its place, checked, and
only then moved there.
"""

from __future__ import annotations

import inspect
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chiasm.checkpoints import native
from chiasm.classifier import VisionClassifier, load_classifier, save_classifier
from chiasm.deploy.cost import Cost, example_input, measure_cost
from chiasm.deploy.onnx import MODEL_FILE, load_onnx, require_exporter, write_onnx
from chiasm.deploy.text_free import Form, TextFree, prove_text_free
from chiasm.encoders.adapters import has_lora, merge_lora
from chiasm.encoders.fold import FoldedHeads, fold_heads
from chiasm.encoders.heads import DistilledHeads
from chiasm.errors import CheckpointError, InputError
from chiasm.io.manifest import to_json

PROOF_FILE = "PROOF.json"
READ_ME = "README.txt"
#: Largest difference of a logit, as a fraction of the largest logit where that is above 1.
TOLERANCE = 1e-5
#: From here on it is no rounding but another model.
BROKEN = 1e-3
PROBES = 8
SEED = 20250416


@dataclass(frozen=True)
class VisionExport:
    """What was written.

    Attributes:
        directory: The folder.
        name: Of the classifier.
        classes: Names in the order of the logits.
        files: File name -> bytes.
        cost: Weights and operations.
        kept: What could not be folded, one sentence each.
        difference: Largest difference of a logit between the training model and the torch form, on random inputs.
        onnx_difference: The same for ONNX Runtime; None without ONNX.
        largest_logit: Of the same inputs, what the differences are to be compared with.
        rounding: Largest difference between the training model and itself when it takes these inputs one by one.
        text_free: What the torch form did where no text package can be imported.
        onnx_text_free: What ONNX did there; None without ONNX.
        proof: The content of ``PROOF.json``.
    """

    directory: Path
    name: str
    classes: tuple[str, ...]
    files: Mapping[str, int]
    cost: Cost
    kept: tuple[str, ...]
    difference: float
    onnx_difference: float | None
    largest_logit: float
    rounding: float
    text_free: TextFree
    onnx_text_free: TextFree | None
    proof: Mapping[str, Any]

    @property
    def needs_no_text(self) -> bool:
        """Whether at least one of the two forms predicts without any text package."""
        return self.text_free.passed or (self.onnx_text_free is not None and self.onnx_text_free.passed)

    @property
    def agrees(self) -> bool:
        """Whether both forms give the training model's logits within :data:`TOLERANCE`."""
        limit = TOLERANCE * max(1.0, self.largest_logit)
        return max(self.difference, self.onnx_difference or 0.0) <= limit

    def use(self, folder: str) -> str:
        """Return how to classify with what lies in ``folder``, one line."""
        if self.cost.backbone_parameters:
            return f"chiasm classify {folder} IMAGE ..."
        return f"from Python: chiasm.classifier.load_classifier({folder!r}).predict(features)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"folder": self.directory.name, "files": dict(self.files), **self.proof}

    def sentences(self) -> tuple[str, ...]:
        """Return what a person should know, one line each."""
        cost = self.cost
        beside = (
            f"; {cost.overhead:+.2%} beside the unimodal classifier ({cost.overhead_trained:+.2%} before folding); "
            f"operations {cost.overhead_flops:+.3%}"
            if cost.backbone_parameters
            else "; there is no backbone to compare with, only features"
        )
        lines = [
            f"weights: {cost.exported_parameters:,}{beside}",
            f"counted and formula {'agree' if cost.agrees else 'DIFFER'}: {cost.formula_parameters:,} weights, "
            f"{cost.formula_flops:,} operations per image",
            f"logits differ from the training model by at most {self.difference:.1e}"
            + ("" if self.onnx_difference is None else f" (torch) and {self.onnx_difference:.1e} (ONNX Runtime)")
            + f", {'within' if self.agrees else 'ABOVE'} {TOLERANCE:.0e} of the largest ({self.largest_logit:.1f}, at least 1)",
            f"the training model differs from itself by {self.rounding:.1e} when it takes images one by one",
            *(f"not folded: {sentence}" for sentence in self.kept),
        ]
        for form, found in (("torch", self.text_free), ("ONNX", self.onnx_text_free)):
            if found is not None:
                lines.append(
                    f"{form}: loads and predicts with {len(found.blocked)} text packages and modules blocked"
                    if found.passed
                    else f"{form}: does NOT load without text packages: {found.problem}"
                )
        return tuple(lines)


def export_vision_only(
    run: str | Path, out: str | Path, *, onnx: bool = True, allow_code: bool = False
) -> VisionExport:
    """Write a classifier without text, smaller, and prove it.

    Args:
        run: A run of ``chiasm distill``, its ``model/``, or any folder of :func:`chiasm.classifier.save_classifier`.
        out: New or empty folder.
        onnx: Whether to write and check ``model.onnx``, too.
        allow_code: See :func:`chiasm.classifier.load_classifier`.

    Raises:
        InputError: ``out`` holds something, or the classifier is an export already.
        MissingExtra: ONNX was asked for and its packages are not installed.
        CheckpointError: The classifier cannot be read or written, or what was written is another classifier.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"`{out.name}` exists and is not empty", hint="name a new folder")
    if onnx:
        require_exporter()
    trained = load_classifier(run, allow_code=allow_code)
    if isinstance(trained.heads, FoldedHeads):
        raise InputError("the classifier is an export already", hint="give the run of `chiasm distill`")
    probe = example_input(trained, PROBES, seed=SEED)
    wanted = trained.logits(probe).double().numpy()
    alone = np.concatenate([trained.logits(row[None]).double().numpy() for row in probe])
    if trained.tower is not None and has_lora(trained.tower):
        merge_lora(trained.tower)
    folded = _folded(trained)
    try:
        staging = out.parent / f".{out.name}-{secrets.token_hex(4)}.next"
        staging.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        save_classifier(
            staging,
            folded.heads,  # type: ignore[arg-type]
            classes=folded.classes,
            tower=folded.tower,
            config=folded.config,
            projected=folded.projected,
            label=folded.label,
            name=folded.name,
            temperature=folded.temperature,
            facts=folded.facts,
        )
        if onnx:
            write_onnx(folded, staging, example=probe[:2])
        rounding = float(np.abs(alone - wanted).max())
        cost = measure_cost(trained, folded)
        export = _proven(staging, wanted, cost, rounding=rounding, onnx=onnx, allow_code=allow_code)
        (staging / PROOF_FILE).write_text(to_json(export.proof, indent=1) + "\n", encoding="utf-8")
        (staging / READ_ME).write_text(_read_me(export), encoding="utf-8")
        files = {p.name: p.stat().st_size for p in sorted(staging.iterdir())}
        if out.exists():
            out.rmdir()
        staging.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return VisionExport(**{**vars(export), "directory": out, "files": files})


def _folded(plain: VisionClassifier) -> VisionClassifier:
    """The same classifier on the same tower with folded heads."""
    assert isinstance(plain.heads, DistilledHeads)
    return VisionClassifier(
        plain.tower, fold_heads(plain.heads), classes=plain.classes, config=plain.config, projected=plain.projected,
        label=plain.label, name=plain.name, temperature=plain.temperature, facts=plain.facts,
    ).eval()  # fmt: skip


def _proven(
    folder: Path, wanted: NDArray[np.float64], cost: Cost, *, rounding: float, onnx: bool, allow_code: bool
) -> VisionExport:
    """Load what was written and compare it with the training model, here and where there is no text package."""
    written = load_classifier(folder, allow_code=allow_code)
    heads = written.heads
    assert isinstance(heads, FoldedHeads)
    probe = example_input(written, len(wanted), seed=SEED)
    size = float(np.abs(wanted).max())
    difference = _difference(written.logits(probe).double().numpy(), wanted, size, "torch form")
    graph_difference = None
    if onnx:
        graph = load_onnx(folder)
        found = np.concatenate([graph.logits(probe[:1].numpy()), graph.logits(probe[1:].numpy())])
        graph_difference = _difference(found.astype(np.float64), wanted, size, "ONNX form")
    forms: tuple[Form, ...] = ("torch", "onnx") if onnx else ("torch",)
    proofs = prove_text_free(folder, batch=len(wanted), seed=SEED, forms=forms, allow_code=allow_code)
    free = {form: _checked(found, wanted, size) for form, found in proofs.items()}
    export = VisionExport(
        directory=folder, name=written.name, classes=written.classes, files={}, cost=cost, kept=heads.config.kept,
        difference=difference, onnx_difference=graph_difference, largest_logit=size, rounding=rounding, text_free=free["torch"],
        onnx_text_free=free.get("onnx"), proof={},
    )  # fmt: skip
    return VisionExport(**{**vars(export), "proof": _proof(export, written)})


def _proof(export: VisionExport, written: VisionClassifier) -> dict[str, Any]:
    names = list(written.state_dict())
    parts = {part: sum(n.startswith(f"{part}.") for n in names) for part in ("tower", "heads")}
    onnx_free = export.onnx_text_free
    return {
        "format": "chiasm-vision-proof",
        "version": 1,
        "name": export.name,
        "classes": list(export.classes),
        "tower": "none" if written.config is None else written.config.image.kind,
        "cost": export.cost.to_dict(),
        "not_folded": list(export.kept),
        "agreement": {
            "inputs": f"{PROBES} random inputs, seed {SEED}",
            "tolerance": f"{TOLERANCE} of the largest logit, or {TOLERANCE} where that is below 1",
            "largest_logit": export.largest_logit,
            "torch": export.difference,
            "onnx": export.onnx_difference,
            "training_model_one_by_one": export.rounding,
            "agrees": export.agrees,
        },
        "text": {
            "needs_no_text": export.needs_no_text,
            "torch": export.text_free.to_dict(),
            "onnx": None if onnx_free is None else onnx_free.to_dict(),
            "tensors": {**parts, "other": len(names) - sum(parts.values())},
            "call": f"logits{inspect.signature(written.logits)}",
            "note": "`heads.text` takes an embedding that was predicted from the image; there is no argument for a text",
        },
        "versions": {"torch": str(torch.__version__)},
    }


def _difference(found: NDArray[np.float64], wanted: NDArray[np.float64], size: float, form: str) -> float:
    difference = float(np.abs(found - wanted).max())
    if not difference <= BROKEN * max(1.0, size):
        raise CheckpointError(
            f"the {form} gives other logits than the training model: they differ by {difference:.1e}",
            hint="nothing was written; this is a defect, please report it",
        )
    return difference


def _checked(found: TextFree, wanted: NDArray[np.float64], size: float) -> TextFree:
    """A process that predicts something else has not passed."""
    if not found.passed or found.logits is None:
        return found
    difference = float(np.abs(found.logits - wanted).max())
    if found.logits.shape == wanted.shape and difference <= BROKEN * max(1.0, size):
        return found
    return TextFree(False, found.blocked, found.asked_for, found.logits, f"other logits, by {difference:.1e}")


def _read_me(export: VisionExport) -> str:
    """A short text for whoever finds the folder."""
    forms = f"`{native.CLASSIFIER.file}` and `{native.WEIGHTS_FILE}` (torch)"
    if export.onnx_difference is not None:
        forms += f", `{MODEL_FILE}` and `onnx.json` (ONNX Runtime)"
    lines = [
        f"{export.name}: a classifier of images ({', '.join(export.classes)})", "",
        f"Files: {forms}, `{PROOF_FILE}`.",
        f"    {export.use('FOLDER')}",
        "    python -m chiasm.deploy.text_free FOLDER     # load it where no text package can be imported", "",
        *export.sentences(), "",
        "Research use only: chiasm and its models are no medical devices.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _unwritable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"`{out.name}` cannot be written: {error.strerror or type(error).__name__}",
        hint="free some space or choose another place; nothing was left behind",
    )
