"""Each defect a folder may have is found, and its sentence names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.data.audit import CLOSED_UP_TO, Audit, audit, overlaps
from fewmask.data.manifest import load_cases
from fewmask.data.synthetic import render
from fewmask.types import Case
from tests.data.conftest import disc, save

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SIZE = (48, 64)
NUM = 22


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a sound data set of NUM labelled pictures and one without a mask."""
    for number in range(NUM + 1):
        image, mask = render(np.random.default_rng([5, number]), SIZE)
        save(tmp_path / "images" / f"{number:03}.jpg", image, quality=95)
        if number < NUM:
            save(tmp_path / "masks" / f"{number:03}.png", mask.astype(np.uint8) * 255)
    return tmp_path


def mask_of(folder: Path, number: int = 3) -> np.ndarray:
    with Image.open(folder / "masks" / f"{number:03}.png") as picture:
        return np.asarray(picture)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def found(folder: Path, kind: str = "errors") -> dict[str, str]:
    return {finding.code: finding.message for finding in getattr(audit(load_cases(folder)), kind)}


def test_a_sound_folder_has_no_findings(folder: Path) -> None:
    result = audit(load_cases(folder))
    assert (result.errors, result.warnings, result.notes, result.duplicates) == ([], [], [], [])
    assert result.counts["num_images"] == NUM + 1
    assert result.counts["num_masks"] == NUM
    assert result.counts["num_unlabelled"] == 1
    assert result.counts["height"] == {"min": 48, "median": 48, "max": 48}
    shares = [(mask_of(folder, number) > 0).mean() for number in range(NUM)]
    assert result.counts["mask_fraction"]["0.5"] == pytest.approx(np.median(shares), abs=1e-4)
    assert result.counts["mask_fraction"]["1"] == pytest.approx(max(shares), abs=1e-4)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no bytes": (lambda f: (f / "images/003.jpg").write_bytes(b""), "unreadable-image", "0 bytes"),
    "cut short": (lambda f: cut(f / "images/003.jpg"), "unreadable-image", "damaged or cut short"),
    "web page": (
        lambda f: (f / "images/003.jpg").write_text("<!DOCTYPE html><p>Not found"),
        "unreadable-image",
        "web page",
    ),
    "noise": (lambda f: (f / "images/003.jpg").write_bytes(bytes(range(256)) * 9), "unreadable-image", "not an image"),
    "mask cut short": (lambda f: cut(f / "masks/003.png"), "unreadable-mask", "damaged or cut short"),
    "off by one": (lambda f: save(f / "masks/003.png", mask_of(f)[1:]), "size-mismatch", "off by one pixel"),
    "off by one each way": (lambda f: save(f / "masks/003.png", mask_of(f)[1:, 1:]), "size-mismatch", "off by one"),
    "transposed": (lambda f: save(f / "masks/003.png", mask_of(f).T), "size-mismatch", "transposed"),
    "halved": (lambda f: save(f / "masks/003.png", mask_of(f)[::2, ::2]), "size-mismatch", "another scale"),
    "another picture's": (
        lambda f: save(f / "masks/003.png", disc(30, 90) * np.uint8(255)),
        "size-mismatch",
        "check the pair",
    ),
    "colour": (
        lambda f: save(f / "masks/003.png", render(np.random.default_rng(1), SIZE)[0]),
        "unreadable-mask",
        "several colours",
    ),
    "classes": (
        lambda f: save(f / "masks/003.png", np.arange(48 * 64).reshape(SIZE).astype(np.uint8) // 64 * 60),
        "unreadable-mask",
        "grey levels",
    ),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(folder: Path, defect: str) -> None:
    spoil, code, reason = BROKEN[defect]
    spoil(folder)
    result = audit(load_cases(folder))
    assert [finding.code for finding in result.errors] == [code]
    assert result.errors[0].files == ("003",)
    assert reason in result.errors[0].message
    name = "masks/003.png" if "masks/003.png" in result.errors[0].message else "images/003.jpg"
    assert str(folder / name) in result.errors[0].message


def test_all_broken_files_are_named_not_the_first_alone(folder: Path) -> None:
    for number in (2, 5, 7):
        cut(folder / "images" / f"{number:03}.jpg")
    cut(folder / "masks" / "009.png")
    assert [finding.files for finding in audit(load_cases(folder)).errors] == [("002",), ("005",), ("007",), ("009",)]


def test_tiny_long_and_plain_images(folder: Path) -> None:
    save(folder / "images/a.png", render(np.random.default_rng(1), (40, 40))[0][:31])
    save(folder / "images/b.png", render(np.random.default_rng(1), (40, 165))[0])
    save(folder / "images/c.png", np.full((40, 60, 3), 9, np.uint8))
    assert "'" + str(folder / "images/a.png") in found(folder)["tiny-image"]
    warnings = found(folder, "warnings")
    assert str(folder / "images/b.png") in warnings["long-image"]
    assert str(folder / "images/c.png") in warnings["constant-image"]
    assert warnings.keys() == {"long-image", "constant-image"}


@pytest.mark.parametrize(("value", "code"), [(0, "empty-mask"), (255, "full-mask")])
def test_empty_and_full_masks_are_warned_of(folder: Path, value: int, code: str) -> None:
    for number in (3, 4):
        save(folder / "masks" / f"{number:03}.png", np.full(SIZE, value, np.uint8))
    message = found(folder, "warnings")[code]
    assert message.startswith("2 masks")
    assert str(folder / "masks/003.png") in message
    assert found(folder) == {}


def test_remarks_on_masks_are_counted_not_repeated(folder: Path) -> None:
    for number in range(12):
        save(folder / "masks" / f"{number:03}.png", mask_of(folder, number) // 255)
    save(folder / "masks" / "015.png", 255 - disc(*SIZE) * np.uint8(255))
    result = audit(load_cases(folder))
    assert [(finding.code, len(finding.files)) for finding in result.notes] == [("mask-values", 12)]
    assert result.notes[0].message.startswith("12 masks with values 0/1 (")
    assert result.notes[0].message.count("masks/") == 4
    assert "and 8 more" in result.notes[0].message
    assert [(finding.code, finding.files) for finding in result.warnings] == [("mask-inverted", ("015",))]


def edge_mask() -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[10:30, :20] = 255
    return mask


def test_masks_that_stay_inverted_among_inverted_ones_are_an_error(folder: Path) -> None:
    for number in range(NUM):
        save(folder / "masks" / f"{number:03}.png", 255 - disc(*SIZE) * np.uint8(255))
    save(folder / "masks/004.png", 255 - edge_mask())
    speck = np.full(SIZE, 255, np.uint8)
    speck[20, 20] = 0
    save(folder / "masks/009.png", speck)
    result = audit(load_cases(folder))
    assert [(finding.code, finding.files) for finding in result.errors] == [("masks-inverted-in-part", ("004", "009"))]
    assert str(folder / "masks/004.png") in result.errors[0].message
    assert "20 others are" in result.errors[0].message
    assert ("mask-inverted-perhaps", ("009",)) in [(finding.code, finding.files) for finding in result.warnings]


def test_a_large_foreground_among_upright_masks_is_no_error(folder: Path) -> None:
    save(folder / "masks/004.png", 255 - edge_mask())
    for number in (1, 2):
        save(folder / "masks" / f"{number:03}.png", 255 - disc(*SIZE) * np.uint8(255))
    assert found(folder) == {}


def test_the_cores_this_process_may_use_are_its_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers: int | None = None) -> None:
            numbers.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr("fewmask.data.audit.ThreadPoolExecutor", Pool)
    monkeypatch.setattr("fewmask.data.audit.num_cores", lambda: 3)
    audit(load_cases(folder))
    assert numbers == [3]


def test_a_group_in_two_splits_is_an_error(folder: Path) -> None:
    lines = ["image,mask,split,group"]
    for number in range(NUM):
        split = ("train", "val", "test")[number % 3]
        group = "P7" if number in (3, 4) else f"G{number}"
        lines.append(f"images/{number:03}.jpg,masks/{number:03}.png,{split},{group}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    result = audit(load_cases(folder))
    assert [finding.code for finding in result.errors] == ["group-straddles"]
    assert "Group 'P7' is in train and val (003, 004)" in result.errors[0].message
    assert result.counts["splits"]["train"] == {"num_images": 8, "num_masks": 8, "num_groups": 8}


def with_splits(folder: Path, **splits: str) -> None:
    lines = ["image,mask,split"]
    for path in sorted((folder / "images").iterdir()):
        mask = folder / "masks" / f"{path.stem}.png"
        split = splits.get(f"s{path.stem}", "train" if mask.exists() else "")
        lines.append(f"images/{path.name},{mask.relative_to(folder) if mask.exists() else ''},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("kind", ["byte", "near"])
def test_copies_are_found_and_warned_of_where_splits_part_them(folder: Path, kind: str) -> None:
    if kind == "byte":
        shutil.copy(folder / "images/003.jpg", folder / "images/copy.jpg")
    else:
        with Image.open(folder / "images/003.jpg") as picture:
            picture.resize((128, 96)).save(folder / "images/copy.jpg", quality=60)
    result = audit(load_cases(folder))
    assert result.duplicates == [("003", "copy", kind)]
    assert result.warnings == []
    assert "(003 = copy)" in result.notes[0].message
    with_splits(folder, s003="test", scopy="train")
    result = audit(load_cases(folder))
    assert [finding.code for finding in result.warnings] == [f"{kind}-duplicates-straddle"]
    assert result.warnings[0].files == ("003", "copy")
    assert "003 = copy" in result.warnings[0].message


def test_every_two_of_a_set_of_copies_are_listed(folder: Path) -> None:
    for name in ("x", "y"):
        shutil.copy(folder / "images/003.jpg", folder / f"images/{name}.jpg")
    with Image.open(folder / "images/003.jpg") as picture:
        picture.resize((256, 192)).save(folder / "images/z.jpg")
    result = audit(load_cases(folder))
    assert [(a, b) for a, b, _ in result.duplicates] == list(combinations(("003", "x", "y", "z"), 2))
    assert {(a, b): kind for a, b, kind in result.duplicates}[("x", "y")] == "byte"
    assert {(a, b): kind for a, b, kind in result.duplicates}[("x", "z")] == "near"


def test_hundreds_of_copies_do_not_make_a_table_of_all_pairs(tmp_path: Path) -> None:
    first = save(tmp_path / "images/000.png", render(np.random.default_rng(0), SIZE)[0])
    num = CLOSED_UP_TO + 5
    for number in range(1, num):
        shutil.copy(first, tmp_path / "images" / f"{number:03}.png")
    result = audit(load_cases(tmp_path))
    assert result.duplicates == [("000", f"{number:03}", "byte") for number in range(1, num)]
    assert ("007", "009", "near") in overlaps(result, ["007"], ["009", "011"])


def test_overlaps_go_through_third_pictures() -> None:
    result = Audit(duplicates=[("a", "b", "byte"), ("a", "c", "near"), ("p", "q", "near")])
    assert overlaps(result, ["b", "q", "x"], ["c", "p"]) == [("b", "c", "near"), ("q", "p", "near")]
    assert overlaps(result, ["a"], ["a", "b"]) == [("a", "b", "byte")]
    assert overlaps(result, ["a"], []) == []


@pytest.mark.parametrize(("num", "code"), [(0, "no-masks"), (1, "too-few-masks"), (5, "few-masks")])
def test_too_few_masks(folder: Path, num: int, code: str) -> None:
    for number in range(num, NUM):
        (folder / "masks" / f"{number:03}.png").unlink()
    result = audit(load_cases(folder))
    where = result.errors if code == "too-few-masks" else result.warnings
    assert [finding.code for finding in where] == [code]


def test_a_given_split_without_masks_is_warned_of(folder: Path) -> None:
    with_splits(folder, s022="test")
    assert "Split 'test' holds no mask" in found(folder, "warnings")["split-without-masks"]


def test_unlabelled_folders_join_the_search_for_copies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    body = tmp_path_factory.mktemp("body")
    shutil.copy(folder / "images/003.jpg", body / "web_1.jpg")
    (body / "bad.jpg").write_bytes(b"")
    result = audit(load_cases(folder, unlabelled=[body]))
    assert result.duplicates == [("003", "web_1", "byte")]
    assert [finding.files for finding in result.errors] == [("bad",)]
    assert overlaps(result, ["web_1"], ["003"]) == [("web_1", "003", "byte")]


def test_progress_counts_to_the_end_and_threads_change_nothing(folder: Path) -> None:
    cases = load_cases(folder)
    seen: list[tuple[int, int]] = []
    one = audit(cases, 1, lambda done, total: seen.append((done, total))).to_json()
    four = audit(cases, 4).to_json()
    assert seen == [(number, len(cases)) for number in range(1, len(cases) + 1)]
    one["counts"].pop("seconds")
    four["counts"].pop("seconds")
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(four))


def test_facts_are_kept_for_what_could_be_read(folder: Path) -> None:
    cut(folder / "images/003.jpg")
    result = audit(load_cases(folder))
    assert "003" not in result.facts
    assert result.facts["004"].size == SIZE


@pytest.mark.skipif(not (SHARED / "ham10000").is_dir(), reason="HAM10000 is not in ../shared/data")
def test_the_byte_equal_pairs_of_ham10000_are_found() -> None:
    names = ["ISIC_0024366", "ISIC_0024777", "ISIC_0029861", "ISIC_0029938", "ISIC_0024306", "ISIC_0024307"]
    cases = [Case(name, SHARED / "ham10000" / "images" / f"{name}.jpg") for name in names]
    expected = [("ISIC_0024366", "ISIC_0029861", "byte"), ("ISIC_0024777", "ISIC_0029938", "byte")]
    assert audit(cases).duplicates == expected


@pytest.mark.skipif(not (SHARED / "isic").is_dir(), reason="ISIC-2018 is not in ../shared/data")
def test_isic2017_has_copies_of_test_images_in_training() -> None:
    names = ["ISIC_0000162", "ISIC_0014826", "ISIC_0012887", "ISIC_0012989", "ISIC_0000000"]
    cases = load_cases(SHARED / "isic", Path("manifest_isic2017.csv"))
    result = audit([case for case in cases if case.name in names])
    assert [finding.code for finding in result.warnings][:1] == ["near-duplicates-straddle"]
    assert result.duplicates == [("ISIC_0000162", "ISIC_0014826", "near"), ("ISIC_0012887", "ISIC_0012989", "near")]
