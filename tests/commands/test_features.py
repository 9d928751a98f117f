"""What a pre-training leaves to be looked at: the map of its features, their neighbours, and the probe on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewmask.commands import features
from fewmask.commands.features import (
    NUM_IMAGES,
    THUMBNAIL,
    as_kept,
    describe_features,
    draw,
    know_whole_images,
    neighbours,
    principal_components,
    probe_for,
)
from fewmask.commands.prepare import Prepared
from fewmask.data.cache import CachedDataset
from fewmask.data.preprocess import normalise
from fewmask.engine.run import Run
from fewmask.engine.stage import Stage
from fewmask.models import build_encoder
from fewmask.types import Case


def cached(num=9, side=40, labels=None):
    """Noise images called a, b, c..., of two classes where not said."""
    images = np.random.default_rng(0).integers(0, 255, (num, side, side, 3), dtype=np.uint8)
    labels = np.arange(num) % 2 if labels is None else np.array(labels)
    names = [f"case/{chr(97 + i)}" for i in range(num)]
    return CachedDataset(images, None, np.zeros(num, bool), names, labels.astype(np.int64), ("naevus", "other"))


def test_components_are_those_of_the_covariance():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    places, shares = principal_components(features)
    value, vector = np.linalg.eigh(np.cov(features.double().numpy().T))
    assert shares == pytest.approx((value[::-1] / value.sum())[:2].tolist())
    projected = (features - features.mean(0)).double().numpy() @ vector[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(places.numpy()), np.abs(projected), atol=1e-5)
    assert torch.equal(places, principal_components(features)[0])
    flipped, _ = principal_components(features.flip(0))
    torch.testing.assert_close(flipped.flip(0), places)  # the sign does not depend on the order


@pytest.mark.parametrize("features", [torch.ones(4, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]])])
def test_features_without_two_directions_have_zeros_and_no_nan(features):
    places, shares = principal_components(features)
    assert places.shape == (len(features), 2)
    assert places.isfinite().all()
    assert all(0 <= share <= 1 for share in shares)
    assert len(shares) == 2


def test_neighbours_are_the_nearest_others_by_cosine():
    angle = torch.tensor([0.0, 0.1, 0.3, 1.5, 3.1])
    features = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 9.0, 2.0, 1.0, 5.0])[:, None]
    found = neighbours(features, [0, 3], 3)
    assert [[i for i, _ in near] for near in found] == [[1, 2, 3], [2, 1, 0]]
    assert found[0][0][1] == pytest.approx(np.cos(0.1))
    assert len(neighbours(features, [0], 10)[0]) == 4


def test_an_encoder_comes_to_know_whole_images_by_every_batch_alike():
    """Against the statistics of each batch, taken at the first normalisation by hand."""
    encoder, data = build_encoder("resnet18", size=32, drop_path=0.5), cached(num=70, side=32)
    body = encoder.body.model
    body.layer1.eval()
    modes = [module.training for module in encoder.modules()]
    began = torch.get_rng_state()
    body.bn1.running_mean.fill_(9.0)
    know_whole_images(encoder, data, range(70), 32)
    rows = [range(0, 32), range(32, 64)]  # six more would be a batch of another size
    with torch.inference_mode():
        seen = [body.conv1(encoder.input_affine(normalise(pixels(data, r)))).transpose(0, 1).flatten(1) for r in rows]
    torch.testing.assert_close(body.bn1.running_mean, torch.stack([x.mean(1) for x in seen]).mean(0))
    torch.testing.assert_close(body.bn1.running_var, torch.stack([x.var(1) for x in seen]).mean(0))
    assert [module.training for module in encoder.modules()] == modes
    assert body.bn1.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), began)


def pixels(data, rows):
    return torch.from_numpy(data.images[list(rows)]).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("kept", [True, False])
def test_a_probe_sees_an_encoder_as_it_will_be_kept_and_changes_no_other_product(kept):
    encoder, data = build_encoder("resnet18", size=32), cached(num=40, side=32)
    body, seen = encoder.body.model, []
    body.bn1.running_mean.fill_(9.0)
    product = encoder if kept else torch.nn.Sequential(encoder)

    def probe(model):
        seen.append(body.bn1.running_mean.max().item())
        return {}

    probe.size = 32
    as_kept(probe, data, range(40))(product)
    assert (seen[0] < 9.0) == kept


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_each_batch(monkeypatch, world):
    """Together they show the encoder what one would, batch by batch."""
    shown = []
    monkeypatch.setattr(features, "renew_statistics", lambda _, batches: shown.append(list(batches)))
    monkeypatch.setattr(features, "num_processes", lambda: world)
    data = cached(num=70, side=32)
    for rank in range(world):
        monkeypatch.setattr(features, "process_index", lambda rank=rank: rank)
        know_whole_images(build_encoder("resnet18", size=32), data, range(70), 32)
    size = 32 // world * world
    assert [len(parts) for parts in shown] == [70 // size] * world
    for number, parts in enumerate(zip(*shown, strict=True)):
        assert {len(part) for part in parts} == {32 // world}
        rows = range(number * size, (number + 1) * size)
        assert torch.equal(torch.cat(parts), normalise(pixels(data, rows)))


def test_one_image_has_no_statistics():
    encoder = build_encoder("resnet18", size=32)
    body = encoder.body.model
    before = body.bn1.running_mean.clone()
    know_whole_images(encoder, cached(num=1, side=32), [0], 32)
    assert torch.equal(body.bn1.running_mean, before)


def test_many_images_are_thinned_out_always_the_same_way():
    few, many = list(range(7, 0, -1)), list(range(3000))
    assert draw(few, NUM_IMAGES) == [1, 2, 3, 4, 5, 6, 7]
    chosen = draw(many, NUM_IMAGES)
    assert chosen == draw(many, NUM_IMAGES) == sorted(set(chosen))
    assert len(chosen) == NUM_IMAGES
    assert chosen[-1] > 2500


def test_the_file_names_images_of_the_selection_and_thumbnails_that_exist(tmp_path):
    data = cached(labels=[0, 1, -1, 0, 1, -1, 0, 1, 0])
    selection = [8, 7, 5, 4, 2, 1, 0]
    encoder = build_encoder("vit_tiny_patch16", size=32)
    describe_features(tmp_path, encoder, data, selection, 32)
    found = json.loads((tmp_path / "features.json").read_text())
    assert found["num_candidates"] == 7
    assert [image["name"] for image in found["images"]] == [data.names[i] for i in sorted(selection)]
    assert [image["label"] for image in found["images"]] == ["naevus", "other", None, "other", None, "other", "naevus"]
    assert len(found["queries"]) == 6
    for query in found["queries"]:
        near = query["neighbours"]
        assert len(near) == 5
        assert query["name"] not in {other["name"] for other in near}
        assert [n["cosine"] for n in near] == sorted((n["cosine"] for n in near), reverse=True)
        for entry in (query, *near):
            row = data.names.index(entry["name"])
            picture = np.asarray(Image.open(tmp_path / entry["image"]))
            assert max(picture.shape) <= THUMBNAIL
            np.testing.assert_array_equal(picture, data.images[row])
    assert not list(tmp_path.rglob("*.tmp"))


def test_one_image_makes_a_file_without_queries(tmp_path):
    facts = describe_features(tmp_path, build_encoder("vit_tiny_patch16", size=32), cached(), [3], 32)
    assert (len(facts["images"]), facts["queries"]) == (1, [])


def probe_of(tmp_path, labels, groups, every=1):
    data = cached(len(labels), labels=labels)
    cases = [Case(name, tmp_path, group=group) for name, group in zip(data.names, groups, strict=True)]
    prepared = Prepared(cases, data, [], [], list(range(len(labels))), {})
    with Run(tmp_path, "test", {}) as run:
        stage = Stage(run, "pretrain")
        probe = probe_for(stage, prepared, prepared.body, every, 32)
    log = tmp_path / "pretrain" / "log.jsonl"
    return probe, log.read_text() if log.exists() else ""


def test_a_probe_knows_the_labelled_images_and_their_patients(tmp_path):
    probe, log = probe_of(tmp_path, [0, 1, -1, 1, 0], ["x", "y", "x", "", "x"])
    assert probe.indices.tolist() == [0, 1, 3, 4]
    assert probe.labels.tolist() == [0, 1, 1, 0]
    assert probe.groups.tolist() == [0, 1, 2, 0]
    assert log == ""


@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, 0, -1]])
def test_without_classes_there_is_no_probe_and_the_log_says_so(tmp_path, labels, capsys):
    probe, log = probe_of(tmp_path, labels, ["a", "b", "c"])
    assert probe is None
    assert json.loads(log)["kind"] == "remark"
    assert "no probe: the images pre-trained on have class labels of fewer than two classes" in log
    assert "no probe" in capsys.readouterr().err


def test_nothing_is_said_where_no_probe_was_asked_for(tmp_path):
    assert probe_of(tmp_path, [-1, -1], ["a", "b"], every=0) == (None, "")
