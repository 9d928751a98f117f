"""What the figures do and do not say, from the facts of the run alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewmask.report.reading import Record
from fewmask.report.wording import SPLIT_NAMES, count, counted, number, split_name

FEW_GROUPS = 30


def limits(record: Record) -> list[str]:
    """Return sentences, most important first; each follows from a file of the run."""
    return [*_of_split(record), *_of_groups(record), *_of_masks(record), *_of_training(record), *_of_place(record)]


def _metrics(record: Record) -> dict[str, Any]:
    return record.metrics.get(record.split or "", {})


def _of_split(record: Record) -> Iterator[str]:
    if record.split is None:
        yield "No mask was compared with a prediction: nothing here says how well this model segments."
    elif record.split in ("val", "train"):
        yield (
            f"There is no test split. The {split_name(record.split).lower()} images chose the model, so the figure "
            "flatters it; expect less on new images."
        )
    elif record.split == "test" and (seen := record.num_test_images_seen):
        yield (
            f"A model that this training was given, to begin with or to learn from, has seen {count(seen)} of the test "
            "images, without their masks: the figure may flatter it. Train such a model on a folder whose test images "
            "are set apart."
        )
    if record.run.get("status") not in ("done", None):
        yield "The run did not reach its end; a finished one may score differently."


def _of_groups(record: Record) -> Iterator[str]:
    metrics, rows = _metrics(record), record.cases.get(record.split or "", [])
    num_cases, num_groups = number(metrics.get("num_cases")), number(metrics.get("num_groups"))
    if num_cases is None or num_groups is None:
        return
    if rows and all(row.get("group", "") in ("", row.get("name")) for row in rows):
        yield (
            "No patient or lesion was given for these images, so each counts as its own group. If several show the "
            "same patient, the interval is too narrow, and one patient may stand on both sides of the split."
        )
    elif num_groups < num_cases:
        yield (
            f"The {count(num_cases)} images come from {counted(num_groups, 'group')} (patients or lesions); the "
            "interval is drawn over groups, since images of one group are alike."
        )
    if num_groups < FEW_GROUPS:
        yield f"{counted(num_groups, 'group')} {'is' if num_groups == 1 else 'are'} few: the interval itself is rough."


def _of_masks(record: Record) -> Iterator[str]:
    metrics = _metrics(record)
    if not metrics:
        return
    if metrics.get("empty_truth") == 0:
        yield (
            "Every image scored has something to find, so false alarms on images with nothing in them were not "
            "measured."
        )
    elif number(metrics.get("false_alarms")) is not None:
        yield (
            f"{count(metrics['empty_truth'])} images have an empty mask; on {count(metrics['false_alarms'])} of them "
            "the model marked something."
        )
    if metrics.get("missed"):
        yield (
            f"{count(metrics['missed'])} missed entirely: each counts as Dice 0 and as the whole diagonal in HD95, "
            "so that missing one is never rewarded."
        )


def _of_training(record: Record) -> Iterator[str]:
    config = record.run.get("config")
    config = config if isinstance(config, dict) else {}
    if not record.metrics:
        return
    seed = (config.get("run") or {}).get("seed")
    which = f" (seed {seed})" if seed is not None else ""
    yield (
        f"One training{which}. The interval covers the choice of images to test on, and not what another seed "
        "would change."
    )
    fraction = number((config.get("data") or {}).get("label_fraction"))
    if fraction is not None and fraction < 1:
        yield f"Trained on {100 * fraction:g} % of the training masks, as asked."


def _of_place(record: Record) -> Iterator[str]:
    data = record.run.get("data")
    note = data.get("note") if isinstance(data, dict) else None
    if note:
        yield f"About the data: {note}"
    if record.metrics and not set(record.metrics) - set(SPLIT_NAMES):
        yield (
            "All images come from one data folder. Other cameras, clinics or patients can score lower, and nothing "
            "here measures by how much."
        )
