"""`fewmask check`: its exit code, its sentences, and JSON that a program can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fewmask.commands.check import check
from fewmask.data.sources.layout import write_mask
from fewmask.data.synthetic import make_dataset
from fewmask.types import UserError

SIZE = (48, 64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Draw 24 labelled pictures, paired by name alone."""
    monkeypatch.setenv("FEWMASK_CACHE", str(tmp_path / "cache"))
    folder = make_dataset(tmp_path / "data", 24, 2, SIZE)
    (folder / "manifest.csv").unlink()
    return folder


def checked(folder: Path, capsys: pytest.CaptureFixture[str], manifest: str | None = None) -> tuple[int, str]:
    code = check(folder, manifest, [], as_json=False)
    return code, capsys.readouterr().out


def test_sound_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = checked(folder, capsys)
    assert code == 0
    assert "images: 26 (24 with a mask, 2 without)" in text
    assert text.endswith("No errors.\n")


def test_a_broken_image_is_named_and_gives_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images/synthetic_00003.jpg").write_bytes(b"")
    code, text = checked(folder, capsys)
    assert code == 1
    assert f"error: '{folder / 'images/synthetic_00003.jpg'}' is empty" in text
    assert text.endswith("1 error: mend what is listed above, then run the same command again.\n")


def extra_mask(folder: Path) -> None:
    write_mask(folder / "masks/stranger.png", np.zeros(SIZE, bool))


def missing_mask(folder: Path) -> None:
    (folder / "manifest.csv").write_text("image,mask\nimages/synthetic_00000.jpg,masks/gone.png\n")


def colliding_names(folder: Path) -> None:
    shutil.copy(folder / "images/synthetic_00001.jpg", folder / "images/SYNTHETIC_00001.JPG")


def no_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (extra_mask, "stranger.png"),
        (missing_mask, "masks/gone.png"),
        (colliding_names, "SYNTHETIC_00001.JPG"),
        (no_images, "'images'"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_keeps_the_cases_from_being_listed_is_an_error_too(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: object, name: str, as_json: bool
) -> None:
    spoil(folder)  # type: ignore[operator]
    assert check(folder, None, [], as_json) == 1
    text = capsys.readouterr().out
    message = json.loads(text)["errors"][0]["message"] if as_json else text
    assert name in message


def test_json_is_all_that_goes_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "images/synthetic_00001.jpg", folder / "images/copy.jpg")
    assert check(folder, None, [], as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["duplicates"] == [["copy", "synthetic_00001", "byte"]]
    assert answer["counts"]["num_images"] == 27
    assert [finding["code"] for finding in answer["notes"]] == ["byte-duplicates"]


def test_every_line_of_a_bad_manifest_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.csv").write_text("image\nimages/none.jpg\nimages/synthetic_00000.jpg\nimages/gone.jpg\n")
    code, text = checked(folder, capsys)
    assert code == 1
    assert "line 2, column image, names 'images/none.jpg'" in text
    assert "line 4, column image, names 'images/gone.jpg'" in text
    assert text.endswith("2 errors: mend what is listed above, then run the same command again.\n")


def test_what_a_manifest_leaves_out_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"images/synthetic_{number:05}.jpg,masks/synthetic_{number:05}.png" for number in range(22)]
    (folder / "manifest.csv").write_text("\n".join(["image,mask", *rows]))
    (folder / "images/README.txt").write_text("about")
    assert check(folder, None, [], as_json=True) == 0
    notes = {finding["code"]: finding for finding in json.loads(capsys.readouterr().out)["notes"]}
    assert notes["not-listed"]["message"].startswith("6 files are")
    assert "images/synthetic_00022.jpg" in notes["not-listed"]["files"]
    assert notes["not-pictures"]["files"] == ["images/README.txt"]


def test_names_with_brackets_are_printed_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images/[bold]x.jpg").write_bytes(b"")
    assert "[bold]x.jpg' is empty" in checked(folder, capsys)[1]


def test_many_errors_are_cut_with_a_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(24):
        (folder / f"images/synthetic_{number:05}.jpg").write_bytes(b"")
    code, text = checked(folder, capsys)
    assert code == 1
    assert text.count("error: '") == 20
    assert "and 4 more" in text


def test_a_source_is_imported_and_then_checked(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    for number, part in enumerate(("Training", "Test")):
        images = raw / f"ISBI2016_ISIC_Part1_{part}_Data"
        masks = raw / f"ISBI2016_ISIC_Part1_{part}_GroundTruth"
        images.mkdir(parents=True)
        masks.mkdir()
        for index in range(number * 12, number * 12 + 12):
            shutil.copy(folder / f"images/synthetic_{index:05}.jpg", images / f"ISIC_{index:07}.jpg")
            shutil.copy(folder / f"masks/synthetic_{index:05}.png", masks / f"ISIC_{index:07}_Segmentation.png")
    assert check(raw, None, [], False, "isic2016", tmp_path / "imported") == 0
    text = capsys.readouterr().out
    assert "split train: 12 images, 12 masks" in text
    assert "split test: 12 images, 12 masks" in text


def test_source_and_out_go_together_and_names_are_suggested(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="go together"):
        check(tmp_path, None, [], False, "isic2016", None)
    with pytest.raises(UserError, match="go together"):
        check(tmp_path, None, [], False, None, tmp_path / "out")
    with pytest.raises(UserError, match="Did you mean 'isic2016'"):
        check(tmp_path, None, [], False, "isic_2016", tmp_path / "out")
