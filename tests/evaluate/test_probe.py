"""The nearest-neighbour probe against a vote counted by hand, and what it must leave alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.evaluate.probe import Probe, global_features, knn_accuracy
from fewmask.models import Encoder, build_encoder
from fewmask.types import UserError


def by_hand(features, labels, k, groups):
    """Every image's vote counted one neighbour at a time; the classes named, None where nobody may vote."""
    named = []
    for i, own in enumerate(features):
        others = [j for j in range(len(features)) if groups[j] != groups[i]]
        cosine = {j: float(own @ features[j] / (own.norm() * features[j].norm())) for j in others}
        votes = {}
        for j in sorted(others, key=lambda j: -cosine[j])[:k]:
            votes[labels[j]] = votes.get(labels[j], 0.0) + math.exp(cosine[j] / 0.07)
        named.append(max(votes, key=lambda c: (votes[c], -c)) if votes else None)
    return named


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 25), st.integers(1, 12))
def test_the_vote_is_that_counted_by_hand(seed, num, k, num_groups):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, 4, generator=generator)
    labels = torch.randint(0, 3, (num,), generator=generator)
    groups = torch.randint(0, num_groups, (num,), generator=generator)
    named = by_hand(features, labels.tolist(), k, groups.tolist())
    right = [a == b for a, b in zip(named, labels.tolist(), strict=True)]
    recalls = [
        np.mean([r for r, c in zip(right, labels.tolist(), strict=True) if c == one]) for one in set(labels.tolist())
    ]
    found = knn_accuracy(features, labels, k, groups)
    assert found["knn_accuracy"] == pytest.approx(np.mean(right))
    assert found["knn_balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["majority"] == pytest.approx(max(np.bincount(labels.numpy())) / num)


def test_tight_clusters_are_named_rightly_and_a_useless_feature_names_the_majority():
    labels = torch.arange(40) % 4
    apart = torch.eye(4)[labels] + 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    assert knn_accuracy(apart, labels, 5) == {"knn_accuracy": 1.0, "knn_balanced_accuracy": 1.0, "majority": 0.25}
    uneven = torch.tensor([0] * 30 + [1] * 10)
    found = knn_accuracy(torch.ones(40, 3), uneven, 39)
    assert found == {"knn_accuracy": 0.75, "knn_balanced_accuracy": 0.5, "majority": 0.75}


def test_an_image_is_not_recognised_by_itself_nor_by_its_twin():
    features = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = torch.arange(20)
    assert knn_accuracy(features, labels, 1)["knn_accuracy"] == 0.0
    twins, twice = features.repeat(2, 1), labels.repeat(2)
    assert knn_accuracy(twins, twice, 1)["knn_accuracy"] == 1.0
    assert knn_accuracy(twins, twice, 1, groups=twice)["knn_accuracy"] == 0.0


def test_the_length_of_a_feature_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    features, labels = torch.randn(30, 5, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    scaled = features * torch.rand(30, 1, generator=generator).add(0.1) * 50
    assert knn_accuracy(features, labels, 7) == knn_accuracy(scaled, labels, 7)


def dataset(num=6, side=72):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (num, side, side, 3), dtype=np.uint8)
    return SimpleNamespace(images=images, labels=np.arange(num, dtype=np.int64) % 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "resnet18"])
def test_features_follow_the_indices_and_leave_modes_and_generators_alone(name):
    encoder, data = build_encoder(name, size=64).train(), dataset()
    next(encoder.children()).eval()  # a part that is frozen must stay so
    modes = [module.training for module in encoder.modules()]
    statistics = [buffer.clone() for buffer in encoder.buffers()]
    before = torch.get_rng_state()
    forward = global_features(encoder, data.images, np.array([0, 1, 2, 3, 4]), 64, batch_size=2)
    backward = global_features(encoder, data.images, np.array([4, 3, 2, 1, 0]), 64, batch_size=5)
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in encoder.modules()] == modes
    assert all(map(torch.equal, statistics, encoder.buffers()))
    torch.testing.assert_close(forward, backward.flip(0), rtol=1e-4, atol=1e-4)
    assert (forward[0] - forward[1]).abs().max() > 1e-3


def test_the_global_feature_of_a_vit_is_its_class_token_and_of_a_cnn_the_mean_of_its_coarsest_map():
    data, indices = dataset(2, side=64), np.array([0, 1])
    picture = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (picture - mean[:, None, None]) / std[:, None, None]
    vit, cnn = build_encoder("vit_tiny_patch16", size=64).eval(), build_encoder("resnet18", size=64).eval()
    with torch.no_grad():
        torch.testing.assert_close(global_features(vit, data.images, indices, 64), vit.tokens(image)[:, 0])
        torch.testing.assert_close(global_features(cnn, data.images, indices, 64), cnn(image)[-1].mean((2, 3)))


def test_a_probe_scores_the_encoder_it_is_called_with():
    class Colour(Encoder):
        """An encoder whose feature is the mean colour."""

        def __init__(self):
            super().__init__("colour", 32, {})
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image):
            return [image.mean((2, 3), keepdim=True)]

    data = dataset(12, side=32)
    data.images[::2, ..., 0], data.images[1::2, ..., 2] = 255, 255
    found = Probe(data, range(12), 32, k=3)(Colour())
    assert (found["knn_accuracy"], found["majority"]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [([0, 0, 0, 0], None), ([0, 1, -1, 0], None), ([0, 1, 0, 1], ["a"] * 4), ([], None)],
)
def test_a_probe_without_two_classes_and_two_patients_is_refused(labels, groups):
    data = SimpleNamespace(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.array(labels, dtype=np.int64))
    with pytest.raises(UserError, match="needs images of at least two classes and two patients"):
        Probe(data, range(len(labels)), 8, groups)


def test_neighbours_need_two_images_and_a_k():
    with pytest.raises(UserError, match="not 1 and 20"):
        knn_accuracy(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="not 2 and 0"):
        knn_accuracy(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64), 0)
