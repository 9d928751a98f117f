"""Assemble what runs left on disk into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fewmask.report import provenance, results, training
from fewmask.report.comparison import comparison
from fewmask.report.features import features
from fewmask.report.limits import limits
from fewmask.report.pictures import KINDS, case_pictures, previews
from fewmask.report.reading import Record, read_run
from fewmask.report.student import student
from fewmask.report.wording import moment, split_name
from fewmask.types import UserError

HERE = Path(__file__).resolve().parent


def build_report(runs: list[Path], out: Path) -> Path:
    """Write one self-contained report of one run or of several side by side, and return its path.

    The page is a function of the run folders alone: no time of its own, no script, no outside resource. Raises
    UserError when there is no run, a folder is not a run, a file in it is corrupt, or `out` cannot be written.
    """
    if not runs:
        raise UserError("No run was given; name at least one run folder.")
    records = [read_run(run) for run in runs]
    page = render(records)
    _write(page, out)
    return out


def render(records: list[Record]) -> str:
    """Return the page of these runs; every text in it is escaped by the template."""
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    names = ", ".join(record.name for record in records)
    return environment.get_template("report.html").render(
        css=Markup(css),  # noqa: S704 - our own file, not a user's
        css_digest=digest,
        title=names if len(names) <= 80 else f"{len(records)} runs",
        comparison=comparison(records),
        runs=[describe(record, f"r{i}") for i, record in enumerate(records, start=1)],
    )


def describe(record: Record, anchor: str) -> dict[str, Any]:
    """Return everything the template shows of a run; `anchor` keeps the links of several runs apart."""
    stage, taught = record.stage("pretrain"), record.stage("distill")
    run = {
        "anchor": anchor,
        "name": record.name,
        "when": moment(record.run.get("finished") or record.run.get("started")),
        "status": provenance.status(record),
        "headline": results.headline(record),
        "table": results.table(record),
        "spread": results.spread(record),
        "labels": results.labels(record),
        "student": student(record),
        "pairs": previews(taught.previews) if taught else [],
        "pictures": picture_groups(record),
        "training": [training.training(s) for s in record.stages],
        "previews": previews(stage.previews) if stage else [],
        "features": features(stage),
        "pretraining": provenance.pretraining(record),
        "audit": provenance.audit(record),
        "splits": provenance.splits(record),
        "making": provenance.making(record),
        "limits": limits(record),
    }
    return {**run, "sections": sections(run)}


def picture_groups(record: Record) -> dict[str, Any] | None:
    """Return best, median and worst cases of the leading split that has pictures."""
    split = record.split if record.split in record.pictures else next(iter(record.pictures), None)
    if split is None:
        return None
    entries = case_pictures(record.folder / "pictures" / split, record.pictures[split])
    groups = [{"kind": kind, "entries": [e for e in entries if e["kind"] == kind]} for kind in KINDS]
    return {"split": split_name(split).lower(), "groups": [group for group in groups if group["entries"]]}


def sections(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Return id and title of the sections this run has material for, in the order of the page."""
    present = [
        ("results", "Results", run["table"]),
        ("spread", "Case by case", run["spread"] or run["labels"]),
        ("student", "Small and large", run["student"]),
        ("pictures", "Pictures", run["pictures"] and run["pictures"]["groups"]),
        ("pretraining", "Pre-training", run["previews"] or run["features"] or run["pretraining"]),
        ("training", "Curves", [stage for stage in run["training"] if stage["charts"] or stage["remarks"]]),
        ("data", "Data", run["audit"] or run["splits"]),
        ("making", "How it was made", True),
        ("limits", "Limits", run["limits"]),
    ]
    return [(key, title) for key, title, material in present if material]


def _write(page: str, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"The report {out} cannot be written ({error.strerror}); choose another --out.") from None
