"""What an image draws does not depend on how many processes share its batch: each part equals its rows of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.drop import DropPath
from torch import Tensor

from fewmask.auxiliary import AUXILIARY
from fewmask.data.augment import PretrainViews, SegmentViews
from fewmask.data.colour import Chain, ColourJitter, GaussianBlur, GaussianNoise, apply_to_some
from fewmask.distill.bands import random_mask
from fewmask.draws import draw_each, drawing_for
from fewmask.finetune.joint import Joint, take_rows
from fewmask.models import build_encoder, build_segmenter
from fewmask.models.drop_path import SharedDropPath
from fewmask.pretrain.crops import SSL_COLOUR, CropViews, MultiCropViews
from fewmask.pretrain.exterior_conversion import ConvertedViews, ExteriorConversion
from fewmask.pretrain.figure import FigureViews
from fewmask.pretrain.figure_rule import FigureRule
from fewmask.pretrain.structure import build_masking
from fewmask.types import Batch, Share, Views

SIZE, NUM = 32, 12
CROPS = CropViews(SIZE, colour=SSL_COLOUR, pair=True)
VIEWS: dict[str, Views] = {
    "pair": CROPS,
    "crops of two sizes": MultiCropViews(SIZE, num_local=2, local_size=16),
    "converted": ConvertedViews(CropViews(SIZE), ExteriorConversion()),
    "converted by one layer": ConvertedViews(CropViews(SIZE), ExteriorConversion("randconv")),
    "figure": FigureViews(PretrainViews(SIZE, colour=SSL_COLOUR), FigureRule(0.01, 0.9, 0.1)),
    "segmentation": SegmentViews(SIZE, colour=Chain((ColourJitter(), GaussianBlur(p=0.3), GaussianNoise(0.1, 0.3)))),
}
for name, task in AUXILIARY.items():
    VIEWS[name] = task(build_encoder("resnet10t", size=SIZE), size=SIZE).see


def whole_batch() -> Batch:
    """Return a raw batch with masks and superpixels."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(256, (NUM, 3, 40, 40), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(NUM, 1, 40, 40, dtype=torch.uint8)
    for i in range(NUM):
        mask[i, :, 5 + i : 25, 8:30] = 255
    regions = (torch.arange(40) // 10).to(torch.uint8)
    superpixels = (regions[:, None] + 4 * regions).expand(NUM, 1, 40, 40).contiguous()
    names = [f"image {i}" for i in range(NUM)]
    return Batch(image, names, mask, torch.arange(NUM) % 2, {"superpixels": superpixels})


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """Return what one of several processes holds of a batch."""
    rows = slice(rank * NUM // world, (rank + 1) * NUM // world)
    return replace(take_rows(batch, rows), share=Share(tuple(range(NUM))[rows], NUM))


def in_parts(draw: Callable[[Batch], dict[str, Tensor]], world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what one process draws for the whole batch, and what several draw for their parts, put together."""
    torch.manual_seed(7)
    whole = draw(whole_batch())
    end, parts = torch.get_rng_state(), []
    for rank in range(world):
        torch.manual_seed(7)
        part = part_of(whole_batch(), rank, world)
        with drawing_for(part.share):
            parts.append(draw(part))
        assert torch.equal(torch.get_rng_state(), end), "the generators of the processes are out of step"
    return whole, {name: torch.cat([part[name] for part in parts]) for name in whole}


@pytest.mark.parametrize("world", [2, 3, 12])
@pytest.mark.parametrize("name", VIEWS)
def test_every_view_of_a_part_is_that_of_the_whole(name, world):
    def draw(batch: Batch) -> dict[str, Tensor]:
        seen = VIEWS[name](batch)
        return {"image": seen.image, **({} if seen.mask is None else {"mask": seen.mask}), **seen.extra}

    whole, joined = in_parts(draw, world)
    for key, value in whole.items():
        if key == "figure":  # a cell that lies at the threshold may fall to either side, by the order of a sum
            assert (joined[key] != value).sum() <= 2
            continue
        torch.testing.assert_close(joined[key], value, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("world", [2, 3, 12])
@pytest.mark.parametrize("kind", ["random", "semantic", "semantic_focal"])
def test_masks_of_both_views_of_a_part_are_those_of_the_whole(kind, world):
    masking = build_masking(kind, 64, 0.3)

    def draw(batch: Batch) -> dict[str, Tensor]:
        twice = {"superpixels": torch.cat([batch.extra["superpixels"]] * 2)}
        first, second = masking(replace(batch, image=batch.image.repeat(2, 1, 1, 1), extra=twice)).chunk(2)
        return {"first": first, "second": second}

    whole, joined = in_parts(draw, world)
    assert torch.equal(whole["first"], joined["first"])
    assert torch.equal(whole["second"], joined["second"])
    assert not torch.equal(whole["first"], whole["second"])


def test_dropped_paths_of_a_part_are_those_of_the_whole_and_timms_in_one_process():
    """Of both views, and enlarged so that the mean stays."""

    def draw(batch: Batch) -> dict[str, Tensor]:
        one = torch.ones(2 * len(batch.image), 3, 4)
        seen = [part for layer in (SharedDropPath(0.4), SharedDropPath(0.4, False)) for part in layer(one).chunk(2)]
        return {str(i): part for i, part in enumerate(seen)}

    whole, joined = in_parts(draw, 3)
    assert all(torch.equal(joined[key], value) for key, value in whole.items())
    torch.manual_seed(7)
    assert torch.equal(DropPath(0.4)(torch.ones(2 * NUM, 3, 4)), torch.cat([whole["0"], whole["1"]]))
    for name in ("vit_tiny_patch16", "resnet18"):
        kinds = [type(module) for module in build_encoder(name, size=SIZE, drop_path=0.2).modules()]
        assert SharedDropPath in kinds
        assert DropPath not in kinds


def test_dropped_positions_of_a_part_are_those_of_the_whole():
    whole, joined = in_parts(lambda batch: {"drop": random_mask(torch.ones(len(batch.image), 1, 9, 9), 0.5)}, 3)
    assert torch.equal(whole["drop"], joined["drop"])


def test_the_images_of_a_second_task_draw_by_their_own_places():
    """They are more than the labelled ones beside them, and both are cut up."""
    segmenter = build_segmenter("unet", build_encoder("resnet10t", size=SIZE))
    views = Joint(segmenter, size=SIZE, task="jigsaw").views()

    def draw(batch: Batch) -> dict[str, Tensor]:
        few = take_rows(batch, slice(0, len(batch.names) // 2))
        share = batch.share and Share(tuple(place // 2 for place in batch.share.places[::2]), NUM // 2)
        with drawing_for(share):
            seen = views(replace(few, share=share, other=batch))
        assert seen.other is not None
        return {"image": seen.other.image, **seen.other.extra}

    whole, joined = in_parts(draw, 2)
    for key, value in whole.items():
        torch.testing.assert_close(joined[key], value, atol=1e-5, rtol=1e-4, msg=key)


@given(
    st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 2**31 - 1)
)
def test_rows_of_any_parts_make_up_the_whole(num_views, sizes, probability, seed):
    """Parts of any sizes, several views of each image; what is drawn for chosen ones alone included."""
    total = sum(sizes)

    def draw(num: int) -> Tensor:
        fixed = draw_each(num_views * num, lambda n: torch.rand(n, 2))
        chosen = apply_to_some(fixed, probability, lambda some: some + draw_each(len(some), torch.rand)[:, None])
        return torch.cat([chosen, draw_each(num_views * num, torch.rand)[:, None]], 1).view(num_views, num, 3)

    torch.manual_seed(seed)
    whole, start, parts = draw(total), 0, []
    for size in sizes:
        torch.manual_seed(seed)
        with drawing_for(Share(tuple(range(start, start + size)), total)):
            parts.append(draw(size))
        start += size
    assert torch.equal(torch.cat(parts, 1), whole)


def test_draws_that_are_no_whole_views_of_the_images_are_refused():
    with drawing_for(Share((0, 1), 4)), pytest.raises(ValueError, match="3 draws are no whole number of views"):
        draw_each(3, torch.rand)
