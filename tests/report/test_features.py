"""The map of the features and the nearest neighbours, as a pre-training leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewmask.report.build import build_report
from fewmask.report.features import features, label_styles
from fewmask.report.reading import read_stage
from fewmask.types import UserError
from tests.report.conftest import MakeRun, write
from tests.report.page import Page


def entry(number: int, label: str | None = "naevus") -> dict[str, Any]:
    return {"name": f"ISIC_{number}", "label": label, "x": float(number), "y": float(number**2)}


def write_features(folder: Path, labels: list[str | None]) -> dict[str, Any]:
    (folder / "neighbours").mkdir(parents=True)
    for number in range(len(labels)):
        Image.new("RGB", (48, 48), (9 * number, 90, 90)).save(folder / "neighbours" / f"{number}.png")
    images = [entry(number, label) for number, label in enumerate(labels)]
    shown = [{"name": i["name"], "label": i["label"], "image": f"neighbours/{n}.png"} for n, i in enumerate(images)]
    near = [{**other, "cosine": 0.9 - 0.1 * n} for n, other in enumerate(shown[1:4])]
    found = {"num_candidates": 4000, "size": 64, "explained": [0.5, 0.25], "images": images,
             "queries": [{**shown[0], "neighbours": near}]}  # fmt: skip
    write(folder / "features.json", found)
    return found


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    folder = make_run()
    write_features(folder / "pretrain", ["naevus", "naevus", "melanoma", None, "naevus"])
    return folder


def test_the_page_shows_a_dot_an_image_coloured_by_its_label(run: Path) -> None:
    page = Page(build_report([run], run / "report.html"))
    dots = [e for e in page.all("circle") if e.attributes.get("class", "").startswith("dot ") and e.text]
    assert [(e.text, e.attributes["class"]) for e in dots] == [
        ("ISIC_0: naevus", "dot label1"),
        ("ISIC_1: naevus", "dot label1"),
        ("ISIC_2: melanoma", "dot label2"),
        ("ISIC_3: no label", "dot unknown"),
        ("ISIC_4: naevus", "dot label1"),
    ]
    across = [float(e.attributes["cx"]) for e in dots]
    assert across == sorted(across)
    assert "First component (50 %)" in page.text
    assert "5 of 4,000" in page.text
    assert "75 %" in page.text


def test_a_row_of_neighbours_holds_the_query_and_its_neighbours_with_their_cosines(run: Path) -> None:
    page = Page(build_report([run], run / "report.html"))
    shown = [e.attributes["title"] for e in page.all("img") if "title" in e.attributes]
    assert shown == ["ISIC_0", "ISIC_1", "ISIC_2", "ISIC_3"]
    captions = [e.text.split() for e in page.all("figcaption")]
    start = captions.index(["Image", "naevus"])
    assert captions[start : start + 4] == [["Image", "naevus"], ["0.900", "naevus"], ["0.800", "melanoma"], ["0.700"]]


def test_a_run_of_pre_training_alone_has_a_page(run: Path, make_run: MakeRun) -> None:
    alone = make_run("alone", without=("finetune", "metrics", "cases", "pictures", "export"))
    write_features(alone / "pretrain", ["naevus", "melanoma", "naevus"])
    page = Page(build_report([alone], alone / "report.html"))
    assert page.sections == ["Pre-training", "Curves", "Data", "How it was made", "Limits"]
    assert "Nearest neighbours" in page.text


def test_rare_labels_share_a_colour_and_the_frequent_ones_come_first() -> None:
    labels = [name for number, name in enumerate("abcdefghij") for _ in range(number + 1)]
    styles = label_styles([*labels, None])
    assert list(styles) == [*"jihgfedc", "other labels", "no label"]
    assert len(set(styles.values())) == 10
    assert label_styles([None]) == {"no label": "unknown"}


def test_too_few_images_make_no_map_and_no_features_no_section(tmp_path: Path) -> None:
    write_features(tmp_path, ["naevus", "naevus"])
    stage = read_stage(tmp_path)
    assert stage is None  # a file of features alone is no stage
    write(tmp_path / "stage.json", {"status": "done"})
    found = features(read_stage(tmp_path))
    assert found is not None
    assert found["charts"] == []
    (tmp_path / "features.json").unlink()
    assert features(read_stage(tmp_path)) is None
    assert features(None) is None


@pytest.mark.parametrize(
    "change",
    [{"images": None}, {"queries": [{}]}, {"explained": [0.1]}, {"images": [{"name": "a"}] * 3}, {"queries": "abc"}],
)
def test_a_file_with_other_contents_is_named(run: Path, change: dict[str, Any]) -> None:
    path = run / "pretrain" / "features.json"
    write(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(UserError, match=r"features\.json does not hold the features of a stage"):
        build_report([run], run / "report.html")


def test_a_thumbnail_that_is_missing_or_outside_is_named(run: Path) -> None:
    path = run / "pretrain" / "features.json"
    found = json.loads(path.read_text())
    found["queries"][0]["image"] = "../../../etc/passwd"
    write(path, found)
    with pytest.raises(UserError, match=r"features\.json names .* outside its folder"):
        build_report([run], run / "report.html")
    found["queries"][0]["image"] = "neighbours/99.png"
    write(path, found)
    with pytest.raises(UserError, match=r"99\.png is missing though the run lists it"):
        build_report([run], run / "report.html")
