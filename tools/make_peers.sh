#!/usr/bin/env bash
# Create .venv-peers: chiasm beside the packages that it is compared with (open_clip, OpenAI's CLIP, torchvision, timm).
# None of them may enter .venv: torchvision's wheel on PyPI is built for CUDA and does not import on the CPU build of
# torch, and timm and open_clip need it. Here its missing operators are declared by an import hook (see below).
#
#   bash tools/make_peers.sh            create or update
#   PYTHON=python3.12 bash tools/make_peers.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv-peers
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check install -q)
STAMP=$VENV/.installed

if [ -f "$STAMP" ] && [ "$STAMP" -nt pyproject.toml ] && [ "$STAMP" -nt tools/make_peers.sh ]; then
    echo "$VENV is up to date"
    exit 0
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

# torch first and alone: resolved together with anything else it may become a CUDA build of several gigabytes.
"${PIP[@]}" -c constraints.txt "$(grep '^torch==' constraints.txt)"
"${PIP[@]}" -c constraints.txt -e '.[dev,fast,export]'
# What the peers import at run time; they themselves come without dependencies, so that none of them replaces torch.
"${PIP[@]}" -c constraints.txt ftfy regex tqdm huggingface_hub safetensors packaging pyyaml instant-clip-tokenizer
# clip-anytorch (the code of openai/CLIP) reads pkg_resources.packaging, which newer setuptools dropped.
"${PIP[@]}" --no-deps setuptools==69.5.1 torchvision==0.28.0 timm==1.0.31 open_clip_torch==3.3.0 clip-anytorch==2.6.0
# GLoRIA's preprocessing resizes by OpenCV.
"${PIP[@]}" --no-deps opencv-python-headless==5.0.0.93
# The usual exact searches, for benchmarks/search.py and pairing.py.
"${PIP[@]}" -c constraints.txt --no-deps faiss-cpu usearch numkong
# A rival engine of the image towers' benchmark.
"${PIP[@]}" -c constraints.txt --no-deps openvino openvino-telemetry
# BioViL's own code; what it needs to read DICOM and NIfTI files is left out.
"${PIP[@]}" --no-deps hi-ml-multimodal==0.2.2

# The import hook: on the first `import torchvision` it declares the operators that its Python files mention. A .pth
# line is run at every start of the interpreter, so the module imports nothing but sys until then.
SITE=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
cat > "$SITE/_torchvision_operators.py" <<'PY'
"""Declare torchvision's operators before it is imported on a torch that its binary does not fit."""
import sys


class _Finder:
    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "FRAGMENT")  # kept: it undoes itself when collected
            for schema in (
                "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            ):
                try:
                    cls.library.define(schema)
                except RuntimeError:  # a torchvision whose binary fits has declared it
                    pass
        return None


sys.meta_path.insert(0, _Finder)
PY
echo 'import _torchvision_operators' > "$SITE/torchvision_operators.pth"

HF_HUB_OFFLINE=1 "$VENV/bin/python" -W ignore - <<'PY'
import sys

assert "torch" not in sys.modules, "the import hook loads torch at every start"
import clip
import open_clip
import timm
import torch
import torchvision

import chiasm

with open("constraints.txt") as pins:
    pin = next(line.split("==")[1].strip() for line in pins if line.startswith("torch=="))
assert torch.__version__.split("+")[0] == pin, torch.__version__
assert torch.version.cuda is None, "a CUDA build of torch slipped in"
model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
assert sum(p.numel() for p in model.parameters()) == 151_277_313
ids = open_clip.get_tokenizer("ViT-B-32")(["a chest radiograph"])
assert torch.equal(ids, clip.tokenize(["a chest radiograph"]).to(ids.dtype))
print("peers:", "torch", torch.__version__, "torchvision", torchvision.__version__, "timm", timm.__version__,
      "open_clip", open_clip.__version__)
PY
touch "$STAMP"
