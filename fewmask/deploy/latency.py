"""How long an exported file takes per image, by the clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from fewmask.deploy.predictor import Predictor

IMAGES = ((256, 256), (768, 1024))
THREADS = (1, 2)


def measure_latency(path: Path, seconds: float = 1.0, max_calls: int = 100) -> list[dict[str, Any]]:
    """Return p50 and p95 in milliseconds, for each image size (height, width) and number of threads.

    Each row is measured for at most `seconds` or `max_calls` calls, and at least 5, after 3 that are not counted.
    The time is from the decoded RGB array to the probability mask at native size, on this machine's CPU.
    """
    rows = []
    for threads in THREADS:
        predictor = Predictor(path, threads=threads)
        for height, width in IMAGES:
            image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            times = _times(predictor, image, seconds, max_calls)
            p50, p95 = (float(value) * 1e3 for value in np.percentile(times, [50, 95]))
            conditions = {"height": height, "width": width, "threads": threads, "num_calls": len(times)}
            rows.append({**conditions, "p50_ms": p50, "p95_ms": p95})
    return rows


def _times(predictor: Predictor, image: Any, seconds: float, max_calls: int) -> list[float]:
    for _ in range(3):
        predictor(image)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < max_calls):
        start = time.perf_counter()
        predictor(image)
        times.append(time.perf_counter() - start)
    return times
