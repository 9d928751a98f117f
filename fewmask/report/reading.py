"""Read what a run wrote to disk, tolerating what a killed run leaves behind and refusing what is corrupt."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewmask.types import UserError

STAGES = ("pretrain", "finetune", "distill")
HOME = re.compile(r"(?:/(?:home|Users)/[^/\s\"']+|/root|[A-Za-z]:[\\/]Users[\\/][^\\/\s\"']+)(?=[\\/\s\"']|$)")


@dataclass(frozen=True)
class Stage:
    """One training stage: `info` is stage.json, `features` features.json, the lists are the log's.

    `steps`, `epochs` and `probes` are without what a resume did again; `remarks` are the log's sentences, each once.
    """

    name: str
    info: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[float] = field(default_factory=list)
    num_unreadable: int = 0
    previews: list[Path] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    folder: Path = Path()
    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """All that one run folder holds; a piece the run did not write is empty or None."""

    folder: Path
    name: str
    run: dict[str, Any]
    audit: dict[str, Any] | None
    metrics: dict[str, dict[str, Any]]
    cases: dict[str, list[dict[str, str]]]
    manifest: list[dict[str, str]]
    stages: list[Stage]
    export: dict[str, Any] | None
    compare: dict[str, Any] | None
    distilled: dict[str, Any] | None
    pictures: dict[str, list[dict[str, Any]]]

    @property
    def split(self) -> str | None:
        """The split whose figures lead the report: test where there is one."""
        return next(iter(self.metrics), None)

    @property
    def num_test_images_seen(self) -> int:
        """How many test images a model that the run was given has seen without their masks."""
        data = self.run.get("data")
        seen = data.get("test_images_seen") if isinstance(data, dict) else None
        return seen if isinstance(seen, int) else 0

    def stage(self, name: str) -> Stage | None:
        """Return a stage by its name, or None."""
        return next((s for s in self.stages if s.name == name), None)


def read_run(folder: Path) -> Record:
    """Return what a run folder holds; raises UserError when it is no run folder or a file in it is corrupt."""
    if not folder.is_dir():
        raise UserError(f"There is no run folder at {folder}; give the folder that `fewmask run --out` wrote.")
    run = _mapping(folder / "run.json")
    if run is None:
        raise UserError(f"{folder} is not a run folder (it has no run.json); give the folder that fewmask wrote.")
    command = run.get("command")
    metrics = {k: v for k, v in (_mapping(folder / "metrics.json") or {}).items() if isinstance(v, dict)}
    return Record(
        folder=folder,
        name=folder.resolve().name,
        run={**hide_home(run), "command": command},
        audit=hide_home(_mapping(folder / "audit.json")),
        metrics={split: metrics[split] for split in sorted(metrics, key=lambda s: (_split_rank(s), s))},
        cases={p.stem.removeprefix("cases_"): rows for p in sorted(folder.glob("cases_*.csv")) if (rows := _table(p))},
        manifest=_table(folder / "cases.csv"),
        stages=[stage for name in _stage_names(folder) if (stage := read_stage(folder / name)) is not None],
        export=hide_home(_mapping(folder / "export.json")),
        compare=hide_home(_mapping(folder / "compare.json")),
        distilled=_mapping(folder / "distill" / "comparison.json"),
        pictures={p.parent.name: _pictures(p) for p in sorted(folder.glob("pictures/[!.]*/index.json"))},
    )


def read_stage(folder: Path) -> Stage | None:
    """Return a stage from its log, settings and previews, or None when it left none of them."""
    info, log = _mapping(folder / "stage.json"), folder / "log.jsonl"
    previews = sorted((folder / "preview").glob("*.png"))
    if info is None and not previews and not log.is_file():
        return None
    rows, num_unreadable = _log(log)
    kept, resumes = _without_repeats(rows)
    texts = [hide_home(str(row.get("text", ""))) for row in rows if row.get("kind") == "remark"]
    return Stage(
        folder.name, hide_home(info or {}), kept["step"], kept["epoch"], resumes, num_unreadable, previews,
        probes=kept["probe"], remarks=list(dict.fromkeys(texts)), folder=folder,
        features=hide_home(_mapping(folder / "features.json")),
    )  # fmt: skip


def hide_home(value: Any) -> Any:
    """Return a JSON value in which the home folder of whoever ran the command reads `~`."""
    if isinstance(value, str):
        home = str(Path.home())
        if len(Path(home).parts) > 1:
            value = re.sub(re.escape(home) + r"(?=[\\/\s\"']|$)", "~", value)
        return HOME.sub("~", value)
    if isinstance(value, dict):
        return {hide_home(k): hide_home(v) for k, v in value.items()}
    return [hide_home(v) for v in value] if isinstance(value, list) else value


def _stage_names(folder: Path) -> list[str]:
    others = sorted(p.parent.name for p in folder.glob("*/log.jsonl") if p.parent.name not in STAGES)
    return [*STAGES, *others]


def _split_rank(split: str) -> int:
    """Test first, then other data sets (their keys are free), then what took part in training."""
    return {"test": 0, "val": 2, "train": 3}.get(split, 1)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the step that writes it again.") from None


def _mapping(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); run the step that writes it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object; run the step that writes it again.")
    return value


def _table(path: Path) -> list[dict[str, str]]:
    text = _text(path)
    if text is None:
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file ({error}); run the step that writes it again.") from None
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} has rows of unequal length; run the step that writes it again.")
    return [hide_home(row) for row in rows]


def _pictures(path: Path) -> list[dict[str, Any]]:
    try:
        index = json.loads(_text(path) or "")
        return [{**e, **{key: str(e[key]) for key in ("name", "kind", "image")}} for e in index]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is not a list of pictures; run `fewmask evaluate` again.") from None


def _log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the log's lines and how many were torn: a killed run tears its last one, a resumed run appends after."""
    lines = [line for line in _log_text(path).split("\n") if line.strip()]
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    num_unreadable = len(lines) - len(rows)
    if num_unreadable > len(rows) + 1:
        raise UserError(f"{path} is not a training log (one JSON object a line); restore it or train again.")
    return rows, num_unreadable


def _log_text(path: Path) -> str:
    # A torn line may end inside a character, so that undecodable bytes are no reason to refuse the file.
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def _without_repeats(rows: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Return the lines of each kind and where it resumed; what was done again after a resume replaces the first."""
    kept: dict[str, list[dict[str, Any]]] = {"step": [], "epoch": [], "probe": []}
    resumes = []
    for row in rows:
        kind = row.get("kind")
        if kind == "resume":
            resumes.append(float(row.get("step", 0)))
        if kind not in kept:
            continue
        series = kept[kind]
        while series and series[-1].get("step", 0) >= row.get("step", 0):
            series.pop()
        series.append(row)
    return kept, resumes
