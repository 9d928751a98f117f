"""How well an encoder's global features tell classes apart: nearest neighbours, for which nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.preprocess import normalise
from fewmask.models import Encoder, encoder_of
from fewmask.types import UserError

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07


class CachedLabels(Protocol):
    """The part of a cached data set that a probe reads."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """Images uint8 (n, c, c, 3)."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes int64 (n,), -1 where unknown."""


class Probe:
    """Nearest-neighbour accuracy of an encoder on the cached images of the given indices, all with a class label.

    `groups` (one entry an index) tells images of one patient or lesion, which never vote for each other; each image is
    its own where it is None. Calling it with an encoder returns what `knn_accuracy` does and leaves the encoder's
    modes and every random generator as they are. Raises a UserError for an image without a label, fewer than two
    classes, or fewer than two groups.
    """

    def __init__(
        self,
        dataset: CachedLabels,
        indices: Sequence[int],
        size: int,
        groups: Sequence[str] | None = None,
        k: int = NUM_NEIGHBOURS,
    ) -> None:
        self.images, self.indices = dataset.images, np.asarray(indices, dtype=np.int64)
        self.labels = torch.from_numpy(dataset.labels[self.indices])
        known = {} if groups is None else {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self.groups = None if groups is None else torch.tensor([known[group] for group in groups])
        self.size, self.k = size, k
        if (self.labels < 0).any() or len(self.labels.unique()) < 2 or (groups is not None and len(known) < 2):
            raise UserError(
                "A nearest-neighbour probe needs images of at least two classes and two patients, all with a class "
                "label: fill the column 'label' of the manifest, or set pretrain.probe_every=0."
            )

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return "knn_accuracy", "knn_balanced_accuracy" and "majority", all in [0, 1], of a model's encoder."""
        features = global_features(encoder_of(model), self.images, self.indices, self.size)
        return knn_accuracy(features, self.labels, self.k, self.groups)


@torch.inference_mode()
def global_features(
    encoder: Encoder, images: NDArray[np.uint8], indices: NDArray[np.int64], size: int, batch_size: int = 32
) -> Tensor:
    """Return the global features float32 (len(indices), d), on the CPU, of cached images uint8 (n, c, c, 3).

    A ViT's class token, the mean of a CNN's coarsest map. The images are those of `whole_images`. The encoder works
    where its parameters are, in evaluation mode, and its modules go back to their modes.
    """
    device = next(encoder.parameters()).device
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        batches = whole_images(images, indices, size, device, batch_size)
        parts = [encoder.global_feature(image).float().cpu() for image in batches]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts)


def whole_images(
    images: NDArray[np.uint8], indices: NDArray[np.int64], size: int, device: torch.device, batch_size: int = 32
) -> Iterator[Tensor]:
    """Yield batches (b, 3, size, size), normalised, of cached images uint8 (n, c, c, 3); nothing is drawn.

    The images are brought to `size` (antialiased).
    """
    for start in range(0, len(indices), batch_size):
        image = torch.from_numpy(images[indices[start : start + batch_size]]).to(device).permute(0, 3, 1, 2)
        yield normalise(_resize(image, size))


def knn_accuracy(
    features: Tensor, labels: Tensor, k: int = NUM_NEIGHBOURS, groups: Tensor | None = None
) -> dict[str, float]:
    """Return how often the `k` nearest other images name an image's class: a leave-one-out estimate.

    `features` (n, d), `labels` int64 (n,) of at least 0. Each neighbour votes with exp(cosine / 0.07) (Wu et al. 2018;
    code: DINO, k = 20); the smaller label wins a tie, and where there are fewer others than k all of them vote. Ours:
    images of the same `groups` (n,) do not vote for each other, or an image would be recognised by its twin.
    "knn_accuracy" is the share of images named rightly, "knn_balanced_accuracy" the mean of that share over classes,
    "majority" the share of the most frequent class, which always naming it would reach. An image to which nobody else
    may vote counts as wrong. Raises UserError for fewer than two images or a k below one.
    """
    if len(features) < 2 or k < 1:
        raise UserError(f"Nearest neighbours need two images and one neighbour, not {len(features)} and {k}.")
    unit = F.normalize(features.float(), dim=1)
    own = torch.arange(len(unit)) if groups is None else groups
    cosine = (unit @ unit.T).masked_fill(own[:, None] == own[None, :], -torch.inf)
    nearest, index = cosine.topk(min(k, len(unit) - 1), dim=1)
    # Relative to a cosine of 1, which changes no order: exp(1 / 0.07) is a number nobody needs.
    weight = ((nearest - 1) / TEMPERATURE).double().exp()
    num_classes = int(labels.max()) + 1
    votes = torch.zeros(len(unit), num_classes, dtype=torch.float64).scatter_add_(1, labels[index], weight)
    right = (votes.argmax(1) == labels) & (votes.sum(1) > 0)
    total = torch.bincount(labels, minlength=num_classes)
    found = torch.bincount(labels[right], minlength=num_classes)
    present = total > 0
    return {
        "knn_accuracy": float(right.double().mean()),
        "knn_balanced_accuracy": float((found[present].double() / total[present]).mean()),
        "majority": float(total.max() / len(labels)),
    }


def _resize(pixels: Tensor, size: int) -> Tensor:
    pixels = pixels.float() / 255
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
