"""The batched distance equals brute force, and scipy."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from fewmask.auxiliary import distance
from fewmask.auxiliary.distance import nearest, signed_distance


def literal(inside: np.ndarray) -> np.ndarray:
    """The signed distance by loops over pairs of cells."""
    cells = [(y, x) for y in range(inside.shape[0]) for x in range(inside.shape[1])]
    out = np.zeros(inside.shape)
    for y, x in cells:
        others = [math.hypot(y - v, x - u) for v, u in cells if inside[v, u] != inside[y, x]]
        out[y, x] = (min(others, default=math.inf) - 0.5) * (-1 if inside[y, x] else 1)
    return out


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_signed_distance_equals_brute_force(height, width, share, seed):
    inside = np.random.default_rng(seed).random((2, height, width)) < share
    found = signed_distance(torch.from_numpy(inside)).numpy()
    for i in range(2):
        np.testing.assert_allclose(found[i], literal(inside[i]), rtol=1e-6)


def test_nearest_equals_scipy_and_does_not_depend_on_the_share_at_a_time(monkeypatch):
    inside = torch.rand(5, 40, 30, generator=torch.Generator().manual_seed(0)) < 0.01
    inside[:, 7, 7] = True
    found = nearest(inside)
    for i in range(5):
        np.testing.assert_allclose(found[i].numpy(), distance_transform_edt(~inside[i].numpy()), rtol=1e-6)
    monkeypatch.setattr(distance, "MOST_VALUES", 1)
    assert torch.equal(nearest(inside), found)


def test_empty_and_full_masks_are_infinitely_far_from_a_border():
    assert (signed_distance(torch.zeros(1, 4, 4, dtype=torch.bool)) == torch.inf).all()
    assert (signed_distance(torch.ones(1, 4, 4, dtype=torch.bool)) == -torch.inf).all()
