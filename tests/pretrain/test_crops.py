"""Views: what moves moves together, and what is told apart by colour only is."""

from __future__ import annotations

import pytest
import torch

from fewmask.data.geometry import crop_resize, whole_boxes
from fewmask.data.preprocess import denormalise, normalise
from fewmask.pretrain.crops import SSL_COLOUR, CropViews, MultiCropViews, Solarise, move_map
from fewmask.types import Batch


def raw(num: int = 4, side: int = 36) -> Batch:
    """Pictures of four gray quarters; the superpixels are the quarters."""
    labels = torch.zeros(num, 1, side, side, dtype=torch.uint8)
    labels[..., side // 2 :] += 1
    labels[..., side // 2 :, :] += 2
    image = (labels * 60 + 20).expand(-1, 3, -1, -1).clone()
    return Batch(image, [str(i) for i in range(num)], extra={"superpixels": labels})


def test_a_map_moves_by_exact_permutations():
    labels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    boxes = whole_boxes(2)
    assert torch.equal(move_map(labels, boxes, 8), labels)
    assert torch.equal(move_map(labels, boxes[:, [1, 0, 2, 3]], 8), labels.flip(3))
    assert torch.equal(move_map(labels, boxes[:, [0, 1, 3, 2]], 8), labels.flip(2))
    quarter = torch.tensor([[0.5, 1.0, 0.0, 0.5]]).repeat(2, 1)
    assert torch.equal(move_map(labels, quarter, 4), labels[..., :4, 4:])
    assert torch.equal(
        move_map(labels, quarter, 8), labels[..., :4, 4:].repeat_interleave(2, 2).repeat_interleave(2, 3)
    )


def test_superpixels_stay_on_their_picture():
    torch.manual_seed(0)
    views = CropViews(32, scale=(0.1, 1.0))
    batch = views(raw(64))
    gray, labels = denormalise(batch.image)[:, :1] * 255, batch.extra["superpixels"]
    off = (gray - (labels.float() * 60 + 20)).abs()
    # Next to an edge the picture is a mixture; a moved or mirrored map would be off by a whole region.
    assert (off > 1).float().mean() < 0.12
    assert off.median() < 0.1


def test_the_two_views_of_a_pair_share_their_crop_and_not_their_colour():
    torch.manual_seed(0)
    plain = CropViews(32, pair=True)(raw())
    assert torch.equal(plain.image, plain.extra["second"])
    coloured = CropViews(32, pair=True, colour=SSL_COLOUR)(raw(16))
    assert (coloured.image != coloured.extra["second"]).flatten(1).any(1).float().mean() > 0.5


def test_without_a_pair_the_views_are_the_plain_ones():
    torch.manual_seed(1)
    batch = CropViews(32)(raw())
    assert set(batch.extra) == {"superpixels"}
    whole = CropViews(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, vertical=False)(raw())
    expected = normalise(crop_resize(raw().image / 255, whole_boxes(4), 32))
    torch.testing.assert_close(whole.image, expected)


def test_crops_of_several_sizes_are_normalised_and_differ():
    torch.manual_seed(0)
    batch = MultiCropViews(32, num_local=3, local_size=16)(raw())
    assert batch.image.shape == batch.extra["second"].shape == (4, 3, 32, 32)
    assert batch.extra["local"].shape == (4, 3, 3, 16, 16)
    assert batch.mask is None
    assert not torch.equal(batch.image, batch.extra["second"])
    assert not torch.equal(batch.extra["local"][:, 0], batch.extra["local"][:, 1])
    everything = torch.cat([batch.image.flatten(), batch.extra["local"].flatten()])
    assert -2.2 < everything.min() < everything.max() < 2.7


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_solarise_inverts_the_bright_half(p):
    x = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2).expand(3, 3, 2, 2)
    expected = [0.0, 0.25, 0.5, 0.0] if p else [0.0, 0.25, 0.5, 1.0]
    torch.testing.assert_close(Solarise(p)(x)[0, 0].flatten(), torch.tensor(expected))
