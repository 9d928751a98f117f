"""The table of boundary distillation on drawn data: who teaches whom, what is compared, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fewmask.commands.cost import add_costs, teacher_files
from fewmask.commands.distillation import load_teacher
from fewmask.commands.grid import cells, place_order
from fewmask.commands.provenance import learnt_before, short_names
from fewmask.commands.reproduce import reproduce, survey
from fewmask.commands.stages import objective_for
from fewmask.commands.tables import TABLES, Student
from fewmask.data.contents import content_hashes
from fewmask.data.manifest import load_cases
from fewmask.data.synthetic import make_dataset
from fewmask.models import build_encoder, build_segmenter
from fewmask.models.complexity import complexity
from fewmask.types import Batch, Case, UserError
from tests.commands.conftest import read_rows

NAME = "boundary-distillation"
ROWS = ("teacher", "alone", "mbf", "mbf+unlabelled")
SMALL = ("run.device=cpu", "grid.fractions=[1.0]", "finetune.min_epoch_steps=4", "distill.min_epoch_steps=4")
GRID = (*SMALL, f"grid.rows={json.dumps(ROWS)}", "grid.seeds=2")


def cases_of(path):
    """Return the rows of a CSV of cases by name."""
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def read(path):
    """Return the JSON of a file."""
    return json.loads(path.read_text())


def run(data, out, *settings, unseen=None):
    """Measure the table with the smallest budget."""
    return reproduce(NAME, data, None, "smoke", (), unseen, out, settings)


def order_of(data, out, *settings):
    """Return the order of such a table."""
    return place_order(NAME, "smoke", out, data, None, (), settings)


def with_costs(finished, out):
    """Return a new folder for a table that knows its costs already, which take seconds to measure."""
    out.mkdir()
    shutil.copyfile(finished / "cost.json", out / "cost.json")
    return out


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    """Twelve images with masks in three splits, six without masks."""
    folder = tmp_path_factory.mktemp("split") / "data"
    return make_dataset(folder, 12, 6, size=(64, 80), fractions=(0.5, 0.25, 0.25))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, split_data):
    """A finished table of four rows, for the tests that only read it."""
    out = tmp_path_factory.mktemp("table") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert run(split_data, out, *GRID) == 0
    return out


def test_a_cells_teacher_is_trained_once_and_shared_by_its_students(finished):
    assert {path.parent.parent for path in finished.rglob("finetune/stage.json")} == {
        finished / "teacher" / f"1-{seed}" for seed in (0, 1)
    }
    for row in ROWS[1:]:
        for seed in (0, 1):
            facts = read(finished / row / f"1-{seed}" / "distill" / "stage.json")
            assert facts["teachers"] == [str(finished / "teacher" / f"1-{seed}" / "finetune" / "model.safetensors")]
            config = read(finished / row / f"1-{seed}" / "run.json")["config"]
            assert config["run"]["seed"] == seed
            assert config["distill"]["method"]["losses"] == TABLES[NAME].rows[row].losses
            # Only the rows that say so learn from images without a mask.
            assert (facts["num_images"] > facts["num_labelled"]) == (row == "mbf+unlabelled")


def test_teacher_and_students_have_the_same_masks_and_validation(finished):
    uses = []
    for row in ROWS:
        with (finished / row / "1-0" / "cases.csv").open(newline="") as file:
            uses.append({case["image"]: case["use"] for case in csv.DictReader(file)})
    assert all(use == uses[0] for use in uses)
    assert set(uses[0].values()) == {"labelled", "validation", "excluded-test", "unlabelled"}


def test_means_and_differences_are_those_of_the_csv_files(finished):
    found, per_case = read(finished / "table.json"), {}
    for row in found["rows"]:
        files = [finished / row["row"] / f"1-{seed}" / "cases_test.csv" for seed in (0, 1)]
        for metric in ("dice", "boundary_iou", "hd95_256"):
            values = [[float(case[metric]) for _, case in sorted(cases_of(file).items())] for file in files]
            assert row[metric]["mean"] == pytest.approx(np.mean(values))
            per_case[row["row"], metric] = np.mean(values, axis=0)
    assert {row for row, _ in per_case} == set(ROWS)
    pairs = [(found["row"], found["against"]) for found in found["differences"] if found["metric"] == "dice"]
    assert pairs == [
        ("alone", "teacher"), ("mbf", "alone"), ("mbf", "teacher"), ("mbf+unlabelled", "alone"),
        ("mbf+unlabelled", "teacher"), ("mbf+unlabelled", "mbf"),
    ]  # fmt: skip
    for row in found["differences"]:
        ours, theirs = (per_case[row[side], row["metric"]] for side in ("row", "against"))
        assert row["difference"] == pytest.approx(np.mean(ours - theirs))
    assert {row["metric"] for row in found["differences"]} == {"dice", "boundary_iou", "hd95_256"}


def test_the_page_gives_differences_of_dice_in_points_and_of_hd95_in_pixels(finished):
    page, found = (finished / "table.md").read_text(), read(finished / "table.json")["differences"]
    for metric, title, factor in (("dice", "Dice, points", 100), ("hd95_256", "HD95, pixels at 256x256", 1)):
        part = page.split(f"## Paired differences of {title}")[1].split("\n## ")[0]
        one = next(row for row in found if (row["metric"], row["row"], row["against"]) == (metric, "mbf", "alone"))
        line = next(line for line in part.splitlines() if line.startswith("| test | mbf | alone |"))
        told = [float(text.strip("()")) for text in line.split(" | ")[4].replace(" to ", " ").split()]
        assert told == pytest.approx([factor * one[key] for key in ("difference", "low", "high")], abs=0.006)


def test_the_picture_shows_what_each_row_gains_on_the_student_alone(finished):
    found = [
        (row["fraction"], f"{row['row']}: {100 * row['difference']:+.2f} ({100 * row['low']:+.2f} to ")
        for row in read(finished / "table.json")["differences"]
        if (row["set"], row["metric"], row["against"]) == ("test", "dice", "alone")
    ]
    picture = ElementTree.fromstring((finished / "table.svg").read_text())
    titles = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(found) > 0
    assert all(any(title.startswith(start) for title in titles) for _, start in found)
    columns = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text") if element.text}
    assert {f"{100 * fraction:g} % of the masks" for fraction, _ in found} <= columns
    assert "](table.svg)" in (finished / "table.md").read_text()


@pytest.mark.parametrize("region", ["none", "whole", "inside", "outside"])
@pytest.mark.parametrize("before", ["", "kd-sharp+"])
def test_a_control_differs_from_its_row_by_the_region_alone_and_is_compared_with_it(before, region):
    rows = TABLES[NAME].rows
    for after in ("", "+unlabelled"):
        row, control = rows[f"{before}mbf{after}"], rows[f"{before}mbf-{region}{after}"]
        assert f"{before}mbf{after}" in control.against
        assert control.unlabelled == row.unlabelled == bool(after)
        assert control.losses["mbf"] == {**row.losses["mbf"], "region": region}
        assert {**control.losses, "mbf": {}} == {**row.losses, "mbf": {}}


def test_size_and_speed_are_those_of_one_finished_network_each(finished):
    costs = read(finished / "table.json")["costs"]
    for name, file in (("teacher", "teacher/1-0/finetune"), ("student", "alone/1-0/distill")):
        model = load_teacher(finished / file / "model.safetensors")
        assert costs[name]["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert costs[name]["ms"] > 0
        assert costs[name]["gmacs"] == pytest.approx(complexity(model, 64)["gmacs"])
        assert costs[name]["gmacs_256"] == pytest.approx(16 * costs[name]["gmacs"], rel=0.01)


def test_the_cost_of_an_ensemble_is_the_sum_over_its_members(finished, split_data, tmp_path):
    pair = [str(finished / "teacher" / f"1-{seed}") for seed in (0, 1)]
    order = order_of(split_data, tmp_path, f"grid.teachers={json.dumps(pair)}")
    assert teacher_files(order) == [finished / "teacher" / f"1-{s}" / "finetune" / "model.safetensors" for s in (0, 1)]
    small, large = ({"size": 64, "gmacs": 0.5, "gmacs_256": 2.0}, {"size": 96, "gmacs": 1.5, "gmacs_256": None})
    assert add_costs([small]) == {"num_networks": 1, **small}
    assert add_costs([small, large]) == {"num_networks": 2, "size": 96, "gmacs": 2.0, "gmacs_256": None}


def test_the_page_says_that_it_is_written_from_the_abstract(finished):
    page = (finished / "table.md").read_text()
    for text in (
        "reimplemented from the abstract",
        "| mbf | mbf (weight 1.0) |",
        "| alone | none |",
        "## Size and speed",
        "## Paired differences of boundary IoU, points",
        "boundary IoU (95 %)",
        "the text we have does not say, here ours: student.encoder (tiny), ",
        "here 2 of a cell's teacher and of each of its students",
    ):
        assert text in page
    assert "| paper" not in page


def test_what_is_missing_alone_is_done_again_and_gives_the_same(finished, split_data, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "mbf" / "1-1")
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(split_data, out, *GRID) == 0
    now = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert now.items() > kept.items()
    assert now.keys() - kept.keys() == {out / "mbf" / "1-1" / "distill" / "model.safetensors"}
    assert read(out / "table.json")["rows"] == read(finished / "table.json")["rows"]


def test_given_teachers_are_scored_as_an_ensemble_and_none_is_trained(finished, split_data, tmp_path):
    recipe = tmp_path / "student.toml"
    recipe.write_text(
        '[student]\nencoder = "tiny"\nweights = "none"\nsegmenter = "tiny_unet"\n'
        '[distill]\nmethod = { name = "distill" }\n'
    )
    out, pair = with_costs(finished, tmp_path / "out"), [str(finished / "teacher" / f"1-{seed}") for seed in (0, 1)]
    given = (*SMALL, 'grid.rows=["teacher", "kd"]', "grid.seeds=1", f"grid.student={recipe}")
    assert run(split_data, out, *given, f"grid.teachers={json.dumps(pair)}") == 0
    assert not list(out.rglob("finetune"))
    assert read(out / "kd" / "1-0" / "distill" / "stage.json")["teachers"] == [
        f"{path}/finetune/model.safetensors" for path in pair
    ]
    scored = cases_of(out / "teacher" / "given" / "cases_test.csv")
    alone = [cases_of(finished / "teacher" / f"1-{seed}" / "cases_test.csv") for seed in (0, 1)]
    assert scored.keys() == alone[0].keys()
    assert scored != alone[0]
    assert scored != alone[1]
    assert "Model 1-0: given, and trained on" in (out / "table.md").read_text()
    masks = {row["row"]: row["num_masks"] for row in read(out / "table.json")["rows"]}
    assert masks["teacher"] == []  # what it learnt from is its own run's matter
    uses = [row["use"] for row in read_rows(out / "kd" / "1-0" / "cases.csv")]
    assert masks["kd"] == [uses.count("labelled")]
    for other in ([f"grid.teachers={json.dumps(pair[:1])}"], []):
        with pytest.raises(UserError, match=r"teachers=.*another --out"):
            run(split_data, out, *given, *other)


def test_given_teachers_are_named_so_that_they_can_be_told_apart():
    def named(*paths: str) -> list[str]:
        return short_names([Path(path) for path in paths])

    assert named("/a/none/0.1-0", "/a/dino/0.1-1") == ["0.1-0", "0.1-1"]
    assert named("/a/none/0.1-0", "/a/dino/0.1-0", "/a/dino/0.1-1") == ["none/0.1-0", "dino/0.1-0", "dino/0.1-1"]
    assert named("/x/a/b", "a/b", "b") == ["x/a/b", "a/b", "b"]
    assert named("/x/a", "/x/a", "/y/b") == ["a", "a", "b"]  # the same one twice is no other
    assert named() == []


def test_a_cell_learns_from_the_given_teacher_of_its_own_seed(finished, split_data, tmp_path):
    given = (*SMALL, 'grid.rows=["teacher", "kd"]')
    named = f'grid.teachers=["{finished / "teacher" / "{fraction}-{seed}"}"]'
    out = with_costs(finished, tmp_path / "out")
    for seeds in (1, 2):  # seeds may be added later
        assert run(split_data, out, *given, f"grid.seeds={seeds}", named) == 0
    for seed in (0, 1):
        own = f"{finished}/teacher/1-{seed}/finetune/model.safetensors"
        assert read(out / "kd" / f"1-{seed}" / "distill" / "stage.json")["teachers"] == [own]
        scored = cases_of(out / "teacher" / f"1-{seed}" / "cases_test.csv")
        assert [float(row["dice"]) for row in scored.values()] == pytest.approx(
            [float(row["dice"]) for row in cases_of(finished / "teacher" / f"1-{seed}" / "cases_test.csv").values()]
        )
    written = (out / "table.md").read_text()
    assert all(f"Model 1-{seed}: given, and trained on" in written for seed in (0, 1))
    missing = f"grid.teachers={json.dumps([str(tmp_path / 'runs' / '{seed}')])}"
    with pytest.raises(UserError, match=r"runs/0 is no model file"):
        run(split_data, tmp_path / "other", *given, missing)


def test_a_distillation_that_ends_badly_is_one_cell_of_the_table(finished, split_data, tmp_path):
    teacher = json.dumps([str(finished / "teacher" / "1-0" / "finetune" / "model.safetensors")])
    settings = (*SMALL, 'grid.rows=["alone"]', "grid.seeds=1", f"grid.teachers={teacher}", "distill.lr=1e30")
    out = with_costs(finished, tmp_path / "out")
    assert run(split_data, out, *settings) == 1
    (name, reason), *others = read(out / "table.json")["not_run"].items()
    assert name == "alone, 100 % of the masks, seed 0"
    assert "became" in reason
    assert not others
    assert f"| {name} | not run: " in (out / "table.md").read_text()


def test_a_teacher_that_saw_a_test_image_is_refused(finished, split_data, tmp_path):
    teacher = shutil.copytree(finished / "teacher" / "1-0", tmp_path / "teacher")
    tests = [case for case in load_cases(split_data) if case.split == "test"]
    contents = read(teacher / "contents.json")
    contents[content_hashes(tests)[tests[0].image]] = "labelled"
    (teacher / "contents.json").write_text(json.dumps(contents))
    for given in (teacher, teacher / "finetune" / "model.safetensors"):
        with pytest.raises(UserError, match=f"learnt from 1 of the test images, such as {tests[0].name}"):
            run(split_data, tmp_path / "out", *SMALL, f"grid.teachers={json.dumps([str(given)])}")


def test_a_test_image_is_known_by_its_public_identifier_too(tmp_path):
    image = tmp_path / "ISIC_0000001.png"
    image.write_bytes(b"other bytes")
    (tmp_path / "contents.json").write_text("{}")
    (tmp_path / "cases.csv").write_text("image,use\nelsewhere/ISIC_0000001.jpg,validation\n")
    with pytest.raises(UserError, match="learnt from 1 of the test images"):
        learnt_before([tmp_path], [Case("a", image)])
    (tmp_path / "cases.csv").write_text("image,use\nelsewhere/ISIC_0000001.jpg,unlabelled\n")
    learnt, sentences, seen = learnt_before([tmp_path], [Case("a", image)])
    assert learnt == set()
    assert (
        "and trained on 0 masks, none of a test image, but it saw 1 of the test images without their masks"
        in sentences[0]
    )
    assert seen == {"a"}
    (tmp_path / "pretrain").mkdir()
    assert "given, pre-trained on images with 0 masks" in learnt_before([tmp_path], [Case("a", image)]).sentences[0]


def test_what_a_given_teacher_learnt_from_is_not_unseen(finished, split_data, tmp_path):
    other = make_dataset(tmp_path / "other", 4, 0, size=(64, 80), seed=1)
    (other / "manifest.csv").unlink()
    teacher = shutil.copytree(finished / "teacher" / "1-0", tmp_path / "teacher")
    first = load_cases(other)[0]
    contents = read(teacher / "contents.json") | {content_hashes([first])[first.image]: "labelled"}
    (teacher / "contents.json").write_text(json.dumps(contents))
    scene, scored = survey(order_of(split_data, tmp_path, f"grid.teachers={json.dumps([str(teacher)])}"), other)
    assert first.name not in {case.name for case in scored}
    assert scene.unseen["num_cases"] == 3
    assert scene.unseen["num_trained_on"] == 1


def test_without_images_that_lack_a_mask_those_rows_are_told_and_not_run(tmp_path):
    data = make_dataset(tmp_path / "data", 8, 0, size=(64, 80), fractions=(0.5, 0.25, 0.25))
    order = order_of(data, tmp_path, 'grid.rows=["kd", "kd+unlabelled"]')
    scene, _ = survey(order, None)
    assert list(scene.left_out) == ["kd+unlabelled, 100 % of the masks"]
    left = set(cells(order, scene.left_out))
    assert left == {("kd", 1.0, 0), ("kd", 1.0, 1), *((row, 0.1, s) for row in order.rows for s in (0, 1))}


def test_a_missing_validation_split_is_drawn(split_data, tmp_path):
    data = shutil.copytree(split_data, tmp_path / "data")
    text = (data / "manifest.csv").read_text()
    (data / "manifest.csv").write_text(text.replace(",val,", ",train,"))
    assert set(survey(order_of(data, tmp_path), None)[0].splits.values()) == {"train", "test"}
    (data / "manifest.csv").write_text(text.replace(",test,", ",train,"))
    with pytest.raises(UserError, match=r"for test.*column 'split'"):
        survey(order_of(data, tmp_path), None)


def test_a_whole_table_with_one_seed_comes_before_the_next_seed(tmp_path):
    order = order_of(tmp_path, tmp_path)
    found = list(cells(order))
    assert [seed for _, _, seed in found] == sorted(seed for _, _, seed in found)
    assert len(found) == 2 * 2 * len(TABLES[NAME].rows)
    assert [row for row, _, _ in found[: len(order.rows)]] == list(TABLES[NAME].rows)


@pytest.fixture(scope="module")
def tiny_teacher():
    """An untrained teacher for pictures of 32 pixels, small because the rows are many."""
    torch.manual_seed(0)
    return build_segmenter("tiny_unet", build_encoder("tiny", size=32))


@pytest.mark.parametrize("row", [name for name, what in TABLES[NAME].rows.items() if isinstance(what, Student)])
def test_every_student_has_a_loss_of_its_own(row, tiny_teacher, tmp_path):
    recipe = order_of(tmp_path, tmp_path, "model.size=32").student_recipe(row, 1.0, 0)
    objective = objective_for("distill", recipe, "none", teachers=[tiny_teacher])
    mask = torch.zeros(4, 1, 32, 32)
    mask[:, :, 8:20, 10:24] = 1
    has_mask = torch.tensor([True, True, False, False])
    terms = objective(Batch(torch.randn(4, 3, 32, 32), list("abcd"), mask, extra={"has_mask": has_mask}))
    assert torch.isfinite(terms["loss"])
    what = TABLES[NAME].rows[row]
    weights = {**{name: loss["weight"] for name, loss in what.losses.items()}, "pseudo": what.pseudo_weight}
    expected = terms["supervised"] + sum(weight * terms[name] for name, weight in weights.items())
    torch.testing.assert_close(terms["loss"].detach(), expected.detach())


def test_settings_reach_the_stage_they_name(tmp_path):
    settings = ("distill.lr=0.5", "finetune.lr=0.25", "student.encoder=tiny", "grid.distill_time=9s")
    order = order_of(tmp_path, tmp_path, *settings)
    student, teacher = order.student_recipe("kd", 0.1, 1), order.finetune_recipe(0.1, 1)
    assert (student.distill.lr, student.run.time, student.data.label_fraction, student.run.seed) == (0.5, "9s", 0.1, 1)
    assert (teacher.finetune.lr, teacher.run.time, teacher.data.label_fraction, teacher.run.seed) == (
        0.25, "none", 0.1, 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "once"), [("alone", False), ("alone+pseudo", True), ("m2bf", True), ("kd+unlabelled", True)]
)
def test_teachers_are_asked_once_for_every_row_that_asks_when_told_so(row, once, tmp_path):
    assert order_of(tmp_path, tmp_path).student_recipe(row, 1.0, 0).distill.predict_once is False
    told = order_of(tmp_path, tmp_path, "grid.predict_once=true").student_recipe(row, 1.0, 0)
    assert told.distill.predict_once is once


@pytest.mark.parametrize(
    ("table", "setting", "message"),
    [
        (NAME, "distill.method.losses.kd.weight=2", r"use grid\.rows"),
        (NAME, 'distill.teachers=["x"]', r"use grid\.teachers"),
        (NAME, "distill.predict_once=true", r"use grid\.predict_once"),
        (NAME, "pretrain.lr=0.1", "is of no use to boundary-distillation"),
        (NAME, "grid.pretrain_seeds=2", "is of no use to boundary-distillation"),
        ("tedmae", "grid.student=tiny_unet", "is of no use to tedmae"),
        ("tedmae", "distill.lr=0.1", "is of no use to tedmae"),
        (NAME, "grid.student=tiny_unte", "Did you mean 'tiny_unet'"),
        (NAME, "grid.student=mae", r"no \[distill\] section"),
        (NAME, "distill.epohcs=3", "Did you mean"),
        (NAME, "grid.distill_time=soon", "a time is written like"),
        (NAME, 'grid.teachers=["nowhere"]', "nowhere is no model file"),
        (NAME, 'grid.rows=["mbff"]', "Did you mean 'mbf'"),
    ],
)
def test_a_wrong_word_gets_a_sentence(table, setting, message, split_data, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce(table, split_data, None, "smoke", (), None, tmp_path / "out", (setting,))
