"""The stream of batches is a function of (seed, step) that shows every image equally often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewmask.data.cache import CachedDataset
from fewmask.data.loader import Loader
from fewmask.types import UserError


def dataset(num: int = 50, num_masks: int | None = None, side: int = 8) -> CachedDataset:
    """Return rows that can be told apart: image, mask and name hold the row's number."""
    numbers = np.arange(num, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (num, side, side, 3)).copy()
    images[..., 1] += 100
    has_mask = np.arange(num) < (num if num_masks is None else num_masks)
    labels = np.where(np.arange(num) % 3 == 0, -1, np.arange(num) % 3)
    return CachedDataset(images, images[..., 0].copy(), has_mask, [f"n{n}" for n in range(num)], labels, ("a", "b"))


@given(num=st.integers(1, 23), batch=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_each_epoch_of_positions_shows_each_image_once(num, batch, seed, epoch):
    loader = Loader(dataset(), range(10, 10 + num), batch, seed)
    first, last = epoch * num // batch, ((epoch + 1) * num - 1) // batch
    names = [name for step in range(first, last + 1) for name in loader.batch(step).names]
    start = epoch * num - first * batch
    assert sorted(names[start : start + num]) == sorted(f"n{n}" for n in range(10, 10 + num))
    assert all(len(loader.batch(step).names) == batch for step in range(3))


@given(steps=st.lists(st.integers(0, 40), min_size=1, max_size=10), seed=st.integers(0, 9))
def test_random_access_equals_sequential_reading(steps, seed):
    sequential = Loader(dataset(), range(17), 5, seed)
    stream = [sequential.batch(step).names for step in range(41)]
    jumping = Loader(dataset(), range(17), 5, seed)
    assert [jumping.batch(step).names for step in steps] == [stream[step] for step in steps]


@given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30))
def test_ranks_partition_the_global_batch(world, step):
    loader = Loader(dataset(), range(31), 12, seed=4)
    whole = loader.batch(step)
    parts = [loader.batch(step, rank, world) for rank in range(world)]
    assert [name for part in parts for name in part.names] == whole.names
    torch.testing.assert_close(torch.cat([part.image for part in parts]), whole.image)
    assert whole.share is None
    for part in parts:
        places = range(12) if part.share is None else part.share.places
        assert part.names == [whole.names[place] for place in places]
        assert part.share is None or part.share.total == 12


def test_image_mask_label_and_name_belong_together():
    batch = Loader(dataset(), range(50), 32, seed=0).batch(3)
    numbers = torch.tensor([int(name[1:]) for name in batch.names])
    assert batch.image.shape == (32, 3, 8, 8)
    assert batch.image.dtype == batch.mask.dtype == torch.uint8
    assert batch.mask.shape == (32, 1, 8, 8)
    assert (batch.image[:, 0] == numbers[:, None, None]).all()
    assert (batch.image[:, 1] == numbers[:, None, None] + 100).all()
    assert (batch.mask[:, 0] == numbers[:, None, None]).all()
    assert batch.label.dtype == torch.int64
    assert torch.equal(batch.label, torch.where(numbers % 3 == 0, -1, numbers % 3))
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_the_callers_own():
    data = dataset()
    batch = Loader(data, range(50), 8, seed=0).batch(0)
    batch.image.zero_()
    assert data.images[..., 1].min() == 100


def test_masks_come_only_where_every_image_has_one():
    data = dataset(num_masks=20)
    assert Loader(data, range(20), 4, 0).batch(0).mask is not None
    assert all(Loader(data, range(21), 4, 0).batch(step).mask is None for step in range(10))


def test_seeds_and_epochs_differ():
    loader = Loader(dataset(), range(50), 50, seed=0)
    assert loader.batch(0).names != loader.batch(1).names
    assert loader.batch(0).names != Loader(dataset(), range(50), 50, seed=1).batch(0).names


@pytest.mark.parametrize(
    ("num", "batch", "least", "steps", "rounds"),
    [(50, 8, 1, 7, 1), (48, 8, 1, 6, 1), (3, 16, 20, 20, 320 / 3), (3, 16, 1, 1, 1), (1, 1, 0, 1, 1)],
)
def test_steps_per_epoch(num, batch, least, steps, rounds):
    loader = Loader(dataset(), range(num), batch, 0, min_steps=least)
    assert (loader.steps_per_epoch, loader.num_images, loader.rounds) == (steps, num, rounds)


def test_fewer_images_than_a_batch_are_repeated_evenly():
    loader = Loader(dataset(), [5, 6, 7], 16, seed=2)
    seen = Counter(name for step in range(6) for name in loader.batch(step).names)
    assert set(seen.values()) == {32}


def test_wrong_use_is_a_sentence():
    with pytest.raises(UserError, match="empty"):
        Loader(dataset(), [], 4, 0)
    with pytest.raises(UserError, match="at least 1"):
        Loader(dataset(), [1], 0, 0)
    with pytest.raises(UserError, match="multiple of the 3"):
        Loader(dataset(), range(9), 4, 0).batch(0, 0, 3)


def test_reads_from_a_memory_map(tmp_path: Path):
    data = dataset()
    np.save(tmp_path / "images.npy", data.images)
    mapped = CachedDataset(
        np.load(tmp_path / "images.npy", mmap_mode="r"), None, np.zeros(50, bool), data.names, data.labels, ()
    )
    batch = Loader(mapped, range(50), 8, 0).batch(2)
    torch.testing.assert_close(batch.image, Loader(data, range(50), 8, 0).batch(2).image)
    assert batch.mask is None
