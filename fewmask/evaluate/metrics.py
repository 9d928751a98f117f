"""What Dice, IoU, HD95 and the others mean here, empty masks included; NumPy and SciPy only.

Empty masks: both empty is a perfect answer (overlap 1, HD95 0). One of the two empty is the worst there is (overlap 0,
HD95 = the diagonal of the grid), so that missing a lesion, or inventing one, can never improve a mean.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter1d
from scipy.spatial import KDTree

Mask = NDArray[np.bool_]

BOUNDARY_RATIO = 0.02


def case_metrics(prediction: Mask, truth: Mask) -> dict[str, float]:
    """Return every metric of one prediction on the grid it is given on.

    Both masks are bool (h, w). "dice", "iou", "boundary_iou", "sensitivity" and "specificity" are in [0, 1]; "hd95" is
    in pixels; "missed", "empty_truth" and "empty_prediction" are bools. Sensitivity is nan where the truth is empty
    and specificity where it fills the image: there is nothing to divide by (the ISIC scorer calls both 1).
    Raises ValueError when the masks are not bool, not 2-D, have no pixel, or differ in shape.
    """
    check_masks(prediction, truth)
    return {
        **overlap_metrics(prediction, truth),
        "boundary_iou": boundary_iou(prediction, truth),
        "hd95": hd95(prediction, truth),
        **emptiness(prediction, truth),
    }


def check_masks(prediction: Mask, truth: Mask) -> None:
    """Raise ValueError unless both masks are bool (h, w) of one shape with at least a pixel."""
    for mask in (prediction, truth):
        if mask.dtype != np.bool_ or mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"a mask is a bool array (h, w) with pixels in it, not {mask.dtype} {mask.shape}")
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape} and the truth {truth.shape}: they must be of one shape")


def overlap_metrics(prediction: Mask, truth: Mask) -> dict[str, float]:
    """Return "dice", "iou", "sensitivity" and "specificity" from the four counts of pixels (see `case_metrics`)."""
    overlap = count_pixels(prediction & truth)
    predicted, true = count_pixels(prediction), count_pixels(truth)
    false_positives, negatives = predicted - overlap, truth.size - true
    return {
        "dice": _ratio(2 * overlap, predicted + true, undefined=1.0),
        "iou": _ratio(overlap, predicted + true - overlap, undefined=1.0),
        "sensitivity": _ratio(overlap, true, undefined=math.nan),
        "specificity": _ratio(negatives - false_positives, negatives, undefined=math.nan),
    }


def emptiness(prediction: Mask, truth: Mask) -> dict[str, bool]:
    """Return which mask is empty, and whether a lesion was missed: a truth with pixels and a prediction with none."""
    empty_truth, empty_prediction = not truth.any(), not prediction.any()
    return {
        "missed": empty_prediction and not empty_truth,
        "empty_truth": empty_truth,
        "empty_prediction": empty_prediction,
    }


def hd95(prediction: Mask, truth: Mask) -> float:
    """Return the 95 % Hausdorff distance in pixels: the larger of the two directed 95th percentiles.

    A directed one is the 95th percentile (linear interpolation) of the Euclidean distances from each surface pixel of
    one mask to the nearest surface pixel of the other. This is the definition of MONAI and surface-distance (which
    also weights by surface area); MedPy pools both directions before the percentile, which is at most as large as
    ours up to interpolation. Surface: see `surface`. Empty masks: see the top of this file.
    """
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else diagonal(truth.shape)
    # As exact as two distance transforms; measured 3 to 18 times faster on lesions, 4 times slower on pure noise.
    predicted, true = surface_points(prediction), surface_points(truth)
    outward, _ = KDTree(true).query(predicted)
    inward, _ = KDTree(predicted).query(true)
    return float(max(np.percentile(outward, 95), np.percentile(inward, 95)))


def surface(mask: Mask) -> Mask:
    """Return the pixels that erosion by a cross removes: those with a 4-neighbour outside the mask.

    Beyond the border of the image counts as outside, so a lesion cut by the border has surface there (as in MONAI and
    MedPy).
    """
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return mask & ~inner


def surface_points(mask: Mask) -> NDArray[np.intp]:
    """Return the row and column of every surface pixel, (n, 2)."""
    # Three times faster than np.argwhere on a photo of five megapixels.
    return np.column_stack(np.divmod(np.flatnonzero(surface(mask)), mask.shape[1]))


def boundary_iou(prediction: Mask, truth: Mask, ratio: float = BOUNDARY_RATIO) -> float:
    """Return the IoU of the two inner boundary bands, in [0, 1] (Cheng et al. 2021, Boundary IoU, Eq. 2).

    A band is the part of a mask within d pixels of its contour, d = `ratio` of the image diagonal, rounded, at least
    1; distance is chessboard and the border of the image is contour, as in the authors' code (d erosions by 3x3).
    """
    width = max(1, round(ratio * diagonal(truth.shape)))
    predicted, true = boundary_band(prediction, width), boundary_band(truth, width)
    return _ratio(count_pixels(predicted & true), count_pixels(predicted | true), undefined=1.0)


def boundary_band(mask: Mask, width: int) -> Mask:
    """Return the pixels of the mask at most `width` chessboard steps from a pixel outside it."""
    band = np.zeros_like(mask)
    if mask.any():
        box = bounding_box(mask)
        inside = mask[box].astype(np.uint8)
        for axis in (0, 1):
            inside = minimum_filter1d(inside, 2 * width + 1, axis=axis, mode="constant", cval=0)
        band[box] = mask[box] & (inside == 0)
    return band


def bounding_box(mask: Mask) -> tuple[slice, slice]:
    """Return the rows and columns that hold the mask, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def diagonal(shape: tuple[int, ...]) -> float:
    """Return the diagonal of a grid (h, w) in pixels."""
    return math.hypot(*shape)


def count_pixels(mask: Mask) -> int:
    """Return how many pixels a mask holds."""
    return int(np.count_nonzero(mask))


def _ratio(part: int, whole: int, undefined: float) -> float:
    return part / whole if whole else undefined
