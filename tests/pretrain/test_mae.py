"""The MAE loss is the equation, written out patch by patch; previews show what is claimed."""

from __future__ import annotations

import pytest
import torch

from fewmask.data.preprocess import denormalise
from fewmask.models import build_encoder
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.masking import split_indices
from fewmask.pretrain.patches import patchify
from fewmask.types import Batch
from tests.pretrain.pictures import raw_batch


def mae(**settings) -> MAE:
    torch.manual_seed(0)
    return MAE(build_encoder("vit_tiny_patch16", size=64), **settings).eval()


def batch_of(num_images: int) -> Batch:
    return Batch(torch.randn(num_images, 3, 64, 64), [""] * num_images)


@torch.no_grad()
def literal_loss(subject: MAE, image: torch.Tensor, mask: torch.Tensor) -> float:
    """G2LL equation 3 (MAE section 3), one image at a time, the decoder on the patches in their own order."""
    total, count, decoder = 0.0, 0, subject.decoder
    for picture, hidden in zip(image, mask, strict=True):
        keep = [i for i in range(16) if not hidden[i]]
        tokens = subject.encoder.tokens(picture[None], torch.tensor([keep]))[0]
        embedded = decoder.embed(tokens)
        rows = [embedded[0]]
        for i in range(16):
            content = decoder.mask_token[0, 0] if hidden[i] else embedded[1 + keep.index(i)]
            rows.append(content + decoder.positions[0, i])
        output = decoder.head(decoder.norm(decoder.blocks(torch.stack(rows)[None])))[0, 1:]
        for i in range(16):
            if hidden[i]:
                row, column = divmod(i, 4)
                pixels = picture[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].permute(1, 2, 0).flatten()
                if subject.norm_pix:
                    pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                total += ((output[i] - pixels) ** 2).mean().item()
                count += 1
    return total / count


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
def test_loss_equals_the_equation(norm_pix, mask_ratio):
    subject, batch = mae(norm_pix=norm_pix, mask_ratio=mask_ratio), batch_of(3)
    torch.manual_seed(1)
    mask = subject.masking(batch)
    torch.manual_seed(1)
    loss = subject(batch)["loss"].item()
    assert loss == pytest.approx(literal_loss(subject, batch.image, mask), rel=1e-4)


def test_hidden_pixels_do_not_change_the_prediction():
    subject, batch = mae(), batch_of(1)
    visible, masked = split_indices(subject.masking(batch), 12)
    before = subject.predict(batch.image, visible, masked)
    changed = batch.image.clone()
    row, column = divmod(masked[0, 4].item(), 4)
    changed[..., row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 5
    assert torch.equal(before, subject.predict(changed, visible, masked))


def test_encoder_blocks_run_on_the_visible_tokens_only():
    subject, lengths = mae(mask_ratio=0.75), []
    subject.encoder.body.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    subject(batch_of(2))
    assert lengths == [1 + 4]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_preview_shows_the_original_the_visible_and_the_visible_again(norm_pix):
    subject, batch = mae(norm_pix=norm_pix), batch_of(2)
    strip = subject.preview(batch)["reconstruction"]
    original, masked, painted = strip.split(64, dim=3)
    torch.testing.assert_close(original, denormalise(batch.image).clamp(0, 1))
    mask = subject.masking(batch, torch.Generator().manual_seed(0))
    same = [(patchify(p, 16) == patchify(original, 16)).all(2) for p in (masked, painted)]
    assert torch.equal(same[0], ~mask)
    assert torch.equal(same[1], ~mask)


def test_preview_shows_the_superpixels_that_a_mask_follows():
    subject = mae(mask="semantic", mask_ratio=0.25)
    torch.manual_seed(1)
    strip = subject.preview(subject.views()(raw_batch(2)))["reconstruction"]
    original, regions, masked, _ = strip.split(64, dim=3)
    outlined = (regions == 1).all(1, keepdim=True)
    assert outlined.any()
    assert torch.equal(regions, original.masked_fill(outlined, 1.0))
    assert not torch.equal(masked, original)


@pytest.mark.parametrize(("name", "dim", "heads"), [("vit_small_patch16", 384, 6), ("vit_tiny_patch16", 192, 3)])
def test_the_decoder_is_as_wide_as_the_encoder(name, dim, heads):
    decoder = MAE(build_encoder(name, size=32)).decoder  # 384 and 6 on ViT-S are the paper's (G2LL)
    assert [(block.attn.num_heads, block.mlp.fc1.in_features) for block in decoder.blocks] == [(heads, dim)] * 2
