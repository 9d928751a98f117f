"""The masked student equals MAE for a ViT, and a literal reading of equations 3 and 4 for a CNN."""

from __future__ import annotations

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.student import DecoderShape, Hidden, build_student
from fewmask.types import Batch, UserError

SHAPE = DecoderShape(48, 1, 2)


def mask_of(rows: list[list[int]], num_patches: int = 16) -> torch.Tensor:
    mask = torch.zeros(len(rows), num_patches, dtype=torch.bool)
    for row, hidden in enumerate(rows):
        mask[row, hidden] = True
    return mask


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_vits_error_is_that_of_mae(norm_pix):
    torch.manual_seed(0)
    mae = MAE(build_encoder("vit_tiny_patch16", size=64), 0.25, norm_pix, *SHAPE).eval()
    student = build_student(mae.encoder, None, SHAPE, norm_pix).eval()
    student.decoder.load_state_dict(mae.decoder.state_dict())
    batch = Batch(torch.randn(3, 3, 64, 64), [""] * 3)
    torch.manual_seed(1)
    expected = mae(batch)["loss"]
    torch.manual_seed(1)
    hidden = Hidden.of(mae.masking(batch), 4)
    error = student.error(batch.image, student.tokens(batch.image, hidden), hidden)
    torch.testing.assert_close(error, expected)


@pytest.mark.parametrize("norm_pix", [False, True])
@torch.no_grad()
def test_a_cnns_error_is_the_equation_on_painted_pixels(norm_pix):
    torch.manual_seed(0)
    student = build_student(build_encoder("resnet18", size=64), 16, SHAPE, norm_pix).eval()
    student.filler.copy_(torch.tensor([0.5, -1.0, 2.0]))
    image, mask = torch.randn(2, 3, 64, 64), mask_of([[0, 5, 6], [3, 8, 15]])
    hidden = Hidden.of(mask, 3)
    tokens = student.tokens(image, hidden)
    total = 0.0
    for i in range(2):
        painted, cells = image[i].clone(), [divmod(j, 4) for j in range(16) if mask[i, j]]
        for row, column in cells:
            painted[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = student.filler[:, None, None]
        features = student.encoder(painted[None])[-1]
        torch.testing.assert_close(tokens[i, 0], features.mean((2, 3))[0])
        output = student.head(features)[0]
        for row, column in cells:
            where = (slice(None), slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16))
            target = image[i][where]
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total += ((output[where] - target) ** 2).mean().item()
    assert student.error(image, tokens, hidden).item() == pytest.approx(total / 6, rel=1e-4)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16", "resnet18"])
@torch.no_grad()
def test_hidden_pixels_change_nothing_the_student_sees(encoder):
    student = build_student(build_encoder(encoder, size=64), 16, SHAPE, False).eval()
    image, hidden = torch.randn(1, 3, 64, 64), Hidden.of(mask_of([[0, 1, 7]]), 3)
    before = student.tokens(image, hidden)
    image[:, :, :16, :32] += 3
    assert torch.equal(before, student.tokens(image, hidden))
    image[:, :, 16:, :16] += 3
    assert not torch.equal(before, student.tokens(image, hidden))


@pytest.mark.parametrize("norm_pix", [False, True])
@torch.no_grad()
def test_painting_changes_the_hidden_patches_only(norm_pix):
    student = build_student(build_encoder("vit_tiny_patch16", size=64), None, SHAPE, norm_pix).eval()
    image, hidden = torch.randn(1, 3, 64, 64), Hidden.of(mask_of([[0]]), 1)
    masked, painted = student.paint(image, hidden)
    assert (masked[..., :16, :16] == 0).all()
    assert not torch.equal(painted[..., :16, :16], image[..., :16, :16])
    for shown in (masked, painted):
        assert torch.equal(shown[..., 16:, :], image[..., 16:, :])


def test_a_cnn_has_256_patches_by_default_as_in_the_paper():
    assert build_student(build_encoder("resnet18", size=128), None, SHAPE, False).num_patches == 256


@pytest.mark.parametrize(
    ("encoder", "mask_patch", "sentence"),
    [
        ("vit_tiny_patch16", 8, "'mask_patch' = 8 is not the patch of the encoder 'vit_tiny_patch16', which is 16"),
        ("resnet18", 24, "'mask_patch' = 24 does not divide the image size 64"),
        ("resnet18", 0, "'mask_patch' = 0 does not divide"),
    ],
)
def test_a_mask_patch_that_does_not_fit_is_told(encoder, mask_patch, sentence):
    with pytest.raises(UserError, match=sentence):
        build_student(build_encoder(encoder, size=64), mask_patch, SHAPE, False)
