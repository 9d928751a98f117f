"""The files an evaluation leaves: a CSV of cases and `metrics.json`; written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fewmask.types import UserError

Row = dict[str, Any]
"""The results of one case; its keys are the columns below."""


def _parse_float(text: str) -> float:
    return float(text) if text else math.nan


def _parse_bool(text: str) -> bool:
    return {"0": False, "1": True}[text]


COLUMNS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "group": str,
    "label": lambda text: text or None,
    "dice": _parse_float,
    "iou": _parse_float,
    "sensitivity": _parse_float,
    "specificity": _parse_float,
    "boundary_iou": _parse_float,
    "dice_256": _parse_float,
    "iou_256": _parse_float,
    "hd95_256": _parse_float,
    "hd95_percent": _parse_float,
    "missed": _parse_bool,
    "empty_truth": _parse_bool,
    "empty_prediction": _parse_bool,
    "truth_fraction": _parse_float,
    "prediction_fraction": _parse_float,
    "height": int,
    "width": int,
}


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a text file beside `path` that takes its place when the block ends, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # mkstemp makes a file only its owner reads; a result is an ordinary file.
        Path(name).chmod(0o644)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_case_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a row per case; floats in full precision, an undefined value as an empty cell, yes and no as 1 and 0."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, fieldnames=list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: _cell(row[column]) for column in COLUMNS} for row in rows)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return int(value)
    return value


def read_case_csv(path: Path) -> list[Row]:
    """Return the rows that `write_case_csv` wrote, or raise a UserError that names the line that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column '{missing[0]}'; write it again with `fewmask evaluate`.")
            return [_parse_row(path, reader.line_num, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as per-case results ({error}); run `fewmask evaluate` first.") from None


def _parse_row(path: Path, line: int, cells: Mapping[str, str | None]) -> Row:
    row = {}
    for column, parse in COLUMNS.items():
        text = cells[column]
        try:
            row[column] = parse("" if text is None else text)
        except (ValueError, KeyError):
            raise UserError(
                f"{path}, line {line}: '{text}' is no value for '{column}'; write it again with `fewmask evaluate`."
            ) from None
    return row


def write_metrics(path: Path, split: str, summary: Mapping[str, Any]) -> None:
    """Put the summary of a split into `metrics.json`, beside those of other splits that stand there already.

    Raises a UserError when the file exists and is not a JSON object.
    """
    metrics = read_metrics(path) if path.exists() else {}
    with replacing(path) as file:
        json.dump({**metrics, split: dict(summary)}, file, indent=2, allow_nan=False)
        file.write("\n")


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the summaries by split of a `metrics.json`, or raise a UserError that names the file."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); delete it and evaluate again.") from None
    if not isinstance(metrics, dict):
        raise UserError(f"{path} is not a JSON object of splits; delete it and evaluate again.")
    return metrics
