"""A paper's table on drawn data: its figures, what it takes from the paper, and what it does when it is cut."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fewmask.commands import jobs
from fewmask.commands.grid import place_order
from fewmask.commands.page import write_page
from fewmask.commands.remarks import remarks
from fewmask.commands.reproduce import reproduce, survey
from fewmask.commands.stages import pretrain
from fewmask.commands.table import describe_cell
from fewmask.commands.unseen import choose_unseen
from fewmask.config import RunSection
from fewmask.data.manifest import load_cases
from fewmask.data.synthetic import make_dataset
from fewmask.engine.device import resolve_precision
from fewmask.engine.run import Run
from fewmask.types import Case, NotTrainedError, UserError
from tests.commands.conftest import read_rows, write_rows

GRID = ('grid.rows=["random", "mae"]', "grid.seeds=2", "run.device=cpu")
TWO = (*GRID, "grid.fractions=[0.5, 1.0]")
ONE = (*GRID, "grid.fractions=[1.0]")


def cases(path):
    """Return the rows of a CSV of cases by name."""
    return {row["name"]: row for row in read_rows(path)}


def table(out):
    """Return table.json."""
    return json.loads((out / "table.json").read_text())


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    """Sixteen images with masks in three splits, six without masks."""
    folder = tmp_path_factory.mktemp("split") / "data"
    return make_dataset(folder, 16, 6, size=(64, 80), fractions=(0.5, 0.25, 0.25))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory, split_data):
    """Four other images with masks, and a copy of one that is trained on."""
    folder = make_dataset(tmp_path_factory.mktemp("other") / "other", 4, 0, size=(64, 80), seed=1)
    (folder / "manifest.csv").unlink()
    name = next(row["image"] for row in _manifest(split_data) if row["split"] == "train")
    shutil.copy(split_data / name, folder / "images" / "copy.jpg")
    shutil.copy(split_data / "masks" / f"{Path(name).stem}.png", folder / "masks" / "copy.png")
    return folder


def _manifest(data):
    return read_rows(data / "manifest.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, split_data, unseen):
    """A finished table of two rows, for the tests that only read it."""
    out = tmp_path_factory.mktemp("table") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, out, TWO) == 0
    return out


@pytest.mark.parametrize("name", ["test", "unseen"])
def test_means_and_differences_are_those_of_the_csv_files(finished, name):
    found = table(finished)
    per_case = {}
    for row in (row for row in found["rows"] if row["set"] == name):
        files = [finished / row["row"] / f"{row['fraction']:g}-{seed}" / f"cases_{name}.csv" for seed in (0, 1)]
        for metric in ("dice", "iou", "hd95_256"):
            values = [[float(case[metric]) for _, case in sorted(cases(file).items())] for file in files]
            assert row[metric]["mean"] == pytest.approx(np.mean(values))
            assert row[metric]["per_seed"] == pytest.approx(np.mean(values, axis=1))
            assert row[metric]["low"] <= row[metric]["mean"] <= row[metric]["high"]
            per_case[row["row"], row["fraction"], metric] = np.mean(values, axis=0)
    assert len(per_case) == 2 * 2 * 3
    assert min(values.mean() for (_, _, metric), values in per_case.items() if metric == "dice") > 0
    differences = [row for row in found["differences"] if row["set"] == name]
    assert [(row["row"], row["against"], row["fraction"]) for row in differences] == [
        ("mae", "random", 0.5), ("mae", "random", 1.0),
    ]  # fmt: skip
    for row in differences:
        ours, theirs = (per_case[side, row["fraction"], "dice"] for side in ("mae", "random"))
        assert row["difference"] == pytest.approx(np.mean(ours - theirs))
        assert row["difference"] != 0
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 < row["p_value"] <= 1


def test_the_papers_figures_and_the_deviations_are_told(finished):
    found, page = table(finished), (finished / "table.md").read_text()
    paper = {(row["row"], row["fraction"]): row["paper"] for row in found["rows"] if row["set"] == "test"}
    assert paper["mae", 1.0] == {"dice": 81.58, "iou": 72.31}
    assert paper["random", 0.5] == {"dice": 79.54, "iou": 69.74}
    assert "81.58" in page
    told = " ".join(found["deviations"])
    for sentence in (
        "pretrain.batch_size: the paper has 128, here 4.",
        "model.encoder: the paper has vit_small_patch16, here vit_micro_patch8.",
        "finetune.epochs: the paper has 100, here 1.",
        "Fine-tuning, epochs done before the training ended: 1 to 1.",
        "here 2 of fine-tuning a cell",
        "here images of data: ",
    ):
        assert sentence in told
        assert sentence in page


def test_a_share_says_how_many_masks_it_is(finished, split_data):
    num = sum(row["split"] == "train" and row["mask"] != "" for row in _manifest(split_data))
    page = (finished / "table.md").read_text()
    found = {(row["fraction"], tuple(row["num_masks"])) for row in table(finished)["rows"]}
    assert found == {(0.5, (num // 2,)), (1.0, (num,))}
    assert f"| random | 50 % ({num // 2}) | 2 |" in page
    assert "not asked for" not in page


def test_what_an_earlier_call_left_in_the_folder_is_told(finished, split_data, unseen, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.copytree(out / "random" / "1-0", out / "random" / "1-0-copy")  # somebody's own
    fewer = ("grid.rows=random", "grid.fractions=0.5", "grid.seeds=1", "run.device=cpu")
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, out, fewer) == 0
    assert {(row["row"], row["fraction"], len(row["seeds"])) for row in table(out)["rows"]} == {("random", 0.5, 1)}
    told = next(text for text in table(out)["statements"] if "not asked for" in text)
    every = [f"{share} %, seed {seed}" for share in (50, 100) for seed in (0, 1)]
    assert f"random ({'; '.join(every[1:])}), mae ({'; '.join(every)})." in told


def test_the_time_left_is_that_of_the_cells_that_were_not_done(finished, split_data, unseen, tmp_path, capsys):
    """Finished cells are passed in a moment each: taken for work, two that are left would be said to take none."""
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("random/0.5-0", "random/1-1"):
        shutil.rmtree(out / name)
    capsys.readouterr()  # what the making of the table said
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, out, TWO) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reproduce:")]
    assert [line.split()[1] for line in lines] == ["50%,", "100%"]
    assert "left  random, 50 % of the masks, seed 0" in lines[0]


def test_runs_of_a_version_with_other_defaults_are_told(finished, split_data, unseen, tmp_path):
    """Its figures stand in the table as they are, and a reader must know that they are of another method."""
    out = shutil.copytree(finished, tmp_path / "out")
    changed, older = out / "mae-0" / "run.json", out / "random" / "1-1" / "run.json"
    info = json.loads(changed.read_text())
    info["defaults"]["pretrain"]["method"]["crop_scale"] = [0.4, 1.0]
    info["defaults"]["pretrain"]["method"]["gone"] = 1  # a setting that there is no more
    info["config"]["pretrain"]["method"]["norm_pix"] = True  # told, so that the default does not matter
    info["defaults"]["pretrain"]["method"]["norm_pix"] = True
    changed.write_text(json.dumps(info))
    info = json.loads(older.read_text())
    del info["defaults"]
    older.write_text(json.dumps(info))
    order = place_order("g2ll-table1", "smoke", out, split_data, None, (), TWO)
    assert [text for text in remarks(order, table(out)["rows"]) if "Made by" in text] == [
        "Made by a version with another default (pretrain.method.crop_scale was [0.4, 1.0], in this version "
        "[0.2, 1.0]): mae-0.",
        "Made by a version that did not keep what its methods' defaults were: random (1).",
    ]
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, finished, TWO) == 0
    assert "Made by" not in "".join(table(finished)["statements"])


def test_excluded_images_and_unseen_ones_are_counted(finished, split_data):
    found = table(finished)
    splits = [row["split"] for row in _manifest(split_data)]
    assert found["excluded"]["test"] == splits.count("test") > 0
    assert found["pretraining"][0]["num_images"] <= splits.count("train") + splits.count("")
    assert found["unseen"] == {"name": "other", "num_cases": 4, "num_masked": 5, "num_trained_on": 1, "num_in_body": 0}
    assert "copy" not in cases(finished / "mae" / "1-0" / "cases_unseen.csv")


def test_a_public_image_that_was_saved_anew_is_not_unseen(split_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(split_data, data)
    rows = _manifest(data)
    for number, row in enumerate(rows):  # public names, as ISIC's
        for kind in ("image", "mask"):
            if row[kind]:
                path = Path(row[kind])
                row[kind] = str(path.with_name(f"ISIC_{number:07}{path.suffix}"))
                (data / path).rename(data / row[kind])
    write_rows(data / "manifest.csv", rows)
    other = make_dataset(tmp_path / "other", 2, 0, size=(64, 80), seed=5)
    (other / "manifest.csv").unlink()
    masked = [row for row in rows if row["mask"]]
    for row in masked[:3]:
        Image.open(data / row["image"]).save(other / "images" / Path(row["image"]).name, quality=50)
        shutil.copy(data / row["mask"], other / "masks")
    order = place_order("g2ll-table1", "smoke", tmp_path / "out", data, None, (), TWO)
    scene, chosen = survey(order, other)
    assert {case.name for case in chosen}.isdisjoint(Path(row["image"]).stem for row in masked)
    assert (scene.unseen["num_cases"], scene.unseen["num_trained_on"]) == (2, 3)


def test_a_photograph_that_was_trained_on_is_not_unseen_in_another_guise(split_data, tmp_path, capsys):
    masked = [row for row in _manifest(split_data) if row["mask"]]
    other = make_dataset(tmp_path / "other", 2, 0, size=(64, 80), seed=5)
    (other / "manifest.csv").unlink()
    for number, row in enumerate(masked[:3]):  # smaller, turned or mirrored, saved anew, by another name
        image, mask = Image.open(split_data / row["image"]), Image.open(split_data / row["mask"])
        turn = list(Image.Transpose)[number]
        for one, to in ((image, f"images/again{number}.jpg"), (mask, f"masks/again{number}.png")):
            one.resize((one.width * 3 // 4, one.height * 3 // 4)).transpose(turn).save(other / to)
    bare = next(row["image"] for row in _manifest(split_data) if not row["mask"])
    Image.open(split_data / bare).rotate(90, expand=True).save(other / "images" / "bare.jpg")
    Image.open(split_data / bare).convert("L").rotate(90, expand=True).point(lambda x: 255 * (x > 99)).save(
        other / "masks" / "bare.png"
    )
    order = place_order("g2ll-table1", "smoke", tmp_path / "out", split_data, None, (), TWO)
    for remembered in (False, True):
        scene, chosen = survey(order, other)
        assert not any(case.name.startswith("again") for case in chosen)
        assert (scene.unseen["num_cases"], scene.unseen["num_trained_on"]) == (3, 3)
        assert scene.unseen["num_in_body"] == 1  # without its mask
        assert ("images compared" in capsys.readouterr().err) != remembered


def test_a_photograph_is_known_through_many_copies_and_by_their_names(split_data, tmp_path, monkeypatch):
    monkeypatch.setattr("fewmask.data.audit.CLOSED_UP_TO", 3)  # of more copies pairs with the first alone are listed
    other = make_dataset(tmp_path / "other", 2, 0, size=(64, 80), seed=5)
    (other / "manifest.csv").unlink()
    row = next(row for row in _manifest(split_data) if row["mask"] and row["split"] == "train")
    for number in range(5):
        _saved(split_data / row["image"], other / "images" / f"copy{number}.jpg", 90 - number)
        shutil.copy(split_data / row["mask"], other / "masks" / f"copy{number}.png")
    bare = next(row["image"] for row in _manifest(split_data) if not row["mask"])
    cases = [
        *load_cases(split_data),
        Case("ISIC_0000007", image=_saved(split_data / bare, tmp_path / "body" / "ISIC_0000007.jpg", 80)),
    ]
    _saved(split_data / bare, other / "images" / "renamed.jpg", 70)
    shutil.copy(split_data / row["mask"], other / "masks" / "renamed.png")
    chosen, facts = choose_unseen(other, split_data, cases, {"ISIC_0000007"})  # a teacher learnt it by its name
    assert not any(case.name.startswith(("copy", "renamed")) for case in chosen)
    assert (facts["num_cases"], facts["num_trained_on"]) == (2, 6)


def _saved(picture, path, quality):
    path.parent.mkdir(exist_ok=True)
    with Image.open(picture) as image:
        image.save(path, quality=quality)
    return path


def test_two_processes_may_write_one_page(finished, tmp_path):
    found, want = table(finished), (finished / "table.md").read_text()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(tmp_path, found)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "table.md").read_text() == want
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.md", "table.svg"]


def _write_often(folder, found):
    for _ in range(100):
        write_page(folder, found)


def test_every_run_of_a_table_says_in_which_precision(split_data, tmp_path):
    order = place_order("g2ll-table1", "smoke", tmp_path / "out", split_data, None, (), TWO)
    jobs = [job for row in order.rows for job in order.jobs(row, 1.0, 0)]
    assert {job.recipe.run.precision for job in jobs} == {resolve_precision(RunSection(device="cpu"))}


def test_a_second_call_trains_nothing(finished, split_data, unseen):
    kinds = ("*.safetensors", "cases_*.csv", "log.jsonl")
    before = {path: path.stat().st_mtime_ns for kind in kinds for path in finished.rglob(kind)}
    rows = table(finished)["rows"]
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, finished, TWO) == 0
    assert before == {path: path.stat().st_mtime_ns for kind in kinds for path in finished.rglob(kind)}
    assert len(before) == (1 + 8) + 16 + (1 + 8)
    assert table(finished)["rows"] == rows


@pytest.mark.parametrize("setting", ["pretrain.lr=0.5", "finetune.lr=0.5", "grid.finetune_time=9s"])
def test_other_settings_in_the_same_folder_are_refused(finished, split_data, setting):
    with pytest.raises(UserError, match=r"another (--out|output folder)"):
        reproduce("g2ll-table1", split_data, None, "smoke", (), None, finished, (*TWO, setting))


def test_a_killed_grid_goes_on_and_gets_the_same_figures(finished, split_data, tmp_path):
    out = tmp_path / "out"
    words = ("g2ll-table1", str(split_data), str(out), ONE)
    code = (
        "import sys; from pathlib import Path; from fewmask.commands.reproduce import reproduce\n"
        f"table, data, out, settings = {words!r}\n"
        "reproduce(table, Path(data), None, 'smoke', (), None, Path(out), settings)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=os.environ)
    while not (out / "table.json").exists() and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 0 < len(table(out)["rows"]) < 2 or not (out / "mae" / "1-1" / "metrics.json").exists()
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), None, out, ONE) == 0
    assert trained.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}.items()
    expected = [row for row in table(finished)["rows"] if row["fraction"] == 1.0 and row["set"] == "test"]
    assert table(out)["rows"] == expected


def test_a_cell_that_another_process_is_busy_with_comes_last(finished, split_data, unseen, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    first, second = out / "random" / "0.5-0", out / "mae" / "0.5-0"
    for folder in (first, second):
        (folder / "metrics.json").unlink()
    (out / "table.json").unlink()
    other = Run(first, "finetune", {})
    before = (first / "run.json").read_bytes()
    other._claim()

    def finish(seconds):
        """The other process goes away, once everything else is done."""
        assert (second / "metrics.json").exists()
        assert not (first / "metrics.json").exists()
        assert (first / "run.json").read_bytes() == before
        other._release()

    # The module's own name for the clock alone: others sleep too.
    clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=finish)
    monkeypatch.setattr("fewmask.commands.reproduce.time", clock)
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), unseen, out, TWO) == 0
    assert table(out)["rows"] == table(finished)["rows"]


def test_supervised_without_labels_is_told_and_not_run(split_data, tmp_path):
    data = shutil.copytree(split_data, tmp_path / "data")
    rows = _manifest(data)
    write_rows(data / "manifest.csv", [{key: row[key] for key in row if key != "label"} for row in rows])
    assert reproduce("g2ll-table1", data, None, "smoke", (), None, tmp_path / "out", ('grid.rows=["supervised"]',)) == 0
    assert "column 'label'" in table(tmp_path / "out")["not_run"]["supervised"]
    assert "| supervised | not run: " in (tmp_path / "out" / "table.md").read_text()


def test_a_row_that_pretrains_the_segmenter_is_fine_tuned_from_all_of_it(split_data, tmp_path, capsys):
    settings = ('grid.rows=["random", "figure"]', "grid.seeds=1", "grid.fractions=[1.0]", "run.device=cpu")
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), None, tmp_path / "out", settings) == 0
    told = capsys.readouterr().err
    assert f"begins with encoder and decoder of {tmp_path / 'out' / 'figure-0'}" in told
    assert told.count("begins with encoder") == 1


def test_rows_of_masks_by_superpixels_are_measured(split_data, tmp_path):
    settings = ('grid.rows=["mask-random", "mask-semantic-focal"]', "grid.seeds=1", "run.device=cpu")
    assert reproduce("g2ll-table2", split_data, None, "smoke", (), None, tmp_path / "out", settings) == 0
    found = table(tmp_path / "out")
    assert {row["row"]: row["paper"]["dice"] for row in found["rows"]} == {
        "mask-random": 81.54, "mask-semantic-focal": 82.16,
    }  # fmt: skip
    (pair,) = found["differences"]
    assert (pair["row"], pair["against"]) == ("mask-semantic-focal", "mask-random")
    assert pair["difference"] != 0
    assert [row["num_images"] for row in found["pretraining"]] == 2 * [found["pretraining"][0]["num_images"]]


def test_a_pretraining_that_ends_badly_is_a_row_of_the_table(split_data, tmp_path):
    settings = ('grid.rows=["mae"]', "pretrain.lr=1e30", "run.device=cpu")
    assert reproduce("tedmae", split_data, None, "smoke", (), None, tmp_path / "out", settings) == 1
    assert "became" in table(tmp_path / "out")["not_run"]["mae"]


def test_of_several_pretrainings_the_one_that_ends_badly_takes_only_its_own_cells(split_data, tmp_path, monkeypatch):
    """The row's other pre-trainings go on, and their scores stand in the table."""

    def collapse_once(run, recipe, *args):
        if recipe.run.seed == 0:
            raise NotTrainedError("The representation collapsed.")
        return pretrain(run, recipe, *args)

    monkeypatch.setattr(jobs, "pretrain", collapse_once)
    settings = (*ONE, "grid.pretrain_seeds=2")
    assert reproduce("g2ll-table1", split_data, None, "smoke", (), None, tmp_path / "out", settings) == 1
    found = table(tmp_path / "out")
    assert found["not_run"] == {"mae, pre-training 0": "The representation collapsed."}
    assert {row["row"]: row["seeds"] for row in found["rows"]} == {"random": [0, 1], "mae": [1]}
    assert [(row["row"], row["seed"]) for row in found["pretraining"]] == [("mae", 1)]
    assert [row["seeds"] for row in found["differences"] if row["metric"] == "dice"] == [[1]]
    assert "| mae, pre-training 0 | not run: The representation" in (tmp_path / "out" / "table.md").read_text()


def test_what_is_no_result_ends_the_table(split_data, tmp_path):
    """A setting that cannot be says nothing about a method, and the user has to hear of it at once."""
    settings = ("grid.rows=mae", "pretrain.method.mask_ratio=1.5", "run.device=cpu")
    with pytest.raises(UserError, match=r"1\.5"):
        reproduce("tedmae", split_data, None, "smoke", (), None, tmp_path / "out", settings)


def test_an_interval_holds_the_chance_of_the_seeds():
    def results(dice):
        metrics = dict.fromkeys(("dice", "iou", "dice_256", "iou_256", "hd95_256"), dice)
        same = {"missed": False, "height": 8, "width": 8, "truth_fraction": 0.5}
        return [{"name": f"c{i}", "group": f"c{i}", **metrics, **same} for i in range(5)]

    alike = describe_cell({0: results(0.25), 1: results(0.25)})["dice"]
    apart = describe_cell({0: results(0.0), 1: results(1.0)})["dice"]
    assert alike == {"mean": 0.25, "low": 0.25, "high": 0.25, "per_seed": [0.25, 0.25]}
    assert apart == {"mean": 0.5, "low": 0.0, "high": 1.0, "per_seed": [0.0, 1.0]}
