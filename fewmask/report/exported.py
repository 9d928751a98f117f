"""The exported file: what it weighs, what it costs to run, and how long it took."""

from __future__ import annotations

from typing import Any

from fewmask.report.reading import Record
from fewmask.report.wording import NONE, count, fixed, number, parameters


def exported(record: Record) -> dict[str, Any] | None:
    """Return the facts of the exported file and a row for each measured latency, or None where there are neither."""
    export = record.export or {}
    side = count(export.get("size"))
    facts = [
        ("Parameters", parameters(export.get("num_parameters"))),
        ("Network input", NONE if side == NONE else f"{side} × {side}"),
        ("GMac at that size", _gmacs(export.get("gmacs"))),
        ("GMac at 256 × 256", _gmacs(export.get("gmacs_256"))),
    ]
    latency = export.get("latency")
    rows = [_row(row) for row in latency if isinstance(row, dict)] if isinstance(latency, list) else []
    facts = [fact for fact in facts if fact[1] != NONE]
    return {"facts": facts, "rows": [row for row in rows if row["p50"] != NONE]} if facts or rows else None


def _gmacs(value: Any) -> str:
    found = number(value)
    if found is None:
        return NONE
    return fixed(found, 2) if found >= 0.1 else f"{found:.2g}"


def _row(row: dict[str, Any]) -> dict[str, str]:
    what = "Network alone" if row.get("network_only") else "Photo to mask"
    return {
        "name": f"{what}, {count(row.get('width'))} × {count(row.get('height'))}",
        "threads": count(row.get("threads")),
        "p50": fixed(row.get("p50_ms"), 1),
        "p95": fixed(row.get("p95_ms"), 1),
    }
