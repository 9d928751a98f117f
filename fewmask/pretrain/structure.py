"""Masks that follow the structure of an image: how many patches each superpixel gives, and which ones.

Everything is batched on the device of the batch, in whole numbers, and draws from torch's generator alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewmask.data.superpixels import Slic
from fewmask.draws import draw_each
from fewmask.pretrain.masking import Masking, RandomMask
from fewmask.types import Batch, UserError

MaskName = Literal["random", "semantic", "semantic_focal"]
MAX_LABELS = 256
LABELS_AT_A_TIME = 16


def build_masking(
    name: MaskName, num_patches: int, ratio: float, focal_share: float = 0.7, num_labels: int = MAX_LABELS
) -> Masking:
    """Return the mask strategy of a name; `focal_share` is G2LL's beta. Raises UserError for a ratio or share unfit.

    `num_labels` bounds the labels of the superpixels; a close bound saves time.
    """
    if name == "random":
        return RandomMask(num_patches, ratio)
    if name == "semantic":
        return SemanticMask(num_patches, ratio, num_labels)
    return SemanticFocalMask(num_patches, ratio, focal_share, num_labels)


def build_masks(
    name: MaskName, num_patches: int, ratio: float, focal_share: float, num_segments: int
) -> tuple[Masking, dict[str, Slic]]:
    """Return the mask strategy of a name and the maps it asks for (`Objective.maps`): none where masks are random."""
    slic = Slic(num_segments)
    masking = build_masking(name, num_patches, ratio, focal_share, slic.num_labels)
    return masking, {} if name == "random" else {"superpixels": slic}


class Areas(NamedTuple):
    """The superpixels of a batch as sets of patches: `label` int64 (b, n) per patch, `size` int64 (b, labels)."""

    label: Tensor
    size: Tensor


def vote(superpixels: Tensor, grid: int, num_labels: int = MAX_LABELS) -> Areas:
    """Return for each of the grid * grid patches the label that most of its pixels hold, the smaller one in a tie.

    `superpixels` holds labels, integers (b, s, s) or (b, 1, s, s) with s a multiple of `grid`; those from `num_labels`
    on share its last one.
    Paper (G2LL): the majority. Ours: the tie.
    """
    num, side = len(superpixels), superpixels.shape[-1]
    patch = side // grid
    cells = superpixels.reshape(num, grid, patch, grid, patch).permute(0, 1, 3, 2, 4).reshape(num, grid**2, patch**2)
    cells = cells.clamp(max=num_labels - 1)
    count = count_by_adding if cells.device.type == "cpu" else count_by_comparing
    label = count(cells, num_labels).argmax(2)  # of equal maxima, argmax returns the first
    return Areas(label, count_labels(label, num_labels))


def count_by_adding(cells: Tensor, num_labels: int) -> Tensor:
    """Return how many pixels of cells (b, n, p) hold each label, int32 (b, n, num_labels); fast on a CPU."""
    votes = torch.zeros(*cells.shape[:2], num_labels, dtype=torch.int32, device=cells.device)
    return votes.scatter_add_(2, cells.long(), torch.ones_like(cells, dtype=torch.int32))


def count_by_comparing(cells: Tensor, num_labels: int) -> Tensor:
    """Return what `count_by_adding` returns, without additions in any order.

    An accelerator told to be deterministic would sort all pixels for those; it compares a few labels at a time.
    """
    parts = torch.arange(num_labels, device=cells.device).split(LABELS_AT_A_TIME)
    return torch.cat([(cells[..., None, :] == some[:, None]).sum(3, dtype=torch.int32) for some in parts], 2)


def count_labels(label: Tensor, num_labels: int) -> Tensor:
    """Return how many patches hold each label, int64 (b, num_labels), of labels (b, n)."""
    return label.new_zeros(len(label), num_labels).scatter_add_(1, label, torch.ones_like(label))


def share_out(total: Tensor, size: Tensor) -> Tensor:
    """Return quotas int64 (b, k) that sum to `total` (b,) and are proportional to `size` (b, k): largest remainder.

    Each quota is total * size / sum(size) rounded down; what is left goes one by one to the largest remainders, the
    smaller index first in a tie. No quota exceeds its size as long as the total does not exceed the sum; a sum of
    zero gives zeros.
    """
    whole = size.sum(1, keepdim=True).clamp(min=1)
    product = total[:, None] * size
    quota, remainder = product // whole, product % whole
    order = remainder.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size.shape[1], device=size.device).expand_as(order))
    left = torch.where(size.sum(1) > 0, total - quota.sum(1), 0)
    return quota + (rank < left[:, None])


def draw(label: Tensor, quota: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a boolean mask (b, n) with `quota` (b, k) patches of each label, each choice within it equally likely."""
    device = label.device if generator is None else generator.device
    chance = draw_each(len(label), lambda n: torch.rand(n, label.shape[1], device=device, generator=generator))
    chance = chance.to(label.device)
    # First in random order, then stably by label: the patches of a label lie side by side, still in random order.
    shuffled = chance.argsort(dim=1)
    order = shuffled.gather(1, label.gather(1, shuffled).argsort(dim=1, stable=True))
    size = count_labels(label, quota.shape[1])
    start = size.cumsum(1) - size
    sorted_label = label.gather(1, order)
    place = torch.arange(label.shape[1], device=label.device) - start.gather(1, sorted_label)
    chosen = place < quota.gather(1, sorted_label)
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


class StructureMask(Masking):
    """What the two strategies on superpixels share: they differ in the quotas of the areas only.

    The number of masked patches and its refusals are those of `RandomMask`. Calling one on a batch whose
    `extra` has no "superpixels", a label map at the size of its image, raises a UserError.
    """

    def __init__(self, num_patches: int, ratio: float, num_labels: int = MAX_LABELS) -> None:
        self.num_patches, self.num_labels = num_patches, num_labels
        self.num_masked = RandomMask(num_patches, ratio).num_masked
        self.grid = round(num_patches**0.5)

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Return a boolean mask (b, num_patches), true where hidden, `num_masked` of them in every row."""
        if "superpixels" not in batch.extra:
            raise UserError(
                "A mask that follows structure needs the superpixels of its images, and this batch has none: "
                "use mask = 'random', or load the data with its superpixels."
            )
        areas = vote(batch.extra["superpixels"], self.grid, self.num_labels)
        return draw(areas.label, self.quotas(areas), generator)

    @abstractmethod
    def quotas(self, areas: Areas) -> Tensor:
        """Return how many patches of each label are hidden, int64 (b, labels), `num_masked` in all."""


class SemanticMask(StructureMask):
    """Hide a fixed share of the patches of each structured area (G2LL, "semantic").

    Ours: the share is met to the patch by largest remainder, so that every image hides the same number.
    """

    def quotas(self, areas: Areas) -> Tensor:
        """Return quotas proportional to the areas."""
        total = torch.full_like(areas.label[:, 0], self.num_masked)
        return share_out(total, areas.size)


class SemanticFocalMask(StructureMask):
    """Hide most patches in the central structured areas and the rest in the margin (G2LL, "semantic focal").

    Paper: of n patches, n gamma beta lie inside the central areas (beta = 0.7), the rest outside. Ours: the number
    inside is rounded down (44 of 64 for n = 256, gamma = 0.25); central are the areas nearest to the middle of the
    image, by the centroid of their patches (the smaller label in a tie), as many as it takes to hold that number;
    within a group the quotas are proportional to area by largest remainder; what the margin cannot hold is hidden
    inside. `focal_share` is beta.
    Raises UserError for a share outside [0, 1].
    """

    def __init__(self, num_patches: int, ratio: float, focal_share: float = 0.7, num_labels: int = MAX_LABELS) -> None:
        super().__init__(num_patches, ratio, num_labels)
        if not 0 <= focal_share <= 1:
            raise UserError(f"'focal_share' cannot be {focal_share}: give a share between 0 and 1, such as 0.7.")
        # The small addend keeps 100 * 0.3 * 0.7 = 20.999... from becoming 20.
        self.num_inside = int(num_patches * ratio * focal_share + 1e-9)

    def quotas(self, areas: Areas) -> Tensor:
        """Return quotas proportional to area within the centre and within the margin."""
        central = self.central(areas)
        inside, outside = areas.size * central, areas.size * ~central
        room = outside.sum(1)
        num_outside = room.clamp(max=self.num_masked - self.num_inside)
        return share_out(self.num_masked - num_outside, inside) + share_out(num_outside, outside)

    def central(self, areas: Areas) -> Tensor:
        """Return which labels are central, bool (b, labels): the nearest ones until they hold `num_inside` patches."""
        order = self.distances(areas).argsort(dim=1, stable=True)
        size = areas.size.gather(1, order)
        held_before = size.cumsum(1) - size
        needed = (held_before < self.num_inside) & (size > 0)
        return torch.zeros_like(needed).scatter_(1, order, needed)

    def distances(self, areas: Areas) -> Tensor:
        """Return the squared distance of each label's centroid from the middle, in half patches; empty ones last."""
        line = torch.arange(self.grid, device=areas.label.device) * 2 - (self.grid - 1)
        rows, columns = line.repeat_interleave(self.grid), line.repeat(self.grid)
        sums = [
            torch.zeros_like(areas.size).scatter_add_(1, areas.label, axis.expand_as(areas.label))
            for axis in (rows, columns)
        ]
        # Sums of whole numbers and one division: equal distances compare equal.
        squared = (sums[0] ** 2 + sums[1] ** 2).float() / areas.size.clamp(min=1).float() ** 2
        return torch.where(areas.size > 0, squared, torch.inf)


def show_regions(strip: list[Tensor], batch: Batch) -> list[Tensor]:
    """Return pictures (b, 3, s, s) in [0, 1] with the first again behind it, its superpixels outlined, if any."""
    if "superpixels" not in batch.extra:
        return strip
    return [strip[0], draw_regions(strip[0], batch.extra["superpixels"]), *strip[1:]]


def draw_regions(picture: Tensor, superpixels: Tensor) -> Tensor:
    """Return `picture` (b, 3, s, s) in [0, 1] with a white line between the regions of label maps (b, 1, s, s)."""
    edge = torch.zeros_like(superpixels, dtype=torch.bool)
    edge[..., :-1, :] |= superpixels[..., :-1, :] != superpixels[..., 1:, :]
    edge[..., :-1] |= superpixels[..., :-1] != superpixels[..., 1:]
    return picture.masked_fill(edge, 1.0)
