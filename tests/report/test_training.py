"""The curves of a stage: which figures are drawn, and what is said about collapse."""

from __future__ import annotations

import pytest

from fewmask.report.reading import Stage
from fewmask.report.training import guard_sentence, probe_chart, remarks, term_charts, training


def stage(num_steps: int = 20, **figures: float) -> Stage:
    steps = [{"kind": "step", "step": n, "epoch": n / 5, "loss": 1 / n, "lr": 0.1, **figures} for n in range(1, 21)]
    return Stage("pretrain", {"status": "done"}, steps=steps[:num_steps])


def titles(of: Stage) -> list[str]:
    return [chart["title"] for chart in training(of)["charts"]]


def test_each_term_has_a_curve_of_its_own_and_the_guard_s_figures_one_together() -> None:
    found = stage(reconstruction=0.5, distillation=8.0, feature_std=0.4, teacher_entropy=0.9, teacher_information=0.2)
    assert titles(found) == [
        "Training loss", "Loss term: reconstruction", "Loss term: distillation", "Signs of collapse", "Learning rate",
    ]  # fmt: skip
    guard = training(found)["charts"][3]
    assert [entry["name"] for entry in guard["legend"]] == ["Feature std", "Teacher entropy", "Teacher information"]


def test_a_single_term_is_the_loss_and_the_guard_alone_is_no_term() -> None:
    assert titles(stage(accuracy=0.5)) == ["Training loss", "Learning rate"]
    assert titles(stage(feature_std=0.5)) == ["Training loss", "Signs of collapse", "Learning rate"]


def test_terms_beyond_the_fourth_are_named() -> None:
    charts = term_charts(stage(a=1.0, b=2.0, c=3.0, d=4.0, attention_loss=5.0))
    assert len(charts) == 4
    assert charts[-1]["note"] == "Not drawn: Attention loss."


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"feature_std": 0.43, "teacher_entropy": 0.97, "teacher_information": 0.2}, "No sign of collapse at the end"),
        ({"feature_std": 0.002, "teacher_information": 0.2}, "the features of all images point the same way"),
        ({"feature_std": 0.4, "teacher_information": 1e-5}, "the teacher answers the same to every image"),
        ({"feature_std": 0.4}, "No sign of collapse at the end: feature std 0.40 (0: all images alike"),
    ],
)
def test_a_sentence_says_whether_it_collapsed(figures: dict[str, float], words: str) -> None:
    assert words in guard_sentence(stage(**figures))


def test_the_sentence_is_about_the_end_alone() -> None:
    found = stage(feature_std=0.4)
    for step in found.steps[:18]:
        step["feature_std"] = 0.0
    assert guard_sentence(found).startswith("No sign")
    for step in found.steps[18:]:
        step["feature_std"] = 0.0
    assert guard_sentence(found).startswith("Collapsed")


def test_a_probe_is_drawn_with_what_guessing_would_reach() -> None:
    found = stage()
    assert probe_chart(found) is None
    figures = {"knn_accuracy": 0.71, "knn_balanced_accuracy": 0.52, "majority": 0.625}
    found.probes.extend({"step": 5 * n, "epoch": float(n), **figures} for n in range(1, 5))
    chart = probe_chart(found)
    assert chart is not None
    assert "Last: balanced accuracy 0.520, accuracy 0.710." in chart["note"]
    assert "would reach 0.625" in chart["note"]
    assert chart["svg"].count("<polyline") == 2


def test_the_log_s_sentences_are_shown() -> None:
    found = stage()
    found.remarks.append("no probe: nobody knows the classes")
    assert remarks(found) == ["The log says: no probe: nobody knows the classes."]
