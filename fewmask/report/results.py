"""The figures of an evaluation: the headline, the table a split, the spread over cases and labels."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from fewmask.report.plot import Axis, histogram, scatter, span
from fewmask.report.reading import Record
from fewmask.report.training import best_score, finished
from fewmask.report.wording import (
    NONE,
    SPLIT_NAMES,
    count,
    counted,
    fixed,
    method_name,
    number,
    parameters,
    percent,
    size,
    split_name,
    stage_name,
)

# key, label, unit, decimals, what it is
METRICS = (
    ("dice", "Dice", "", 3, "overlap; 1 is perfect"),
    ("iou", "IoU", "", 3, "overlap, stricter; also called Jaccard"),
    ("dice_256", "Dice at 256 × 256", "", 3, "as papers score it"),
    ("iou_256", "IoU at 256 × 256", "", 3, "as papers score it"),
    ("boundary_iou", "Boundary IoU", "", 3, "overlap of the outlines alone"),
    ("sensitivity", "Sensitivity", "", 3, "share of the true area that was found"),
    ("specificity", "Specificity", "", 3, "share of the background left alone"),
    ("hd95_256", "HD95", "px", 1, "distance of the outlines, at 256 × 256; lower is better"),
    ("hd95_percent", "HD95", "%", 1, "the same, in percent of the image diagonal"),
)
AREA_COLUMNS = ("truth_fraction", "truth_share", "area_fraction", "truth_area")
MAX_DOTS = 1500


def headline(record: Record) -> dict[str, Any]:
    """Return the answer in one sentence, split in an emphasised part and the rest, and the facts below it."""
    split = record.split
    if split is not None and number(_dice(record, split).get("mean")) is not None:
        lead, rest = f"Dice {fixed(_dice(record, split)['mean'], 3)}", _evaluated(record, split)
    else:
        lead, rest = _unevaluated(record)
    return {"lead": lead, "rest": rest, "facts": headline_facts(record)}


def headline_facts(record: Record) -> list[tuple[str, str, str]]:
    """Return label, value and remark of the figures a reader wants next: IoU, HD95, model size, speed."""
    metrics, export = record.metrics.get(record.split or "", {}), record.export or {}
    facts = [
        ("IoU", fixed(_part(metrics, "iou").get("mean"), 3), "mean over images"),
        ("HD95", _with_unit(fixed(_part(metrics, "hd95_256").get("mean"), 1), "px"), "outline distance at 256 × 256"),
        ("Model file", size(num_bytes(export)), _model_note(export)),
        *latency_facts(export.get("latency")),
    ]
    return [fact for fact in facts if fact[1] != NONE]


def num_bytes(export: dict[str, Any]) -> float | None:
    """Return the size of the exported file in bytes."""
    megabytes = number(export.get("megabytes"))
    return number(export.get("size_bytes")) or (None if megabytes is None else megabytes * 1e6)


def _model_note(export: dict[str, Any]) -> str:
    num_parameters = parameters(export.get("num_parameters"))
    return "" if num_parameters == NONE else f"{num_parameters} parameters, ONNX"


def latency_facts(latency: Any) -> list[tuple[str, str, str]]:
    """Return the time an image takes: the first of the measured rows (or the one row), with its conditions."""
    row = latency[0] if isinstance(latency, list) and latency else latency
    if not isinstance(row, dict):
        return []
    times = {key: value for key, value in row.items() if key.endswith("ms") and number(value) is not None}
    if not times:
        return []
    key = next((k for k in times if "p50" in k or "median" in k), next(iter(times)))
    conditions = []
    if "height" in row and "width" in row:
        conditions.append(f"{count(row['width'])} × {count(row['height'])} image")
    if "threads" in row:
        conditions.append(f"CPU, {counted(row['threads'], 'thread')}")
    return [("Time per image", f"{fixed(times[key], 0 if float(times[key]) >= 20 else 1)} ms", ", ".join(conditions))]


def table(record: Record) -> dict[str, Any] | None:
    """Return the results table: one row a metric, one cell a split with value and interval, and the counts."""
    if not record.metrics:
        return None
    splits = list(record.metrics)
    rows = [_row(record, splits, *metric) for metric in METRICS]
    for kind, label in (("positives", "Dice, images with a target"), ("empties", "Images with an empty mask")):
        rows.append(_apart(record, splits, kind, label))
    rows.append(_missed(record, splits))
    heads = [{"name": split_name(s), "cases": counted(record.metrics[s].get("num_cases"), "image")} for s in splits]
    return {"heads": heads, "rows": [row for row in rows if any(c["value"] != NONE for c in row["cells"])]}


def spread(record: Record) -> list[dict[str, Any]]:
    """Return the charts of per-case Dice: its histogram, and Dice against the size of the target."""
    split = record.split if record.split in record.cases else next(iter(record.cases), None)
    rows = record.cases.get(split or "", [])
    values = [value for row in rows if (value := number(row.get("dice"))) is not None]
    if len(values) < 2:
        return []
    name = split_name(str(split)).lower()
    svg = histogram(f"Dice of each {name} image", values, "Dice", "images")
    charts = [{"title": f"Dice of each {name} image", "svg": svg, "note": _tail(values), "legend": []}]
    return [*charts, *_by_size(rows)]


def labels(record: Record) -> list[dict[str, str]]:
    """Return count, mean and median Dice and the count below 0.5 for each label, most frequent first."""
    rows = record.cases.get(record.split or "", [])
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get("label") and (value := number(row.get("dice"))) is not None:
            groups.setdefault(row["label"], []).append(value)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {"label": label, "num": count(len(v)), "mean": fixed(fmean(v), 3), "median": fixed(median(v), 3),
         "poor": count(sum(d < 0.5 for d in v))}
        for label, v in ordered
    ]  # fmt: skip


def _evaluated(record: Record, split: str) -> str:
    metrics, dice = record.metrics[split], _dice(record, split)
    interval = f" (95 % interval {fixed(dice.get('low'), 2)} to {fixed(dice.get('high'), 2)})"
    known = split in SPLIT_NAMES
    images = counted(metrics.get("num_cases"), f"{split_name(split).lower()} image" if known else "image")
    notes = {"test": " never used in training", "val": ", which also chose the model", "train": " it was trained on"}
    where = notes.get(split, f" of another data set ({split})")
    if split == "test" and (seen := record.num_test_images_seen):
        where = f", {count(seen)} of which it or its teacher saw before, without their masks"
    missed = number(metrics.get("missed"))
    lost = "" if missed is None else f"; {'none' if missed == 0 else count(missed)} missed entirely"
    return f"{interval if number(dice.get('low')) is not None else ''} on {images}{where}{lost}."


def _unevaluated(record: Record) -> tuple[str, str]:
    last = record.stages[-1] if record.stages else None
    if last is None:
        return "No result yet", ": nothing was trained or evaluated in this run."
    images = number(last.info.get("num_images"))
    on = f" on {counted(images, 'image')}" if images is not None else ""
    best = best_score(last)
    if last.name == "pretrain":
        method = method_name(str(last.info.get("method", "")))
        how = "" if finished(last) else ", partly"
        kind = "A segmenter" if last.info.get("product") == "segmenter" else "An encoder"
        what = kind if finished(last) else "A network"  # which kind is written down at the end
        if last.info.get("steps") == 0:
            return what, " as it was at the start: no step of pre-training was made. No segmenter was evaluated."
        return what, f"{how} pre-trained{f' with {method}' if method else ''}{on}. No segmenter was evaluated."
    if best is None:
        return "No result yet", f": {stage_name(last.name).lower()} was started, and nothing was evaluated."
    where = f" at epoch {best[1]:g} of {stage_name(last.name).lower()}{on}"
    return f"Validation score {best[0]:.3f}", f"{where}. Nothing was evaluated on a test split."


def _row(record: Record, splits: list[str], key: str, label: str, unit: str, digits: int, about: str) -> dict[str, Any]:
    cells = []
    for split in splits:
        part = _part(record.metrics[split], key)
        low, high = fixed(part.get("low"), digits), fixed(part.get("high"), digits)
        interval = f"{low} to {high}" if NONE not in (low, high) else ""
        cells.append({"split": split, "value": fixed(part.get("mean"), digits), "interval": interval})
    return {"key": key, "label": label, "unit": unit, "about": about, "cells": cells}


def _apart(record: Record, splits: list[str], kind: str, label: str) -> dict[str, Any]:
    """Positives apart from empties: a model that always answers 'nothing' does well on a set of mostly empty masks."""
    cells = []
    for split in splits:
        part, value, note = _part(record.metrics[split], kind), NONE, ""
        if part and kind == "positives":
            dice = _part(part, "dice")
            value, note = fixed(dice.get("mean"), 3), counted(part.get("num_cases"), "image")
            if number(dice.get("low")) is not None:
                note = f"{fixed(dice['low'], 3)} to {fixed(dice['high'], 3)} · {note}"
        elif part:
            value, note = f"{count(part.get('correct'))} of {count(part.get('num_cases'))}", "rightly left empty"
        cells.append({"split": split, "value": value, "interval": note})
    return {"key": kind, "label": label, "unit": "", "about": "", "cells": cells}


def _missed(record: Record, splits: list[str]) -> dict[str, Any]:
    cells = [{"split": s, "value": count(record.metrics[s].get("missed")), "interval": ""} for s in splits]
    about = "the prediction is empty and the mask is not"
    return {"key": "missed", "label": "Missed entirely", "unit": "", "about": about, "cells": cells}


def _by_size(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    column = next((c for c in AREA_COLUMNS if rows and c in rows[0]), None)
    if column is None:
        return []
    found = [(number(r[column]), number(r.get("dice")), r.get("name", "")) for r in rows]
    points = [(x, y, name) for x, y, name in found if x is not None and y is not None and x > 0]
    if len(points) < 3 or max(x for x, _, _ in points) > 1:
        return []
    shown = points[:: -(-len(points) // MAX_DOTS)]
    dots = [(100 * x, y, f"{name}: Dice {y:.3f}, {100 * x:.2g} % of the image") for x, y, name in shown]
    shares = [x for x, _, _ in dots]
    x_axis = span(shares, "Target size (% of the image)", log=max(shares) / min(shares) > 10)
    svg = scatter("Dice against target size", dots, x_axis, Axis(0, 1.02, "Dice"))
    note = f"{count(len(shown))} of {count(len(points))} images drawn." if len(shown) < len(points) else ""
    note = note or "Each dot is an image."
    return [{"title": "Dice against target size", "svg": svg, "note": note, "legend": []}]


def _tail(values: list[float]) -> str:
    good, poor = sum(v >= 0.8 for v in values) / len(values), sum(v < 0.5 for v in values) / len(values)
    return f"{percent(good)} of the images reach 0.8; {percent(poor)} stay below 0.5."


def _dice(record: Record, split: str) -> dict[str, Any]:
    return _part(record.metrics[split], "dice")


def _part(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    part = mapping.get(key)
    return part if isinstance(part, dict) else {}


def _with_unit(text: str, unit: str) -> str:
    return text if text == NONE else f"{text} {unit}"
