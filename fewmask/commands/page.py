"""A measured table as a page of Markdown and as a picture, from `table.json`'s values alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewmask.report.plot import forest, standalone

PICTURE = "table.svg"
SETS = ("test", "unseen")
METRIC_TITLES = {"dice": "Dice", "boundary_iou": "boundary IoU", "dice_positives": "Dice, lesions", "hd95_256": "HD95"}
IN_PIXELS = ("hd95_256",)
APART_TITLES = {
    "dice_positives": "Dice, lesions (95 %)",
    "detection_sensitivity": "found (95 %)",
    "detection_specificity": "left empty (95 %)",
}
"""Where some images have no lesion: see `table.describe_cell`."""
Found = Mapping[str, Any]


def markdown(table: Found) -> str:
    """Return the table as a page of Markdown."""
    lines = [f"# {table['title']}", "", f"Measured with the budget `{table['budget']}`."]
    if _gains(table):
        lines += ["", f"![Dice of each row against {table['control']}, with intervals]({PICTURE})"]
    for name in SETS:
        lines += _rows_text(table, name)
    for metric in dict.fromkeys(found["metric"] for found in table["differences"]):
        lines += _differences_text(metric, [found for found in table["differences"] if found["metric"] == metric])
    lines += _networks_text(table["networks"])
    lines += _costs_text(table["costs"])
    lines += _trainings_text("Pre-training", table["pretraining"])
    first = [done for done in table["distillation"] if done["seed"] == 0]
    lines += _trainings_text("Distillation, first seed", first)
    lines += _images_text(table)
    lines += _losses_text(table["losses"])
    for title, texts in (("Differences from the paper's setting", "deviations"), ("How to read this", "statements")):
        lines += ["", f"## {title}", "", *(f"- {text}" for text in table[texts])]
    return "\n".join(lines) + "\n"


def picture(table: Found) -> str | None:
    """Return an SVG of what each row gains on the control's Dice of the test images, the highest first.

    A column a share of the masks, differences in points with their intervals. None where there is nothing to compare.
    """
    gains = _gains(table)
    if not gains:
        return None
    values: dict[str, list[float]] = {}
    for found in gains.values():
        for name, (_, value, _) in found.items():
            values.setdefault(name, []).append(value)
    names = sorted(values, key=lambda name: -sum(values[name]) / len(values[name]))
    label = f"Dice against {table['control']}, points (95 %)"
    panels = [(f"{_percent(fraction)} of the masks", found) for fraction, found in gains.items()]
    return standalone(forest(f"{table['title']}: {label}", names, panels, label))


def write_page(folder: Path, table: Found) -> None:
    """Write table.md and, where rows can be compared, table.svg, each in one step."""
    for name, text in (("table.md", markdown(table)), (PICTURE, picture(table))):
        if text is not None:
            temporary = folder / f".{name}.{os.getpid()}.tmp"  # several processes may share a table
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(folder / name)


def _gains(table: Found) -> dict[float, dict[str, tuple[float, float, float]]]:
    """Return each row's difference to the control in points, as (low, value, high), by share of the masks."""
    gains: dict[float, dict[str, tuple[float, float, float]]] = {}
    for found in table["differences"]:
        about = (found["set"], found["metric"], found["against"])
        if about == ("test", "dice", table["control"]) and found["low"] is not None:
            three = (100 * found["low"], 100 * found["difference"], 100 * found["high"])
            gains.setdefault(found["fraction"], {})[found["row"]] = three
    return gains


def _rows_text(table: Found, name: str) -> list[str]:
    rows = [row for row in table["rows"] if row["set"] == name]
    if not rows and (name != "test" or not table["not_run"]):
        return []
    title = "Test images" if name == "test" else f"Unseen data: {table['unseen'].get('name', 'unseen')}"
    columns = _columns(table, any(metric in row for row in rows for metric in APART_TITLES))
    lines = ["", f"## {title}" + (f" ({rows[0]['num_cases']})" if rows else ""), "", *_head(columns)]
    lines += [_line([_cell(row, column) for column in columns]) for row in rows]
    if name == "test":
        blank = " |" * (len(columns) - 2)
        lines += [f"| {row} | not run: {reason} |{blank}" for row, reason in table["not_run"].items()]
    return lines


def _columns(table: Found, some_empty: bool) -> list[str]:
    """Return the titles of the columns; those of the paper's figures only where it gives any."""
    apart = list(APART_TITLES.values()) if some_empty else []
    paper = ["paper"] if table["published"] else []
    named = [f"{METRIC_TITLES[metric]} (95 %)" for metric in table["columns"]]
    return [
        "row", "masks", "seeds", "Dice (95 %)", "Dice 256", *(f"{text} Dice" for text in paper), "IoU (95 %)",
        "IoU 256", *(f"{text} IoU" for text in paper), "HD95 256, px", *(f"{text} HD95" for text in paper), *named,
        *apart, "missed",
    ]  # fmt: skip


def _cell(row: Found, column: str) -> str:
    """Return what stands in a row under a column's title."""
    theirs = row["paper"] or {}
    shown = {
        "row": row["row"],
        "masks": _masks(row),
        "seeds": str(len(row["seeds"])),
        "Dice (95 %)": _figure(row["dice"]),
        "Dice 256": _mean(row["dice_256"]),
        "IoU (95 %)": _figure(row["iou"]),
        "IoU 256": _mean(row["iou_256"]),
        "HD95 256, px": f"{row['hd95_256']['mean']:.1f}",
        "missed": f"{row['missed']:.1f}",
        **{f"paper {METRIC}": str(theirs.get(METRIC.lower(), "")) for METRIC in ("Dice", "IoU", "HD95")},
    }
    if column in shown:
        return shown[column]
    titles = {**APART_TITLES, **{metric: f"{title} (95 %)" for metric, title in METRIC_TITLES.items()}}
    metric = next(metric for metric, title in titles.items() if column == title)
    return _figure(row[metric])


def _differences_text(metric: str, differences: Sequence[Found]) -> list[str]:
    unit, factor = ("pixels at 256x256: less is better", 1) if metric in IN_PIXELS else ("points", 100)
    lines = ["", f"## Paired differences of {METRIC_TITLES.get(metric, metric)}, {unit}", ""]
    lines += _head(["set", "row", "against", "masks", "difference (95 %)", "p"])
    for found in differences:
        between = "" if found["low"] is None else f" ({factor * found['low']:+.2f} to {factor * found['high']:+.2f})"
        difference = f"{factor * found['difference']:+.2f}{between}"
        share, p = _percent(found["fraction"]), f"{found['p_value']:.2g}"
        lines.append(_line([found["set"], found["row"], found["against"], share, difference, p]))
    return lines


def _networks_text(networks: Sequence[Found]) -> list[str]:
    if not networks:
        return []
    titles = ["network", "masks", "trained", "validation Dice", "chosen", "seconds"]
    lines = ["", "## Single networks, and which of the candidates were chosen", "", *_head(titles)]
    for name, fraction in dict.fromkeys((found["network"], found["fraction"]) for found in networks):
        same = [found for found in networks if (found["network"], found["fraction"]) == (name, fraction)]
        validation, seconds = (sum(found[key] for found in same) / len(same) for key in ("validation", "seconds"))
        chosen = sum(found["chosen"] for found in same)
        lines.append(_line([
            name, _percent(fraction), len(same), f"{100 * validation:.2f}", chosen or "", f"{seconds:.0f}",
        ]))  # fmt: skip
    return lines


def _costs_text(costs: Mapping[str, Found]) -> list[str]:
    if not costs:
        return []
    lines = ["", "## Size and speed", "", *_head([
        "", "networks", "input", "parameters, M", "GMac", "GMac at 256x256", "ONNX, MB",
        "ms, network, one thread", "ms, a 256x256 photo, one thread",
    ])]  # fmt: skip
    for name, cost in costs.items():
        common = "" if cost["gmacs_256"] is None else f"{cost['gmacs_256']:.3f}"
        counted = [f"{cost['num_parameters'] / 1e6:.3f}", f"{cost['gmacs']:.3f}", common, f"{cost['megabytes']:.2f}"]
        timed = [f"{cost['ms_network']:.2f}", f"{cost['ms']:.2f}"]
        lines.append(_line([name, cost["num_networks"], cost["size"], *counted, *timed]))
    return lines


def _trainings_text(title: str, trainings: Sequence[Found]) -> list[str]:
    if not trainings:
        return []
    shares = ["masks"] if "fraction" in trainings[0] else []
    titles = ["row", *shares, "seed", "images", "batch", "lr", "epochs", "steps", "seconds", "device"]
    lines = ["", f"## {title}", "", *_head(titles)]
    for done in trainings:
        share = [_percent(done["fraction"])] if shares else []
        lines.append(_line([
            done["row"], *share, done["seed"], done["num_images"], done["batch_size"], f"{done['lr']:.3g}",
            f"{done['epochs']:g}", done["steps"], f"{done['seconds']:.0f}", f"{done['device']}, {done['precision']}",
        ]))  # fmt: skip
    return lines


def _images_text(table: Found) -> list[str]:
    lines: list[str] = []
    if (out := table["excluded"]) is not None:
        where = "pre-training" if table["pretraining"] else "the images without a mask"
        lines += [
            "",
            f"Kept out of {where}: {out['test']} test images, {out['near_duplicates']} copies of one, "
            f"{out['same_group']} of the same patient or lesion{_validation(out)}.",
        ]
    if (pairs := table["duplicates"]) is not None:
        lines += [
            "",
            f"Copies among all images: {pairs['pairs']} pairs, {pairs['within_test']} of them within the test images, "
            f"{pairs['test_and_trained_on']} of a test image and one with a mask in another split (left as published).",
        ]
    return lines


def _validation(out: Found) -> str:
    """Return how many validation images were kept out; runs of earlier versions do not say."""
    return f", and {out['validation']} validation images" if "validation" in out else ""


def _losses_text(losses: Mapping[str, Mapping[str, Found]]) -> list[str]:
    if not losses:
        return []
    lines = ["", "## Losses beside the supervised one", "", *_head(["row", "losses"])]
    for row, named in losses.items():
        told = [f"{name} ({', '.join(f'{key} {value}' for key, value in of.items())})" for name, of in named.items()]
        lines.append(_line([row, "; ".join(told) or "none"]))
    return lines


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(texts: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, texts))} |"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _masks(row: Found) -> str:
    """Return a row's share of the masks, and how many these are where that is known."""
    if not row["num_masks"]:
        return _percent(row["fraction"])
    few, many = row["num_masks"][0], row["num_masks"][-1]
    return f"{_percent(row['fraction'])} ({few if few == many else f'{few} to {many}'})"


def _mean(figure: Found) -> str:
    return f"{100 * figure['mean']:.2f}"


def _figure(figure: Found) -> str:
    between = "" if figure["low"] is None else f" ({100 * figure['low']:.2f} to {100 * figure['high']:.2f})"
    return f"{_mean(figure)}{between}"
