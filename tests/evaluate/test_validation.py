"""The validation score against the metrics, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewmask.data.preprocess import denormalise
from fewmask.evaluate.metrics import case_metrics
from fewmask.evaluate.validation import Validation, dice_and_iou
from fewmask.types import SegOutput, UserError

from .masks import Mask, disk, mask_pairs


@dataclass
class Cached:
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8] | None


class Red(nn.Module):
    """A segmenter that calls lesion what is more than half red."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.frozen = nn.BatchNorm2d(1)

    def forward(self, image: Tensor) -> SegOutput:
        self.modes.append(self.training)
        return SegOutput(20 * (denormalise(image)[:, :1] - 0.5), [])


def make_cached(num: int, size: int) -> Cached:
    rng = np.random.default_rng(0)
    truths = np.stack([disk(size, rng.uniform(10, size - 10, 2), rng.uniform(0, 12)) for _ in range(num)])
    truths[0] = False
    images = np.zeros((num, size, size, 3), dtype=np.uint8)
    for i, truth in enumerate(truths):
        images[i, ..., 0] = 255 * (np.roll(truth, i, axis=1) ^ (rng.random(truth.shape) < 0.01 * (i % 3)))
    return Cached(images, truths.astype(np.uint8) * 255)


@given(mask_pairs())
def test_dice_and_iou_are_those_of_the_metrics(pair: tuple[Mask, Mask]) -> None:
    dice, iou = dice_and_iou(*(torch.from_numpy(mask)[None, None] for mask in pair))
    metrics = case_metrics(*pair)
    assert dice.item() == pytest.approx(metrics["dice"], abs=1e-12)
    assert iou.item() == pytest.approx(metrics["iou"], abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_score_is_the_mean_of_the_cases_asked_for(batch_size: int) -> None:
    cached, indices = make_cached(9, 40), [7, 0, 2, 3]
    metrics = [case_metrics(cached.images[i, ..., 0] > 127, cached.masks[i] > 127) for i in indices]
    result = Validation(cached, indices, 40, batch_size=batch_size)(Red())
    assert result["score"] == result["dice"] == pytest.approx(np.mean([m["dice"] for m in metrics]))
    assert result["iou"] == pytest.approx(np.mean([m["iou"] for m in metrics]))


def test_images_and_masks_are_reduced_alike() -> None:
    cached = Cached(np.zeros((1, 60, 60, 3), np.uint8), (disk(60, (30, 25), 14) * np.uint8(255))[None])
    cached.images[0, ..., 0] = cached.masks[0]
    assert Validation(cached, [0], 48)(Red())["score"] == 1


def test_every_part_of_the_segmenter_keeps_its_mode() -> None:
    validation, segmenter = Validation(make_cached(3, 32), [0, 1, 2], 32), Red()
    for mode in (True, False):
        segmenter.train(mode)
        segmenter.frozen.eval()
        validation(segmenter)
        assert segmenter.training is mode
        assert segmenter.frozen.training is False
    assert segmenter.modes == [False, False]


def test_the_loss_is_the_mean_over_images_whatever_the_batches() -> None:
    cached = make_cached(5, 32)
    losses = [
        Validation(cached, range(5), 32, batch_size=size, loss=F.binary_cross_entropy_with_logits)(Red())["val_loss"]
        for size in (1, 2, 5)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[0] > 0


def test_nothing_to_validate_on_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="val"):
        Validation(make_cached(2, 32), [], 32)
    with pytest.raises(UserError, match="val"):
        Validation(Cached(np.zeros((2, 8, 8, 3), np.uint8), None), [0], 8)


class Blur(Red):
    """A segmenter whose convolution obeys autocast, and that writes down in what precision it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        nn.init.constant_(self.blur.weight, 1 / 27)
        self.dtypes: list[torch.dtype] = []

    def forward(self, image: Tensor) -> SegOutput:
        blurred = self.blur(image)
        self.dtypes.append(blurred.dtype)
        return SegOutput(20 * blurred[:, :1], [])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_runs_in_the_precision_of_the_training(precision: str, dtype: torch.dtype) -> None:
    cached, network = make_cached(6, 40), Blur()
    score = Validation(cached, range(6), 40, precision=precision)(network)["score"]
    assert set(network.dtypes) == {dtype}
    assert score == pytest.approx(Validation(cached, range(6), 40)(network)["score"], abs=0.02)


@pytest.mark.parametrize(("room", "reads"), [(1e9, 3), (100, 6)])
def test_a_small_set_is_read_once_and_scored_alike(room: float, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewmask.evaluate.validation.KEPT_BYTES", room)
    cached, found = make_cached(9, 40), []

    class Counted:
        def __getitem__(self, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
            found.append(chosen)
            return cached.images[chosen]

    validation = Validation(Cached(Counted(), cached.masks), range(9), 32, batch_size=3)  # type: ignore[arg-type]
    assert validation(Red()) == validation(Red())
    assert len(found) == reads
