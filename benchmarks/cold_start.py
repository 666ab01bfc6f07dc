"""How long from nothing to a result, in fresh processes: ``import``, ``--help``, and the first image and text vectors.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/cold_start.py

``cold_start``: the same random ViT-B/32 weights lie in a chiasm model folder and in a file that open_clip reads; both
sides decode a 640 x 480 JPEG, preprocess it fully, tokenise one prompt and print the first numbers, which must agree. The
file cache is warm, the first round is thrown away; in it chiasm checks the digest of the weights, which it remembers for
as long as the file is the same ("first start": not remembered; the peer checks none). Beside it: ``import chiasm`` and ``chiasm --help`` with their limits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import cases
from timing import interleave_fresh, ratio, run_fresh, wait_passively

OURS = """
import json, sys
import chiasm
encoder = chiasm.load(sys.argv[1])
from PIL import Image
image = encoder.encode([Image.open(sys.argv[2])], show_progress_bar=False)
text = encoder.encode(["a chest film with a large left pleural effusion"], show_progress_bar=False)
print(json.dumps([image[0, :8].tolist(), text[0, :8].tolist()]))
"""
PEER_CODE = """
import json, sys
import torch, open_clip
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=sys.argv[1])
tokenizer = open_clip.get_tokenizer("ViT-B-32")
with torch.inference_mode():
    image = model.eval().encode_image(preprocess(Image.open(sys.argv[2]))[None])
    text = model.encode_text(tokenizer(["a chest film with a large left pleural effusion"]))
print(json.dumps([image[0, :8].tolist(), text[0, :8].tolist()]))
"""


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Write the same random ViT-B/32 (GELU) for both sides, and a picture."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file

    from chiasm.encoders.base import Encoder
    from chiasm.load import create_model_and_transforms, save_encoder

    model, _, _ = create_model_and_transforms("ViT-B-32")
    save_encoder(Encoder(model, model.config, name="random"), folder / "model")
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / "image.jpg", quality=90)
    return folder / "model", folder / "open_clip_model.safetensors", folder / "image.jpg"


PEER = "open_clip_torch fp32"
FORGETFUL = "import os; os.environ['CHIASM_HOME'] = '/dev/null/none'\n"
SETTLED_S = 5.0
#: Wall seconds that a user may wait.
LIMITS = {"import chiasm": 0.15, "chiasm --help": 0.4}
HELP = (
    "import sys; sys.argv = ['chiasm', '--help']; from chiasm.cli import main as m\n"
    "try: m.main()\nexcept SystemExit: print(0)"
)


def difference(ours: Path, theirs: Path, image: Path) -> float:
    """Largest difference of the printed numbers, relative to the largest of them."""
    a = run_fresh(["-c", OURS, str(ours), str(image)]).output
    b = run_fresh(["-c", PEER_CODE, str(theirs), str(image)]).output
    assert isinstance(a, list)
    assert isinstance(b, list)
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return max(abs(x - y) for x, y in pairs) / max(abs(y) for _, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    options = parser.parse_args()
    wait_passively()
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs, image = make_inputs(Path(temporary))
        os.environ["CHIASM_HOME"] = temporary
        time.sleep(SETTLED_S + 1)  # digests of files that were just written are not remembered
        timings = interleave_fresh(
            {
                PEER: ["-c", PEER_CODE, str(theirs), str(image)],
                "chiasm": ["-c", OURS, str(ours), str(image)],
                "chiasm, first start": ["-c", FORGETFUL + OURS, str(ours), str(image)],
                "import open_clip": ["-c", "import open_clip; print(0)"],
                "import torch": ["-c", "import torch; print(0)"],
                "import chiasm": ["-c", "import chiasm; print(0)"],
                "chiasm --help": ["-c", HELP],
            },
            options.repetitions,
        )
        error = difference(ours, theirs, image)
    seconds = {
        name: {"cpu_s": round(statistics.median(t.cpu_s), 3), "wall_s": round(statistics.median(t.wall_s), 3)}
        for name, t in timings.items()
    }
    details = {
        "seconds": seconds,
        "first_start": ratio(timings[PEER], timings["chiasm, first start"]),
        "limits": {k: {"wall_s": limit, "reached": seconds[k]["wall_s"] < limit} for k, limit in LIMITS.items()},
        "import_chiasm_vs_open_clip": ratio(timings["import open_clip"], timings["import chiasm"]),
    }
    case = cases.compare(
        "cold_start", PEER, timings, error=error, error_kind="relative difference", error_bound=1e-5, details=details
    )
    cases.report("cold_start", [case], options, ["open_clip_torch", "transformers", "pillow"])


if __name__ == "__main__":
    main()
