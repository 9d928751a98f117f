"""Supervised pre-training: the smoothed cross-entropy over the images whose label is known."""

from __future__ import annotations

import math

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.pretrain.supervised import Supervised
from fewmask.types import Batch, UserError
from tests.pretrain.pictures import SIZE, raw_batch


def supervised(encoder: str = "vit_tiny_patch16", **settings) -> Supervised:
    torch.manual_seed(0)
    return Supervised(build_encoder(encoder, size=SIZE), **{"num_classes": 3, **settings})


def batch_of(labels: list[int]) -> Batch:
    image = torch.randn(len(labels), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Batch(image, [""] * len(labels), label=torch.tensor(labels))


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16", "resnet18"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@torch.no_grad()
def test_the_loss_is_the_mean_over_known_labels(encoder, smoothing):
    subject = supervised(encoder, label_smoothing=smoothing).eval()
    subject.head.weight.mul_(50)
    labels = [0, -1, 2, 1, -1]
    batch, total, right = batch_of(labels), 0.0, 0
    for picture, label in zip(batch.image, labels, strict=True):
        if label >= 0:
            taught = subject.encoder
            feature = (
                taught.tokens(picture[None])[:, 0] if taught.kind == "vit" else taught(picture[None])[-1].mean((2, 3))
            )
            logits = subject.head(feature)[0].tolist()
            norm = math.log(sum(math.exp(x) for x in logits))
            target = [smoothing / 3 + (1 - smoothing) * (k == label) for k in range(3)]
            total -= sum(t * (x - norm) for t, x in zip(target, logits, strict=True))
            right += max(range(3), key=logits.__getitem__) == label
    terms = subject(batch)
    assert terms["loss"].item() == pytest.approx(total / 3, rel=1e-4)
    assert terms["accuracy"].item() == pytest.approx(right / 3)


def test_it_learns_two_classes_and_reaches_the_whole_encoder():
    subject, batch = supervised(num_classes=2), batch_of([0, 1, 0, 1])
    optimiser = torch.optim.AdamW(subject.parameters(), lr=3e-4)
    for _ in range(12):
        terms = subject(batch)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
    assert terms["accuracy"] == 1
    assert all(p.grad.abs().sum() > 0 for p in subject.parameters())


def test_views_keep_the_label():
    batch = supervised().views()(raw_batch())
    assert batch.image.shape == (3, 3, SIZE, SIZE)
    assert batch.label.tolist() == [0, 1, 0]


@pytest.mark.parametrize("label", [None, torch.tensor([-1, -1])])
def test_a_batch_without_labels_is_told(label):
    with pytest.raises(UserError, match="no image has a class label: fill the column 'label'"):
        supervised()(Batch(torch.zeros(2, 3, SIZE, SIZE), ["a", "b"], label=label))


def test_bad_settings_are_told():
    for num_classes in (0, 1):
        with pytest.raises(UserError, match=f"at least two classes, and the data has {num_classes}"):
            supervised(num_classes=num_classes)
    with pytest.raises(UserError, match="'label_smoothing' cannot be 1"):
        supervised(label_smoothing=1.0)
