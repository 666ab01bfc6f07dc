"""How fast is CLIP's text tower, that of ViT-B/32, beside open_clip's with the same weights?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/text_tower.py --json

32 texts a row: prompts of 8 to 16 tokens, captions of 20 to 30, and lengths from 8 to 77 mixed; tokenised beforehand for
everybody. Random weights of OpenAI's shape, those into attention and into the MLP times 1.5 so that both matter. Ours is
what users call, ``encoder.encode_text``. The peer is open_clip in float32, which always works out 77 positions; the rival
of the float32 rows is transformers with texts padded to the longest of the batch, that of the others open_clip in pure
bfloat16. With ``--one`` also a single prompt of 10 tokens and 8 texts that fill the context, which have no floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import cases
import timing

timing.wait_passively()

import open_clip  # noqa: E402 (after wait_passively)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from random_model import make_encoder  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from chiasm.data.tokens import Tokens  # noqa: E402
from chiasm.encoders.base import Encoder  # noqa: E402

Call = Callable[[], Tensor]
PEER = "open_clip_torch fp32"
TRANSFORMERS = "transformers fp32 padded to the longest"
PURE = "open_clip_torch pure bf16"
PACKAGES = ["open_clip_torch", "transformers"]
CONTEXT, START, END = 77, 49406, 49407
#: Number of texts, shortest and longest.
SETS = {"prompts": (32, 8, 16), "captions": (32, 20, 30), "mixed": (32, 8, 77), "one": (1, 10, 10), "full": (8, 77, 77)}
#: What is to be reached against transformers.
RIVAL_FLOORS = {"prompts": 1.4, "captions": 1.3, "mixed": 2.0}


def make_tokens(name: str) -> Tokens:
    """Random ids between start and end, with zeros behind, as CLIP's tokenizer gives them."""
    count, shortest, longest = SETS[name]
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    ids = torch.randint(1, START, (count, CONTEXT), generator=generator)
    places = torch.arange(CONTEXT)
    ids = torch.where(places < lengths[:, None] - 1, ids, 0)
    ids[:, 0] = START
    ids[torch.arange(count), lengths - 1] = END
    return Tokens(ids=ids, lengths=lengths)


def open_clip_model(encoder: Encoder) -> nn.Module:
    """open_clip's CLIP with the encoder's text weights."""
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    model.load_state_dict(model.state_dict() | dict(encoder.model.state_dict()))
    return model


def transformers_model(encoder: Encoder) -> nn.Module:
    """The CLIP of transformers, SDPA."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=512, intermediate_size=2048, projection_dim=512, num_hidden_layers=12, num_attention_heads=8,
        hidden_act="quick_gelu", eos_token_id=END, bos_token_id=START, attn_implementation="sdpa",
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    model.load_state_dict(_renamed(encoder.model.state_dict(), model.state_dict()))
    return model


def _renamed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a native tower under the names of transformers."""
    at = "text_model."
    out = {
        f"{at}embeddings.token_embedding.weight": ours["token_embedding.weight"],
        f"{at}embeddings.position_embedding.weight": ours["positional_embedding"],
        "text_projection.weight": ours["text_projection"].T,
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"{at}final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
        for i in range(12):
            mine, block = f"transformer.resblocks.{i}.", f"{at}encoder.layers.{i}."
            out |= {f"{block}{new}.{kind}": ours[f"{mine}{old}.{kind}"] for old, new in names.items()}
            parts = ours[f"{mine}attn.in_proj_{kind}"].chunk(3)
            out |= {f"{block}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", parts, strict=True)}
    missing = set(out) - set(theirs)
    if missing:
        raise RuntimeError(f"transformers does not know {sorted(missing)[:3]}")
    return theirs | out


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest difference relative to the largest value, and 1 - the smallest cosine."""
    found, truth = found.double(), truth.double()
    return {
        "max": float((found - truth).abs().max() / truth.abs().max()),
        "cos": max(0.0, 1 - float(F.cosine_similarity(found, truth).min())),
    }


def measure(name: str, encoder: Encoder, peer: nn.Module, options: argparse.Namespace) -> cases.Case:
    """One row."""
    _, texts, precision = name.split("_")
    tokens = make_tokens(texts)
    ours = encoder.with_precision(precision).prepare()
    longest = int(tokens.lengths.max())
    rivals: dict[str, Call] = {}
    if precision == "fp32":
        theirs, cut = transformers_model(encoder), tokens.ids[:, :longest]
        mask = (torch.arange(longest) < tokens.lengths[:, None]).long()
        rivals[TRANSFORMERS] = lambda: theirs(input_ids=cut, attention_mask=mask).text_embeds
    else:
        half = open_clip_model(encoder).bfloat16()
        rivals[PURE] = lambda: half.encode_text(tokens.ids).float()
    calls = {PEER: lambda: peer.encode_text(tokens.ids), "chiasm": lambda: ours.encode_text(tokens), **rivals}
    with torch.inference_mode():
        truth = calls[PEER]()
        off = {n: errors(call(), truth) for n, call in calls.items() if n != PEER}
        loops = 10 if texts == "one" else 1
        timings = timing.interleave(calls, max(options.repetitions, 7), loops=loops)
    kind, bound = ("max", 1e-5) if precision == "fp32" else ("cos", 2e-4)
    total = int(tokens.lengths.sum())
    return cases.compare(
        name, PEER, timings, error=off["chiasm"][kind],
        error_kind="max difference / max value" if kind == "max" else "1 - min cos", error_bound=bound,
        rivals={n: RIVAL_FLOORS.get(texts) if n == TRANSFORMERS else None for n in rivals},
        details={
            "cos_error": off["chiasm"]["cos"], "rival_errors": {n: off[n] for n in rivals},
            "tokens": total, "tokens_of_peer": tokens.ids.numel(), "loops": loops,
        },
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    parser.add_argument("--one", action="store_true", help="also one prompt of 10 tokens, and 8 texts of 77")
    options = parser.parse_args()
    encoder = make_encoder("text")
    peer = open_clip_model(encoder)
    names = list(cases.SCRIPTS["text_tower"])
    if options.one:
        names += [f"text_{texts}_{precision}" for precision in ("fp32", "bf16") for texts in ("one", "full")]
    names = [n for n in names if not options.case or n in options.case]
    cases.report("text_tower", [measure(n, encoder, peer, options) for n in names], options, PACKAGES)


if __name__ == "__main__":
    main()
