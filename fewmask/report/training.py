"""The curves and facts of each training stage."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from fewmask.report.plot import Axis, Point, Series, line_chart, span, thin
from fewmask.report.reading import Stage
from fewmask.report.wording import NONE, count, counted, duration, fixed, lowered, number, percent, stage_name, title

RESERVED = {"kind", "step", "epoch", "progress", "loss", "lr", "images_per_s", "data_wait", "seconds", "score"}
STYLES = ("main", "second", "third", "fourth")
GUARD = ("feature_std", "teacher_entropy", "teacher_information")
# Below these the collapse guard of pre-training counts a step as a sign of collapse.
MIN_STD, MIN_INFORMATION = 0.01, 1e-3
PROBE = {"knn_balanced_accuracy": "Balanced accuracy", "knn_accuracy": "Accuracy"}
MAX_TERMS = 4
LOG_SPREAD = 30.0

Chart = dict[str, Any]


def training(stage: Stage) -> dict[str, Any]:
    """Return the charts, facts and remarks of a stage; the charts are those the log has figures for."""
    charts = [loss_chart(stage), score_chart(stage), probe_chart(stage), *term_charts(stage)]
    charts += [guard_chart(stage), rate_chart(stage)]
    return {
        "name": stage.name,
        "title": stage_name(stage.name),
        "charts": [chart for chart in charts if chart],
        "facts": stage_facts(stage),
        "remarks": remarks(stage),
    }


def loss_chart(stage: Stage) -> Chart | None:
    """Return the training loss over epochs, with the band of its ups and downs where points were merged."""
    points = _points(stage.steps, "loss")
    rows = points or _points(stage.epochs, "loss")
    if not rows:
        return None
    means, band, stride = thin(rows)
    values = [y for _, y in means]
    log = min(values) > 0 and max(values) / min(values) > LOG_SPREAD
    axis = span(values, "Loss", log=log)
    # The band is clipped to the axis of the means, or a single bad step would flatten the whole curve.
    band = [(x, max(low, axis.low), high) for x, low, high in band]
    note = f"Each point is the mean of {stride} logged steps; the band spans the lowest and highest." if band else ""
    svg = line_chart("Training loss", [Series("Loss", means, band=band)], _epochs(stage), axis, marks=_marks(stage))
    return {"title": "Training loss", "svg": svg, "note": note, "legend": []}


def score_chart(stage: Stage) -> Chart | None:
    """Return the validation score over epochs, with the best one ringed: that is the model that was kept."""
    points = _points(stage.epochs, "score")
    if not points:
        return None
    at, best = max(points, key=lambda p: (p[1], -p[0]))
    text = f"best {best:.3f}, epoch {at:g}"
    svg = line_chart(
        "Validation score", [Series("Score", points)], _epochs(stage), span([y for _, y in points], "Score"),
        marks=_marks(stage), best=(at, best, text),
    )  # fmt: skip
    note = "Higher is better. The ringed epoch was kept."
    return {"title": "Validation score", "svg": svg, "note": note, "legend": []}


def probe_chart(stage: Stage) -> Chart | None:
    """Return how well neighbours in the space of the features name the class of an image, over epochs."""
    lines = {name: _points(stage.probes, key) for key, name in PROBE.items()}
    if not all(lines.values()):
        return None
    series = [Series(name, points, style) for (name, points), style in zip(lines.items(), STYLES, strict=False)]
    y = span([value for one in series for _, value in one.points], "Share named rightly")
    svg = line_chart("Nearest-neighbour probe", series, _epochs(stage), y, marks=_marks(stage))
    majority = number(stage.probes[-1].get("majority"))
    floor = "" if majority is None else f" Always naming the most frequent class would reach {majority:.3f}."
    last = ", ".join(f"{one.name.lower()} {one.points[-1][1]:.3f}" for one in series)
    note = (
        f"Labelled images named by the vote of their nearest others, those of the same patient left out. Last: {last}."
        f"{floor} Nothing was chosen by it."
    )
    return {"title": "Nearest-neighbour probe", "svg": svg, "note": note, "legend": _legend(series)}


def term_charts(stage: Stage) -> list[Chart]:
    """Return one chart for each term the loss is made of, when the objective logged at least two."""
    rows = stage.steps or stage.epochs
    known = [k for k in (rows[0] if rows else {}) if k not in RESERVED and k not in GUARD]
    keys = [k for k in known if len(_points(rows, k)) == len(rows)]
    if len(keys) < 2:
        return []
    charts = [_term_chart(stage, rows, key) for key in keys[:MAX_TERMS]]
    if len(keys) > MAX_TERMS:
        charts[-1]["note"] = f"Not drawn: {', '.join(title(k) for k in keys[MAX_TERMS:])}."
    return charts


def _term_chart(stage: Stage, rows: list[dict[str, Any]], key: str) -> Chart:
    means, _, _ = thin(_points(rows, key))
    values = [y for _, y in means]
    log = min(values) > 0 and max(values) / min(values) > LOG_SPREAD
    axis = span(values, title(key), log=log)
    svg = line_chart(title(key), [Series(title(key), means)], _epochs(stage), axis, marks=_marks(stage))
    return {"title": f"Loss term: {lowered(title(key))}", "svg": svg, "note": "", "legend": []}


def guard_chart(stage: Stage) -> Chart | None:
    """Return the figures that tell whether the representation says the same of every image, with what they say."""
    keys = [key for key in GUARD if len(_points(stage.steps, key)) >= 2]
    if not keys:
        return None
    series = [
        Series(title(key), thin(_points(stage.steps, key))[0], style) for key, style in zip(keys, STYLES, strict=False)
    ]
    svg = line_chart("Signs of collapse", series, _epochs(stage), Axis(0.0, 1.0, "Share of the greatest"))
    return {"title": "Signs of collapse", "svg": svg, "note": guard_sentence(stage), "legend": _legend(series)}


def guard_sentence(stage: Stage) -> str:
    """Return what the last tenth of the logged steps says about collapse."""
    last = stage.steps[-max(1, len(stage.steps) // 10) :]
    std, entropy, information = (_mean(last, key) for key in GUARD)
    if std is not None and std < MIN_STD:
        return f"Collapsed: at the end the features of all images point the same way (feature std {std:.2g})."
    if information is not None and information < MIN_INFORMATION:
        return f"Collapsed: at the end the teacher answers the same to every image (information {information:.2g})."
    parts = [] if std is None else [f"feature std {std:.2f} (0: all images alike, 1: as different as can be)"]
    parts += [] if entropy is None else [f"teacher entropy {entropy:.2f} (0: always sure, 1: never)"]
    parts += [] if information is None else [f"teacher information {information:.2g} (0: one answer to every image)"]
    return f"No sign of collapse at the end: {', '.join(parts)}."


def _legend(series: list[Series]) -> list[dict[str, str]]:
    return [{"name": one.name, "style": one.style} for one in series]


def rate_chart(stage: Stage) -> Chart | None:
    """Return the learning rate over epochs."""
    points = _points(stage.steps, "lr")
    if len(points) < 2:
        return None
    means, _, _ = thin(points)
    axis = Axis(0.0, max(y for _, y in means) * 1.08 or 1.0, "lr")
    svg = line_chart("Learning rate", [Series("Learning rate", means, "second")], _epochs(stage), axis)
    return {"title": "Learning rate", "svg": svg, "note": "", "legend": []}


def last_probe(stage: Stage) -> str:
    """Return the balanced accuracy of the last probe, a dash where there was none."""
    return fixed(stage.probes[-1].get("knn_balanced_accuracy") if stage.probes else None, 3)


def stage_facts(stage: Stage) -> list[tuple[str, str]]:
    """Return what a stage did in label and value: method, images, length, time, speed, waiting, device."""
    info, speed, wait = stage.info, _middle(stage.steps, "images_per_s"), _mean(stage.steps, "data_wait")
    epochs = info.get("epochs", _last(stage, "epoch"))
    facts = [
        ("Method", str(info["method"]) if info.get("method") else NONE),
        ("Images", count(info.get("num_images"))),
        ("Epochs", _length(number(epochs), info.get("steps", _last(stage, "step")))),
        ("Batch size", count(info.get("batch_size"))),
        ("Wall clock", duration(seconds(stage))),
        ("Images per second", fixed(speed, 0 if (speed or 0) >= 20 else 1)),
        ("Time waiting for data", percent(wait, 1 if (wait or 0) < 0.1 else 0)),
        ("Device", str(info["device"]) if info.get("device") else NONE),
    ]
    return [(label, value) for label, value in facts if value != NONE]


def _length(epochs: float | None, steps: Any) -> str:
    return NONE if epochs is None else f"{epochs:g} ({counted(steps, 'step')})"


def seconds(stage: Stage) -> float | None:
    """Return the wall-clock time of a stage: what it says itself, or the last time in its log."""
    return number(stage.info.get("seconds")) or _last(stage, "seconds")


def finished(stage: Stage) -> bool:
    """Return whether the stage ran to its end."""
    return stage.info.get("status") == "done"


def progress(stage: Stage) -> float | None:
    """Return how far the stage came, in [0, 1], or None where it does not say."""
    return 1.0 if finished(stage) else _last(stage, "progress")


def remarks(stage: Stage) -> list[str]:
    """Return sentences about what was not smooth: resumes, torn lines, an unfinished stage."""
    found = []
    if not finished(stage):
        share = progress(stage)
        found.append(f"Not finished{f': {percent(share)} done' if share else ''}. The same command resumes it.")
    if stage.resumes:
        num = len(stage.resumes)
        found.append("Resumed once, at the dotted line." if num == 1 else f"Resumed {num} times, at the dotted lines.")
    if stage.num_unreadable:
        lines = counted(stage.num_unreadable, "line")
        found.append(f"{lines} of the log could not be read and had to be left out; a killed run leaves one torn.")
    return [*found, *(f"The log says: {text.rstrip('.')}." for text in stage.remarks)]


def best_score(stage: Stage) -> tuple[float, float] | None:
    """Return the best validation score of a stage and its epoch."""
    points = _points(stage.epochs, "score")
    return max(((y, x) for x, y in points), key=lambda p: (p[0], -p[1])) if points else None


def _points(rows: list[dict[str, Any]], key: str) -> list[Point]:
    pairs = ((number(row.get("epoch")), number(row.get(key))) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _epochs(stage: Stage) -> Axis:
    found = [x for rows in (stage.steps, stage.epochs) for row in rows if (x := number(row.get("epoch"))) is not None]
    return Axis(0.0, max([*found, 1e-3]), "Epoch")


def _marks(stage: Stage) -> list[tuple[float, str]]:
    rows = [r for r in stage.steps or stage.epochs if number(r.get("step")) is not None]
    marks = []
    for step in stage.resumes:
        before = [number(r.get("epoch")) or 0.0 for r in rows if r["step"] <= step]
        marks.append((before[-1] if before else 0.0, f"Resumed at step {step:,.0f}"))
    return marks


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _middle(rows: list[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return median(values) if values else None


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return fmean(values) if values else None


def _last(stage: Stage, key: str) -> float | None:
    values = _values([*stage.epochs, *stage.steps] if key == "epoch" else [*stage.steps, *stage.epochs], key)
    return max(values) if values else None
