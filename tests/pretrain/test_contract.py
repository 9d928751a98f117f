"""What every pre-training method owes the training loop; a new line of the table is tested by being there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewmask.auxiliary import AUXILIARY
from fewmask.models import build_encoder, build_segmenter
from fewmask.pretrain import PRETRAINERS
from fewmask.pretrain.figure import Figure
from fewmask.registry import build
from fewmask.types import Batch, UserError
from tests.pretrain.pictures import SMALL, raw_batch

ON_CNN = ("dino", "figure", "g2ll", "simmim", "supervised", "tedmae", *AUXILIARY)
CASES = [(name, "vit_tiny_patch16") for name in PRETRAINERS] + [(name, "efficientnet_lite0") for name in ON_CNN]
# Small heads, and for DINO no step in which its last layer stands still.
SETTINGS = {"dino": {**SMALL, "freeze_last": 0.0}, "g2ll": SMALL, "tedmae": SMALL}


def given(method: str, encoder: str) -> dict:
    """What the program supplies beside the recipe's settings."""
    built = build_encoder(encoder, size=64)
    if method == "figure":
        return {"segmenter": build_segmenter("unet" if built.kind == "cnn" else "transunet", built), "size": 64}
    return {"encoder": built, **({"num_classes": 2} if method == "supervised" else {})}


def objective(method: str, encoder: str = "vit_tiny_patch16", **settings):
    torch.manual_seed(0)
    return build(PRETRAINERS[method], {**SETTINGS.get(method, {}), **settings}, "method", **given(method, encoder))


def viewed(subject, num: int = 3, seed: int = 0) -> Batch:
    """A batch as the training loop hands it to the objective."""
    torch.manual_seed(seed)
    return subject.views()(loaded(subject, num))


def loaded(subject, num: int, side: int = 72) -> Batch:
    """A raw batch with what the method needs: a dark thing in the middle, or masks of what is bright."""
    batch = raw_batch(num, side)
    if isinstance(subject, Figure):
        batch.image[:, :, side // 3 : -side // 3, side // 3 : -side // 3] //= 8
    return replace(batch, mask=(batch.image[:, :1] > 127).byte() * 255) if subject.needs_masks else batch


def coloured_batch() -> Batch:
    """Two noisy pictures whose hidden colour the visible part tells; their mean colour is 0.9 (1.0 squared) off."""
    colours = torch.tensor([[1.5, 0.0, -1.0], [-1.5, 1.0, 0.5]])[:, :, None, None]
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Batch(colours + 0.2 * noise, ["a", "b"])


@pytest.mark.parametrize(("method", "encoder"), CASES)
def test_loss_is_finite_and_its_gradient_reaches_the_whole_product(method, encoder):
    subject = objective(method, encoder)
    terms = subject(viewed(subject))
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())
    terms["loss"].backward()
    learnt = [(name, p) for name, p in subject.product().named_parameters() if p.requires_grad]
    assert [name for name, p in learnt if p.grad is None or not p.grad.abs().sum() > 0] == []
    frozen = [p for p in subject.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize(("method", "encoder"), CASES)
def test_product_is_the_network_that_was_given(method, encoder):
    supplied = given(method, encoder)
    made = build(PRETRAINERS[method], SETTINGS.get(method, {}), "method", **supplied)
    assert made.product() is supplied["segmenter" if method == "figure" else "encoder"]


@pytest.mark.parametrize(("method", "encoder"), CASES)
def test_state_round_trips(method, encoder):
    first, second = objective(method, encoder), objective(method, encoder)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    second.load_state_dict(first.state_dict())
    losses = []
    for subject in (first, second):
        torch.manual_seed(3)
        losses.append(subject.eval()(viewed(subject))["loss"])
    assert torch.equal(*losses)


@pytest.mark.parametrize(("method", "encoder"), [case for case in CASES if case[0] in ("mae", "simmim")], ids="-".join)
def test_a_tiny_batch_overfits(method, encoder):
    subject, batch = objective(method, encoder), coloured_batch()
    optimiser = torch.optim.AdamW(subject.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(5)  # the same mask in every step
        loss = subject(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 < losses[0]  # the mean colour alone would not do


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("dino", {"loss": 0.3}),
        ("g2ll", {"reconstruction": 0.3, "distillation": 0.3}),
        ("tedmae", {"reconstruction": 0.3, "distillation": 0.3}),
        ("supervised", {"loss": 0.5}),  # of which its smoothed labels leave a third
    ],
)
def test_a_tiny_batch_of_views_overfits(method, least):
    subject, raw = objective(method, "efficientnet_lite0"), raw_batch(4)
    colours = torch.tensor([[220, 120, 40], [20, 180, 140], [120, 20, 220], [60, 60, 60]], dtype=torch.uint8)
    raw.image = (raw.image // 16 + colours[:, :, None, None]).clamp(0, 255)
    optimiser = torch.optim.AdamW(subject.parameters(), lr=1e-3)
    logged = []
    for step in range(15):
        torch.manual_seed(5)  # the same views, masks and conversions in every step
        terms = subject(subject.views()(raw))
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        subject.after_step(step / 15)
        logged.append({name: value.item() for name, value in terms.items()})
    for name, share in least.items():
        assert logged[-1][name] < share * logged[0][name]


@pytest.mark.parametrize("method", PRETRAINERS)
def test_loss_is_a_function_of_the_seed(method):
    subject, losses = objective(method).eval(), []
    for seed in (1, 1, 2):
        batch = viewed(subject, seed=seed)
        losses.append(subject(batch)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", PRETRAINERS)
def test_views_give_normalised_pictures_of_the_networks_size(method):
    subject = objective(method)
    batch = subject.views()(loaded(subject, 3, side=80))
    assert batch.image.shape == (3, 3, 64, 64)
    assert batch.image.dtype == torch.float32
    assert -2.2 < batch.image.min() < batch.image.max() < 2.7


@pytest.mark.parametrize(("method", "encoder"), CASES)
def test_preview_is_pictures_and_leaves_the_generator_alone(method, encoder):
    subject = objective(method, encoder)
    batch = viewed(subject, num=2)
    before = torch.get_rng_state()
    pictures = subject.eval().preview(batch)
    assert torch.equal(before, torch.get_rng_state())
    for picture in pictures.values():
        assert (len(picture), picture.shape[1], picture.shape[2]) == (2, 3, 64)
        assert 0 <= picture.min() <= picture.max() <= 1
        assert not picture.requires_grad


@pytest.mark.parametrize("method", PRETRAINERS)
def test_unknown_setting_lists_the_valid_ones(method):
    with pytest.raises(UserError, match=r"Unknown setting 'method.no_such'. Valid ones: "):
        objective(method, no_such=0.5)


@pytest.mark.parametrize(
    ("method", "encoder", "settings", "sentence"),
    [
        ("mae", "vit_tiny_patch16", {"mask_ratio": 0.0}, "mask ratio of 0.0 leaves nothing masked of the 16 patches"),
        ("mae", "vit_tiny_patch16", {"mask_ratio": 0.99}, "mask ratio of 0.99 leaves nothing visible"),
        ("mae", "vit_tiny_patch16", {"mask_ratio": -1.0}, "leaves nothing masked"),
        ("mae", "vit_tiny_patch16", {"decoder_heads": 5}, "192 wide with 2 blocks of 5 heads cannot be built"),
        ("mae", "vit_tiny_patch16", {"decoder_depth": 0}, "decoder_depth at least 1"),
        ("mae", "resnet18", {}, "'mae' needs a ViT encoder, but 'resnet18' is a cnn"),
        ("simmim", "resnet18", {"mask_patch": 48}, "'mask_patch' = 48 does not divide the image size 64"),
        ("simmim", "resnet18", {"mask_patch": 0}, "'mask_patch' = 0 does not divide"),
        ("simmim", "resnet18", {"mask_patch": 64}, "leaves nothing visible of the 1 patches"),
        ("simmim", "vit_tiny_patch16", {"mask_patch": 8}, "'mask_patch' = 8 is not a multiple of 16"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(method, encoder, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        objective(method, encoder, **settings)
