"""From a photo to a mask with a run folder's own network, before anything is exported."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewmask.deploy.predictor import ImagePredictor
from fewmask.deploy.run_files import describe_run, find_segmenter, input_size


class TorchPredictor(ImagePredictor):
    """The segmenter of a run folder, run by torch. Raises UserError where the run has none."""

    def __init__(self, run: str | os.PathLike[str], device: str = "cpu", stage: str | None = None) -> None:
        """Load a stage's segmenter (distilled, else fine-tuned, else pre-trained) on a device of torch."""
        from fewmask.models import load_model

        self.path = find_segmenter(Path(run), stage)
        self._segmenter, spec = load_model(self.path)
        self._segmenter.to(device).eval()
        self._device = device
        self._size = input_size(spec, self.path)
        self.metadata = describe_run(Path(run), spec, stage)
        self.threshold = float(self.metadata["threshold"])

    def _probability(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        from fewmask.data.preprocess import predict_probability

        return predict_probability(self._segmenter, image, self._size, self._device)
