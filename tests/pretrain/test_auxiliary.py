"""Auxiliary tasks in pre-training mode: settings reach the task, and what is trained is the encoder."""

from __future__ import annotations

import inspect

import pytest
import torch

from fewmask.auxiliary import AUXILIARY
from fewmask.pretrain import PRETRAINERS
from fewmask.pretrain.auxiliary import Auxiliary
from fewmask.registry import build
from fewmask.types import UserError
from tests.auxiliary.tiny import TinyTrunk, raw_batch


def objective(name: str, **settings) -> Auxiliary:
    torch.manual_seed(0)
    return build(PRETRAINERS[name], settings, "pretrain.method", encoder=TinyTrunk())


@pytest.fixture(params=AUXILIARY)
def name(request):
    return request.param


def test_loss_and_pictures_are_the_tasks_on_the_encoder(name):
    subject = objective(name)
    torch.manual_seed(1)
    batch = subject.views()(raw_batch())
    expected = subject.task(subject.encoder, batch)
    assert {key: value.item() for key, value in subject(batch).items()} == {k: v.item() for k, v in expected.items()}
    subject.eval()
    shown = subject.preview(batch)
    with torch.no_grad():
        expected = subject.task.preview(subject.encoder, batch)
    assert all(torch.equal(shown[key], expected[key]) for key in expected)


def test_the_product_is_the_encoder_and_it_is_trained(name):
    subject = objective(name)
    product = subject.product()
    assert product is subject.encoder
    before = product.stages[0].weight.detach().clone()
    optimiser = torch.optim.SGD(subject.parameters(), 0.1)
    subject(subject.views()(raw_batch()))["loss"].backward()
    optimiser.step()
    assert not torch.equal(before, product.stages[0].weight)


def test_the_state_holds_each_tensor_once(name):
    addresses = [value.data_ptr() for value in objective(name).state_dict().values() if value.numel()]
    assert len(addresses) == len(set(addresses))


def test_masks_are_asked_for_where_the_task_needs_them(name):
    assert objective(name).needs_masks is (name == "boundary_distance")


def test_settings_are_the_tasks_own_without_encoder_and_size(name):
    own = list(inspect.signature(AUXILIARY[name]).parameters)
    assert own[:2] == ["encoder", "size"]
    assert list(inspect.signature(PRETRAINERS[name]).parameters) == ["encoder", *own[2:]]
    with pytest.raises(UserError, match=rf"Unknown setting 'pretrain.method.size'. Valid ones: {', '.join(own[2:])}\."):
        objective(name, size=64)


def test_a_setting_reaches_the_task_with_its_type():
    subject = objective("jigsaw", num_permutations=5, crop_scale=[0.9, 1], augment=["flip"])
    assert subject.task.head.out_features == 5
    assert subject.task.augmentation.crop_scale == (0.9, 1.0)
    assert subject.task.augmentation.kinds == {"flip"}
    with pytest.raises(UserError, match=r"'pretrain.method.num_permutations' cannot be 'many'"):
        objective("jigsaw", num_permutations="many")
    with pytest.raises(UserError, match=r"'pretrain.method.augment' cannot be"):
        objective("jigsaw", augment=["twirl"])


def test_views_are_of_the_encoders_size():
    torch.manual_seed(0)
    subject = build(PRETRAINERS["rotation"], {}, "pretrain.method", encoder=TinyTrunk(48))
    assert subject.views()(raw_batch()).image.shape == (4, 3, 48, 48)
