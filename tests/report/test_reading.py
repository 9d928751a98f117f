"""Run folders as they are found: whole, killed half-way, resumed, corrupt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewmask.report.reading import hide_home, read_run, read_stage
from fewmask.types import UserError
from tests.report.conftest import MakeRun


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize("torn", ['{"kind": "st', '{"kind": "step", "step": 41, "loss": 0.', "{", '"half'])
def test_a_torn_last_line_is_counted_and_left_out(make_run: MakeRun, torn: str) -> None:
    folder = make_run() / "finetune"
    whole = read_stage(folder)
    append(folder / "log.jsonl", torn)
    found = read_stage(folder)
    assert whole is not None
    assert found is not None
    assert (found.steps, found.epochs) == (whole.steps, whole.epochs)
    assert (whole.num_unreadable, found.num_unreadable) == (0, 1)


def test_a_line_torn_inside_a_character_is_tolerated(make_run: MakeRun) -> None:
    folder = make_run() / "finetune"
    with (folder / "log.jsonl").open("ab") as file:
        file.write('{"kind": "remark", "text": "é'.encode()[:-1])
    found = read_stage(folder)
    assert found is not None
    assert found.num_unreadable == 1


def test_steps_done_again_after_a_resume_replace_the_first_attempt(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": s, "loss": float(s)} for s in (10, 20, 30, 40)]
    lines += [{"kind": "epoch", "epoch": 1, "step": 40, "loss": 1.0}, {"kind": "resume", "step": 20}]
    lines += [{"kind": "step", "step": s, "loss": s + 0.5} for s in (30, 40, 50)]
    lines += [{"kind": "epoch", "epoch": 1, "step": 40, "loss": 2.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stage = read_stage(tmp_path)
    assert stage is not None
    assert {row["step"]: row["loss"] for row in stage.steps} == {10: 10.0, 20: 20.0, 30: 30.5, 40: 40.5, 50: 50.5}
    assert [row["step"] for row in stage.steps] == [10, 20, 30, 40, 50]
    assert [row["loss"] for row in stage.epochs] == [2.0]
    assert stage.resumes == [20.0]


def test_a_file_that_is_no_log_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    (run / "finetune" / "log.jsonl").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match=r"log\.jsonl is not a training log"):
        read_run(run)


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "audit.json", "export.json", "pretrain/stage.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_corrupt_file_is_named(make_run: MakeRun, name: str, content: str) -> None:
    run = make_run()
    (run / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_run(run)


@pytest.mark.parametrize("content", ["", "{", "3", '[{"name": "a"}]', "[3]", '{"a": 1}'])
def test_a_corrupt_index_of_pictures_is_named(make_run: MakeRun, content: str) -> None:
    run = make_run()
    (run / "pictures" / "test" / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        read_run(run)


def test_a_name_may_hold_line_breaks_and_commas(make_run: MakeRun) -> None:
    run = make_run()
    text = 'name,group,label,dice,iou\n"a,\nb",g,,0.5,0.3\nc\u2028d,g,,0.25,0.1\n'
    (run / "cases_test.csv").write_text(text, encoding="utf-8")
    assert [row["name"] for row in read_run(run).cases["test"]] == ["a,\nb", "c\u2028d"]


def test_a_torn_table_is_named(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "cases_test.csv"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"cases_test\.csv"):
        read_run(run)


def test_a_missing_folder_and_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)


def test_the_test_split_leads_then_other_data_then_validation(make_run: MakeRun) -> None:
    assert list(read_run(make_run(splits=("val", "ph2-all", "test"))).metrics) == ["test", "ph2-all", "val"]
    assert read_run(make_run("other", without=("metrics",))).split is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/data/a.jpg", "~/data/a.jpg"),
        ("/Users/ada/data", "~/data"),
        ("/home/ada", "~"),
        ("two: /home/ada/x and /home/bo/y", "two: ~/x and ~/y"),
        (r"C:\Users\Ada\isic", r"~\isic"),
        ("/data/homework/x", "/data/homework/x"),
        ("/rooted/x", "/rooted/x"),
    ],
)
def test_home_folders_become_a_tilde(text: str, expected: str) -> None:
    assert hide_home({"a": [text]}) == {"a": [expected]}


def test_the_home_of_whoever_builds_the_page_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ada")
    assert hide_home("/srv/people/ada/run and /srv/people/adam") == "~/run and /srv/people/adam"
    monkeypatch.setenv("HOME", "/")
    assert hide_home("/data/run") == "/data/run"


def test_probes_and_remarks_are_read_once_each(tmp_path: Path) -> None:
    lines = [{"kind": "remark", "text": "no sun"}, {"kind": "probe", "step": 10, "knn_accuracy": 0.5}]
    lines += [{"kind": "probe", "step": 20, "knn_accuracy": 0.6}, {"kind": "resume", "step": 10}]
    lines += [{"kind": "remark", "text": "no sun"}, {"kind": "probe", "step": 20, "knn_accuracy": 0.7}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stage = read_stage(tmp_path)
    assert stage is not None
    assert [(row["step"], row["knn_accuracy"]) for row in stage.probes] == [(10, 0.5), (20, 0.7)]
    assert stage.remarks == ["no sun"]
