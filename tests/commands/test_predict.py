"""fewmask predict, on a model whose answer is known."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.commands.predict import COLUMNS, predict
from fewmask.deploy.predictor import Predictor
from fewmask.types import UserError
from tests.deploy.darkness import dark_square, write_darkness


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_darkness(tmp_path / "model.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, size in {"a.png": (40, 60), "sub/b.jpg": (64, 32), "sub/c.bmp": (33, 77)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dark_square(*size)[0]).save(folder / name)
    return folder


def areas(out: Path) -> list[dict[str, str]]:
    with (out / "areas.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_masks_overlays_and_areas(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert predict(model, [str(photos)], out, True, None, False) == 0
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "a.png", "areas.csv", "overlays/a.jpg", "overlays/sub/b.jpg", "overlays/sub/c.jpg", "sub/b.png", "sub/c.png",
    ]  # fmt: skip
    predictor = Predictor(model)
    rows = areas(out)
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        expected = predictor.mask(row["image"])
        found = np.asarray(Image.open(row["mask"]))
        assert np.array_equal(found, expected * np.uint8(255))
        assert int(row["area_px"]) == expected.sum()
        assert float(row["area_percent"]) == pytest.approx(100 * expected.mean())
        assert (int(row["height"]), int(row["width"])) == expected.shape
        overlay = out / "overlays" / Path(row["mask"]).relative_to(out).with_suffix(".jpg")
        assert np.asarray(Image.open(overlay)).shape == (*expected.shape, 3)


def test_a_higher_threshold_gives_a_smaller_mask_and_is_recorded(model: Path, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    counts = []
    for threshold in (0.1, None, 0.9):
        predict(model, [str(tmp_path / "ramp.png")], tmp_path / "out", False, threshold, True)
        row = areas(tmp_path / "out")[0]
        assert float(row["threshold"]) == (threshold or 0.5)
        counts.append(int(row["area_px"]))
    assert counts[0] > counts[1] > counts[2] > 0


def test_bad_files_are_named_at_the_end_and_the_good_ones_done(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a_broken.png").write_bytes(b"not a picture")
    (photos / "empty.jpg").touch()
    assert predict(model, [str(photos)], tmp_path / "out", False, None, False) == 1
    assert len(areas(tmp_path / "out")) == 3
    errors = capsys.readouterr().err
    assert "a_broken.png" in errors
    assert "empty.jpg" in errors
    assert "2 images could not be predicted" in errors


def test_json_says_all_of_it(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.png").write_bytes(b"not a picture")
    (photos / "readme.txt").write_text("x")
    assert predict(model, [str(photos)], tmp_path / "out", False, None, True) == 1
    said, errors = capsys.readouterr()
    answer = json.loads(said)
    assert errors == ""
    assert len(answer["predictions"]) == 3
    assert [Path(failure["image"]).name for failure in answer["failures"]] == ["broken.png"]
    assert answer["num_not_images"] == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_ends_it_at_once_and_leaves_no_rest(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tried = []

    def fail(path: Path, content: bytes) -> int:
        tried.append(path.name)
        with path.open("wb") as file:
            file.write(content[:3])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match="Cannot write"):
        predict(model, [str(photos)], tmp_path / "out", False, None, False)
    assert len(tried) == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_the_rows_of_what_was_written_survive_a_failure(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        if path.name.startswith(".c.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=r"c\.png.*No space"):
        predict(model, [str(photos)], tmp_path / "out", False, None, False)
    assert [Path(row["image"]).name for row in areas(tmp_path / "out")] == ["a.png", "b.jpg"]


def test_an_image_too_long_for_an_overlay_is_named_and_the_others_done(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((2, 65_600, 3), 200, np.uint8)).save(photos / "long.png")
    assert predict(model, [str(photos)], tmp_path / "out", True, None, False) == 1
    assert len(areas(tmp_path / "out")) == 3
    assert not (tmp_path / "out/long.png").exists()
    errors = capsys.readouterr().err
    assert "long.png" in errors
    assert "do not fit into a JPEG" in errors


def test_an_empty_mask_is_an_answer(model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), 255, np.uint8)).save(tmp_path / "white.png")
    assert predict(model, [str(tmp_path / "white.png")], tmp_path / "out", True, None, False) == 0
    assert areas(tmp_path / "out")[0]["area_px"] == "0"
    assert areas(tmp_path / "out")[0]["mean_probability_inside"] == ""


def test_an_input_is_never_overwritten(model: Path, photos: Path, tmp_path: Path) -> None:
    before = (photos / "a.png").read_bytes()
    for paths, out in (([str(photos / "a.png")], photos), ([str(photos)], photos)):
        with pytest.raises(UserError, match="choose another --out"):
            predict(model, paths, out, False, None, False)
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(UserError, match="choose another --out"):
        predict(model, [str(photos / "a.png")], tmp_path / "link", False, None, False)
    assert (photos / "a.png").read_bytes() == before
    assert not (photos / "areas.csv").exists()


def test_a_mask_that_somebody_drew_is_never_overwritten(model: Path, photos: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    assert predict(model, [str(photos / "a.png")], masks, False, None, False) == 0
    drawn = Image.fromarray(np.eye(20, dtype=np.uint8) * 255)
    (masks / "sub").mkdir()
    drawn.save(masks / "sub" / "b.png")
    before = {path: path.read_bytes() for path in masks.rglob("*.*")}
    with pytest.raises(UserError, match=r"b\.png is there already, and 'fewmask predict' did not write it"):
        predict(model, [str(photos)], masks, False, None, False)
    assert {path: path.read_bytes() for path in masks.rglob("*.*")} == before


def test_a_second_call_into_the_folder_gives_the_same(model: Path, photos: Path) -> None:
    out = photos / "masks"
    predict(model, [str(photos)], out, True, None, False)
    first = areas(out)
    predict(model, [str(photos)], out, True, None, False)
    assert areas(out) == first


def test_wrong_usage_is_a_sentence(model: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        predict(model, [str(tmp_path / "nothing")], tmp_path / "out", False, None, False)
    with pytest.raises(UserError, match="threshold"):
        predict(model, [str(photos)], tmp_path / "out", False, 1.5, False)
    with pytest.raises(UserError, match="folder for --out"):
        predict(model, [str(photos)], model, False, None, False)
    with pytest.raises(UserError, match="no file"):
        predict(tmp_path / "none.onnx", [str(photos)], tmp_path / "out", False, None, False)
    assert not (tmp_path / "out").exists()
