"""Two streams in one: which rows have a mask, that they are the same batches, and how processes share them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewmask.data.loader import Loader
from fewmask.data.streams import MixedLoader, PairedLoader
from fewmask.types import Share
from tests.data.test_loader import dataset

HALF = dataset(20, num_masks=8)


def loaders(labelled: int, unlabelled: int, seed: int = 0) -> tuple[Loader, Loader]:
    """Return a stream of the rows with a mask and one of the others."""
    return Loader(HALF, range(8), labelled, seed), Loader(HALF, range(8, 20), unlabelled, seed)


@given(labelled=st.integers(1, 9), unlabelled=st.integers(1, 15), step=st.integers(0, 30), seed=st.integers(0, 9))
def test_first_rows_have_masks_and_last_rows_have_none(labelled, unlabelled, step, seed):
    known, unknown = loaders(labelled, unlabelled, seed)
    batch = MixedLoader(known, unknown).batch(step)
    assert batch.names == known.batch(step).names + unknown.batch(step).names
    assert batch.extra["has_mask"].tolist() == [int(name[1:]) < 8 for name in batch.names]
    # A row's number is in its pixels: image, mask and name still belong together.
    numbers = torch.tensor([int(name[1:]) for name in batch.names])
    assert torch.equal(batch.image[:, 0, 0, 0].long(), numbers)
    assert torch.equal(batch.mask[:, 0, 0, 0].long(), numbers * batch.extra["has_mask"])


def test_predictions_stand_beside_masks_row_by_row():
    prediction = np.broadcast_to((200 + np.arange(20, dtype=np.uint8))[:, None, None], (20, 8, 8))
    known, unknown = (Loader(HALF, rows, 4, 0, predictions=prediction) for rows in (range(8), range(8, 20)))
    batch = MixedLoader(known, unknown).batch(2)
    numbers = torch.tensor([int(name[1:]) for name in batch.names])
    assert torch.equal(batch.mask[:, 0, 0, 0].long(), numbers * batch.extra["has_mask"])
    assert torch.equal(batch.mask[:, 1, 0, 0].long(), numbers + 200)


def test_features_stand_beside_their_images():
    feature = np.broadcast_to(np.arange(20, dtype=np.float16)[:, None, None, None], (20, 5, 2, 2))
    known, unknown = (Loader(HALF, rows, 4, 0, features=[feature, -feature]) for rows in (range(8), range(8, 20)))
    batch = MixedLoader(known, unknown).batch(2)
    numbers = torch.tensor([int(name[1:]) for name in batch.names])
    for sign, found in zip((1, -1), batch.features, strict=True):
        assert found.shape == (8, 5, 2, 2)
        assert torch.equal(sign * found[:, 3, 1, 0].long(), numbers)


def test_an_epoch_is_one_of_the_masks():
    known, unknown = loaders(4, 4)
    mixed = MixedLoader(known, unknown)
    assert mixed.steps_per_epoch == known.steps_per_epoch
    assert mixed.num_images == 20
    few = Loader(HALF, range(2), 4, 0, min_steps=5)
    assert MixedLoader(few, unknown).rounds == PairedLoader(few, unknown).rounds == few.rounds == 10


def test_processes_share_both_streams():
    mixed = MixedLoader(*loaders(4, 6))
    whole, parts = mixed.batch(3), [mixed.batch(3, rank, 2) for rank in range(2)]
    assert [int(part.extra["has_mask"].sum()) for part in parts] == [2, 2]
    assert sorted(parts[0].names + parts[1].names) == sorted(whole.names)
    for part in parts:
        assert part.share is not None
        assert part.names == [whole.names[place] for place in part.share.places]
        assert part.share.total == 10
    pair = PairedLoader(*loaders(4, 6)).batch(3, 1, 2)
    assert (pair.share, pair.other.share) == (Share((2, 3), 4), Share((3, 4, 5), 6))


@given(step=st.integers(0, 30))
def test_a_pair_keeps_its_streams_apart(step):
    known, unknown = loaders(3, 5)
    batch = PairedLoader(known, unknown).batch(step)
    assert batch.names == known.batch(step).names
    assert batch.other.names == unknown.batch(step).names
    assert batch.other.mask is None
