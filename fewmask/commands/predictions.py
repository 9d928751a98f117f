"""What teachers say of every image without a mask, once, before a student learns from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fewmask.data.cache import CachedDataset
from fewmask.data.preprocess import normalise
from fewmask.distill.teacher import EnsembleTeacher
from fewmask.engine.stage import Progress
from fewmask.models import Segmenter

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
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        side = dataset.images.shape[1]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shape = (len(dataset.images), side, side)
        answers = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        ensemble = EnsembleTeacher(teachers).to(device=device, memory_format=torch.channels_last)
        chosen, line = np.sort(np.asarray(indices)), Progress("predict")
        for start in range(0, len(chosen), BATCH):
            rows = chosen[start : start + BATCH]
            image = torch.from_numpy(dataset.images[rows]).to(device).permute(0, 3, 1, 2).float() / 255
            image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
            with torch.autocast(torch.device(device).type, half, enabled=half is not None):
                logits = ensemble(normalise(image).contiguous(memory_format=torch.channels_last)).logits.float()
            logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
            answers[rows] = (logits.sigmoid()[:, 0] * 255).round().byte().cpu().numpy()
            line.count(min(start + BATCH, len(chosen)), len(chosen))
        answers.flush()
        temporary.replace(path)
        line.close(f"{len(chosen)} images without a mask")
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found
