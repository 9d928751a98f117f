"""Outlines that close, lie in the picture and enclose what the mask encloses."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fewmask.report.pictures import MAX_SIDE, case_pictures, contour_path, data_uri, previews
from fewmask.report.reading import read_run
from fewmask.types import UserError
from tests.report.conftest import MakeRun


def rings(path: str) -> list[np.ndarray]:
    """Return the sub-paths of an SVG path as arrays (n, 2) of x, y; asserts that each one closes."""
    if not path:
        return []
    assert path.endswith("Z")
    pieces = path[:-1].split("Z")
    assert all(re.fullmatch(r"M[-\d.]+ [-\d.]+(L[-\d.]+ [-\d.]+){2,}", piece) for piece in pieces)
    return [np.array([[float(v) for v in pair.split()] for pair in piece[1:].split("L")]) for piece in pieces]


def area(path: str) -> float:
    """Return the enclosed area by the shoelace formula; holes run the other way round and count as negative."""
    total = 0.0
    for ring in rings(path):
        x, y = ring.T
        total += float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
    return abs(total)


@settings(max_examples=150, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.integers(1, 40), st.integers(1, 40))
def test_outlines_close_and_lie_in_the_picture(mask: np.ndarray, width: int, height: int) -> None:
    path = contour_path(mask, width, height)
    assert bool(path) == bool(mask.any())
    for ring in rings(path):
        assert ring.min() >= 0
        assert (ring <= [width, height]).all()


def test_a_full_mask_is_outlined_along_the_border() -> None:
    (ring,) = rings(contour_path(np.ones((30, 40), bool), 40, 30))
    assert ring.min(axis=0).tolist() == [0, 0]
    assert ring.max(axis=0).tolist() == [40, 30]
    assert area(contour_path(np.ones((30, 40), bool), 40, 30)) == pytest.approx(1200, rel=0.01)


def test_the_outline_encloses_the_area_of_the_mask_holes_left_out() -> None:
    y, x = np.mgrid[:200, :300]
    disc = np.hypot(y - 100, x - 150) < 80
    hole = np.hypot(y - 100, x - 150) < 30
    assert area(contour_path(disc, 300, 200)) == pytest.approx(disc.sum(), rel=0.02)
    assert area(contour_path(disc & ~hole, 300, 200)) == pytest.approx((disc & ~hole).sum(), rel=0.02)
    assert len(rings(contour_path(disc & ~hole, 300, 200))) == 2


def test_the_outline_is_centred_on_the_mask_and_follows_the_picture_s_scale() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:20] = True
    (ring,) = rings(contour_path(mask, 60, 40))
    assert ring.min(axis=0) == pytest.approx([20, 10], abs=0.11)
    assert ring.max(axis=0) == pytest.approx([40, 18], abs=0.11)


def test_a_single_pixel_keeps_an_outline() -> None:
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    (ring,) = rings(contour_path(mask, 9, 9))
    assert ring.mean(axis=0) == pytest.approx([4.5, 4.5])


def test_embedded_pictures_are_bounded_and_carry_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "patient 42"
    Image.new("RGB", (1500, 900), (200, 150, 140)).save(tmp_path / "a.jpg", exif=exif)
    uri, width, height = data_uri(tmp_path / "a.jpg")
    raw = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(raw)) as picture:
        assert picture.size == (width, height) == (MAX_SIDE, MAX_SIDE * 900 // 1500)
        assert not picture.getexif()
    assert b"patient" not in raw


def test_cases_come_best_first_then_by_rank(make_run: MakeRun) -> None:
    run = make_run()
    index = read_run(run).pictures["test"]
    found = case_pictures(run / "pictures" / "test", index[::-1])
    assert [(e["kind"], e["rank"]) for e in found] == [(e["kind"], e["rank"]) for e in index]


def test_a_listed_picture_that_is_missing_or_broken_is_named(make_run: MakeRun) -> None:
    run = make_run()
    folder, index = run / "pictures" / "test", read_run(run).pictures["test"]
    (folder / "best_01.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"best_01\.jpg is not a readable"):
        case_pictures(folder, index)
    (folder / "best_01.jpg").unlink()
    with pytest.raises(UserError, match=r"best_01\.jpg is missing"):
        case_pictures(folder, index)


@pytest.mark.parametrize("name", ["../../run.json", "/etc/passwd", "../test/../../../x.jpg"])
def test_an_index_cannot_reach_outside_its_folder(make_run: MakeRun, name: str) -> None:
    run = make_run()
    index = json.loads((run / "pictures" / "test" / "index.json").read_text())
    with pytest.raises(UserError, match="outside its folder"):
        case_pictures(run / "pictures" / "test", [{**index[0], "image": name}])


def test_previews_of_one_image_stand_side_by_side_in_the_order_of_the_method(make_run: MakeRun) -> None:
    stage = read_run(make_run()).stage("pretrain")
    assert stage is not None
    (group,) = previews(stage.previews)
    names = [[picture["name"] for picture in row] for row in group["rows"]]
    assert names == 4 * [["Original", "Masked", "Reconstruction"]]


COLOURS = [(220, 30, 30), (30, 200, 40), (40, 50, 210), (200, 200, 40), (20, 20, 20)]


def write_strip(path: Path, num: int, side: int = 32) -> Path:
    strip = Image.new("RGB", (num * side, side))
    for i in range(num):
        strip.paste(COLOURS[i], (i * side, 0, (i + 1) * side, side))
    strip.save(path)
    return path


def colour_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))) as picture:
        return np.asarray(picture).mean((0, 1))


def test_strips_are_taken_apart_into_captioned_pictures_a_group_a_name(tmp_path: Path) -> None:
    paths = [write_strip(tmp_path / f"conversion_{n:02d}.png", 5) for n in range(2)]
    paths += [write_strip(tmp_path / f"reconstruction_{n:02d}.png", 4) for n in range(2)]
    reconstruction, conversion = previews(paths)
    captions = [[[picture["name"] for picture in row] for row in g["rows"]] for g in (reconstruction, conversion)]
    assert captions[0] == 2 * [["Image", "Superpixels", "Masked", "Reconstruction"]]
    assert captions[1] == 2 * [["Image", "Converted", "Again", "Again", "Again"]]
    assert (reconstruction["title"], conversion["title"]) == ("Reconstruction", "Conversion")
    for row in reconstruction["rows"]:
        assert [(picture["width"], picture["height"]) for picture in row] == 4 * [(32, 32)]
        for picture, colour in zip(row, COLOURS, strict=False):
            assert colour_of(picture["uri"]) == pytest.approx(colour, abs=6)


def test_the_number_of_pictures_of_a_strip_chooses_its_captions(tmp_path: Path) -> None:
    (masked,) = previews([write_strip(tmp_path / "reconstruction_00.png", 3)])
    assert [picture["name"] for picture in masked["rows"][0]] == ["Image", "Masked", "Reconstruction"]
    (crops,) = previews([write_strip(tmp_path / "crops_00.png", 2)])
    assert [picture["name"] for picture in crops["rows"][0]] == ["First crop", "Second crop"]
    (unknown,) = previews([write_strip(tmp_path / "crops_01.png", 5)])
    assert [picture["name"] for picture in unknown["rows"][0]] == [""] * 5


def test_a_picture_of_no_known_name_stays_whole(tmp_path: Path) -> None:
    (group,) = previews([write_strip(tmp_path / "attention_00.png", 3)])
    ((picture,),) = group["rows"]
    assert (picture["name"], picture["width"], picture["height"]) == ("Attention", 96, 32)
