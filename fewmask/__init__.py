"""From thousands of unlabelled images and a handful of masks to a small, fast, measured segmentation model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fewmask.deploy.predictor import ImagePredictor

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(path: str | Path) -> ImagePredictor:
    """Return a predictor for an exported .onnx file or for a run folder.

    Called with an RGB uint8 array (h, w, 3) or the path of an image it returns the probability mask (h, w), float32;
    its `.mask(image)` returns the boolean one. An exported file needs no torch. Raises UserError where the path is
    neither.
    """
    from fewmask.deploy.open_model import open_model

    return open_model(path)
