"""Masks by structure against a literal reading of the rule, one image, one region, one patch at a time."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.pretrain.structure import (
    SemanticFocalMask,
    SemanticMask,
    build_masking,
    count_by_adding,
    count_by_comparing,
    draw,
    draw_regions,
    share_out,
    vote,
)
from fewmask.types import Batch, UserError

GRID, PATCH = 8, 4
N = GRID * GRID
NAMES = ["random", "semantic", "semantic_focal"]


@st.composite
def label_maps(draw_value, num_images: int = 3) -> torch.Tensor:
    """Label maps (b, 1, s, s): noise, blocks, stripes or a single region; any labels of a byte."""
    generator = torch.Generator().manual_seed(draw_value(st.integers(0, 2**31)))
    most = draw_value(st.sampled_from([1, 2, 3, 9, 64, 256]))
    cell = draw_value(st.sampled_from([1, 2, PATCH, 3 * PATCH, GRID * PATCH]))
    side = -(-GRID * PATCH // cell)
    coarse = torch.randint(0, most, (num_images, 1, side, side), generator=generator, dtype=torch.uint8)
    fine = coarse.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return fine[..., : GRID * PATCH, : GRID * PATCH].contiguous()


def batch_of(maps: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(maps), 3, 1, 1), [""] * len(maps), extra={"superpixels": maps})


def literal_vote(labels: torch.Tensor, grid: int) -> list[int]:
    patch, out = labels.shape[-1] // grid, []
    for row in range(grid):
        for column in range(grid):
            cell = labels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            counts = Counter(cell.flatten().tolist())
            out.append(min(counts, key=lambda label: (-counts[label], label)))
    return out


def literal_share(total: int, size: dict[int, int]) -> dict[int, int]:
    """Largest remainder in exact fractions."""
    if not size:
        return {}
    exact = {k: Fraction(total * v, sum(size.values())) for k, v in size.items()}
    quota = {k: int(v) for k, v in exact.items()}
    by_remainder = sorted(size, key=lambda k: (quota[k] - exact[k], k))
    for label in by_remainder[: total - sum(quota.values())]:
        quota[label] += 1
    return quota


def literal_centre(patches: list[int], grid: int, wanted: int) -> set[int]:
    def distance(label: int) -> Fraction:
        mine = [divmod(i, grid) for i, patch in enumerate(patches) if patch == label]
        middle = Fraction(grid - 1, 2)
        return sum((Fraction(sum(p[axis] for p in mine), len(mine)) - middle) ** 2 for axis in (0, 1))

    central: set[int] = set()
    for label in sorted(set(patches), key=lambda k: (distance(k), k)):
        if sum(patch in central for patch in patches) >= wanted:
            break
        central.add(label)
    return central


def literal_focal(patches: list[int], grid: int, masked: int, inside: int) -> tuple[dict[int, int], set[int]]:
    central, size = literal_centre(patches, grid, inside), Counter(patches)
    near = {k: v for k, v in size.items() if k in central}
    far = {k: v for k, v in size.items() if k not in central}
    outside = min(masked - inside, sum(far.values()))
    return {**literal_share(masked - outside, near), **literal_share(outside, far)}, central


@settings(deadline=None, max_examples=60)
@given(label_maps())
def test_vote_is_the_majority_and_the_smaller_label_in_a_tie(maps):
    areas = vote(maps, GRID)
    for image, (labels, size) in enumerate(zip(areas.label, areas.size, strict=True)):
        assert labels.tolist() == literal_vote(maps[image, 0], GRID)
        assert {k: v for k, v in enumerate(size.tolist()) if v} == Counter(labels.tolist())


@settings(deadline=None, max_examples=20)
@given(label_maps())
def test_the_accelerators_way_of_counting_gives_the_same_votes(maps):
    cells = maps.reshape(len(maps), N, -1)
    assert torch.equal(count_by_comparing(cells, 256), count_by_adding(cells, 256))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.data())
def test_quotas_are_the_largest_remainder_method_and_fit(size, data):
    total = data.draw(st.integers(0, sum(size)))
    quota = share_out(torch.tensor([total]), torch.tensor([size]))[0].tolist()
    assert sum(quota) == total
    assert all(0 <= q <= s for q, s in zip(quota, size, strict=True))
    assert {i: q for i, q in enumerate(quota) if size[i]} == literal_share(
        total, {i: s for i, s in enumerate(size) if s}
    )


@settings(deadline=None, max_examples=60)
@given(label_maps(), st.sampled_from(NAMES), st.floats(0.05, 0.95), st.floats(0, 1))
def test_every_image_hides_exactly_as_many_patches(maps, name, ratio, share):
    masking = build_masking(name, N, ratio, share)
    mask = masking(batch_of(maps))
    assert (mask.dtype, mask.shape) == (torch.bool, (len(maps), N))
    assert mask.sum(1).tolist() == [round(N * ratio)] * len(maps)


@settings(deadline=None, max_examples=60)
@given(label_maps(), st.floats(0.05, 0.95))
def test_semantic_hides_the_same_share_of_every_area(maps, ratio):
    masking = SemanticMask(N, ratio)
    for row, hidden in enumerate(masking(batch_of(maps))):
        patches = literal_vote(maps[row, 0], GRID)
        found = Counter(patch for patch, gone in zip(patches, hidden.tolist(), strict=True) if gone)
        assert {k: found[k] for k in set(patches)} == literal_share(masking.num_masked, Counter(patches))
        for label, size in Counter(patches).items():
            assert abs(found[label] - masking.num_masked / N * size) < 1


@settings(deadline=None, max_examples=60)
@given(label_maps(), st.floats(0.05, 0.95), st.floats(0, 1))
def test_semantic_focal_follows_the_rule_to_the_patch(maps, ratio, share):
    masking = SemanticFocalMask(N, ratio, share)
    for row, hidden in enumerate(masking(batch_of(maps))):
        patches = literal_vote(maps[row, 0], GRID)
        quota, central = literal_focal(patches, GRID, masking.num_masked, masking.num_inside)
        found = Counter(patch for patch, gone in zip(patches, hidden.tolist(), strict=True) if gone)
        assert {k: found[k] for k in set(patches)} == quota
        room = sum(patch not in central for patch in patches)
        if room >= masking.num_masked - masking.num_inside:  # the share is met whenever it fits
            assert sum(found[k] for k in central) == masking.num_inside


def test_the_papers_numbers_are_44_inside_and_20_outside():
    masking = SemanticFocalMask(256, 0.25, 0.7)
    assert (masking.num_masked, masking.num_inside) == (64, 44)
    middle = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    middle[..., 8:24, 8:24] = 0
    hidden = masking(batch_of(middle)).view(16, 16)
    assert hidden[4:12, 4:12].sum() == 44
    assert hidden.sum() == 64


def test_a_share_that_is_whole_is_not_rounded_down():
    assert SemanticFocalMask(100, 0.3, 0.7).num_inside == 21


@pytest.mark.parametrize("name", ["semantic", "semantic_focal"])
def test_degenerate_superpixels(name):
    one = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    each = torch.arange(256).view(16, 16).repeat_interleave(4, 0).repeat_interleave(4, 1).to(torch.uint8)[None, None]
    frame = torch.ones(1, 1, 64, 64, dtype=torch.uint8)  # its centroid is the middle, where another label lies
    frame[..., 28:36, 28:36] = 0
    for maps in (one, each, frame):
        mask = build_masking(name, 256, 0.25)(batch_of(maps))
        assert mask.sum().item() == 64


def test_an_empty_centre_leaves_all_to_the_margin():
    maps = torch.randint(0, 5, (2, 1, 32, 32), dtype=torch.uint8)
    masking = SemanticFocalMask(N, 0.5, 0.0)
    assert not masking.central(vote(maps, GRID)).any()
    assert masking(batch_of(maps)).sum(1).tolist() == [N // 2] * 2


def test_what_the_margin_cannot_hold_is_hidden_inside():
    maps = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    maps[..., :PATCH, : 2 * PATCH] = 1  # a margin of two patches
    mask = SemanticFocalMask(N, 0.5, 0.5)(batch_of(maps)).view(GRID, GRID)
    assert mask.sum() == N // 2
    assert mask[0, :2].all()


def test_each_patch_of_an_area_is_equally_likely():
    label = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]]).expand(4000, -1)
    quota = torch.tensor([[1, 2, 1]]).expand(4000, -1)
    rate = draw(label, quota, torch.Generator().manual_seed(0)).float().mean(0)
    # Four standard errors of a rate of 1/2 over 4,000 draws.
    torch.testing.assert_close(rate, torch.tensor([0.25] * 4 + [1.0] * 2 + [0.5] * 2), atol=0.032, rtol=0)


@pytest.mark.parametrize("name", ["semantic", "semantic_focal"])
def test_a_mask_is_a_function_of_its_generator(name):
    batch, masking = batch_of(torch.randint(0, 5, (2, 1, 32, 32), dtype=torch.uint8)), build_masking(name, N, 0.25)
    state = torch.get_rng_state()
    first, again, other = (masking(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lines_are_drawn_between_regions_only():
    maps = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    maps[..., 2:] = 1
    shown = draw_regions(torch.zeros(1, 3, 4, 4), maps)
    assert torch.equal(shown[0, 0], torch.tensor([[0.0, 1, 0, 0]] * 4))


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="this batch has none: use mask = 'random'"):
        SemanticMask(N, 0.5)(Batch(torch.zeros(1, 3, 32, 32), [""]))
    with pytest.raises(UserError, match=r"'focal_share' cannot be 1\.5"):
        SemanticFocalMask(N, 0.5, 1.5)
    for name in NAMES:
        with pytest.raises(UserError, match=r"mask ratio of 1.0 leaves nothing visible"):
            build_masking(name, N, 1.0)
