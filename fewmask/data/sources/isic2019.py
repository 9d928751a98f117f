"""ISIC-2019 challenge, training set: 25,331 images without masks (HAM10000, BCN_20000 and MSK), eight diagnoses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewmask.data.sources.layout import Entry, find_folder, is_marked, lay_out, need_file, read_table
from fewmask.types import UserError

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def import_raw(raw: Path, out: Path) -> Path:
    """Import the unpacked archive and return `out`; UserError names a missing folder, table or image.

    Expects `ISIC_2019_Training_Input`, `ISIC_2019_Training_GroundTruth.csv` and `ISIC_2019_Training_Metadata.csv`. All
    images are unlabelled for segmentation; `label` is the diagnosis in lower case, `group` the lesion. The suffix
    `_downsampled` is dropped from names, so that an image keeps the id it bears in ISIC-2016 and ISIC-2017 and a test
    image of those can be excluded by id.
    """
    return lay_out(raw, out, _entries(raw))


def _entries(raw: Path) -> Iterator[Entry]:
    folder = find_folder(raw, "ISIC_2019_Training_Input")
    truth = need_file(raw, "ISIC_2019_Training_GroundTruth.csv")
    metadata = need_file(raw, "ISIC_2019_Training_Metadata.csv")
    lesions = {row["image"]: row["lesion_id"] for row in read_table(metadata, ("image", "lesion_id"))}
    pictures = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")}
    for row in read_table(truth, ("image", *CLASSES[:-1])):
        image = row["image"]
        if image not in pictures:
            raise UserError(f"'{folder}' has no '{image}.jpg', which '{truth.name}' lists; unpack the archive again.")
        label = next((kind for kind in CLASSES if is_marked(row, kind, truth)), "")
        plain = image.removesuffix("_downsampled")
        name = image if plain != image and plain in pictures else plain
        yield Entry(name, pictures[image], group=lesions.get(image, ""), label=label.lower())
