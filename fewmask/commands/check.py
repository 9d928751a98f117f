"""`fewmask check`: say what is wrong with the data before an hour is spent on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewmask.data.audit import Audit, Finding, audit
from fewmask.data.audit import Progress as Counter
from fewmask.data.manifest import load_cases, skipped_files, unlisted_pictures
from fewmask.data.sources import SOURCES
from fewmask.registry import choose
from fewmask.types import Case, UserError

SHOWN = 20  # findings of a kind
FILES_SHOWN = 4  # of a note
_STYLES = {"errors": "bold red", "warnings": "yellow", "notes": "dim"}
_SINGULAR = {"errors": "error", "warnings": "warning", "notes": "note"}


def check(
    data: Path,
    manifest: str | None,
    unlabelled: Sequence[Path],
    as_json: bool,
    source: str | None = None,
    out: Path | None = None,
) -> int:
    """Audit a data folder and print what was found: 1 when something must be mended, else 0.

    With `source`, the name of a public set, `data` is its download: it is imported into `out`, and `out` is audited.
    With `as_json` the audit alone goes to standard output. Raises UserError for a source without an `out` or unknown.
    """
    if (source is None) != (out is None):
        raise UserError(
            "--source NAME and --out FOLDER go together: one says what DATA is, the other where to import it."
        )
    if source is not None and out is not None:
        importer = choose(SOURCES, source, "source")
        data = importer(data, out)
    found = _audit(data, manifest, unlabelled)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print(found, data)
    return 1 if found.errors else 0


def _audit(data: Path, manifest: str | None, unlabelled: Sequence[Path]) -> Audit:
    """Return the audit; what keeps the cases from being listed at all is all its errors, one for each line of it."""
    try:
        cases = load_cases(data, None if manifest is None else Path(manifest), unlabelled)
    except UserError as error:
        return Audit(errors=[Finding("data", (), line) for line in str(error).splitlines()])
    with _progress() as on_progress:
        found = audit(cases, on_progress=on_progress)
    found.notes += _left_out(data, cases)
    return found


def _left_out(data: Path, cases: Sequence[Case]) -> list[Finding]:
    """Return notes on the files of the folder that are not part of the data set."""
    notes = []
    for code, files, text in (
        ("not-listed", unlisted_pictures(data, cases), "among the images and masks not named by the manifest"),
        ("not-pictures", skipped_files(data), "among the images and masks no picture"),
    ):
        if files:
            shown = ", ".join(f"'{file.relative_to(data).as_posix()}'" for file in files[:FILES_SHOWN])
            more = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
            count = f"{len(files)} files are" if len(files) > 1 else "1 file is"
            names = tuple(file.relative_to(data).as_posix() for file in files)
            notes.append(Finding(code, names, f"{count} {text} ({shown}{more}): left out."))
    return notes


@contextmanager
def _progress() -> Iterator[Counter | None]:
    """Show a bar on standard error where that is a terminal, nothing elsewhere: an audit takes seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("check"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("check")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(found: Audit, data: Path) -> None:
    """Print counts and findings: a table and colours on a terminal, plain lines elsewhere."""
    console = Console(soft_wrap=True, highlight=False)
    rows = _rows(found.counts) if found.counts else []
    if console.is_terminal:
        table = Table(title=str(data), show_header=False)
        for key, value in rows:
            table.add_row(key, escape(value))
        if rows:
            console.print(table)
    else:
        for key, value in rows:
            sys.stdout.write(f"{key}: {value}\n")
    for kind, style in _STYLES.items():
        findings: list[Finding] = getattr(found, kind)
        for finding in findings[:SHOWN]:
            console.print(f"[{style}]{_SINGULAR[kind]}[/]: {escape(finding.message)}")
        if len(findings) > SHOWN:
            console.print(f"[{style}]{_SINGULAR[kind]}[/]: and {len(findings) - SHOWN} more (--json lists all)")
    console.print(_verdict(found))


def _verdict(found: Audit) -> str:
    if found.errors:
        count = f"{len(found.errors)} errors" if len(found.errors) > 1 else "1 error"
        return f"{count}: mend what is listed above, then run the same command again."
    if found.warnings:
        return (
            f"No errors; look at the {len(found.warnings)} warnings above."
            if len(found.warnings) > 1
            else ("No errors; look at the warning above.")
        )
    return "No errors."


def _rows(counts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was counted as (title, text)."""
    rows = [
        ("images", f"{counts['num_images']} ({counts['num_masks']} with a mask, {counts['num_unlabelled']} without)"),
        ("patients or lesions", str(counts["num_groups"])),
    ]
    for split, number in counts["splits"].items():
        rows.append((f"split {split or '(none)'}", f"{number['num_images']} images, {number['num_masks']} masks"))
    labels = ", ".join(f"{label or '(none)'} {number}" for label, number in counts["labels"].items())
    rows.append(("labels", labels))
    if counts["height"]:
        height, width = counts["height"], counts["width"]
        sizes = " / ".join(f"{width[key]} x {height[key]}" for key in ("min", "median", "max"))
        rows.append(("width x height, least / median / greatest", sizes))
    if counts["mask_fraction"]:
        shares = counts["mask_fraction"]
        text = " / ".join(f"{100 * shares[key]:.1f} %" for key in ("0.05", "0.5", "0.95"))
        rows.append(("foreground, 5 % / median / 95 %", text))
    return rows
