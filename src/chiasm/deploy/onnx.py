"""ONNX: a classifier as a graph that ONNX Runtime runs without torch's or chiasm's code.

In: a :class:`VisionClassifier`. Out: ``model.onnx`` (inputs ``pixels`` or ``features`` with a free batch axis; outputs
``logits`` and ``probabilities``) and ``onnx.json``, which says how images are prepared and what the columns are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.checkpoints.containers import read_json
from chiasm.classifier import Predictions, VisionClassifier, predict_images
from chiasm.errors import CheckpointError, InputError, MissingExtra
from chiasm.io.manifest import RejectLog, to_json
from chiasm.types import Preprocess, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.progress import Progress

MODEL_FILE = "model.onnx"
DECLARATION_FILE = "onnx.json"
FORMAT = "chiasm-classifier-onnx"
#: Read by ONNX Runtime 1.17 (2024) and later.
OPSET = 20
#: Above this, ONNX's own limit of 2 GiB a file makes a second file for the weights necessary.
LARGEST_FILE_BYTES = 1_800_000_000


def require_exporter() -> None:
    """Raise ``MissingExtra`` unless what writes and checks ONNX is installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtra(package, "export")


class _Scored(nn.Module):
    """A classifier that gives probabilities beside the logits."""

    def __init__(self, classifier: VisionClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = classifier.temperature or 1.0

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.classifier(inputs)
        return logits, (logits / self.temperature).softmax(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling that torchvision is absent and which constants it did not fold."""
    logs = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")
    ]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def write_onnx(classifier: VisionClassifier, folder: str | Path, *, example: Tensor) -> Path:
    """Write ``model.onnx`` and ``onnx.json``.

    Args:
        classifier: Adapters merged.
        folder: Existing.
        example: A batch of at least two of its inputs; the graph takes any batch.

    Raises:
        MissingExtra: ``onnx``, ``onnxscript`` or ``onnxruntime`` is not installed.
        CheckpointError: The tower does something that has no form in ONNX.
    """
    require_exporter()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    folder = Path(folder)
    model = _Scored(classifier).eval()
    name = "features" if classifier.config is None else "pixels"
    size = sum(p.numel() * p.element_size() for p in classifier.parameters())
    try:
        # Fused attention of a CPU gives another memory layout than the graph's, on which Swin's export stumbles.
        with _quiet(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            program: Any = torch.onnx.export(
                model,
                (example,),
                input_names=[name],
                output_names=["logits", "probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            program.save(str(folder / MODEL_FILE), external_data=size > LARGEST_FILE_BYTES)
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            "the classifier cannot be written as ONNX: its tower does something that has no form there",
            hint="`--no-onnx` exports the torch form alone",
        ) from error
    declaration = {
        "format": FORMAT,
        "version": 1,
        "name": classifier.name,
        "opset": OPSET,
        "input": {"name": name, "shape": ["batch", *example.shape[1:]], "dtype": "float32"},
        "outputs": {"logits": "unnormalised", "probabilities": "softmax(logits / temperature)"},
        "classes": list(classifier.classes),
        "label": classifier.label,
        "temperature": classifier.temperature,
        "preprocess": None if classifier.preprocess is None else classifier.preprocess.to_dict(),
        "facts": classifier.facts,
    }
    (folder / DECLARATION_FILE).write_text(to_json(declaration, indent=1) + "\n", encoding="utf-8")
    return folder / MODEL_FILE


class OnnxClassifier:
    """An exported graph behind the same face as :class:`VisionClassifier`.

    Attributes:
        classes: Names in the order of the columns.
        label: What the classes are of.
        name: For people.
        preprocess: How images are prepared; None where features go in.
        facts: As in :func:`chiasm.classifier.save_classifier`.
    """

    def __init__(self, session: Any, declaration: Mapping[str, Any]) -> None:
        self._session = session
        self._input = str(declaration["input"]["name"])
        self._shape = tuple(int(n) for n in declaration["input"]["shape"][1:])
        self.classes = tuple(str(c) for c in declaration["classes"])
        self.label = str(declaration["label"])
        self.name = str(declaration["name"])
        stated = declaration["preprocess"]
        self.preprocess = None if stated is None else Preprocess.from_dict(stated)
        self.facts: dict[str, Any] = dict(declaration["facts"])

    def logits(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (batch, classes) of prepared pixels (batch, 3, size, size) or features (batch, width)."""
        return self._run("logits", inputs)

    def probabilities(self, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return (batch, classes), float64."""
        return self._run("probabilities", inputs).astype(np.float64)

    def predict(
        self,
        images: Sequence[Sample | Path | str | Image],
        *,
        batch_size: int = 32,
        workers: int = 2,
        rejects: RejectLog | None = None,
        progress: Progress | None = None,
    ) -> Predictions:
        """Return class probabilities of images; see :meth:`VisionClassifier.predict`."""
        if self.preprocess is None:
            raise InputError("this classifier was trained on features and knows no image")
        return predict_images(
            images,
            lambda pixels: self.probabilities(pixels.numpy()),
            classes=self.classes,
            preprocess=self.preprocess,
            batch_size=batch_size,
            workers=workers,
            rejects=rejects,
            progress=progress,
        )

    def example(self, batch: int, *, seed: int = 0) -> NDArray[np.float32]:
        """Return the random input of :func:`chiasm.deploy.cost.example_input`."""
        generator = torch.Generator().manual_seed(seed)
        found: NDArray[np.float32] = torch.randn((batch, *self._shape), generator=generator).numpy()
        return found

    def _run(self, output: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = np.asarray(inputs, np.float32)
        if batch.shape[1:] != self._shape:
            raise InputError(f"the input has shape {batch.shape}, the graph takes (batch, {str(self._shape)[1:]}")
        found: NDArray[np.float32] = self._session.run([output], {self._input: batch})[0]
        return found


def load_onnx(folder: str | Path, *, threads: int = 0) -> OnnxClassifier:
    """Return the graph of an export, on the CPU.

    Args:
        folder: The export.
        threads: Of ONNX Runtime; 0: as it chooses.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        CheckpointError: No graph there, or one that is damaged.
    """
    folder = Path(folder).expanduser()
    file = folder / MODEL_FILE
    if not file.is_file():
        raise CheckpointError(f"`{folder.name}` holds no `{MODEL_FILE}`", hint="export it without `--no-onnx`")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "export") from error
    declaration = read_json(folder / DECLARATION_FILE)
    if declaration.get("format") != FORMAT or declaration.get("version") != 1:
        raise CheckpointError(f"`{DECLARATION_FILE}` is no declaration that this chiasm reads", hint="upgrade chiasm")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors share no narrower class
        raise CheckpointError(f"`{MODEL_FILE}` is damaged or of a newer ONNX", hint="export it again") from error
    try:
        return OnnxClassifier(session, declaration)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{DECLARATION_FILE}` is incomplete") from error
