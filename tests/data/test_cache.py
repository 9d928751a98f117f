"""A cache holds exactly the resized files, appears whole or not at all, and says what to do when it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fewmask.data import cache
from fewmask.data.cache import build_cache, cache_size
from fewmask.data.manifest import load_cases
from fewmask.data.preprocess import resize_image, resize_mask
from fewmask.data.reading import read_image, read_mask
from fewmask.types import Case, UserError
from tests.data.conftest import make_folder, picture, save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return load_cases(make_folder(tmp_path / "DATA", num_labelled=25, num_unlabelled=15))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("size", "side"), [(128, 144), (224, 256), (256, 288), (32, 40), (100, 120)])
def test_cache_size_is_an_eighth_more_in_steps_of_eight(size, side):
    assert cache_size(size) == side


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_are_the_resized_files_in_the_order_given(cases, tmp_path, workers):
    cases = cases[::-1]
    data = build_cache(cases, 32, tmp_path / "cache", workers=workers)
    assert data.images.shape == (40, 40, 40, 3)
    assert data.names == [case.name for case in cases]
    for row, case in enumerate(cases):
        assert np.array_equal(data.images[row], resize_image(read_image(case.image), 40))
        assert data.has_mask[row] == (case.mask is not None)
        expected = 0 if case.mask is None else resize_mask(read_mask(case.mask).mask, 40)
        assert (data.masks[row] == expected).all()


def test_labels_are_indices_into_the_sorted_table(cases, tmp_path):
    given = ["nv", None, "bcc", "nv"]
    labelled = [Case(c.name, c.image, c.mask, label=label) for c, label in zip(cases[:4], given, strict=True)]
    data = build_cache(labelled, 32, tmp_path / "cache")
    assert data.label_names == ("bcc", "nv")
    assert data.labels.tolist() == [1, -1, 0, 1]
    relabelled = build_cache(cases[:4], 32, tmp_path / "cache")
    assert relabelled.labels.tolist() == [-1] * 4
    assert len(entries(tmp_path / "cache")) == 1  # labels are not part of the key


def test_no_masks_no_array(cases, tmp_path):
    data = build_cache(cases[25:], 32, tmp_path / "cache")
    assert data.masks is None
    assert not data.has_mask.any()


def test_a_second_call_reads_nothing_and_a_change_builds_anew(cases, tmp_path, monkeypatch):
    progress = []
    build_cache(cases, 32, tmp_path / "cache", on_progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (40, 40)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    again: list = []
    build_cache(cases, 32, tmp_path / "cache", on_progress=lambda *args: again.append(args))
    assert not again
    save(cases[0].image, picture(77))
    changed = build_cache(cases, 32, tmp_path / "cache")
    assert np.array_equal(changed.images[0], resize_image(picture(77), 40))
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    build_cache(cases, 32, tmp_path / "cache", on_progress=lambda *args: again.append(args))
    assert again
    build_cache(cases, 64, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 4


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "shape"])
def test_a_damaged_entry_is_built_again(cases, tmp_path, damage):
    build_cache(cases, 32, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    images = entry / "images.npy"
    if damage == "gone":
        (entry / "masks.npy").unlink()
    elif damage == "shape":
        np.save(images, np.zeros((2, 40, 40, 3), np.uint8))
    else:
        images.write_bytes(images.read_bytes()[:1000] if damage == "cut" else b"text")
    data = build_cache(cases, 32, tmp_path / "cache")
    assert np.array_equal(data.images[3], resize_image(read_image(cases[3].image), 40))


def test_errors_name_the_file_and_leave_nothing(cases, tmp_path):
    cases[7].image.write_bytes(b"")
    with pytest.raises(UserError, match=r"007\.png.*empty"):
        build_cache(cases, 32, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    save(cases[7].image, picture(height=50))
    with pytest.raises(UserError, match=r"007\.png' is 60 x 40 pixels but its image .*60 x 50"):
        build_cache(cases, 32, tmp_path / "cache")
    with pytest.raises(UserError, match="empty"):
        build_cache([], 32, tmp_path / "cache")


def test_an_interruption_leaves_nothing(cases, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(cases, 32, tmp_path / "cache", on_progress=stop)
    assert entries(tmp_path / "cache") == []


def test_a_cache_may_be_shared_and_is_on_the_disk_before_it_appears(cases, tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), fsync(handle)))
    build_cache(cases, 32, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o755
    assert {(entry / name).stat().st_ino for name in ("images.npy", "masks.npy")} <= set(flushed)


def test_leftovers_of_dead_builders_go_and_those_of_living_ones_stay(cases, tmp_path):
    old, new = tmp_path / "cache" / ".building-old", tmp_path / "cache" / ".building-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "images.npy").write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    build_cache(cases, 32, tmp_path / "cache")
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_told_before_and_while_writing(cases, tmp_path, monkeypatch):
    needed = f"{(40 * 3 + 25) * 40 * 40 + 2**20:,} bytes"
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(UserError, match=f"{needed}.*FEWMASK_CACHE"):
            build_cache(cases, 32, tmp_path / "cache")

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write_row", fill)
    with pytest.raises(UserError, match=needed):
        build_cache(cases, 32, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_says_what_to_set(cases, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*FEWMASK_CACHE"):
        build_cache(cases, 32, tmp_path / "file" / "cache")


BUILDER = """
import sys, time
from pathlib import Path
from fewmask.data.cache import build_cache
from fewmask.data.manifest import load_cases
cases = load_cases(Path(sys.argv[1]))
while time.time() < float(sys.argv[3]):
    pass
data = build_cache(cases, 32, Path(sys.argv[2]), workers=2, on_progress=lambda *_: time.sleep(0.02))
print(data.images.sum(), data.masks.sum(), "torch" in sys.modules)
"""


def test_two_processes_build_at_once_without_torch(cases, tmp_path):
    start = str(time.time() + 1.5)
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "DATA"), str(tmp_path / "cache"), start]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    data = build_cache(cases, 32, tmp_path / "cache")
    assert answers == [[str(data.images.sum()), str(data.masks.sum()), "False"]] * 2
    (entry,) = (tmp_path / "cache").iterdir()
    assert json.loads((entry / "meta.json").read_text())["num_images"] == 40
