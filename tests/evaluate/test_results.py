"""What is written can be read back exactly, and a broken file is a user's mistake, named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewmask.evaluate.results import read_case_csv, read_metrics, replacing, write_case_csv, write_metrics
from fewmask.types import UserError

from .test_statistics import make_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@given(value=st.floats(allow_nan=True, allow_infinity=False), name=st.text(st.characters(exclude_categories=["C"])))
def test_rows_come_back_as_they_were(folder: Path, value: float, name: str) -> None:
    rows = [make_row(name or "x", value, group="a,b", label='say "hm"', missed=True), make_row("y", 0.1, label=None)]
    write_case_csv(folder / "cases.csv", rows)
    back = read_case_csv(folder / "cases.csv")
    assert set(back[0]) == set(rows[0])
    for row, original in zip(back, rows, strict=True):
        assert {k: v for k, v in row.items() if v == v} == {k: v for k, v in original.items() if v == v}
        assert math.isnan(row["dice"]) == math.isnan(original["dice"])
        assert type(row["missed"]) is bool
        assert type(row["height"]) is int


def test_a_broken_csv_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cases_test.csv"
    write_case_csv(path, [make_row("a", 0.5), make_row("b", 0.25)])
    good = path.read_text()
    path.write_text(good.replace("0.25", "much", 1))
    with pytest.raises(UserError, match=r"cases_test.csv, line 3: 'much'"):
        read_case_csv(path)
    path.write_text(good.replace("hd95_256", "hd", 1))
    with pytest.raises(UserError, match="hd95_256"):
        read_case_csv(path)
    path.write_text("\n".join(good.splitlines()[:2])[:-5])
    with pytest.raises(UserError, match="line 2"):
        read_case_csv(path)
    with pytest.raises(UserError, match="evaluate"):
        read_case_csv(tmp_path / "none.csv")


def test_splits_are_put_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, "val", {"dice": 1})
    write_metrics(path, "test", {"dice": 2})
    write_metrics(path, "val", {"dice": 3})
    assert read_metrics(path) == {"val": {"dice": 3}, "test": {"dice": 2}}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_a_metrics_file_that_is_no_object_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    for text in ("[1]", "{broken"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"metrics\.json"):
            write_metrics(path, "val", {})
        assert path.read_text() == text


def interrupt_writing(path: Path) -> None:
    with replacing(path) as file:
        file.write("half")
        raise KeyboardInterrupt


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_metrics(path, "val", {"dice": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(path, "test", {"dice": math.nan})
    with pytest.raises(KeyboardInterrupt):
        interrupt_writing(path)
    assert json.loads(path.read_text()) == {"val": {"dice": 1}}
    assert list(tmp_path.iterdir()) == [path]
