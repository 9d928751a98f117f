"""How long an exported file takes per image, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewmask.data.cache import num_cores
from fewmask.deploy.predictor import Predictor, open_session

IMAGES = ((256, 256), (768, 1024))
THREADS = (1, 2)
# The names that `graph.wrap_network` gives what it wraps.
PREFIX = "network/"
_NORMALISED, _LOGITS = f"{PREFIX}normalised", f"{PREFIX}logits"


def measure_latency(path: Path, seconds: float = 1.0, max_calls: int = 100) -> list[dict[str, Any]]:
    """Return p50 and p95 in milliseconds for each photo size (height, width), and for the network alone, per threads.

    Each row is measured for at most `seconds` or `max_calls` calls, and at least 5, after 3 that are not counted, on
    this machine's CPU. The time of a photo is from the decoded RGB array to the probability mask at native size; where
    `network_only` is true it is from the prepared tensor to the logits, at the network's own size. More threads than
    this process has cores are left out.
    """
    rows = []
    for threads in (number for number in THREADS if number <= num_cores()):
        predictor = Predictor(path, threads=threads)
        for height, width in IMAGES:
            image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            times = time_calls(lambda p=predictor, i=image: p(i), seconds, max_calls)  # type: ignore[misc]
            rows.append(_row(height, width, threads, False, times))
        run, size = network_alone(path, threads)
        rows.append(_row(size, size, threads, True, time_calls(run, seconds, max_calls)))
    return rows


def network_alone(path: Path, threads: int) -> tuple[Callable[[], Any], int]:
    """Return a call that runs the network of an exported file on a random tensor, and the network's size."""
    predictor = Predictor(path, threads=1)
    size = int(predictor.metadata["size"])
    session = open_session(inner_network(path, size), threads)
    tensor = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    return lambda: session.run([_LOGITS], {_NORMALISED: tensor}), size


def inner_network(path: Path, size: int) -> bytes:
    """Return what `graph.wrap_network` was given, taken out of an exported file: (1, 3, size, size) to logits."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path)
    graph = model.graph
    source = helper.make_tensor_value_info(_NORMALISED, TensorProto.FLOAT, [1, 3, size, size])
    logits = helper.make_tensor_value_info(_LOGITS, TensorProto.FLOAT, [1, 1, size, size])
    inner = [node for node in graph.node if node.output[0].startswith(PREFIX) and node.output[0] != _NORMALISED]
    weights = [tensor for tensor in graph.initializer if tensor.name.startswith(PREFIX)]
    part = helper.make_graph(inner, "network", [source], [logits], weights)
    opsets = list(model.opset_import)
    return helper.make_model(part, opset_imports=opsets, ir_version=model.ir_version).SerializeToString()


def time_calls(call: Callable[[], Any], seconds: float, max_calls: int) -> list[float]:
    """Return the seconds of each call: 3 uncounted, then at least 5, until `seconds` or `max_calls` are reached."""
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < max_calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _row(height: int, width: int, threads: int, network_only: bool, times: list[float]) -> dict[str, Any]:
    p50, p95 = (float(value) * 1e3 for value in np.percentile(times, [50, 95]))
    conditions = {"height": height, "width": width, "threads": threads, "network_only": network_only}
    return {**conditions, "num_calls": len(times), "p50_ms": p50, "p95_ms": p95}
