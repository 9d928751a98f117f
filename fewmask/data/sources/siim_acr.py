"""SIIM-ACR pneumothorax: chest X-rays in DICOM with run-length encoded masks (Kaggle, 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewmask.data import rle
from fewmask.data.sources.layout import Entry, lay_out, need_file, read_table
from fewmask.types import UserError

TABLES = ("train-rle.csv", "stage_2_train.csv", "train-rle-sample.csv")
LABELS = {True: "pneumothorax", False: "no_pneumothorax"}


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archive and return `out`; UserError names a missing table, image or a damaged mask.

    Expects `train-rle.csv` (or `stage_2_train.csv`, or the sample's table) and .dcm files anywhere below `raw`, each
    named by its ImageId. Masks are written as PNG at the DICOM's size, the union of an image's rows; "-1" is a mask
    without foreground, which is an answer and not a missing one. DICOM files that the table does not list are
    unlabelled. `group` is the PatientID; there is no official split.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    table = need_file(raw, *TABLES)
    masks = _runs(table)
    pictures = {path.stem: path for path in sorted(raw.rglob("*.dcm"))}
    absent = [name for name in masks if name not in pictures]
    if absent:
        raise UserError(f"'{raw}' lacks {len(absent)} DICOM files that '{table.name}' lists, '{absent[0]}.dcm' first.")
    for name, path in pictures.items():
        header = _header(path)
        group = str(header.get("PatientID", ""))
        if name not in masks:
            yield Entry(name, path, group=group)
            continue
        mask = _unite(masks[name], (int(header.Rows), int(header.Columns)), table, name)
        yield Entry(name, path, mask, group=group, label=LABELS[bool(mask.any())])


def _runs(table: Path) -> dict[str, list[str]]:
    """Return {ImageId: its rows}; the column is headed " EncodedPixels" in some editions."""
    masks: dict[str, list[str]] = {}
    for row in read_table(table, ("ImageId", "EncodedPixels")):
        masks.setdefault(row["ImageId"], []).append(row["EncodedPixels"])
    return masks


def _unite(texts: list[str], size: tuple[int, int], table: Path, name: str) -> NDArray[np.bool_]:
    mask = np.zeros(size, np.bool_)
    for text in texts:
        try:
            mask |= rle.decode(text, size)
        except ValueError as error:
            raise UserError(f"'{table}' has a damaged mask for '{name}': {error}; download the table again.") from None
    return mask


def _header(path: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "These are DICOM files and pydicom is not installed: run `pip install fewmask[dicom]`."
        ) from None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (pydicom.errors.InvalidDicomError, OSError, ValueError, AttributeError, LookupError):
        raise UserError(f"'{path}' is not a readable DICOM file; download it again.") from None
    if "Rows" not in header or "Columns" not in header:
        raise UserError(f"'{path}' is a DICOM file without an image; remove it.")
    return header
