"""How fast is a BERT text tower, BiomedCLIP's, beside open_clip's with the same weights?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/bert.py --json

BERT-base with drawn weights and BiomedCLIP's projection; 8 texts of 10 to 40 tokens, spread evenly (what padding to the
longest costs hangs on the longest of a few, so it is not left to the draw), with ``--more`` also 32 of them and
mixed bfloat16, which have no floor. Tokenised beforehand for everybody. Ours is what users call,
``encoder.encode_text``. The peer is open_clip's ``HFTextEncoder``, whose tokenizer pads every text to 256 tokens; the
rival is transformers' BertModel with texts padded to the longest of the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import cases
import timing

timing.wait_passively()

import torch  # noqa: E402 (after wait_passively)
import torch.nn.functional as F  # noqa: E402
from open_clip.hf_model import HFTextEncoder  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from chiasm.data.tokens import Tokens  # noqa: E402
from chiasm.encoders.base import Encoder  # noqa: E402
from chiasm.encoders.build import build_encoder_model  # noqa: E402
from chiasm.encoders.models.biomedclip import BERT_BASE, CONFIG  # noqa: E402

Call = Callable[[], Tensor]
PEER = "open_clip_torch HFTextEncoder padded to 256"
RIVAL = "transformers padded to the longest"
RIVAL_FLOOR = 1.4
PACKAGES = ["open_clip_torch", "transformers"]
CONTEXT = 256
#: Row -> texts and precision.
ROWS = {"bert_text": (8, "fp32"), "bert_text_b32": (32, "fp32"), "bert_text_bf16": (8, "bf16")}


def make_encoder() -> Encoder:
    config = replace(CONFIG, sides="text")
    model = build_encoder_model(config, seed=0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # transformers draws with a deviation of 0.02, which hardly lets attention matter.
            if name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
                weight.mul_(2.5)
    return Encoder(model, config, name="random-biomedclip")


def make_tokens(count: int) -> Tokens:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.linspace(10, 40, count).round().long()[torch.randperm(count, generator=generator)]
    ids = torch.randint(1000, 30000, (count, CONTEXT), generator=generator)
    ids = torch.where(torch.arange(CONTEXT) < lengths[:, None], ids, 0)
    return Tokens(ids=ids, lengths=lengths)


def open_clip_tower(encoder: Encoder) -> nn.Module:
    tower = HFTextEncoder("biomedclip", 512, BertConfig(**BERT_BASE), "cls_last_hidden_state_pooler", "mlp").eval()
    state = {k.replace("transformer.model.", "transformer."): v for k, v in encoder.model.text.state_dict().items()}  # type: ignore[union-attr]
    missing, unexpected = tower.load_state_dict(state, strict=False)
    if unexpected or any("pooler" not in name for name in missing):
        raise RuntimeError("open_clip's tower has other weights")
    return tower


def transformers_call(encoder: Encoder, tokens: Tokens) -> Call:
    model = BertModel(BertConfig(**BERT_BASE), add_pooling_layer=False).eval()
    model.load_state_dict(encoder.model.text.transformer.model.state_dict())  # type: ignore[union-attr]
    proj: nn.Module = encoder.model.text.proj  # type: ignore[union-attr, assignment]
    ids, mask = (t[:, : int(tokens.lengths.max())] for t in (tokens.ids, tokens.mask))
    return lambda: proj(model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest difference relative to the largest value, and 1 - the smallest cosine."""
    found, truth = found.double(), truth.double()
    return {
        "max": float((found - truth).abs().max() / truth.abs().max()),
        "cos": max(0.0, 1 - float(F.cosine_similarity(found, truth).min())),
    }


def measure(name: str, encoder: Encoder, peer: nn.Module, repetitions: int) -> cases.Case:
    """One row."""
    count, precision = ROWS[name]
    tokens = make_tokens(count)
    ours = encoder.with_precision(precision).prepare()
    calls: dict[str, Call] = {
        PEER: lambda: peer(tokens.ids),
        "chiasm": lambda: ours.encode_text(tokens),
        RIVAL: transformers_call(encoder, tokens),
    }
    with torch.inference_mode():
        truth = peer(tokens.ids)
        off = {n: errors(calls[n](), truth) for n in ("chiasm", RIVAL)}
        timings = timing.interleave(calls, max(repetitions, 7))
    kind, bound = ("max", 1e-5) if precision == "fp32" else ("cos", 2e-4)
    return cases.compare(
        name, PEER, timings, error=off["chiasm"][kind],
        error_kind="max difference / max value" if kind == "max" else "1 - min cos", error_bound=bound,
        rivals={RIVAL: RIVAL_FLOOR if precision == "fp32" else None},
        details={"cos_error": off["chiasm"]["cos"], "rival_errors": off[RIVAL], "tokens": int(tokens.lengths.sum())},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument("--more", action="store_true", help="also 32 texts, and bfloat16")
    options = parser.parse_args()
    encoder = make_encoder()
    peer = open_clip_tower(encoder)
    names = [n for n in ROWS if (options.more or n in cases.FLOORS) and (not options.case or n in options.case)]
    cases.report("bert", [measure(n, encoder, peer, options.repetitions) for n in names], options, PACKAGES)


if __name__ == "__main__":
    main()
