"""From a photo to a mask with the exported file: NumPy, Pillow and ONNX Runtime only."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewmask.types import UserError

VERSION_KEY = "fewmask_version"
_SILENT = 4


class ImagePredictor(ABC):
    """Something that turns one image into one probability mask.

    `threshold` is the probability from which a pixel belongs to the mask; `metadata` says what the model is.
    """

    threshold: float
    metadata: dict[str, Any]

    def __call__(self, image: NDArray[np.uint8] | str | os.PathLike[str]) -> NDArray[np.float32]:
        """Return the probability (h, w), float32 in [0, 1], of an RGB uint8 array (h, w, 3) or of an image file.

        A file is read as in training (orientation tag applied). Raises UserError for another dtype or shape, or a file
        that is not an image.
        """
        if isinstance(image, str | os.PathLike):
            from fewmask.data.reading import read_image

            image = read_image(Path(image))
        return self._probability(_checked(image))

    def mask(self, image: NDArray[np.uint8] | str | os.PathLike[str]) -> NDArray[np.bool_]:
        """Return the boolean mask (h, w): probability at or above `threshold`. Raises as calling does."""
        return self(image) >= self.threshold

    @abstractmethod
    def _probability(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the probability (h, w) of a checked image (h, w, 3)."""


class Predictor(ImagePredictor):
    """The exported file. Raises UserError where the file is missing, is not ONNX, or was not made by fewmask."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        """Open the file; `threads` is the number of CPU threads, 0 for ONNX Runtime's own choice."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"There is no file {self.path}; give an exported .onnx file or a run folder.")
        self._session = open_session(self.path, threads)
        self.metadata = _read_metadata(self._session, self.path)
        self.threshold = float(self.metadata["threshold"])

    def _probability(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            return self._session.run(["probability"], {"image": image})[0]
        except Exception as error:
            if not _from_onnxruntime(error):
                raise
            height, width = image.shape[:2]
            raise UserError(
                f"ONNX Runtime could not process an image of {width}x{height} pixels with {self.path} "
                f"({_first_line(error)}); make the image smaller or free some memory."
            ) from None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(source: Path | bytes, threads: int = 0) -> Any:
    """Return a quiet CPU session of ONNX Runtime for a file or its bytes; UserError where it is not a usable model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    # Left to itself ONNX Runtime takes every core of the machine, those that this process may not use included.
    options.intra_op_num_threads = threads or _num_cores()
    try:
        model = source if isinstance(source, bytes) else str(source)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not _from_onnxruntime(error):
            raise
        name = "The exported model" if isinstance(source, bytes) else source
        raise UserError(
            f"{name} cannot be opened as an ONNX model ({_first_line(error)}); "
            "give a file written by 'fewmask export', or a run folder."
        ) from None


def _read_metadata(session: Any, path: Path) -> dict[str, Any]:
    raw = session.get_modelmeta().custom_metadata_map
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]
    if VERSION_KEY not in raw or inputs != ["image"] or outputs != ["probability"]:
        raise UserError(f"{path} is an ONNX model, but not one made by fewmask; make one with 'fewmask export RUN'.")
    try:
        metadata = {key: json.loads(value) for key, value in raw.items()}
        float(metadata["threshold"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has damaged metadata; make it again with 'fewmask export RUN'.") from None
    return metadata


def _checked(image: Any) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray):
        raise UserError(f"An image must be a NumPy array or a path, not {type(image).__name__}.")
    if image.dtype != np.uint8:
        raise UserError(f"An image must be uint8 with values 0..255, not {image.dtype}; convert it before predicting.")
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"An image must be RGB with shape (height, width, 3), not {image.shape}.")
    if image.size == 0:
        raise UserError(f"An image must have at least one pixel, and this one has shape {image.shape}.")
    return np.ascontiguousarray(image)


def _from_onnxruntime(error: Exception) -> bool:
    # ONNX Runtime's exceptions have no common base class of their own.
    return type(error).__module__.startswith("onnxruntime")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rsplit(":", 1)[-1].strip().rstrip(".")
