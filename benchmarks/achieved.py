"""Which share of the machine's ceiling do the towers reach, and how does cost grow with images and tokens?

    python benchmarks/achieved.py --keep      after ceilings.py --keep; half a minute; on a GPU with --device cuda

Random weights. Operations are the whole tower's by formula (`chiasm.deploy.cost.transformer_flops`), also those of the
last block that are left out, so a share of 1 would be a tower without overhead that leaves nothing out. The ceiling is
the best rate of ``ceilings.py`` for the precision, with the same number of threads. No peer: see image_tower.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import torch  # noqa: E402 (after wait_passively)

from chiasm.data.tokens import Tokens  # noqa: E402
from chiasm.deploy.cost import transformer_flops  # noqa: E402
from chiasm.encoders.base import Encoder  # noqa: E402
from chiasm.load import create_model_and_transforms  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def ceilings(threads: int) -> dict[str, float]:
    """Return the best rate of each precision, operations a second."""
    kept = json.loads((RESULTS / "ceilings.jsonl").read_text())
    if "gpu" in kept and torch.cuda.is_available():
        return {"bf16": kept["gpu"]["bf16"] * 1e12, "fp32": kept["gpu"].get("fp32", 0) * 1e12}
    best: dict[str, float] = {}
    for rates in kept[f"products, {threads} threads"].values():
        for name, rate in rates.items():
            kind = name.split()[0]
            best[kind] = max(best.get(kind, 0.0), rate * 1e9)
    return best


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Shortest of some calls, after one that is not counted; each waits for the GPU."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def text_batch(tokens: int, count: int) -> Tokens:
    """Return ``count`` texts of ``tokens`` tokens each."""
    ids = torch.randint(1, 40_000, (count, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, tokens - 1] = 49_406, 49_407
    ids[:, tokens:] = 0
    return Tokens(ids, torch.full((count,), tokens), ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"], help="architectures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="keep the line in results/achieved.jsonl")
    options = parser.parse_args()
    limits = ceilings(torch.get_num_threads())
    rows: list[dict[str, object]] = []
    for name in options.models:
        model, _, _ = create_model_and_transforms(name, device=options.device)
        config = model.config
        per_image = transformer_flops(config.image, config.dim)
        for precision in ("fp32", "bf16") if options.device != "cpu" else ("fp32", "bf16", "int8"):
            encoder = Encoder(model, config, name=name, precision=precision).prepare()
            if precision == "int8":
                encoder.check_precision(torch.randn(64, 3, config.image.image_size, config.image.image_size))
            for batch in (1, 8, 32):
                pixels = torch.randn(batch, 3, *[config.image.image_size] * 2, device=options.device)
                rate = batch * per_image / seconds(lambda e=encoder, p=pixels: e.encode_image(p))
                rows.append(row(name, f"{batch} images", precision, rate, limits))
            for tokens in (10, 25, 77) if precision != "int8" else ():
                texts = text_batch(tokens, 32)
                work = 32 * transformer_flops(config.text, config.dim, tokens=tokens)
                rate = work / seconds(lambda e=encoder, t=texts: e.encode_text(t))
                rows.append(row(name, f"32 texts of {tokens}", precision, rate, limits))
    timing.print_table("operations of the whole tower a second, and their share of the ceiling", rows)
    machine = timing.describe_machine(["chiasm", "torch"])
    line = json.dumps({"name": "achieved", "threads": torch.get_num_threads(), "rows": rows, "machine": machine})
    print(line)
    if options.keep:
        (RESULTS / "achieved.jsonl").write_text(line + "\n")


def row(model: str, what: str, precision: str, rate: float, limits: dict[str, float]) -> dict[str, object]:
    """Return one line of the table."""
    share = rate / limits[precision] if limits.get(precision) else None
    return {"model": model, "what": what, "precision": precision, "Gop/s": round(rate / 1e9), "share": share}


if __name__ == "__main__":
    main()
