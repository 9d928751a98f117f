"""Which files are meant, and the names of the answers."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.deploy.files import _unique, find_images
from fewmask.types import UserError

OUT = Path("elsewhere")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names_of(paths: list[Path | str], out: Path = OUT) -> list[str]:
    return sorted(job.name for job in find_images([str(path) for path in paths], out).jobs)


def test_a_folder_keeps_its_sub_folders_and_leaves_other_files_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "sub/a.png", "sub/deep/b.JPEG", "notes.txt", ".hidden/c.jpg", ".d.jpg")
    assert names_of([tmp_path]) == ["a", "sub/a", "sub/deep/b"]
    assert find_images([str(tmp_path)], OUT).num_other == 1


def test_masks_of_a_data_folder_are_no_photos(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/deep/masks/b.jpg", "masks/a.png", "more/c.jpg")
    assert names_of([tmp_path]) == ["images/a", "images/deep/masks/b", "more/c"]
    assert find_images([str(tmp_path)], OUT).num_masks == 1
    assert names_of([tmp_path / "masks"]) == ["a"]  # asked for
    (tmp_path / "images").rename(tmp_path / "photos")
    assert "masks/a" in names_of([tmp_path])  # a name, where there is no data folder


def test_patterns_search_as_a_shell_would(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jpg", "a/y.png", "b/x.jpg", "b/deep/z.jpg", "n.txt")
    assert names_of([f"{tmp_path}/a/*.jpg"]) == ["x"]
    assert names_of([f"{tmp_path}/*/x.jpg"]) == ["a/x", "b/x"]
    assert names_of([f"{tmp_path}/**/*.jpg"]) == ["a/x", "b/deep/z", "b/x"]
    assert names_of([f"{tmp_path}/*"]) == ["a/x", "a/y", "b/deep/z", "b/x"]


def test_a_file_with_brackets_in_its_name_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "scan[1].jpg")
    assert names_of([tmp_path / "scan[1].jpg"]) == ["scan[1]"]


def test_equal_stems_get_names_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "A.bmp", "other/a.jpg", "b.png")
    found = names_of(
        [tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "A.bmp", tmp_path / "other/a.jpg", tmp_path / "b.png"]
    )
    assert found == ["A_bmp", "a_jpg", "a_jpg-2", "a_png", "b"]


def test_an_image_named_twice_is_one_job_and_a_link_is_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    assert names_of([tmp_path, tmp_path / "a.jpg", f"{tmp_path}/*.jpg"]) == ["a", "b"]


def test_earlier_answers_inside_the_folder_are_not_inputs(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "out/a.png", "out/overlays/a.jpg")
    found = find_images([str(tmp_path)], tmp_path / "out")
    assert [job.name for job in found.jobs] == ["a"]
    assert found.num_own == 2


def test_a_folder_inside_the_output_folder_is_searched(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg")
    assert names_of([tmp_path / "images"], tmp_path) == ["a"]


@pytest.mark.parametrize("what", ["missing.jpg", "*.jpg", "."])
def test_nothing_found_is_a_sentence(tmp_path: Path, what: str) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=r"no file or folder|matches no file|no image"):
        find_images([str(tmp_path / what)], OUT)


def test_naming_tens_of_thousands_of_images_takes_no_minutes(tmp_path: Path) -> None:
    named = [(tmp_path / f"{number}.jpg", str(number)) for number in range(40_000)]
    started = time.process_time()
    assert len(_unique(named)) == 40_000
    assert time.process_time() - started < 10


@settings(max_examples=40, deadline=None)
@given(st.sets(st.from_regex(r"([ab]/)?[aA-](-2)?(_jpg)?\.(jpg|png|bmp)", fullmatch=True), min_size=1))
def test_no_two_answers_share_a_name_whatever_the_case(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        touch(Path(folder), *names)
        paths = [str(Path(folder) / name) for name in sorted(names)]
        jobs = find_images(paths, OUT).jobs
    assert len(jobs) == len(names)
    assert len({job.name.casefold() for job in jobs}) == len(jobs)
