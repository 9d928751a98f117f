"""Superpixels: regions of an image, computed once, kept whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fewmask.data import superpixels
from fewmask.data.cache import build_cache
from fewmask.data.superpixels import Slic, superpixel_maps
from fewmask.types import Case, UserError


def two_colours(side: int = 48) -> np.ndarray:
    """A red disc on blue: regions that follow colours cannot straddle its edge."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    disc = rows**2 + columns**2 < (side / 3) ** 2
    return np.where(disc[..., None], [220, 30, 30], [30, 30, 220]).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path):
    cases = []
    for number in range(5):
        image = np.roll(two_colours(), number * 3, axis=1)
        path = tmp_path / f"{number}.png"
        Image.fromarray(image).save(path)
        cases.append(Case(str(number), path))
    return build_cache(cases, 32, tmp_path / "cache", workers=1)


def files(dataset) -> list[Path]:
    return sorted(p for p in Path(dataset.images.filename).parent.iterdir() if "superpixels" in p.name)


def test_regions_follow_colour_are_connected_and_numbered_without_gaps():
    image = two_colours()
    labels = Slic()(image)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == set(range(labels.max() + 1))
    red = image[..., 0] > 100
    for label in range(labels.max() + 1):
        region = labels == label
        assert ndimage.label(region)[1] == 1
        assert max(red[region].mean(), 1 - red[region].mean()) > 0.9


@pytest.mark.parametrize("num_segments", [1, 3, 8, 50, 127])
def test_labels_stay_below_their_bound(num_segments):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for compactness in (0.1, 10.0):
        slic = Slic(num_segments, compactness)
        assert slic(noise).max() < slic.num_labels <= 256


def test_an_image_without_edges_gets_regions_too():
    flat = Slic()(np.zeros((48, 48, 3), np.uint8))
    assert flat.shape == (48, 48)
    assert 1 <= len(np.unique(flat)) <= 12
    assert np.unique(Slic(1)(two_colours())).tolist() == [0]


def test_maps_are_those_of_each_image_and_are_read_the_second_time(dataset, monkeypatch):
    progress = []
    maps = superpixel_maps(dataset, on_progress=lambda done, total: progress.append((done, total)))
    assert isinstance(maps, np.memmap)
    assert maps.shape == dataset.images.shape[:3]
    for image, labels in zip(dataset.images, maps, strict=True):
        assert np.array_equal(labels, Slic()(image))
    assert progress == [(5, 5)]
    monkeypatch.setattr(superpixels, "_build", None)
    assert np.array_equal(superpixel_maps(dataset), maps)


def test_many_processes_give_the_same_maps(dataset, monkeypatch):
    alone = np.array(superpixel_maps(dataset))
    monkeypatch.setattr(superpixels, "_FEW", 1)
    monkeypatch.setattr(superpixels, "_CHUNK", 2)
    for path in files(dataset):
        path.unlink()
    assert np.array_equal(superpixel_maps(dataset, workers=2), alone)


def test_settings_have_files_of_their_own(dataset):
    few, many = superpixel_maps(dataset, Slic(4)), superpixel_maps(dataset, Slic(20))
    assert few.max() < many.max()
    superpixel_maps(dataset, Slic(4, compactness=1.0))
    superpixel_maps(dataset, Slic(4, iterations=3))
    assert len(files(dataset)) == 4


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY not really"])
def test_a_damaged_file_is_built_again(dataset, damage):
    sound = np.array(superpixel_maps(dataset))
    files(dataset)[0].write_bytes(damage)
    assert np.array_equal(superpixel_maps(dataset), sound)


def test_a_killed_builder_leaves_nothing_that_is_read(dataset):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        superpixel_maps(dataset, on_progress=interrupt)
    assert files(dataset) == []


def test_a_folder_that_cannot_be_written_is_told(dataset, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(superpixels.tempfile, "mkstemp", refuse)
    with pytest.raises(UserError, match=r"cannot be written to the cache .*Permission denied"):
        superpixel_maps(dataset)


def test_images_in_memory_get_maps_in_memory(dataset):
    in_memory = replace(dataset, images=np.array(dataset.images))
    assert np.array_equal(superpixel_maps(in_memory), superpixel_maps(dataset))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_segments": 0}, "'num_segments' cannot be 0"),
        ({"num_segments": 128}, "'num_segments' cannot be 128"),
        ({"compactness": 0.0}, "compactness 0.0 and 10 iterations"),
        ({"iterations": 0}, "above zero"),
    ],
)
def test_bad_settings_are_told(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Slic(**settings)
