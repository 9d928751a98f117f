"""What teachers say of every image, once, before a student learns from it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fewmask.data.cache import CachedDataset
from fewmask.data.preprocess import normalise
from fewmask.distill.teacher import EnsembleTeacher
from fewmask.engine.run import is_main, wait_for_everyone
from fewmask.engine.stage import Progress
from fewmask.models import Segmenter
from fewmask.types import UserError

BATCH = 64


@torch.no_grad()
def predict_all(
    path: Path,
    teachers: Sequence[Segmenter],
    dataset: CachedDataset,
    indices: Sequence[int],
    size: int,
    device: torch.device | str = "cpu",
    half: torch.dtype | None = None,
) -> np.ndarray:
    """Return the teachers' mean probability, uint8 (n, c, c) of 0..255, for the rows `indices` of a data set.

    The other rows are zero. The teachers see images of `size`, as in training without augmentation; the answers are
    enlarged to the cache's side c. They are kept in `path` (.npy, memory-mapped), which is taken as it is where it is
    there: it appears in one step, when it is complete. With `half`, the teachers work in that precision.
    """
    side = dataset.images.shape[1]
    shape = (len(dataset.images), side, side)
    if (found := _open(path, shape)) is not None:
        return found
    if is_main():
        network = EnsembleTeacher(teachers).to(device).to(memory_format=torch.channels_last)
        _write(path, shape, _answers(network, dataset, np.sort(np.asarray(indices)), size, half))
    wait_for_everyone()
    found = _open(path, shape)
    assert found is not None
    return found


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the kept answers, or None where there are none, or damaged ones."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _answers(
    network: EnsembleTeacher, dataset: CachedDataset, rows: np.ndarray, size: int, half: torch.dtype | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each row's number and the answer to it, uint8 (c, c)."""
    line, side = Progress("predict"), dataset.images.shape[1]
    device = next(network.members[0].segmenter.parameters()).device  # type: ignore[union-attr]
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        image = torch.from_numpy(dataset.images[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
        image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(device.type, half, enabled=half is not None):
            logits = network(normalise(image).contiguous(memory_format=torch.channels_last)).logits.float()
        logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
        answers = (logits.sigmoid()[:, 0] * 255).round().byte().cpu().numpy()
        yield from zip(chosen.tolist(), answers, strict=True)
        line.count(min(start + BATCH, len(rows)), len(rows))
    line.close(f"{len(rows)} images")


def _write(path: Path, shape: tuple[int, int, int], answers: Iterator[tuple[int, np.ndarray]]) -> None:
    """Write the answers under a temporary name, and rename it; a UserError where the disk is full.

    Plain writing and no memory map: a full disk under a map ends the process without a word.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            start = file.tell()
            file.truncate(start + math.prod(shape))
            for row, answer in answers:
                file.seek(start + row * answer.size)
                file.write(answer.tobytes())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"Cannot write the teachers' predictions to {path.parent}: {error.strerror}; free "
            f"{math.prod(shape) / 1e6:.0f} MB, or set FEWMASK_CACHE to a folder with room."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
