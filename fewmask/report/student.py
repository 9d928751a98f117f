"""A distilled student beside its teacher: what the smaller file costs, and what it saves."""

from __future__ import annotations

from functools import partial
from typing import Any

from fewmask.report.reading import Record
from fewmask.report.wording import NONE, fixed, number, parameters, split_name

ROWS = (
    ("num_parameters", "Parameters", parameters),
    ("gmacs", "GMac at its own size", lambda value: _short(value)),
    ("megabytes", "File, MB", lambda value: fixed(value, 2)),
    ("ms", "Photo of 256 × 256, one thread, ms", lambda value: fixed(value, 1)),
)
SCORES = (("dice", "Dice", 3), ("hd95_256", "HD95 at 256 × 256, px", 1))


def student(record: Record) -> dict[str, Any] | None:
    """Return a sentence and a table of teacher against student, or None for a run that distilled nothing."""
    found = record.distilled
    if found is None:
        return None
    teacher, own = _part(found, "teacher"), _part(found, "student")
    rows = [_row(label, teacher.get(key), own.get(key), shown) for key, label, shown in ROWS]
    splits = _part(found, "splits")
    for split in sorted(splits, key=lambda name: name != "test"):
        figures = splits[split]
        for key, label, digits in SCORES:
            first, second = (_part(figures, side).get(key) for side in ("teacher", "student"))
            shown = partial(fixed, digits=digits)
            rows.append(_row(f"{label}, {split_name(split).lower()}", first, second, shown))
    known = [row for row in rows if NONE not in (row["teacher"], row["student"])]
    return {"sentence": _sentence(splits), "rows": known}


def _row(label: str, teacher: Any, own: Any, shown: Any) -> dict[str, str]:
    first, second = number(teacher), number(own)
    times = f"{second / first:.2g} ×" if first and second is not None else NONE
    return {"label": label, "teacher": shown(teacher), "student": shown(own), "ratio": times}


def _sentence(splits: dict[str, Any]) -> str:
    name = "test" if "test" in splits else next(iter(splits), None)
    if name is None or number(splits[name].get("difference")) is None:
        return "The small network was not scored beside the large one."
    figures = splits[name]
    points = 100 * figures["difference"]
    verb = "gains" if points > 0 else "loses"
    low, high = number(figures.get("low")), number(figures.get("high"))
    if low is None or high is None:
        return f"On the {split_name(name).lower()} images the small network {verb} {abs(points):.1f} points of Dice."
    sure = "" if low > 0 or high < 0 else "; the interval holds zero, so the sign is not certain"
    return (
        f"On the {split_name(name).lower()} images the small network {verb} {abs(points):.1f} points of Dice against "
        f"the large one (95 % interval {100 * low:+.1f} to {100 * high:+.1f}{sure})."
    )


def _short(value: Any) -> str:
    found = number(value)
    return NONE if found is None else fixed(found, 2) if found >= 0.1 else f"{found:.2g}"


def _part(mapping: Any, key: str) -> dict[str, Any]:
    part = mapping.get(key) if isinstance(mapping, dict) else None
    return part if isinstance(part, dict) else {}
