"""EC equals a loop over images with kernels of their true size, and keeps what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewmask.pretrain.exterior_conversion import ConvertedViews, ExteriorConversion, draw_layer
from fewmask.types import Batch, UserError

NAMES = ["gin", "randconv"]


def norms(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.double(), dim=(1, 2, 3))


def own_kernel(weight: torch.Tensor) -> torch.Tensor:
    """The smallest centred window that holds all weights which are not zero."""
    while weight.shape[-1] > 1 and weight[..., 1:-1, 1:-1].abs().sum() == weight.abs().sum():
        weight = weight[..., 1:-1, 1:-1]
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_the_loop_over_its_images(name):
    image, conversion = torch.randn(5, 3, 12, 10), ExteriorConversion(name)
    torch.manual_seed(3)
    batched = conversion(image)
    torch.manual_seed(3)
    alpha, layers = torch.rand(5), conversion.draw_layers(5)
    for i, picture in enumerate(image):
        x = picture[None]
        for number, layer in enumerate(layers):
            kernel = own_kernel(layer.weight[i])
            x = F.conv2d(x, kernel, layer.bias[i], padding=kernel.shape[-1] // 2)
            if number < len(layers) - 1:
                x = torch.where(x > 0, x, 0.01 * x)
        x = x * picture.norm() / x.norm()
        expected = alpha[i] * x[0] + (1 - alpha[i]) * picture
        torch.testing.assert_close(batched[i], expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64, torch.float16]), st.integers(0, 2**31),
)  # fmt: skip
def test_shape_norm_and_dtype_are_kept(name, num, height, width, dtype, seed):
    torch.manual_seed(seed)
    image = torch.randn(num, 3, height, width).to(dtype)
    conversion = ExteriorConversion(name)
    converted = conversion.convert(image)
    assert (converted.shape, converted.dtype) == (image.shape, dtype)
    torch.testing.assert_close(norms(converted), norms(image), rtol=5e-3, atol=1e-3)
    mixed = conversion(image)
    assert (mixed.shape, mixed.dtype) == (image.shape, dtype)
    assert (norms(mixed) <= norms(image) * 1.005 + 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_each_image_has_a_conversion_of_its_own(name):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 8, 8).expand(6, -1, -1, -1)
    converted = ExteriorConversion(name).convert(image)
    distances = torch.cdist(converted.flatten(1), converted.flatten(1))
    assert (distances + torch.eye(6) > 0.1).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_picture_stays_finite(name):
    assert ExteriorConversion(name)(torch.zeros(2, 3, 8, 8)).isfinite().all()


def test_gin_layers_have_the_published_sizes_and_law():
    torch.manual_seed(0)
    layers = ExteriorConversion("gin").draw_layers(2000)
    assert [tuple(layer.weight.shape[1:]) for layer in layers] == [
        (2, 3, 3, 3),
        (2, 2, 3, 3),
        (2, 2, 3, 3),
        (3, 2, 3, 3),
    ]
    for layer in layers:
        small = (layer.weight.abs().amax((1, 2)) > 0).flatten(1).sum(1) == 1
        assert 0.45 < small.float().mean() < 0.55
        assert layer.weight[~small].std().item() == pytest.approx(1, abs=0.03)
        assert layer.bias.std().item() == pytest.approx(1, abs=0.05)


def test_randconv_uses_every_kernel_and_keeps_the_scale():
    torch.manual_seed(0)
    layer = draw_layer(4000, 3, 3, (1, 3, 5, 7), scaled=True)
    used = (layer.weight.abs().amax((1, 2)) > 0).flatten(1).sum(1)
    for kernel in (1, 3, 5, 7):
        chosen = used == kernel**2
        assert 0.22 < chosen.float().mean() < 0.28
        energy = layer.weight[chosen].square().sum((2, 3, 4)).mean().item()
        assert energy == pytest.approx(1, abs=0.1)


def test_views_keep_their_picture_and_add_the_converted_one():
    batch = Batch(torch.randn(2, 3, 8, 8), ["a", "b"], extra={"map": torch.ones(1)})
    torch.manual_seed(0)
    out = ConvertedViews(lambda b: b, ExteriorConversion())(batch)
    torch.manual_seed(0)
    assert torch.equal(out.extra["converted"], ExteriorConversion()(batch.image))
    assert torch.equal(out.image, batch.image)
    assert set(out.extra) == {"map", "converted"}


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="cannot have 0 layers"):
        ExteriorConversion(num_layers=0)
