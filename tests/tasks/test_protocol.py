"""Published protocols: every file is whole, and runs give the numbers of independent re-implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError, InputError, SpaceMismatch, UnknownName
from chiasm.tasks.prompts import LabelPrompts, PromptSet, PromptWarning
from chiasm.tasks.protocol import Protocol, Variant, get_protocol, protocols, protocols_for
from chiasm.tasks.protocol_prompts import make_prompts
from chiasm.tasks.protocol_run import choose_j, run_protocol, run_protocol_on_slides

Make = Callable[..., Any]
DIM = 6
CLASSES = PromptSet(
    (LabelPrompts("a", ("a1", "a2", "a1")), LabelPrompts("b", ("b1", "b2")), LabelPrompts("c", ("c1",)))
)
PAIRS = PromptSet((LabelPrompts("a", ("a1", "a2"), ("not a",)), LabelPrompts("b", ("b1",), ("not b", "b absent"))))


def vector(text: str) -> np.ndarray:
    """A vector of any text: its own direction and its own length."""
    rng = np.random.default_rng([ord(c) for c in text])
    return rng.normal(size=DIM) * rng.uniform(0.5, 5)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def texts(make: Make) -> Callable[..., Any]:
    """Embed any text; ``raw=False`` gives unit vectors, and every call is remembered."""

    def build(raw: bool = True, **fields: Any) -> Any:
        def embed(batch: list[str]) -> Any:
            embed.calls.append(list(batch))  # type: ignore[attr-defined]
            found = make([vector(t) for t in batch], "text", texts=tuple(batch), **fields)
            return found if raw else found.normalize()

        embed.calls = []  # type: ignore[attr-defined]
        return embed

    return build


@pytest.fixture
def images(make: Make) -> Any:
    return make(np.random.default_rng(11).normal(size=(5, DIM)))


# --- the files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(protocols()))
def test_every_protocol_is_complete(name: str, images: Any, texts: Make) -> None:
    protocol = get_protocol(name)
    assert protocol.source
    assert protocol.families
    assert protocol.reproduced
    assert ("corrected" in protocol.variants) <= bool(protocol.defects)
    assert protocol.to_dict()["name"] == name
    if protocol.labels or protocol.prompts:
        with pytest.warns(PromptWarning) if name.startswith("chexzero") else _nothing():
            own = make_prompts(protocol)
        result = run_protocol(protocol, images, texts(), prompts=own)
        assert result.protocol == name
        assert result.variant == "published"
        assert np.isfinite(result.logits).all()
    else:
        with pytest.raises(InputError) as error:
            make_prompts(protocol)
        assert error.value.hint
        assert protocol.needs or protocol.templates


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_prompts_that_the_sources_print() -> None:
    biovil = make_prompts(get_protocol("biovil-rsna")).prompts.labels[0]
    assert len(biovil.positive) == len(biovil.negative) == 4
    assert biovil.positive[2] == "This opacity can represent pneumonia"
    pcam = make_prompts(get_protocol("biomedclip-pcam")).prompts
    assert pcam.labels[1].positive == (
        "this is an image of lymph node metastasis",
        "lymph node metastasis presented in image",
    )
    assert make_prompts(get_protocol("biomedclip-lc25000-colon")).prompts.labels[0].positive[0] == (
        "a photo of colon adenocarcinomas"
    )
    assert make_prompts(get_protocol("biomedclip-rsna")).prompts.labels[0].positive == ("normal lung",)
    openai = make_prompts(get_protocol("openai-imagenet"), ["cat", "dog"]).prompts
    assert len(openai.labels[0].positive) == len(set(openai.labels[0].positive)) == 80
    assert "a photo of a cat." in openai.labels[0].positive


def test_unknown_names_and_variants() -> None:
    with pytest.raises(UnknownName, match="did you mean `gloria-chexpert5x200`"):
        get_protocol("gloria-chexpert5x20")
    with pytest.raises(UnknownName) as error:
        get_protocol("conch").variant("corrected")
    assert "no defect" in str(error.value)
    with pytest.raises(UnknownName):
        get_protocol("medclip-two-class").variant("fixed")


def test_families() -> None:
    assert get_protocol("chexzero-chexpert14").fits("my-file", "chexzero")
    assert get_protocol("openai-imagenet").fits("openai/ViT-B-32")
    assert not get_protocol("openai-imagenet").fits("biomedclip", None)
    assert get_protocol("biovil-rsna").fits("BioViL-T")


def test_protocols_run_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, chiasm.tasks.protocol_run as r, chiasm.tasks.protocol as p; p.protocols(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_protocols_of_a_model() -> None:
    assert [p.name for p in protocols_for("chexzero")] == ["chexzero-chexpert14"]
    assert {p.name for p in protocols_for("my-copy", "conch")} == {"conch", "conch-slides"}
    assert protocols_for("uni", None) == ()


def test_every_named_model_with_two_towers_knows_its_protocol() -> None:
    from chiasm.encoders.catalog import CATALOG

    without = {n for n in CATALOG.names() if CATALOG.get(n).config.sides == "both" and not protocols_for(n)}
    assert without == set()


def test_the_page_in_the_docs_is_the_data() -> None:
    """`python tools/make_protocols_page.py` writes docs/protocols.md; correct the data, not the page."""
    import importlib.util
    from pathlib import Path

    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("make_protocols_page", root / "tools" / "make_protocols_page.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert (root / "docs" / "protocols.md").read_text(encoding="utf-8") == page.render(), (
        "run tools/make_protocols_page.py"
    )


def test_a_protocol_without_published_form_is_refused() -> None:
    values: dict[str, Any] = {
        "name": "x", "title": "x", "source": "x", "evidence": "read", "families": ("x",), "mode": "single",
        "aggregator": "max_prompt", "reproduced": "x",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="published"):
        Protocol(**values, variants={"corrected": Variant("x")})
    with pytest.raises(ConfigError, match="as many"):
        Protocol(**values, variants={"published": Variant("x")}, templates=("{}",), negative_templates=("a", "b"))


# --- runs against oracles ------------------------------------------------------------------------------------------


def test_mean_embedding(images: Any, texts: Make) -> None:
    result = run_protocol(get_protocol("conch"), images, texts(raw=False, logit_scale=50.0), prompts=CLASSES)
    directions = unit(np.stack([unit(np.stack([vector(t) for t in p.positive])).mean(0) for p in CLASSES.labels]))
    cosines = unit(images.vectors.astype(np.float64)) @ directions.T
    exponentials = np.exp(50 * cosines)
    np.testing.assert_allclose(result.probabilities, exponentials / exponentials.sum(1, keepdims=True), atol=2e-5)
    assert (result.logit_scale, result.logit_scale_source) == (50.0, "model")


def test_a_stated_scale_stands_for_the_models(images: Any, texts: Make) -> None:
    found = run_protocol(get_protocol("quiltnet"), images, texts(logit_scale=30.0), prompts=CLASSES)
    assert (found.logit_scale, found.logit_scale_source) == (100.0, "protocol")
    other = run_protocol(get_protocol("conch"), images, texts(logit_scale=30.0), prompts=CLASSES)
    np.testing.assert_allclose(found.logits / 100, other.logits / 30, atol=1e-6)
    assert [get_protocol(n).stated_scale for n in ("conch", "plip", "quiltnet")] == [None, 1.0, 100.0]


def test_biovil_averages_raw_vectors(images: Any, texts: Make) -> None:
    protocol = get_protocol("biovil-rsna")
    result = run_protocol(protocol, images, texts())
    label = result.prompts.labels[0]
    raw = [unit(np.stack([vector(t) for t in side]).mean(0)) for side in (label.positive, label.negative)]
    seen = unit(images.vectors.astype(np.float64))
    np.testing.assert_allclose(result.logits[:, 0], seen @ raw[0] - seen @ raw[1], atol=1e-6)
    np.testing.assert_array_equal(result.probabilities[:, 0] > 0.5, seen @ raw[0] > seen @ raw[1])
    units = [unit(unit(np.stack([vector(t) for t in side])).mean(0)) for side in (label.positive, label.negative)]
    assert np.abs(result.logits[:, 0] - (seen @ units[0] - seen @ units[1])).max() > 0.01  # the trap
    assert result.logit_scale_source == "protocol"
    scaled = run_protocol(protocol, images, texts(logit_scale=20.0, logit_bias=-10.0))  # a model's scale is not used
    np.testing.assert_array_equal(scaled.logits, result.logits)
    assert scaled.logit_bias is None
    with pytest.raises(InputError, match="raw"):
        run_protocol(protocol, images, texts(raw=False))


def chexzero_oracle(images: np.ndarray, prompts: PromptSet, members: int) -> np.ndarray:
    """CheXzero's recipe in plain loops: per model a softmax over two cosines, then the mean over models."""
    width = images.shape[1] // members
    total = np.zeros((len(images), len(prompts.labels)))
    for m in range(members):
        part = slice(m * width, (m + 1) * width)
        for i, image in enumerate(images[:, part]):
            for k, label in enumerate(prompts.labels):
                cosine = []
                for side in (label.positive, label.negative):
                    weights = np.mean([unit(vector(t)[part]) for t in side], axis=0)
                    cosine.append(float(unit(image) @ unit(weights)))
                total[i, k] += math.exp(cosine[0]) / (math.exp(cosine[0]) + math.exp(cosine[1]))
    return total / members


def test_chexzero_without_scale(images: Any, texts: Make) -> None:
    protocol = get_protocol("chexzero-chexpert14")
    result = run_protocol(protocol, images, texts(logit_scale=100.0), prompts=PAIRS)
    np.testing.assert_allclose(result.probabilities, chexzero_oracle(images.vectors, PAIRS, 1), atol=1e-6)
    np.testing.assert_allclose(result.logits, result.cosines - result.negative_cosines, atol=1e-6)
    assert (result.mode, result.activation, result.logit_scale) == ("multi", "pair", 1.0)
    with pytest.raises(InputError, match="alone"):
        run_protocol(protocol, images, texts(), prompts=PAIRS, mode="single")
    with pytest.raises(InputError, match="no negative"):
        run_protocol(protocol, images, texts(), prompts=CLASSES)


def test_chexzero_averages_the_members_probabilities(make: Make) -> None:
    rng = np.random.default_rng(1)
    images = rng.normal(size=(4, DIM))
    joined = unit(images.reshape(4, 2, 3)).reshape(4, DIM) / math.sqrt(2)

    def embed(batch: list[str]) -> Any:
        rows = np.stack([vector(t) for t in batch])
        rows = unit(rows.reshape(-1, 2, 3)).reshape(-1, DIM) / math.sqrt(2)
        return make(rows, "text", normalized=True, members=2)

    result = run_protocol(
        get_protocol("chexzero-chexpert14"), make(joined, normalized=True, members=2), embed, prompts=PAIRS
    )
    np.testing.assert_allclose(result.probabilities, chexzero_oracle(images, PAIRS, 2), atol=1e-6)
    one = chexzero_oracle(joined, PAIRS, 1)
    assert np.abs(result.probabilities - one).max() > 1e-4  # the trap: one softmax over the mean cosine


def test_no_finding_is_inverted_as_published_and_mended_on_request(images: Any, texts: Make) -> None:
    protocol = get_protocol("chexzero-chexpert14")
    with pytest.warns(PromptWarning, match="negates twice"):
        published = make_prompts(protocol).prompts
    assert published.labels[8] == LabelPrompts("No Finding", ("No Finding",), ("no No Finding",))
    assert len(published.labels) == 14
    with pytest.warns(PromptWarning, match="itself a negation"):
        corrected = make_prompts(protocol, variant="corrected").prompts
    assert "no No Finding" not in corrected.texts()
    others = [k for k in range(14) if k != 8]
    assert [published.labels[k] for k in others] == [corrected.labels[k] for k in others]
    result = run_protocol(protocol, images, texts(), prompts=corrected, variant="corrected")
    assert result.variant == "corrected"
    assert any("0.07" in note for note in result.notes)


@pytest.mark.parametrize("variant", ["published", "ensemble", "corrected", "ensemble-corrected"])
def test_medclip(images: Any, texts: Make, variant: str) -> None:
    embed = texts(logit_scale=30.0)
    result = run_protocol(get_protocol("medclip-two-class"), images, embed, prompts=CLASSES, variant=variant)
    how = np.mean if "ensemble" in variant else np.max
    for i in range(5):
        for k, label in enumerate(CLASSES.labels):
            logits = [30 * float(unit(images.vectors[i]) @ unit(vector(t))) for t in label.positive]
            assert result.logits[i, k] == pytest.approx(how(logits), abs=1e-4)
    batches = (
        [["a1"], ["a2"], ["b1"], ["b2"], ["c1"]] if "corrected" in variant else [["a1", "a2"], ["b1", "b2"], ["c1"]]
    )
    assert embed.calls == batches  # padding is that of the class, or none
    assert result.predicted == tuple("abc"[k] for k in result.logits.argmax(1))


def test_repeated_prompts_count_as_often_as_they_are_listed(images: Any, texts: Make) -> None:
    run = [
        run_protocol(get_protocol("medclip-two-class"), images, texts(), prompts=p, variant="ensemble")
        for p in (CLASSES, PromptSet((LabelPrompts("a", ("a1", "a2")), *CLASSES.labels[1:])))
    ]
    assert np.abs(run[0].logits[:, 0] - run[1].logits[:, 0]).max() > 1e-3
    np.testing.assert_allclose(run[0].logits[:, 1:], run[1].logits[:, 1:])


def test_medclip_with_pairs_answers_several_labels(images: Any, texts: Make) -> None:
    result = run_protocol(get_protocol("medclip-two-class"), images, texts(), prompts=PAIRS, mode="multi")
    label = PAIRS.labels[1]
    seen = unit(images.vectors.astype(np.float64))
    best = [np.max([seen @ unit(vector(t)) for t in side], axis=0) for side in (label.positive, label.negative)]
    np.testing.assert_allclose(result.logits[:, 1], 100 * (best[0] - best[1]), atol=1e-4)
    with pytest.raises(InputError, match="exclude each other"):
        run_protocol(get_protocol("medclip-two-class"), images, texts(), prompts=CLASSES, mode="multi")


def gloria_oracle(images: np.ndarray, local: dict[str, np.ndarray]) -> np.ndarray:
    rows = []
    for image_row, image in enumerate(images):
        row = []
        for label in CLASSES.labels:
            both = [(float(unit(image) @ unit(vector(t))) + local[t][image_row]) / 2 for t in label.positive]
            row.append(max(both))
        rows.append(row)
    return np.array(rows)


def test_gloria(images: Any, texts: Make) -> None:
    protocol = get_protocol("gloria-chexpert5x200")
    table = {t: np.random.default_rng(len(t) + ord(t[0])).normal(size=5) for t in CLASSES.texts()}
    asked: list[str] = []

    def local(batch: list[str], words: str) -> np.ndarray:
        asked.append(words)
        return np.stack([table[t] for t in batch], axis=1)

    plain = gloria_oracle(images.vectors.astype(np.float64), table)
    z = (plain - plain.mean(0)) / plain.std(0)
    for variant, expected, words in (
        ("published", z, "characters"),
        ("words", z, "words"),
        ("corrected", plain, "words"),
    ):
        asked.clear()
        result = run_protocol(protocol, images, texts(), prompts=CLASSES, variant=variant, local=local)
        np.testing.assert_allclose(result.logits, expected, atol=1e-5)
        assert set(asked) == {words}
        assert result.predicted == tuple("abc"[k] for k in expected.argmax(1))
    part = images.select([0, 1])
    halves = {t: v[:2] for t, v in table.items()}

    def some(batch: list[str], words: str) -> np.ndarray:
        return np.stack([halves[t] for t in batch], axis=1)

    def scores(variant: str, local: Any, of: Any) -> np.ndarray:
        return run_protocol(protocol, of, texts(), prompts=CLASSES, variant=variant, local=local).logits[:2]

    assert np.abs(scores("published", local, images) - scores("published", some, part)).max() > 0.1
    np.testing.assert_allclose(scores("corrected", local, images), scores("corrected", some, part), atol=1e-12)


def test_gloria_without_its_local_half_says_so(images: Any, texts: Make) -> None:
    protocol = get_protocol("gloria-chexpert5x200")
    result = run_protocol(protocol, images, texts(), prompts=CLASSES, variant="corrected")
    assert any("global half" in note for note in result.notes)
    np.testing.assert_allclose(result.logits, result.cosines, atol=1e-6)
    one = run_protocol(protocol, images.select([0]), texts(), prompts=CLASSES, mode="multi")
    assert any("single image" in note for note in one.notes)
    assert one.activation == "sigmoid"
    with pytest.raises(InputError, match="finite"):
        run_protocol(protocol, images, texts(), prompts=CLASSES, local=lambda t, w: np.zeros((1, 1)))


def test_plip_by_its_evaluation_and_by_its_wrapper(make: Make, texts: Make) -> None:
    protocol = get_protocol("plip")
    images = make(np.random.default_rng(4).normal(size=(200, DIM)))
    prompts = make_prompts(protocol, ["a", "b", "c"], templates="an image of {}").prompts
    rows = np.stack([vector(f"an image of {c}") for c in "abc"])
    published = run_protocol(protocol, images, texts(), prompts=prompts)
    np.testing.assert_allclose(published.logits, unit(images.vectors) @ unit(rows).T, atol=1e-6)
    wrapper = run_protocol(protocol, images, texts(), prompts=prompts, variant="wrapper")
    np.testing.assert_allclose(wrapper.logits, unit(images.vectors) @ rows.T, rtol=1e-5, atol=1e-5)
    longest = "abc"[int(np.linalg.norm(rows, axis=1).argmax())]  # the trap: the longest text wins more often
    assert wrapper.predicted.count(longest) > published.predicted.count(longest)
    assert protocol.needs_raw_texts("wrapper")
    assert not protocol.needs_raw_texts()
    with pytest.raises(InputError, match="raw"):
        run_protocol(protocol, images, texts(raw=False), prompts=prompts, variant="wrapper")


def test_slides(make: Make, texts: Make) -> None:
    tiles = make(np.random.default_rng(2).normal(size=(9, DIM)), patients=("p",) * 6 + ("q",) * 3)
    slides = ["s1", "s2", "s1", "s2", "s1", "s2", "s3", "s3", "s3"]
    embed = texts(raw=False, logit_scale=10.0)
    results = run_protocol_on_slides(get_protocol("conch-slides"), tiles, embed, slides, prompts=CLASSES)
    assert list(results) == [1, 5, 10, 50, 100]
    directions = unit(np.stack([unit(np.stack([vector(t) for t in p.positive])).mean(0) for p in CLASSES.labels]))
    cosines = unit(tiles.vectors.astype(np.float64)) @ directions.T
    for j, result in results.items():
        assert result.ids == ("s1", "s2", "s3")
        assert result.groups == ("p", "p", "q")
        for row, slide in enumerate(result.ids):
            own = cosines[[i for i, s in enumerate(slides) if s == slide]]
            for k in range(3):
                best = sorted(own[:, k], reverse=True)[:j]
                assert result.logits[row, k] == pytest.approx(10 * sum(best) / len(best), abs=1e-5)
        assert any("fewer than" in n for n in result.notes) == (j >= 5)
    raw = run_protocol_on_slides(get_protocol("mi-zero"), tiles, texts(), slides, prompts=CLASSES)
    assert np.abs(raw[1].cosines - results[1].cosines).max() > 1e-3
    with pytest.raises(InputError, match="several patients"):
        run_protocol_on_slides(get_protocol("conch-slides"), tiles, embed, ["s"] * 9, prompts=CLASSES)
    with pytest.raises(InputError, match="2 slides"):
        run_protocol_on_slides(get_protocol("conch-slides"), tiles, embed, ["s"] * 2, prompts=CLASSES)
    with pytest.raises(InputError, match="run_protocol_on_slides"):
        run_protocol(get_protocol("conch-slides"), tiles, embed, prompts=CLASSES)
    with pytest.raises(InputError, match="not for slides"):
        run_protocol_on_slides(get_protocol("conch"), tiles, embed, slides, prompts=CLASSES)


def test_j_is_chosen_by_the_best_score_and_then_the_fewest_tiles() -> None:
    assert choose_j({1: 0.5, 5: 0.8, 10: 0.8, 50: float("nan")}) == 5
    with pytest.raises(InputError):
        choose_j({1: float("nan")})


def test_spaces_never_mix(make: Make, texts: Make) -> None:
    other = make(np.eye(DIM), name="other")
    for name, prompts in (("medclip-two-class", CLASSES), ("chexzero-chexpert14", PAIRS), ("conch", CLASSES)):
        with pytest.raises(SpaceMismatch):
            run_protocol(get_protocol(name), other, texts(), prompts=prompts)


@given(st.permutations(["a1", "a2", "a3", "a4"]))
def test_the_order_of_a_classs_prompts_does_not_matter(order: list[str]) -> None:
    from chiasm.types import Embeddings, Space

    space = Space("made", "0", "1", DIM)
    images = Embeddings(np.random.default_rng(0).normal(size=(3, DIM)), tuple("xyz"), space, "image", normalized=False)

    def embed(batch: list[str]) -> Embeddings:
        return Embeddings(
            np.stack([vector(t) for t in batch]), tuple(map(str, range(len(batch)))), space, "text", normalized=False
        )

    for name, variant in (
        ("conch", "published"),
        ("biovil-rsna", "published"),
        ("medclip-two-class", "published"),
        ("medclip-two-class", "ensemble"),
        ("gloria-chexpert5x200", "published"),
        ("chexzero-chexpert14", "published"),
    ):
        logits = [
            run_protocol(
                get_protocol(name),
                images,
                embed,
                variant=variant,
                prompts=PromptSet((LabelPrompts("a", tuple(texts), ("n",)), LabelPrompts("b", ("b1",), ("m",)))),
            ).logits
            for texts in (order, sorted(order))
        ]
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
