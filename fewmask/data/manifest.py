"""Which image goes with which mask, split, patient and label: a folder or a manifest as a list of cases."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from fewmask.data.contents import content_hashes, default_cache_folder, fingerprint
from fewmask.data.reading import PICTURE_SUFFIXES, is_picture
from fewmask.types import Case, Split, UserError

__all__ = [
    "content_hashes", "default_cache_folder", "fingerprint", "load_cases", "skipped_files", "unlisted_pictures",
    "write_cases",
]  # fmt: skip

COLUMNS = ("image", "mask", "split", "group", "label")
MASK_ENDINGS = ("_segmentation", "_mask")
"""What a mask's name may have behind its image's name, in any case of letters."""

MASK_FOLDERS = ("masks", "mask", "labels", "groundtruth")
"""Folders, in any case of letters, whose pictures are masks; as are those of a folder that ends in _groundtruth."""

FAULTS_SHOWN = 20

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_PAPERS = frozenset({
    "", ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".yaml", ".yml", ".toml", ".xml", ".pdf", ".doc", ".docx",
    ".xls", ".xlsx", ".log", ".html", ".htm", ".py", ".sh", ".bib", ".sha256", ".md5",
})  # fmt: skip


def load_cases(root: Path, manifest: Path | None = None, unlabelled: Sequence[Path] = ()) -> list[Case]:
    """Return the cases of a data set, by name, followed by those of the unlabelled folders.

    With a manifest (the one given, else `root/manifest.csv` where there is one) its rows are the data set; pictures it
    does not list are left out. Without a `mask` column, and without a manifest, images are paired with masks by stem:
    `masks/NAME.*`, `masks/NAME_segmentation.*` or `masks/NAME_mask.*`; an image without a mask is unlabelled. Folders
    below `images/` are searched too, links to folders followed, and become part of the name (`a/x.png` is `a__x`).
    `group` is the name where no group is given.

    An unlabelled folder has the same layout, or is any folder of pictures; its masks and splits are not used, its
    groups and labels are. A name that is taken gets the folder's name in front; a picture already listed is left out.
    Raises UserError, with the manifest's line where there is one, for all that could make an answer silently wrong;
    of a manifest's faults the first FAULTS_SHOWN, a line each.
    """
    root = _folder(root)
    path = _manifest_path(root, manifest)
    if path is not None:
        cases = _read_manifest(root, path)
    elif (root / "images").is_dir():
        cases = _pair(root, _listing(root / "images"))
    else:
        raise UserError(f"'{root}' has no folder 'images': {_where_images_go(root)}")
    if not cases:
        raise UserError(f"'{root}' holds no images: put them in {root}/images.")
    return _with_unlabelled(sorted(cases, key=lambda case: case.name), [_folder(folder) for folder in unlabelled])


def _where_images_go(root: Path) -> str:
    """Return what to do about a folder that is not laid out as one of images and masks."""
    own = None
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        files = (file for file in sorted(root.iterdir()) if not _is_clutter(file.name))
        own = next((file for file in files if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()), None)
    if own is None:
        return f"put images in {root}/images and masks in {root}/masks."
    if root.resolve().name == "images":
        return f"it is one, so give the folder that it lies in, {root.resolve().parent}."
    return f"it holds pictures itself, such as {own.name}; move them to {root}/images, and masks to {root}/masks."


def skipped_files(root: Path) -> list[Path]:
    """Return the documents (README.txt and the like) that lie among the images and masks and are not read."""
    folders = [folder for folder in (root / "images", root / "masks") if folder.is_dir()] or [root]
    files = (file for folder in folders for file in _files(folder))
    return sorted(file for file in files if file.suffix.lower() in _PAPERS and not is_picture(file))


def unlisted_pictures(root: Path, cases: Iterable[Case]) -> list[Path]:
    """Return the pictures below `root/images` and `root/masks` that no case names, as a manifest may leave some out."""
    listed = {os.path.realpath(file) for case in cases for file in (case.image, case.mask) if file is not None}
    files = (file for folder in ("images", "masks") for file in _files(root / folder))
    return [file for file in files if os.path.realpath(file) not in listed and is_picture(file)]


def write_cases(path: Path, rows: Iterable[tuple[Case, str]]) -> None:
    """Write (case, use) rows as CSV with the columns image, mask, split, group, label, use; replaced in one step.

    Paths are written as they are in the cases, absolute where those are.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "use"])
    for case, use in rows:
        mask = "" if case.mask is None else case.mask.as_posix()
        writer.writerow([case.image.as_posix(), mask, case.split or "", case.group, case.label or "", use])
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _folder(path: Path) -> Path:
    path = Path(path)
    if path.is_dir():
        return path
    raise UserError(f"'{path}' is {'a file' if path.exists() else 'missing'}: give the folder that holds the data.")


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder, hidden ones and the clutter of operating systems left out.

    Links to folders are followed, after all real folders and each folder once, so that circles end and a file bears
    the name of its real folder where that is searched too.
    """
    found: list[Path] = []
    seen: set[str] = set()
    starts = [folder]
    for start in starts:
        for parent, folders, names in os.walk(start, followlinks=False):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not _is_clutter(name))
            starts += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
            found += [Path(parent, name) for name in sorted(names) if not _is_clutter(name)]
    return found


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


def _listing(folder: Path) -> dict[str, Path]:
    """Return {name: picture} of a folder, or raise UserError for what looks like data and cannot be read."""
    pictures, strange = [], []
    for file in _files(folder):
        if is_picture(file):
            pictures.append(file)
        elif file.suffix.lower() not in _PAPERS:
            strange.append(file)
    if strange:
        raise UserError(
            f"'{folder}' holds {_some(strange, folder)} of a kind this program cannot read: "
            "convert to PNG, or move elsewhere."
        )
    return _by_name((_name(file.relative_to(folder)), file) for file in pictures)


def _name(relative: Path) -> str:
    # A DICOM file may end in a part of its number (1.2.840.1): only a picture's ending is one.
    bare = relative.with_suffix("") if relative.suffix.lower() in PICTURE_SUFFIXES else relative
    return unicodedata.normalize("NFC", "__".join(bare.parts))


def _key(name: str) -> str:
    """Return what two names share when some file system takes them for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _by_name(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    seen: dict[str, Path] = {}
    for name, file in named:
        other = seen.setdefault(_key(name), file)
        if other is not file:
            raise UserError(
                f"'{other}' and '{file}' have one name but for the ending, capitals or accents: rename or remove one."
            )
        found[name] = file
    return found


def _some(files: Sequence[Path], folder: Path, limit: int = 5) -> str:
    shown = ", ".join(f"'{file.relative_to(folder).as_posix()}'" for file in files[:limit])
    return shown + (f" and {len(files) - limit} more" if len(files) > limit else "")


def _pair(root: Path, images: dict[str, Path]) -> list[Case]:
    """Return a case per image, with its mask where the masks folder has one."""
    _refuse_masks_among_images(root, root / "images", images)
    keys = {_key(name) for name in images}
    masks = _masks(root, keys)
    lonely = sorted(mask for key, mask in masks.items() if key not in keys)
    if lonely:
        raise UserError(
            f"'{root / 'masks'}' holds masks without an image: {_some(lonely, root / 'masks')}; "
            "add the images under the same names, or remove the masks."
        )
    return [Case(name, image, masks.get(_key(name)), group=name) for name, image in images.items()]


def _masks(root: Path, keys: set[str]) -> dict[str, Path]:
    """Return {key of the image's name: mask}; an exact name counts before an ending is taken off."""
    found: dict[str, Path] = {}
    if not (root / "masks").is_dir():
        return found
    for name, mask in _listing(root / "masks").items():
        key = _key(name)
        stem = next((key.removesuffix(ending) for ending in MASK_ENDINGS if key.endswith(ending)), key)
        key = key if key in keys else stem
        if key in found:
            raise UserError(f"'{found[key]}' and '{mask}' are masks of one image: remove one.")
        found[key] = mask
    return found


def _refuse_masks_among_images(root: Path, folder: Path, images: dict[str, Path]) -> None:
    """Pre-training on masks would go unnoticed, so what is named as a mask, or its folder is, is not an image."""
    keys = {_key(name) for name in images}
    for name, file in images.items():
        for part in (part.casefold() for part in file.relative_to(folder).parts[:-1]):
            if part in MASK_FOLDERS or part.endswith("_groundtruth"):
                raise UserError(
                    f"'{file}' lies in a folder named as one of masks but below the images of '{root}': put the images "
                    f"into '{root / 'images'}' and the masks into '{root / 'masks'}'."
                )
        for ending in (*MASK_ENDINGS, "_superpixels"):
            if _key(name).endswith(ending) and _key(name).removesuffix(ending) in keys:
                raise UserError(
                    f"'{file}' is named as a mask but lies among the images: move it to '{root / 'masks'}'."
                )


def _manifest_path(root: Path, manifest: Path | None) -> Path | None:
    if manifest is None:
        return root / "manifest.csv" if (root / "manifest.csv").is_file() else None
    path = next((path for path in (root / manifest, Path(manifest)) if path.is_file()), None)
    if path is None:
        raise UserError(f"Manifest '{manifest}' is not there: name a CSV file inside '{root}'.")
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"Manifest '{manifest}' is outside '{root}': move it in, its paths start from that folder.")
    return path


def _read_manifest(root: Path, path: Path) -> list[Case]:
    rows, columns = _rows(path)
    cases: list[Case] = []
    faults: list[str] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"'{path}' line {line}"
        try:
            case = _case(root, row, where)
        except UserError as error:
            faults.append(str(error))
            continue
        cases.append(case)
        faults += _repeats(case, row, line, lines, where)
    _refuse(faults)
    named = _named(cases, root)
    if "mask" in columns:
        return named
    keys = [_key(_stem(root, case.image)) for case in named]
    masks = _masks(root, set(keys))
    return [replace(case, mask=masks.get(key)) for case, key in zip(named, keys, strict=True)]


def _repeats(case: Case, row: dict[str, str], line: int, lines: dict[str, int], where: str) -> Iterator[str]:
    """Yield a sentence for each file of a row that an earlier one has; `lines` remembers {file: line}."""
    for column, file in (("image", case.image), ("mask", case.mask)):
        if file is not None:
            first = lines.setdefault(_key(str(file)), line)
            if first != line:
                yield f"{where} lists '{row[column]}' again, after line {first}: remove one."


def _refuse(faults: list[str]) -> None:
    if faults:
        more = [f"There are {len(faults) - FAULTS_SHOWN} more such lines."] if len(faults) > FAULTS_SHOWN else []
        raise UserError("\n".join([*faults[:FAULTS_SHOWN], *more]))


def _named(cases: list[Case], root: Path) -> list[Case]:
    """Give each case its short name, or the one with its folders where short ones collide."""
    names = [_name(Path(case.image.name)) for case in cases]
    if len({_key(name) for name in names}) < len(cases):
        names = [_stem(root, case.image) for case in cases]
    _by_name(zip(names, (case.image for case in cases), strict=True))
    return [replace(case, name=name, group=case.group or name) for case, name in zip(cases, names, strict=True)]


def _stem(root: Path, image: Path) -> str:
    relative = image.relative_to(root)
    return _name(relative.relative_to("images") if relative.parts[0] == "images" else relative)


def _case(root: Path, row: dict[str, str], where: str) -> Case:
    word = row.get("split", "").lower()
    if word and word not in _SPLIT_WORDS:
        raise UserError(f"{where} has split '{row['split']}': write train, val or test, or leave it empty.")
    image = _inside(root, row.get("image", ""), f"{where}, column image,")
    mask = _inside(root, row["mask"], f"{where}, column mask,") if row.get("mask") else None
    if mask == image:
        raise UserError(f"{where} names '{row['image']}' as image and mask: name the mask, or leave it empty.")
    return Case(
        name="",
        image=image,
        mask=mask,
        split=_SPLIT_WORDS[word] if word else None,
        group=row.get("group", ""),
        label=row.get("label") or None,
    )


def _inside(root: Path, text: str, where: str) -> Path:
    """Return the file a manifest names, or raise UserError where it is missing or leaves the data folder."""
    if not text:
        raise UserError(f"{where} is empty: name an image or remove the line.")
    relative = PurePosixPath(text.replace("\\", "/"))
    if relative.is_absolute() or PureWindowsPath(text).drive or ".." in relative.parts:
        raise UserError(f"{where} names '{text}', outside the data folder: write a path relative to '{root}'.")
    try:
        if (root / relative).is_file():
            return root / relative
    except ValueError:  # a NUL in the name
        pass
    raise UserError(f"{where} names '{text}', which is not there: put the file in '{root}' or correct the line.")


def _rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Return [(line, row)] of a CSV and its columns; comma, semicolon or tab, with or without a byte order mark."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text: save it as 'CSV UTF-8'.") from None
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.line_num} is not valid CSV ({error}): correct its quotes.") from None
    lines = [(number, cells) for number, cells in lines if any(cells)]
    columns = [cell.lower() for cell in lines[0][1]] if lines else []
    known = [column for column in columns if column in COLUMNS]
    if "image" not in known or len(set(known)) != len(known):
        others = ", ".join(COLUMNS[1:])
        raise UserError(
            f"'{path}' needs one column named 'image' in its first line, and each of {others} at most once."
        )
    for number, cells in lines[1:]:
        if len(cells) > len(columns) and any(cells[len(columns) :]):
            raise UserError(f"'{path}' line {number} has more cells than the first line has columns: quote the commas.")
    return [(number, dict(zip(columns, cells, strict=False))) for number, cells in lines[1:]], columns


def _with_unlabelled(cases: list[Case], folders: list[Path]) -> list[Case]:
    """Append the unlabelled folders' cases under names of their own."""
    taken = {_key(case.name) for case in cases}
    listed = {os.path.realpath(case.image) for case in cases}
    for folder in folders:
        prefix = folder.resolve().name
        for case in _unlabelled(folder):
            real = os.path.realpath(case.image)
            if real in listed:
                continue
            listed.add(real)
            name = _free_name(case.name, prefix, taken)
            taken.add(_key(name))
            cases.append(replace(case, name=name, group=name if case.group == case.name else case.group))
    return cases


def _free_name(name: str, prefix: str, taken: set[str]) -> str:
    candidates = itertools.chain(
        [name, f"{prefix}__{name}"], (f"{prefix}_{number}__{name}" for number in itertools.count(2))
    )
    return next(candidate for candidate in candidates if _key(candidate) not in taken)


def _unlabelled(folder: Path) -> list[Case]:
    """Return a folder's images as cases without mask and split."""
    if (folder / "manifest.csv").is_file():
        cases = _read_manifest(folder, folder / "manifest.csv")
    else:
        pictures = folder / "images" if (folder / "images").is_dir() else folder
        images = _listing(pictures)
        _refuse_masks_among_images(folder, pictures, images)
        cases = [Case(name, image, group=name) for name, image in images.items()]
    if not cases:
        raise UserError(f"Unlabelled folder '{folder}' holds no images: put some in, or do not name it.")
    return [replace(case, mask=None, split=None) for case in sorted(cases, key=lambda case: case.name)]
