"""The band around a lesion's boundary, its inside and outside, and which positions of a feature map are dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.distill.align import map_size
from fewmask.distill.distiller import check_share
from fewmask.draws import draw_each
from fewmask.types import UserError

RegionName = Literal["boundary", "whole", "inside", "outside", "none"]


class Band:
    """The band around a lesion's boundary, `width` of the image's side on either side of it, at least a pixel.

    Ours: 0.03, 4 pixels of 128. Raises UserError unless 0 < width <= 0.5.
    """

    def __init__(self, width: float = 0.03) -> None:
        if not 0 < width <= 0.5:
            raise UserError(f"'width' cannot be {width}: give a share of the image's side above 0, at most 0.5.")
        self.width = width

    def radius(self, side: int) -> int:
        """Return the reach on either side, in pixels of an image of that side."""
        return max(round(self.width * side), 1)

    def __call__(self, mask: Tensor) -> Tensor:
        """Return the band of masks (b, 1, s, s), read as lesion where >= 0.5, bool of that shape."""
        return boundary_band(mask, self.radius(mask.shape[2]))


class BandMasking(nn.Module):
    """Which positions to drop: those near the lesion's boundary, or one of the controls that tell whether it matters.

    "boundary": each position of the band with probability `drop`. "none": nothing. The others drop, in expectation and
    image by image, as many positions as "boundary" would: "whole" anywhere, "inside" and "outside" in the lesion or
    in the background without the band; where such a region is smaller than that number, all of it.

    `width` is that of `Band`. Raises UserError unless 0 < width <= 0.5 and `drop` is in [0, 1].
    """

    def __init__(self, width: float = 0.03, drop: float = 0.5, region: RegionName = "boundary") -> None:
        check_share("drop", drop)
        super().__init__()
        self.band, self.drop, self.region = Band(width), drop, region

    def forward(self, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return where positions may be dropped, bool (b, 1, *size), and with which probability, (b, 1, 1, 1).

        `mask` is (b, 1, s, s); it is read as lesion where >= 0.5.
        """
        radius = self.band.radius(mask.shape[2])
        band = pool(self.band(mask), size)
        wanted = self.drop * count(band)
        if self.region in ("boundary", "none"):
            return band, torch.full_like(wanted, self.drop if self.region == "boundary" else 0.0)
        if self.region == "whole":
            region = torch.ones_like(band)
        else:
            # Inside and outside never touch without the band between them: with it, they cover the map once.
            region = pool({"inside": inside, "outside": outside}[self.region](mask, radius), size) & ~band
        return region, (wanted / count(region).clamp(min=1)).clamp(max=1)


def random_mask(region: Tensor, share: float | Tensor) -> Tensor:
    """Return which positions are dropped, bool, of the region's shape: each of the region's with probability `share`.

    `region` is (b, 1, h, w), `share` a number or (b, 1, 1, 1). Drawn from torch's global generator.
    """
    chance = draw_each(len(region), lambda n: torch.rand(n, *region.shape[1:], device=region.device))
    return (chance < share) & region.bool()


def boundary_band(mask: Tensor, radius: int) -> Tensor:
    """Return dilate(y, r) - erode(y, r), bool (b, 1, s, s): empty for an empty mask and for a full one.

    The structuring element is the square of side 2 r + 1, and beyond the image's edge is nothing: a lesion that is cut
    by the edge has no boundary there.
    """
    found, area = lesion_around(mask, radius)
    return (found > 0) & (found < area)


def inside(mask: Tensor, radius: int) -> Tensor:
    """Return erode(y, r), bool (b, 1, s, s)."""
    found, area = lesion_around(mask, radius)
    return found == area


def outside(mask: Tensor, radius: int) -> Tensor:
    """Return the complement of dilate(y, r), bool (b, 1, s, s)."""
    return lesion_around(mask, radius)[0] == 0


def lesion(mask: Tensor) -> Tensor:
    """Return the mask as 0 or 1, float32."""
    return (mask >= 0.5).float()


def lesion_around(mask: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return how many pixels of the square of side 2 r + 1 around each are lesion, int (b, 1, s, s), and its area.

    The square is cut at the image's edge, and so is its area, int (s, s). By running sums: dilation asks whether any of
    them is lesion and erosion whether all are, and poolings take four times as long.
    """
    counts, sides = (mask >= 0.5).int(), []
    for axis in (2, 3):
        size = mask.shape[axis]
        position = torch.arange(size, device=mask.device)
        low, high = (position - radius).clamp(min=0), (position + radius + 1).clamp(max=size)
        sums = F.pad(counts.cumsum(axis, dtype=torch.int32), (1, 0) if axis == 3 else (0, 0, 1, 0))
        counts = sums.index_select(axis, high) - sums.index_select(axis, low)
        sides.append(high - low)
    return counts, sides[0][:, None] * sides[1]


def pool(region: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which positions of a map of another size see any of a region, bool (b, 1, *size)."""
    return region if map_size(region) == size else F.adaptive_max_pool2d(region.float(), size) > 0


def count(region: Tensor) -> Tensor:
    """Return the number of positions of each image's region, float32 (b, 1, 1, 1)."""
    return region.float().sum((1, 2, 3), keepdim=True)
