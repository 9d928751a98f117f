"""Intervals and paired tests against closed forms, exhaustive enumeration and another library."""

from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fewmask.evaluate.statistics import METRICS, compare, sign_flip_test, summarise
from fewmask.types import UserError


def make_row(name: str, value: float, group: str = "", **changed: Any) -> dict[str, Any]:
    return {
        "name": name, "group": group, "label": None, **dict.fromkeys(METRICS, value), "missed": False,
        "empty_truth": False, "empty_prediction": False, "truth_fraction": 0.2, "prediction_fraction": 0.2,
        "height": 10, "width": 10, **changed,
    }  # fmt: skip


def make_rows(values: Any, groups: Any = None) -> list[dict[str, Any]]:
    groups = itertools.repeat("") if groups is None else groups
    return [make_row(f"case{i}", float(v), str(g)) for i, (v, g) in enumerate(zip(values, groups, strict=False))]


def width(summary: dict[str, Any], metric: str = "dice") -> float:
    return summary[metric]["high"] - summary[metric]["low"]


def test_mean_median_and_deviation_are_those_of_the_cases() -> None:
    summary = summarise(make_rows([0.1, 0.5, 0.9, 0.9]))
    assert summary["dice"]["mean"] == pytest.approx(0.6)
    assert summary["dice"]["median"] == pytest.approx(0.7)
    assert summary["dice"]["std"] == pytest.approx(math.sqrt((0.25 + 0.01 + 0.09 + 0.09) / 4))
    assert (summary["num_cases"], summary["num_groups"]) == (4, 4)


def test_constant_rows_have_an_interval_of_no_width() -> None:
    summary = summarise(make_rows([0.75] * 20))
    assert (summary["dice"]["low"], summary["dice"]["high"]) == (0.75, 0.75)


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    expected = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert width(summarise(make_rows(values), num_bootstrap=4000)) == pytest.approx(expected, rel=0.06)


def test_copies_of_a_case_in_its_group_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).uniform(size=40)
    single = summarise(make_rows(values))
    copies = make_rows(np.repeat(values, 9), np.repeat(np.arange(40), 9))
    grouped, ungrouped = summarise(copies), summarise(make_rows(np.repeat(values, 9)))
    assert width(grouped) == pytest.approx(width(single), rel=1e-9)
    assert width(ungrouped) == pytest.approx(width(single) / 3, rel=0.1)


def test_groups_of_unequal_size_agree_with_drawing_them_one_by_one() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(12), rng.integers(1, 9, 12))
    values = rng.uniform(size=len(groups)) + groups / 12
    members = [values[groups == g] for g in range(12)]
    means = [np.concatenate([members[g] for g in rng.integers(0, 12, 12)]).mean() for _ in range(6000)]
    summary = summarise(make_rows(values, groups), num_bootstrap=6000)["dice"]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (summary["low"], summary["high"]) == pytest.approx((low, high), abs=0.02 * (high - low) + 0.01)


def test_one_group_has_no_interval() -> None:
    summary = summarise(make_rows([0.2, 0.8], ["p", "p"]))
    assert summary["dice"]["mean"] == 0.5
    assert summary["dice"]["low"] is None
    assert summary["dice"]["high"] is None


def test_the_same_seed_gives_the_same_interval() -> None:
    rows = make_rows(np.random.default_rng(3).uniform(size=30))
    assert summarise(rows, seed=4) == summarise(rows, seed=4)
    assert summarise(rows, seed=4)["dice"]["low"] != summarise(rows, seed=5)["dice"]["low"]


def test_undefined_values_are_left_out_and_counted() -> None:
    rows = make_rows([0.5, 0.7, 0.9])
    rows[1]["sensitivity"] = math.nan
    for row in rows:
        row["specificity"] = math.nan
    summary = summarise(rows)
    assert summary["sensitivity"]["mean"] == pytest.approx(0.7)
    assert summary["sensitivity"]["num_undefined"] == 1
    assert (summary["specificity"]["mean"], summary["specificity"]["num_undefined"]) == (None, 3)
    json.dumps(summary, allow_nan=False)


def test_empties_are_reported_apart() -> None:
    lesions = [make_row("a", 0.8), make_row("b", 0.0, missed=True, empty_prediction=True)]
    empties = [
        make_row("c", 1.0, empty_truth=True, empty_prediction=True),
        make_row("d", 0.0, empty_truth=True),
        make_row("e", 1.0, empty_truth=True, empty_prediction=True),
    ]
    summary = summarise(lesions + empties)
    assert (summary["missed"], summary["false_alarms"], summary["empty_truth"]) == (1, 1, 3)
    assert summary["empties"] == {"num_cases": 3, "correct": 2}
    assert summary["positives"]["num_cases"] == 2
    assert summary["positives"]["dice"]["mean"] == pytest.approx(0.4)
    assert summary["dice"]["mean"] == pytest.approx(0.56)
    assert "positives" not in summarise(lesions)
    assert "positives" not in summarise(empties)


def test_six_hundred_cases_are_summarised_in_a_moment() -> None:
    rng = np.random.default_rng(0)
    rows = make_rows(rng.uniform(size=600), rng.integers(0, 400, 600))
    start = time.perf_counter()
    summarise(rows)
    # 0.1 s where this was written; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 1.0


def test_nothing_to_summarise_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="no case"):
        summarise([])


def test_a_shift_is_detected_and_its_direction_kept() -> None:
    rng = np.random.default_rng(0)
    worse = rng.uniform(0.5, 0.8, 100)
    better = worse + rng.normal(0.03, 0.05, 100)
    result = compare(make_rows(better), make_rows(worse))
    assert result["difference"] == pytest.approx((better - worse).mean())
    assert 0 < result["low"] < result["difference"] < result["high"]
    assert result["p_value"] < 0.001
    assert result["wins"] == (better > worse).sum()
    assert compare(make_rows(worse), make_rows(better))["difference"] == pytest.approx(-result["difference"])


def test_a_smaller_distance_wins() -> None:
    result = compare(make_rows([1.0, 2.0, 5.0]), make_rows([2.0, 2.0, 9.0]), metric="hd95_256")
    assert (result["wins"], result["ties"], result["losses"]) == (2, 1, 0)
    assert result["difference"] == pytest.approx(-5 / 3)


def test_equal_models_have_p_value_one() -> None:
    rows = make_rows(np.random.default_rng(0).uniform(size=30))
    result = compare(rows, rows[::-1])
    assert (result["p_value"], result["difference"], result["ties"]) == (1.0, 0.0, 30)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    p_values = [sign_flip_test(rng.normal(size=12), rng) for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_few_groups_are_enumerated(differences: list[float]) -> None:
    observed = abs(sum(differences))
    flips = itertools.product([1, -1], repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    expected = np.mean([total >= observed - 1e-9 for total in sums])
    exact = np.mean([total >= observed for total in sums])
    p_value = sign_flip_test(np.array(differences), np.random.default_rng(0))
    assert min(exact, expected) - 1e-12 <= p_value <= max(exact, expected) + 1e-12


def test_many_groups_agree_with_scipy() -> None:
    differences = np.random.default_rng(1).normal(0.15, 1, 60)
    published = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
    )
    assert sign_flip_test(differences, np.random.default_rng(3)) == pytest.approx(published.pvalue, abs=0.02)


def test_correlated_cases_of_a_group_count_once() -> None:
    rng = np.random.default_rng(0)
    worse = rng.uniform(0.4, 0.6, 8)
    better = worse + 0.02
    groups = np.repeat(np.arange(8), 50)
    grouped = [make_rows(np.repeat(values, 50), groups) for values in (better, worse)]
    assert compare(*grouped)["p_value"] == pytest.approx(2 / 2**8)


def test_results_of_different_cases_are_not_compared() -> None:
    with pytest.raises(UserError, match="case2"):
        compare(make_rows([1, 1, 1]), make_rows([1, 1]))
    with pytest.raises(UserError, match="twice"):
        compare(make_rows([1]) * 2, make_rows([1]))
    with pytest.raises(UserError, match="different masks"):
        compare([make_row("a", 1)], [make_row("a", 1, truth_fraction=0.3)])
    with pytest.raises(UserError, match="group"):
        compare([make_row("a", 1, "p")], [make_row("a", 1, "q")])
    with pytest.raises(UserError, match="metric"):
        compare(make_rows([1]), make_rows([1]), metric="accuracy")
