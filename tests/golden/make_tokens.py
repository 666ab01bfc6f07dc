"""Write clip_tokens.json: our own strings with the ids that open_clip gives them. Run by `make golden`, never by hand.

The default test suite compares with this file, so it needs no peer; tests/parity draws thousands more of these strings.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

PHRASES = (
    "a chest radiograph showing bilateral pleural effusion",
    "No evidence of pneumothorax.",
    "T2-weighted FLAIR axial, 3.5 mm slices; lesion 12x9 mm (previously 10x8)",
    "the patient's heart isn't enlarged, they've said; we'll see, I'm sure he'd say you're right",
    "H&E stain, 20x, 0.5 um/px",
    "adenocarcinoma, moderately differentiated (G2), pT2 pN1 cM0",
    "FOLLOW-UP CT: LLL consolidation RESOLVED!!!",
    "r/o PE vs. MI -- d-dimer >500 ng/mL @ 37.2C, SpO2 98% #urgent *stat* ~5 days [sic] {a} |b| ^c _d_ `e` \\f $9 +/-",
    "  leading, trailing and   inner   spaces \t tabs \n lines \r\n returns ",
)
ODD = (
    "", " ", "a", "!", "'s", "''s's 'S", "0123456789", "..!?..'ll", "x" * 300, "ab" * 90, "a b " * 60,
    "<start_of_text>", "a <START_OF_TEXT> b <end_of_text> c", "<|startoftext|>", "</w> a</w>b", "&", "&&&amp", "AT&T",
    "<end_of_text> " * 60, "é" * 200,
    "&lt;b&gt; &amp;lt;i&amp;gt; &amp;amp;amp; &#233; &#xe9; &eacute; &nbsp; &notin; &bogus; &#xD800; &#0; &#127; &#1;",
    "“quoted” ‘s it’s — – … • ½ µm Å ﬁbrosis ﬀ Ｗｉｄｅ №5 ™ ²H 10⁻³ ≥ ≤ ± × ÷ °C → ∅",
    "'ſ 'ſa <ſtart_of_text> K Å İstanbul ıssız ß ẞ ǅ ΣΑΣ Ωmega µ",
    "cafÃ© naÃ¯ve â€œmojibakeâ€\x9d l’hôpital Ã¼ber", "e\u0301 n\u0303 a\u030a\u0323",
    "à la carte Ünïcödé Żółć Ðe Þorn",
    "漢字とかな 한국어 العربية עברית हिन्दी ภาษาไทย Ελληνικά кириллица ქართული አማርኛ",
    "🫁 👨‍👩‍👧 🏳️‍🌈 ❤️ 🇨🇭 \U0001f9ec\U0001f3fd", "\u0660\u0661\u0662 \u0967\u0968 ⅣⅫ ①② ߁ 𝟘𝟙 𝔸𝕓𝐜",
    "\x00\x01\x07\x08\x0b\x0c\x0e\x1b[31mred\x1b[0m\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xa0\xad",
    "zero\u200bwidth\u200c\u200d\u2060\ufeff\u00adsoft \u2028line\u2029para\u180e\u3000wide\u202ertl",
    "\ufffd\ufffe\uffff",
    "\ud800 \udc00 \ud83e\udec1 \udfff\ud800", "\U0010ffff\U000e0001 \ue000 private",
    "\u1c89\ua7cb\U00010d40 new letters",
)  # fmt: skip
#: What the accelerator has to agree on before it is used: ASCII of every kind.
CHECKS = (
    "", "a", " ", "!", "a chest radiograph", "Left-sided pneumothorax, 3 cm.", "no evidence of pleural effusion!",
    "the patient's heart isn't enlarged; they've we'll I'm he'd you're", "T2-weighted FLAIR 0123456789", "\t\r\n x \n",
    "CT/MR (1.5T) @ 50% #7 *~^_`{|}[]<>=+", "'S 'T 'RE 'quoted' ''s 's's", "supercalifragilisticexpialidocious",
    "</w> < / w > a</w>b", "...!!!???", "$100,000.00 -- #hashtag @user", "x" * 40, "a b c " * 40, "ab" * 90,
    "H&E", "a & b", "&", "AT&T's", "<start_of_text>", "a <END_OF_TEXT> b", "<|startoftext|>", "''s''t'", "'LL'd",
    "0", "00", "1a2b", "a1", "UPPER lower MiXeD", "snake_case CamelCase kebab-case", "C:\\path\\file.dcm", "a\\nb",
    "adenocarcinoma, moderately differentiated (G2), pT2 pN1 cM0", "H. pylori +++", "r/o PE vs. MI", "37.2C",
    "q.d. b.i.d. p.r.n.", "~5 days [sic] {a} |b|", "e.g., i.e., cf.", "http://x.org/?q=1#top", "\"double\" 'single'",
    "3x4x5mm", "12-lead ECG; QTc=440ms", "HER2/neu IHC 3+", "Ki-67 (MIB-1) 20%", "BI-RADS 4b", "zzzzqqqqxxxx jjjj",
)  # fmt: skip
CHECK_FILE = Path(__file__).parents[2] / "src/chiasm/data/vocabulary/accelerator_check.json"


def varied_texts(n: int, seed: int) -> list[str]:
    """Return ``n`` strings of every class that a tokenizer may stumble over: the fixed ones first, then random ones."""
    draw = random.Random(seed)
    words = " ".join(PHRASES + tuple(t for t in ODD if len(t) < 200)).split(" ")
    ranges = ((32, 126), (0, 0x250), (0, 0x30FF), (0x1F000, 0x1FAFF), (0, 0x10FFFF), (0x2000, 0x2FFF))

    def random_text() -> str:
        kind = draw.randrange(10)
        if kind < 4:
            return " ".join(draw.choices(words, k=draw.randint(0, 14)))
        if kind < 8:
            low, high = draw.choice(ranges)
            return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(0, 60)))
        if kind == 8:
            return " ".join(draw.choices(words, k=90))
        return draw.choice(words).encode("utf-8", "replace").decode("latin-1") * draw.randint(1, 6)

    fixed = [*PHRASES, *ODD]
    return (fixed + [random_text() for _ in range(max(0, n - len(fixed)))])[:n]


def main() -> None:
    import open_clip

    texts = varied_texts(130, seed=20)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    rows = [[int(i) for i in tokenizer(text)[0]] for text in texts]
    records = [[text, without_padding(row)] for text, row in zip(texts, rows, strict=True)]
    path = Path(__file__).with_name("clip_tokens.json")
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="ascii")
    print(f"{path.name}: {len(records)} strings, {path.stat().st_size} bytes, open_clip {open_clip.__version__}")
    checks = [[text, tokenizer.encode(text)] for text in CHECKS]
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in checks)
    CHECK_FILE.write_text(f"[\n{lines}\n]\n", encoding="ascii")
    print(f"{CHECK_FILE.name}: {len(checks)} strings")


def without_padding(row: list[int]) -> list[int]:
    """Cut a row behind its last end token."""
    return row[: len(row) - row[::-1].index(49407)]


if __name__ == "__main__":
    main()
