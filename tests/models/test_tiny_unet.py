"""The tiny network keeps to its bounds, states its features truly, learns, and can be pre-trained on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewmask.losses import cross_entropy_dice
from fewmask.models import build_encoder, build_segmenter, load_model, save_model
from fewmask.models.complexity import complexity
from fewmask.models.tiny_unet import TinyUnet
from fewmask.pretrain.simmim import SimMIM
from fewmask.types import Batch, UserError


def tiny(size: int = 64, **encoder_settings: object) -> TinyUnet:
    torch.manual_seed(0)
    segmenter = build_segmenter("tiny_unet", build_encoder("tiny", size=size, **encoder_settings))
    assert isinstance(segmenter, TinyUnet)
    return segmenter


def test_the_stated_bounds_hold():
    cost = complexity(tiny(256), 256)
    assert cost["num_parameters"] <= 100_000
    assert cost["gmacs"] <= 0.1


@pytest.mark.parametrize("size", [64, 128, 256])
def test_logits_and_features_have_the_stated_sizes(size):
    segmenter = tiny(size).eval()
    with torch.no_grad():
        output = segmenter(torch.randn(1, 3, size, size))
        encoded = segmenter.encoder(torch.randn(1, 3, size, size))
    assert output.logits.shape == (1, 1, size, size)
    assert [size // f.shape[-1] for f in output.features] == [2, 4, 8, 16]
    assert [f.shape[1] for f in output.features] == [16, 32, 48, 64]
    assert [size // f.shape[-1] for f in encoded] == list(segmenter.encoder.strides)
    assert [f.shape[1] for f in encoded] == list(segmenter.encoder.channels)


def test_the_picture_s_mean_reaches_every_pixel():
    # In training mode batch normalisation would carry it too.
    segmenter = tiny(512).eval()
    image = torch.randn(1, 3, 512, 512, requires_grad=True)
    segmenter(image).logits[..., 0, 0].sum().backward()
    assert image.grad[..., -32:, -32:].abs().sum() > 0


def test_every_parameter_learns():
    segmenter = tiny()
    segmenter(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    assert [n for n, p in segmenter.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_tiny_batch_is_learnt_by_heart():
    segmenter = tiny()
    image = torch.randn(2, 3, 64, 64) * 0.1
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 10:40, 12:50] = 1
    mask[1, :, 30:60, 5:25] = 1
    image = image + mask
    optimiser = torch.optim.AdamW(segmenter.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy_dice(segmenter(image).logits, mask, 0.5)["loss"].backward()
        optimiser.step()
    with torch.no_grad():
        found = segmenter(image).logits > 0
    assert 2 * (found & mask.bool()).sum() / (found.sum() + mask.sum()) > 0.9


def test_training_works_in_mixed_precision():
    segmenter = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        logits = segmenter(torch.randn(2, 3, 64, 64)).logits
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())


def test_a_saved_one_comes_back(tmp_path: Path):
    torch.manual_seed(0)
    encoder = build_encoder("tiny", size=32, channels=(8, 8, 16, 16), num_blocks=(1, 0, 1))
    segmenter = build_segmenter("tiny_unet", encoder, decoder_channels=(16, 8, 8)).eval()
    save_model(tmp_path / "model.safetensors", segmenter)
    again, _ = load_model(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image).logits, segmenter(image).logits)


def test_the_encoder_can_be_pretrained_and_given_on(tmp_path: Path):
    torch.manual_seed(0)
    objective = SimMIM(build_encoder("tiny", size=32), mask_patch=8)
    batch = Batch(torch.randn(4, 3, 32, 32), ["a", "b", "c", "d"])
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        torch.manual_seed(1)
        optimiser.zero_grad()
        losses.append(objective(batch)["loss"])
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    save_model(tmp_path / "model.safetensors", objective.product())
    encoder = build_encoder("tiny", str(tmp_path / "model.safetensors"), size=64)
    assert torch.equal(encoder.stages[0][0].weight, objective.encoder.stages[0][0].weight)


@pytest.mark.parametrize(
    ("encoder", "encoder_settings", "settings", "sentence"),
    [
        ("resnet18", {}, {}, "'tiny_unet' needs its own encoder, not 'resnet18': choose model.encoder='tiny'"),
        ("tiny", {"size": 40}, {}, "image size of 40 .* 'tiny', which needs a multiple of 16: choose 32 or 48"),
        ("tiny", {"channels": (16, 0, 48, 64)}, {}, "widths of at least 1"),
        ("tiny", {"num_blocks": (0, -1, 2)}, {}, "at least 0, and cannot be"),
        ("tiny", {"channels": (16, 32)}, {}, "'model.encoder_settings.channels' cannot be"),
        ("tiny", {}, {"decoder_channels": (48, 0, 16)}, "decoder_channels' needs 3 widths"),
        ("tiny", {"weights": "packaged"}, {}, "no package with weights for the encoder 'tiny'"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(encoder, encoder_settings, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build_segmenter("tiny_unet", build_encoder(encoder, **{"size": 64, **encoder_settings}), **settings)
