"""Every image hides exactly as many patches, any patch is as likely, and the two lists of indices share them out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewmask.pretrain.masking import RandomMask, split_indices
from fewmask.pretrain.patches import enlarge_mask, patchify, take, unpatchify
from fewmask.types import Batch, UserError


def blank(num_images: int) -> Batch:
    return Batch(torch.zeros(num_images, 3, 1, 1), [""] * num_images)


@given(st.integers(1, 5), st.integers(1, 300), st.floats(0, 1))
def test_exact_counts_and_a_partition(num_images, num_patches, ratio):
    expected = round(num_patches * ratio)
    if not 0 < expected < num_patches:
        with pytest.raises(UserError, match="mask ratio"):
            RandomMask(num_patches, ratio)
        return
    masking = RandomMask(num_patches, ratio)
    mask = masking(blank(num_images))
    assert mask.sum(1).tolist() == [expected] * num_images
    visible, masked = split_indices(mask, masking.num_masked)
    assert not mask.gather(1, visible).any()
    assert mask.gather(1, masked).all()
    both = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(num_patches).expand(num_images, -1))


def test_every_patch_is_as_likely_and_images_differ():
    torch.manual_seed(0)
    mask = RandomMask(16, 0.25)(blank(8000))
    # Standard deviation of a frequency is 0.0048: five of them either way.
    torch.testing.assert_close(mask.float().mean(0), torch.full((16,), 0.25), atol=0.025, rtol=0)
    assert len(torch.unique(mask, dim=0)) > 1500  # of the 1820 there are


def test_a_generator_of_its_own_repeats_the_mask_and_spares_the_global_one():
    before = torch.get_rng_state()
    masks = [RandomMask(64, 0.75)(blank(3), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*masks)
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_patches_go_back_to_the_image(num_images, grid, patch):
    image = torch.randn(num_images, 3, grid * patch, grid * patch)
    patches = patchify(image, patch)
    assert patches.shape == (num_images, grid**2, patch**2 * 3)
    assert torch.equal(unpatchify(patches, patch), image)


def test_patches_are_numbered_row_by_row():
    image = torch.arange(3 * 6 * 6.0).reshape(1, 3, 6, 6)
    expected = image[0, :, 2:4, 4:6].permute(1, 2, 0).flatten()
    assert torch.equal(patchify(image, 2)[0, 1 * 3 + 2], expected)
    assert torch.equal(take(patchify(image, 2), torch.tensor([[5]]))[0, 0], expected)


def test_mask_enlarged_agrees_with_the_patches():
    mask = torch.rand(2, 9) < 0.5
    pixels = enlarge_mask(mask, 4).expand(-1, 3, -1, -1)
    assert torch.equal(patchify(pixels, 4).float().mean(2), mask.float())
