"""What each wording does: the numbers are those of the plain classifier, with truth and without."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.errors import InputError, UnknownName
from chiasm.metrics.classification import auroc
from chiasm.tasks.prompt_effects import explain_prompts
from chiasm.tasks.prompt_grid import GridVectors, PromptGrid
from chiasm.tasks.prompts import LabelPrompts, PromptSet
from chiasm.tasks.zero_shot import classify
from chiasm.types import Embeddings, Space

SPACE = Space("toy", "abc", "def", 16)
TEMPLATES = ("{}", "a film with {}", "grain {}")


def embed_text(texts: list[str]) -> Embeddings:
    """Give every text a direction of its own, by its letters."""
    rows = [np.random.default_rng(list(t.encode())).normal(size=16) for t in texts]
    return Embeddings(np.asarray(rows), tuple(texts), SPACE, "text", normalized=False, logit_scale=20.0)


def made(*, pairs: bool = True, n: int = 120) -> tuple[Embeddings, GridVectors, NDArray[np.int64]]:
    """Images of which the positive ones lie towards "a film with oedema" and away from "grain oedema"."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, n)
    good, bad = embed_text(["a film with oedema", "grain oedema"]).normalize().vectors
    rows = rng.normal(size=(n, 16)) + truth[:, None] * (2 * good - 2 * bad)
    patients = tuple(f"p{k // 2}" for k in range(n))
    images = Embeddings(rows, tuple(map(str, range(n))), SPACE, "image", normalized=False, patients=patients)
    return images, PromptGrid.from_templates(["oedema"], TEMPLATES, pairs=pairs).embed(embed_text), truth


def test_alone_and_left_out_are_the_scores_of_the_plain_classifier() -> None:
    images, vectors, truth = made()
    found = explain_prompts(images, vectors, {"oedema": truth.tolist()}, n_resamples=100)

    def score(templates: tuple[str, ...]) -> float:
        prompts = vectors.grid.prompts({"oedema": (templates, ("oedema",))})
        result = classify(images, vectors.classifier(prompts), mode="multi")
        return auroc(truth, result.logits[:, 0])

    assert found.ensemble["oedema"].value == pytest.approx(score(TEMPLATES))
    for k, effect in enumerate(found.effects):
        assert effect.alone is not None
        assert effect.leave_one_out is not None
        assert effect.alone.value == pytest.approx(score((TEMPLATES[k],)))
        rest = tuple(t for t in TEMPLATES if t != TEMPLATES[k])
        assert effect.leave_one_out.value == pytest.approx(score(TEMPLATES) - score(rest))
    by_option = {e.option: e for e in found.effects}
    good, bad = by_option["a film with {}"].leave_one_out, by_option["grain {}"].leave_one_out
    assert good is not None
    assert bad is not None
    assert good.low > 0 > bad.high
    assert [e.option for e in found.inverted_options] == ["grain {}"]
    assert by_option["grain {}"].example == "grain oedema"


def test_how_answers_move_needs_no_truth() -> None:
    images, vectors, _ = made()
    found = explain_prompts(images, vectors)
    assert found.metric is None
    assert found.ensemble == {}
    plain = classify(images, vectors.classifier(), mode="multi").logits[:, 0]
    effect = found.effects[1]
    alone = classify(
        images, vectors.classifier(vectors.grid.prompts({"oedema": (("a film with {}",), ("oedema",))})), mode="multi"
    ).logits[:, 0]
    assert effect.alone is None
    assert effect.changed == pytest.approx(((plain > 0) != (alone > 0)).mean())
    assert effect.shift == pytest.approx((alone - plain).mean(), abs=1e-4)
    ranks = np.argsort(np.argsort(plain)), np.argsort(np.argsort(alone))
    assert effect.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_set_of_one_wording_changes_nothing() -> None:
    images, _, truth = made()
    vectors = PromptGrid.from_templates(["oedema"], "{}").embed(embed_text)
    (effect,) = explain_prompts(images, vectors, {"oedema": truth.tolist()}, n_resamples=20).effects
    assert (effect.changed, effect.shift, effect.leave_one_out) == (0.0, 0.0, None)
    assert effect.rank_correlation == pytest.approx(1.0)
    assert effect.cosine == pytest.approx(1.0)


def test_classes_share_their_templates_and_report_the_majority() -> None:
    images, _, truth = made()
    names = {"oedema": ("oedema",), "effusion": ("effusion", "fluid")}
    vectors = PromptGrid.from_templates(names, TEMPLATES).embed(embed_text)
    classes = ["oedema" if t else "effusion" for t in truth]
    found = explain_prompts(images, vectors, classes, mode="single", metric="accuracy", n_resamples=20)
    assert [e.option for e in found.effects] == [*TEMPLATES, "effusion: effusion", "effusion: fluid"]
    assert found.majority["all classes"] == pytest.approx(max(truth.mean(), 1 - truth.mean()))
    assert np.isnan(found.effects[0].rank_correlation)
    np.testing.assert_allclose(np.diag(found.cosines), 1.0, atol=1e-5)
    assert found.inverted_options == ()


def test_inverted_labels_and_faults_are_named() -> None:
    images, _, truth = made()
    prompts = PromptSet((LabelPrompts("oedema", ("grain oedema",), ("a film with oedema",)),))
    found = explain_prompts(images, PromptGrid.from_prompts(prompts).embed(embed_text), {"oedema": truth.tolist()}, n_resamples=50)  # fmt: skip
    assert found.inverted == ("oedema",)
    assert found.faults[0].kind == "negative does not deny"
    assert found.negative_cosines["oedema"] < 0.9
    json.dumps(found.to_dict(), default=str)


def test_wrong_input_is_refused() -> None:
    images, vectors, truth = made()
    with pytest.raises(UnknownName, match="metric"):
        explain_prompts(images, vectors, {"oedema": truth.tolist()}, metric="accuracy")
    with pytest.raises(InputError, match="7 truth values"):
        explain_prompts(images, vectors, {"oedema": [0] * 7})
    with pytest.raises(InputError, match="got text"):
        explain_prompts(dataclasses.replace(images, modality="text"), vectors)
