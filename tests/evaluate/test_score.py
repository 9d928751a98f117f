"""Scoring whole cases: native size, 256x256, order, mistakes of the user."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewmask.evaluate.metrics import case_metrics, hd95
from fewmask.evaluate.protocol import score_case, to_common_grid
from fewmask.evaluate.results import COLUMNS, read_case_csv, write_case_csv
from fewmask.evaluate.score import score_cases, summarise
from fewmask.evaluate.statistics import METRICS
from fewmask.types import Case, UserError

from .masks import Mask, disk, masks


def write_case(folder: Path, name: str, mask: Mask, shift: int = 0, group: str = "") -> Case:
    """Write an image whose red channel is the mask moved right by `shift`, and the mask."""
    image = np.zeros((*mask.shape, 3), dtype=np.uint8)
    image[..., 0] = 255 * np.roll(mask, shift, axis=1)
    Image.fromarray(image).save(folder / f"{name}_image.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}_mask.png")
    return Case(name, folder / f"{name}_image.png", folder / f"{name}_mask.png", group=group)


def red(image: np.ndarray) -> np.ndarray:
    """Predict what the red channel says."""
    return image[..., 0].astype(np.float32) / 255


@pytest.mark.parametrize("scorers", [1, 3])
def test_rows_are_those_of_the_cases_in_their_order(
    scorers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewmask.evaluate.score.SCORERS", scorers)
    truths = [disk(90 + 10 * i, (40, 45), 12 + i) for i in range(9)]
    cases = [write_case(tmp_path, f"c{i}", truth, shift=i) for i, truth in enumerate(truths)]
    seen: list[tuple[int, int]] = []
    kept: list[str] = []
    rows = score_cases(red, cases, on_progress=lambda *n: seen.append(n), keep=lambda case, _: kept.append(case.name))
    assert [row["name"] for row in rows] == kept == [f"c{i}" for i in range(9)]
    assert seen == [(i, 9) for i in range(1, 10)]
    for i, (row, truth) in enumerate(zip(rows, truths, strict=True)):
        expected = case_metrics(np.roll(truth, i, axis=1), truth)
        assert {k: row[k] for k in expected if k != "hd95"} == {k: v for k, v in expected.items() if k != "hd95"}
        assert row["hd95_percent"] == pytest.approx(100 * expected["hd95"] / math.hypot(*truth.shape))
        assert (row["height"], row["width"]) == truth.shape
        assert row["truth_fraction"] == truth.mean()


def test_a_missed_lesion_costs_and_is_counted(tmp_path: Path) -> None:
    truths = [disk(64, (30, 30), 10), disk(64, (30, 30), 10), np.zeros((64, 64), dtype=bool)]
    cases = [write_case(tmp_path, f"c{i}", truth) for i, truth in enumerate(truths)]
    summary = summarise(score_cases(lambda image: np.zeros(image.shape[:2], np.float32), cases))
    assert summary["missed"] == 2
    assert summary["positives"]["dice"]["mean"] == 0
    assert summary["positives"]["hd95_percent"]["mean"] == pytest.approx(100)
    assert summary["positives"]["hd95_256"]["mean"] == pytest.approx(256 * math.sqrt(2))
    assert summary["empties"] == {"num_cases": 1, "correct": 1}
    json.dumps(summary, allow_nan=False)


def test_a_scored_row_has_the_columns_of_the_csv(tmp_path: Path) -> None:
    rows = score_cases(red, [write_case(tmp_path, "c", disk(40, (20, 20), 8), shift=3)])
    assert list(rows[0]) == list(COLUMNS)
    assert set(METRICS) < set(COLUMNS)
    write_case_csv(tmp_path / "cases.csv", rows)
    assert read_case_csv(tmp_path / "cases.csv") == rows


def test_the_threshold_belongs_to_the_mask() -> None:
    case, truth = Case("c", Path("c.png")), np.array([[True, True, False, False]])
    probability = np.array([[0.9, 0.5, 0.49, 0.0]], dtype=np.float32)
    assert score_case(case, probability, truth)["dice"] == 1
    assert score_case(case, probability, truth, threshold=0.4)["prediction_fraction"] == 0.75


def test_distance_at_256_is_in_its_own_pixels() -> None:
    # 512x1024 goes to 256x256: 40 columns become 10, while in % of the native diagonal they stay 40 pixels.
    truth = np.zeros((512, 1024), dtype=bool)
    truth[128:384, 256:640] = True
    row = score_case(Case("c", Path("c.png")), np.roll(truth, 40, axis=1).astype(np.float32), truth)
    assert row["hd95_256"] == 10
    assert row["hd95_percent"] == pytest.approx(100 * 40 / math.hypot(512, 1024))


@given(masks((9, 13)), st.sampled_from([4, 7, 16, 26]))
def test_a_mask_on_another_grid_is_empty_only_if_it_was(mask: Mask, size: int) -> None:
    assert to_common_grid(mask, size).any() == mask.any()


def test_a_single_pixel_of_a_large_photo_survives_near_its_place() -> None:
    mask = np.zeros((4000, 6000), dtype=bool)
    mask[1000, 4500] = True
    where = np.argwhere(to_common_grid(mask))
    assert len(where) <= 4
    assert np.abs(where - [1000 * 256 / 4000, 4500 * 256 / 6000]).max() <= 1.5


def test_reducing_keeps_where_the_lesion_is() -> None:
    grid = to_common_grid(disk(1024, (400, 600), 200))
    assert hd95(grid, disk(256, (99.6, 149.6), 50)) <= 1


def test_mistakes_of_the_user_are_named(tmp_path: Path) -> None:
    case = write_case(tmp_path, "c", disk(32, (16, 16), 8))
    with pytest.raises(UserError, match="no case"):
        score_cases(red, [])
    with pytest.raises(UserError, match="no mask"):
        score_cases(red, [Case("c", case.image)])
    with pytest.raises(UserError, match="two cases"):
        score_cases(red, [case, case])
    other = write_case(tmp_path, "d", disk(40, (16, 16), 8))
    with pytest.raises(UserError, match="40x40"):
        score_cases(red, [case, Case("e", case.image, other.mask)])


def test_a_model_gone_wrong_is_no_score(tmp_path: Path) -> None:
    case = write_case(tmp_path, "c", disk(32, (16, 16), 8))
    with pytest.raises(UserError, match="not numbers"):
        score_cases(lambda image: red(image) * np.float32("nan"), [case])
    with pytest.raises(ValueError, match="not a probability"):
        score_cases(lambda image: red(image) * 9 - 5, [case])
    with pytest.raises(ValueError, match="the image"):
        score_cases(lambda image: red(image)[:-1], [case])
