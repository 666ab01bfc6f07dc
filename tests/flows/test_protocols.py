"""Published protocols on their own models at reduced depth: prompts, padding, lengths and regions reach the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from chiasm.cli.main import app
from chiasm.embed import embed_images, embed_texts
from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.catalog import CATALOG
from chiasm.evaluate.local_similarity import local_similarities
from chiasm.load import save_encoder
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.protocol import get_protocol
from chiasm.tasks.protocol_prompts import make_prompts
from chiasm.tasks.protocol_run import run_protocol
from chiasm.testing import make_test_images

BERT = {"width": 32, "layers": 4, "heads": 2, "mlp_width": 48, "vocab_size": 64}
RESNET = {"width": 8, "layers": [1, 1, 1, 1]}
#: Towers at reduced size: image side, image options, text options, joint dimension.
SMALL: dict[str, tuple[int, dict[str, Any], dict[str, Any], int]] = {
    "medclip-resnet": (64, RESNET, {**BERT, "positions": 77}, 24),
    "gloria": (64, {**RESNET, "output_dim": 32, "upsample": 75}, {**BERT, "positions": 97}, 32),
    "biovil": (64, {**RESNET, "output_dim": 16}, {**BERT, "positions": 512, "output_dim": 16}, 16),
}
LISTS = {
    "Edema": {"severity": ["", "mild", "presistent moderate"], "subtype": ["edema", "lung edema"], "location": [""]},
    "Effusion": {"severity": ["small", "large"], "location": ["left", "right"], "subtype": ["effusion"]},
}
Make = Callable[[str], Encoder]


@pytest.fixture(scope="session")
def small() -> Make:
    """Return a named model at reduced size, with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {p: i for i, p in enumerate([*pieces, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")])}
    engine = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )

    def build(name: str) -> Encoder:
        size, image, text, dim = SMALL[name]
        named = CATALOG.get(name).config
        own = {"kind": "huggingface", "tokenizer": json.loads(engine.to_str()), "pad_token": "[PAD]"}
        kept = {k: v for k, v in named.tokenizer.items() if k not in ("source", *own)}
        spec = named.preprocess
        config = replace(
            named,
            image=replace(named.image, image_size=size, options=image),
            text=replace(named.text, options=text),
            projection=replace(named.projection, dim=dim),
            preprocess=replace(spec, size=size, resize_size=None if spec.resize_size is None else size + 8),
            tokenizer={**own, **kept},
        )
        return Encoder(build_encoder_model(config, seed=1), config, name=name)

    return build


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{k}.png" for k in range(4)]
    for path, image in zip(paths, make_test_images(4), strict=True):
        image.save(path)
    return paths


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_medclip_pads_each_class_to_its_own_longest_prompt(small: Make, pictures: list[Path]) -> None:
    encoder = small("medclip-resnet")
    protocol = get_protocol("medclip-chexpert5x200")
    made = make_prompts(protocol, LISTS)
    images = embed_images(encoder, pictures)
    scale = encoder.logit_scale
    assert scale is not None

    def run(variant: str, **options: Any) -> np.ndarray:
        embed = partial(embed_texts, encoder, **options)
        return run_protocol(protocol, images, embed, prompts=made, variant=variant).logits

    together = [unit(encoder.encode_text(list(p.positive)).numpy()) for p in made.prompts.labels]
    expected = np.stack([(scale * images.vectors @ rows.T).max(1) for rows in together], axis=1)
    np.testing.assert_allclose(run("published"), expected, rtol=1e-5, atol=1e-5)
    means = np.stack([(scale * images.vectors @ rows.T).mean(1) for rows in together], axis=1)
    np.testing.assert_allclose(run("ensemble"), means, rtol=1e-5, atol=1e-5)
    alone = [unit(np.concatenate([encoder.encode_text([t]).numpy() for t in p.positive])) for p in made.prompts.labels]
    single = np.stack([(scale * images.vectors @ rows.T).max(1) for rows in alone], axis=1)
    np.testing.assert_allclose(run("corrected"), single, rtol=1e-5, atol=1e-5)
    assert np.abs(single - expected).max() > 1e-3  # the trap: padding counts
    np.testing.assert_allclose(run("corrected", batch_size=1), single, rtol=1e-5, atol=1e-5)


def test_chexzero_averages_the_probabilities_of_its_members(pictures: list[Path]) -> None:
    from chiasm.encoders.ensemble import EnsembleModel
    from chiasm.testing import TinyEncoder

    singles = [TinyEncoder(seed) for seed in range(3)]
    config = replace(singles[0].config, members=3)
    encoder = Encoder(EnsembleModel([s.model for s in singles], config), config, name="chexzero-x3")
    protocol = get_protocol("chexzero-chexpert14")
    made = make_prompts(protocol, ["Edema", "Fracture"])

    def run(of: Encoder) -> np.ndarray:
        return run_protocol(protocol, embed_images(of, pictures), partial(embed_texts, of), prompts=made).probabilities

    each = np.stack([run(single) for single in singles])
    np.testing.assert_allclose(run(encoder), each.mean(0), atol=1e-6)
    for k, single in enumerate(singles):  # one member by plain loops
        image = unit(np.asarray(single.encode(pictures)))
        cosines = [image @ unit(single.encode_text([text])[0].numpy()) for text in ("Edema", "no Edema")]
        expected = np.exp(cosines[0]) / (np.exp(cosines[0]) + np.exp(cosines[1]))
        np.testing.assert_allclose(each[k][:, 0], expected, atol=1e-6)


def test_biovil_averages_its_own_raw_vectors(small: Make, pictures: list[Path]) -> None:
    encoder = small("biovil")
    protocol = get_protocol("biovil-rsna")
    result = run_protocol(
        protocol,
        embed_images(encoder, pictures),
        partial(embed_texts, encoder, normalize=not protocol.needs_raw_texts()),
    )
    label = result.prompts.labels[0]
    sides = [unit(encoder.encode_text(list(side)).numpy().mean(0)) for side in (label.positive, label.negative)]
    seen = embed_images(encoder, pictures).vectors
    np.testing.assert_allclose(result.logits[:, 0], seen @ (sides[0] - sides[1]), atol=1e-6)
    assert encoder.logit_scale is None
    assert result.logit_scale_source == "protocol"


@pytest.mark.parametrize("variant", ["published", "corrected", "words"])
def test_gloria_from_the_command_line(small: Make, pictures: list[Path], tmp_path: Path, variant: str) -> None:
    encoder = small("gloria")
    save_encoder(encoder, tmp_path / "gloria")
    lists = tmp_path / "constants.py"
    lists.write_text(f"CHEXPERT_CLASS_PROMPTS = {LISTS!r}\n")
    words = ["zero-shot", *map(str, pictures), "--protocol", "gloria-chexpert5x200", "--variant", variant]
    done = CliRunner().invoke(app, [*words, "--labels-file", str(lists), "--model", str(tmp_path / "gloria"), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    found = np.array([[image["logits"][label] for label in record["labels"]] for image in record["images"]])
    prompts = PromptSet(
        tuple(LabelPrompts(k, tuple(v["positive"])) for k, v in record["prompts"]["labels"].items()),
    )
    texts = prompts.texts()
    whole = embed_images(encoder, pictures).vectors @ embed_texts(encoder, texts).vectors.T
    counted = "characters" if variant == "published" else "words"
    both = (whole + local_similarities(encoder, pictures, texts, words=counted)) / 2  # type: ignore[arg-type]
    classes = np.stack([both[:, [texts.index(t) for t in p.positive]].max(1) for p in prompts.labels], axis=1)
    if variant != "corrected":
        classes = (classes - classes.mean(0)) / classes.std(0)
    np.testing.assert_allclose(found, classes, rtol=1e-3, atol=1e-3)
    assert not any("global half" in note for note in record["notes"])
    assert "warning: protocol" not in done.output  # the model bears its family's name
