"""The metrics against brute force, the ISIC challenge's own scorer, closed forms and symmetries."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from fewmask.evaluate.metrics import boundary_iou, case_metrics, diagonal, hd95, surface

from .masks import Mask, disk, mask_pairs

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def brute_surface(mask: Mask) -> np.ndarray:
    height, width = mask.shape
    points = []
    for r, c in np.argwhere(mask):
        neighbours = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
        if any(not (0 <= i < height and 0 <= j < width) or not mask[i, j] for i, j in neighbours):
            points.append((r, c))
    return np.array(points, dtype=float).reshape(-1, 2)


def brute_hd95(a: Mask, b: Mask) -> float:
    if not a.any() and not b.any():
        return 0.0
    if not a.any() or not b.any():
        return math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2)
    distances = np.linalg.norm(brute_surface(a)[:, None] - brute_surface(b)[None], axis=2)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


def brute_band(mask: Mask, width: int) -> Mask:
    # The authors erode `width` times by 3x3 with zeros beyond the border.
    inside = np.pad(mask, 1)
    for _ in range(width):
        shifts = [np.roll(inside, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        inside = np.logical_and.reduce(shifts)
    return mask & ~inside[1:-1, 1:-1]


def brute_boundary_iou(a: Mask, b: Mask) -> float:
    width = max(1, round(0.02 * math.hypot(*a.shape)))
    a, b = brute_band(a, width), brute_band(b, width)
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


@given(mask_pairs())
def test_distances_agree_with_brute_force(pair: tuple[Mask, Mask]) -> None:
    prediction, truth = pair
    assert hd95(prediction, truth) == pytest.approx(brute_hd95(prediction, truth))
    assert boundary_iou(prediction, truth) == pytest.approx(brute_boundary_iou(prediction, truth))
    assert {tuple(p) for p in np.argwhere(surface(truth))} == {tuple(p) for p in brute_surface(truth)}


@pytest.mark.parametrize("seed", range(3))
def test_boundary_iou_agrees_with_brute_force_where_the_band_is_wide(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = (disk(150, rng.uniform(0, 150, 2), rng.uniform(20, 60)) for _ in range(2))
    prediction |= truth & disk(150, (75, 75), 40)
    assert boundary_iou(prediction, truth) == pytest.approx(brute_boundary_iou(prediction, truth))


@given(mask_pairs())
def test_overlap_agrees_with_sets_of_pixels(pair: tuple[Mask, Mask]) -> None:
    prediction, truth = pair
    p, t = ({tuple(i) for i in np.argwhere(m)} for m in pair)
    grid = set(np.ndindex(truth.shape))
    metrics = case_metrics(prediction, truth)
    assert metrics["dice"] == pytest.approx(2 * len(p & t) / (len(p) + len(t)) if p or t else 1.0)
    assert metrics["iou"] == pytest.approx(len(p & t) / len(p | t) if p or t else 1.0)
    assert metrics["sensitivity"] == pytest.approx(len(p & t) / len(t) if t else math.nan, nan_ok=True)
    specificity = len(grid - p - t) / len(grid - t) if grid - t else math.nan
    assert metrics["specificity"] == pytest.approx(specificity, nan_ok=True)


@given(mask_pairs())
def test_dice_and_iou_say_the_same(pair: tuple[Mask, Mask]) -> None:
    metrics = case_metrics(*pair)
    assert metrics["dice"] == pytest.approx(2 * metrics["iou"] / (1 + metrics["iou"]))


@given(mask_pairs())
def test_nothing_changes_when_both_masks_are_turned(pair: tuple[Mask, Mask]) -> None:
    prediction, truth = pair
    metrics = case_metrics(prediction, truth)
    for turn in (np.transpose, np.flipud, np.fliplr, np.rot90):
        assert case_metrics(turn(prediction), turn(truth)) == pytest.approx(metrics, nan_ok=True)


@given(mask_pairs())
def test_swapping_prediction_and_truth_keeps_the_symmetric_metrics(pair: tuple[Mask, Mask]) -> None:
    forward, backward = case_metrics(*pair), case_metrics(*pair[::-1])
    for metric in ("dice", "iou", "boundary_iou", "hd95"):
        assert forward[metric] == pytest.approx(backward[metric])


@given(mask_pairs())
def test_a_mask_agrees_with_itself_and_bounds_hold(pair: tuple[Mask, Mask]) -> None:
    itself, metrics = case_metrics(pair[0], pair[0]), case_metrics(*pair)
    assert (itself["dice"], itself["iou"], itself["boundary_iou"], itself["hd95"]) == (1, 1, 1, 0)
    assert 0 <= metrics["hd95"] <= diagonal(pair[0].shape)


def test_empty_masks_are_scored_as_the_protocol_says() -> None:
    empty, lesion = np.zeros((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)
    lesion[10:12, 10:12] = True
    nothing, missed, alarm = case_metrics(empty, empty), case_metrics(empty, lesion), case_metrics(lesion, empty)
    assert (nothing["dice"], nothing["iou"], nothing["hd95"], nothing["missed"]) == (1, 1, 0, False)
    assert (missed["dice"], missed["iou"], missed["hd95"], missed["missed"]) == (0, 0, 50, True)
    assert (alarm["dice"], alarm["iou"], alarm["hd95"], alarm["missed"]) == (0, 0, 50, False)
    assert math.isnan(nothing["sensitivity"])
    assert math.isnan(alarm["sensitivity"])
    assert missed["sensitivity"] == 0


def test_hd95_of_a_shifted_square_is_the_shift() -> None:
    truth, prediction = np.zeros((100, 100), dtype=bool), np.zeros((100, 100), dtype=bool)
    truth[20:60, 20:60] = True
    prediction[20:60, 27:67] = True
    assert hd95(prediction, truth) == 7


def test_hd95_takes_the_worse_direction_and_does_not_pool() -> None:
    truth, prediction = np.zeros((1, 200), dtype=bool), np.zeros((1, 200), dtype=bool)
    truth[0, :100] = True
    prediction[0, :10] = True
    # Outward all 0; inward ten 0, then 1 .. 90: position 94.05 of 0 .. 99. Pooled it would be 84.55.
    assert hd95(prediction, truth) == pytest.approx(85.05)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        case_metrics(np.zeros((2, 3), dtype=bool), np.zeros((3, 2), dtype=bool))
    with pytest.raises(ValueError, match="bool"):
        case_metrics(np.zeros((2, 2), dtype=np.uint8), np.zeros((2, 2), dtype=bool))  # type: ignore[arg-type]


def test_half_a_megapixel_takes_milliseconds() -> None:
    prediction, truth = disk(512, (250, 250), 160), disk(512, (240, 270), 150)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        case_metrics(prediction, truth)
        seconds.append(time.perf_counter() - start)
    # 5 ms where this was written; the bound leaves room for a busy machine.
    assert min(seconds) < 0.05


def real_masks(num: int) -> list[Mask]:
    paths = sorted((SHARED / "isic" / "masks").glob("*.png"))
    if not paths:
        pytest.skip("the ISIC masks of ../shared/data are not here")
    masks = []
    for path in paths[:: len(paths) // num][:num]:
        with Image.open(path) as image:
            masks.append(np.asarray(image.convert("L")) > 127)
    return masks


def test_agrees_with_the_isic_challenge_scorer_on_real_masks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        confusion = pytest.importorskip("isic_challenge_scoring.confusion")
        from isic_challenge_scoring import metrics as isic
    names = {"dice": isic.binary_dice, "iou": isic.binary_jaccard, "sensitivity": isic.binary_sensitivity,
             "specificity": isic.binary_specificity}  # fmt: skip
    rng = np.random.default_rng(0)
    for truth in real_masks(20):
        prediction = np.roll(truth, rng.integers(-60, 60, 2), axis=(0, 1)) ^ (rng.random(truth.shape) < 0.01)
        counts = confusion.create_binary_confusion_matrix(truth, prediction)
        metrics = case_metrics(prediction, truth)
        for name, published in names.items():
            assert metrics[name] == pytest.approx(published(counts), abs=1e-12)


def test_the_scorer_of_the_challenge_treats_empty_masks_as_we_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        confusion = pytest.importorskip("isic_challenge_scoring.confusion")
        from isic_challenge_scoring import metrics as isic
    empty, lesion = np.zeros((8, 8), dtype=bool), np.eye(8, dtype=bool)
    for prediction, truth in [(empty, empty), (empty, lesion), (lesion, empty)]:
        counts = confusion.create_binary_confusion_matrix(truth, prediction)
        metrics = case_metrics(prediction, truth)
        assert metrics["dice"] == isic.binary_dice(counts)
        assert metrics["iou"] == isic.binary_jaccard(counts)
