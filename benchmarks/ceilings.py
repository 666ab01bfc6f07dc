"""What could this machine do at best? Matrix products at CLIP's shapes by precision and way, and reading memory.

    PYTHONPATH=src .venv-peers/bin/python benchmarks/ceilings.py --keep

Ways: ``F.linear``; oneDNN with the weight packed once (private operators of torch, left out where they are absent or
disagree); ``_int_mm`` for int8. Shapes are rows × in → out of ViT-B/32's MLP for 1, 8 and 32 images and of its text tower
for 16 captions. Figures are the best of several rounds: a limit, not an average, in 10⁹ operations (a multiplication and an
addition are two) or bytes a second. Where there is a GPU: bf16 products and copying. One JSON line, kept in
results/ceilings.jsonl; the cost model of docs/explanation/performance.md divides by it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import torch  # noqa: E402 (after wait_passively)
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

RESULT = Path(__file__).parent / "results" / "ceilings.jsonl"
SHAPES = ((50, 768, 3072), (400, 768, 3072), (1600, 768, 3072), (400, 3072, 768), (400, 512, 2048))
#: Work of one measurement: long enough for the clock.
OPERATIONS = 2e9
BUFFER_MIB = 512


def best_rate(call: Callable[[], object], work: float, rounds: int, wait: Callable[[], None] = lambda: None) -> float:
    """Return the best of several rounds in 10⁹ a second; a call does ``work``."""
    loops = max(1, round(OPERATIONS / work))
    best = 0.0
    for _ in range(rounds + 1):  # the first warms up
        wait()
        started = time.perf_counter()
        for _ in range(loops):
            call()
        wait()
        best = max(best, loops * work / (time.perf_counter() - started))
    return round(best / 1e9, 1)


def packed_linear(rows: int, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return oneDNN's linear with the weight packed for this number of rows, or None where it is absent or wrong."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        operator = torch.ops.mkldnn._linear_pointwise

        def call(x: Tensor) -> Tensor:
            found: Tensor = operator(x, packed, None, "none", [], "")
            return found

        x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
        expected = F.linear(x, weight).float()
        wrong = (call(x).float() - expected).abs().max() / expected.abs().max()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return call if wrong < 2e-2 else None


def products(shape: tuple[int, int, int], rounds: int) -> dict[str, float | None]:
    """Rates of one shape by precision and way."""
    rows, inner, outer = shape
    work = 2.0 * rows * inner * outer
    rates: dict[str, float | None] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        rates[f"{name} F.linear"] = best_rate(lambda x=x, weight=weight: F.linear(x, weight), work, rounds)
        call = packed_linear(rows, weight)
        rates[f"{name} packed"] = None if call is None else best_rate(lambda x=x, call=call: call(x), work, rounds)
    a = torch.randint(-127, 127, (rows, inner), dtype=torch.int8)
    b = torch.randint(-127, 127, (inner, outer), dtype=torch.int8)
    try:
        rates["int8 _int_mm"] = best_rate(lambda: torch._int_mm(a, b), work, rounds)
    except RuntimeError:
        rates["int8 _int_mm"] = None
    return rates


def reading(threads: int, rounds: int) -> float:
    """Bytes a second (10⁹) that a sum reads from a buffer beyond the caches."""
    torch.set_num_threads(threads)
    buffer = torch.ones(BUFFER_MIB * 2**20 // 4)
    return best_rate(buffer.sum, float(buffer.numel() * 4), rounds)


def gpu(rounds: int) -> dict[str, object] | None:
    """The same of a GPU: bf16 products and a copy (read and written bytes)."""
    if not torch.cuda.is_available():
        return None
    wait = torch.cuda.synchronize
    found: dict[str, object] = {"name": torch.cuda.get_device_name()}
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found[f"bf16 {n}^3"] = best_rate(lambda a=a, b=b: a @ b, 2.0 * n**3, rounds, wait)
    for rows in (12800, 51200):
        x = torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(3072, 768, device="cuda", dtype=torch.bfloat16)
        work = 2.0 * rows * 768 * 3072
        found[f"bf16 {rows}x768x3072"] = best_rate(lambda x=x, w=weight: F.linear(x, w), work, rounds, wait)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = best_rate(lambda: target.copy_(source), 2.0 * source.numel(), rounds, wait)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", action="store_true", help="keep the line in results/ceilings.jsonl")
    parser.add_argument("--gpu-only", action="store_true", help="leave the CPU out")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    result: dict[str, object] = {"name": "ceilings", "unit": "10^9 operations or bytes a second, best of rounds"}
    result["rounds"] = options.rounds
    if not options.gpu_only:
        for used in dict.fromkeys((1, threads)):
            torch.set_num_threads(used)
            with torch.inference_mode():
                rates = {"x".join(map(str, shape)): products(shape, options.rounds) for shape in SHAPES}
            result[f"products, {used} threads"] = rates
            timing.print_table(
                f"10^9 operations a second, {used} threads", [{"shape": k, **v} for k, v in rates.items()]
            )
        memory = {f"{used} threads": reading(used, options.rounds) for used in dict.fromkeys((1, threads))}
        result["read"] = memory
        print(f"\nreading memory, 10^9 bytes a second: {memory}", file=sys.stderr)
    card = gpu(options.rounds)
    if card is not None:
        result["gpu"] = card
        print(f"\nGPU: {card}", file=sys.stderr)
    machine = timing.describe_machine(["chiasm", "torch", "numpy"])
    result["machine"] = machine if card is None else {**machine, "gpu": card["name"]}
    line = json.dumps(result)
    print(line)
    if options.keep:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(line + "\n")


if __name__ == "__main__":
    main()
