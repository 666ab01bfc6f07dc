"""The baseline without pretraining: it learns, it repeats itself, it holds out whole patients, it refuses nonsense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from chiasm.data.phantoms import PhantomSet, make_chest_phantoms
from chiasm.errors import ChiasmError, FileFormatError, InputError, UnknownName
from chiasm.metrics.classification import auroc
from chiasm.progress import SilentProgress
from chiasm.train.from_scratch import FromScratch, decode_images, make_cnn
from chiasm.types import Sample

FAST = {"architecture": "tiny_cnn", "image_size": 32, "min_steps": 0}


def pixels_of(phantoms: PhantomSet) -> NDArray[np.uint8]:
    return np.repeat(phantoms.images[..., None], 3, axis=-1)


def squares(n: int, *, seed: int = 0) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Noise, brighter on the image's left or right half; two images a patient."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (n, 32, 32, 3), dtype=np.uint8)
    classes = ["left" if k % 2 else "right" for k in range(n)]
    for k, side in enumerate(classes):
        pixels[k, :, slice(0, 16) if side == "left" else slice(16, 32)] += 90
    return pixels, classes, [f"p{k // 2}" for k in range(n)]


def test_it_learns_a_finding_of_phantoms() -> None:
    phantoms = make_chest_phantoms(120, seed=3, size_px=32, images_per_patient=(1, 1))
    unseen = make_chest_phantoms(60, seed=4, size_px=32, images_per_patient=(1, 1), first_patient=900)
    truth = [str(s.labels["cardiomegaly"]) for s in phantoms.samples]
    baseline = FromScratch("small_cnn", 32, min_steps=0, epochs=30).fit(
        pixels_of(phantoms), truth, [s.patient for s in phantoms.samples]
    )
    probabilities = baseline.predict_proba(pixels_of(unseen))
    assert probabilities.shape == (60, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    assert auroc([s.labels["cardiomegaly"] for s in unseen.samples], probabilities[:, 1]) > 0.9


def test_left_stays_left_under_the_default_augmentation() -> None:
    pixels, classes, _ = squares(40)
    baseline = FromScratch(**FAST, epochs=12).fit(pixels, classes)
    unseen, truth, _ = squares(40, seed=1)
    assert (baseline.predict(unseen) == np.asarray(truth)).mean() == 1.0
    assert list(baseline.classes_) == ["left", "right"]
    mirroring = FromScratch(**FAST, epochs=12, augment="histology").fit(pixels, classes)
    assert (mirroring.predict(unseen) == np.asarray(truth)).mean() < 1.0


def test_one_seed_gives_one_network_and_leaves_the_callers_random_state_alone() -> None:
    pixels, classes, groups = squares(24)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first = FromScratch(**FAST, epochs=3, seed=1).fit(pixels, classes, groups)
    assert torch.equal(torch.rand(1), before)
    torch.manual_seed(6)
    second = FromScratch(**FAST, epochs=3, seed=1).fit(pixels, classes, groups)
    other = FromScratch(**FAST, epochs=3, seed=2).fit(pixels, classes, groups)
    np.testing.assert_array_equal(first.predict_proba(pixels), second.predict_proba(pixels))
    assert np.abs(first.predict_proba(pixels) - other.predict_proba(pixels)).max() > 1e-4


def test_whole_patients_choose_the_epoch() -> None:
    pixels, classes, groups = squares(60)
    groups = [f"p{k // 4}" for k in range(60)]
    found = FromScratch(**FAST, epochs=4).fit(pixels, classes, groups)
    held = set(found.validation_rows_)
    assert 0 < len(held) < 30
    assert not {groups[k] for k in held} & {groups[k] for k in range(60) if k not in held}
    losses = [epoch["validation_loss"] for epoch in found.history_]
    assert found.best_epoch_ == int(np.argmin(losses))


def test_the_best_epoch_is_kept_and_training_stops_early() -> None:
    pixels, classes, groups = squares(40)
    noise = np.random.default_rng(0).permutation(classes)
    found = FromScratch(**FAST, epochs=60, patience=2, dropout=0.0, augment="none").fit(pixels, list(noise), groups)
    assert len(found.history_) == found.best_epoch_ + 3
    held = list(found.validation_rows_)
    probabilities = found.predict_proba(pixels[held])
    columns = [list(found.classes_).index(noise[row]) for row in held]
    counts = {c: sum(noise[k] == c for k in range(40) if k not in held) for c in found.classes_}
    weights = np.array([1 / counts[noise[row]] for row in held])
    loss = -(weights * np.log(probabilities[np.arange(len(held)), columns])).sum() / weights.sum()
    assert loss == pytest.approx(found.history_[found.best_epoch_]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("groups", [None, ["a"] * 8])
def test_without_patients_to_hold_out_all_rows_train(groups: list[str] | None) -> None:
    pixels, classes, _ = squares(8)
    found = FromScratch(**FAST, epochs=2).fit(pixels, classes, groups)
    assert found.validation_rows_ == ()
    assert found.best_epoch_ == 1


def test_few_shots_get_enough_steps() -> None:
    pixels, classes, _ = squares(2)
    assert len(FromScratch(**{**FAST, "min_steps": 7}, epochs=2).fit(pixels, classes).history_) == 7


def test_class_weights_give_a_rare_class_the_weight_of_the_others() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (44, 32, 32, 3), dtype=np.uint8)
    classes = ["rare"] * 4 + ["usual"] * 40

    def belief(weights: str) -> float:
        options = {**FAST, "epochs": 8, "dropout": 0.0, "class_weights": weights}
        return float(FromScratch(**options).fit(noise, classes).predict_proba(noise)[4:, 0].mean())

    assert belief("balanced") > 0.3 > belief("none")


def test_grey_training_images_make_colour_meaningless() -> None:
    pixels, classes, _ = squares(12)
    grey = np.repeat(pixels[..., :1], 3, axis=-1)
    assert FromScratch(**FAST, epochs=1).fit(grey, classes).model_[0].in_channels == 1
    assert FromScratch(**FAST, epochs=1).fit(pixels, classes).model_[0].in_channels == 3


def test_samples_are_decoded_like_their_pixels(tmp_path: Path) -> None:
    phantoms = make_chest_phantoms(6, seed=1, size_px=64, images_per_patient=(1, 1))
    phantoms.save(tmp_path)
    samples = [Sample(id=s.id, image=tmp_path / "images" / f"{s.id}.png") for s in phantoms.samples]
    classes = ["a", "b"] * 3
    decoded = decode_images(samples, 32)
    assert decoded.shape == (6, 32, 32, 3)
    found = FromScratch(**FAST, epochs=1).fit(samples, classes)
    np.testing.assert_array_equal(found.predict_proba(samples), found.predict_proba(decoded))


def test_it_can_be_cloned_like_any_estimator() -> None:
    copied = clone(FromScratch("tiny_cnn", 32, seed=4))
    assert (copied.architecture, copied.image_size, copied.seed) == ("tiny_cnn", 32, 4)
    assert FromScratch().set_params(epochs=3).get_params()["epochs"] == 3


def test_every_architecture_takes_its_smallest_image() -> None:
    assert make_cnn("small_cnn", 3, 4)(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
    assert make_cnn("tiny_cnn", 1, 2)(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architecture": "smal_cnn"}, UnknownName, "did you mean `small_cnn`"),
        ({"image_size": 30}, InputError, "multiple of 8, got 30"),
        ({"epochs": 0}, InputError, "`epochs` must be at least 1"),
        ({"validation": 1.5}, InputError, "share between 0 and 1"),
        ({"augment": "chst"}, UnknownName, "did you mean `chest`"),
        ({"class_weights": "some"}, UnknownName, "class weights"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], error: type[ChiasmError], message: str) -> None:
    pixels, classes, _ = squares(4)
    with pytest.raises(error, match=message):
        FromScratch(**{**FAST, "epochs": 1, **change}).fit(pixels, classes)


def test_wrong_rows_are_refused_without_naming_one(tmp_path: Path) -> None:
    pixels, classes, groups = squares(4)
    baseline = FromScratch(**FAST, epochs=1)
    with pytest.raises(InputError, match="3 classes for 4 images"):
        baseline.fit(pixels, classes[:3])
    with pytest.raises(InputError, match="1 of 4 images have no class"):
        baseline.fit(pixels, [*classes[:3], None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="one class"):
        baseline.fit(pixels, ["a"] * 4)
    with pytest.raises(InputError, match="3 groups for 4 images"):
        baseline.fit(pixels, classes, groups[:3])
    with pytest.raises(InputError, match="has no group"):
        baseline.fit(pixels, classes, [*groups[:3], None])
    with pytest.raises(InputError, match="uint8 of shape"):
        baseline.fit(pixels[:, :8], classes)
    with pytest.raises(InputError, match="no images"):
        baseline.fit([], [])
    with pytest.raises(InputError, match="1 of 1 samples have no image"):
        decode_images([Sample(id="secret")], 32)
    with pytest.raises(InputError, match="not fitted"):
        FromScratch(**FAST).predict_proba(pixels)
    damaged = tmp_path / "x.png"
    damaged.write_bytes(b"\x89PNG nothing")
    with pytest.raises(FileFormatError):
        decode_images([Sample(id="a", image=damaged)], 32)


def test_each_image_is_scored_on_its_own() -> None:
    pixels, classes, _ = squares(20)
    found = FromScratch(**FAST, epochs=2).fit(pixels, classes)
    together = found.predict_proba(pixels)
    alone = np.concatenate([found.predict_proba(pixels[k : k + 1]) for k in range(20)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert (found.predict(pixels) == found.classes_[together.argmax(1)]).all()


def test_brightness_and_contrast_of_all_images_do_not_matter() -> None:
    """Pixels are standardised by the training images alone, so a scanner's offset changes nothing."""
    pixels, classes, _ = squares(20)
    halved = (pixels // 2 + 20).astype(np.uint8)
    options = {**FAST, "epochs": 2, "augment": "none"}
    first = FromScratch(**options).fit(pixels // 2 * 2, classes).predict_proba(pixels // 2 * 2)
    second = FromScratch(**options).fit(halved, classes).predict_proba(halved)
    np.testing.assert_allclose(first, second, atol=2e-3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1"])
def test_pictures_of_every_kind_are_decoded(mode: str, tmp_path: Path) -> None:
    from PIL import Image

    grey = (
        Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(48, 40))
        if mode == "I;16"
        else Image.new(mode, (40, 48))
    )
    grey.save(tmp_path / "a.png")
    decoded = decode_images([Sample(id="a", image=tmp_path / "a.png")], 16)
    assert decoded.shape == (1, 16, 16, 3)
    assert decoded.dtype == np.uint8


def test_numbers_as_classes_and_as_groups_are_names() -> None:
    pixels, classes, _ = squares(16)
    numbers = [int(c == "left") for c in classes]
    found = FromScratch(**FAST, epochs=1).fit(pixels, numbers, list(range(16)))  # type: ignore[arg-type]
    assert list(found.classes_) == ["0", "1"]
    assert len(found.validation_rows_) > 0


def test_three_classes_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    classes = [("dark", "grey", "light")[k % 3] for k in range(48)]
    level = {"dark": 20, "grey": 110, "light": 200}
    pixels = np.stack([rng.integers(level[c], level[c] + 40, (32, 32, 3), dtype=np.uint8) for c in classes])
    found = FromScratch(**FAST, epochs=20, augment="none").fit(pixels, classes, [f"p{k}" for k in range(48)])
    assert found.predict_proba(pixels).shape == (48, 3)
    assert (found.predict(pixels) == np.asarray(classes)).mean() > 0.9


def test_progress_is_told_about_every_epoch() -> None:
    class Counter(SilentProgress):
        steps = 0

        def advance(self, n: int = 1, **fields: float | str) -> None:
            self.steps += n

    pixels, classes, _ = squares(8)
    bar = Counter()
    FromScratch(**FAST, epochs=3).fit(pixels, classes, progress=bar)
    assert bar.steps == 3
