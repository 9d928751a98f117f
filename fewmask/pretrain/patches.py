"""Images as rows of patches, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(image: Tensor, patch: int) -> Tensor:
    """Return the patches (b, n, patch * patch * 3) of an image (b, 3, h, w), row by row; channels vary fastest."""
    batch, channels, height, width = image.shape
    cells = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Return the square image (b, 3, s, s) of patches (b, n, patch * patch * 3); the inverse of `patchify`."""
    batch, num_patches, _ = patches.shape
    grid = round(num_patches**0.5)
    cells = patches.reshape(batch, grid, grid, patch, patch, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, grid * patch, grid * patch)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows (b, k, d) at the indices (b, k) of (b, n, d)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def enlarge_mask(mask: Tensor, factor: int) -> Tensor:
    """Return a boolean map (b, 1, g * factor, g * factor) of a mask over g * g cells (b, g * g)."""
    grid = round(mask.shape[1] ** 0.5)
    return mask.reshape(-1, 1, grid, grid).repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
