"""PH2: 200 dermoscopic images with outlines and three diagnoses (Mendonca et al., EMBC 2013)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_file, find_folder, lay_out
from fewmask.types import UserError

DIAGNOSES = {"0": "common_nevus", "1": "atypical_nevus", "2": "melanoma"}


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archive and return `out`; UserError names a missing folder or file.

    Expects `PH2 Dataset images/IMD003/IMD003_Dermoscopic_Image/IMD003.bmp` and `.../IMD003_lesion/IMD003_lesion.bmp`.
    There is no official split: papers use the whole set as a test set. Diagnoses come from `PH2_dataset.txt` where
    present.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    root = find_folder(raw, "PH2 Dataset images")
    labels = _labels(raw)
    cases = sorted(path for path in root.iterdir() if path.is_dir() and path.name.upper().startswith("IMD"))
    if not cases:
        raise UserError(f"'{root}' holds no folder IMD...; unpack the archive again.")
    for case in cases:
        name = case.name
        image = case / f"{name}_Dermoscopic_Image" / f"{name}.bmp"
        mask = case / f"{name}_lesion" / f"{name}_lesion.bmp"
        for path in (image, mask):
            if not path.is_file():
                raise UserError(f"'{path}' is missing; unpack the archive again.")
        yield Entry(name, image, mask, label=labels.get(name, ""))


def _labels(raw: Path) -> dict[str, str]:
    """Return {image: diagnosis} from the rows `|| IMD003 || histology || 0, 1 or 2 || ...` of the publisher's table."""
    table = find_file(raw, "PH2_dataset.txt")
    if table is None:
        return {}
    rows = [
        [cell.strip() for cell in line.split("||")]
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return {row[1]: DIAGNOSES.get(row[3], "") for row in rows if len(row) > 3 and row[1].upper().startswith("IMD")}
