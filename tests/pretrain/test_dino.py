"""DINO pairs every crop with every other crop of the teacher, and with no other."""

from __future__ import annotations

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.pretrain.dino import DINO
from fewmask.types import Batch, UserError
from tests.pretrain.pictures import SIZE, SMALL, raw_batch


def dino(encoder: str = "vit_tiny_patch16", **settings) -> DINO:
    torch.manual_seed(0)
    subject = DINO(build_encoder(encoder, size=SIZE), **SMALL | settings)
    with torch.no_grad():
        for parameter in subject.teacher.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        subject.centre.value.normal_(std=0.1)
    return subject


def seen(subject: DINO, num: int = 3) -> Batch:
    torch.manual_seed(1)
    return subject.views()(raw_batch(num))


def feature(encoder, crop: torch.Tensor) -> torch.Tensor:
    return encoder.tokens(crop[None])[:, 0] if encoder.kind == "vit" else encoder(crop[None])[-1].mean((2, 3))


@torch.no_grad()
def literal_loss(subject: DINO, batch: Batch) -> float:
    """Algorithm 1 of the paper, one pair of crops of one image at a time."""
    total, pairs = 0.0, 0
    for i in range(len(batch.image)):
        crops = [
            batch.image[i],
            batch.extra["second"][i],
            *batch.extra.get("local", torch.empty(len(batch.image), 0))[i],
        ]
        for a in range(2):
            scores = subject.teacher.projector(feature(subject.teacher.encoder, crops[a]))[0]
            p = ((scores - subject.centre.value[0]) / subject.tau_t).softmax(0)
            for b, crop in enumerate(crops):
                if a != b:
                    answer = subject.projector(feature(subject.encoder, crop))[0]
                    total -= (p * (answer / subject.tau_s).log_softmax(0)).sum().item()
                    pairs += 1
    return total / pairs


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16", "resnet18"])
@pytest.mark.parametrize("num_local", [0, 2])
def test_the_loss_is_the_mean_over_pairs_of_different_crops(encoder, num_local):
    subject = dino(encoder, num_local=num_local).eval()
    batch = seen(subject)
    assert subject(batch)["loss"].item() == pytest.approx(literal_loss(subject, batch), rel=1e-4)


def test_gradient_reaches_the_student_only_and_the_last_layer_when_it_is_free():
    subject = dino()
    batch = seen(subject)
    for progress, free in ((0.0, False), (0.02, True)):
        subject.zero_grad()
        subject(batch)["loss"].backward()
        subject.before_step(progress)
        assert all(p.grad is None for p in subject.teacher.parameters())
        assert all(p.grad.abs().sum() > 0 for p in subject.encoder.parameters())
        assert (subject.projector.prototypes.grad is not None) is free


def test_the_centre_moves_in_training_and_the_teacher_after_a_step():
    subject = dino(momentum=0.5)
    batch, centre = seen(subject), subject.centre.value.clone()
    scores = subject.teacher.scores(torch.cat([batch.image, batch.extra["second"]]))
    subject(batch)
    torch.testing.assert_close(subject.centre.value, 0.9 * centre + 0.1 * scores.mean(0, keepdim=True))
    old = subject.teacher.encoder.body.cls_token.clone()
    subject.after_step(0.0)
    torch.testing.assert_close(subject.teacher.encoder.body.cls_token, (old + subject.encoder.body.cls_token) / 2)


def test_either_encoder_can_be_kept():
    assert (subject := dino()).product() is subject.encoder
    assert (subject := dino(keep="teacher")).product() is subject.teacher.encoder


def test_global_crops_cover_what_the_code_advises_with_and_without_local_ones():
    for num_local, scale in ((0, (0.14, 1.0)), (2, (0.4, 1.0))):
        assert dino(num_local=num_local).views().scale == scale
    assert dino(crop_scale=(0.3, 0.9)).views().scale == (0.3, 0.9)


def test_local_crops_are_whole_strides():
    assert dino(num_local=1).crop_views.local_size == 16
    assert dino("resnet18", num_local=1).crop_views.local_size == 32
    for size in (20, 80):
        with pytest.raises(UserError, match="a multiple of 16 and at most 64"):
            dino(num_local=1, local_size=size)


def test_preview_shows_both_crops():
    subject = dino().eval()
    strip = subject.preview(seen(subject))["crops"]
    assert strip.shape == (3, 3, SIZE, 2 * SIZE)
    assert 0 <= strip.min() <= strip.max() <= 1


def test_bad_batches_are_told():
    subject = dino()
    with pytest.raises(UserError, match="this batch holds one image"):
        subject(seen(subject, 1))
    with pytest.raises(UserError, match="pass it through its views"):
        subject(Batch(torch.zeros(2, 3, SIZE, SIZE), ["a", "b"]))
