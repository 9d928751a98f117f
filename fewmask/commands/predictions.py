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
    """What the teachers of a stage say of its images, asked before the training: the mean of sigma(z / temperature)."""

    stage: Stage
    recipe: Recipe
    data: Prepared
    teachers: Sequence[Segmenter]
    digests: Sequence[str]
    temperature: float = 1.0

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
        """Return the answers to the rows `indices`, uint8 (n, c, c) of 0..255; the other rows are zero.

        The teachers see images of the network's size, as in training without augmentation; the answers are enlarged to
        the cache's side c. They are kept in the cache folder (.npy, memory-mapped), and taken from there where the same
        were asked before: a file appears in one step, when it is complete.
        """
        side = self.data.dataset.images.shape[1]
        path, shape = self._path(indices), (len(self.data.dataset.images), side, side)
        if (found := _open(path, shape)) is not None:
            return found
        if is_main():
            _write(path, shape, self._questions.answers(np.sort(np.asarray(indices))))
        wait_for_everyone()
        found = _open(path, shape)
        assert found is not None
        return found

    def _path(self, indices: Sequence[int]) -> Path:
        data, recipe = self.data, self.recipe
        precision, size = resolve_precision(recipe.run), recipe.model.size
        # The fingerprint knows what each name shows, and the names which row is whose: folders may come in another
        # order.
        rows = [(index, data.dataset.names[index]) for index in sorted(indices)]
        print_ = self.stage.run.info["data"]["fingerprint"]
        known = [VERSION, data.dataset.images.shape, print_, size, precision, rows, self.digests, self.temperature]
        key = hashlib.blake2b(json.dumps(known).encode(), digest_size=12).hexdigest()
        return cache_folder(recipe) / "predictions" / f"{key}.npy"

    @property
    def _questions(self) -> _Questions:
        network = EnsembleTeacher(self.teachers).to(accelerator_for(self.recipe.run).device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(self.recipe.run))
        network = network.to(memory_format=torch.channels_last)
        return _Questions(network, self.data.dataset, self.recipe.model.size, half, self.temperature)

    def _seconds_an_image(self, indices: Sequence[int]) -> float:
        questions, chosen = self._questions, np.sort(np.asarray(indices[: BATCH // 2]))
        for _ in range(2):  # the first call makes room
            began = self.stage.now()
            questions.answer(chosen)
        return max(self.stage.now() - began, 1e-6) / len(chosen)


@dataclass(frozen=True)
class _Questions:
    """Teachers, the images they are asked about, at which size, in which precision (None: float32), how softened."""

    network: EnsembleTeacher
    dataset: CachedDataset
    size: int
    half: torch.dtype | None
    temperature: float

    def answers(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each row's number and the answer to it, uint8 (c, c)."""
        line = Progress("predict")
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            yield from zip(chosen.tolist(), self.answer(chosen), strict=True)
            line.count(min(start + BATCH, len(rows)), len(rows))
        line.close(f"{len(rows)} images")

    @torch.no_grad()
    def answer(self, chosen: np.ndarray) -> np.ndarray:
        """Return the answers to some rows, uint8 (b, c, c)."""
        device = next(self.network.members[0].segmenter.parameters()).device  # type: ignore[union-attr]
        image = torch.from_numpy(self.dataset.images[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
        image = F.interpolate(image, size=(self.size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            image = normalise(image).contiguous(memory_format=torch.channels_last)
            logits = self.network(image, self.temperature).logits.float()
        logits = F.interpolate(logits, size=self.dataset.images.shape[1:3], mode="bilinear", align_corners=False)
        answers: np.ndarray = ((logits / self.temperature).sigmoid()[:, 0] * 255).round().byte().cpu().numpy()
        return answers


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the kept answers, or None where there are none, or damaged ones."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


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
