"""How fast do texts become token ids, beside open_clip's own tokenizer?

    PYTHONPATH=src .venv-peers/bin/python benchmarks/tokenizer.py

``tokenizer_prompts``: 1,000 short prompts. ``tokenizer_varied``: 1,000 strings of six classes (phrases of reports, random
printable ASCII, texts of 90 words, Unicode, HTML entities, control characters), of which a quarter need cleaning.
``tokenizer_odd``: 1,000 of the strings that the parity tests draw, most of which are damaged on purpose. A call takes a
list of strings and returns the tensor of ids and the lengths; ours is ``ClipTokenizer.encode``, with the accelerator of
the extra ``fast`` and without. The error is the number of texts whose ids differ from the peer's.
"""

from __future__ import annotations

import argparse
import random
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path

import timing

timing.wait_passively()

import cases  # noqa: E402 (after wait_passively)
import torch  # noqa: E402

from chiasm.data.byte_pairs import BytePairs  # noqa: E402
from chiasm.data.mending import SIMPLE_TEXT  # noqa: E402
from chiasm.data.tokenizers import ClipTokenizer  # noqa: E402

PEER = "open_clip_torch SimpleTokenizer"
RUST, FAST_HF, PLAIN = "tokenizers BPE, batch", "transformers CLIPTokenizerFast", "chiasm without accelerator"
#: What is to be reached without the accelerator.
PLAIN_FLOORS = {"tokenizer_prompts": 2.0, "tokenizer_varied": 1.4}
CONTEXT = 77
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "make_tokens.py"
FINDINGS = (
    "pneumothorax", "pleural effusion", "cardiomegaly", "consolidation", "edema", "nodule", "mass", "rib fracture",
    "atelectasis", "emphysema",
)  # fmt: skip
DEGREES = ("no", "a small", "a large", "mild", "severe", "possible", "an old", "a new", "subtle", "unchanged")
PLACES = (
    "left lung", "right lung", "left lower lobe", "right upper lobe", "lingula", "both apices", "left hilum",
    "right base", "middle lobe", "retrocardiac region",
)  # fmt: skip
PHRASES = (
    "No evidence of pneumothorax.", "the patient's heart isn't enlarged", "T2-weighted FLAIR axial, 3.5 mm slices",
    "adenocarcinoma, moderately differentiated (G2), pT2 pN1 cM0", "FOLLOW-UP CT: LLL consolidation RESOLVED!!!",
    "r/o PE vs. MI -- d-dimer >500 ng/mL @ 37.2C, SpO2 98%", "lesion 12x9 mm (previously 10x8)",
)  # fmt: skip
UNICODE = (
    "épanchement",
    "Ödem",
    "2 µm",
    "≥ 3 cm",
    "– stable –",
    "Żółć",
    "肺炎",
    "плевра",
    "“normal”",
    "37 °C",
    "naïve",
    "Ελληνικά",
)
ENTITIES = (
    "&lt;5 mm",
    "H&amp;E",
    "caf&eacute;",
    "a &gt; b",
    "&#233;tat",
    "&quot;normal&quot;",
    "3&nbsp;cm",
    "&plusmn;2",
)


def make_prompts() -> list[str]:
    """1,000 different prompts of 9 to 14 tokens."""
    return [
        f"a chest film with {degree} {finding} in the {place}"
        for degree in DEGREES for finding in FINDINGS for place in PLACES
    ]  # fmt: skip


def make_varied(n: int, seed: int = 0) -> list[str]:
    """Strings of six classes; 26 in a hundred hold something that the cleaning has to look at."""
    draw = random.Random(seed)
    words = " ".join([*PHRASES, *make_prompts()[:50]]).split()
    printable = [chr(c) for c in range(32, 127) if chr(c) != "&"]

    def some(lowest: int, highest: int) -> list[str]:
        return draw.choices(words, k=draw.randint(lowest, highest))

    def mixed(odd: list[str]) -> str:
        parts = [*some(3, 15), *draw.choices(odd, k=draw.randint(1, 3))]
        draw.shuffle(parts)
        return " ".join(parts)

    def one(kind: int) -> str:
        if kind < 44:
            return f"{draw.choice(PHRASES)} {' '.join(some(2, 12))}"
        if kind < 60:
            return "".join(draw.choices(printable, k=draw.randint(1, 60)))
        if kind < 74:
            return " ".join(some(90, 90))
        if kind < 84:
            return mixed([*UNICODE])
        if kind < 92:
            return mixed([*ENTITIES])
        return mixed([chr(c) for c in (*range(1, 9), 11, *range(14, 32), 127)])

    texts = [one(i % 100) for i in range(n)]
    draw.shuffle(texts)
    return texts


def rust_tokenizer() -> Callable[[list[str]], object]:
    """The Rust library as a careful user sets it up from CLIP's merges; it does not mend texts as CLIP does."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

    pairs = BytePairs()
    engine = Tokenizer(pairs.model)
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(pattern, "removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A <e>", special_tokens=[("<s>", pairs.start_id), ("<e>", pairs.end_id)]
    )
    engine.enable_truncation(CONTEXT)
    engine.enable_padding(length=CONTEXT)
    return lambda texts: torch.tensor([e.ids for e in engine.encode_batch_fast(texts)])


def transformers_tokenizer() -> Callable[[list[str]], object]:
    from transformers import CLIPTokenizerFast

    pairs = BytePairs()
    names = [*pairs.pieces, "<|startoftext|>", "<|endoftext|>"]
    fast = CLIPTokenizerFast(vocab={p: i for i, p in enumerate(names)}, merges=list(pairs.merges))
    return lambda texts: fast(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")


def measure(name: str, texts: list[str], checked: list[str], options: argparse.Namespace) -> cases.Case:
    from open_clip import get_tokenizer

    peer, ours, plain = get_tokenizer("ViT-B-32"), ClipTokenizer(), ClipTokenizer(accelerate=False)
    candidates: dict[str, Callable[[], object]] = {
        PEER: lambda: peer(texts),
        "chiasm": lambda: ours.encode(texts),
        PLAIN: lambda: plain.encode(texts),
    }
    rivals: dict[str, float | None] = {}
    if name in PLAIN_FLOORS:  # lone surrogates, as among the odd texts, are refused by both
        rivals = {RUST: None, FAST_HF: None}
        for key, call in ((RUST, rust_tokenizer()), (FAST_HF, transformers_tokenizer())):
            candidates[key] = lambda call=call: call(texts)
    timings = timing.interleave(candidates, max(9, options.repetitions), loops=5 if name == "tokenizer_prompts" else 1)
    truth = peer(checked)
    differing = int((ours.encode(checked).ids != truth).any(1).sum())
    without = timing.ratio(timings[PEER], timings[PLAIN])
    details = {
        "texts": len(texts), "texts_checked": len(checked),
        "need_cleaning": round(sum(SIMPLE_TEXT.fullmatch(t) is None for t in texts) / len(texts), 3),
        "without_accelerator": {
            "ratio_cpu": without["cpu"], "ratio_wall": without["wall"], "floor": PLAIN_FLOORS.get(name),
            "differing": int((plain.encode(checked).ids != truth).any(1).sum()),
        },
    }  # fmt: skip
    return cases.compare(
        name, PEER, timings, error=differing, error_kind="texts whose ids differ", error_bound=0,
        rivals=rivals, details=details,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    varied_texts = runpy.run_path(str(GOLDEN))["varied_texts"]
    odd = varied_texts(5000, 1)
    makers: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
        "tokenizer_prompts": lambda: (make_prompts(), [*make_prompts(), *odd]),
        "tokenizer_varied": lambda: (make_varied(1000), [*make_varied(5000), *odd]),
        "tokenizer_odd": lambda: (odd[:1000], odd),
    }
    found = [measure(name, *make(), options) for name, make in makers.items() if name in (options.case or makers)]
    cases.report("tokenizer", found, options, ["open_clip_torch", "instant-clip-tokenizer", "tokenizers", "ftfy"])


if __name__ == "__main__":
    main()
