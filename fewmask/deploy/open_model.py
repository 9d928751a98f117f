"""Open what a user calls a model: an exported file or a run folder."""

from __future__ import annotations

from pathlib import Path

from fewmask.deploy.predictor import ImagePredictor, Predictor
from fewmask.types import UserError


def open_model(path: str | Path) -> ImagePredictor:
    """Return the predictor of an exported .onnx file, or of a run folder (which needs torch).

    Raises UserError where the path is neither, or where torch is missing for a run folder.
    """
    path = Path(path)
    if not path.is_dir():
        return Predictor(path)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path} is a run folder, and opening one needs torch, which is not installed here; "
            f"give the exported file instead ({path / 'model.onnx'}, made by 'fewmask export')."
        ) from None
    from fewmask.deploy.torch_predictor import TorchPredictor

    return TorchPredictor(path)
