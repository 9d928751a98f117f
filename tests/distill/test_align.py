"""Widths and levels of unequal networks brought together."""

from __future__ import annotations

import pytest
import torch

from fewmask.distill.align import Align, AlignLevels, Pair, pair_levels, resize
from fewmask.distill.widths import Widths
from fewmask.types import UserError
from tests.distill.networks import STUDENT, TEACHER, random_output

UNET = Widths((16, 32, 64, 128, 256, 320), (1, 2, 4, 8, 16, 32))
TRANSUNET = Widths((16, 64, 128, 256, 384), (1, 2, 4, 8, 16))
TINY = Widths((8, 8), (2, 8))


@pytest.mark.parametrize(
    ("student", "teacher", "levels", "expected"),
    [
        (UNET, TRANSUNET, None, [(2, 2)]),
        (TRANSUNET, UNET, (5,), [(4, 5)]),
        (TINY, UNET, (0, 2, 5), [(0, 0), (0, 2), (1, 5)]),  # stride 4 lies between 2 and 8: the finer
        (UNET, TINY, None, [(1, 0)]),
        (Widths((1, 1), (6, 15)), Widths((1,), (10,)), None, [(1, 0)]),  # by ratio, not by difference
    ],
)
def test_levels_are_paired_by_the_nearest_stride(student, teacher, levels, expected):
    assert pair_levels(student, teacher, levels) == [Pair(*pair) for pair in expected]


def test_two_strides_with_one_nearest_level_name_it_once():
    assert pair_levels(UNET, TINY, None, (4, 8, 16)) == [Pair(1, 0), Pair(3, 1)]


@pytest.mark.parametrize("levels", [(), (6,), (-1,), (1, 1)])
def test_levels_that_are_not_there_are_told(levels):
    with pytest.raises(UserError, match="usable layers are 0 to 5, at strides 1, 2, 4, 8, 16, 32"):
        pair_levels(TINY, UNET, levels)


def lerp_rows(x: torch.Tensor, num: int) -> torch.Tensor:
    """Bilinear interpolation of the last axis from its definition, half-pixel centres, edges repeated."""
    columns = []
    for i in range(num):
        at = max((i + 0.5) * x.shape[-1] / num - 0.5, 0.0)
        low = int(at)
        high = min(low + 1, x.shape[-1] - 1)
        columns.append(x[..., low] * (1 - (at - low)) + x[..., high] * (at - low))
    return torch.stack(columns, -1)


def test_align_is_a_matrix_over_channels_and_bilinear_over_positions():
    torch.manual_seed(0)
    align, x = Align(3, 5), torch.randn(2, 3, 4, 4)
    mixed = torch.einsum("oc,bchw->bohw", align.project.weight[:, :, 0, 0], x) + align.project.bias.view(5, 1, 1)
    expected = lerp_rows(lerp_rows(mixed, 8).transpose(2, 3), 8).transpose(2, 3)
    torch.testing.assert_close(align(x, (8, 8)), expected)


def test_a_finer_map_is_averaged_and_not_sampled():
    stripes = torch.tensor([0.0, 0.0, 0.0, 4.0]).repeat(1, 1, 16, 4)
    small = resize(stripes, (4, 4))
    torch.testing.assert_close(small[..., 1:3], torch.ones(1, 1, 4, 2), atol=0.6, rtol=0)
    torch.testing.assert_close(small.mean(), stripes.mean(), atol=0.1, rtol=0)
    assert resize(stripes, (16, 16)) is stripes


def test_aligned_features_have_the_teachers_shape():
    student, teacher = random_output(STUDENT, 0), random_output(TEACHER, 1)
    for own, wanted in AlignLevels(STUDENT, TEACHER, (0, 1, 2, 3))(student, teacher):
        assert own.shape == wanted.shape
