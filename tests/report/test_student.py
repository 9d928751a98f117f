"""The part of the report that sets a student beside its teacher."""

from __future__ import annotations

import json

import pytest

from fewmask.report.build import build_report
from fewmask.report.reading import read_run
from fewmask.report.student import student


def comparison(difference: float, low: float | None, high: float | None) -> dict:
    return {
        "teacher": {"num_parameters": 5_600_000, "megabytes": 20.0, "gmacs": 0.9, "ms": 12.0},
        "student": {"num_parameters": 97_000, "megabytes": 0.4, "gmacs": 0.02, "ms": None},
        "splits": {
            "test": {
                "teacher": {"dice": 0.85, "hd95_256": 25.0},
                "student": {"dice": 0.85 + difference, "hd95_256": 30.0},
                "difference": difference, "low": low, "high": high,
            }
        },
    }  # fmt: skip


@pytest.fixture
def told(tmp_path):
    """Return what the report tells of a comparison."""

    def call(found):
        run = tmp_path / "run"
        (run / "distill").mkdir(parents=True)
        (run / "run.json").write_text("{}")
        (run / "distill" / "comparison.json").write_text(json.dumps(found))
        return student(read_run(run))

    return call


@pytest.mark.parametrize(
    ("difference", "low", "high", "said"),
    [
        (-0.012, -0.02, -0.004, "loses 1.2 points of Dice against the large one (95 % interval -2.0 to -0.4)."),
        (0.004, -0.001, 0.009, "gains 0.4 points of Dice against the large one (95 % interval -0.1 to +0.9; the"),
        (-0.01, None, None, "On the test images the small network loses 1.0 points of Dice."),
    ],
)
def test_it_says_what_was_lost_and_how_surely(told, difference, low, high, said):
    assert said in told(comparison(difference, low, high))["sentence"]


def test_a_row_has_both_sides_and_their_ratio_or_is_left_out(told):
    rows = {row["label"]: row for row in told(comparison(-0.01, None, None))["rows"]}
    assert rows["File, MB"] == {"label": "File, MB", "teacher": "20.00", "student": "0.40", "ratio": "0.02 ×"}
    assert rows["Dice, test"]["student"] == "0.840"
    assert not any("one thread" in label for label in rows)  # the student's was not measured


def test_a_run_without_a_student_has_no_such_part(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert student(read_run(tmp_path)) is None
    assert "Small and large" not in build_report([tmp_path], tmp_path / "r.html").read_text()
