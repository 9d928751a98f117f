"""The made-up data set: the same for a seed, whole after an interruption, neither trivial nor impossible."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from fewmask.data.manifest import load_cases
from fewmask.data.reading import image_size, read_mask
from fewmask.data.synthetic import make_dataset, render
from fewmask.types import UserError

SIZE = (64, 80)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_seed_gives_the_same_files_whatever_the_threads(tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "a", 6, 4, SIZE, seed=3, workers=1)
    other = make_dataset(tmp_path / "b", 6, 4, SIZE, seed=3, workers=4)
    third = make_dataset(tmp_path / "c", 6, 4, SIZE, seed=4)
    assert contents(one) == contents(other)
    assert contents(one) != contents(third)


def test_a_set_cut_short_is_completed(tmp_path: Path) -> None:
    whole = contents(make_dataset(tmp_path / "data", 6, 4, SIZE))
    for gone in ("manifest.csv", "images/synthetic_00003.jpg", "masks/synthetic_00001.png"):
        (tmp_path / "data" / gone).unlink()
    (tmp_path / "data" / "images" / ".synthetic_00003.jpg.123.part").write_bytes(b"half")
    kept = tmp_path / "data" / "images" / "synthetic_00005.jpg"
    before = kept.stat().st_mtime_ns
    make_dataset(tmp_path / "data", 6, 4, SIZE)
    assert contents(tmp_path / "data") == whole
    assert kept.stat().st_mtime_ns == before


def test_a_whole_set_is_left_alone_and_one_of_other_arguments_replaced(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", 5, 5, SIZE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    make_dataset(tmp_path / "data", 5, 5, SIZE)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    make_dataset(tmp_path / "data", 2, 1, SIZE, seed=9)
    assert contents(tmp_path / "data") == contents(make_dataset(tmp_path / "fresh", 2, 1, SIZE, seed=9))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_dataset(tmp_path, 2, 2, SIZE)
    with pytest.raises(UserError, match="is a file"):
        make_dataset(tmp_path / "precious.txt", 2, 2, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(("labelled", "unlabelled", "size"), [(0, 0, SIZE), (-1, 5, SIZE), (2, 2, (16, 80))])
def test_impossible_sets_are_refused(tmp_path: Path, labelled: int, unlabelled: int, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="Cannot make"):
        make_dataset(tmp_path / "data", labelled, unlabelled, size)


def test_the_loader_reads_it_and_groups_stay_together(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", 40, 20, SIZE, fractions=(0.6, 0.2, 0.2))
    cases = load_cases(folder)
    labelled = {case.name for case in cases if case.mask is not None}
    assert (len(cases), len(labelled)) == (60, 40)
    groups: dict[str, set[tuple[str | None, bool, str | None]]] = {}
    for case in cases:
        groups.setdefault(case.group, set()).add((case.split, case.mask is not None, case.label))
    assert all(len(kinds) == 1 for kinds in groups.values())
    assert 25 < len(groups) < 60
    assert {case.split for case in cases if case.mask is not None} == {"train", "val", "test"}
    assert {case.split for case in cases if case.mask is None} == {None}
    assert {case.label for case in cases} == {"network", "globular", "homogeneous"}


def test_files_are_what_the_manifest_says(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", 3, 2, SIZE)
    assert json.loads((folder / "synthetic.json").read_text())["size"] == list(SIZE)
    for row in rows(folder):
        assert image_size(folder / row["image"]) == SIZE
        if row["mask"]:
            reading = read_mask(folder / row["mask"])
            assert reading.mask.shape == SIZE
            assert reading.mask.any()
            assert reading.remarks == ()


def test_pictures_are_neither_trivial_nor_hopeless() -> None:
    scores, contrasts = [], []
    for seed in range(60):
        image, mask = render(np.random.default_rng([11, seed]), (96, 128))
        assert image.dtype == np.uint8
        assert image.shape == (96, 128, 3)
        assert 0.005 < mask.mean() < 0.95
        grey = image.mean(axis=2)
        dark = grey < threshold_otsu(grey)
        scores.append(2 * (dark & mask).sum() / (dark.sum() + mask.sum()))
        contrasts.append(np.median(grey[~mask]) - np.median(grey[mask]))
    assert 0.6 < np.mean(scores) < 0.87
    assert np.mean(np.array(contrasts) > 0) > 0.95
