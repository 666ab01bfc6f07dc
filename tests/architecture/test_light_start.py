"""From nothing to the first image and text vectors: what is imported and read on the way, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from chiasm.load import save_encoder
from chiasm.testing import TinyEncoder

#: Packages that neither a native encoder nor plain texts need, heavy or not.
NEEDLESS = {
    "transformers", "pandas", "pyarrow", "sklearn", "scipy", "lancedb", "peft", "matplotlib", "ftfy", "regex", "typer",
    "rich", "jinja2", "huggingface_hub", "onnxruntime", "onnx", "torchvision", "timm", "open_clip", "requests", "httpx",
}  # fmt: skip
START = """
import json, sys
import chiasm
assert "torch" not in sys.modules
encoder = chiasm.load(sys.argv[1])
from PIL import Image
shapes = [encoder.encode([Image.open(sys.argv[2])]).shape, encoder.encode(["a chest film, 2 views"]).shape]
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "shapes": shapes,
    "digest": encoder._digest is not None,
    "packed": encoder._engine is not None,
}))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("start")
    save_encoder(TinyEncoder(), folder / "model")
    Image.new("RGB", (40, 30), (90, 120, 30)).save(folder / "image.png")
    command = [sys.executable, "-c", START, str(folder / "model"), str(folder / "image.png")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_nothing_heavy_is_imported_beside_torch(started: dict[str, object]) -> None:
    modules = started["modules"]
    assert isinstance(modules, list)
    assert NEEDLESS & {*modules} == set()
    assert {"torch", "numpy", "PIL", "safetensors"} <= {*modules}


def test_no_digest_and_no_layout_before_somebody_needs_them(started: dict[str, object]) -> None:
    assert started["shapes"] == [[1, TinyEncoder().dim]] * 2
    assert not started["digest"]
    assert not started["packed"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import chiasm", {"torch", "numpy", "PIL", *NEEDLESS}),
        ("import chiasm.cli.main", {"torch", *(NEEDLESS - {"typer", "rich"})}),
        ("import chiasm.data.mending", {"torch", "numpy", *NEEDLESS}),
    ],
)
def test_what_an_import_brings(code: str, absent: set[str]) -> None:
    command = [sys.executable, "-c", f"import sys; {code}; print(*{{name.split('.')[0] for name in sys.modules}})"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert absent & {*done.stdout.split()} == set()


def test_weights_stay_in_the_mapped_file(tmp_path: Path) -> None:
    """Nothing is copied: parameters share the memory that the file is mapped to."""
    from chiasm.checkpoints.containers import read_state_dict
    from chiasm.encoders.fill import filled_model

    encoder = TinyEncoder()
    folder = save_encoder(encoder, tmp_path / "model")
    tensors = read_state_dict(folder / "model.safetensors").tensors
    model = filled_model(encoder.config, tensors)
    parameters = dict(model.named_parameters())
    assert parameters
    assert all(parameters[name].data_ptr() == tensors[name].data_ptr() for name in parameters)
