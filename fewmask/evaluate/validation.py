"""The score the training loop is handed: mean Dice per image over the validation cases, from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.preprocess import normalise
from fewmask.types import UserError

Loss = Callable[[Tensor, Tensor], Tensor]
KEPT_BYTES = 256e6  # of resized images and masks in memory, at 16 bytes a pixel; ours


class CachedMasks(Protocol):
    """The part of a cached data set that validation reads: uint8 images (n, c, c, 3) and masks (n, c, c), 0..255."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """Images uint8 (n, c, c, 3)."""

    @property
    def masks(self) -> NDArray[np.uint8] | None:
        """Coverage uint8 (n, c, c), 0..255."""


class Validation:
    """Scores a segmenter on the cached cases of the given indices; call it with the segmenter.

    Images and masks are brought from cache size to `size` (antialiased); a truth pixel is at least half covered, a
    predicted one has probability >= `threshold`. With `loss`, a function of logits and mask (b, 1, s, s) that means
    over the batch, "val_loss" is its mean over images. It works on `device`, or where the segmenter's parameters are,
    in the `precision` of the training ("fp32", "bf16" or "fp16"): it only has to tell better weights from worse.
    Raises a UserError when there is no case to validate on.
    """

    def __init__(
        self,
        dataset: CachedMasks,
        indices: Sequence[int],
        size: int,
        batch_size: int = 32,
        threshold: float = 0.5,
        device: torch.device | str | None = None,
        loss: Loss | None = None,
        precision: str = "fp32",
    ) -> None:
        if len(indices) == 0 or dataset.masks is None:
            raise UserError("There is no image with a mask to validate on; put some masks in the split 'val'.")
        self.images, self.masks = dataset.images, dataset.masks
        # A memory map is read in order of its pages.
        self.indices = np.sort(np.asarray(indices, dtype=np.int64))
        self.size, self.batch_size, self.threshold, self.device, self.loss = size, batch_size, threshold, device, loss
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    @torch.inference_mode()
    def __call__(self, segmenter: nn.Module) -> dict[str, float]:
        """Return "score" (the mean Dice per image, higher is better), "dice", "iou" and, with a loss, "val_loss".

        The segmenter is put in evaluation mode, and each of its modules goes back to the mode it came in.
        """
        # Not segmenter.train(...): that would wake a part which is frozen in evaluation mode.
        modes = [(module, module.training) for module in segmenter.modules()]
        segmenter.eval()
        try:
            device = self.device or _device_of(segmenter)
            parts = [self._score_batch(segmenter, image, mask) for image, mask in self.batches(device)]
        finally:
            for module, training in modes:
                module.training = training
        means = {key: torch.cat([part[key] for part in parts]).mean().item() for key in parts[0]}
        return {"score": means["dice"], **means}

    def batches(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images float32 (b, 3, s, s), normalised, and masks float32 (b, 1, s, s) in [0, 1].

        A small set is resized once and kept, and not anew after every epoch.
        """
        if self.kept is None:
            if 16 * len(self.indices) * self.size**2 > KEPT_BYTES:
                yield from self._resized(device)
                return
            self.kept = list(self._resized(device))
        yield from self.kept

    def _resized(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.indices), self.batch_size):
            chosen = self.indices[start : start + self.batch_size]
            image = torch.from_numpy(self.images[chosen]).to(device).permute(0, 3, 1, 2)
            mask = torch.from_numpy(self.masks[chosen]).to(device)[:, None]
            picture = normalise(_resize(image, self.size)).contiguous(memory_format=torch.channels_last)
            yield picture, _resize(mask, self.size)

    def _score_batch(self, segmenter: nn.Module, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, self.half, enabled=self.half is not None):
            logits = segmenter(image).logits.float()
        dice, iou = dice_and_iou(logits.sigmoid() >= self.threshold, mask >= 0.5)
        terms = {"dice": dice, "iou": iou}
        if self.loss is not None:
            terms["val_loss"] = self.loss(logits, mask).cpu().double().expand(len(mask))
        return terms


def dice_and_iou(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return Dice and IoU per image of bool masks (b, ...), float64 (b,) on the CPU.

    Two empty masks score 1, as in `metrics`.
    """
    prediction, truth = prediction.flatten(1), truth.flatten(1)
    # Counted where the masks are, divided on the CPU: not every accelerator has double precision.
    overlap = (prediction & truth).sum(1).cpu().double()
    total = (prediction.sum(1) + truth.sum(1)).cpu()
    dice = torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)
    return dice, dice / (2 - dice)


def _device_of(segmenter: nn.Module) -> torch.device:
    return next((parameter.device for parameter in segmenter.parameters()), torch.device("cpu"))


def _resize(pixels: Tensor, size: int) -> Tensor:
    pixels = pixels.float() / 255
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
