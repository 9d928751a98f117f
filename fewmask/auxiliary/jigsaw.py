"""Jigsaw: in which order have the nine tiles of the picture been laid?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.auxiliary.augmentation import Kind
from fewmask.auxiliary.task import AuxiliaryTask, check_share
from fewmask.data.geometry import crop_resize, whole_boxes
from fewmask.data.preprocess import denormalise, normalise
from fewmask.draws import draw_each
from fewmask.models import Encoder
from fewmask.types import Batch, UserError

SIDE = 3
NUM_TILES = SIDE * SIDE
MAX_PERMUTATIONS = 1000


class Jigsaw(AuxiliaryTask):
    """Predict which of `num_permutations` orders the nine tiles of a picture have (Noroozi and Favaro 2016).

    Paper: 3 x 3 cells, a tile cut at random from each cell so that edges do not give the answer, permutations chosen
    for their Hamming distance (64 to 1000 of them), cross-entropy, jittered colour. Two-stage method (abstract only):
    jigsaw as one of its five tasks. Ours: the trunk runs once on the picture laid together from shuffled tiles, where
    the paper runs it nine times, on one tile each: a ninth of the passes, at the size the segmenter works at, though
    a tile's features see its neighbours; 24 permutations; the head pools the coarsest map to 3 x 3, reads each cell by
    one layer, and all nine together by another; tiles are not standardised one by one.

    `gap` is how much larger than its tile a cell is, as a share of the tile (paper: 75 to 64 pixels, 0.17).
    Raises UserError for a `gap` outside [0, 1] or a number of permutations outside 2 to 1000.
    """

    name = "jigsaw"
    property_ = "context"

    def __init__(
        self,
        encoder: Encoder,
        size: int,
        num_permutations: int = 24,
        gap: float = 0.17,
        cell_dim: int = 128,
        augment: tuple[Kind, ...] = ("crop", "flip", "vertical_flip", "colour"),
        crop_scale: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        check_share("gap", gap)
        if not 2 <= num_permutations <= MAX_PERMUTATIONS:
            raise UserError(
                f"'num_permutations' cannot be {num_permutations}: give a number from 2 to {MAX_PERMUTATIONS}."
            )
        if cell_dim < 1:
            raise UserError(f"'cell_dim' cannot be {cell_dim}: give a width of at least 1.")
        super().__init__(size, augment, crop_scale)
        self.size = size
        # Three tiles cover the size; of a size that three does not divide, the last ones lose a pixel or two.
        self.tile = -(-size // SIDE)
        self.cell = self.tile + round(gap * self.tile)
        self.permutations = torch.tensor(spread_permutations(NUM_TILES, num_permutations))
        self.read_cell = nn.Linear(encoder.channels[-1], cell_dim)
        self.head = nn.Linear(NUM_TILES * cell_dim, num_permutations)

    def see(self, batch: Batch) -> Batch:
        """Return the shuffled pictures, `extra["permutation"]` int64 (b,) the number of the order of each."""
        picture = self.augmentation.colour(self.augmentation.move(replace(batch, mask=None), SIDE * self.cell))
        number = draw_each(len(picture), lambda n: torch.randint(len(self.permutations), (n,)))
        jitter = draw_each(len(picture), lambda n: torch.randint(self.cell - self.tile + 1, (n, NUM_TILES, 2)))
        shuffled = lay_tiles(picture, self.permutations[number], jitter, self.tile)[..., : self.size, : self.size]
        extra = {"permutation": number.to(picture.device)}
        return replace(batch, image=normalise(shuffled), mask=None, extra=extra)

    def forward(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and "accuracy"."""
        # Matrix products rather than adaptive pooling, whose gradient on a GPU is not the same twice.
        cells = crop_resize(trunk(batch.image)[-1].float(), whole_boxes(len(batch.image)), SIDE)
        read = F.relu(self.read_cell(cells.flatten(2).transpose(1, 2)))
        logits, number = self.head(read.flatten(1)).float(), batch.extra["permutation"]
        return {"loss": F.cross_entropy(logits, number), "accuracy": (logits.argmax(1) == number).float().mean()}

    def preview(self, trunk: Encoder, batch: Batch) -> dict[str, Tensor]:
        """Return "shuffled", what the network sees."""
        return {"shuffled": denormalise(batch.image)}


def lay_tiles(picture: Tensor, order: Tensor, jitter: Tensor, tile: int) -> Tensor:
    """Return pictures (b, k, 3 tile, 3 tile) whose place j shows a tile of the cell `order`[j], row by row.

    `picture` (b, k, 3 cell, 3 cell); `order` int64 (b, 9); `jitter` int64 (b, 9, 2) is where in its cell, down and
    right, the tile of each place begins, from 0 to cell - tile.
    """
    num, channels, cell = len(picture), picture.shape[1], picture.shape[2] // SIDE
    corner = torch.stack([order // SIDE, order % SIDE], 2) * cell + jitter
    line = corner[..., None] + torch.arange(tile)
    rows, columns = line.to(picture.device).unbind(2)
    which = torch.arange(num, device=picture.device)[:, None, None, None]
    tiles = picture.permute(0, 2, 3, 1)[which, rows[..., None], columns[:, :, None]]
    grid = tiles.view(num, SIDE, SIDE, tile, tile, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(num, channels, SIDE * tile, SIDE * tile)


@lru_cache(maxsize=8)
def spread_permutations(length: int, num: int) -> tuple[tuple[int, ...], ...]:
    """Return `num` permutations of range(length) far apart: the first is the identity, each next one the farthest.

    Farthest means the largest least Hamming distance to those taken, then the largest sum of distances (code: Noroozi
    and Favaro choose greedily), then the first in lexicographic order (ours, so that the choice never changes).
    """
    flat = itertools.chain.from_iterable(itertools.permutations(range(length)))
    # Places before permutations: comparing long rows is ten times faster than comparing nine numbers at a time.
    every = np.ascontiguousarray(np.fromiter(flat, np.int8).reshape(-1, length).T)
    least, total = np.full(every.shape[1], length + 1, np.int64), np.zeros(every.shape[1], np.int64)
    taken = [0]
    while len(taken) < num:
        distance = (every != every[:, taken[-1:]]).sum(0, dtype=np.int8)
        least, total = np.minimum(least, distance), total + distance
        taken.append(int((least * (length * num + 1) + total).argmax()))
    return tuple(tuple(int(v) for v in every[:, i]) for i in taken)
