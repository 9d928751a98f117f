"""Figure and ground: learn which part of a picture a threshold on its colours sets apart, without the colours' help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.augment import PretrainViews
from fewmask.data.preprocess import denormalise
from fewmask.losses import loss_of_each
from fewmask.objective import Objective
from fewmask.pretrain.crops import SSL_COLOUR
from fewmask.pretrain.figure_rule import FigureRule, find_figure
from fewmask.processes import mean_over_processes
from fewmask.types import Batch, NotTrainedError, UserError, Views

RULE = FigureRule()
LOOK_EVERY = 100  # steps between two looks of the guard
AT_ONCE = 16  # pictures that are looked at together, apart from training
LEAST_TOLD = 0.05


class Figure(Objective):
    """Segment each picture's figure, as a threshold on its own colours finds it, by cross-entropy and Dice.

    Our choice, of no paper: a lesion is most often one thing about the middle whose colour differs from the border's.
    `find_figure` looks for it in the whole picture, before the views crop it and change its colours, so that what told
    the figure does not tell it again; where it finds none, the picture teaches nothing. A mask is never read. The
    whole segmenter learns, so that fine-tuning begins with its decoder too. "told" is the share of pictures with a
    figure: where fewer than 0.05 of all pictures so far have one, after every 100 steps and at the end, the training
    stops with a UserError, for such pictures have nothing to teach it.

    Raises UserError for shares outside [0, 1].
    """

    num_told: Tensor

    def __init__(
        self,
        segmenter: nn.Module,
        *,
        size: int,
        dice_weight: float = 0.5,
        min_area: float = RULE.min_area,
        max_border: float = RULE.max_border,
        min_explained: float = RULE.min_explained,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        vertical_flip: bool = True,
    ) -> None:
        rule = FigureRule(min_area, max_border, min_explained)
        for name, share in {"dice_weight": dice_weight, **rule._asdict()}.items():
            if not 0 <= share <= 1:
                raise UserError(f"'{name}' cannot be {share}: give a share between 0 and 1.")
        super().__init__()
        self.segmenter, self.dice_weight = segmenter, dice_weight
        moved = PretrainViews(size, crop_scale, vertical=vertical_flip, colour=SSL_COLOUR)
        self.figure_views = FigureViews(moved, rule)
        # The sum of the steps' shares; the host reads it once in many steps, so that an accelerator need not wait.
        self.register_buffer("num_told", torch.zeros(()))
        self.num_steps = 0

    def get_extra_state(self) -> Tensor:
        """Return the number of steps, for checkpoints: the guard counts on after a resume."""
        return torch.tensor(self.num_steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of steps from a checkpoint."""
        self.num_steps = int(state)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss", the mean over all pictures of that of those with a figure, and "told"."""
        told = batch.extra["told"]
        each = loss_of_each(self.segmenter(batch.image).logits, batch.extra["figure"], self.dice_weight)
        share = mean_over_processes(told.mean())
        if self.training:
            self.num_told += share
        # By all pictures and not by the told ones: so the gradients of several processes add up to those of one.
        return {"loss": (each * told).mean(), "told": share}

    def after_step(self, progress: float) -> None:
        """Raise a NotTrainedError when, now and then, hardly a picture had a figure."""
        self.num_steps += 1
        if self.num_steps % LOOK_EVERY == 0:
            self.at_end()

    def at_end(self) -> None:
        """Raise a NotTrainedError when hardly a picture had a figure."""
        if self.num_steps and (told := float(self.num_told) / self.num_steps) < LEAST_TOLD:
            raise NotTrainedError(
                f"Of the pictures of {self.num_steps} steps, {told:.0%} have one thing about the middle whose colours "
                "differ from the border's; method 'figure' needs such pictures: take another, such as 'simmim', or "
                "raise pretrain.method.max_border, and give another output folder."
            )

    def agreement(self, images: NDArray[np.uint8], masks: NDArray[np.uint8], rows: Sequence[int]) -> float:
        """Return how well figures agree with masks, in [0, 1]: mean Dice, 0 for a picture in which none is found.

        `images` (n, c, c, 3), `masks` (n, c, c) coverage in 0..255, of which `rows` are looked at; empty masks do not
        count, and without others it is 0. Only for the choice of a method: the training reads no mask.
        """
        dice = []
        for some in a_few(rows):
            mask = torch.from_numpy(masks[some] >= 128)
            figure, told = self.look(images, some)
            cover = F.interpolate(figure.float(), mask.shape[1:], mode="bilinear", align_corners=False)[:, 0] >= 0.5
            overlap, areas = (cover & mask).sum((1, 2)), cover.sum((1, 2)) + mask.sum((1, 2))
            dice.append((told * 2 * overlap / areas)[mask.any(1).any(1)])
        every = torch.cat(dice) if dice else torch.zeros(0)
        return float(every.mean()) if len(every) else 0.0

    def share_told(self, images: NDArray[np.uint8], rows: Sequence[int]) -> float:
        """Return the share of `rows` of pictures (n, c, c, 3) that have a figure, 0 of none."""
        told = [self.look(images, some)[1] for some in a_few(rows)]
        return float(torch.cat(told).float().mean()) if told else 0.0

    @torch.no_grad()
    def look(self, images: NDArray[np.uint8], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what `find_figure` finds in `rows` of pictures (n, c, c, 3)."""
        return find_figure(torch.from_numpy(images[rows]).permute(0, 3, 1, 2), self.figure_views.rule)

    def product(self) -> nn.Module:
        """Return the segmenter."""
        return self.segmenter

    def views(self) -> Views:
        """Return random crops, flips and colours, the figure found before."""
        return self.figure_views

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return "figure", strips (b, 3, s, 3 s): picture, figure (black: none), predicted one."""
        told = batch.extra["told"].view(-1, 1, 1, 1)
        maps = [batch.extra["figure"] * told, self.segmenter(batch.image).logits.float().sigmoid()]
        grey = [one.expand(-1, 3, -1, -1) for one in maps]
        return {"figure": torch.cat([denormalise(batch.image).clamp(0, 1), *grey], dim=3)}


def a_few(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield sixteen of the rows at a time: large pictures take much room."""
    return (rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE))


@dataclass(frozen=True)
class FigureViews:
    """The views `moved`, and the figure moved with its picture.

    `extra["figure"]` (b, 1, s, s) is its mask, 0 or 1, `extra["told"]` (b,) 1 where there is one and 0 elsewhere. The
    batch has no mask.
    """

    moved: PretrainViews
    rule: FigureRule

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch of views."""
        figure, told = find_figure(batch.image, self.rule)
        cover = F.interpolate(figure.float(), batch.image.shape[2:], mode="bilinear", align_corners=False)
        viewed = self.moved(replace(batch, mask=cover.mul(255).byte()))
        assert viewed.mask is not None
        extra = {**batch.extra, "figure": (viewed.mask >= 0.5).float(), "told": told.float()}
        return replace(viewed, mask=None, extra=extra)
