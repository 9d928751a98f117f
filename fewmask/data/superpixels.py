"""Superpixels of every cached image: computed once in parallel, then read by every epoch from a memory-mapped array."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fewmask.data.cache import CachedDataset, num_cores
from fewmask.disk import flush
from fewmask.types import UserError

# torch is not imported here: each worker process imports this module, and would pay seconds for it.

VERSION = 1
"""Counted up whenever the maps change for the same images and settings."""

_CHUNK = 32
_FEW = 256
"""Up to this many images one process is done before a pool has started."""

_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Slic:
    """The settings of SLIC (Achanta et al. 2012).

    Paper (G2LL): 8 segments. Code (scikit-image's defaults): compactness 10, 10 iterations. Ours: it sees the cached
    picture, an eighth larger than the network's, and crops move its map. `num_segments` is what is asked for; SLIC
    starts from a regular grid and may return a few more or fewer. Raises UserError for a number outside 1..127 (labels
    are kept in a byte, with room for twice as many) or settings that are not positive.
    """

    num_segments: int = 8
    compactness: float = 10.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.num_segments <= 127:
            raise UserError(f"'num_segments' cannot be {self.num_segments}: give a number from 1 to 127, such as 8.")
        if self.compactness <= 0 or self.iterations < 1:
            raise UserError(
                f"SLIC cannot run with compactness {self.compactness} and {self.iterations} iterations: "
                "both must be above zero (10 and 10 are usual)."
            )

    @property
    def num_labels(self) -> int:
        """An upper bound of the number of labels in a map."""
        return 2 * self.num_segments + 1

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the label map uint8 (h, w) of an image uint8 (h, w, 3): labels 0, 1, ... without gaps.

        Regions are connected, but for more than `num_labels` (never seen: SLIC merges small ones), of which the last
        ones would share a label.
        """
        from skimage.segmentation import slic

        labels = slic(
            image,
            n_segments=self.num_segments,
            compactness=self.compactness,
            max_num_iter=self.iterations,
            start_label=0,
            channel_axis=-1,
        )
        ranks = np.searchsorted(np.unique(labels), labels)
        return np.minimum(ranks, self.num_labels - 1).astype(np.uint8)


def superpixel_maps(
    dataset: CachedDataset,
    slic: Slic | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the superpixels of a cache's images, uint8 (n, c, c) in its order, memory-mapped.

    They lie in the cache entry beside the decoded images, one file for each set of SLIC's settings, and are built in
    parallel where they do not yet. The file appears in one step, so builders may race and a killed one leaves nothing
    that is read. `workers` counts processes, all cores by default; `on_progress(done, total)` is called while building.
    Images that are not memory-mapped have no entry: their maps are computed in this process and kept in memory.
    Raises UserError for a full disk or a folder that cannot be written.
    """
    slic = slic or Slic()
    source = getattr(dataset.images, "filename", None)
    if source is None:
        return np.stack([slic(image) for image in dataset.images])
    path = _path(Path(source), slic)
    shape = dataset.images.shape[:3]
    maps = _open(path, shape)
    if maps is None:
        with _disk_errors(path.parent, shape):
            _build(path, Path(source), shape, slic, workers or num_cores(), on_progress)
        maps = _open(path, shape)
    if maps is None:
        raise UserError(f"The superpixels '{path}' vanished or were damaged while they were opened: run again.")
    return maps


def _path(images: Path, slic: Slic) -> Path:
    key = hashlib.blake2b(json.dumps([VERSION, asdict(slic)]).encode(), digest_size=8).hexdigest()
    return images.parent / f"superpixels-{slic.num_segments}-{key}.npy"


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        maps = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # the last for an empty file
        return None
    return maps if maps.shape == shape and maps.dtype == np.uint8 else None


def _build(
    path: Path,
    images: Path,
    shape: tuple[int, ...],
    slic: Slic,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    _remove_leftovers(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".superpixels-")
    try:
        # Rows are written through the file, not a memory map, in which a full disk would kill the process.
        with os.fdopen(handle, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            done = 0
            for maps in _chunks(images, shape[0], slic, workers):
                file.write(maps.tobytes())
                done += len(maps)
                os.utime(temporary)
                if on_progress is not None:
                    on_progress(done, shape[0])
            flush(file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _chunks(images: Path, num_images: int, slic: Slic, workers: int) -> Iterator[np.ndarray]:
    """Yield the maps of all images in their order."""
    starts = range(0, num_images, _CHUNK)
    if workers == 1 or num_images <= _FEW:
        for start in starts:
            yield _segment(images, start, slic)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(starts)), mp_context=context, initializer=_ignore_interrupt)
    try:
        for future in [pool.submit(_segment, images, start, slic) for start in starts]:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _segment(images: Path, start: int, slic: Slic) -> np.ndarray:
    rows = np.load(images, mmap_mode="r", allow_pickle=False)[start : start + _CHUNK]
    return np.stack([slic(image) for image in rows])


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which stops the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed builders left: a living one touches its file every few images."""
    for leftover in folder.glob(".superpixels-*"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue


@contextmanager
def _disk_errors(folder: Path, shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        needed = shape[0] * shape[1] * shape[2]
        raise UserError(
            f"The superpixels cannot be written to the cache '{folder}' ({error.strerror or error}; {needed:,} bytes "
            "are needed): free some, or set FEWMASK_CACHE to a folder on another disk."
        ) from None
