"""Learned prompts: they begin where the words are, learn what the images show, keep the encoder, and know their space."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chiasm
from chiasm.data.huggingface_tokenizer import HuggingFaceTokenizer
from chiasm.encoders.base import Encoder, EncoderConfig, ImageTowerConfig, ProjectionConfig, TextTowerConfig
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.ensemble import EnsembleModel
from chiasm.errors import CheckpointError, ChiasmError, ConfigError, InputError, LeakageError, SpaceMismatch
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.zero_shot import build_classifier, classifier_of_directions, classify
from chiasm.testing import TinyEncoder
from chiasm.train.prompt_tuning import load_prompts, nearest_words, save_prompts, tune_prompts
from chiasm.train.prompt_writer import PromptWriter, TuningConfig, replaced_tokens, token_table
from chiasm.types import Embeddings, Preprocess

NAMES = ("pneumothorax", "effusion")
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "no",
    "image",
    "an",
    "of",
    "a",
    "photo",
    "pneumothorax",
    "effusion",
    "x",
    ".",
)


def bert_encoder() -> Encoder:
    """A tiny BERT of transformers as the text tower."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    engine = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = HuggingFaceTokenizer(json.loads(engine.to_str()), 16, pad_token="[PAD]")
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"config": {**bert, "intermediate_size": 48, "vocab_size": len(WORDS)}}
    config = EncoderConfig(
        image=ImageTowerConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=TextTowerConfig(kind="huggingface", source="bert", context_length=16, pool="mean", options=options),
        projection=ProjectionConfig(dim=8),
        tokenizer=tokenizer.to_dict(),
        preprocess=Preprocess(size=16),
    )
    return Encoder(build_encoder_model(config, seed=0), config, name="tiny-bert", tokenizer=tokenizer)


def siglip_like() -> Encoder:
    """A native tower that sees its padding and pools at the last position."""
    tiny = TinyEncoder()
    text = dataclasses.replace(tiny.config.text, causal=False, pool="last")
    config = dataclasses.replace(tiny.config, text=text)
    return Encoder(build_encoder_model(config, seed=0), config, name="sees-padding")


def pictures(encoder: Encoder, n: int = 60, *, seed: int = 0) -> tuple[Embeddings, list[str]]:
    """Vectors near two directions that no words of the encoder name, two a patient."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(2, encoder.dim))
    truth = [NAMES[k // 2 % 2] for k in range(n)]
    rows = np.stack([centres[NAMES.index(c)] for c in truth]) + rng.normal(size=(n, encoder.dim))
    patients = tuple(f"p{k // 2}" for k in range(n))
    ids = tuple(map(str, range(n)))
    made = Embeddings(
        rows, ids, encoder.space, "image", normalized=False, logit_scale=encoder.logit_scale, patients=patients
    )
    return made.normalize(), truth


ENCODERS: list[Callable[[], Encoder]] = [TinyEncoder, bert_encoder, siglip_like]


@pytest.mark.parametrize("make", ENCODERS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_vectors_that_start_as_words_give_the_logits_of_the_words(
    make: Callable[[], Encoder], class_specific: bool
) -> None:
    encoder = make()
    config = TuningConfig(initial=("a photo of a",), class_specific=class_specific)
    with torch.no_grad():
        (directions,) = PromptWriter(encoder, NAMES, config).directions()
    images, _ = pictures(encoder, 8)
    learned = classifier_of_directions(NAMES, directions.numpy(), space=encoder.space, logit_scale=encoder.logit_scale)
    plain = PromptSet(tuple(LabelPrompts(n, (f"a photo of a {n}.",)) for n in NAMES))
    spoken = build_classifier(plain, lambda texts: chiasm.embed_texts(encoder, texts))
    np.testing.assert_allclose(classify(images, learned).logits, classify(images, spoken).logits, atol=1e-5)


@pytest.mark.parametrize("make", ENCODERS)
def test_training_lowers_the_loss_and_keeps_the_encoder(make: Callable[[], Encoder]) -> None:
    encoder = make()
    space, trains = encoder.space, [p.requires_grad for p in encoder.model.parameters()]
    images, truth = pictures(encoder)
    before = chiasm.embed_texts(encoder, ["a photo of a pneumothorax."]).vectors
    found = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(epochs=8, learning_rate=0.02))
    assert found.history[found.best_epoch]["validation_loss"] < found.history[0]["validation_loss"]
    assert encoder.space == space
    assert [p.requires_grad for p in encoder.model.parameters()] == trains
    assert all(p.grad is None for p in encoder.model.parameters())
    np.testing.assert_array_equal(chiasm.embed_texts(encoder, ["a photo of a pneumothorax."]).vectors, before)


def test_what_was_learned_holds_on_other_patients() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    unseen, answers = pictures(encoder, seed=1)
    found = tune_prompts(
        encoder, images, NAMES, truth, config=TuningConfig(epochs=20, learning_rate=0.02, class_specific=True)
    )
    learned = classifier_of_directions(found.labels, found.positive, space=found.space, logit_scale=found.logit_scale)
    assert np.mean(np.asarray(classify(unseen, learned).predicted) == np.asarray(answers)) > 0.9


def test_labels_that_do_not_exclude_each_other_learn_presence_and_absence() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    columns: dict[str, list[Any]] = {n: [int(c == n) for c in truth] for n in NAMES}
    columns["effusion"][3] = None
    config = TuningConfig(mode="multi", epochs=30, learning_rate=0.02, class_specific=True)
    found = tune_prompts(encoder, images, {"pneumothorax": "air", "effusion": "fluid"}, columns, config=config)
    assert found.spoken == ("air", "fluid")
    assert found.negative is not None
    learned = classifier_of_directions(
        found.labels, found.positive, found.negative, space=found.space, logit_scale=found.logit_scale
    )
    unseen, answers = pictures(encoder, seed=1)
    result = classify(unseen, learned, mode="multi")
    right = [(result.probabilities[k, 0] > 0.5) == (answers[k] == "pneumothorax") for k in range(len(unseen))]
    assert np.mean(right) > 0.8


def test_epoch_zero_is_kept_when_training_only_harms() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    config = TuningConfig(epochs=6, patience=2, learning_rate=3.0)
    found = tune_prompts(encoder, images, NAMES, np.random.default_rng(0).permutation(truth).tolist(), config=config)
    assert found.best_epoch == 0
    assert len(found.history) == 3
    with torch.no_grad():
        (start,) = PromptWriter(encoder, NAMES, config).directions()
    np.testing.assert_allclose(found.positive, start.numpy(), atol=1e-6)


def test_one_seed_gives_one_set_of_prompts_and_patients_stay_whole() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    options = {"epochs": 3, "vectors": 4}
    torch.manual_seed(1)
    first = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(**options))
    torch.manual_seed(2)
    second = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(**options))
    other = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(**options, seed=1))
    np.testing.assert_array_equal(first.positive, second.positive)
    assert np.abs(first.positive - other.positive).max() > 1e-4
    assert first.contexts["positive"].shape == (1, 4, 32)
    assert sum(first.rows) == 60
    assert first.rows[1] % 2 == 0
    assert first.rows[1] > 0


def test_one_patient_only_trains_on_all_rows() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 8)
    found = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(epochs=2), groups=["a"] * 8)
    assert found.rows == (8, 0)
    assert found.best_epoch == 2


def test_given_rows_choose_the_epoch_and_share_no_patient_with_the_others() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 16)
    found = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(epochs=2), held=range(12, 16))
    assert found.rows == (12, 4)
    with pytest.raises(LeakageError, match="1 patients teach"):
        tune_prompts(encoder, images, NAMES, truth, held=[15])
    with pytest.raises(InputError, match="left to teach"):
        tune_prompts(encoder, images, NAMES, truth, held=range(16))


def test_the_anchor_holds_prompts_near_their_words() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    with torch.no_grad():
        (start,) = PromptWriter(encoder, NAMES, TuningConfig()).directions()

    def moved(anchor: float) -> float:
        config = TuningConfig(epochs=4, learning_rate=0.02, patience=9, anchor=anchor)
        found = tune_prompts(encoder, images, NAMES, truth, config=config, groups=["a"] * 60)
        return float(np.square(found.positive - start.numpy()).sum())

    assert moved(500.0) < 0.5 * moved(0.0)


def test_saved_prompts_come_back_and_refuse_another_space(tmp_path: Path) -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder)
    columns = {n: [int(c == n) for c in truth] for n in NAMES}
    found = tune_prompts(encoder, images, NAMES, columns, config=TuningConfig(mode="multi", epochs=1))
    save_prompts(tmp_path / "learned", found)
    again = load_prompts(tmp_path / "learned", space=encoder.space)
    np.testing.assert_array_equal(again.positive, found.positive)
    assert again.negative is not None
    np.testing.assert_array_equal(again.contexts["negative"], found.contexts["negative"])
    assert (again.config, again.history, again.space) == (found.config, found.history, found.space)
    with pytest.raises(SpaceMismatch, match="learned in"):
        load_prompts(tmp_path / "learned", space=TinyEncoder(seed=1).space)
    description = tmp_path / "learned" / "prompts.json"
    description.write_text(description.read_text().replace('"spoken"', '"spokn"'))
    with pytest.raises(CheckpointError, match="lacks a part"):
        load_prompts(tmp_path / "learned")
    weights = tmp_path / "learned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="damaged"):
        load_prompts(tmp_path / "learned")


def test_the_nearest_words_of_untouched_vectors_are_their_own() -> None:
    encoder = bert_encoder()
    images, truth = pictures(encoder, 8)
    config = TuningConfig(epochs=1, learning_rate=1e-9, initial=("an image of",))
    found = tune_prompts(encoder, images, NAMES, truth, config=config)
    assert [words[0] for words in nearest_words(encoder, found)["positive"]] == ["an", "image", "of"]


def test_towers_that_cannot_be_tuned_say_so() -> None:
    encoder = TinyEncoder()
    config = dataclasses.replace(encoder.config, members=2)
    ensemble = Encoder(EnsembleModel([TinyEncoder(0).model, TinyEncoder(1).model], config), config, name="two")
    with pytest.raises(InputError, match="ensemble of 2"):
        token_table(ensemble)
    config = dataclasses.replace(encoder.config, sides="image")
    with pytest.raises(InputError, match="no text side"):
        token_table(Encoder(build_encoder_model(config, seed=0), config, name="eyes"))
    encoder.model.text = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="no table of token embeddings"):
        token_table(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": -1}, "tuning.vectors"),
        ({"epochs": 0}, "tuning.epochs"),
        ({"validation": 1.0}, "tuning.validation"),
        ({"mode": "both"}, "single or multi"),
        ({"mode": "multi", "initial": ("a",)}, "needs 2 texts"),
        ({"vectors": 4, "anchor": 1.0}, "starts from noise"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuningConfig(**change)


def test_wrong_rows_are_refused_without_naming_one() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 8)
    multi = TuningConfig(mode="multi")
    columns = {n: [0, 1] * 4 for n in NAMES}
    cases: list[tuple[Callable[[], object], type[ChiasmError], str]] = [
        (lambda: tune_prompts(TinyEncoder(seed=1), images, NAMES, truth), SpaceMismatch, "the encoder's space"),
        (
            lambda: tune_prompts(encoder, dataclasses.replace(images, modality="text"), NAMES, truth),
            InputError,
            "got text",
        ),
        (lambda: tune_prompts(encoder, images, NAMES, truth[:5]), InputError, "5 truth values for 8"),
        (lambda: tune_prompts(encoder, images, NAMES, ["secret"] * 8), InputError, "1 classes of the truth"),
        (lambda: tune_prompts(encoder, images, NAMES, [None] * 8), InputError, "no row is labelled"),
        (lambda: tune_prompts(encoder, images, NAMES, columns), InputError, "`single` one column"),
        (lambda: tune_prompts(encoder, images, NAMES, truth, config=multi), InputError, "`multi` needs a column"),
        (lambda: tune_prompts(encoder, images, [*NAMES, "x"], columns, config=multi), InputError, "`x` has no truth"),
        (lambda: tune_prompts(encoder, images, ["a"], ["a"] * 8), InputError, "two classes"),
        (lambda: tune_prompts(encoder, images, NAMES, truth, groups=["a"]), InputError, "1 groups for 8"),
        (lambda: tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(vectors=40)), InputError, "reads 32"),
    ]
    for attempt, error, message in cases:
        with pytest.raises(error, match=message):
            attempt()


def test_directions_that_do_not_fit_make_no_classifier() -> None:
    space = TinyEncoder().space
    with pytest.raises(InputError, match=r"shape \(3, 24\), expected \(2, 24\)"):
        classifier_of_directions(NAMES, np.ones((3, 24), np.float32), space=space)
    with pytest.raises(InputError, match="all zero"):
        classifier_of_directions(NAMES, np.zeros((2, 24), np.float32), space=space)
    made = classifier_of_directions(NAMES, 3 * np.eye(24, dtype=np.float32)[:2], space=space)
    np.testing.assert_allclose(np.linalg.norm(made.positive, axis=1), 1.0)


def test_the_first_loss_is_the_weighted_cross_entropy_of_the_words() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 30)
    truth = [*truth[:-6], *["effusion"] * 6]  # not balanced
    found = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(epochs=1), groups=["a"] * 30)
    words = PromptSet(tuple(LabelPrompts(n, (f"an image of {n}.",)) for n in NAMES))
    plain = build_classifier(words, lambda texts: chiasm.embed_texts(encoder, texts))
    probabilities = classify(images, plain).probabilities
    column = [NAMES.index(c) for c in truth]
    weight = np.array([1 / truth.count(c) for c in truth])
    expected = -(weight * np.log(probabilities[np.arange(30), column])).sum() / weight.sum()
    assert found.history[0]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_first_loss_of_labels_leaves_out_what_is_not_known() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 20)
    columns: dict[str, list[Any]] = {n: [int(c == n) for c in truth] for n in NAMES}
    for row in (0, 5, 7):
        columns["effusion"][row] = None
    columns["pneumothorax"][7] = None  # this row knows nothing
    config = TuningConfig(mode="multi", epochs=1)
    found = tune_prompts(encoder, images, NAMES, columns, config=config, groups=["a"] * 20)
    assert found.rows == (19, 0)
    pairs = tuple(LabelPrompts(n, (f"evidence of {n}.",), (f"no evidence of {n}.",)) for n in NAMES)
    plain = build_classifier(PromptSet(pairs), lambda texts: chiasm.embed_texts(encoder, texts))
    logits = classify(images, plain, mode="multi").logits
    losses = []
    for k, n in enumerate(NAMES):
        known = [r for r in range(20) if columns[n][r] is not None]
        ones = sum(columns[n][r] for r in known)
        weight = (len(known) - ones) / ones
        for r in known:
            chance = 1 / (1 + np.exp(-logits[r, k]))
            losses.append(-weight * np.log(chance) if columns[n][r] else -np.log(1 - chance))
    assert found.history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_rows_without_a_class_teach_nothing() -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 24)
    holes: list[str | None] = [None if k % 6 == 0 else c for k, c in enumerate(truth)]
    spoiled = images.vectors.copy()
    spoiled[::6] = -spoiled[::6]
    config = TuningConfig(epochs=2)
    first = tune_prompts(encoder, images, NAMES, holes, config=config)
    second = tune_prompts(encoder, dataclasses.replace(images, vectors=spoiled), NAMES, holes, config=config)
    np.testing.assert_array_equal(first.positive, second.positive)


@pytest.mark.parametrize("mode", ["single", "multi"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("vectors", [0, 2])
def test_shapes_of_what_is_learned(mode: str, class_specific: bool, vectors: int) -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 12)
    config = TuningConfig(mode=mode, class_specific=class_specific, vectors=vectors, epochs=1)  # type: ignore[arg-type]
    columns = {n: [int(c == n) for c in truth] for n in NAMES}
    found = tune_prompts(encoder, images, NAMES, truth if mode == "single" else columns, config=config)
    assert set(found.contexts) == ({"positive"} if mode == "single" else {"positive", "negative"})
    assert (found.negative is None) == (mode == "single")
    for context in found.contexts.values():
        assert context.shape[0] == (2 if class_specific else 1)
        assert context.shape[2] == 32
        assert vectors in (0, context.shape[1])
    np.testing.assert_allclose(np.linalg.norm(found.positive, axis=1), 1.0, atol=1e-5)


def test_only_the_replaced_places_of_a_text_change() -> None:
    table = torch.nn.Embedding(10, 4)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    plain = table(ids)
    context = torch.ones(1, 2, 4)
    with replaced_tokens(table, context, 1):
        changed = table(ids)
    torch.testing.assert_close(changed[:, 1:3], context.expand(2, -1, -1))
    torch.testing.assert_close(changed[:, [0, 3]], plain[:, [0, 3]])
    torch.testing.assert_close(table(ids), plain)
    with pytest.raises(ValueError, match="stop"), replaced_tokens(table, context, 1):
        raise ValueError("stop")
    torch.testing.assert_close(table(ids), plain)


@pytest.mark.parametrize("damage", ["labels", "space", "positive", "foreign", "absent"])
def test_damaged_folders_of_prompts_are_refused(damage: str, tmp_path: Path) -> None:
    encoder = TinyEncoder()
    images, truth = pictures(encoder, 8)
    found = tune_prompts(encoder, images, NAMES, truth, config=TuningConfig(epochs=1))
    folder = tmp_path / "learned"
    if damage == "positive":
        found = dataclasses.replace(found, positive=found.positive[:, :7])
    save_prompts(folder, found)
    description = folder / "prompts.json"
    if damage == "labels":
        description.write_text(description.read_text().replace('["pneumothorax", "effusion"]', "7", 1))
    elif damage == "space":
        description.write_text(description.read_text().replace('"encoder"', '"encodr"', 1))
    elif damage == "foreign":
        description.write_text('{"format": "something else"}')
    elif damage == "absent":
        description.unlink()
    with pytest.raises(CheckpointError):
        load_prompts(folder)
