"""Survival from features: rows to patients, nothing from test patients, the oracle of the phantoms, the peer's Cox."""

from __future__ import annotations

import builtins
import math
from typing import ClassVar

import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from chiasm.data.phantom_survival import CHEST_HAZARD
from chiasm.errors import InputError, MissingExtra, UnknownName
from chiasm.metrics.concordance import harrell_c, harrell_statistic
from chiasm.metrics.survival import kaplan_meier, survival_target
from chiasm.tasks.survival import (
    check_event_name,
    check_unit,
    cross_validated_risks,
    event_flags,
    few_events,
    survival_data,
)
from chiasm.tasks.survival_models import (
    Columns,
    CoxNet,
    NoFeatures,
    SurvivalForest,
    component_candidates,
    log_partial_likelihood,
    stratified_folds,
)
from chiasm.train.heads import NeuralCox

pytest.importorskip("sksurv", reason="the extra `survival` is not installed")

#: Fewer candidates than by default: what is tested here does not depend on their number.
QUICK = {"l1_ratios": (0.5,), "n_alphas": 15, "folds": 3}


@pytest.fixture(scope="module")
def phantoms():
    """Outcomes of 500 patients from the stated hazard, with the findings and embeddings that hold them in noise."""
    random = np.random.default_rng(3)
    names = tuple(CHEST_HAZARD.coefficients)
    findings = (random.random((500, len(names))) < 0.2).astype(float)
    rows = [dict(zip(names, f, strict=True)) for f in findings]
    observed = np.array([CHEST_HAZARD.observe(random, row) for row in rows], dtype=float)
    truth = np.array([CHEST_HAZARD.linear_predictor(row) for row in rows])
    embeddings = findings @ random.normal(size=(len(names), 48)) + random.normal(size=(500, 48))
    ids = [f"{k:04d}" for k in range(500)]
    return ids, findings, embeddings, observed[:, 0], observed[:, 1], truth


def c_index(data, out, risk=None):
    return float(
        harrell_statistic(data.time, data.event, out.risk if risk is None else risk, strata=out.fold)(
            np.ones((1, len(data)))
        )[0]
    )


@pytest.mark.parametrize(
    ("model", "features"),
    [
        (CoxNet(**QUICK), "findings"),
        (CoxNet(**QUICK, components=(None, 16)), "embeddings"),
        (NeuralCox(members=1, weight_decays=(1.0,), epochs=40), "embeddings"),
    ],
    ids=["coxnet-findings", "coxnet-embeddings", "neural-embeddings"],
)
def test_phantoms_are_ordered_nearly_as_by_the_true_hazard(phantoms, model, features):
    ids, findings, embeddings, time, event, truth = phantoms
    data = survival_data(findings if features == "findings" else embeddings, ids, time, event)
    out = cross_validated_risks(model, data)
    oracle = c_index(data, out, truth)
    assert oracle > 0.62
    assert c_index(data, out) > oracle - 0.03


def test_a_forest_learns_and_its_probabilities_fall(phantoms):
    ids, findings, _, time, event, _ = phantoms
    few = slice(0, 250)
    data = survival_data(findings[few], ids[few], time[few], event[few])
    at = np.quantile(time[few], [0.1, 0.3, 0.5])
    out = cross_validated_risks(SurvivalForest(trees=25, leaves=(12,)), data, folds=3, times=at)
    assert c_index(data, out) > 0.57
    assert (np.diff(out.survival, axis=1) <= 1e-12).all()
    assert ((out.survival >= 0) & (out.survival <= 1)).all()


def test_noise_stays_at_chance(phantoms):
    ids, _, _, time, event, _ = phantoms
    found = []
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=(500, 30))
        data = survival_data(noise, ids, time, event)
        out = cross_validated_risks(CoxNet(**QUICK), data, seed=seed)
        found.append(harrell_c(data.time, data.event, out.risk, strata=out.fold, n_resamples=50).value)
    assert abs(np.mean(found) - 0.5) < 0.05


def test_the_penalty_is_the_one_with_the_best_cross_validated_likelihood(phantoms):
    """On noise that is (nearly) the strongest; choosing by the likelihood of training would take the weakest."""
    _, _, _, time, event, _ = phantoms
    noise = np.random.default_rng(0).normal(size=(200, 30))
    model = CoxNet(**QUICK).fit(noise, survival_target(time[:200], event[:200]))
    assert model.chosen_["nonzero"] <= 3


def test_plain_cox_is_scikit_survivals(phantoms):
    from sksurv.linear_model import CoxPHSurvivalAnalysis

    _, findings, _, time, event, _ = phantoms
    target = survival_target(time, event)
    ours = CoxNet(free=tuple(range(7))).fit(findings, target)
    theirs = CoxPHSurvivalAnalysis(ties="efron").fit(findings, target)
    np.testing.assert_allclose(
        ours.predict(findings) - ours.predict(findings).mean(),
        theirs.predict(findings) - theirs.predict(findings).mean(),
        atol=1e-3,
    )


def test_the_path_is_scikit_survivals(phantoms):
    from sksurv.linear_model import CoxnetSurvivalAnalysis

    _, _, embeddings, time, event, _ = phantoms
    target = survival_target(time, event)
    ours = CoxNet(**QUICK, components=(None,)).fit(embeddings, target)
    scaled = (embeddings - embeddings.mean(0)) / embeddings.std(0)
    theirs = CoxnetSurvivalAnalysis(l1_ratio=0.5, n_alphas=15, alpha_min_ratio=0.03).fit(scaled, target)
    at = int(np.argmin(np.abs(theirs.alphas_ - ours.chosen_["alpha"])))
    np.testing.assert_allclose(ours.predict(embeddings), scaled @ theirs.coef_[:, at], atol=0.02)


class Recorder(BaseEstimator):
    """Notes which patients it was fitted on: the first feature is the patient's number."""

    seen: ClassVar[list[set[int]]] = []

    def fit(self, features, target):
        self.rows_ = set(features[:, 0].astype(int))
        Recorder.seen.append(self.rows_)
        return self

    def predict(self, features):
        assert not self.rows_ & set(features[:, 0].astype(int)) or len(features) == len(self.rows_)
        return features[:, 1]

    def predict_survival(self, features, times):
        return np.full((len(features), len(times)), 0.5)


def test_every_patient_is_predicted_by_a_model_that_never_saw_it(phantoms):
    ids, findings, _, time, event, _ = phantoms
    numbered = np.column_stack([np.arange(500), findings[:, :1]])
    Recorder.seen.clear()
    data = survival_data(numbered, ids, time, event)
    out = cross_validated_risks(Recorder(), data, folds=4, times=[100.0])
    for fold, seen in enumerate(Recorder.seen):
        assert not seen & set(data.features[out.fold == fold, 0].astype(int))
    shares = [data.event[out.fold == k].mean() for k in range(4)]
    assert np.ptp(shares) < 0.05  # stratified by event
    assert set(out.group) <= {0, 1}


def test_outcomes_of_test_patients_change_no_prediction_of_theirs(phantoms):
    """The negative test of leakage: scramble the outcomes of one fold, and its own risks stay as they were."""
    ids, _, embeddings, time, event, _ = phantoms
    data = survival_data(embeddings[:200], ids[:200], time[:200], event[:200])
    fold = stratified_folds(data.event, 5, 0)
    rows = np.flatnonzero((fold == 0) & data.event)
    changed = data.time.copy()
    changed[rows] = changed[np.roll(rows, 1)]  # times among its events: folds stay the same
    settings = {"folds": 5, "seed": 0}
    other = survival_data(data.features, data.patients, changed, data.event)
    one, two = (cross_validated_risks(CoxNet(**QUICK), d, **settings) for d in (data, other))
    np.testing.assert_array_equal(one.risk[fold == 0], two.risk[fold == 0])
    assert not np.array_equal(one.risk[fold == 1], two.risk[fold == 1])


def test_the_order_of_rows_does_not_matter(phantoms):
    ids, findings, _, time, event, _ = phantoms
    order = np.random.default_rng(0).permutation(500)
    one = survival_data(findings, ids, time, event)
    two = survival_data(findings[order], np.array(ids)[order], time[order], event[order])
    np.testing.assert_array_equal(one.features, two.features)
    assert one.patients == two.patients
    np.testing.assert_array_equal(stratified_folds(one.event, 5, 1), stratified_folds(two.event, 5, 1))


def test_rows_of_a_patient_become_one():
    x = np.array([[1.0, math.nan], [3.0, 5.0], [7.0, math.nan]])
    time, event = [10, None, 4.5], [1, 1, 0]
    mean = survival_data(x, ["b", "b", "a"], time, event)
    np.testing.assert_array_equal(mean.features, [[7, math.nan], [2, 5]])
    np.testing.assert_array_equal(mean.time, [4.5, 10])
    assert mean.patients == ("a", "b")
    assert (mean.rows, len(mean), mean.events) == (3, 2, 1)
    highest = survival_data(x, ["b", "b", "a"], time, event, pooling="max")
    np.testing.assert_array_equal(highest.features[1], [3, 5])
    left = survival_data(x, ["b", "b", "a"], [10, 10, None], event)
    assert left.patients == ("b",)  # nothing is known of the other's outcome


def test_contradictions_are_refused_and_name_nobody():
    x = np.zeros((3, 1))
    with pytest.raises(InputError, match=r"1 of 2 patients .* contradict each other in the time") as raised:
        survival_data(x, ["secret", "secret", "b"], [1, 2, 3], [1, 1, 0])
    assert "secret" not in str(raised.value)
    with pytest.raises(InputError, match="event flag"):
        survival_data(x, ["a", "a", "b"], [1, 1, 3], [1, 0, 0])


def test_flags_are_read_as_they_are_stored():
    assert event_flags([0, 1, "1", 0.0]) == [0, 1, 1, 0]
    assert event_flags(["True", "false"]) == [1, 0]
    assert event_flags(["alive", "Dead"], event_is="dead") == [0, 1]
    assert event_flags([1, 0, 0], censored=True) == [0, 1, 1]
    assert math.isnan(event_flags([None, 1])[0])
    with pytest.raises(InputError, match="3 different values"):
        event_flags([0, 1, 2])
    with pytest.raises(InputError, match="does not occur"):
        event_flags(["alive", "dead"])


def test_a_name_that_says_censoring_and_a_wrong_unit_are_refused():
    check_event_name("event")
    for name in ("censorship", "Censored", "is_censored"):
        with pytest.raises(InputError, match="--censored"):
            check_event_name(name)
    with pytest.raises(InputError, match="not in months"):
        check_unit([30, 3000], "months")
    assert check_unit([30, 3000], "days") is None
    assert "is the unit right" in (check_unit([3, 120], "days") or "")
    with pytest.raises(UnknownName):
        check_unit([1.0], "weeks")


def test_few_events_are_said():
    data = survival_data(np.zeros((40, 12)), [str(k) for k in range(40)], np.arange(1, 41), [1, 0] * 20)
    assert [w.split()[0] for w in few_events(data)] == ["20", "1.7"]


def test_components_and_scale_are_learnt_from_training_patients():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 50)) * np.arange(1, 51)
    x[::7, 3] = math.nan
    columns = Columns(5, free=(49,)).fit(x)
    ready = columns(x)
    assert ready.shape == (60, 6)
    np.testing.assert_allclose(ready[:, :5].T @ ready[:, :5] / 60, np.eye(5), atol=1e-9)  # white
    np.testing.assert_allclose(columns(x[:3]), ready[:3])  # no statistics of the rows at hand
    constant = np.column_stack([x[:, :2], np.full(60, 3.0)])
    assert np.isfinite(Columns(None).fit(constant)(constant * 5)).all()
    assert component_candidates("auto", 30) == (None,)
    assert component_candidates((4,), 30) == (4,)


def test_partial_likelihood_is_the_losss():
    import torch

    from chiasm.losses.survival import cox_loss

    random = np.random.default_rng(0)
    time, event, risk = np.ceil(random.exponential(5, 40)), random.random(40) < 0.5, random.normal(size=(40, 3))
    ours = log_partial_likelihood(risk, time, event)
    theirs = [
        -float(cox_loss(torch.tensor(risk[:, k]), torch.tensor(time), torch.tensor(event), reduction="sum"))
        for k in range(3)
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_the_baseline_knows_the_curve_and_nothing_else(phantoms):
    _, findings, _, time, event, _ = phantoms
    model = NoFeatures().fit(findings, survival_target(time, event))
    assert not model.predict(findings).any()
    at = np.quantile(time, [0.2, 0.5])
    np.testing.assert_allclose(model.predict_survival(findings[:2], at)[1], kaplan_meier(time, event).at(at))


def test_estimators_are_scikit_learns():
    for model in (CoxNet(free=(1,)), SurvivalForest(trees=3), NoFeatures(), NeuralCox()):
        assert clone(model).get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        CoxNet().predict(np.zeros((1, 1)))
    with pytest.raises(NotFittedError):
        SurvivalForest().predict(np.zeros((1, 1)))


def test_hostile_input_is_refused(phantoms):
    ids, findings, _, time, event, _ = phantoms
    target = survival_target(time, event)
    fitted = CoxNet(free=tuple(range(7))).fit(findings, target)
    with pytest.raises(InputError, match=r"\(n, 7\)"):
        fitted.predict(findings[:, :3])
    with pytest.raises(InputError, match="no patient beyond"):
        fitted.predict_survival(findings, [1e6])
    with pytest.raises(InputError, match="one row a patient"):
        CoxNet().fit(findings, target, groups=["a"] * 500)
    with pytest.raises(InputError, match="infinite"):
        CoxNet().fit(findings + np.inf, target)
    data = survival_data(findings, ids, time, np.arange(500) < 6)
    with pytest.raises(InputError, match="6 events are too few for 5 folds"):
        cross_validated_risks(CoxNet(), data)
    with pytest.raises(InputError, match="no patient beyond"):
        cross_validated_risks(NoFeatures(), survival_data(findings, ids, time, event), times=[1e6])
    with pytest.raises(InputError, match="no patient has both"):
        survival_data(findings[:2], ids[:2], [None, 1], [1, None])
    with pytest.raises(UnknownName):
        survival_data(findings, ids, time, event, pooling="median")


def test_without_the_extra_the_error_names_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "sksurv":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"chiasm\[survival\]"):
        CoxNet().fit(np.zeros((2, 1)), survival_target([1, 2], [1, 1]))
