"""The page as a whole: what it holds, what it must never hold, and what it does where pieces are missing."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fewmask.commands.report import report
from fewmask.report.build import build_report
from fewmask.types import UserError
from tests.report.conftest import PIECES, MakeRun, split_with_empties, write
from tests.report.page import Page

ALL_SECTIONS = [
    "Results", "Case by case", "Pictures", "Pre-training", "Curves", "Data", "How it was made", "Limits",
]  # fmt: skip


def page_of(*runs: Path) -> Page:
    return Page(build_report(list(runs), runs[0].parent / "report.html"))


def test_the_figures_on_the_page_are_those_of_metrics_json(make_run: MakeRun) -> None:
    run = make_run()
    page, metrics = page_of(run), json.loads((run / "metrics.json").read_text())
    digits = {"hd95_256": 1, "hd95_percent": 1}
    for split in ("test", "val"):
        for key in ("dice", "iou", "boundary_iou", "sensitivity", "specificity", "hd95_256", "hd95_percent"):
            (cell,) = page.all("td", data_metric=key, data_split=split)
            found = metrics[split][key]
            mean, low, high = (f"{found[part]:.{digits.get(key, 3)}f}" for part in ("mean", "low", "high"))
            assert cell.text == f"{mean}{low} to {high}"
        (missed,) = page.all("td", data_metric="missed", data_split=split)
        assert missed.text == "3"
    (answer,) = page.all("h1")
    dice = metrics["test"]["dice"]
    assert answer.text == (
        f"Dice {dice['mean']:.3f} (95 % interval {dice['low']:.2f} to {dice['high']:.2f}) "
        "on 90 test images never used in training; 3 missed entirely."
    )


def test_nothing_is_loaded_from_outside_and_nothing_runs(make_run: MakeRun) -> None:
    page = page_of(make_run(), make_run("other", seed=3))
    assert not {e.tag for e in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"{element.tag} has a handler {name}"
            assert name != "style", "an inline style would be refused by the page's own policy"
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), value[:60]
    assert "http" not in page.source.replace("http-equiv", "")
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_every_link_leads_somewhere_and_every_id_is_used_once(make_run: MakeRun) -> None:
    page = page_of(make_run(), make_run("other", seed=3))
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    targets = [e.attributes["href"] for e in page.all("a")] + ["#" + e.attributes["for"] for e in page.all("label")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_the_policy_admits_exactly_the_page_s_own_style(make_run: MakeRun) -> None:
    page = page_of(make_run())
    (policy,) = (e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes)
    (style,) = page.all("style")
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_names_stay_text(make_run: MakeRun) -> None:
    evil = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)>'
    run = make_run('a"><script>b')
    cases = (run / "cases_test.csv").read_text().replace("ISIC_0000003", '"' + evil.replace('"', '""') + '"')
    (run / "cases_test.csv").write_text(cases.replace("melanoma", "<i>melanoma</i>"))
    index = json.loads((run / "pictures" / "test" / "index.json").read_text())
    write(run / "pictures" / "test" / "index.json", [{**index[0], "name": evil, "dice": evil}, *index[1:]])
    finding = {"code": evil, "files": [evil], "message": evil}
    audit = {"errors": [finding], "warnings": [], "notes": [], "counts": {evil: 1}, "duplicates": [[evil, evil, evil]]}
    write(run / "audit.json", audit)
    facts = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**facts, "command": evil, "status": evil, "git": evil, "versions": {evil: evil}})
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", {evil: metrics["test"], **metrics})
    log = (run / "finetune" / "log.jsonl").read_text().replace("soft_dice", "<script>term")
    (run / "finetune" / "log.jsonl").write_text(log)
    page = page_of(run)
    assert not page.all("script")
    assert not page.all("i")
    assert all(e.attributes["src"].startswith("data:") for e in page.all("img"))
    assert evil in page.text


def test_the_same_runs_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    first, second = (build_report([run], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_typical_page_is_small(make_run: MakeRun) -> None:
    run = make_run(num_cases=600, num_steps=3000)
    assert build_report([run], run / "report.html").stat().st_size < 1_000_000


def test_a_whole_run_has_every_section(make_run: MakeRun) -> None:
    assert page_of(make_run()).sections == ALL_SECTIONS


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        (("audit",), set()),
        (("manifest",), set()),
        (("audit", "manifest"), {"Data"}),
        (("pretrain",), {"Pre-training"}),
        (("finetune",), set()),
        (("pretrain", "finetune"), {"Pre-training", "Curves"}),
        (("cases",), {"Case by case"}),
        (("pictures",), {"Pictures"}),
        (("export",), set()),
        (("metrics", "cases", "pictures", "export"), {"Results", "Case by case", "Pictures"}),
        (
            ("metrics", "cases", "pictures", "export", "finetune"),
            {"Results", "Case by case", "Pictures"},
        ),
        (tuple(sorted(PIECES)), set(ALL_SECTIONS) - {"How it was made", "Limits"}),
    ],
)
def test_a_section_is_shown_exactly_when_its_material_exists(
    make_run: MakeRun, without: tuple[str, ...], gone: set[str]
) -> None:
    page = page_of(make_run(without=without))
    assert page.sections == [section for section in ALL_SECTIONS if section not in gone]
    assert page.all("h1")[0].text.endswith(".")
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize(
    ("method", "facts", "told"),
    [
        ("g2ll", {"product": "encoder"}, "An encoder pre-trained with G2LL on "),
        ("simmim", {}, "An encoder pre-trained with SimMIM on "),
        ("figure", {"product": "segmenter"}, "A segmenter pre-trained with figure on "),
        ("boundary_distance", {"product": "encoder"}, "An encoder pre-trained with boundary distance on "),
    ],
)
def test_what_was_pretrained_alone_is_told_with_its_method_as_it_is_written(
    make_run: MakeRun, method: str, facts: dict[str, str], told: str
) -> None:
    run = make_run(without=("metrics", "cases", "pictures", "export", "finetune"))
    path = run / "pretrain" / "stage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": method, **facts}))
    assert told in page_of(run).all("h1")[0].text


def test_test_images_that_were_seen_before_are_told_where_the_figure_is(make_run: MakeRun) -> None:
    run = make_run()
    record = json.loads((run / "run.json").read_text())
    record["data"] = {**(record.get("data") or {}), "test_images_seen": 7}
    (run / "run.json").write_text(json.dumps(record))
    page = page_of(run)
    assert "on 90 test images, 7 of which it or its teacher saw before, without their masks;" in page.all("h1")[0].text
    assert "has seen 7 of the test images, without their masks: the figure may flatter it" in page.text
    assert "never used in training" not in page.text


def test_without_a_test_split_the_page_says_what_its_figure_is_worth(make_run: MakeRun) -> None:
    page = page_of(make_run(splits=("val",)))
    assert "90 validation images, which also chose the model" in page.all("h1")[0].text
    assert "There is no test split." in page.text
    assert "never used in training" not in page.text


def test_another_data_set_is_named_as_such(make_run: MakeRun) -> None:
    page = page_of(make_run(splits=("val", "ph2-all")))
    assert "on 90 images of another data set (ph2-all)" in page.all("h1")[0].text
    assert page.all("td", data_metric="dice", data_split="ph2-all")


def test_positives_stand_apart_from_empties(make_run: MakeRun) -> None:
    run = make_run()
    metrics = split_with_empties(np.random.default_rng(5))
    write(run / "metrics.json", {"test": metrics})
    page = page_of(run)
    (positives,) = page.all("td", data_metric="positives", data_split="test")
    (empties,) = page.all("td", data_metric="empties", data_split="test")
    assert positives.text.startswith(f"{metrics['positives']['dice']['mean']:.3f}")
    assert empties.text.startswith("17 of 20")
    assert "on 3 of them the model marked something" in page.text


def test_undefined_figures_are_dashes_and_never_nan(make_run: MakeRun) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    undefined = {"mean": None, "low": None, "high": None, "median": None, "std": None}
    metrics["test"] |= {"sensitivity": undefined, "hd95_256": undefined}
    metrics["test"]["dice"] |= {"low": None, "high": None}
    write(run / "metrics.json", metrics)
    page = page_of(run)
    (cell,) = page.all("td", data_metric="sensitivity", data_split="test")
    assert cell.text == "–"
    assert "interval" not in page.all("h1")[0].text


@pytest.mark.parametrize("status", ["interrupted", "running", "failed"])
def test_an_unfinished_run_says_so_at_the_top(make_run: MakeRun, status: str) -> None:
    run = make_run(status=status, without=("metrics", "cases", "pictures", "export"))
    (run / "finetune" / "stage.json").unlink()
    page = page_of(run)
    (alert,) = page.all("p", class_="alert")
    words = {"interrupted": "interrupted in fine-tuning", "running": "had not ended", "failed": "failed"}
    assert words[status] in alert.text
    assert "Not finished: 100 % done" in page.text


def test_the_exported_file_s_costs_are_those_of_export_json(make_run: MakeRun) -> None:
    run = make_run()
    page = page_of(run)
    text = page.text
    for label, value in (("Network input", "128 × 128"), ("GMac at that size", "0.072"), ("GMac at 256 × 256", "0.29")):
        assert text.split(label)[1].split("\n")[0].strip() == value
    facts = json.loads((run / "export.json").read_text())
    found = [e.text for e in page.all("td", class_="num")]
    for row in facts["latency"]:
        assert f"{row['p50_ms']:.1f}" in found
    assert "Network alone, 256 × 256" in [e.text for e in page.all("th")]
    facts.pop("latency")
    write(run / "export.json", {**facts, "gmacs_256": None})
    without = page_of(run)
    assert not without.all("table", class_="latency")
    assert "GMac at 256" not in without.text


def test_home_folders_are_not_shown(make_run: MakeRun) -> None:
    page = page_of(make_run())
    assert "/home/ada" not in page.source
    assert "~/isic" in page.text


def test_the_command_is_shown_as_typed(make_run: MakeRun) -> None:
    run = make_run()
    facts = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**facts, "command": "fewmask run /home/ada/isic --out x"})
    assert "fewmask run /home/ada/isic --out x" in page_of(run).text


def test_several_runs_begin_with_a_comparison(make_run: MakeRun) -> None:
    runs = [make_run("first"), make_run("second", seed=3)]
    page = page_of(*runs)
    assert page.all("h1")[0].text == "2 runs side by side"
    for run in runs:
        dice = json.loads((run / "metrics.json").read_text())["test"]["dice"]
        assert f"{run.name}: {dice['mean']:.3f} ({dice['low']:.3f} to {dice['high']:.3f})" in page.text
    assert page.sections == 2 * ALL_SECTIONS
    differing = [e.text for e in page.all("code")]
    assert "finetune.lr" in differing
    assert "pretrain.lr" not in differing


def test_pre_trainings_alone_are_set_side_by_side_without_a_table_of_dashes(make_run: MakeRun) -> None:
    bare = ("metrics", "cases", "pictures", "export", "finetune")
    runs = [make_run("first", without=bare), make_run("second", without=bare)]
    facts = json.loads((runs[0] / "pretrain" / "stage.json").read_text())
    write(runs[0] / "pretrain" / "stage.json", {**facts, "method": "g2ll", "epochs": 4.75, "num_images": 10380})
    with (runs[0] / "pretrain" / "log.jsonl").open("a") as log:
        for value in (0.25, 0.375):
            print(json.dumps({"kind": "probe", "step": 1, "epoch": 1, "knn_balanced_accuracy": value}), file=log)
    page = page_of(*runs)
    assert "Missed" not in [e.text for e in page.all("th")]
    cells = [e.text for e in page.all("td")]
    assert cells[:3] == ["G2LL", "10,380", "4.8"]
    assert "0.375" in cells
    unasked = page_of(make_run("fourth", without=bare), make_run("fifth", without=bare))
    assert "Epochs" in [e.text for e in unasked.all("th")]
    assert "Probe" not in [e.text for e in unasked.all("th")]
    alone = page_of(runs[0], make_run("third", without=("pretrain",)))
    assert "Probe" not in [e.text for e in alone.all("th")]
    assert "Missed" in [e.text for e in alone.all("th")]


def test_a_failed_run_says_why(make_run: MakeRun) -> None:
    run = make_run(status="failed", without=("metrics", "cases", "pictures", "export"))
    facts = json.loads((run / "run.json").read_text())
    write(run / "run.json", {**facts, "reason": "The loss became nan at step 7."})
    (alert,) = page_of(run).all("p", class_="alert")
    assert "failed: The loss became nan at step 7. What follows" in alert.text


def test_a_pre_training_of_no_steps_is_not_called_one(make_run: MakeRun) -> None:
    run = make_run(without=("metrics", "cases", "pictures", "export", "finetune"))
    facts = json.loads((run / "pretrain" / "stage.json").read_text())
    write(run / "pretrain" / "stage.json", {**facts, "steps": 0, "epochs": 0.0})
    assert "no step of pre-training was made" in page_of(run).all("h1")[0].text


def test_runs_differ_by_the_method_that_a_chain_has_taken_by_itself(make_run: MakeRun) -> None:
    runs = [make_run("asked"), make_run("taken")]
    before = [e.text for e in page_of(*runs).all("code")]
    path = runs[1] / "pretrain" / "stage.json"
    taken = {"method": {"name": "simmim"}, "lr": 0.125}
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": taken}))
    found = {e.text for e in page_of(*runs).all("code")} - set(before)
    assert {"pretrain.method.name", "pretrain.lr"} <= found


def test_runs_scored_on_different_images_are_called_incomparable(make_run: MakeRun) -> None:
    same = page_of(make_run("a"), make_run("b", seed=3))
    other = page_of(make_run("c"), make_run("d", num_cases=80))
    assert "not comparable" not in same.text
    assert "were not scored on the same images" in other.text


def test_a_paired_difference_is_shown_only_where_evaluate_wrote_one(make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second", seed=3)
    assert "Paired difference" not in page_of(first, second).text
    found = {"run": "runs/first", "difference": -0.0123, "low": -0.02, "high": 0.001}
    write(second / "compare.json", {"split": "test", **found})
    assert "−0.012 (−0.020 to +0.001) against first" in page_of(first, second).text
    write(second / "compare.json", {"split": "ph2-all", **found})  # nothing to set beside the Dice of the test images
    assert "against first" not in page_of(first, second).text


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No run was given"):
        build_report([], tmp_path / "report.html")


def test_a_failed_report_leaves_the_old_one(make_run: MakeRun) -> None:
    run = make_run()
    out = build_report([run], run / "report.html")
    before = out.read_bytes()
    (run / "metrics.json").write_text("{")
    with pytest.raises(UserError):
        build_report([run], out)
    assert out.read_bytes() == before
    assert not list(run.glob(".*.tmp"))


def test_a_place_that_cannot_be_written_is_a_user_error(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(UserError, match="cannot be written"):
        build_report([run], run / "run.json" / "report.html")


def test_the_command_writes_the_page_and_says_where(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    assert report([run], run / "pages" / "report.html") == 0
    assert capsys.readouterr().out == f"Report: {run / 'pages' / 'report.html'}\n"
    assert Page(run / "pages" / "report.html").sections == ALL_SECTIONS


def test_pictures_of_test_patients_are_counted_where_they_were_kept_out(make_run: MakeRun) -> None:
    page = page_of(make_run(num_cases=70))
    heads = [element.text for element in page.all("th")]
    assert "Same patient as test, kept out" in heads
    assert "Other images of test patients kept out" in page.text
    assert page.text.split("Other images of test patients kept out")[1].split()[0] == "13"
