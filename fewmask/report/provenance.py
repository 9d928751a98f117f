"""Where the figures come from: the data and what the audit found, the command, the settings and the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fewmask.report import training
from fewmask.report.exported import exported
from fewmask.report.reading import Record, Stage
from fewmask.report.wording import (
    NONE,
    count,
    counted,
    duration,
    moment,
    number,
    percent,
    split_name,
    stage_name,
    title,
)

MAX_FILES = 8
MAX_FINDINGS = 40
USES = {
    "labelled": "labelled",
    "unlabelled": "unlabelled",
    "validation": "validation",
    "excluded-test": "test, kept out",
    "excluded-duplicate": "copies of test, kept out",
    "excluded-group": "same patient as test, kept out",
}
SEVERITIES = (("errors", "Error"), ("warnings", "Warning"), ("notes", "Note"))


def status(record: Record) -> dict[str, str]:
    """Return the run's state in one word, and in one sentence where that word is not "done"."""
    word = str(record.run.get("status", "unknown"))
    last = next((s for s in reversed(record.stages) if not training.finished(s)), None)
    where = f" in {stage_name(last.name).lower()}" if last else ""
    sentences = {
        "done": "",
        "interrupted": f"This run was interrupted{where}. The same command resumes it.",
        "running": "This run had not ended when the report was made, or its process was killed.",
        "failed": f"This run failed{where}{_reason(record)} What follows is what it left.",
    }
    return {"word": word, "sentence": sentences.get(word, f"The state of this run is “{word}”.")}


def _reason(record: Record) -> str:
    """Return why a run ended, in its own words, where it says so."""
    reason = record.run.get("reason")
    first = reason.splitlines()[0].rstrip(".:") if isinstance(reason, str) and reason else ""
    return f": {first}." if first else "."


def pretraining(record: Record) -> list[tuple[str, str]]:
    """Return what pre-training saw and what was kept from it, in label and value."""
    stage = record.stage("pretrain")
    if stage is None:
        return []
    excluded = stage.info.get("excluded")
    excluded = excluded if isinstance(excluded, dict) else {}
    facts = [
        ("Images used", count(stage.info.get("num_images"))),
        ("Validation images kept out", count(excluded.get("validation"))),
        ("Test images kept out", count(excluded.get("test"))),
        ("Near-duplicates of test images kept out", count(excluded.get("near_duplicates"))),
        ("Other images of test patients kept out", count(excluded.get("same_group"))),
    ]
    return [fact for fact in facts if fact[1] != NONE]


def audit(record: Record) -> dict[str, Any] | None:
    """Return the audit's findings, worst first, with the first few files of each, its counts and duplicate pairs."""
    if record.audit is None:
        return None
    found = [
        _finding(word, finding)
        for key, word in SEVERITIES
        for finding in _list(record.audit, key)
        if isinstance(finding, dict)
    ]
    numbers = {title(str(k)): count(v) for k, v in _dict(record.audit, "counts").items() if number(v) is not None}
    pairs = [[str(part) for part in pair] for pair in _list(record.audit, "duplicates") if isinstance(pair, list)]
    return {
        "findings": found[:MAX_FINDINGS],
        "num_more": max(0, len(found) - MAX_FINDINGS),
        "summary": _summary(found, pairs),
        "counts": numbers,
        "duplicates": pairs[:MAX_FILES],
        "num_more_duplicates": max(0, len(pairs) - MAX_FILES),
    }


def splits(record: Record) -> dict[str, Any] | None:
    """Return a table of the manifest: a row a split, a column a use, and the number of groups."""
    if not record.manifest:
        return None
    uses = [use for use in USES if any(row.get("use") == use for row in record.manifest)]
    rows = []
    for split in ("train", "val", "test", ""):
        cases = [row for row in record.manifest if (row.get("split") or "") == split]
        if cases:
            tally = Counter(row.get("use") for row in cases)
            groups = {row.get("group") or row.get("name") or row.get("image") for row in cases}
            cells = [count(tally[use]) if tally[use] else NONE for use in uses]
            name = split_name(split) if split else "No split"
            rows.append({"name": name, "cells": cells, "total": count(len(cases)), "groups": count(len(groups))})
    return {"heads": [USES[use][:1].upper() + USES[use][1:] for use in uses], "rows": rows}


def making(record: Record) -> dict[str, Any]:
    """Return the command, the facts, the stages' times, the exported file, the versions and the settings as lines."""
    run, config = record.run, _dict(record.run, "config")
    data = _dict(run, "data")
    facts = [
        ("Started", moment(run.get("started"))),
        ("Finished", moment(run.get("finished"))),
        ("Wall clock in all", duration(run.get("seconds"))),
        ("Seed", str(_dict(config, "run").get("seed", config.get("seed", NONE)))),
        ("Commit of fewmask", str(run.get("git") or NONE)),
        ("Data", str(data.get("root") or NONE)),
        ("Cases", count(data.get("num_cases"))),
        ("Fingerprint of the data", str(data.get("fingerprint") or NONE)[:16]),
        ("Models it started from", " ".join(map(str, _list(data, "given"))) or NONE),
        ("Device", str(run.get("device") or NONE)),
        ("CPU threads", count(run.get("threads"))),
    ]
    return {
        "command": str(run.get("command") or ""),
        "facts": [(label, value) for label, value in facts if value not in (NONE, "")],
        "stages": [_stage_row(stage) for stage in record.stages],
        "exported": exported(record),
        "versions": [(str(k), str(v)) for k, v in _dict(run, "versions").items()],
        "config": [(key, value) for key, value in flat(config)],
    }


def flat(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested dict as dotted keys and values, written the way the command line takes them."""
    if isinstance(config, dict) and config:
        return [pair for k, v in config.items() for pair in flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, _literal(config))] if prefix else []


def _literal(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list):
        return f"[{', '.join(_literal(v) for v in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stage_row(stage: Stage) -> dict[str, str]:
    facts = dict(training.stage_facts(stage))
    share = training.progress(stage)
    done = "done" if training.finished(stage) else f"{percent(share)} done" if share is not None else "not finished"
    keys = ("Method", "Wall clock", "Images per second", "Time waiting for data", "Device")
    return {"name": stage_name(stage.name), "state": done, **{key: facts.get(key, NONE) for key in keys}}


def _finding(word: str, finding: dict[str, Any]) -> dict[str, Any]:
    files = [str(name) for name in _list(finding, "files")]
    return {
        "severity": word,
        "code": str(finding.get("code", "")),
        "message": str(finding.get("message", "")),
        "files": files[:MAX_FILES],
        "num_more": max(0, len(files) - MAX_FILES),
    }


def _summary(found: list[dict[str, Any]], pairs: list[list[str]]) -> str:
    tally = Counter(f["severity"] for f in found)
    parts = [counted(tally[word], word.lower()) for _, word in SEVERITIES if tally[word]]
    verb = "is" if len(pairs) == 1 else "are"
    twins = f" {counted(len(pairs), 'pair')} of images {verb} the same or nearly so." if pairs else ""
    return (f"{', '.join(parts)}." if parts else "Nothing amiss was found.") + twins


def _dict(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _list(mapping: dict[str, Any], key: str) -> list[Any]:
    value = mapping.get(key)
    return value if isinstance(value, list) else []
