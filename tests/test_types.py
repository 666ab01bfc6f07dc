"""The nouns: embeddings select rows consistently, spaces refuse to mix, errors carry their hint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ChiasmError, ConfigError, InputError, MissingExtra, SpaceMismatch, UnknownName
from chiasm.registry import Registry
from chiasm.types import Embeddings, Interval, Preprocess, Sample, Space, check_same_space, digest_of

SPACE = Space("tiny", "aaaaaaaa", "bbbb", 4)


def make(n: int, space: Space = SPACE) -> Embeddings:
    rng = np.random.default_rng(0)
    return Embeddings(
        rng.normal(size=(n, space.dim)),
        tuple(f"r{i}" for i in range(n)),
        space,
        "image",
        normalized=False,
        texts=tuple(f"t{i}" for i in range(n)),
        patients=tuple(None if i == 1 else f"p{i // 2}" for i in range(n)),
        labels={"y": tuple(range(n))},
    )


@given(st.lists(st.integers(0, 6), max_size=12))
def test_select_keeps_rows_together(rows: list[int]) -> None:
    part = make(7).select(rows)
    assert part.ids == tuple(f"r{i}" for i in rows)
    assert part.labels["y"] == tuple(rows)
    assert part.texts == tuple(f"t{i}" for i in rows)
    assert part.vectors.shape == (len(rows), 4)


def test_select_by_mask_and_groups() -> None:
    embeddings = make(4)
    assert embeddings.select(np.array([True, False, False, True])).ids == ("r0", "r3")
    assert embeddings.groups == ("p0", "r1", "p1", "p1")
    assert len(embeddings) == 4
    assert embeddings.dim == 4


def test_normalize() -> None:
    unit = make(5).normalize()
    np.testing.assert_allclose(np.linalg.norm(unit.vectors, axis=1), 1, rtol=1e-6)
    assert unit.normalize() is unit
    zero = Embeddings(np.zeros((1, 4)), ("z",), SPACE, "text", normalized=False)
    assert not zero.normalize().vectors.any()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(n, dim\)"):
        Embeddings(np.zeros(4), ("a",), SPACE, "image")
    with pytest.raises(InputError, match="3 dimensions"):
        Embeddings(np.zeros((1, 3)), ("a",), SPACE, "image")
    with pytest.raises(InputError, match="ids has 1 entries for 2"):
        Embeddings(np.zeros((2, 4)), ("a",), SPACE, "image")
    with pytest.raises(InputError, match=r"labels\[y\]"):
        Embeddings(np.zeros((1, 4)), ("a",), SPACE, "image", labels={"y": (1, 2)})


def test_two_spaces_are_never_compared() -> None:
    other = make(2, Space("tiny", "cccccccc", "bbbb", 4))
    assert check_same_space(make(2), make(3)) == SPACE
    with pytest.raises(SpaceMismatch, match="no meaning"):
        check_same_space(make(2), other)
    assert Space.from_dict(SPACE.to_dict()) == SPACE
    assert str(SPACE) == "tiny@aaaaaa.bbbb/4"


def test_preprocess_digest_sees_every_field() -> None:
    plain = Preprocess()
    assert Preprocess.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert Preprocess(size=336).digest != plain.digest
    assert Preprocess(rgb="before_resize").digest != plain.digest
    assert Preprocess(crop_rounding="down").digest != plain.digest
    assert plain.digest == "7e169b3a928b", "spaces of stored embeddings must outlive a new field"
    with pytest.raises(InputError, match="unknown preprocess field `sizes`"):
        Preprocess.from_dict({"sizes": 1})


def test_interval_is_valid_json() -> None:
    text = json.dumps(Interval(0.5, float("nan"), float("nan"), 3, 0.5).to_dict(), allow_nan=False)
    assert json.loads(text) == {"value": 0.5, "low": None, "high": None, "n": 3, "chance": 0.5}
    assert str(Interval(0.5, 0.4, 0.6, 3)) == "0.500 [0.400, 0.600]"
    assert str(Interval(0.5, float("nan"), 0.6, 3)) == "0.500"


def test_sample_group_falls_back() -> None:
    assert Sample("a", patient="p", slide="s").group == "p"
    assert Sample("a", slide="s").group == "s"
    assert Sample("a").group == "a"


def test_digest_ignores_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})


def test_errors_carry_hints() -> None:
    error = UnknownName("encoder", "biomedclp", ["biomedclip"], hint="`chiasm models` lists them")
    assert str(error) == "unknown encoder `biomedclp`; did you mean `biomedclip`?\nhint: `chiasm models` lists them"
    assert isinstance(error, LookupError)
    missing = MissingExtra("webdataset", "data")
    assert isinstance(missing, ImportError)
    assert missing.hint == "pip install 'chiasm[data]'"
    assert str(ChiasmError("plain")) == "plain"


def test_registry() -> None:
    registry: Registry[int] = Registry("task", "chiasm.nothing")
    registry.add("one", 1)
    assert registry.register("two")(2) == 2
    assert registry.get("one") == 1
    assert list(registry) == ["one", "two"]
    assert "two" in registry
    with pytest.raises(ConfigError, match="registered twice"):
        registry.add("one", 3)
    with pytest.raises(UnknownName, match="did you mean `one`"):
        registry.get("onne")
