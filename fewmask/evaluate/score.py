"""Score a model on cases, and what to do with the rows: summarise them, compare two models, write them down."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fewmask.data.reading import read_image, read_mask
from fewmask.evaluate.metrics import Mask
from fewmask.evaluate.protocol import score_case
from fewmask.evaluate.results import Row, read_case_csv, write_case_csv, write_metrics
from fewmask.evaluate.statistics import compare, summarise
from fewmask.types import Case, UserError

__all__ = ["compare", "read_case_csv", "score_cases", "summarise", "write_case_csv", "write_metrics"]

Image = NDArray[np.uint8]
Probability = NDArray[np.float32]
Predict = Callable[[Image], Probability]

SCORERS = max(1, min(4, (os.cpu_count() or 1) // 2))  # a GPU predicts faster than one thread measures; ours
MAX_PENDING = 2 + 2 * SCORERS


def score_cases(
    predict: Predict,
    cases: Sequence[Case],
    threshold: float = 0.5,
    on_progress: Callable[[int, int], None] | None = None,
    keep: Callable[[Case, Probability], None] | None = None,
) -> list[Row]:
    """Return a row per case (see `protocol.score_case`), in the order of the cases.

    `predict` takes an image uint8 (h, w, 3) and returns its probability float32 (h, w). `on_progress` is called with
    the number of cases done and the number there are; `keep` with each case and its probability. Reading and measuring
    run in threads beside the prediction. Raises a UserError when a case has no mask or its mask another size.
    """
    check_cases(cases)
    rows: list[Row] = []
    pending: deque[Future[Row]] = deque()

    def collect(limit: int) -> None:
        while len(pending) > limit:
            rows.append(pending.popleft().result())
            if on_progress is not None:
                on_progress(len(rows), len(cases))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(SCORERS) as scorer:
        for case, image, truth in _read_ahead(reader, cases):
            probability = predict(image)
            if keep is not None:
                keep(case, probability)
            pending.append(scorer.submit(score_case, case, probability, truth, threshold))
            collect(MAX_PENDING)
        collect(0)
    return rows


def check_cases(cases: Sequence[Case]) -> None:
    """Raise a UserError unless there is a case, each has a mask, and no name occurs twice."""
    if not cases:
        raise UserError("There is no case to score: this split holds no image with a mask; choose another split.")
    names = set()
    for case in cases:
        if case.mask is None:
            raise UserError(f"{case.image} has no mask and cannot be scored; add one or leave it out of the split.")
        if case.name in names:
            raise UserError(f"The name {case.name} stands for two cases; give each case its own name.")
        names.add(case.name)


def read_case(case: Case) -> tuple[Image, Mask]:
    """Return the image uint8 (h, w, 3) and the mask bool (h, w) of a case that has one."""
    assert case.mask is not None
    image, truth = read_image(case.image), read_mask(case.mask).mask
    if image.shape[:2] != truth.shape:
        raise UserError(
            f"{case.mask} is {truth.shape[1]}x{truth.shape[0]} but its image {case.image} is "
            f"{image.shape[1]}x{image.shape[0]}; make them the same size."
        )
    return image, truth


def _read_ahead(reader: ThreadPoolExecutor, cases: Sequence[Case]) -> Iterator[tuple[Case, Image, Mask]]:
    following = reader.submit(read_case, cases[0])
    for index, case in enumerate(cases):
        image, truth = following.result()
        if index + 1 < len(cases):
            following = reader.submit(read_case, cases[index + 1])
        yield case, image, truth
