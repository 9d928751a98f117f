"""Means with intervals over groups, and paired comparisons of two models; NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewmask.evaluate.results import Row
from fewmask.types import UserError

Array = NDArray[np.float64]

METRICS = (
    "dice", "iou", "boundary_iou", "sensitivity", "specificity", "dice_256", "iou_256", "hd95_256", "hd95_percent",
)  # fmt: skip
LOWER_IS_BETTER = frozenset({"hd95_256", "hd95_percent"})
LEVEL = 95.0
NUM_FLIPS = 10_000
MAX_EXACT_GROUPS = 13
CHUNK = 250


def summarise(rows: Sequence[Row], num_bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Return the metrics of a split, ready for JSON.

    "num_cases", "num_groups", one entry per metric (see `describe`), and the counts "missed" (lesions without any
    predicted pixel), "false_alarms" (empty truths with one) and "empty_truth". Where some truths are empty, "empties"
    holds "num_cases" and "correct", and "positives" the same metrics over the other cases, if there are any: a mean
    over both rewards a model that predicts nothing. Raises a UserError when there is no row.
    """
    if not rows:
        raise UserError("There is no case to summarise; score a split that holds images with masks.")
    positives = [row for row in rows if not row["empty_truth"]]
    empties = [row for row in rows if row["empty_truth"]]
    correct = sum(bool(row["empty_prediction"]) for row in empties)
    summary = {
        **_all_metrics(rows, num_bootstrap, seed),
        "missed": sum(bool(row["missed"]) for row in rows),
        "false_alarms": len(empties) - correct,
        "empty_truth": len(empties),
    }
    if empties:
        summary["empties"] = {"num_cases": len(empties), "correct": correct}
    if empties and positives:
        summary["positives"] = _all_metrics(positives, num_bootstrap, seed)
    return summary


def _all_metrics(rows: Sequence[Row], num_bootstrap: int, seed: int) -> dict[str, Any]:
    groups = group_indices(rows)
    values = np.array([[row[metric] for metric in METRICS] for row in rows], dtype=float)
    replicates = bootstrap_means(values, groups, num_bootstrap, np.random.default_rng(seed))
    return {
        "num_cases": len(rows),
        "num_groups": int(groups.max()) + 1,
        **{metric: describe(values[:, i], replicates[:, i], groups) for i, metric in enumerate(METRICS)},
    }


def describe(values: Array, replicates: Array, groups: NDArray[np.intp]) -> dict[str, float | int | None]:
    """Return "mean", "low", "high", "median", "std" and "num_undefined" of one metric.

    `values` (n,) holds nan where a case has no value; such cases are left out and counted. "low" and "high" bound the
    95 % percentile interval of the bootstrapped mean; they are None where fewer than two groups have a value, since
    one group says nothing of another. "std" is over cases and divides by n. All are None where no case has a value.
    """
    valid = ~np.isnan(values)
    num_undefined = int((~valid).sum())
    if not valid.any():
        return {**dict.fromkeys(("mean", "low", "high", "median", "std")), "num_undefined": num_undefined}
    low, high = interval(replicates) if len(np.unique(groups[valid])) > 1 else (None, None)
    known = values[valid]
    return {
        "mean": float(known.mean()),
        "low": low,
        "high": high,
        "median": float(np.median(known)),
        "std": float(known.std()),
        "num_undefined": num_undefined,
    }


def interval(replicates: Array) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap replicates; a replicate without any value (nan) is left out."""
    low, high = np.nanpercentile(replicates, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def group_indices(rows: Sequence[Row]) -> NDArray[np.intp]:
    """Return the index of each row's group (n,); a row without a group is one of its own."""
    return np.unique([row["group"] or row["name"] for row in rows], return_inverse=True)[1]


def bootstrap_means(values: Array, groups: NDArray[np.intp], num_bootstrap: int, rng: np.random.Generator) -> Array:
    """Return the means (num_bootstrap, m) over cases when whole groups are drawn with replacement.

    `values` (n, m), nan where undefined; `groups` (n,) from `group_indices`. Cases of one patient or lesion are alike,
    so drawing cases one by one would make the interval too narrow.
    """
    num_groups = int(groups.max()) + 1
    valid = ~np.isnan(values)
    sums, counts = (_per_group(part, groups, num_groups) for part in (np.where(valid, values, 0.0), valid))
    means = []
    for size in _chunks(num_bootstrap):
        drawn = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=size).astype(float)
        total = drawn @ counts
        means.append(np.divide(drawn @ sums, total, out=np.full_like(total, np.nan), where=total > 0))
    return np.concatenate(means)


def _per_group(values: NDArray[Any], groups: NDArray[np.intp], num_groups: int) -> Array:
    return np.stack([np.bincount(groups, column, num_groups) for column in values.T], axis=1).astype(float)


def _chunks(total: int) -> Iterator[int]:
    # Bounds the memory for sets of many thousand groups.
    for start in range(0, total, CHUNK):
        yield min(CHUNK, total - start)


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str = "dice", num_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Return the paired comparison of two models on the same cases, ready for JSON.

    "difference" is the mean of a - b over the cases, "low" and "high" its 95 % interval by bootstrap of groups (None
    with one group), "p_value" that of `sign_flip_test` by group. "wins" counts the cases where a is better (a smaller
    HD95, a larger anything else), "losses" where b is. Cases without a value in both (see `metrics`) are left out.
    Raises a UserError when the rows are not of the same cases, groups and masks.
    """
    if metric not in METRICS:
        raise UserError(f"There is no metric named '{metric}'; choose one of: {', '.join(METRICS)}.")
    pairs = pair_rows(rows_a, rows_b)
    a, b = (np.array([pair[i][metric] for pair in pairs], dtype=float) for i in (0, 1))
    valid = ~(np.isnan(a) | np.isnan(b))
    if not valid.any():
        raise UserError(f"No case has a {metric} in both results; compare another metric.")
    a, b = a[valid], b[valid]
    groups = group_indices([pair[0] for pair, known in zip(pairs, valid, strict=True) if known])
    return {"metric": metric, **_paired(a, b, groups, metric in LOWER_IS_BETTER, num_bootstrap, seed)}


def _paired(
    a: Array, b: Array, groups: NDArray[np.intp], lower_is_better: bool, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    difference, rng = a - b, np.random.default_rng(seed)
    better = -difference if lower_is_better else difference
    num_groups = int(groups.max()) + 1
    low, high = None, None
    if num_groups > 1:
        low, high = interval(bootstrap_means(difference[:, None], groups, num_bootstrap, rng))
    return {
        "num_cases": len(a),
        "num_groups": num_groups,
        "mean_a": float(a.mean()),
        "mean_b": float(b.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p_value": sign_flip_test(_per_group(difference[:, None], groups, num_groups)[:, 0], rng),
        "wins": int((better > 0).sum()),
        "ties": int((better == 0).sum()),
        "losses": int((better < 0).sum()),
    }


def sign_flip_test(differences: Array, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of the paired permutation test: each group's summed difference may change sign.

    `differences` (g,) are sums over the cases of a group. Exact up to 13 groups (so 3 groups cannot go below 0.25);
    beyond, 10,000 random flips with one added to both counts (Phipson and Smyth 2010), so that p is never 0.
    """
    observed = abs(differences.sum()) * (1 - 1e-9)
    num_groups = len(differences)
    if num_groups <= MAX_EXACT_GROUPS:
        bits = np.arange(2**num_groups)[:, None] >> np.arange(num_groups) & 1
        return float((np.abs((1 - 2 * bits) @ differences) >= observed).mean())
    extreme = 0
    for size in _chunks(NUM_FLIPS):
        signs = 2 * rng.integers(0, 2, size=(size, num_groups), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (NUM_FLIPS + 1)


def pair_rows(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the two rows of every case, or raise a UserError when both do not cover the same cases and masks."""
    by_name_a, by_name_b = _by_name(rows_a, "first"), _by_name(rows_b, "second")
    if not by_name_a and not by_name_b:
        raise UserError("Neither result holds a case; evaluate both models first.")
    missing = by_name_a.keys() ^ by_name_b.keys()
    if missing:
        raise UserError(
            f"The two results are not of the same cases: {len(missing)} are in one only, such as {min(missing)}; "
            "evaluate both models on the same split."
        )
    for name, row in by_name_a.items():
        _check_same_truth(name, row, by_name_b[name])
    return [(by_name_a[name], by_name_b[name]) for name in sorted(by_name_a)]


def _by_name(rows: Sequence[Row], which: str) -> dict[str, Row]:
    by_name = {row["name"]: row for row in rows}
    if len(by_name) != len(rows):
        raise UserError(f"The {which} result holds a case twice; evaluate the model again.")
    return by_name


def _check_same_truth(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if a["group"] != b["group"]:
        raise UserError(
            f"Case {name} is of group {a['group']} in one result and {b['group']} in the other; "
            "evaluate both models with one manifest."
        )
    same_size = (a["height"], a["width"]) == (b["height"], b["width"])
    if not same_size or abs(a["truth_fraction"] - b["truth_fraction"]) > 1e-9:
        raise UserError(f"Case {name} was scored against different masks; evaluate both models on the same data.")
