"""Selection of auxiliary tasks: by validation alone, ties to joint, and no finished candidate trained again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewmask.commands.select import Candidate, candidates, chosen_folders, recipe_of, selection
from fewmask.config import SelectSection, load_recipe
from fewmask.types import UserError
from tests.commands.test_chain import table, wait_for

SMALL = (
    "model.encoder=tiny", "model.weights=none", "model.segmenter=tiny_unet", "model.size=32", "run.device=cpu",
    'select.tasks=["rotation", "boundary_distance"]', "select.weights=[0.3]",
    "pretrain.epochs=1", "pretrain.min_epoch_steps=1", "pretrain.batch_size=4",
    "finetune.epochs=1", "finetune.min_epoch_steps=2", "finetune.batch_size=4",
)  # fmt: skip
NAMES = {"joint-rotation-0.3", "pretrain-rotation", "joint-boundary_distance-0.3", "pretrain-boundary_distance"}


def found_in(out: Path):
    """Return the selection of a folder."""
    return json.loads((out / "selection.json").read_text())


def scores(out: Path):
    """Return each candidate's score by its name."""
    return {row["name"]: row["score"] for row in found_in(out)["candidates"]}


@pytest.fixture(scope="module")
def selected(tmp_path_factory, drawn):
    """A finished selection among two tasks in both modes."""
    from fewmask.commands.select import select

    out = tmp_path_factory.mktemp("select") / "tasks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert select("two_stage", [f"data.root={drawn}", f"run.out={out}", *SMALL]) == 0
    return out


def test_every_candidate_is_told_and_the_best_of_each_task_is_chosen(selected):
    found = found_in(selected)
    assert set(scores(selected)) == NAMES
    for row in found["candidates"]:
        stage = json.loads((selected / row["folder"] / "finetune" / "stage.json").read_text())
        assert row["score"] == stage["best_score"]
    for task, name in found["chosen"].items():
        assert scores(selected)[name] == max(row["score"] for row in found["candidates"] if row["task"] == task)


def test_pretraining_on_masks_sees_labelled_images_alone(selected):
    facts = [json.loads((selected / f"candidates/pretrain-{task}/pretrain/stage.json").read_text())
             for task in ("boundary_distance", "rotation")]  # fmt: skip
    fine = json.loads((selected / "candidates/pretrain-rotation/finetune/stage.json").read_text())
    assert facts[0]["num_images"] == fine["num_images"] < facts[1]["num_images"]


def test_what_a_selection_has_learnt_from_stays_written_down(selected, drawn, tmp_path, fewmask):
    out, data = shutil.copytree(selected, tmp_path / "tasks"), shutil.copytree(drawn, tmp_path / "data")
    picture = next((data / "images").iterdir())
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    before = {name: (out / name).read_bytes() for name in ("contents.json", "cases.csv", "audit.json")}
    code, _, err = fewmask("select", "two_stage", f"data.root={data}", f"run.out={out}", *SMALL)
    assert code == 1
    assert "The data changed since" in err
    assert before == {name: (out / name).read_bytes() for name in before}


def test_a_finished_candidate_is_not_trained_again(selected, drawn, fewmask):
    lost = selected / "candidates" / "joint-rotation-0.3" / "finetune" / "stage.json"
    lost.unlink()
    before = {p: p.stat().st_mtime_ns for p in selected.rglob("model.safetensors") if p.parent != lost.parent}
    old = scores(selected)
    code, _, err = fewmask("select", "two_stage", f"data.root={drawn}", f"run.out={selected}", *SMALL)
    assert code == 0, err
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert lost.exists()
    assert scores(selected) == old


def test_a_candidate_knows_what_the_selection_has_learnt_from(selected, drawn, tmp_path, fewmask):
    tasks = shutil.copytree(selected, tmp_path / "tasks")
    candidate = tasks / "candidates" / "joint-rotation-0.3"
    code, _, err = fewmask("evaluate", candidate, drawn, "--split", "all")
    assert code == 1
    assert "would score images this run was trained on" in err
    code, out, err = fewmask("evaluate", candidate, drawn, "--json")
    assert code == 0, err
    num = sum(row["split"] == "test" for row in table(tasks / "cases.csv"))
    assert json.loads(out)["test"]["num_cases"] == num > 0


def test_killed_in_a_candidate_and_called_again_it_finishes_without_redoing_any(drawn, tmp_path):
    # Slow enough to be met in the middle: the second candidate of four, a checkpoint after every step.
    slow = ("finetune.min_epoch_steps=20", "finetune.checkpoint_seconds=0")
    out = tmp_path / "tasks"
    command = [sys.executable, "-m", "fewmask", "select", "two_stage", f"data.root={drawn}", f"run.out={out}", *SMALL]
    environment = {**os.environ, "FEWMASK_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([*command, *slow], stderr=subprocess.DEVNULL, env=environment)

    def in_the_second() -> bool:
        begun = {path.parents[1] for path in out.glob("candidates/*/finetune/checkpoints/step_*[1-9].safetensors")}
        under_way = [stage for stage in begun if not (stage / "stage.json").exists()]
        return bool(under_way) and (out / "selection.json").exists()

    wait_for(in_the_second)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("candidates/*/finetune/stage.json")}
    assert 0 < len(done) < len(NAMES)
    assert len(scores(out)) == len(done)
    subprocess.run([*command, *slow], check=True, capture_output=True, env=environment)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert set(scores(out)) == NAMES
    logs = [(out / row["folder"] / "finetune" / "log.jsonl").read_text() for row in found_in(out)["candidates"]]
    assert sum('"kind": "resume"' in log for log in logs) == 1


def test_poisoned_test_masks_change_nothing(selected, drawn, data, tmp_path, fewmask):
    manifest = data / "manifest.csv"
    uses = {Path(row["image"]).name: row["split"] for row in table(selected / "cases.csv")}
    lines = manifest.read_text().splitlines()
    columns = lines[0].split(",")
    place = columns.index("split")
    rows = [line.split(",") for line in lines[1:]]
    for row in rows:
        row[place] = uses[Path(row[columns.index("image")]).name]
        if row[place] == "test":
            path = data / row[columns.index("mask")]
            with Image.open(path) as mask:
                shape = np.asarray(mask).shape[:2]
            Image.fromarray(np.pad(np.full((2, 2), 255, np.uint8), ((0, shape[0] - 2), (0, shape[1] - 2)))).save(path)
    manifest.write_text("\n".join([lines[0], *(",".join(row) for row in rows)]) + "\n")
    code, _, err = fewmask("select", "two_stage", f"data.root={data}", f"run.out={tmp_path / 'out'}", *SMALL)
    assert code == 0, err
    assert scores(tmp_path / "out") == scores(selected)
    assert found_in(tmp_path / "out")["chosen"] == found_in(selected)["chosen"]


def finish(out: Path, job: Candidate, score: float) -> None:
    """Leave what a finished candidate leaves."""
    folder = out / "candidates" / job.name / "finetune"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"best_score": score}))


def test_a_tie_goes_to_joint_and_then_to_the_smaller_weight(tmp_path):
    jobs = list(candidates(SelectSection(tasks=["jigsaw"])))
    for job in jobs:
        finish(tmp_path, job, 0.7)
    assert selection(tmp_path, jobs)["chosen"] == {"jigsaw": "joint-jigsaw-0.1"}


def test_an_unfinished_selection_teaches_nobody(tmp_path):
    jobs = list(candidates(SelectSection(tasks=["jigsaw"])))
    for number, job in enumerate(jobs):
        finish(tmp_path, job, 0.7)
        (tmp_path / "selection.json").write_text(json.dumps(selection(tmp_path, jobs)))
        if number + 1 < len(jobs):
            with pytest.raises(UserError, match="is not finished"):
                chosen_folders(tmp_path)
    assert chosen_folders(tmp_path) == [tmp_path / "candidates" / "joint-jigsaw-0.1"]


def test_the_better_mode_is_taken(tmp_path):
    jobs = list(candidates(SelectSection(tasks=["jigsaw", "rotation"])))
    for number, job in enumerate(jobs):
        finish(tmp_path, job, 0.9 if job.name in ("pretrain-jigsaw", "joint-rotation-1") else 0.5 + 0.001 * number)
    assert selection(tmp_path, jobs)["chosen"] == {"jigsaw": "pretrain-jigsaw", "rotation": "joint-rotation-1"}


def test_twenty_candidates_by_default_with_settings_of_their_own():
    recipe = load_recipe("two_stage", ["select.task_settings.jigsaw.num_permutations=12"])
    jobs = list(candidates(recipe.select))
    assert len(jobs) == len({job.name for job in jobs}) == 20
    for job in jobs:
        made = recipe_of(recipe, recipe.select, job)
        if job.mode == "joint":
            method = made.finetune.method
            assert (method["task"], method["task_weight"]) == (job.task, job.weight)
            assert method["average"] == recipe.finetune.method["average"]
            assert method["task_settings"] == ({"num_permutations": 12} if job.task == "jigsaw" else {})
        else:
            assert made.pretrain.method["name"] == job.task
            assert made.finetune == recipe.finetune


@pytest.mark.parametrize("settings", [{"tasks": []}, {"modes": []}, {"weights": []}])
def test_nothing_to_select_from_is_told(settings):
    with pytest.raises(UserError, match="nothing to select from"):
        list(candidates(SelectSection(**settings)))


def test_an_unknown_task_is_told(drawn, tmp_path, fewmask):
    words = (f"data.root={drawn}", f"run.out={tmp_path / 'o'}", 'select.tasks=["rotaton"]')
    code, _, err = fewmask("select", "two_stage", *words)
    assert code == 1
    assert "Did you mean 'rotation'?" in err


@pytest.mark.parametrize("words", [("run.time=5m",), ("run.time=5m", 'select.modes=["pretrain"]')])
def test_a_pretraining_that_leaves_no_time_is_told_before_it_begins(words, drawn, tmp_path, fewmask):
    code, _, err = fewmask(
        "select", "two_stage", f"data.root={drawn}", f"run.out={tmp_path / 'o'}", "pretrain.share=1", *words
    )
    assert code == 1
    assert "give a share below 1" in err
    assert not (tmp_path / "o").exists()
