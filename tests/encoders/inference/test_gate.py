from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from chiasm.encoders.base import Encoder
from chiasm.encoders.build import build_encoder_model
from chiasm.encoders.inference.gate import (
    ALLOWED,
    ALLOWED_CENTRED,
    NEEDED,
    Gate,
    PrecisionCheck,
    UncheckedPrecisionWarning,
)
from chiasm.errors import ConfigError, InputError, PrecisionRefused
from chiasm.testing import TinyEncoder

Make = Callable[..., Any]


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def off_by(exact: torch.Tensor, error: float) -> torch.Tensor:
    """Vectors with exactly this 1 - cosine, of another length."""
    unit = F.normalize(exact.double(), dim=1)
    side = torch.zeros_like(unit)
    side[:, 0] = 1.0
    side = F.normalize(side - (side * unit).sum(1, keepdim=True) * unit, dim=1)
    cosine = 1 - error
    return 3 * (cosine * unit + math.sqrt(1 - cosine**2) * side)


def gate_of(needed: int = 8) -> Gate:
    """Pixels stand for their own exact vectors."""
    return Gate(lambda pixels: pixels, needed)


def test_what_agrees_passes_and_is_told() -> None:
    gate, x = gate_of(), vectors(8)
    assert gate.check == PrecisionCheck(0, 0.0, None, False)
    gate.see(x, off_by(x, 2e-5))
    check = gate.check
    assert check.images == 8
    assert check.complete
    assert check.passed
    assert check.cos == pytest.approx(2e-5, rel=1e-3)
    assert check.centred is not None
    assert 1e-6 < check.centred < ALLOWED_CENTRED
    told = check.to_dict()
    assert told["passed"] is True
    assert told["cos_error_allowed"] == ALLOWED == 5e-4
    assert told["images"] == 8
    assert NEEDED == 64


def test_one_bad_image_is_enough_and_the_refusal_stays() -> None:
    gate, x = gate_of(), vectors(3)
    found = off_by(x, 1e-5)
    found[1] = off_by(x[1:2], 1e-3)[0]
    with pytest.raises(PrecisionRefused) as refusal:
        gate.see(x, found)
    assert refusal.value.message == (
        "int8 does not suit this encoder and these images: of 3 images the vector that is furthest from its float32 "
        "vector is off by a 1 - cosine of 1.0e-03 (allowed 5e-04)"
    )
    assert refusal.value.hint == "use precision `bf16` or `fp32`"
    with pytest.raises(PrecisionRefused):
        gate.see(x, x)
    assert gate.check.images == 3


def test_the_bound_itself_still_passes() -> None:
    for error, passes in ((4.9e-4, True), (5.1e-4, False)):
        gate, x = gate_of(2), vectors(2)
        if passes:
            gate.see(x, off_by(x, error))
        else:
            with pytest.raises(PrecisionRefused):
                gate.see(x, off_by(x, error))


def test_nearly_parallel_vectors_are_judged_around_their_mean() -> None:
    """CLIP's narrow cone: plain cosines are fine while what tells images apart is gone."""
    direction = vectors(1, seed=9)
    x = 30 * F.normalize(direction, dim=1) + 0.3 * F.normalize(vectors(8), dim=1)
    blurred = x.mean(0, keepdim=True).expand(8, -1) + 0.3 * F.normalize(vectors(8, seed=4), dim=1)
    assert 1 - float(F.cosine_similarity(x, blurred).min()) < ALLOWED
    gate = gate_of()
    gate.see(x[:7], blurred[:7], warn=False)
    with pytest.raises(PrecisionRefused, match=r"around the mean \(allowed 1e-02\)"):
        gate.see(x[7:], blurred[7:])


def test_images_that_are_all_the_same_have_no_direction_from_their_mean() -> None:
    gate, x = gate_of(), vectors(1).expand(8, -1)
    gate.see(x, off_by(x, 1e-6))
    assert gate.check.complete
    assert gate.check.centred == 0.0


def test_what_is_no_number_is_refused() -> None:
    for at in (0, 2):
        gate, x = gate_of(), vectors(3)
        found = x.clone()
        found[at, 3] = float("nan")
        with pytest.raises(PrecisionRefused, match="of nan"):
            gate.see(x, found)


def test_only_the_images_that_are_wanted_are_encoded_twice() -> None:
    seen: list[int] = []

    def exact(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels

    gate = Gate(exact, 8)
    for count in (3, 0, 3, 9, 4, 5):
        gate.see(vectors(count), vectors(count), warn=False)
    assert seen == [3, 3, 2]
    assert gate.check.images == 8


def test_few_images_are_warned_about_once() -> None:
    gate, x = gate_of(), vectors(3)
    with pytest.warns(UncheckedPrecisionWarning, match="on 3 images so far, a full check takes 8"):
        gate.see(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate.see(x, x)
        gate.see(x, x)
    assert gate.check.complete


def two_calls_of(gate: Gate, x: torch.Tensor, error: Exception | None = None) -> None:
    with gate.one_run():
        gate.see(x, x)
        gate.see(x, x)
        if error is not None:
            raise error


def test_one_run_is_judged_at_its_end() -> None:
    gate, x = gate_of(), vectors(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gate.one_run():  # no images: nothing to say
            pass
        with gate.one_run(), gate.one_run():
            for _ in range(3):
                gate.see(x, x)
        gate.see(x, x)
    assert gate.check.complete
    gate = gate_of()
    with pytest.warns(UncheckedPrecisionWarning, match="on 6 images so far, a full check takes 8"):
        two_calls_of(gate, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate.see(x[:1], x[:1])  # once is enough


def test_a_run_that_fails_says_so_alone() -> None:
    gate, x = gate_of(), vectors(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PrecisionRefused), gate.one_run():
            gate.see(x, off_by(x, 1e-3))
        gate = gate_of()
        with pytest.raises(KeyError):
            two_calls_of(gate, x, error=KeyError())
    with pytest.warns(UncheckedPrecisionWarning, match="on 7 images"):  # the run is over
        gate.see(x[:1], x[:1])


def test_the_worst_image_counts_not_the_last() -> None:
    gate, x = gate_of(), vectors(4)
    gate.see(x, off_by(x, 3e-4), warn=False)
    gate.see(x, off_by(x, 1e-5), warn=False)
    assert gate.check.cos == pytest.approx(3e-4, rel=1e-3)
    assert gate._look(x, off_by(x, 1e-3)) == gate.check  # a thread that waited while another completed the check


def test_many_threads_see_each_image_once() -> None:
    gate, x = gate_of(40), vectors(5)
    refused: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(4):
                gate.see(x, x, warn=False)
        except Exception as error:  # noqa: BLE001
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not refused
    assert gate.check.images == 40
    assert gate.check.complete


# --- the encoder ---


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder() -> Encoder:
    """A tower that int8 suits, to within its bounds."""
    torch.set_num_threads(1)
    return TinyEncoder()


def break_a_channel(encoder: Encoder) -> None:
    """Give the residual stream one channel beside which all others vanish, as large models have it.

    LayerNorm's weight puts it a thousand times above the rest of each row, and the next layer's weights do not read it:
    float32 loses nothing, int8 rounds the rest of the row to nothing.
    """
    tower: Any = encoder.model.visual
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            for norm, weight in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
                norm.weight[3] *= 3000
                weight[:, 3] = 0.0


def test_int8_is_used_where_it_agrees(encoder: Encoder) -> None:
    quantized = encoder.with_precision("int8")
    assert quantized.precision == "int8"
    assert quantized.precision_check is None
    x = pixels(64)
    found = quantized.encode_image(x)
    expected = encoder.encode_image(x)
    check = quantized.precision_check
    assert check is not None
    assert check.complete
    assert check.passed
    assert check.cos == pytest.approx(1 - float(F.cosine_similarity(found.double(), expected.double()).min()), rel=0.1)
    assert 1e-7 < check.cos < ALLOWED  # the vectors of the checked images are int8's
    assert torch.equal(quantized.encode_image(x), found)
    assert encoder.precision_check is None


def test_weights_with_a_channel_of_outliers_are_refused(encoder: Encoder) -> None:
    break_a_channel(encoder)
    x = pixels(4)
    mixed = encoder.with_precision("bf16").encode_image(x)
    assert 1 - float(F.cosine_similarity(mixed, encoder.encode_image(x)).min()) < 1e-3
    quantized = encoder.with_precision("int8")
    for _ in range(2):
        with pytest.raises(PrecisionRefused, match="int8 does not suit this encoder and these images: of 4 images"):
            quantized.encode_image(x)
    with pytest.raises(PrecisionRefused):
        encoder.with_precision("int8").check_precision(pixels(64))
    assert quantized.encode_text("x").shape == (1, 24)


def test_changed_weights_are_checked_anew(encoder: Encoder) -> None:
    quantized = encoder.with_precision("int8")
    quantized.encode_image(pixels(64))
    break_a_channel(encoder)
    with pytest.raises(PrecisionRefused):
        quantized.encode_image(pixels(8))


def test_few_images_are_given_with_a_warning(encoder: Encoder) -> None:
    quantized = encoder.with_precision("int8")
    with pytest.warns(UncheckedPrecisionWarning, match="on 5 images so far, a full check takes 64"):
        assert quantized.encode_image(pixels(5)).shape == (5, 24)
    check = quantized.precision_check
    assert check is not None
    assert (check.images, check.complete, check.centred) == (5, False, None)


def test_a_check_beforehand_silences_the_warning(encoder: Encoder, tmp_path: Path) -> None:
    quantized = encoder.with_precision("int8")
    check = quantized.check_precision(pixels(70))
    assert check.images == 64
    assert check == quantized.precision_check
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.encode_image(pixels(1))
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]
    pictures[1].save(tmp_path / "a.png")
    few = encoder.with_precision("int8").check_precision([pictures[0], tmp_path / "a.png"])
    assert (few.images, few.complete) == (2, False)


def test_many_items_are_one_run(encoder: Encoder) -> None:
    quantized = encoder.with_precision("int8")
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(66)]
    with pytest.warns(UncheckedPrecisionWarning, match="on 5 images so far"):
        quantized.encode([*pictures[:5], "a text"], batch_size=2)
    quantized = encoder.with_precision("int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.encode(["a text"])
        quantized.encode(pictures, batch_size=8)
    assert quantized.precision_check is not None
    assert quantized.precision_check.complete
    assert type(encoder.one_run()).__name__ == "nullcontext"


def test_what_cannot_be_checked(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="cannot embed a str"):
        encoder.with_precision("int8").check_precision(["a.png"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="only int8 is checked on images, the precision is `fp32`"):
        encoder.check_precision(pixels(1))
    with pytest.raises(InputError, match="int8 is checked on images, got none"):
        encoder.with_precision("int8").check_precision(pixels(0))


def test_a_tower_without_an_int8_form_says_so() -> None:
    quantized = TinyEncoder(kind="resnet").with_precision("int8")
    with pytest.raises(PrecisionRefused, match=r"this image tower has no int8 form: \w+ is not VisionTransformer"):
        quantized.encode_image(pixels(1))
    assert quantized.encode_text("x").shape == (1, 24)


def test_texts_of_an_int8_encoder_are_what_auto_means(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a chest radiograph", "x"]
    torch.testing.assert_close(encoder.with_precision("int8").encode_text(texts), encoder.prepare().encode_text(texts))
    mixed = encoder.with_precision("bf16").encode_text(texts)
    monkeypatch.setenv("CHIASM_PRECISION", "bf16")
    assert torch.equal(encoder.with_precision("int8").encode_text(texts), mixed)
    monkeypatch.setenv("CHIASM_PRECISION", "int8")
    torch.testing.assert_close(encoder.with_precision("int8").encode_text(texts), encoder.encode_text(texts))


def test_an_ensemble_is_checked_as_a_whole(make_config: Make, scramble: Make) -> None:
    import dataclasses

    config = dataclasses.replace(make_config(), members=2)
    model = build_encoder_model(config, seed=0).eval()
    quantized = Encoder(model, config, name="two", precision="int8")
    check = quantized.check_precision(pixels(64))
    assert check.complete
    torch.testing.assert_close(quantized.encode_image(pixels(3)).norm(dim=1), torch.ones(3))


def test_no_images_need_no_check(encoder: Encoder) -> None:
    quantized = encoder.with_precision("int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quantized.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 24)
    assert quantized.precision_check is None
