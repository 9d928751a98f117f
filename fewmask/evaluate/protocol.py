"""How one case is scored: at the mask's own size, and at 256x256 for comparison with the papers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fewmask.data.preprocess import resize_mask
from fewmask.evaluate.metrics import (
    Mask,
    boundary_iou,
    check_masks,
    count_pixels,
    diagonal,
    emptiness,
    hd95,
    overlap_metrics,
)
from fewmask.evaluate.results import Row
from fewmask.types import Case, UserError

COMMON_SIZE = 256


def threshold_mask(probability: NDArray[np.float32], threshold: float) -> Mask:
    """Return `probability >= threshold`, bool (h, w)."""
    return probability >= threshold


def to_common_grid(mask: Mask, size: int = COMMON_SIZE) -> Mask:
    """Return the mask on a square grid: its coverage, antialiased, of at least one half.

    Our choice: the thresholded native prediction goes through this, not its probability, so that the prediction and
    the truth are treated alike and a perfect native mask stays perfect. A mask too small to cover half of any pixel
    keeps the pixels it covers most, so that no lesion vanishes and an empty truth means an empty native truth.
    """
    coverage = resize_mask(mask, size)
    return coverage >= min(128, int(coverage.max())) if coverage.any() else _nearest(mask, size)


def _nearest(mask: Mask, size: int) -> Mask:
    # Coverage below 1/510 of every pixel rounds to nothing: place the lesion where its pixels are.
    grid = np.zeros((size, size), dtype=bool)
    rows, columns = np.nonzero(mask)
    grid[rows * size // mask.shape[0], columns * size // mask.shape[1]] = True
    return grid


def score_case(case: Case, probability: NDArray[np.float32], truth: Mask, threshold: float = 0.5) -> Row:
    """Return the row of one case.

    `probability` float32 (h, w) and `truth` bool (h, w) are at the mask's own size. "dice", "iou", "boundary_iou",
    "sensitivity" and "specificity" are measured there; "dice_256", "iou_256" and "hd95_256" (pixels) at 256x256, see
    `to_common_grid`; "hd95_percent" is HD95 at the mask's own size in % of its diagonal, which 256x256 would distort.
    "truth_fraction" and "prediction_fraction" are shares of the image. For empty masks see `metrics`.
    """
    check_probability(case, probability, truth.shape)
    prediction = threshold_mask(probability, threshold)
    check_masks(prediction, truth)
    height, width = truth.shape
    return {
        "name": case.name,
        "group": case.group or case.name,
        "label": case.label,
        **overlap_metrics(prediction, truth),
        "boundary_iou": boundary_iou(prediction, truth),
        **common_metrics(prediction, truth),
        "hd95_percent": 100 * hd95(prediction, truth) / diagonal(truth.shape),
        **emptiness(prediction, truth),
        "truth_fraction": count_pixels(truth) / truth.size,
        "prediction_fraction": count_pixels(prediction) / truth.size,
        "height": height,
        "width": width,
    }


def common_metrics(prediction: Mask, truth: Mask) -> dict[str, float]:
    """Return "dice_256", "iou_256" and "hd95_256" (pixels) of two native masks brought to 256x256."""
    prediction, truth = to_common_grid(prediction), to_common_grid(truth)
    overlap = overlap_metrics(prediction, truth)
    return {"dice_256": overlap["dice"], "iou_256": overlap["iou"], "hd95_256": hd95(prediction, truth)}


def check_probability(case: Case, probability: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Raise unless the prediction is a probability for every pixel: a UserError for a model gone wrong."""
    if probability.shape != shape:
        raise ValueError(f"the prediction for {case.name} is {probability.shape}, the image {shape}")
    lowest, highest = float(probability.min()), float(probability.max())
    if np.isnan(lowest) or np.isnan(highest):
        raise UserError(
            f"The model's prediction for {case.image} holds values that are not numbers; its training diverged: "
            "train it again with a lower learning rate."
        )
    if lowest < 0 or highest > 1:
        raise ValueError(f"the prediction for {case.name} runs from {lowest} to {highest}: not a probability")
