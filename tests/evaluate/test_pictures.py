"""Which cases the report shows, and what their pictures hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.evaluate.metrics import case_metrics
from fewmask.evaluate.pictures import choose_cases, save_pictures, thumbnail_size
from fewmask.evaluate.score import score_cases

from .masks import disk
from .test_score import red, write_case
from .test_statistics import make_row


def chosen(dice: list[float]) -> dict[str, list[float]]:
    picks = choose_cases([make_row(f"c{i:03d}", d) for i, d in enumerate(dice)])
    names = [row["name"] for _, _, row in picks]
    assert len(set(names)) == len(names)
    return {kind: [row["dice"] for k, _, row in picks if k == kind] for kind in ("best", "median", "worst")}


def test_the_extremes_and_the_middle_are_chosen() -> None:
    picks = chosen([i / 100 for i in np.random.default_rng(0).permutation(101)])
    assert picks["best"] == [1.0, 0.99, 0.98, 0.97]
    assert picks["worst"] == [i / 100 for i in range(8)]
    assert picks["median"] == [0.48, 0.49, 0.5, 0.51]


@pytest.mark.parametrize(("num", "sizes"), [(1, (0, 0, 1)), (2, (1, 0, 1)), (8, (2, 2, 4)), (16, (4, 4, 8))])
def test_few_cases_are_shared_out(num: int, sizes: tuple[int, int, int]) -> None:
    picks = chosen([i / num for i in range(num)])
    assert tuple(len(picks[kind]) for kind in ("best", "median", "worst")) == sizes


def test_empty_masks_left_empty_are_no_pictures_of_success() -> None:
    rows = [make_row(f"e{i}", 1.0, empty_truth=True) for i in range(30)]
    rows += [make_row(f"l{i}", 0.5 + i / 100) for i in range(30)]
    rows += [make_row("alarm", 0.0, empty_truth=True)]
    picks = choose_cases(rows)
    assert all(row["name"].startswith("l") for kind, _, row in picks if kind != "worst")
    assert next(row["name"] for kind, rank, row in picks if (kind, rank) == ("worst", 1)) == "alarm"


def test_pictures_show_the_case_and_its_masks(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, f"c{i}", disk(500, (200, 150 + 10 * i), 90), shift=3 * i) for i in range(5)]
    rows = score_cases(red, cases)
    index_file = save_pictures(tmp_path / "run", "test", rows, cases, red)
    index = json.loads(index_file.read_text())
    assert index_file == tmp_path / "run" / "pictures" / "test" / "index.json"
    assert [(e["kind"], e["rank"], e["name"]) for e in index][-1] == ("worst", 3, "c2")
    for entry in index:
        truth, prediction = (np.asarray(Image.open(index_file.parent / entry[k])) for k in ("truth", "prediction"))
        image = np.asarray(Image.open(index_file.parent / entry["image"]))
        assert image.shape == (384, 384, 3)
        assert set(np.unique(truth)) == {0, 255}
        assert case_metrics(prediction > 0, truth > 0)["dice"] == pytest.approx(entry["dice"], abs=0.01)
        assert np.mean((image[..., 0] > 127) == (prediction > 0)) > 0.995


def test_a_second_evaluation_replaces_the_pictures(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, f"a/{i}".replace("/", "_"), disk(60, (30, 30), 9 + i)) for i in range(6)]
    rows = score_cases(red, cases)
    save_pictures(tmp_path, "test", rows, cases, red)
    save_pictures(tmp_path, "test", rows[:1], cases, red)
    names = {path.name for path in (tmp_path / "pictures" / "test").iterdir()}
    assert names == {"index.json", "worst_01_image.jpg", "worst_01_truth.png", "worst_01_prediction.png"}
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["test"]


def test_a_failure_leaves_the_old_pictures(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, "c", disk(60, (30, 30), 9))]
    rows = score_cases(red, cases)
    index_file = save_pictures(tmp_path, "test", rows, cases, red)
    before = index_file.read_text()

    def fail(image: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pictures(tmp_path, "test", rows, cases, fail)
    assert index_file.read_text() == before
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["test"]


def test_thumbnails_keep_their_shape_and_are_never_enlarged() -> None:
    assert thumbnail_size((2592, 1936)) == (384, 287)
    assert thumbnail_size((100, 80)) == (100, 80)
    assert thumbnail_size((5000, 1)) == (384, 1)
