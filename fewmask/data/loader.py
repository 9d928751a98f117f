"""Batches from a cache as a function of (seed, step): any step at any time, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from fewmask.data.cache import CachedDataset
from fewmask.types import Batch, Share, UserError


class Loader:
    """An endless stream of global batches of exactly `batch_size` images, epoch after epoch without a seam.

    Epoch e is a permutation drawn from (seed, e); step t takes positions [t b, (t + 1) b) of all permutations laid end
    to end, so every image is seen once in each n positions even where n < b or b does not divide n. Nothing is kept
    between steps: a resumed run continues with the batch it would have had. `min_steps` is the least number of steps
    that count as an epoch (our choice: a handful of masks would else spend its time on validation). `maps` are arrays
    uint8 (n, c, c) beside the images, such as superpixels; they arrive in `extra` as (b, 1, c, c). `predictions`, such
    an array of probabilities in 1/255, arrive as the mask's second channel and so move with it under augmentation.
    `features` are arrays float16 (n, c_i, h_i, w_i), which arrive in the batch's `features`.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        min_steps: int = 20,
        maps: Mapping[str, np.ndarray] | None = None,
        predictions: np.ndarray | None = None,
        features: Sequence[np.ndarray] = (),
    ) -> None:
        if len(indices) == 0:
            raise UserError("There is no image to load: the selection is empty.")
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}: give a number of at least 1.")
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.num_images = len(self.indices)
        whole = math.ceil(self.num_images / batch_size)
        self.steps_per_epoch = max(whole, min_steps)
        self.rounds = min_steps * batch_size / self.num_images if min_steps > whole else 1.0
        self._masks = dataset.masks if dataset.has_mask[self.indices].all() else None
        self._maps, self._predictions, self._features = dict(maps or {}), predictions, list(features)
        self._permutation = lru_cache(maxsize=4)(self._draw)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the `rank`-th of `world` equal, contiguous parts of the global batch of a step.

        `image` is uint8 (b / world, 3, c, c) in channels-last memory, `mask` uint8 (b / world, 1, c, c), or None unless
        all images of the loader have one (with predictions (b / world, 2, c, c), the first channel 0 then), `label`
        int64 with -1 for unknown. Raises UserError unless world divides b.
        """
        if self.batch_size % world:
            raise UserError(f"The batch size {self.batch_size} is not a multiple of the {world} processes: change one.")
        num = self.batch_size // world
        start = step * self.batch_size + rank * num
        rows = self.indices[self._positions(start, start + num)]
        share = Share(tuple(range(rank * num, (rank + 1) * num)), self.batch_size) if world > 1 else None
        image = torch.from_numpy(_gather(self.dataset.images, rows)).permute(0, 3, 1, 2)
        mask = None if self._masks is None else torch.from_numpy(_gather(self._masks, rows))[:, None]
        label = torch.from_numpy(self.dataset.labels[rows])
        extra = {name: torch.from_numpy(_gather(array, rows))[:, None] for name, array in self._maps.items()}
        if self._predictions is not None:
            predicted = torch.from_numpy(_gather(self._predictions, rows))[:, None]
            mask = torch.cat([torch.zeros_like(predicted) if mask is None else mask, predicted], dim=1)
        names = [self.dataset.names[row] for row in rows]
        features = [torch.from_numpy(_gather(array, rows)) for array in self._features]
        return Batch(image, names, mask, label, extra, features, share=share)

    def _positions(self, start: int, stop: int) -> np.ndarray:
        """Return what stands at positions [start, stop) of the permutations laid end to end."""
        positions = np.arange(start, stop)
        parts = [
            self._permutation(int(epoch))[positions[positions // self.num_images == epoch] % self.num_images]
            for epoch in np.unique(positions // self.num_images)
        ]
        return np.concatenate(parts)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_images)


def _gather(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the rows as a plain array; read in the order of the file, which a disk serves faster."""
    order = np.argsort(rows, kind="stable")
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for place in order:
        out[place] = array[rows[place]]
    return out
