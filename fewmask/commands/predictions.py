"""What teachers say of every image, and the features a loss compares, once, before a student learns from them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from fewmask.commands.prepare import Prepared, cache_folder
from fewmask.config import Recipe
from fewmask.data.cache import VERSION, CachedDataset
from fewmask.data.preprocess import normalise
from fewmask.distill.teacher import EnsembleTeacher
from fewmask.engine.device import accelerator_for, resolve_precision
from fewmask.engine.run import is_main, read_json, wait_for_everyone, write_json
from fewmask.engine.stage import Progress, Stage
from fewmask.models import Segmenter
from fewmask.types import UserError

BATCH = 64
LARGEST = torch.finfo(torch.float16).max
SHARE_OF_TIME = 0.3  # of a stage, to ask about images without a mask; ours


class Stored(NamedTuple):
    """Of n images, teachers' predictions in 1/255, uint8 (n, c, c), and features, each float16 (n, c_i, h_i, w_i)."""

    predictions: np.ndarray
    features: list[np.ndarray]


class Kept(NamedTuple):
    """An array on disk, memory-mapped, that is there as a whole or not at all."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> np.ndarray | None:
        """Return the array, or None where there is none, or a damaged one."""
        try:
            found: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return found if found.shape == self.shape and found.dtype == self.dtype else None


@dataclass(frozen=True)
class Answers:
    """What the teachers of a stage say of its images, asked before the training.

    Predictions are the mean of sigma(z / temperature); features are the first teacher's `levels`, from the finest, 0.
    """

    stage: Stage
    recipe: Recipe
    data: Prepared
    teachers: Sequence[Segmenter]
    digests: Sequence[str]
    temperature: float = 1.0
    levels: Sequence[int] = ()

    def affordable(self, others: Sequence[int]) -> list[int]:
        """Return the images without a mask to ask about: all, or as many as 0.3 of the stage's time allows, drawn.

        How many these are depends on this machine, so it is written down, and a stage that is resumed has the same,
        whatever time it is given then.
        """
        path = self.stage.folder / "asked.json"
        if not others:
            return []
        question = {"of": len(others), "levels": list(self.levels)}  # which may change until the training begins
        if not any((self.stage.folder / "checkpoints").glob("step_*")):
            question["budget"] = self.stage.budget
        if is_main() and not (path.exists() and question.items() <= read_json(path).items()):
            num = len(others)
            if self.stage.budget is not None:
                num = max(int(SHARE_OF_TIME * self.stage.budget / self._seconds_an_image(others)), BATCH)
            write_json(path, {"num_images": min(num, len(others)), "budget": self.stage.budget, **question})
        wait_for_everyone()
        num = int(read_json(path)["num_images"])
        if num < len(others):
            Progress("predict").close(f"time for {num} of {len(others)} images without a mask, drawn at random")
        drawn = np.random.default_rng(self.recipe.run.seed).permutation(len(others))[:num]
        return [others[i] for i in sorted(drawn)]

    def of(self, indices: Sequence[int]) -> Stored:
        """Return the answers to the rows `indices`; the other rows are zero.

        The teachers see images of the network's size, as in training without augmentation; the predictions are enlarged
        to the cache's side c. They are kept in the cache folder (.npy, memory-mapped), and taken from there where the
        same were asked before: a file appears in one step, when it is complete.
        """
        questions, rows = self._questions, np.sort(np.asarray(indices))
        files = self._files(rows, questions.answer(rows[:1]))
        if is_main() and any(missing := [file.open() is None for file in files]):
            answers = questions.answers(rows)
            wanted = ((row, list(compress(parts, missing))) for row, parts in answers)
            _write(list(compress(files, missing)), wanted)
        wait_for_everyone()  # whatever was there: one that saw it being written must not wait alone, nor another for it
        predictions, *features = [found for file in files if (found := file.open()) is not None]
        assert len(features) == len(self.levels)
        return Stored(predictions, features)

    def _files(self, rows: np.ndarray, example: Sequence[np.ndarray]) -> list[Kept]:
        """Return where the answers to some rows are kept, each of which looks like the example's."""
        data, recipe = self.data, self.recipe
        precision, size = resolve_precision(recipe.run), recipe.model.size
        # The fingerprint knows what each name shows, and the names which row is whose: folders may come in another
        # order.
        named = [(row, data.dataset.names[row]) for row in rows.tolist()]
        print_ = self.stage.run.info["data"]["fingerprint"]
        known = [VERSION, data.dataset.images.shape, print_, size, precision, named]
        asked = [[self.digests, self.temperature], *([self.digests[0], "level", level] for level in self.levels)]
        folder, files = cache_folder(recipe) / "predictions", []
        for own, part in zip(asked, example, strict=True):
            key = hashlib.blake2b(json.dumps([*known, *own]).encode(), digest_size=12).hexdigest()
            shape = (len(data.dataset.images), *part.shape[1:])
            files.append(Kept(folder / f"{key}.npy", shape, part.dtype))
        return files

    @property
    def _questions(self) -> _Questions:
        network = EnsembleTeacher(self.teachers).to(accelerator_for(self.recipe.run).device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(self.recipe.run))
        network = network.to(memory_format=torch.channels_last)
        size = self.recipe.model.size
        return _Questions(network, self.data.dataset, size, half, self.temperature, self.levels)

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
    levels: Sequence[int]

    def answers(self, rows: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Yield each row's number and the answer to it: uint8 (c, c), and float16 (c_i, h_i, w_i) for each level."""
        line = Progress("predict")
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            yield from zip(chosen.tolist(), zip(*self.answer(chosen), strict=True), strict=True)
            line.count(min(start + BATCH, len(rows)), len(rows))
        line.close(f"{len(rows)} images")

    @torch.no_grad()
    def answer(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return the answers to some rows: uint8 (b, c, c), and float16 (b, c_i, h_i, w_i) for each level."""
        device = next(self.network.members[0].segmenter.parameters()).device  # type: ignore[union-attr]
        image = torch.from_numpy(self.dataset.images[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
        image = F.interpolate(image, size=(self.size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            image = normalise(image).contiguous(memory_format=torch.channels_last)
            output = self.network(image, self.temperature)
        logits, side = output.logits.float(), self.dataset.images.shape[1:3]
        logits = F.interpolate(logits, size=side, mode="bilinear", align_corners=False)
        prediction = ((logits / self.temperature).sigmoid()[:, 0] * 255).round().byte()
        features = [output.features[level].float().clamp(-LARGEST, LARGEST).half() for level in self.levels]
        return [part.contiguous().cpu().numpy() for part in (prediction, *features)]


def _write(files: Sequence[Kept], answers: Iterable[tuple[int, Sequence[np.ndarray]]]) -> None:
    """Write rows into files under temporary names, and rename them; a UserError where the disk is full.

    Plain writing and no memory map: a full disk under a map ends the process without a word.
    """
    folder, temporary = files[0].path.parent, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            places = []
            for kept in files:
                handle, name = tempfile.mkstemp(dir=folder, prefix=f".{kept.path.name}.")
                temporary.append(Path(name))
                file = stack.enter_context(os.fdopen(handle, "wb"))
                places.append((file, _make_room(file, kept)))
            for row, parts in answers:
                for part, (file, start) in zip(parts, places, strict=True):
                    file.seek(start + row * part.nbytes)
                    file.write(part.tobytes())
        for kept, path in zip(files, temporary, strict=True):
            path.replace(kept.path)
    except OSError as error:
        raise UserError(
            f"Cannot write what the teachers say to {folder}: {error.strerror}; free "
            f"{sum(kept.num_bytes for kept in files) / 1e6:.0f} MB, or set FEWMASK_CACHE to a folder with room."
        ) from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _make_room(file: IO[bytes], kept: Kept) -> int:
    """Write the head of an empty array, full of zeros; return where its first row begins."""
    header = {"descr": np.lib.format.dtype_to_descr(kept.dtype), "fortran_order": False, "shape": kept.shape}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    file.truncate(start + kept.num_bytes)
    return start
