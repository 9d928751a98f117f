"""What every auxiliary task owes both modes; a new line of the table is tested by being there."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from fewmask.auxiliary import AUXILIARY
from fewmask.auxiliary.augmentation import Augmentation
from fewmask.data.augment import PlainViews
from fewmask.models import build_encoder
from fewmask.types import UserError
from tests.auxiliary.tiny import SIZE, TinyTrunk, make, raw_batch


def viewed(task, num: int = 4, seed: int = 0):
    torch.manual_seed(seed)
    return task.views()(raw_batch(num))


@pytest.fixture(params=AUXILIARY)
def name(request):
    return request.param


def test_key_file_and_class_share_a_name(name):
    task = AUXILIARY[name]
    assert (task.name, inspect.getmodule(task).__name__.split(".")[-1]) == (name, name)
    assert task.__name__ == "".join(word.capitalize() for word in name.split("_"))


def test_properties_differ():
    assert len({task.property_ for task in AUXILIARY.values()}) == len(AUXILIARY)


def test_views_are_normalised_pictures_of_the_size_and_leave_the_raw_batch_alone(name):
    task, _ = make(name)
    raw = raw_batch()
    kept = copy.deepcopy(raw)
    seen = task.views()(raw)
    assert (seen.image.shape, seen.image.dtype) == ((4, 3, SIZE, SIZE), torch.float32)
    assert -2.2 < seen.image.min() < seen.image.max() < 2.7
    assert seen.extra
    assert all(len(target) == 4 for target in seen.extra.values())
    assert (seen.mask is not None) == task.needs_masks  # a mask that did not move with its picture would be wrong
    assert torch.equal(raw.image, kept.image)
    assert torch.equal(raw.mask, kept.mask)


def test_views_are_a_function_of_the_seed(name):
    task, _ = make(name)
    first, again, other = viewed(task, seed=1), viewed(task, seed=1), viewed(task, seed=2)
    assert torch.equal(first.image, again.image)
    assert all(torch.equal(first.extra[key], again.extra[key]) for key in first.extra)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("encoder", ["tiny", "vit_tiny_patch16"])
def test_loss_is_finite_and_its_gradient_reaches_trunk_and_head(name, encoder):
    task, trunk = make(name, None if encoder == "tiny" else build_encoder(encoder, size=SIZE))
    terms = task(trunk, viewed(task))
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())
    assert [key for key, value in terms.items() if value.requires_grad] == ["loss"]
    terms["loss"].backward()
    # A convolution's bias before a normalisation has no effect.
    idle = {"stages.0.bias", "stages.1.bias"}
    for module in (trunk, task):
        dead = {key for key, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert dead <= idle


def test_the_trunk_is_no_part_of_the_task(name):
    task, trunk = make(name)
    assert not {id(p) for p in task.parameters()} & {id(p) for p in trunk.parameters()}
    assert task(TinyTrunk(), viewed(task))["loss"] != task(trunk, viewed(task))["loss"]


def test_a_tiny_batch_overfits(name):
    task, trunk = make(name)
    batch = viewed(task)
    optimiser = torch.optim.Adam([*task.parameters(), *trunk.parameters()], 5e-3)
    losses = []
    for _ in range(100):
        loss = task(trunk, batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # What was painted over with noise cannot be restored pixel by pixel from three convolutions.
    assert losses[-1] < (0.35 if name in ("restoration", "boundary_distance") else 0.05) * losses[0]


def test_the_loss_is_taken_in_full_precision_under_autocast(name):
    task, trunk = make(name)
    batch = viewed(task)
    full = task(trunk, batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        half = task(trunk, batch)["loss"]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.05)


def test_preview_is_pictures_and_leaves_the_generator_alone(name):
    task, trunk = make(name)
    batch, before = viewed(task, 2), torch.get_rng_state()
    with torch.no_grad():
        pictures = task.eval().preview(trunk.eval(), batch)
    assert torch.equal(before, torch.get_rng_state())
    for picture in pictures.values():
        assert (len(picture), *picture.shape[1:3]) == (2, 3, SIZE)
        assert 0 <= picture.min() <= picture.max() <= 1


def test_an_augmentation_that_spoils_the_target_is_refused(name):
    for kind in AUXILIARY[name].conflicts:
        with pytest.raises(UserError, match=rf"'{name}' cannot be combined with the augmentation '{kind}'"):
            make(name, augment=[kind])
    task, _ = make(name)
    assert not task.augmentation.kinds & task.conflicts


def test_what_would_spoil_a_target_is_named():
    # With both flips a picture and the same turned by 180 degrees are equally likely; so the turn could not be told.
    assert AUXILIARY["rotation"].conflicts == {"rotation", "vertical_flip"}
    assert AUXILIARY["restoration"].conflicts == {"colour"}


def test_views_are_made_on_the_batchs_device(name):
    task, _ = make(name)
    batch = task.see(raw_batch().to("meta"))  # operations refuse to mix devices
    assert {tensor.device.type for tensor in (batch.image, *batch.extra.values())} == {"meta"}


def test_without_augmentation_the_picture_is_the_plain_view(name):
    task, _ = make(name, augment=[])
    moved = task.augmentation.move(raw_batch())
    plain = Augmentation(SIZE, frozenset()).move(raw_batch())
    assert torch.equal(moved, plain)
    torch.testing.assert_close(plain[:, 3:], PlainViews(SIZE)(raw_batch()).mask)


@pytest.mark.parametrize(("name", "settings", "sentence"), [
    ("jigsaw", {"num_permutations": 1}, "'num_permutations' cannot be 1"),
    ("jigsaw", {"num_permutations": 1001}, "from 2 to 1000"),
    ("jigsaw", {"num_permutations": 2.5}, "'method.num_permutations' cannot be 2.5"),
    ("jigsaw", {"gap": -0.1}, "'gap' cannot be -0.1"),
    ("jigsaw", {"cell_dim": 0}, "'cell_dim' cannot be 0"),
    ("contrastive", {"temperature": 0.0}, "'temperature' cannot be 0.0"),
    ("contrastive", {"projector_dim": 0}, "'projector_dim' cannot be 0"),
    ("restoration", {"shuffle": 1.5}, "'shuffle' cannot be 1.5"),
    ("restoration", {"outpaint_share": -1.0}, "'outpaint_share' cannot be -1.0"),
    ("boundary_distance", {"radius": 0.0}, "'radius' cannot be 0.0"),
    ("rotation", {"augment": ["spin"]}, "'method.augment' cannot be"),
    ("rotation", {"crop_scale": [0.0, 1.0]}, "'crop_scale' cannot be"),
    ("rotation", {"turns": 3}, "Unknown setting 'method.turns'. Valid ones: augment, crop_scale"),
])  # fmt: skip
def test_bad_settings_are_told_in_a_sentence(name, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(name, **settings)
