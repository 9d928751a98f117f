"""Images and masks decoded and reduced once, then read by every epoch from two memory-mapped arrays."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewmask.data.contents import content_hashes
from fewmask.data.preprocess import resize_image, resize_mask
from fewmask.data.reading import read_image, read_mask
from fewmask.disk import flush
from fewmask.types import Case, UserError

VERSION = 2
"""Counted up whenever reading or resizing changes what a cache holds."""

_CHUNK = 16
_STALE_SECONDS = 3600
_HEADER_BYTES = 128
"""Of a .npy file of version 1.0 whose shape is short."""

_Row = tuple[int, Path, Path | None]


@dataclass(frozen=True, slots=True)
class CachedDataset:
    """Cases at cache size c: `images` uint8 (n, c, c, 3), `masks` uint8 (n, c, c) coverage in 0..255 or None, on disk.

    `has_mask` is bool (n,): rows without a mask are zero. `labels` is int64 (n,), an index into `label_names` (sorted),
    -1 where unknown. Rows are in the order of the cases given.
    """

    images: np.ndarray
    masks: np.ndarray | None
    has_mask: np.ndarray
    names: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]


def cache_size(size: int) -> int:
    """Return the side c stored for a training size: an eighth more, for crops and turns, in multiples of 8 pixels."""
    return math.ceil(size * 1.125 / 8) * 8


def build_cache(
    cases: Sequence[Case],
    size: int,
    folder: Path,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CachedDataset:
    """Return the cases at `cache_size(size)`, from the cache in `folder` where it is, built in parallel where not.

    The entry's key is made of the files' contents, their order, the size and VERSION; names and labels are not part of
    it. It appears in one step, so builders may race and a killed one leaves nothing that is read. `workers` counts
    threads, all cores by default: decoding and resizing release the interpreter's lock, and measured no slower than
    processes. `on_progress(done, total)` is called while building. Raises UserError for an unreadable file, a mask of
    another size than its image, a full disk (with the bytes needed) and a folder that cannot be written.
    """
    if not cases:
        raise UserError("There are no images to cache: the selection is empty.")
    side = cache_size(size)
    entry = Path(folder) / f"images-{side}-{_key(cases, side)}"
    found = _open(entry, cases, side)
    if found is None:
        with _disk_errors(Path(folder), cases, side):
            _build(entry, cases, side, workers or num_cores(), on_progress)
        found = _open(entry, cases, side)
    if found is None:
        raise UserError(f"The cache '{entry}' vanished or was damaged while it was opened: run again.")
    return found


def _key(cases: Sequence[Case], side: int) -> str:
    hashes = content_hashes(cases)
    rows = [[hashes[case.image], case.mask and hashes[case.mask]] for case in cases]
    return hashlib.blake2b(json.dumps([VERSION, side, rows]).encode(), digest_size=12).hexdigest()


def num_cores() -> int:
    """Return how many cores this process may use, which a container or a scheduler may make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(entry: Path, cases: Sequence[Case], side: int) -> CachedDataset | None:
    """Return the entry, or None where it is not there or not whole (damaged ones are removed)."""
    has_mask = np.array([case.mask is not None for case in cases])
    shape = (len(cases), side, side)
    if not entry.is_dir():
        return None
    try:
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        masks = np.load(entry / "masks.npy", mmap_mode="r", allow_pickle=False) if has_mask.any() else None
        whole = images.shape == (*shape, 3) and (masks is None or masks.shape == shape)
    except (OSError, ValueError, EOFError):
        whole = False
    if not whole:
        shutil.rmtree(entry, ignore_errors=True)
        return None
    label_names = tuple(sorted({case.label for case in cases if case.label is not None}))
    index = {label: number for number, label in enumerate(label_names)}
    labels = np.array([-1 if case.label is None else index[case.label] for case in cases], dtype=np.int64)
    return CachedDataset(images, masks, has_mask, [case.name for case in cases], labels, label_names)


def _build(
    entry: Path, cases: Sequence[Case], side: int, workers: int, on_progress: Callable[[int, int], None] | None
) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(entry.parent)
    needed, free = _bytes_needed(cases, side), shutil.disk_usage(entry.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, "No space left on device")
    building = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".building-"))
    try:
        _allocate(building / "images.npy", (len(cases), side, side, 3))
        if any(case.mask is not None for case in cases):
            _allocate(building / "masks.npy", (len(cases), side, side))
        rows = [(row, case.image, case.mask) for row, case in enumerate(cases)]
        for done in _fill(building, rows, side, workers):
            os.utime(building)
            if on_progress is not None:
                on_progress(done, len(cases))
        meta = {"version": VERSION, "side": side, "num_images": len(cases), "names": [case.name for case in cases]}
        (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for array in building.glob("*.npy"):
            with array.open("rb+") as file:  # after a crash its length would be right and its rows zero
                flush(file)
        building.chmod(0o755)  # a temporary folder is its maker's alone, a cache may be shared
        _publish(building, entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, entry: Path) -> None:
    try:
        building.replace(entry)
    except OSError as error:
        # Another process was faster: what it wrote is the same, byte for byte.
        if not (entry / "meta.json").is_file():
            raise error


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builders left: a living one touches its folder every few images."""
    for leftover in folder.glob(".building-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        except FileNotFoundError:
            continue


def _bytes_needed(cases: Sequence[Case], side: int) -> int:
    num_masks = sum(case.mask is not None for case in cases)
    return (3 * len(cases) + num_masks) * side * side + 2**20


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """Write a .npy file's header and its length; rows never written (no mask) read as zero and take no space."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        if file.tell() != _HEADER_BYTES:
            raise AssertionError(f"NumPy wrote a header of {file.tell()} bytes")
        file.truncate(_HEADER_BYTES + math.prod(shape))


def _fill(building: Path, rows: Sequence[_Row], side: int, workers: int) -> Iterator[int]:
    """Write all rows, yielding how many are done."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    pool = ThreadPoolExecutor(min(workers, len(chunks)))
    try:
        futures = [pool.submit(_write_rows, building, chunk, side) for chunk in chunks]
        done = 0
        for future in as_completed(futures):
            done += future.result()
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_rows(building: Path, rows: Sequence[_Row], side: int) -> int:
    """Write some rows in place; through files, not memory maps, in which a full disk would kill the process."""
    for row, image_path, mask_path in rows:
        image = read_image(image_path)
        if mask_path is not None:
            mask = read_mask(mask_path).mask
            _check_sizes(image_path, image, mask_path, mask)
            _write_row(building / "masks.npy", row, resize_mask(mask, side))
        _write_row(building / "images.npy", row, resize_image(image, side))
    return len(rows)


def _write_row(path: Path, row: int, values: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(_HEADER_BYTES + row * values.nbytes)
        file.write(values.tobytes())


def _check_sizes(image_path: Path, image: np.ndarray, mask_path: Path, mask: np.ndarray) -> None:
    if image.shape[:2] != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], mask.shape
        raise UserError(
            f"Mask '{mask_path}' is {mask_w} x {mask_h} pixels but its image '{image_path}' is {w} x {h}: "
            "export the mask at the image's size."
        )


@contextmanager
def _disk_errors(folder: Path, cases: Sequence[Case], side: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of the cache '{folder}' is full: {_bytes_needed(cases, side):,} bytes are needed; "
                "free some, or set FEWMASK_CACHE to a folder on another disk."
            ) from None
        raise UserError(
            f"The cache folder '{folder}' cannot be written ({error.strerror}): set FEWMASK_CACHE to a folder that can."
        ) from None
