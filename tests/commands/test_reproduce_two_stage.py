"""The two-stage table on drawn data: who is chosen, who teaches whom, and which images test which fold."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fewmask.auxiliary import AUXILIARY
from fewmask.commands.distillation import load_teacher
from fewmask.commands.ensemble import EnsemblePredictor
from fewmask.commands.grid import cells, place_order
from fewmask.commands.jobs import best_candidate
from fewmask.commands.reproduce import reproduce, run_cell, survey
from fewmask.commands.stages import objective_for
from fewmask.commands.table import describe_cell
from fewmask.commands.tables import TABLES, TASKS
from fewmask.data.manifest import load_cases
from fewmask.data.reading import read_image
from fewmask.data.synthetic import make_dataset
from fewmask.types import Batch, UserError

NAME = "two-stage"
SMALL = (
    "run.device=cpu", "grid.fractions=[0.5]", "grid.seeds=1", "select.weights=[0.1, 1.0]",
    "finetune.min_epoch_steps=3", "distill.min_epoch_steps=2",
)  # fmt: skip
FOLDS = (*SMALL[:2], *SMALL[4:], "grid.folds=3", 'grid.rows=["plain", "uniform"]')


def read(path):
    """Return the JSON of a file."""
    return json.loads(path.read_text())


def cases_of(path):
    """Return the rows of a CSV of cases by name."""
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def uses_of(run):
    """Return what a run used each image for."""
    with (run / "cases.csv").open(newline="") as file:
        return {row["image"]: row["use"] for row in csv.DictReader(file)}


def run(data, out, *settings):
    """Measure the table with the smallest budget."""
    return reproduce(NAME, data, None, "smoke", (), None, out, settings)


def order_of(data, out, *settings, budget="smoke"):
    """Return the order of such a table."""
    return place_order(NAME, budget, out, data, None, (), settings)


def empty(path):
    """Make a mask one without a lesion."""
    with Image.open(path) as mask:
        blank = np.zeros(np.asarray(mask).shape[:2], np.uint8)
    Image.fromarray(blank).save(path)


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    """Sixteen images with masks in three splits, six without masks; one test image has no lesion."""
    folder = tmp_path_factory.mktemp("split") / "data"
    make_dataset(folder, 16, 6, size=(64, 80), fractions=(0.5, 0.25, 0.25))
    empty(next(case.mask for case in load_cases(folder) if case.split == "test"))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, split_data):
    """A finished table of every row, for the tests that only read it."""
    out = tmp_path_factory.mktemp("table") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert run(split_data, out, *SMALL) == 0
    return out


def test_one_selection_serves_the_cell_and_its_rows_score_the_right_candidates(finished, split_data):
    found = read(finished / "selection" / "0.5-0" / "selection.json")
    assert {path.parent.parent.name for path in (finished / "selection").rglob("finetune/stage.json")} == {
        row["name"] for row in found["candidates"]
    }
    assert len(found["candidates"]) == 2 * (2 + 1)
    scores = {row["name"]: row["score"] for row in found["candidates"]}
    for task in ("rotation", "restoration"):
        joint = max((f"joint-{task}-{weight}" for weight in ("0.1", "1")), key=scores.__getitem__)
        for row, name in ((f"joint-{task}", joint), (f"pretrain-{task}", f"pretrain-{task}")):
            assert members_of(finished / row / "0.5-0") == [name]
    (best,) = members_of(finished / "best-single" / "0.5-0")
    assert scores[best] == max(scores.values())
    assert members_of(finished / "ensemble" / "0.5-0") == list(found["chosen"].values())
    # What a row is scored by is the candidate's own network.
    model = load_teacher(finished / "selection/0.5-0/candidates" / best / "finetune" / "model.safetensors")
    case = next(case for case in load_cases(split_data) if case.split == "test" and case.mask)
    file = finished / "selection/0.5-0/candidates" / best / "finetune" / "model.safetensors"
    predicted = EnsemblePredictor([file]).mask(read_image(case.image))
    share = float(cases_of(finished / "best-single" / "0.5-0" / "cases_test.csv")[case.name]["prediction_fraction"])
    assert predicted.mean() == pytest.approx(share)
    assert model.encoder.size == 32


def members_of(run):
    """Return the names of the candidates that a scored row is made of."""
    return [path.split("/")[-3] for path in read(run / "ensemble" / "stage.json")["members"]]


def write_selection(folder, candidates, chosen):
    """Leave what a selection leaves."""
    folder.mkdir()
    rows = [
        {"name": name, "task": task, "mode": mode, "weight": weight, "score": score, "folder": f"candidates/{name}"}
        for name, task, mode, weight, score in candidates
    ]
    (folder / "selection.json").write_text(json.dumps({"candidates": rows, "chosen": chosen}))


def test_the_best_candidate_is_that_of_validation_and_a_tie_goes_to_the_smaller_weight(tmp_path):
    candidates = [
        ("joint-a-1", "a", "joint", 1.0, 0.8), ("joint-a-0.1", "a", "joint", 0.1, 0.8),
        ("pretrain-a", "a", "pretrain", 0.0, 0.8), ("joint-b-1", "b", "joint", 1.0, 0.5),
        ("pretrain-b", "b", "pretrain", 0.0, 0.9),
    ]  # fmt: skip
    write_selection(tmp_path / "s", candidates, {"a": "joint-a-0.1", "b": "pretrain-b"})
    asked = {("a", "joint"): "joint-a-0.1", ("a", "pretrain"): "pretrain-a", ("b", "joint"): "joint-b-1"}
    for (task, mode), name in {**asked, ("", ""): "pretrain-b"}.items():
        assert best_candidate(tmp_path / "s", task, mode) == tmp_path / "s" / "candidates" / name
    with pytest.raises(UserError, match="no candidate 'joint-c'"):
        best_candidate(tmp_path / "s", "c", "joint")


def test_students_learn_from_whom_their_row_says(finished):
    chosen = read(finished / "selection" / "0.5-0" / "selection.json")["chosen"].values()
    selected = [f"{finished}/selection/0.5-0/candidates/{name}/finetune/model.safetensors" for name in chosen]
    seeds = [f"{finished / folder}/finetune/model.safetensors" for folder in ("plain/0.5-0", "seeds/0.5-0/1000")]
    for row, teachers, ensemble in (
        ("distilled", selected, "mean_kl"),
        ("distilled-average", selected, "average"),
        ("five-seeds-distilled", seeds, "mean_kl"),
    ):
        facts = read(finished / row / "0.5-0" / "distill" / "stage.json")
        method = read(finished / row / "0.5-0" / "run.json")["config"]["distill"]["method"]
        assert facts["teachers"] == teachers
        assert (method["ensemble"], method["losses"]) == (ensemble, {"kd": {"weight": 1.0, "temperature": 2.0}})
        assert facts["num_images"] > facts["num_labelled"]  # images without a mask take part
    assert read(finished / "five-seeds-ensemble" / "0.5-0" / "ensemble" / "stage.json")["members"] == seeds
    facts = read(finished / "plain-longer" / "0.5-0" / "distill" / "stage.json")
    assert facts["teachers"] == seeds[:1]
    assert facts["num_images"] == facts["num_labelled"]
    log = (finished / "plain-longer" / "0.5-0" / "distill" / "log.jsonl").read_text()
    assert '"supervised"' in log
    assert '"kd"' not in log


def test_plain_networks_of_several_seeds_differ_and_have_the_same_masks(finished):
    folders = [finished / "plain" / "0.5-0", finished / "seeds" / "0.5-0" / "1000"]
    first, second = (folder / "finetune" / "model.safetensors" for folder in folders)
    assert first.read_bytes() != second.read_bytes()
    assert uses_of(folders[0]) == uses_of(folders[1]) == uses_of(finished / "selection" / "0.5-0")
    # Only what stands in the table is scored on the test images.
    assert not list((finished / "seeds").rglob("metrics.json")) + list((finished / "selection").rglob("metrics.json"))


def test_five_tasks_have_five_seeds_that_no_other_cell_has(tmp_path):
    order = order_of(tmp_path, tmp_path, budget="cpu")
    seeds = []
    for seed in range(order.grid.seeds):
        *networks, ensemble = order.jobs("five-seeds-ensemble", 0.1, seed)
        assert ensemble.teachers == tuple(job.folder for job in networks)
        seeds += [job.recipe.run.seed for job in networks]
        drawn_by = [job.recipe.data.label_seed for job in networks]
        assert [seed if one is None else one for one in drawn_by] == [seed] * 5
        assert {job.recipe.finetune.method["name"] for job in networks} == {"segment"}
    assert len(seeds) == len(set(seeds)) == 15


def test_every_single_network_has_the_same_time(tmp_path):
    order = order_of(tmp_path, tmp_path, "grid.train_time=90s", "grid.distill_time=30s", budget="cpu")
    for row in order.rows:
        for job in order.jobs(row, 0.1, 0):
            assert job.recipe.run.time == ("30s" if job.verb == "distill" else "90s")
            assert job.recipe.data.label_fraction == 0.1


def test_rows_of_several_tasks_take_those_that_need_no_masks(finished, tmp_path):
    order = order_of(tmp_path, tmp_path, budget="cpu")
    for row, combine in (("uniform", "sum"), ("pcgrad", "pcgrad")):
        method = order.jobs(row, 0.1, 0)[-1].recipe.finetune.method
        assert method["task"] == [task for task in TASKS if not AUXILIARY[task].needs_masks]
        assert len(method["task"]) == 4
        assert (method["combine"], method["task_weight"]) == (combine, 1.0)
    recipe = order_of(tmp_path, tmp_path).joint_recipe(TABLES[NAME].rows["uniform"], 0.5, 0)
    torch.manual_seed(0)
    objective = objective_for("finetune", recipe, "none")
    mask = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    raw = Batch(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), list("abcd"), mask)
    raw.other = Batch(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), list("efgh"))
    terms = objective(objective.views()(raw))
    assert terms["loss"].item() == pytest.approx(
        sum(terms[k].item() for k in ("segmentation", "rotation", "restoration"))
    )
    uniform, pcgrad = (finished / row / "0.5-0" / "finetune/model.safetensors" for row in ("uniform", "pcgrad"))
    assert uniform.read_bytes() != pcgrad.read_bytes()


def test_what_is_compared_is_the_paired_difference(finished):
    pairs = {(row["row"], row["against"]) for row in read(finished / "table.json")["differences"]}
    rows = list(order_of(finished, finished, *SMALL).rows)
    assert {
        ("distilled", "ensemble"),
        ("distilled", "five-seeds-distilled"),
        ("distilled", "plain-longer"),
        ("ensemble", "five-seeds-ensemble"),
    } < pairs
    assert {(row, "plain") for row in rows if row != "plain"} < pairs
    assert {(row, "best-single") for row in rows if row not in ("best-single", "plain")} < pairs
    for row in read(finished / "table.json")["differences"]:
        sides = [cases_of(finished / row[side] / "0.5-0" / "cases_test.csv") for side in ("row", "against")]
        kept = [n for n in sides[0] if row["metric"] == "dice" or sides[0][n]["empty_truth"] == "0"]
        expected = np.mean([float(sides[0][name]["dice"]) - float(sides[1][name]["dice"]) for name in kept])
        assert row["difference"] == pytest.approx(expected)
        assert row["num_cases"] == len(kept) < len(sides[0]) or row["metric"] == "dice"


def test_images_without_a_lesion_are_told_apart(finished):
    for row in read(finished / "table.json")["rows"]:
        cases = cases_of(finished / row["row"] / "0.5-0" / "cases_test.csv").values()
        lesions = [case for case in cases if case["empty_truth"] == "0"]
        assert row["empty"] == len(cases) - len(lesions) == 1
        assert row["dice_positives"]["mean"] == pytest.approx(np.mean([float(case["dice"]) for case in lesions]))
        found = np.mean([float(case["prediction_fraction"]) > 0 for case in lesions])
        left = np.mean([float(case["prediction_fraction"]) == 0 for case in cases if case not in lesions])
        assert row["detection_sensitivity"]["mean"] == pytest.approx(found)
        assert row["detection_specificity"]["mean"] == pytest.approx(left)
    page = (finished / "table.md").read_text()
    assert "| Dice, lesions (95 %) | found (95 %) | left empty (95 %) |" in page
    assert "## Paired differences of Dice, lesions, points" in page
    assert "Some images have no lesion" in page


def test_the_page_tells_the_selection_and_what_is_not_the_papers(finished):
    page, found = (finished / "table.md").read_text(), read(finished / "table.json")
    for text in (
        "reimplemented from the abstract",
        "SIIM-ACR",
        "## Single networks, and which of the candidates were chosen",
        "Every training did its epochs",
        "here 2 networks without any task",
        "train jointly with rotation, restoration, each loss with the weight 1.",
    ):
        assert text in page
    assert "| paper" not in page
    assert [row["network"] for row in found["networks"] if row["chosen"]] == sorted(
        read(finished / "selection" / "0.5-0" / "selection.json")["chosen"].values()
    )
    assert len(found["networks"]) == 3 + 6 + 1


def test_a_second_call_trains_nothing(finished, split_data):
    kinds = ("*.safetensors", "cases_*.csv", "log.jsonl", "selection.json")
    before = {path: path.stat().st_mtime_ns for kind in kinds for path in finished.rglob(kind)}
    assert run(split_data, finished, *SMALL) == 0
    assert before == {path: path.stat().st_mtime_ns for kind in kinds for path in finished.rglob(kind)}
    with pytest.raises(UserError, match="another output folder"):
        run(split_data, finished, *SMALL, "pretrain.lr=0.5", 'grid.rows=["best-single"]')


def test_poisoned_test_masks_change_no_weight(finished, split_data, tmp_path):
    data, out = shutil.copytree(split_data, tmp_path / "data"), tmp_path / "out"
    for case in load_cases(data):
        if case.split == "test" and case.mask:
            with Image.open(case.mask) as mask:
                poisoned = 255 - np.asarray(mask.convert("L"))
            Image.fromarray(poisoned).save(case.mask)
    out.mkdir()
    shutil.copyfile(finished / "cost.json", out / "cost.json")  # which takes seconds to measure
    assert run(data, out, *SMALL, 'grid.rows=["best-single", "distilled", "uniform"]') == 0
    files = [path.relative_to(out) for path in out.rglob("model.safetensors")]
    assert len(files) == (4 + 2 + 2) + 2
    for file in files:
        assert (out / file).read_bytes() == (finished / file).read_bytes(), file
    scores = [read(folder / "best-single/0.5-0/metrics.json")["test"]["dice"]["mean"] for folder in (out, finished)]
    assert scores[0] != scores[1]


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """A finished table of data without splits, in three folds, and the data."""
    data = make_dataset(tmp_path_factory.mktemp("drawn") / "data", 12, 2, size=(64, 80))
    out = tmp_path_factory.mktemp("folds") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert run(data, out, *FOLDS) == 0
    return data, out


def test_each_image_is_tested_once_and_the_table_pools_the_folds(folded):
    data, out = folded
    masked = [case for case in load_cases(data) if case.mask is not None]
    dice = {}
    for row in ("plain", "uniform"):
        tested = [cases_of(out / row / f"0.5-{seed}" / "cases_test.csv") for seed in range(3)]
        assert sorted(name for fold in tested for name in fold) == sorted(case.name for case in masked)
        dice[row] = {name: float(case["dice"]) for fold in tested for name, case in fold.items()}
        for seed, fold in enumerate(tested):
            uses = uses_of(out / row / f"0.5-{seed}")
            images = {str(case.image): case.name for case in masked}
            held_out = {name for image, name in images.items() if uses.get(image) == "excluded-test"}
            assert held_out == fold.keys()
    found = read(out / "table.json")
    for row in found["rows"]:
        values = dice[row["row"]]
        assert row["num_cases"] == len(masked)
        assert row["dice"]["mean"] == pytest.approx(np.mean(list(values.values())))
        assert len(row["dice"]["per_seed"]) == len(row["seeds"]) == 3
    (difference,) = found["differences"]
    assert difference["num_cases"] == len(masked)
    expected = np.mean([dice["uniform"][name] - dice["plain"][name] for name in dice["plain"]])
    assert difference["difference"] == pytest.approx(expected)
    page = (out / "table.md").read_text()
    assert f"here {len(masked)} images of data in 3 folds by patient" in page
    assert "seed k tests fold k" in page


def test_pooled_figures_are_those_of_one_set():
    def results(names, dice):
        metrics = dict.fromkeys(("dice", "iou", "dice_256", "iou_256", "hd95_256"), dice)
        same = {"missed": True, "empty_truth": False, "empty_prediction": True}
        return [{"name": name, "group": name, **metrics, **same} for name in names]

    found = describe_cell({0: results("abc", 0.0), 1: results("d", 1.0)}, pooled=True)
    assert found["dice"]["mean"] == 0.25  # a mean over images, not over folds
    assert found["dice"]["per_seed"] == [0.0, 1.0]
    assert (found["num_cases"], found["missed"]) == (4, 4.0)
    assert 0 <= found["dice"]["low"] < 0.25 < found["dice"]["high"] <= 1


def test_the_selection_of_a_fold_never_sees_its_test_images(tmp_path):
    order = order_of(tmp_path, tmp_path, *FOLDS[:-1])
    for row, fraction, seed in cells(order):
        for job in order.jobs(row, fraction, seed):
            assert (job.recipe.data.num_folds, job.recipe.data.fold) == (3, seed)
    assert order.grid.seeds == 3


def test_a_selection_that_ends_badly_is_tried_once_and_told(split_data, tmp_path, monkeypatch):
    order = order_of(split_data, tmp_path / "out", *SMALL, "pretrain.lr=1e30", 'select.modes=["pretrain"]')
    left_out = {}
    run_cell(order, ("best-single", 0.5, 0), [], left_out)
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("log.jsonl")}
    run_cell(order, ("distilled", 0.5, 0), [], left_out)
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("log.jsonl")}
    assert list(left_out) == [
        f"{name}, 50 % of the masks, seed 0" for name in ("selection", "best-single", "distilled")
    ]
    assert all("became" in reason for reason in left_out.values())


def test_without_images_that_lack_a_mask_students_learn_from_the_others(tmp_path):
    data = make_dataset(tmp_path / "data", 8, 0, size=(64, 80), fractions=(0.5, 0.25, 0.25))
    assert survey(order_of(data, tmp_path, "grid.fractions=[1.0]"), None)[0].left_out == {}


@pytest.mark.parametrize(
    ("table", "setting", "message"),
    [
        (NAME, "finetune.method.name=joint", r"use grid\.rows"),
        (NAME, "pretrain.method.name=mae", r"use select\.task_settings"),
        (NAME, "distill.method.ensemble=average", r"use grid\.rows"),
        (NAME, "data.fold=1", r"use grid\.folds"),
        (NAME, "data.label_seed=1", r"use grid\.seeds"),
        (NAME, "grid.finetune_time=9s", "is of no use to two-stage"),
        (NAME, 'grid.teachers=["x"]', "is of no use to two-stage"),
        (NAME, "grid.train_time=soon", "a time is written like"),
        (NAME, 'grid.rows=["joint-jigsaw"]', r"select\.tasks or select\.modes leaves out"),
        (NAME, 'select.tasks=["rotaton"]', "Did you mean 'rotation'"),
        (NAME, 'select.tasks=["boundary_distance"]', "take those that need no masks"),
        (NAME, "grid.folds=1", "at least two folds"),
        (NAME, "grid.folds=3", r"data\.num_folds out"),
        ("tedmae", "grid.folds=3", "is of no use to tedmae"),
        ("tedmae", "select.weights=[1.0]", "is of no use to tedmae"),
        ("boundary-distillation", "grid.train_time=9s", "is of no use to boundary-distillation"),
    ],
)
def test_a_wrong_word_gets_a_sentence(table, setting, message, split_data, tmp_path):
    with pytest.raises(UserError, match=message):
        reproduce(table, split_data, None, "smoke", (), None, tmp_path / "out", (setting,))
