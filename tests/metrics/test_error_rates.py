"""Statistics of the statistics: intervals hold the truth as often as they say, tests err as rarely as they say.

Worlds are drawn with patients who have one to four images, share noise among them, and mostly share the truth. Each test
is run small by default (bounds of three simulation errors and more) and large under ``slow``; the large numbers stand in
``docs/lab-notes.md``. Beside every honest rate stands the rate of the same method with rows taken for patients: it must
fail, or the worlds would prove nothing.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from chiasm.metrics.bootstrap import paired_difference, weighted_intervals
from chiasm.metrics.calibration import brier_statistic, ece_statistic
from chiasm.metrics.compare import compare_auroc, compare_findings, delong_covariance, delong_test, permutation_p
from chiasm.metrics.weighted import accuracy_statistic, auprc_statistic, auroc_statistic, macro_auroc_statistic
from chiasm.tasks.zero_shot import sigmoid

PATIENTS = 100


def world(seed, patients=PATIENTS, *, models=1, gain=0.0, findings=1):
    """Truth (rows, findings), scores (models, rows, findings) and the patient of each row.

    Models are exchangeable where ``gain`` is 0: equal in what they know of the truth, in what noise they share and in how
    much of their own they add.
    """
    random = np.random.default_rng([seed, 17])
    patient = np.repeat(np.arange(patients), random.integers(1, 5, patients))
    rows = len(patient)
    ill = random.random((patients, findings)) < 0.4
    truth = np.where(random.random((rows, findings)) < 0.9, ill[patient], random.random((rows, findings)) < 0.4)
    truth[:4] = np.array([0, 1, 0, 1])[:, None]
    shared = random.normal(size=(patients, findings))[patient] + 0.7 * random.normal(size=(rows, 1))
    own = random.normal(size=(models, patients, findings))[:, patient] + 0.7 * random.normal(
        size=(models, rows, findings)
    )
    scores = 1.5 * truth + shared + own
    scores[0] += gain * truth
    return truth.astype(float), scores, patient


def measures(truth, score):
    p = sigmoid(score - 0.75)
    return {
        "auroc": auroc_statistic(truth, score),
        "auprc": auprc_statistic(truth, score),
        "accuracy": accuracy_statistic(truth, (p >= 0.5).astype(float)),
        "brier": brier_statistic(truth, p),
    }


@cache
def true_values():
    """What the measures are in a world of 60,000 patients."""
    truth, scores, _ = world(10**6, 60_000)
    found = measures(truth[:, 0], scores[0, :, 0])
    return {name: float(s(np.ones((1, len(truth))))[0]) for name, s in found.items()}


def coverage(worlds, *, resamples=300):
    """Share of 95 % intervals that hold the truth: by patients, and with rows taken for patients."""
    held = {(name, how): 0 for name in true_values() for how in ("patients", "rows")}
    for seed in range(worlds):
        truth, scores, patient = world(seed)
        statistics = measures(truth[:, 0], scores[0, :, 0])
        for how, groups in (("patients", patient), ("rows", np.arange(len(patient)))):
            for name, i in weighted_intervals(statistics, groups, n_resamples=resamples, seed=seed).items():
                held[name, how] += i.low <= true_values()[name] <= i.high
    return {key: count / worlds for key, count in held.items()}


def type_one(worlds, *, permutations=99):
    """Share of equal models called different at 5 %: each test by patients, DeLong also by rows."""
    called = dict.fromkeys(("delong", "permutation", "permutation of brier", "bootstrap", "delong by rows"), 0)
    for seed in range(worlds):
        truth, scores, patient = world(seed + 50_000, models=2)
        y, a, b = truth[:, 0], scores[0, :, 0], scores[1, :, 0]
        p, q = sigmoid(a - 0.75), sigmoid(b - 0.75)
        options = {"n_permutations": permutations, "seed": seed}
        pair = paired_difference(auroc_statistic(y, a), auroc_statistic(y, b), patient, n_resamples=200, seed=seed)
        for name, value in {
            "delong": delong_test(y, a, b, patient).p_raw,
            "delong by rows": delong_test(y, a, b).p_raw,
            "permutation": permutation_p(auroc_statistic, y, a, b, patient, ranks=True, **options),
            "permutation of brier": permutation_p(brier_statistic, y, p, q, patient, **options),
            "bootstrap": pair.p_value,
        }.items():
            called[name] += value <= 0.05
    return {name: count / worlds for name, count in called.items()}


def family(worlds, *, better=0):
    """Share of worlds with any equal finding of six called different (raw, Holm), and power of the ``better`` ones."""
    raw = corrected = found = 0
    for seed in range(worlds):
        truth, scores, patient = world(seed + 90_000, models=2, findings=6)
        scores[0, :, :better] += 1.2 * truth[:, :better]
        names = [str(k) for k in range(6)]
        by_name = [{n: m[:, k] for k, n in enumerate(names)} for m in (truth, scores[0], scores[1])]
        tests = compare_findings(*by_name, patient, test="delong")
        equal = names[better:]
        raw += any(tests[n].p_raw <= 0.05 for n in equal)
        corrected += any(tests[n].p <= 0.05 for n in equal)
        found += sum(tests[n].p <= 0.05 for n in names[:better])
    return raw / worlds, corrected / worlds, found / max(worlds * better, 1)


def within(rate, nominal, worlds, *, errors=3.3, slack=0.01):
    """Whether a rate lies within simulation errors of the nominal one; ``slack`` is the method's own small-sample bias."""
    return abs(rate - nominal) <= errors * math.sqrt(nominal * (1 - nominal) / worlds) + slack


def check_coverage(worlds, **options):
    rates = coverage(worlds, **options)
    for name in true_values():
        # Percentile intervals of 100 patients are a point short; average precision is biased up in small samples, and
        # its resamples once more, so that its intervals lie too high: three points short (docs/lab-notes.md).
        slack = 0.045 if name == "auprc" else 0.015
        assert within(rates[name, "patients"], 0.95, worlds, slack=slack), (name, rates)
        assert rates[name, "rows"] < rates[name, "patients"] - 0.04, (name, rates)
    return rates


def check_type_one(worlds):
    rates = type_one(worlds)
    for name in ("delong", "permutation", "permutation of brier", "bootstrap"):
        assert within(rates[name], 0.05, worlds, slack=0.012), rates
    assert rates["delong by rows"] > 0.05 + 3 * math.sqrt(0.05 * 0.95 / worlds), rates
    return rates


def check_family(worlds):
    raw, corrected, _ = family(worlds)
    assert raw > 0.12, (raw, corrected)
    assert corrected <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / worlds) + 0.01, (raw, corrected)
    raw_some, corrected_some, power = family(worlds, better=2)
    assert corrected_some <= 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / worlds) + 0.01, (raw_some, corrected_some)
    assert power > 0.5
    return raw, corrected, raw_some, corrected_some, power


def test_intervals_over_patients_hold_the_truth_and_intervals_over_rows_do_not():
    check_coverage(100, resamples=200)


def test_paired_tests_err_as_rarely_as_they_say():
    check_type_one(120)


def test_holm_keeps_the_family_of_findings():
    check_family(80)


@pytest.mark.slow
def test_intervals_hold_the_truth_in_many_worlds():
    check_coverage(2000)


@pytest.mark.slow
def test_paired_tests_err_as_rarely_as_they_say_in_many_worlds():
    check_type_one(2000)


@pytest.mark.slow
def test_holm_keeps_the_family_in_many_worlds():
    check_family(2000)


def test_delongs_error_is_that_of_the_bootstrap():
    """Standard error of the AUROC, and of a difference, over worlds: formula beside resampled patients."""
    ratios, paired = [], []
    for seed in range(12):
        truth, scores, patient = world(seed + 7000, 150, models=2)
        y, both = truth[:, 0], scores[:, :, 0].T
        covariance = delong_covariance(y, both, patient).covariance
        statistics = [auroc_statistic(y, both[:, k]) for k in range(2)]
        draws = []
        for k in range(2):
            i = weighted_intervals({"a": statistics[k]}, patient, n_resamples=400, seed=seed, level=0.6827)["a"]
            draws.append((i.high - i.low) / 2)
        ratios += [math.sqrt(covariance[k, k]) / draws[k] for k in range(2)]
        i = paired_difference(*statistics, patient, n_resamples=400, seed=seed, level=0.6827).difference
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        paired.append(math.sqrt(variance) / ((i.high - i.low) / 2))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.mean(paired) == pytest.approx(1, abs=0.05)


def test_delongs_interval_holds_the_truth():
    held = 0
    for seed in range(300):
        truth, scores, patient = world(seed + 20_000)
        found = delong_covariance(truth[:, 0], scores[0], patient)
        half = 1.96 * math.sqrt(found.covariance[0, 0])
        held += abs(found.auroc[0] - true_values()["auroc"]) <= half
    assert within(held / 300, 0.95, 300)


def test_a_real_gain_is_found():
    p = [compare_auroc(t[:, 0], s[0, :, 0], s[1, :, 0], g).p_raw
         for t, s, g in (world(seed, 200, models=2, gain=1.0) for seed in range(20))]  # fmt: skip
    assert np.mean(np.array(p) < 0.05) > 0.6


def test_the_calibration_error_of_resamples_is_biased_up_as_its_documentation_says():
    """A perfect forecast has an error above 0 in finite data, and resamples have more."""
    random = np.random.default_rng(0)
    above = 0
    for seed in range(30):
        p = random.random(300)
        truth = (random.random(300) < p).astype(float)
        i = weighted_intervals(
            {"e": ece_statistic(truth, p, of="positive")}, np.arange(300), n_resamples=100, seed=seed
        )
        above += (i["e"].low + i["e"].high) / 2 > i["e"].value
    assert above > 25


def test_macro_auroc_over_findings_holds_its_truth():
    truth, scores, _ = world(10**6 + 1, 30_000, findings=3)
    value = float(macro_auroc_statistic(truth, scores[0])(np.ones((1, len(truth))))[0])
    held = 0
    for seed in range(120):
        t, s, g = world(seed + 30_000, findings=3)
        i = weighted_intervals({"m": macro_auroc_statistic(t, s[0])}, g, n_resamples=200, seed=seed)["m"]
        held += i.low <= value <= i.high
    assert within(held / 120, 0.95, 120, slack=0.015)
