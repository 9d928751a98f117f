"""Write a segmenter as one ONNX file that takes any photo, after checking it against torch."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewmask.data.cache import num_cores
from fewmask.data.preprocess import MEAN, STD, predict_probability
from fewmask.deploy.graph import OPSET, wrap_network
from fewmask.deploy.predictor import VERSION_KEY, open_session
from fewmask.deploy.tuning import absorb_affine, flatten_last_resize
from fewmask.models.complexity import complexity
from fewmask.types import UserError

# Probabilities where the resize has nothing to round: only the order of summation differs.
EXACT_DIFFERENCE = 1e-3
# At other sizes ONNX Runtime, whose scales are float32, may round a resized value to one grey level off Pillow's:
# about 1 in 10,000 of a reduced photo, up to 1 in 15 of an enlarged one, where ties abound. A trained network hardly
# notices; a barely trained one may, and must not fail for it.
MAX_DIFFERENCE = 0.05
MEAN_DIFFERENCE = 5e-3
MASK_DISAGREEMENT = 5e-3
# Pixels the network leaves this close to the threshold are decided by such a grey level.
UNDECIDED = 5e-3
# The size at which papers state GMacs of light segmenters.
COMMON_SIZE = 256
NOT_A_DEVICE = "For research. Not a medical device; not for diagnosis or treatment decisions."


def export_onnx(
    segmenter: nn.Module, size: int, out: Path, metadata: dict[str, Any], threshold: float = 0.5
) -> dict[str, Any]:
    """Write the segmenter to `out` and return the facts: megabytes, parameters, GMacs, opset, parity and seconds.

    The file takes "image", RGB uint8 (height, width, 3) of any size, and gives "probability", float32 (height, width).
    `size` is the side, in pixels, of what the network sees; `metadata` holds JSON-able values kept in the file. The
    segmenter is left as it is. Raises UserError, and writes nothing, where the network cannot be expressed in ONNX or
    where its answers differ from torch's by more than the bounds above on any probe image.
    """
    started = time.perf_counter()
    network = copy.deepcopy(segmenter).cpu().eval()
    traced = copy.deepcopy(network)
    mean, std = absorb_affine(traced, MEAN, STD)
    model = wrap_network(trace_network(traced, size), size, mean, std)
    describe(model, {**metadata, "threshold": threshold, "size": size, "mean": mean, "std": std})
    content = model.SerializeToString()
    parity = measure_parity(network, content, size, threshold)
    _require(parity)
    _write(out, content)
    return {
        "file": str(out),
        "megabytes": len(content) / 1e6,
        **_costs(network, size),
        "opset": OPSET,
        "size": size,
        "threshold": threshold,
        "parity": parity,
        "seconds": time.perf_counter() - started,
    }


def _costs(network: nn.Module, size: int) -> dict[str, float | None]:
    """Return "num_parameters", and "gmacs" at the network's size and "gmacs_256" at 256, None where 256 is no size."""
    own = complexity(network, size)
    try:
        common = complexity(network, COMMON_SIZE)["gmacs"]
    except (UserError, RuntimeError):
        # What is trained at 96 pixels need not divide 256.
        common = None
    return {"num_parameters": own["num_parameters"], "gmacs": own["gmacs"], "gmacs_256": common}


class _LogitsOnly(nn.Module):
    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> Tensor:
        return self.segmenter(image).logits


def trace_network(segmenter: nn.Module, size: int) -> onnx.ModelProto:
    """Return the network alone, at a fixed (1, 3, size, size), batch norms folded into convolutions."""
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _LogitsOnly(segmenter).eval(), (torch.zeros(1, 3, size, size),), dynamo=True, opset_version=OPSET,
                input_names=["normalised"], output_names=["logits"], verbose=False,
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"This network cannot be written as ONNX ({reason}); export another segmenter.") from error
    assert program is not None
    model = program.model_proto
    flatten_last_resize(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines, warnings and log records from the user; errors still propagate."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


def describe(model: onnx.ModelProto, metadata: dict[str, Any]) -> None:
    """Write JSON-able metadata into the model, with fewmask's version and the note that it is no medical device."""
    from fewmask import __version__

    model.producer_name = "fewmask"
    model.producer_version = __version__
    model.doc_string = NOT_A_DEVICE
    values = {"classes": ["background", "foreground"], **metadata, "note": NOT_A_DEVICE, VERSION_KEY: __version__}
    onnx.helper.set_model_props(model, {key: json.dumps(value, default=str) for key, value in values.items()})


def measure_parity(segmenter: nn.Module, content: bytes, size: int, threshold: float) -> dict[str, float]:
    """Return how far the exported model is from torch over the probe images.

    `max_difference` is the largest absolute difference of probabilities, `mean_difference` the largest of the images'
    means, `mask_disagreement` the largest share of an image's pixels that fall on different sides of the threshold
    though torch puts them further than UNDECIDED from it; `exact_difference` is the largest difference over the
    images whose sides the network's size divides by a power of two.
    """
    # A number of threads given, or ONNX Runtime binds them, and this one, to cores the process may have been denied.
    session = open_session(content, num_cores())
    rows, exact = [], []
    for image in probe_images(size):
        expected = predict_probability(segmenter, image, size)
        found = session.run(["probability"], {"image": image})[0]
        difference = np.abs(expected.astype(np.float64) - found)
        decided = np.abs(expected - threshold) > UNDECIDED
        flipped = ((expected >= threshold) != (found >= threshold)) & decided
        rows.append((difference.max(), difference.mean(), flipped.mean()))
        if image.shape[:2] in _exact_sizes(size):
            exact.append(difference.max())
    # np.max keeps a NaN, which Python's max may drop.
    largest = np.max(np.array(rows), axis=0)
    return {
        "exact_difference": float(np.max(exact)),
        "max_difference": float(largest[0]),
        "mean_difference": float(largest[1]),
        "mask_disagreement": float(largest[2]),
        "num_images": len(rows),
    }


def probe_images(size: int) -> list[NDArray[np.uint8]]:
    """Return the images parity is measured on: smooth shapes with noise, RGB uint8; native, larger, smaller, thin."""
    sizes = [*_exact_sizes(size), (1500, 2000), (331, 197), (1, 37)]
    return [_probe_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]


def _exact_sizes(size: int) -> list[tuple[int, int]]:
    # The weights of these resizes are binary fractions, which both sides represent exactly.
    enlarged = [(size // 2, size)] if size % 2 == 0 else []
    # Reduced four times where that is no more than eight million pixels: a probe costs 24 bytes for each.
    reduced = (2 * size, 4 * size) if size <= 1024 else (size, 2 * size)
    return [(size, size), reduced, *enlarged]


def _probe_image(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    image = np.empty((height, width, 3))
    for channel in range(3):
        fy, fx, phase = random.uniform(1, 9, 3)
        image[..., channel] = 128 + 80 * np.sin(fy * y + phase) * np.cos(fx * x)
    image[np.hypot(y - 0.5, x - 0.45) < 0.25] *= 0.45
    return np.clip(image + random.normal(0, 20, image.shape), 0, 255).astype(np.uint8)


def _require(parity: dict[str, float]) -> None:
    bounds = {
        "exact_difference": EXACT_DIFFERENCE,
        "max_difference": MAX_DIFFERENCE,
        "mean_difference": MEAN_DIFFERENCE,
        "mask_disagreement": MASK_DISAGREEMENT,
    }
    for name, bound in bounds.items():
        # Written so that a NaN fails.
        if not parity[name] <= bound:
            raise UserError(
                f"The exported model does not agree with torch ({name.replace('_', ' ')} {parity[name]:.2g}, "
                f"allowed {bound:g}), so nothing was written; train the network again or export another one."
            )


def _write(out: Path, content: bytes) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {out}: {error.strerror}; choose another --out.") from None
