"""A model whose answer is known in closed form: foreground is where the picture is dark. Built without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fewmask.data.preprocess import MEAN, STD
from fewmask.deploy.export import describe
from fewmask.deploy.graph import OPSET, wrap_network

SIZE = 32
GAIN = 4.0


def darkness_network(size: int = SIZE) -> ModelProto:
    """Return a network whose logits are -GAIN times the first normalised channel."""
    weight = np.array([-GAIN, 0, 0], np.float32).reshape(1, 3, 1, 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"], name="conv")],
        "darkness",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, size, size])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def write_darkness(path: Path, size: int = SIZE, **metadata: Any) -> Path:
    """Write the model as an exported file; keywords are its metadata."""
    model = wrap_network(darkness_network(size), size, MEAN, STD)
    describe(model, {"threshold": 0.5, **metadata})
    path.write_bytes(model.SerializeToString())
    return path


def dark_square(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a bright image (h, w, 3) whose upper left quarter is dark, and that quarter as a mask (h, w)."""
    truth = np.zeros((height, width), bool)
    truth[: height // 2, : width // 2] = True
    return np.where(truth[..., None], np.uint8(10), np.uint8(240)).repeat(3, axis=2), truth
