"""What every way of fine-tuning promises; a new line in the table is tested for free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewmask.finetune import FINETUNERS
from fewmask.types import Batch, SegOutput, UserError

SIZE = 16


class TinySegmenter(nn.Module):
    """A convolution, a BatchNorm and dropout as encoder, one convolution as decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.decoder = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, image: torch.Tensor) -> SegOutput:
        features = self.encoder(image)
        return SegOutput(self.decoder(features.relu()), [features])


def raw_batch(num: int = 4) -> Batch:
    """Dark squares on noise; the mask is the square."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(120, 256, (num, 3, SIZE + 2, SIZE + 2), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(num, 1, SIZE + 2, SIZE + 2, dtype=torch.uint8)
    for i in range(num):
        mask[i, :, 2 + i : 10 + i, 4:12] = 255
    return Batch(torch.where(mask.bool(), 30, image).to(torch.uint8), [str(i) for i in range(num)], mask)


def make(name: str, **settings):
    torch.manual_seed(0)
    return FINETUNERS[name](TinySegmenter(), size=SIZE, **settings)


def train(objective, num_steps: int, lr: float = 0.02) -> list[float]:
    """Train on fresh views of one batch; return the losses."""
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr)
    objective.train()
    losses = []
    for step in range(num_steps):
        loss = objective(objective.views()(raw_batch()))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        objective.after_step(step / num_steps)
        losses.append(loss.item())
    return losses


# Joint training needs an encoder of this package and a second batch: test_joint.py holds it to the same promises.
@pytest.fixture(params=[name for name in FINETUNERS if name != "joint"])
def name(request):
    return request.param


def test_the_loss_is_finite_and_its_gradient_reaches_encoder_and_decoder(name):
    objective = make(name)
    out = objective(objective.views()(raw_batch()))
    assert all(value.ndim == 0 and value.isfinite() for value in out.values())
    assert [term for term, value in out.items() if value.requires_grad] == ["loss"]
    out["loss"].backward()
    # Not the convolution's bias: the BatchNorm after it takes the mean away, so its gradient is zero.
    for part in (objective.segmenter.encoder[-1], objective.segmenter.decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert objective.segmenter.encoder[0].weight.grad.abs().sum() > 0


def test_a_frozen_encoder_neither_learns_nor_drifts(name):
    objective = make(name, freeze_encoder=True)
    before = copy.deepcopy(objective.segmenter.encoder.state_dict())
    decoder = objective.segmenter.decoder.weight.detach().clone()
    objective.eval()
    train(objective, 3)
    assert all(p.grad is None for p in objective.segmenter.encoder.parameters())
    for key, value in objective.segmenter.encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(objective.segmenter.decoder.weight, decoder)
    image = objective.views()(raw_batch()).image
    assert torch.equal(objective.segmenter.encoder(image), objective.segmenter.encoder(image))  # no dropout


def test_the_state_round_trips(name):
    objective = make(name, average=0.9)
    train(objective, 3)
    other = make(name, average=0.9)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    for run in (objective, other):
        torch.manual_seed(1)
        train(run, 2)
    for key, value in objective.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, msg=key)


def test_no_tensor_is_in_the_state_twice(name):
    objective = make(name, average=0.9, freeze_encoder=True)
    addresses = [value.data_ptr() for value in objective.state_dict().values()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("augment", ["none", "flips"])
def test_a_tiny_batch_overfits(name, augment):
    objective = make(name, augment=augment)
    losses = train(objective, 80)
    assert losses[-1] < 0.2 * losses[0]
    product = objective.product().eval()
    batch = make(name, augment="none").views()(raw_batch())
    assert ((product(batch.image).logits > 0) == (batch.mask >= 0.5)).float().mean() > 0.97


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_product_maps_pictures_to_logits_of_their_size(name, average):
    objective = make(name, average=average)
    train(objective, 1)
    logits = objective.product()(objective.views()(raw_batch(3)).image).logits
    assert logits.shape == (3, 1, SIZE, SIZE)
    assert logits.isfinite().all()


def test_a_batch_without_masks_is_refused(name):
    objective = make(name)
    batch = raw_batch()
    with pytest.raises(UserError, match="needs a mask"):
        objective(objective.views()(Batch(batch.image, batch.names)))


def test_the_preview_shows_pictures_in_range(name):
    objective = make(name)
    for picture in objective.preview(objective.views()(raw_batch())).values():
        assert picture.shape == (4, 3, SIZE, SIZE)
        assert 0 <= picture.min() <= picture.max() <= 1
