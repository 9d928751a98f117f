"""Latency rows say what they measured, and the network taken out of a file is the one put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fewmask.data.preprocess import MEAN, STD
from fewmask.deploy import latency
from fewmask.deploy.export import describe
from fewmask.deploy.graph import wrap_network
from fewmask.deploy.predictor import open_session
from tests.deploy.darkness import GAIN, SIZE, darkness_network


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported file whose network has the names that the exporter gives."""
    network = darkness_network()
    network.graph.input[0].name = network.graph.node[0].input[0] = "normalised"
    network.graph.output[0].name = network.graph.node[0].output[0] = "logits"
    model = wrap_network(network, SIZE, MEAN, STD)
    describe(model, {"threshold": 0.5, "size": SIZE})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_network_taken_out_is_the_one_put_in(exported: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    session = open_session(latency.inner_network(exported, SIZE), 1)
    np.testing.assert_allclose(session.run(None, {"network/normalised": x})[0], -GAIN * x[:, :1], rtol=1e-6)


@pytest.mark.parametrize(("num_cores", "threads"), [(1, [1]), (2, [1, 2])])
def test_no_more_threads_than_cores_are_measured(
    exported: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int, threads: list[int]
) -> None:
    monkeypatch.setattr(latency, "num_cores", lambda: num_cores)
    rows = latency.measure_latency(exported, seconds=0.01, max_calls=6)
    sizes = [(*size, False) for size in latency.IMAGES] + [(SIZE, SIZE, True)]
    found = [(row["threads"], row["height"], row["width"], row["network_only"]) for row in rows]
    assert found == [(thread, *size) for thread in threads for size in sizes]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in rows)
    assert all(5 <= row["num_calls"] <= 6 for row in rows)


def test_calls_are_counted_after_three_that_are_not() -> None:
    calls: list[int] = []
    assert len(latency.time_calls(lambda: calls.append(0), seconds=0.0, max_calls=100)) == 5
    assert len(calls) == 8
    assert len(latency.time_calls(lambda: calls.append(0), seconds=60.0, max_calls=12)) == 12
