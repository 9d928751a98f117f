"""Several trained segmenters as one: the mean of their probabilities, scored like a run's own segmenter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewmask.commands.distillation import load_teacher
from fewmask.data.preprocess import predict_probability
from fewmask.deploy.predictor import ImagePredictor
from fewmask.deploy.run_files import THRESHOLD
from fewmask.types import UserError


class EnsemblePredictor(ImagePredictor):
    """The mean over segmenters of their probabilities at a photo's own size, run by torch.

    Each member sees the photo at its own working size, so that members of unequal sizes may be averaged. `files` are
    model files. Raises UserError for none, or for a file that holds no segmenter.
    """

    def __init__(self, files: Sequence[Path], device: str = "cpu") -> None:
        if not files:
            raise UserError("There is no segmenter to average; name at least one model file or run folder.")
        self._members = [load_teacher(file).to(device).eval() for file in files]
        self._device = device
        self.threshold = THRESHOLD
        self.metadata = {"threshold": THRESHOLD, "members": [str(file) for file in files]}

    def _probability(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        total = np.zeros(image.shape[:2], np.float64)
        for member in self._members:
            total += predict_probability(member, image, member.encoder.size, self._device)
        return (total / len(self._members)).astype(np.float32)
