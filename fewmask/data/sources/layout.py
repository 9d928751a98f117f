"""What every importer does: find the publisher's folders, link the files into the DATA layout, write the manifest."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewmask.types import Split, UserError

COLUMNS = ("image", "mask", "split", "group", "label")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as its publisher names it; `mask` is a file, an array bool (h, w) to write, or None (unlabelled)."""

    name: str
    image: Path
    mask: Path | NDArray[np.bool_] | None = None
    split: Split | None = None
    group: str = ""
    label: str = ""


MARKER = ".fewmask-import"
"""Lies in a folder that an import made, so that no folder of the user's own is written into."""


def lay_out(raw: Path, out: Path, entries: Iterable[Entry]) -> Path:
    """Fill `out/images`, `out/masks` and, last, `out/manifest.csv`; return `out`.

    Files are hard-linked, which costs no space and survives the removal of the raw folder, and copied where the file
    system refuses (our choice: a symbolic link would break when the raw folder moves). An interrupted import is
    completed by the next call. Raises UserError where two entries share a name, where `out` holds anything that no
    import put there, and where it is the raw folder or lies in it.
    """
    rows, seen = [], set()
    _claim(raw, out)
    for folder in (out / "images", out / "masks"):
        folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry.name.lower() in seen:
            raise UserError(f"'{entry.image}' is the second picture named '{entry.name}'; remove one of them.")
        seen.add(entry.name.lower())
        image = f"images/{entry.name}{entry.image.suffix.lower()}"
        place(entry.image, out / image)
        rows.append((image, _place_mask(entry, out), entry.split or "", entry.group, entry.label))
    write_manifest(out / "manifest.csv", rows)
    return out


def _claim(raw: Path, out: Path) -> None:
    """Mark `out` as made by an import, or refuse it."""
    if out.resolve().is_relative_to(raw.resolve()):
        raise UserError(f"'{out}' is the raw download '{raw}' or lies in it; name a folder elsewhere to import into.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder to import into.")
    marker = out / MARKER
    if out.is_dir() and not marker.is_file():
        own = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if own:
            raise UserError(
                f"'{out}' holds files of another origin ('{own[0]}' for one), which an import could overwrite; "
                "name an empty or a new folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("This folder was made by an import of fewmask; importing again may replace its files.\n")


def _place_mask(entry: Entry, out: Path) -> str:
    if entry.mask is None:
        return ""
    if isinstance(entry.mask, Path):
        name = f"masks/{entry.name}{entry.mask.suffix.lower()}"
        place(entry.mask, out / name)
    else:
        name = f"masks/{entry.name}.png"
        write_mask(out / name, entry.mask)
    return name


def place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy across file systems."""
    source = source.resolve()
    if target.exists() and target.samefile(source):
        return
    part = _part(target)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)


def write_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a mask bool (h, w) as an 8-bit PNG of 0 and 255."""
    part = _part(path)
    Image.fromarray(mask.astype(np.uint8) * 255).save(part, "PNG")
    part.replace(path)


def write_manifest(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    """Write image,mask,split,group,label as CSV."""
    part = _part(path)
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def find_folder(raw: Path, name: str) -> Path:
    """Return the folder of that name at or below `raw`, case aside; the innermost where an archive nests it."""
    found = find_optional_folder(raw, name)
    if found is None:
        raise UserError(f"'{raw}' has no folder '{name}': download and unpack that part of the data set into it.")
    return found


def find_optional_folder(raw: Path, name: str) -> Path | None:
    """Return the folder of that name at or below `raw`, or None (see `find_folder`)."""
    if not raw.is_dir():
        raise UserError(f"'{raw}' is not a folder; name the one that holds the unpacked download.")
    wanted = name.lower()
    matches = [Path(parent) for parent, _, _ in os.walk(raw, followlinks=True) if Path(parent).name.lower() == wanted]
    return max(matches, key=lambda path: (len(path.parts), str(path)), default=None)


def find_file(raw: Path, *names: str) -> Path | None:
    """Return the first file below `raw` that bears one of the names (case aside), in the order of the names."""
    files = {path.name.lower(): path for path in sorted(raw.rglob("*"), reverse=True) if path.is_file()}
    return next((files[name.lower()] for name in names if name.lower() in files), None)


def need_file(raw: Path, *names: str) -> Path:
    """Return `find_file`'s answer, or raise UserError that names the file expected."""
    found = find_file(raw, *names)
    if found is None:
        raise UserError(f"'{raw}' has no file '{names[0]}': download it from the same page as the images.")
    return found


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a comma- or tab-separated table, stripped; a missing column is a UserError."""
    lines = read_lines(path)
    header = lines[0] if lines else ""
    csv.field_size_limit(1 << 30)  # one X-ray's run lengths exceed the default of 128 KiB
    reader = csv.DictReader(lines, delimiter="\t" if "\t" in header else ",", skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    missing = [column for column in columns if column not in reader.fieldnames]
    if missing:
        raise UserError(f"'{path}' has no column '{missing[0]}'; its columns are: {', '.join(reader.fieldnames)}.")
    try:
        for row in reader:
            yield {key: (value or "").strip() for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise UserError(f"'{path}' is not a table of text ({error}); download it again.") from None


def read_lines(path: Path) -> list[str]:
    """Return a table's lines; what is no UTF-8 text is a UserError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"'{path}' cannot be read as a text table; download it again.") from None


def is_marked(row: dict[str, str], column: str, table: Path) -> bool:
    """Return whether a row's 0 or 1 is not 0, an empty cell being 0; what is no number is a UserError."""
    text = row.get(column) or "0"
    try:
        return float(text) != 0
    except ValueError:
        raise UserError(f"'{table}' has '{text}' in column '{column}', not 0 or 1; download it again.") from None


def pair_folder(
    images: Path, masks: Path, split: Split | None, labels: dict[str, str], suffix: str = "_segmentation"
) -> Iterator[Entry]:
    """Yield each JPEG of a folder with the PNG that bears its name and a suffix (case aside).

    Superpixel maps, which are PNG, are passed over. Raises UserError where an image has no mask or none is there.
    """
    outlines = {path.stem.lower(): path for path in masks.iterdir() if path.suffix.lower() == ".png"}
    pictures = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not pictures:
        raise UserError(f"'{images}' holds no JPEG image; unpack the archive into it.")
    for picture in pictures:
        mask = outlines.get(picture.stem.lower() + suffix)
        if mask is None:
            raise UserError(f"'{picture}' has no mask '{picture.stem}{suffix}.png' in '{masks}'; unpack it again.")
        yield Entry(picture.stem, picture, mask, split, label=labels.get(picture.stem, ""))
