"""A training step in bf16 on an accelerator: nothing is left on the host, and the host is never waited for.

Gradients need a driver and are not looked at: they are where the values are that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fewmask.auxiliary import AUXILIARY
from fewmask.data.augment import Augment
from fewmask.distill import DISTILLERS
from fewmask.objective import Objective
from fewmask.types import Batch
from tests.distill import networks, test_distill
from tests.engine.far_device import FAR, FarDevice, move
from tests.finetune import test_joint
from tests.pretrain import test_contract


@contextmanager
def autocast() -> Iterator[None]:
    """Do what `torch.autocast("cuda", torch.bfloat16)` does where there is a GPU."""
    before = torch.get_autocast_dtype(FAR.type)
    torch.set_autocast_enabled(FAR.type, True)
    torch.set_autocast_dtype(FAR.type, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(FAR.type, False)
        torch.set_autocast_dtype(FAR.type, before)
        torch.clear_autocast_cache()


def step(objective: Objective, batch: Batch) -> dict[str, torch.Tensor]:
    """Do what the training loop does with a batch, but for the gradient; then look at a picture of it."""
    with FarDevice():
        move(objective)
        seen = objective.views()(batch.to(FAR))
        seen.image = seen.image.contiguous(memory_format=torch.channels_last)
        with autocast():
            terms = objective(seen)
        objective.after_step(0.5)
        with torch.no_grad():
            shown = objective.preview(seen)
        assert {tensor.device.type for tensor in [*terms.values(), *shown.values()]} == {FAR.type}
        assert terms["loss"].dtype == torch.float32
        assert {p.device.type for p in objective.product().parameters()} == {FAR.type}
    return terms


def is_far(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies on the stand-in and has no values to be waited for."""
    return isinstance(tensor, FakeTensor) and tensor.device.type == FAR.type


def test_the_stand_in_notices_what_a_gpu_would_not_do():
    with FarDevice():
        there, here = torch.ones(3, device=FAR), torch.ones(3)
        assert float((here * 2).sum()) == 6
        assert (there * 2).device.type == FAR.type
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(there.sum())
        with autocast():
            assert (torch.ones(2, 2, device=FAR) @ torch.ones(2, 2, device=FAR)).dtype == torch.bfloat16


@pytest.mark.parametrize(("method", "encoder"), test_contract.CASES)
def test_a_pretraining_step_stays_on_its_device(method, encoder):
    objective = test_contract.objective(method, encoder)
    assert is_far(step(objective, test_contract.loaded(objective, 3))["loss"])


@pytest.mark.parametrize("augment", get_args(Augment))
def test_a_fine_tuning_step_stays_on_its_device(augment):
    terms = step(test_joint.plain(average=0.9, augment=augment), test_joint.raw_batch(4))
    assert is_far(terms["loss"])


@pytest.mark.parametrize("task", AUXILIARY)
def test_a_joint_step_stays_on_its_device(task):
    terms = step(test_joint.joint(task), test_joint.paired_batch())
    assert is_far(terms["loss"])
    assert is_far(terms[task])


@pytest.mark.parametrize("loss", DISTILLERS)
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_a_distillation_step_stays_on_its_device(loss, num_teachers):
    objective = test_distill.make(num_teachers, losses={loss: {}}, pseudo_weight=1.0, average=0.9)
    known = {"has_mask": torch.tensor([True, False, True, False])}
    terms = step(objective, replace(networks.raw_batch(), extra=known))
    assert is_far(terms["loss"])
    assert is_far(terms[loss])
