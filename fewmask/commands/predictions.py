"""What teachers say of every image, once, before a student learns from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fewmask.commands.prepare import Prepared, cache_folder
from fewmask.config import Recipe
from fewmask.data.cache import VERSION, CachedDataset
from fewmask.data.preprocess import normalise
from fewmask.distill.teacher import EnsembleTeacher
from fewmask.engine.fit import accelerator_for, resolve_precision
from fewmask.engine.run import is_main, read_json, wait_for_everyone, write_json
from fewmask.engine.stage import Progress, Stage
from fewmask.models import Segmenter
from fewmask.types import UserError

BATCH = 64
SHARE_OF_TIME = 0.3  # of a stage, to ask about images without a mask; ours


@dataclass(frozen=True)
class Answers:
    """What the teachers of a stage say of its images, asked before the training."""

    stage: Stage
    recipe: Recipe
    data: Prepared
    teachers: Sequence[Segmenter]
    digests: Sequence[str]

    def affordable(self, others: Sequence[int]) -> list[int]:
        """Return the images without a mask to ask about: all, or as many as 0.3 of the stage's time allows, drawn.

        How many these are depends on this machine, so it is written down, and a resumed stage has the same.
        """
        path = self.stage.folder / "asked.json"
        if self.stage.budget is None or not others:
            return list(others)
        if is_main() and not path.exists():
            num = int(SHARE_OF_TIME * self.stage.budget / self._seconds_an_image(others))
            write_json(path, {"num_images": min(max(num, BATCH), len(others)), "of": len(others)})
        wait_for_everyone()
        num = int(read_json(path)["num_images"])
        if num < len(others):
            Progress("predict").close(f"time for {num} of {len(others)} images without a mask, drawn at random")
        drawn = np.random.default_rng(self.recipe.run.seed).permutation(len(others))[:num]
        return [others[i] for i in sorted(drawn)]

    def of(self, indices: Sequence[int]) -> np.ndarray:
        """Return `predict_all` of the images, from the cache folder where the same were asked before."""
        data, recipe = self.data, self.recipe
        precision, size = resolve_precision(recipe.run), recipe.model.size
        # The fingerprint knows what each name shows, and the names which row is whose: folders may come in another
        # order.
        rows = [(index, data.dataset.names[index]) for index in sorted(indices)]
        print_ = self.stage.run.info["data"]["fingerprint"]
        known = [VERSION, data.dataset.images.shape, print_, size, precision, rows, self.digests]
        key = hashlib.blake2b(json.dumps(known).encode(), digest_size=12).hexdigest()
        path = cache_folder(recipe) / "predictions" / f"{key}.npy"
        return predict_all(path, self.teachers, data.dataset, indices, size, self._device, self._half)

    def _seconds_an_image(self, indices: Sequence[int]) -> float:
        network, chosen = _ready(self.teachers, self._device), np.sort(np.asarray(indices[: BATCH // 2]))
        for _ in range(2):  # the first call makes room
            began = self.stage.now()
            _answer(network, self.data.dataset, chosen, self.recipe.model.size, self._half)
        return max(self.stage.now() - began, 1e-6) / len(chosen)

    @property
    def _device(self) -> torch.device:
        return accelerator_for(self.recipe.run).device

    @property
    def _half(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(self.recipe.run))


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
        _write(path, shape, _answers(_ready(teachers, device), dataset, np.sort(np.asarray(indices)), size, half))
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


def _ready(teachers: Sequence[Segmenter], device: torch.device | str) -> EnsembleTeacher:
    return EnsembleTeacher(teachers).to(device).to(memory_format=torch.channels_last)


def _answers(
    network: EnsembleTeacher, dataset: CachedDataset, rows: np.ndarray, size: int, half: torch.dtype | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each row's number and the answer to it, uint8 (c, c)."""
    line = Progress("predict")
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        yield from zip(chosen.tolist(), _answer(network, dataset, chosen, size, half), strict=True)
        line.count(min(start + BATCH, len(rows)), len(rows))
    line.close(f"{len(rows)} images")


@torch.no_grad()
def _answer(
    network: EnsembleTeacher, dataset: CachedDataset, chosen: np.ndarray, size: int, half: torch.dtype | None
) -> np.ndarray:
    """Return the answers to some rows, uint8 (b, c, c)."""
    device = next(network.members[0].segmenter.parameters()).device  # type: ignore[union-attr]
    image = torch.from_numpy(dataset.images[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
    image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    with torch.autocast(device.type, half, enabled=half is not None):
        logits = network(normalise(image).contiguous(memory_format=torch.channels_last)).logits.float()
    logits = F.interpolate(logits, size=dataset.images.shape[1:3], mode="bilinear", align_corners=False)
    answers: np.ndarray = (logits.sigmoid()[:, 0] * 255).round().byte().cpu().numpy()
    return answers


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
