"""Every format and defect a user's pictures may have: the right array, or one sentence that names the file."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewmask.data.reading import MAX_PIXELS, image_size, is_picture, read_image, read_mask
from fewmask.types import UserError
from tests.data.conftest import disc, picture, refused, save


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_lossless_rgb_is_read_exactly_and_writable(tmp_path):
    image = read_image(save(tmp_path / "a.png", picture()))
    assert np.array_equal(image, picture())
    assert image.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_orientation_is_applied_to_pixels_and_size(tmp_path, orientation, suffix):
    quadrants = np.zeros((32, 48, 3), np.uint8)
    quadrants[:16, :24] = 250  # the stored top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", quadrants, exif=exif)
    image = read_image(path)
    assert image.shape[:2] == image_size(path) == ((32, 48) if orientation < 5 else (48, 32))
    h, w = image.shape[:2]
    bright = {
        (top, left): image[top * h // 2 : top * h // 2 + h // 2, left * w // 2 : left * w // 2 + w // 2].mean() > 200
        for top in (0, 1)
        for left in (0, 1)
    }
    # EXIF 2.32: where the stored row 0 and column 0 are shown.
    expected = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert [corner for corner, is_bright in bright.items() if is_bright] == [expected]


def test_deep_tiff_is_turned_upright_too(tmp_path):
    values = np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 900
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    expected = np.rint(np.rot90(values, -1) / 257.0)
    assert np.array_equal(read_image(path), expected)
    assert image_size(path) == (6, 4)


def test_grey_one_bit_and_palette_become_rgb(tmp_path):
    grey = picture()[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "g.png", grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(read_image(save(tmp_path / "b.png", disc()))[..., 2], disc() * np.uint8(255))
    palette = Image.new("P", (4, 2))
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[0, 1].tolist() == [10, 200, 30]


def test_cmyk_jpeg_has_the_colours_it_was_made_from(tmp_path):
    image = picture(3)
    Image.fromarray(image).convert("CMYK").save(tmp_path / "c.jpg", quality=98)
    assert mode_of(tmp_path / "c.jpg") == "CMYK"
    difference = np.abs(read_image(tmp_path / "c.jpg").astype(int) - image)
    assert difference.mean() < 3


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.dstack([picture(), np.full((40, 60), 255, np.uint8)])
    rgba[0, 0, 3] = 0
    rgba[0, 1] = (0, 100, 200, 51)  # a fifth opaque
    image = read_image(save(tmp_path / "a.png", rgba))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [204, 224, 244]
    assert np.array_equal(image[1:], picture()[1:])


@pytest.mark.parametrize(
    ("top", "divisor"),
    [(200, 255), (255, 255), (256, 1023), (1023, 1023), (1024, 4095), (4096, 16383), (16384, 65535), (65535, 65535)],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_divided_by_the_least_depth_that_holds_it(tmp_path, top, divisor, suffix):
    values = np.linspace(0, top, 40 * 60).round().astype(np.uint16).reshape(40, 60)
    image = read_image(save(tmp_path / f"a{suffix}", values))
    assert np.array_equal(image[..., 0], np.rint(values * (255 / divisor)))
    assert (image[..., 0] == image[..., 2]).all()


def test_sixteen_bit_colour_tiff_of_twelve_bits_keeps_its_contrast(tmp_path):
    values = picture().astype(np.uint16) * 16
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - picture()).max() <= 1


def write_png(path: Path, width: int, height: int, depth: int, rows: bytes) -> Path:
    """Write an RGB PNG by hand: deeper than Pillow writes, or with fewer pixels than its header promises."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_deep_png(path: Path, values: np.ndarray) -> Path:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return write_png(path, values.shape[1], values.shape[0], 16, rows)


def test_sixteen_bit_colour_png(tmp_path):
    values = picture().astype(np.uint16) * 257
    assert np.abs(read_image(write_deep_png(tmp_path / "a.png", values)).astype(int) - picture()).max() <= 1
    assert refused(write_deep_png(tmp_path / "dark.png", values // 64), "14 bits")
    assert refused(write_deep_png(tmp_path / "fourteen.png", values // 4), "14 bits")


def test_opacity_of_deep_tiff_is_of_the_types_own_depth(tmp_path):
    values = np.dstack([picture().astype(np.uint16) * 16, np.full((40, 60), 257 * 4, np.uint16)])  # 1.6 % opaque
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(tmp_path / "a.tif").min() >= 250  # white shines through


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_tiff_is_turned_positive(tmp_path, dtype):
    top = np.iinfo(dtype).max
    grey = picture()[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", top - grey.astype(dtype) * dtype(top // 255), photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], grey)
    tifffile.imwrite(tmp_path / "m.tif", np.where(disc(), 0, top).astype(dtype), photometric="miniswhite")
    reading = read_mask(tmp_path / "m.tif")
    assert np.array_equal(reading.mask, disc())
    assert not any(remark.startswith("inverted") for remark in reading.remarks)


@pytest.mark.parametrize("values", [picture().astype(np.float32) / 255, picture()[..., 0].astype(np.float64)])
def test_a_tiff_of_numbers_that_are_not_read_says_so(tmp_path, values):
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb" if values.ndim == 3 else "minisblack")
    assert refused(tmp_path / "a.tif", "is a TIFF .*64-bit numbers, floats in colour")


def test_float_tiff(tmp_path):
    ramp = np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60)
    unit, wide = tmp_path / "unit.tif", tmp_path / "wide.tif"
    tifffile.imwrite(unit, ramp / 2)
    tifffile.imwrite(wide, ramp * 900 - 300)
    assert read_image(unit).max() == 128
    assert np.array_equal(read_image(wide)[..., 0], np.rint(ramp.astype(float) * 255))
    for name, value in (("nan.tif", np.nan), ("inf.tif", np.inf)):
        tifffile.imwrite(tmp_path / name, np.where(ramp < 0.01, np.float32(value), ramp))
        assert refused(tmp_path / name, "NaN or infinite")


@pytest.mark.parametrize("side", [12_300, 13_000, 100_000])
def test_huge_images_are_refused_from_the_header(tmp_path, side):
    assert side * side > MAX_PIXELS
    path = write_png(tmp_path / "huge.png", side, side, 8, bytes(1000))
    assert refused(path, "million")
    assert refused(path, "million", image_size)
    assert refused(path, "million", read_mask)


def test_size_of_an_allowed_large_image_comes_without_decoding_or_warning(tmp_path):
    assert image_size(write_png(tmp_path / "large.png", 12_000, 11_000, 8, bytes(1000))) == (11_000, 12_000)


def test_defective_files_name_file_and_fault(tmp_path):
    good = save(tmp_path / "good.jpg", picture()).read_bytes()
    bad = {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "text.png": (b"hello", "not an image"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        "drawing.png": (b"<?xml version='1.0'?><svg/>", "SVG"),
        "cut.jpg": (good[: len(good) // 2], "damaged or cut"),
        "header.jpg": (good[:30], "not an image|damaged"),
        "fake.dcm": (b"no dicom at all" * 20, "DICOM"),
    }
    for name, (content, word) in bad.items():
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name, word)
        assert refused(tmp_path / name, word.replace("DICOM", "DICOM|mask"), read_mask)
    assert refused(tmp_path / "gone.png", "does not exist")
    assert refused(tmp_path, "folder")


@given(cut=st.floats(0, 0.99), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".gif", ".webp"])
def test_damaged_files_give_an_image_or_a_user_error(tmp_path_factory, suffix, cut, flips):
    folder = tmp_path_factory.mktemp("damaged")
    data = bytearray(save(folder / f"good{suffix}", picture(height=12, width=9)).read_bytes())
    for where, value in flips:
        data[int(where * (len(data) - 1))] = value
    bad = folder / f"bad{suffix}"
    bad.write_bytes(data[: max(1, round(len(data) * (1 - cut / 2)))])
    told = []
    for read in (read_image, read_mask, image_size):
        try:
            read(bad)
        except UserError as error:  # anything else fails the test
            told.append(str(error))
    assert all(bad.name in message for message in told)


def test_several_pages_or_frames_are_refused(tmp_path):
    pages = [Image.fromarray(picture(n)) for n in range(2)]
    for name in ("a.tif", "a.gif", "a.png", "a.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert refused(tmp_path / name, "several pages")
    pages[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=pages[1:])
    assert np.abs(read_image(tmp_path / "phone.jpg").astype(int) - picture(0)).mean() < 8


def test_pillow_warnings_stay_inside_across_threads(tmp_path):
    path = write_png(tmp_path / "large.png", 10_000, 10_000, 8, bytes(1000))  # more than Pillow warns at
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        threads = [threading.Thread(target=lambda: [image_size(path) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == inside
    assert warnings.filters == before
    assert not caught


def test_size_of_a_png_whose_exif_follows_the_pixels(tmp_path):
    data = save(tmp_path / "a.png", picture()).read_bytes()
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # TIFF header, one entry: orientation 6
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (tmp_path / "a.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert image_size(tmp_path / "a.png") == read_image(tmp_path / "a.png").shape[:2] == (60, 40)


def test_is_picture_by_suffix_or_dicom_magic(tmp_path):
    (tmp_path / "1.2.840.113").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "notes.txt").write_text("x")
    assert is_picture(tmp_path / "1.2.840.113")
    assert is_picture(tmp_path / "A.JPG")
    assert not is_picture(tmp_path / "notes.txt")
