"""How long from nothing to a result, in fresh processes: ``import``, ``--help``, and the first image and text vectors.

The same random ViT-B/32 weights lie in a chiasm model folder and in a file that open_clip reads; both sides decode a
640 x 480 JPEG, preprocess it fully, tokenise one prompt and print the first numbers, which must agree. Run it with the
interpreter of the second environment (``make peers``), which has open_clip; without it only chiasm is timed.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/cold_start.py
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from timing import describe_machine, finish, interleave_fresh, print_table, ratio, run_fresh, wait_passively

OURS = """
import json, sys
import chiasm
encoder = chiasm.load(sys.argv[1])
from PIL import Image
image = encoder.encode([Image.open(sys.argv[2])], show_progress_bar=False)
text = encoder.encode(["a chest film with a large left pleural effusion"], show_progress_bar=False)
print(json.dumps([image[0, :8].tolist(), text[0, :8].tolist()]))
"""
PEER = """
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the JSON line in this file")
    options = parser.parse_args()
    wait_passively()
    has_peer = importlib.util.find_spec("open_clip") is not None
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs, image = make_inputs(Path(temporary))
        candidates = {
            "import chiasm": ["-c", "import chiasm; print(0)"],
            "chiasm --help": ["-c", "import sys; sys.argv = ['chiasm', '--help']; from chiasm.cli import main as m\n"
                              "try: m.main()\nexcept SystemExit: print(0)"],
            "import torch": ["-c", "import torch; print(0)"],
            "first vectors, chiasm": ["-c", OURS, str(ours), str(image)],
        }  # fmt: skip
        if has_peer:
            candidates["import open_clip"] = ["-c", "import open_clip; print(0)"]
            candidates["first vectors, open_clip"] = ["-c", PEER, str(theirs), str(image)]
        timings = interleave_fresh(candidates, options.repetitions)
        rows = [
            {"what": name, "cpu s": sorted(t.cpu_s)[len(t.cpu_s) // 2], "wall s": sorted(t.wall_s)[len(t.wall_s) // 2]}
            for name, t in timings.items()
        ]
        print_table("cold start (fresh processes, warm file cache)", rows)
        result: dict[str, object] = {"benchmark": "cold_start", "rows": rows, "repetitions": options.repetitions}
        if has_peer:
            a = run_fresh(["-c", OURS, str(ours), str(image)]).output
            b = run_fresh(["-c", PEER, str(theirs), str(image)]).output
            pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]  # type: ignore[call-overload]
            scale = max(abs(y) for _, y in pairs)
            result["ratios"] = {
                "import": ratio(timings["import open_clip"], timings["import chiasm"]),
                "first vectors": ratio(timings["first vectors, open_clip"], timings["first vectors, chiasm"]),
            }
            result["relative_error"] = max(abs(x - y) for x, y in pairs) / scale
        result["machine"] = describe_machine(["torch", "open_clip_torch", "transformers", "pillow"])
        finish(result, options.out)


if __name__ == "__main__":
    main()
