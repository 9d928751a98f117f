"""Every kind of mask a user may have: the right two values, or one sentence that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fewmask.data.reading import read_mask
from tests.data.conftest import disc, picture, refused, save

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


@pytest.mark.parametrize(
    ("value", "code"), [(255, ()), (1, ("values 0/1",)), (7, ("values 0/7",)), (128, ("values 0/128",))]
)
def test_two_values_are_background_and_foreground(tmp_path, value, code):
    reading = read_mask(save(tmp_path / "m.png", disc() * np.uint8(value)))
    assert np.array_equal(reading.mask, disc())
    assert reading.mask.dtype == bool
    assert tuple(remark.split(":")[0] for remark in reading.remarks) == code


@pytest.mark.parametrize("mode", ["1", "RGB", "P", "RGBA", "LA", "I;16", "F"])
def test_every_container_gives_the_same_mask(tmp_path, mode):
    grey = Image.fromarray(disc() * np.uint8(255))
    path = tmp_path / ("m.tif" if mode == "F" else "m.png")
    if mode == "I;16":
        grey = Image.fromarray(disc() * np.uint16(65535))
    elif mode == "P":
        grey = Image.fromarray(disc().astype(np.uint8), mode="L").convert("P")
        grey.putpalette([0, 0, 0, 128, 0, 0])
    else:
        grey = grey.convert(mode)
    grey.save(path)
    assert mode_of(path) == mode
    assert np.array_equal(read_mask(path).mask, disc())


def test_single_values(tmp_path):
    nothing = read_mask(save(tmp_path / "e.png", np.zeros((9, 9), np.uint8)))
    everything = read_mask(save(tmp_path / "f.png", np.full((9, 9), 255, np.uint8)))
    ones = read_mask(save(tmp_path / "o.png", np.ones((9, 9), np.uint8)))
    assert not nothing.mask.any()
    assert everything.mask.all()
    assert ones.mask.all()
    assert [r.remarks[-1].split(":")[0] for r in (nothing, everything, ones)] == ["empty", "full", "full"]


def test_inverted_masks_are_turned_round(tmp_path):
    reading = read_mask(save(tmp_path / "m.png", ~disc()))
    assert np.array_equal(reading.mask, disc())
    assert reading.remarks[0].startswith("inverted:")


def test_a_speck_or_an_open_border_is_no_proof_of_an_inversion(tmp_path):
    speck = np.ones((40, 60), bool)
    speck[20, 30] = False
    cut = ~disc()
    cut[0, 5] = False
    for name, mask, codes in (("speck.png", speck, ["inverted?"]), ("cut.png", cut, [])):
        reading = read_mask(save(tmp_path / name, mask))
        assert np.array_equal(reading.mask, mask)
        assert [remark.partition(":")[0] for remark in reading.remarks] == codes


def test_antialiased_and_jpeg_masks_are_cut_at_half(tmp_path):
    truth = disc(160, 200, 50)
    large = Image.fromarray(np.kron(disc(160, 200, 50), np.ones((4, 4), bool)) * np.uint8(255))
    large.resize((200, 160), Image.Resampling.BILINEAR).filter(ImageFilter.BoxBlur(1)).save(tmp_path / "soft.png")
    Image.fromarray(truth * np.uint8(255)).save(tmp_path / "lossy.jpg", quality=60)
    Image.fromarray(truth * np.uint8(255)).convert("RGB").save(tmp_path / "colour.jpg", quality=60)
    Image.open(tmp_path / "lossy.jpg").save(tmp_path / "resaved.png")
    Image.fromarray(disc(40, 50, 12) * np.uint8(255)).resize((200, 160), Image.Resampling.BICUBIC).save(
        tmp_path / "up.png"
    )
    for name in ("soft.png", "lossy.jpg", "colour.jpg", "resaved.png", "up.png"):
        reading = read_mask(tmp_path / name)
        assert reading.remarks[0].startswith("thresholded:"), name
        overlap = (reading.mask & truth).sum() / (reading.mask | truth).sum()
        assert overlap > (0.85 if name == "up.png" else 0.98), name


def classes(*values: int) -> np.ndarray:
    grey = np.full((60, 80), values[0], np.uint8)
    for number, value in enumerate(values[1:]):
        grey[10:50, 5 + 15 * number : 17 + 15 * number] = value
    return grey


@pytest.mark.parametrize(
    "values",
    [(0, 1, 2), (0, 15, 255), (0, 1, 255), (0, 85, 170, 255), (0, 100, 255), (1, 2), (100, 200), (0, 20, 240, 255)],
)
def test_class_maps_are_refused(tmp_path, values):
    assert refused(save(tmp_path / "m.png", classes(*values)), "grey levels", read_mask)


def test_a_class_map_saved_as_jpeg_is_refused(tmp_path):
    assert refused(save(tmp_path / "m.jpg", classes(0, 15, 255), quality=90), "grey levels", read_mask)


def test_soft_maps_photographs_and_colours_are_refused(tmp_path):
    y, x = np.mgrid[:100, :100]
    assert refused(
        save(tmp_path / "soft.png", (255 * np.exp(-((y - 50) ** 2 + (x - 50) ** 2) / 900)).astype(np.uint8)),
        "grey",
        read_mask,
    )
    assert refused(save(tmp_path / "photo.png", picture()), "colours", read_mask)
    colours = np.zeros((20, 20, 3), np.uint8)
    colours[2:6, 2:6] = (255, 0, 0)
    colours[10:16, 2:6] = (0, 255, 0)
    assert refused(save(tmp_path / "two.png", colours), "colours", read_mask)
    Image.fromarray(colours).quantize(4).save(tmp_path / "palette.png")
    assert refused(tmp_path / "palette.png", "colours", read_mask)
    colours[10:16] = 0
    assert read_mask(save(tmp_path / "one.png", colours)).mask.sum() == 16


def test_transparency_of_masks(tmp_path):
    painted = np.zeros((40, 60, 4), np.uint8)
    painted[..., 3] = disc() * np.uint8(255)  # black paint on nothing
    reading = read_mask(save(tmp_path / "painted.png", painted))
    assert np.array_equal(reading.mask, disc())
    assert reading.remarks[0].startswith("alpha:")
    hidden = np.full((40, 60, 4), 255, np.uint8)
    hidden[:, :30, :3] = 0
    hidden[:20, :, 3] = 0  # white that cannot be seen
    mask = read_mask(save(tmp_path / "hidden.png", hidden)).mask
    assert mask.sum() == 20 * 30
    assert mask[20:, 30:].all()


def test_mask_is_turned_as_its_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    corner = np.zeros((40, 60), np.uint8)
    corner[:10, :10] = 255
    mask = read_mask(save(tmp_path / "m.png", corner, exif=exif)).mask
    assert mask.shape == (60, 40)
    assert mask[:10, 30:].all()
    assert mask.sum() == 100


@pytest.mark.skipif(not (SHARED / "isic").is_dir(), reason="the ISIC masks are not here")
@pytest.mark.parametrize("folder", ["isic", "ham10000", "cxr_lungs"])
def test_no_real_mask_is_changed(folder):
    files = sorted((SHARED / folder / "masks").iterdir())
    for file in files[:: max(1, len(files) // 150)]:
        result = read_mask(file)
        assert not {remark.split(":")[0] for remark in result.remarks} - {"empty", "full"}
        with Image.open(file) as stored:
            assert np.array_equal(result.mask, np.asarray(stored.convert("L")) > 127)
