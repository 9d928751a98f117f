"""Put the preprocessing and the way back to native size into the ONNX graph, around the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 18  # the first with an antialiased Resize


def wrap_network(network: ModelProto, size: int, mean: Sequence[float], std: Sequence[float]) -> ModelProto:
    """Return a model from "image", RGB uint8 (height, width, 3), to "probability", float32 (height, width).

    `network` has one input, float32 normalised (1, 3, size, size), and one output, logits (1, 1, size, size). The
    graph computes what `data.preprocess.predict_probability` computes; `mean` and `std` are those of values in [0, 1].
    """
    inner = onnx.compose.add_prefix(network, prefix="network/")
    source, logits = inner.graph.input[0].name, inner.graph.output[0].name
    graph = helper.make_graph(
        [*_before(source), *inner.graph.node, *_after(logits)],
        "fewmask",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["height", "width"])],
        [*_constants(size, mean, std), *inner.graph.initializer],
        value_info=list(inner.graph.value_info),
    )
    model = helper.make_model(graph, opset_imports=list(inner.opset_import), functions=list(inner.functions))
    model.ir_version = inner.ir_version
    _forget_sources(model)
    onnx.checker.check_model(model)
    return model


def _before(target: str) -> list[NodeProto]:
    """Bring the image to (1, 3, size, size), normalised.

    The uint8, channels-last Resize of ONNX Runtime is the one that rounds as Pillow does, and the fastest;
    `exclude_outside` leaves out the samples beyond the border, as Pillow does, where ONNX would repeat the border.
    """
    return [
        helper.make_node("Unsqueeze", ["image", "first_axis"], ["image/batch"], name="image/batch"),
        helper.make_node(
            "Resize", ["image/batch", "", "", "network_shape"], ["image/resized"], name="image/resize",
            mode="linear", antialias=1, exclude_outside=1, coordinate_transformation_mode="half_pixel",
        ),
        helper.make_node("Transpose", ["image/resized"], ["image/planes"], name="image/transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["image/planes"], ["image/float"], name="image/float", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["image/float", "mean"], ["image/centred"], name="image/centre"),
        helper.make_node("Div", ["image/centred", "std"], [target], name="image/normalise"),
    ]  # fmt: skip


def _after(logits: str) -> list[NodeProto]:
    """Bring the logits (1, 1, size, size) to the image's height and width, and to probabilities."""
    return [
        helper.make_node("Shape", ["image"], ["native_size"], name="native_size", start=0, end=2),
        helper.make_node("Concat", ["one_channel", "native_size"], ["native_shape"], name="native_shape", axis=0),
        helper.make_node(
            "Resize", [logits, "", "", "native_shape"], ["logits/native"], name="logits/resize",
            mode="linear", coordinate_transformation_mode="half_pixel",
        ),
        helper.make_node("Sigmoid", ["logits/native"], ["probability/batch"], name="probability/sigmoid"),
        helper.make_node("Reshape", ["probability/batch", "native_size"], ["probability"], name="probability/reshape"),
    ]  # fmt: skip


def _constants(size: int, mean: Sequence[float], std: Sequence[float]) -> list[TensorProto]:
    values: dict[str, NDArray[Any]] = {
        "first_axis": np.array([0], np.int64),
        "network_shape": np.array([1, size, size, 3], np.int64),
        "one_channel": np.array([1, 1], np.int64),
        # Per 255, so that the division by 255 costs no node of its own; a value a plane, because with the channels
        # last ONNX Runtime takes more than ten times as long.
        "mean": (np.array(mean, np.float64) * 255).astype(np.float32).reshape(3, 1, 1),
        "std": (np.array(std, np.float64) * 255).astype(np.float32).reshape(3, 1, 1),
    }
    return [numpy_helper.from_array(value, name) for name, value in values.items()]


def _forget_sources(model: ModelProto) -> None:
    # The exporter notes source lines with absolute paths of this machine on every node.
    for part in [*model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.functions]:
        part.doc_string = ""
        part.ClearField("metadata_props")
