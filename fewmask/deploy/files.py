"""Which files a user meant, and where each answer goes."""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fewmask.data.reading import is_picture
from fewmask.types import UserError


@dataclass(frozen=True, slots=True)
class Job:
    """One image to predict and the name, without suffix, of its answers below the output folder."""

    image: Path
    name: str


@dataclass(frozen=True, slots=True)
class Found:
    """The images found, and how many files were left alone.

    `num_other` are no images, `num_own` earlier answers, `num_masks` the masks of a data folder.
    """

    jobs: tuple[Job, ...]
    num_other: int
    num_own: int
    num_masks: int


def find_images(paths: list[str], out: Path) -> Found:
    """Return the images named by files, folders (searched to the bottom) and glob patterns, each once.

    A file below a folder keeps its sub-folder in its name. A file named outright is always taken; in a folder only
    what is an image by suffix (or DICOM by content) is, not hidden files, not what lies below `out`, and of a data
    folder, which holds `images` and `masks`, not its masks. Raises UserError where a path matches nothing or
    nothing is left.
    """
    own = out.resolve()
    named: list[tuple[Path, str]] = []
    num_other = num_own = num_masks = 0
    for text in paths:
        for root, path, outright in _expand(text):
            if not outright and not _may_be_image(path):
                num_other += 1
            elif not outright and root.resolve() in own.parents and own in path.resolve().parents:
                num_own += 1
            elif not outright and root / "masks" in path.parents and (root / "images").is_dir():
                num_masks += 1
            else:
                named.append((path, path.relative_to(root).with_suffix("").as_posix()))
    if not named:
        raise UserError(f"There is no image in {', '.join(paths)}; give files, folders or patterns such as 'a/*.jpg'.")
    return Found(_unique(named), num_other, num_own, num_masks)


def _expand(text: str) -> list[tuple[Path, Path, bool]]:
    """Return (root, file, named outright) for one argument."""
    path = Path(text)
    if path.is_dir():
        return [(path, file, False) for file in _walk(path)]
    if path.is_file():
        return [(path.parent, path, True)]
    if not glob.has_magic(text):
        raise UserError(f"There is no file or folder {text}; check the path.")
    root = _fixed_part(path)
    files: list[Path] = []
    for match in sorted(map(Path, glob.glob(text, recursive=True))):  # noqa: PTH207 - an absolute pattern is allowed
        files += _walk(match) if match.is_dir() else [match]
    if not files:
        raise UserError(f"The pattern '{text}' matches no file; check it.")
    # Once each: '**' matches a folder and also what is in it.
    return [(root, file, False) for file in dict.fromkeys(files)]


def _may_be_image(path: Path) -> bool:
    try:
        return is_picture(path)
    except OSError:
        # Not for us to pass over: reading it will say what is wrong.
        return True


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent) / name for name in sorted(files) if not name.startswith(".")]
    return found


def _unreadable(error: OSError) -> None:
    raise UserError(f"The folder {error.filename} cannot be searched ({error.strerror}); mend its permissions.")


def _fixed_part(pattern: Path) -> Path:
    """Return the folders of a glob pattern before its first wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[: min(first, len(parts) - 1)])


def _unique(named: list[tuple[Path, str]]) -> tuple[Job, ...]:
    """Give every image a name of its own, also where the file system ignores case; an image given twice is one job."""
    seen: set[Path] = set()
    taken: set[str] = set()
    jobs = []
    stems = Counter(name.casefold() for _, name in dict.fromkeys(named))
    for path, name in named:
        # Not resolved: a link is an image of its own, whatever it points to.
        absolute = path.absolute()
        if absolute in seen:
            continue
        seen.add(absolute)
        wanted = name if stems[name.casefold()] == 1 else f"{name}_{path.suffix[1:].lower()}"
        unique, number = wanted, 2
        while unique.casefold() in taken:
            unique, number = f"{wanted}-{number}", number + 1
        taken.add(unique.casefold())
        jobs.append(Job(path, unique))
    return tuple(jobs)
