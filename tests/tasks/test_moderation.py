"""Policies: decisions by hand-made vectors, evidence, thresholds fitted and bound to a space, hostile files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ConfigError, InputError, SpaceMismatch
from chiasm.tasks.moderation import (
    ACTIONS,
    Category,
    Policy,
    embed_policy,
    fit_policy,
    moderate,
    policy_text,
    read_policy,
    redecide,
    select_rows,
    verdict_of,
)
from chiasm.types import Embeddings, Space

SPACE = Space("tiny", "w", "p", 3)
TEXTS = {"a photo": (1, 0, 0), "a chest film": (0, 1, 0), "a slide": (0, 0, 1), "a face": (0.8, 0.6, 0)}


def embed(texts, space=SPACE):
    vectors = np.array([TEXTS[t] for t in texts], dtype=np.float32)
    return Embeddings(vectors, tuple(texts), space, "text")


def images(rows, *, groups=None, space=SPACE):
    vectors = np.asarray(rows, dtype=np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(vectors, tuple(f"i{k}" for k in range(len(vectors))), space, "image", patients=groups)


def policy(**photo):
    given = {"texts": ("a photo", "a face"), "against": ("a chest film",), "threshold": 0.4, "review": -0.1, **photo}
    return Policy(
        "films", (Category("photo", **given), Category("slide", ("a slide",), action="review", threshold=0.5))
    )


def decide(rows, given=None):
    return moderate(images(rows), embed_policy(given or policy(), embed))


def test_scores_decisions_and_evidence_are_the_definition():
    found = decide([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0.7, 0, 0.7)])
    assert found.decisions == ("reject", "accept", "review", "review", "reject")
    np.testing.assert_allclose(found.scores[0], [1, 0], atol=1e-6)
    first, other = found.evidence(0)
    assert (first.text, first.against, first.verdict) == ("a photo", "a chest film", "reject")
    assert first.margin == pytest.approx(1.1)
    assert (other.against, other.against_cosine, other.verdict) == (None, None, None)
    fourth = found.evidence(3)[0]  # the nearer of two texts, 1.4 / √2 against 1 / √2
    assert fourth.text == "a face"
    assert fourth.cosine == pytest.approx(1.4 / np.sqrt(2), abs=1e-6)
    assert fourth.score == pytest.approx(0.4 / np.sqrt(2), abs=1e-6)
    assert found.deciding.tolist() == [0, -1, 1, 0, 0]
    flat = found.to_records(flat=True)
    assert [r["because"] for r in flat] == ["photo", None, "slide", "photo", "photo"]
    assert flat[1]["category"] == "photo"  # what came nearest to saying something
    assert found.counts() == {"reject": 2, "review": 2, "accept": 1}
    part = select_rows(found, [4, 2])
    assert part.ids == ("i4", "i2")
    assert part.evidence(0) == found.evidence(4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda r: np.linalg.norm(r) > 0.1), min_size=1, max_size=8),
       st.floats(-0.5, 0.5), st.floats(0, 0.5))  # fmt: skip
def test_a_milder_threshold_never_turns_more_away(rows, threshold, step):
    def strictness(value):
        found = decide(rows, policy(threshold=value, review=None))
        return [ACTIONS.index(d) for d in found.decisions]

    assert all(b >= a for a, b in zip(strictness(threshold), strictness(threshold + step), strict=True))


def test_the_strictest_category_decides():
    both = Policy("p", (Category("good", ("a photo",), action="accept", threshold=0.1),
                        Category("bad", ("a face",), action="reject", threshold=0.9)), default="review")  # fmt: skip
    assert decide([(1, 0, 0), (0.8, 0.6, 0), (0, 0, 1)], both).decisions == ("accept", "reject", "review")


def crowd(seed, patients=300):
    """Photos lean to the photo's axis, films to the film's; two images a patient."""
    random = np.random.default_rng(seed)
    photo = random.random(patients) < 0.4
    rows, groups, truth = [], [], []
    for p in range(patients):
        for _ in range(2):
            base = np.array([0.65, 0.35, 0.1]) if photo[p] else np.array([0.35, 0.65, 0.1])
            rows.append(base + random.normal(size=3) * 0.2)
            groups.append(f"p{seed}-{p}")
            truth.append(int(photo[p]))
    return images(rows, groups=tuple(groups)), truth


def test_thresholds_are_fitted_and_reach_their_aim_on_others():
    vectors = embed_policy(policy(), embed)
    seen, truth = crowd(1)
    made, refused = fit_policy(moderate(seen, vectors), {"photo": truth}, sensitivity=0.9, specificity=0.9, data="d1")
    photo = made.categories[0]
    assert photo.fitted["data"] == "d1"
    assert made.space == SPACE
    assert "slide" in refused
    assert made.categories[1] == policy().categories[1]
    assert made.by_hand == ("slide",)
    other, wanted = crowd(2)
    scores = moderate(other, vectors).scores[:, 0]
    wanted = np.array(wanted)
    assert abs((scores[wanted == 1] >= photo.review).mean() - 0.9) < 0.05
    assert abs((scores[wanted == 0] < photo.threshold).mean() - 0.9) < 0.05
    alone, _ = fit_policy(moderate(seen, embed_policy(policy(review=None), embed)), {"photo": truth}, sensitivity=0.8)
    assert alone.categories[0].review is None
    assert abs((scores[wanted == 1] >= alone.categories[0].threshold).mean() - 0.8) < 0.06
    few, reasons = fit_policy(select_rows(moderate(seen, vectors), range(8)), {"photo": truth[:8]})
    assert few == policy()
    assert "rows of that side" in reasons["photo"]


def test_a_fitted_policy_is_written_read_and_bound(tmp_path):
    seen, truth = crowd(1)
    result = moderate(seen, embed_policy(policy(), embed))
    made, _ = fit_policy(result, {"photo": truth})
    path = tmp_path / "p.toml"
    path.write_text(policy_text(made))
    again = read_policy(path)
    assert again == made
    assert again.digest == made.digest != policy().digest
    assert "p1-" not in path.read_text()
    assert redecide(result, again).decisions == moderate(seen, embed_policy(again, embed)).decisions
    other = dataclasses.replace(SPACE, weights="w2")
    with pytest.raises(SpaceMismatch, match="fitted in"):
        embed_policy(again, lambda texts: embed(texts, other))
    with pytest.raises(SpaceMismatch):
        moderate(images([(1, 0, 0)], space=other), embed_policy(policy(), embed))
    with pytest.raises(InputError, match="other categories"):
        redecide(result, policy(texts=("a photo",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'", "no category"),
        ("[categories.a]\ntexts = []", "no text"),
        ("[categories.a]\ntexts = 'one'", "must be a list"),
        ("[categories.a]\ntexts = ['']", "empty text"),
        ("[categories.a]\ntexts = [3]", "empty text"),
        ("[categories.a]\ntexts = ['x']\nagainst = ['x']", "for and against"),
        ("[categories.a]\ntexts = ['x']\naction = 'delete'", "action `delete`"),
        ("[categories.a]\ntexts = ['x']\nthreshold = 30", "differences of cosines"),
        ("[categories.a]\ntexts = ['x']\nthreshold = 'high'", "differences of cosines"),
        ("[categories.a]\ntexts = ['x']\nthreshold = nan", "differences of cosines"),
        ("[categories.a]\ntexts = ['x']\nreview = 0.5", "above its threshold"),
        ("[categories.a]\ntexts = ['x']\nthresold = 0.5", "unknown field `thresold`"),
        ("default = 'maybe'\n[categories.a]\ntexts = ['x']", "default"),
        ("extra = 1\n[categories.a]\ntexts = ['x']", "unknown field `extra`"),
        ("categories = 3", "no category"),
        ("[categories]\na = 3", "must be a table"),
        ("[fitted]\nspace = 3\n[categories.a]\ntexts = ['x']", "damaged"),
    ],
)
def test_hostile_policies(tmp_path, text, message):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_policy(path)


def test_what_is_no_policy(tmp_path):
    (tmp_path / "p.toml").write_text("= 3")
    with pytest.raises(ConfigError):
        read_policy(tmp_path / "p.toml")
    with pytest.raises(InputError, match="one name"):
        Policy("p", (Category("a", ("x",)), Category("a", ("y",))))
    with pytest.raises(InputError, match="text embeddings"):
        moderate(embed(["a photo"]), embed_policy(policy(), embed))


def test_a_verdict_begins_exactly_at_its_bound():
    category = Category("c", ("x",), action="reject", threshold=0.3, review=0.1)
    below = [float(np.nextafter(v, -1)) for v in (0.3, 0.1)]
    assert [verdict_of(category, v) for v in (0.3, below[0], 0.1, below[1])] == ["reject", "review", "review", None]
    alone = dataclasses.replace(category, review=None)
    assert [verdict_of(alone, v) for v in (0.3, below[0])] == ["reject", None]
