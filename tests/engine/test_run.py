"""A run folder: which settings may differ on resume, who made it, one process at a time."""

from __future__ import annotations

import contextlib
import json

import pytest

from fewmask.engine.run import Run, versions
from fewmask.types import Interrupted, UserError
from tests.engine.tiny import train


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"holds a run with pretrain.epochs=1, and you asked for 2"):
        train(tmp_path, epochs=2)


def enter(folder, begun=(), **sections):
    """Enter a run of a chain whose sections have these rates, the stages `begun` having left a checkpoint."""
    rates = {"model": 0, "pretrain": 0, "finetune": 0, "student": 0, "distill": 0} | sections
    with Run(folder, "run", {name: {"lr": rate} for name, rate in rates.items()}):
        for stage in begun:
            (folder / stage / "checkpoints" / "step_1").mkdir(parents=True)


@pytest.mark.parametrize(
    ("begun", "section", "free"),
    [
        ((), "model", True),
        (("pretrain",), "model", False),
        (("pretrain",), "pretrain", False),
        (("pretrain",), "finetune", True),
        (("pretrain",), "student", True),
        (("finetune",), "pretrain", False),  # it was left out, and what was learnt since began without it
        (("finetune",), "distill", True),
        (("finetune", "distill"), "distill", False),
        (("finetune", "distill"), "student", False),
        (("select",), "pretrain", False),  # its candidates were trained as these sections say
        (("select",), "finetune", False),
        (("ensemble",), "finetune", False),
    ],
)
def test_settings_of_a_stage_ahead_may_be_mended(tmp_path, begun, section, free):
    enter(tmp_path, begun)
    if not free:
        with pytest.raises(UserError, match=rf"holds a run with {section}\.lr=0, and you asked for 1"):
            enter(tmp_path, **{section: 1})
        return
    enter(tmp_path, **{section: 1})
    (tmp_path / "metrics.json").touch()  # figures that the new settings would not change
    if begun:
        with pytest.raises(UserError, match=rf"holds a run with {section}\.lr=1, and you asked for 2"):
            enter(tmp_path, **{section: 2})


SCALE = {"distill": {"method": {"scale": (0.4, 1.0), "patience": 5}}}


def settings(**method):
    return {"distill": {"method": {"name": "dino", **method}}}


def test_what_a_later_version_takes_unless_told_is_no_reason_to_go_on_with_it(tmp_path):
    begun_run(tmp_path, settings(), SCALE, stopped=True)
    later = {"distill": {"method": {"scale": None, "patience": 5, "new": 1}}}
    with pytest.raises(
        UserError, match=r"scale=\[0\.4, 1\.0\], where this version takes None unless told; use"
    ) as told:
        begun_run(tmp_path, settings(), later)
    given = str(told.value).split("method.scale=")[-1].split("'")[0]  # what it says to set lets it go on
    begun_run(tmp_path, settings(scale=json.loads(given)), later)
    with pytest.raises(UserError, match=r"scale=\[0\.4, 1\.0\], and you asked for \[0\.2, 1\.0\]"):
        begun_run(tmp_path, settings(scale=[0.2, 1.0]), later)


def test_a_setting_given_as_its_default_is_no_other_setting(tmp_path):
    begun_run(tmp_path, settings(patience=5), SCALE)
    begun_run(tmp_path, settings(), SCALE)
    with pytest.raises(UserError, match=r"patience=5, and you asked for 6"):
        begun_run(tmp_path, settings(patience=6), SCALE)


def test_a_finished_run_may_be_looked_at_by_a_later_version_and_keeps_what_it_was_made_with(tmp_path):
    begun_run(tmp_path, settings(), SCALE)
    assert begun_run(tmp_path, settings(), {"distill": {"method": {"scale": None}}})["defaults"] == {
        "distill": {"method": {"scale": [0.4, 1.0], "patience": 5}}
    }


def test_a_run_from_before_defaults_were_kept_goes_on(tmp_path):
    record = begun_run(tmp_path, settings(), stopped=True)
    del record["defaults"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"patience=None, and you asked for 6"):
        begun_run(tmp_path, settings(patience=6), SCALE)
    assert begun_run(tmp_path, settings(), SCALE)["defaults"] == {"distill": {}}  # nobody knows what it began with


def test_a_section_left_empty_is_its_defaults(tmp_path):
    temperature = {"distill": {"losses": {"kd": {"temperature": 4.0}}}}
    begun_run(tmp_path, {"distill": {"losses": {"kd": {}}}}, temperature, stopped=True)
    begun_run(tmp_path, temperature, temperature, stopped=True)
    with pytest.raises(UserError, match=r"losses\.kd\.temperature=4\.0, and you asked for 1"):
        begun_run(tmp_path, {"distill": {"losses": {"kd": {"temperature": 1}}}}, temperature)


def begun_run(folder, config, defaults=None, stopped=False, **facts):
    """Leave a run of these settings that has learnt something; return what run.json then holds."""
    with contextlib.suppress(Interrupted), Run(folder, "distill", config, defaults=defaults) as run:
        (folder / "distill" / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
        run.info.update(facts)
        if stopped:
            raise Interrupted
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({"distill": {"unlabelled": True}}, {"distill": {"unlabelled": False}}, r"distill\.unlabelled=True"),
        ({"model": {"encoder_settings": {}}}, {"model": {"encoder_settings": {"drop_path": 0.3}}}, "drop_path=None"),
        ({"run": {"precision": "bf16"}}, {"run": {"precision": "fp32"}}, r"run\.precision=bf16"),
        ({"distill": {"losses": {"mbf": {}}}}, {"distill": {"losses": {"m2bf": {}}}}, r"distill\.losses\.m2bf=None"),
        (
            {"distill": {"method": {"alpha": 1, "name": "a"}}},
            {"distill": {"method": {"alpha": 2, "name": "b"}}},
            r"method\.name=a, and you asked for b",
        ),
    ],
)
def test_a_setting_that_changes_the_result_is_compared_wherever_it_stands(tmp_path, then, now, named):
    before = begun_run(tmp_path, then)
    with pytest.raises(UserError, match=named):
        begun_run(tmp_path, now)
    assert json.loads((tmp_path / "run.json").read_text()) == before


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"data": {"unlabelled": ["a"]}}, {"data": {"unlabelled": ["b"]}}),  # compared by content
        ({"run": {"time": "5m"}}, {"run": {"time": "9m"}}),
        ({"distill": {"checkpoint_seconds": 1}}, {"distill": {"checkpoint_seconds": 2}}),
        ({"distill": {"epochs": 1}}, {"distill": {"epochs": 1, "new": 2}}),  # an older version had no such setting
        ({"run": {"precision": "auto"}}, {"run": {"precision": "bf16"}}),
    ],
)
def test_a_setting_that_changes_no_result_may_differ(tmp_path, then, now):
    begun_run(tmp_path, then)
    assert begun_run(tmp_path, now)["config"] == now


def test_a_finished_run_stays_what_made_it_and_an_unfinished_one_says_who_went_on(tmp_path):
    begun_run(tmp_path, {}, git="old", versions={"torch": "1"}, command="fewmask distill old")
    again = begun_run(tmp_path, {})
    assert (again["git"], again["versions"], again["command"]) == ("old", {"torch": "1"}, "fewmask distill old")
    (tmp_path / "run.json").write_text(json.dumps({**again, "status": "interrupted"}))
    gone_on = begun_run(tmp_path, {})
    assert gone_on["versions"] == versions()
    assert gone_on["command"] != "fewmask distill old"


def test_a_failed_run_keeps_the_reason_until_it_is_resumed(tmp_path):
    def saved():
        facts = json.loads((tmp_path / "run.json").read_text())
        return facts["status"], facts.get("reason")

    with pytest.raises(UserError), Run(tmp_path, "test", {}):
        raise UserError("The loss became nan.")
    assert saved() == ("failed", "The loss became nan.")
    with Run(tmp_path, "test", {}):
        assert saved() == ("running", None)
    with pytest.raises(ValueError, match="a fault"), Run(tmp_path, "test", {}):
        raise ValueError("a fault")  # of the program, whose words are for its authors
    assert saved() == ("failed", None)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Run(tmp_path, "test", {}), pytest.raises(UserError, match="Another run works in"):
        train(tmp_path)
