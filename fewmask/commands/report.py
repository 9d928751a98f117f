"""`fewmask report`: one page of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path


def report(runs: list[Path], out: Path) -> int:
    """Write the report and say where it is; returns the exit code. Raises UserError for what is no run."""
    # Imported here, since drawing needs scikit-image and the command line should start at once.
    from fewmask.report.build import build_report

    path = build_report(runs, out)
    print(f"Report: {path}")
    return 0
