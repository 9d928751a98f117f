"""Copies of a photograph are found whatever was done to them, and other photographs are not."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.data.hashing import MAX_DISTANCE, MIN_CORRELATION, correlations, hashes, near_duplicates, sketch
from fewmask.data.reading import read_image
from fewmask.data.synthetic import render

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
NUM = 24


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [render(np.random.default_rng([7, seed]), (150, 200))[0] for seed in range(NUM)]


def encoded(picture: Image.Image, quality: int = 75) -> np.ndarray:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    with Image.open(stream) as copy:
        return np.asarray(copy)


def centre_square(image: np.ndarray) -> np.ndarray:
    left = (image.shape[1] - image.shape[0]) // 2
    square = Image.fromarray(image[:, left : left + image.shape[0]])
    return encoded(square.resize((512, 512), Image.Resampling.BICUBIC))


def recoloured(image: np.ndarray) -> np.ndarray:
    return (255 * (image / 255) ** 1.3 * [1, 0.93, 0.85]).astype(np.uint8)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": lambda image: encoded(Image.fromarray(image), 40),
    "halved": lambda image: np.asarray(Image.fromarray(image).reduce(2)),
    "enlarged": lambda image: np.asarray(Image.fromarray(image).resize((800, 600), Image.Resampling.BICUBIC)),
    "squashed": lambda image: np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR)),
    "cut to the centre square": centre_square,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1, ::-1],
    "turned": lambda image: np.rot90(image),
    "turned back and mirrored": lambda image: np.rot90(image, 3)[:, ::-1],
    "recoloured": recoloured,
}


@pytest.mark.parametrize("change", COPIES)
def test_each_copy_is_found_and_nothing_else(pictures: list[np.ndarray], change: str) -> None:
    copies = [np.ascontiguousarray(COPIES[change](picture)) for picture in pictures]
    found = near_duplicates([sketch(image) for image in [*pictures, *copies]])
    assert found == [(i, NUM + i) for i in range(NUM)]


def test_two_views_of_one_lesion_are_not_one_photograph(pictures: list[np.ndarray]) -> None:
    assert near_duplicates([sketch(image) for image in pictures]) == []


def test_search_agrees_with_comparing_every_pair(pictures: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    noisy = [np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8) for image in pictures]
    sketches = [sketch(image) for image in [*pictures, *noisy]]
    thumbnails = np.stack([one.centre for one in sketches])
    expected = []
    for i, j in combinations(range(len(sketches)), 2):
        turns = [np.rot90(t, k) for t in (thumbnails[j], thumbnails[j][:, ::-1]) for k in range(4)]
        for turned in turns:
            pair = np.stack([thumbnails[i], turned])
            bits = [f"{int(value):064b}" for value in hashes(np.ascontiguousarray(pair))]
            distance = sum(a != b for a, b in zip(*bits, strict=True))
            if distance <= MAX_DISTANCE and correlations(pair[:1], pair[1:])[0] >= MIN_CORRELATION:
                expected.append((i, j))
                break
    assert near_duplicates(sketches) == expected
    assert 0 < len(expected) <= NUM


def test_plain_pictures_match_nothing() -> None:
    plain = [np.full((40, 60, 3), grey, np.uint8) for grey in (0, 0, 128, 255)]
    assert near_duplicates([sketch(image) for image in plain]) == []
    assert near_duplicates([]) == []


def test_answer_does_not_depend_on_the_threads(pictures: list[np.ndarray]) -> None:
    sketches = [sketch(image) for image in [*pictures, *pictures[:5]]]
    assert near_duplicates(sketches, 1) == near_duplicates(sketches, 4) == [(i, NUM + i) for i in range(5)]


@pytest.mark.skipif(not (SHARED / "ham10000").is_dir(), reason="HAM10000 is not in ../shared/data")
def test_copies_in_ham10000_show_one_lesion() -> None:
    with (SHARED / "ham10000" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))[:1000]
    found = near_duplicates([sketch(read_image(SHARED / "ham10000" / row["image"])) for row in rows])
    assert found
    assert all(rows[i]["group"] == rows[j]["group"] for i, j in found)
