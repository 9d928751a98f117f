"""A ViT on some of its patches is the ViT on all of them, restricted; positions follow the size of the image."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from fewmask.models import build_encoder
from fewmask.models.vit import Vit, sine_cosine
from fewmask.types import UserError


def tiny(size: int = 64, **settings: object) -> Vit:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16", size=size, **settings)
    assert isinstance(encoder, Vit)
    return encoder.eval()


@torch.no_grad()
def test_tokens_of_all_patches_are_the_last_feature():
    encoder, image = tiny(), torch.randn(2, 3, 64, 64)
    everything = torch.arange(16).expand(2, -1)
    kept = encoder.tokens(image, everything)
    torch.testing.assert_close(kept, encoder.tokens(image))
    torch.testing.assert_close(kept[:, 1:].transpose(1, 2).reshape(2, 192, 4, 4), encoder(image)[-1])


@torch.no_grad()
def test_visible_only_equals_attention_that_cannot_see_the_masked():
    encoder, image = tiny(), torch.randn(1, 3, 64, 64)
    keep = torch.tensor([[0, 3, 5, 10]])
    tokens = encoder.enter(encoder.embed(image), 4, 4)
    seen = torch.zeros(17, dtype=torch.bool)
    seen[0], seen[1 + keep[0]] = True, True
    for block in encoder.body.blocks:
        tokens = block(tokens, attn_mask=seen.expand(1, 1, 17, 17))
    expected = encoder.body.norm(tokens)[:, seen]
    torch.testing.assert_close(encoder.tokens(image, keep), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_output_does_not_depend_on_hidden_pixels():
    encoder, image = tiny(), torch.randn(1, 3, 64, 64)
    other = image.clone()
    other[..., :16, :16] = 7.0
    keep = torch.arange(1, 16)[None]
    assert torch.equal(encoder.tokens(image, keep), encoder.tokens(other, keep))


@pytest.mark.parametrize(
    ("size", "drop_path", "bf16", "tolerance"), [(64, 0.0, False, 1e-5), (96, 0.3, False, 1e-5), (64, 0.0, True, 2e-2)]
)
def test_the_global_feature_is_the_class_token_with_its_gradients(size, drop_path, bf16, tolerance):
    """The same number for number, dropped paths included, though the last block leaves the patches alone."""
    encoder, image = tiny(drop_path=drop_path).train(), torch.randn(8, 3, size, size)
    weight = torch.randn(8, 192)
    found = []
    for compute in (encoder.global_feature, lambda x: encoder.tokens(x)[:, 0]):
        torch.manual_seed(1)
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            feature = compute(image)
        (feature.float() * weight).sum().backward()
        found.append([feature.detach().float(), *(p.grad.clone() for p in encoder.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
        assert float(theirs.norm()) > 0


@torch.no_grad()
def test_last_feature_is_timms_own_with_the_same_weights():
    encoder, image = tiny(), torch.randn(2, 3, 64, 64)
    reference = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=192, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    reference.load_state_dict(encoder.body.state_dict())
    torch.testing.assert_close(encoder.tokens(image), reference(image))


def test_features_have_the_stated_strides_and_channels():
    encoder = tiny(out_blocks=(2, 12))
    features = encoder(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == list(encoder.channels) == [192, 192]
    assert [64 // f.shape[-1] for f in features] == list(encoder.strides) == [16, 16]


@pytest.mark.parametrize(("name", "blocks"), [("vit_tiny_patch8", [3, 6, 9, 12]), ("vit_micro_patch8", [2, 3, 5, 6])])
def test_features_come_from_the_end_of_each_quarter(name, blocks):
    encoder = build_encoder(name, size=32).eval()
    assert encoder.spec["settings"]["out_blocks"] == blocks
    image = torch.rand(1, 3, 32, 32)
    last = encoder.tokens(image)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(encoder(image)[-1], last)


@torch.no_grad()
def test_positions_of_another_size_keep_the_class_token_and_interpolate():
    encoder = tiny()
    assert encoder.positions(4, 4) is encoder.body.pos_embed
    encoder.body.pos_embed[:, 1:] = 3.0
    larger = encoder.positions(6, 6)
    assert torch.equal(larger[:, 0], encoder.body.pos_embed[:, 0])
    torch.testing.assert_close(larger[:, 1:], torch.full((1, 36, 192), 3.0))
    assert encoder(torch.randn(1, 3, 96, 96))[0].shape == (1, 192, 6, 6)


def test_sine_cosine_matches_its_definition():
    code = sine_cosine(5, 8)
    row, column = 3, 2
    angles = [10000 ** (-k / 2) for k in range(2)]
    expected = [f(p * a) for p in (column, row) for f in (math.sin, math.cos) for a in angles]
    torch.testing.assert_close(code[row * 5 + column], torch.tensor(expected))


def test_drop_path_changes_training_but_not_evaluation():
    image = torch.randn(4, 3, 64, 64)
    encoder = tiny(drop_path=0.9)
    with torch.no_grad():
        assert torch.equal(encoder.tokens(image), encoder.tokens(image))
        encoder.train()
        assert not torch.equal(encoder.tokens(image), encoder.tokens(image))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 100}, "image size of 100 .* multiple of 16: choose 96 or 112"),
        ({"out_blocks": (3, 13)}, "between 1 and 12"),
        ({"out_blocks": (6, 3)}, "'model.encoder_settings.out_blocks' must be rising block numbers"),
        ({"out_blocks": ()}, "rising block numbers"),
        ({"drop_path": 1.0}, "'model.encoder_settings.drop_path' is a probability below 1"),
        ({"droppath": 0.1}, "Unknown setting 'model.encoder_settings.droppath'. Valid ones: drop_path, out_blocks"),
        ({"drop_path": "much"}, "Setting 'model.encoder_settings.drop_path' cannot be 'much'"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(**settings)


def test_image_that_is_no_multiple_of_the_patch():
    with pytest.raises(UserError, match="image size of 72"):
        tiny()(torch.randn(1, 3, 72, 72))
