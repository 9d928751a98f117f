"""Several runs side by side."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from fewmask.report.plot import intervals
from fewmask.report.provenance import flat
from fewmask.report.reading import Record
from fewmask.report.results import num_bytes
from fewmask.report.training import last_probe, seconds
from fewmask.report.wording import NONE, count, duration, fixed, method_name, number, parameters, size, split_name

MAX_SETTINGS = 14
# Where a run was written and for how long it was allowed to work do not make two runs different methods.
NOT_COMPARED = ("run.out", "run.threads", "data.cache", "run.tensorboard")


def comparison(records: list[Record]) -> dict[str, Any] | None:
    """Return the table, chart, differing settings and warnings of two runs or more; None for a single one."""
    if len(records) < 2:
        return None
    return {
        "rows": [_row(record) for record in records] if any(record.split for record in records) else [],
        "pretrainings": _pretrainings(records),
        "probed": any(stage.probes for record in records if (stage := record.stage("pretrain")) is not None),
        "chart": _chart(records),
        "settings": differing_settings(records),
        "warnings": _warnings(records),
        "paired": any(_difference(record) for record in records),
    }


def differing_settings(records: list[Record]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with the value of each run ("–" where it has none)."""
    configs = [_settings(record) for record in records]
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in NOT_COMPARED))
    rows = [(key, [config.get(key, NONE) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1][:MAX_SETTINGS]


def _settings(record: Record) -> dict[str, Any]:
    """Return what a run was told, its pre-training as it was done: a chain may have taken its other method."""
    settings = dict(flat(record.run.get("config") or {}))
    stage = record.stage("pretrain")
    done = stage.info.get("settings") if stage is not None else None
    if not isinstance(done, dict) or "method" not in done:
        return settings
    others = {key: value for key, value in settings.items() if not key.startswith("pretrain.method.")}
    return others | dict(flat({name: done[name] for name in ("method", "lr") if name in done}, "pretrain"))


def _row(record: Record) -> dict[str, str]:
    metrics, export = record.metrics.get(record.split or "", {}), record.export or {}
    dice = metrics.get("dice") or {}
    low, high = fixed(dice.get("low"), 3), fixed(dice.get("high"), 3)
    return {
        "name": record.name,
        "split": split_name(record.split) if record.split else NONE,
        "num_cases": count(metrics.get("num_cases")),
        "dice": fixed(dice.get("mean"), 3),
        "interval": f"{low} to {high}" if NONE not in (low, high) else "",
        "difference": _difference(record),
        "hd95": fixed((metrics.get("hd95_256") or {}).get("mean"), 1),
        "missed": count(metrics.get("missed")),
        "num_parameters": parameters(export.get("num_parameters")),
        "size": size(num_bytes(export)),
    }


def _pretrainings(records: list[Record]) -> list[dict[str, str]]:
    """Return what each run's pre-training was, of two runs or more; empty where fewer have one."""
    found = [(record, stage) for record in records if (stage := record.stage("pretrain")) is not None]
    if len(found) < 2:
        return []
    return [
        {
            "name": record.name,
            "method": method_name(str(stage.info.get("method", ""))) or NONE,
            "num_images": count(stage.info.get("num_images")),
            "epochs": fixed(number(stage.info.get("epochs")), 1),
            "steps": count(stage.info.get("steps")),
            "time": duration(seconds(stage)),
            "probe": last_probe(stage),
        }
        for record, stage in found
    ]


def _difference(record: Record) -> str:
    """Return the paired difference that `evaluate` computed; the report computes none of its own."""
    compare = record.compare or {}
    if number(compare.get("difference")) is None or compare.get("split") != record.split:
        return ""
    text = f"{float(compare['difference']):+.3f}".replace("-", "−")
    if number(compare.get("low")) is not None and number(compare.get("high")) is not None:
        text += f" ({float(compare['low']):+.3f} to {float(compare['high']):+.3f})".replace("-", "−")
    return f"{text} against {PurePath(str(compare['run'])).name}" if compare.get("run") else text


def _chart(records: list[Record]) -> Markup | None:
    rows = []
    for record in records:
        dice = record.metrics.get(record.split or "", {}).get("dice") or {}
        low, mean, high = (number(dice.get(key)) for key in ("low", "mean", "high"))
        if mean is not None:
            rows.append((record.name, mean if low is None else low, mean, mean if high is None else high))
    return intervals("Dice of each run with its interval", rows, "Dice, 95 % interval") if len(rows) > 1 else None


def _warnings(records: list[Record]) -> list[str]:
    scored = [record for record in records if record.split]
    if len({record.split for record in scored}) > 1:
        return ["These runs were scored on different splits, so their figures are not comparable."]
    names = {frozenset(row.get("name", "") for row in record.cases.get(record.split or "", [])) for record in scored}
    if len(names) > 1:
        return ["These runs were not scored on the same images, so their figures are not comparable."]
    return []
