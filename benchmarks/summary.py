"""Write the README's results and pictures from the JSON files under `benchmarks/results`.

python -m benchmarks.summary
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fewmask.commands.page import picture

HERE = Path(__file__).resolve().parent
DISTILL = "kd-sharp+pseudo"  # what `fewmask distill` does
# Its gain, and those of the paper's method with a tenth of its weight and at weight 1.
LOSSES = {DISTILL: "`distill`", "m2bf-light": "M2BF at a tenth", "m2bf": "M2BF"}
CONTINUED = ("simmim", "dino", "g2ll", "tedmae", "figure")
PICTURES = {"losses_tiny_180_masks": "alone", "g2ll_table1_pretrainings": "random"}  # what their rows are compared with
BEGIN, END = "<!-- {}: made by benchmarks/summary.py -->", "<!-- end of {} -->"


def figure(value: dict[str, Any], digits: int = 3) -> str:
    """Return a mean and its interval."""
    return f"{value['mean']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def row(name: str, test: dict[str, Any], more: str) -> str:
    """Return one line of the table."""
    return f"| {name} | {figure(test['dice'])} | {figure(test['hd95_256'], 1)} | {test['missed']} | {more} |"


def rows() -> list[str]:
    """Return a line for each measured run there is."""
    lines = []
    for path in sorted((HERE / "results").glob("plain_unet_*.json")):
        result = json.loads(path.read_text())
        for side, name in (("plain", "plain U-Net script"), ("ours", "`fewmask finetune unet`")):
            facts = result["sides"][side]
            label = f"{name}, {result['minutes']:g} min, {100 * result['fraction']:g} % of the labels"
            told = "; ".join([f"{facts['images_per_s']:.1f} images/s", *filter(None, [facts.get("remark")])])
            lines.append(row(label, facts["test"], told))
    for path in sorted((HERE / "results").glob("run_*.json")):
        result = json.loads(path.read_text())
        lines.append(row(result["name"], result["metrics"]["test"], result["note"]))
    return lines


def by_share(pattern: str, cells: str) -> list[dict[str, Any]]:
    """Return the results of a pattern, those of the fewest masks first; `cells` is the key of their figures."""
    found = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob(pattern))]
    return sorted(found, key=lambda result: min(cell["fraction"] for cell in result[cells]))


def runs() -> list[str]:
    """Return the table of whole runs."""
    return [
        "| 529 of 600 ISIC-2017 test images, centre-cropped | Dice (95 % interval) | HD95, px at 256x256 | missed | |",
        "|---|---|---|---|---|",
        *rows(),
    ]


def students() -> list[str]:
    """Return what a teacher brings: a line for each student, data set and share of the masks that was measured."""
    heads = (
        "student",
        "data",
        "masks",
        "teacher",
        "alone",
        "`distill`",
        *(f"{name}, points" for name in LOSSES.values()),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tables: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for found in [*by_share("distillation_*.json", "rows"), *by_share("losses_*.json", "rows")]:
        for fraction in sorted({cell["fraction"] for cell in found["rows"]}):
            key = (found["student"], found.get("protocol", "ISIC-2017"), fraction)
            tables.setdefault(key, []).append(found)
    for (student, protocol, fraction), measured in sorted(tables.items()):
        # Gains are paired within a table; Dice is that of the table in which `distill` stands, else of the first.
        first = max(measured, key=lambda table: bool(gain(table, DISTILL, fraction, "alone")))
        dice = [dice_of(first, row, fraction) for row in ("teacher", "alone", DISTILL)]
        gains = [next(filter(None, (gain(t, row, fraction, "alone") for t in measured)), "") for row in LOSSES]
        lines.append(f"| {' | '.join([student, protocol, f'{100 * fraction:g} %', *dice, *gains])} |")
    return lines


def dice_of(found: dict[str, Any], row: str, fraction: float) -> str:
    """Return a cell's mean Dice on the test images, or nothing."""
    for cell in found["rows"]:
        if (cell["set"], cell["row"], cell["fraction"]) == ("test", row, fraction):
            return f"{cell['dice']['mean']:.3f}"
    return ""


def continued() -> list[str]:
    """Return what continued pre-training brings, by the recipes as they ship; their variants stand on the page.

    A cell with a remark, which says that its method has changed since, is left out where the same was measured anew.
    """
    heads = ("data", "masks", "fine-tuning", "pre-training", "without", "with (95 %)", "gain, points", "HD95, px")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tables = by_share("continued_*.json", "cells")

    def key(found: dict[str, Any], cell: dict[str, Any]) -> tuple:
        return found.get("protocol", "ISIC-2017"), bool(found.get("script_steps")), cell["arm"], cell["fraction"]

    def remark(found: dict[str, Any], cell: dict[str, Any]) -> str:
        return found.get("remarks", {}).get(cell["arm"], "")

    anew = {key(found, cell) for found in tables for cell in found["cells"] if not remark(found, cell)}
    for found in sorted(
        tables,
        key=lambda found: (
            "script_steps" in found and bool(found["script_steps"]),
            found.get("protocol", "ISIC-2017") != "ISIC-2017",
        ),
    ):
        for part, script in ((found, "plain script"), (found.get("stops", {}), "plain script, last five stops")):
            cells = sorted(part.get("cells", ()), key=lambda cell: cell["fraction"])
            for cell in cells:
                if cell["arm"] not in CONTINUED or (remark(found, cell) and key(found, cell) in anew):
                    continue
                line = continued_line(found, part, cell, script if found.get("script_steps") else "fewmask")
                lines.append(f"| {' | '.join(line)} |")
    return lines


def continued_line(found: dict[str, Any], part: dict[str, Any], cell: dict[str, Any], tuned: str) -> list[str]:
    """Return the entries of a cell's line: those of all pre-trainings of its kind, where there are several."""
    name, share = cell["arm"], cell["fraction"]
    (control,) = (other for other in part["cells"] if (other["arm"], other["fraction"]) == ("none", share))
    (paired,) = (d for d in part["differences"] if (d["arm"], d["fraction"]) == (name, share))
    if not len(paired["seeds"]) == len(cell["dice"]["per_seed"]) == len(control["dice"]["per_seed"]):
        raise SystemExit(f"{name} at {share:g}: not of the same seeds as the control; finish both first.")
    facts = found["pretraining"][name]
    arm = f"{name}, {(facts['budget'] or facts['seconds']) / 60:.0f} min"
    for together in part.get("pooled", ()):
        if (together["arms"][0], together["fraction"]) == (name, share):
            cell, paired = together, together["difference"]
            arm += f", {len(together['arms'])} pre-trainings"
    if said := found.get("remarks", {}).get(name):
        arm += f" ({said})"
    gained = f"{100 * paired['difference']:+.1f} ({100 * paired['low']:+.1f} to {100 * paired['high']:+.1f})"
    return [
        found.get("protocol", "ISIC-2017"), f"{100 * share:g} %", tuned, arm, f"{control['dice']['mean']:.3f}",
        figure(cell["dice"]), gained, f"{cell['hd95_256']['mean']:.1f}",
    ]  # fmt: skip


def gain(found: dict[str, Any], row: str, fraction: float, against: str, data: str = "test") -> str:
    """Return the paired difference of a cell's Dice on a set to another row, in points, or nothing."""
    for paired in found["differences"]:
        if (paired["set"], paired["row"], paired["fraction"], paired["against"]) == (data, row, fraction, against):
            return f"{100 * paired['difference']:+.1f} ({100 * paired['low']:+.1f} to {100 * paired['high']:+.1f})"
    return ""


TABLE1 = ("g2ll_table1_pretrainings", "g2ll_table1_every_mask")
"""Three pre-trainings a row, fine-tuned on 1 and 10 % of the masks; the first of each, for more steps on all."""


def pretrained() -> list[str]:
    """Return G2LL's table 1: Dice by share of the masks, and what a row gains over no pre-training and over MAE."""
    few, every = (json.loads((HERE / "results" / f"{name}.json").read_text()) for name in TABLE1)
    found = {**few, **{key: few[key] + every[key] for key in ("rows", "differences")}}
    dice = {(c["row"], c["fraction"]): c["dice"]["mean"] for c in found["rows"] if c["set"] == "test"}
    fractions = sorted({fraction for _, fraction in dice})
    shares = [f"{100 * fraction:g} %" for fraction in fractions]
    rivals = ("random", "mae")
    heads = ["pre-training", "epochs", *shares, *(f"{share}, against {rival}" for rival in rivals for share in shares)]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|" + "---|" * (len(heads) - 2)]
    for row in dict.fromkeys(row for row, _ in dice):
        figures = [f"{dice[row, fraction]:.3f}" for fraction in fractions]
        gains = [gain(found, row, fraction, rival) for rival in rivals for fraction in fractions]
        lines.append(f"| {' | '.join([row, epochs_of(found, row), *figures, *gains])} |")
    return lines


def epochs_of(found: dict[str, Any], row: str) -> str:
    """Return the epochs of a row's pre-trainings, on average, or nothing."""
    epochs = [facts["epochs"] for facts in found["pretraining"] if facts["row"] == row]
    return f"{statistics.fmean(epochs):.1f}" if epochs else ""


DATA = {"two_stage_isic_18": "ISIC-2017, 18 masks", "two_stage_isic": "180 masks", "two_stage_cxr": "lungs, 7 masks"}
SHOWN = (
    "plain", "plain-longer", "best-single", "uniform", "pcgrad", "five-seeds-ensemble", "five-seeds-distilled",
    "ensemble", "distilled",
)  # fmt: skip


def two_stage() -> list[str]:
    """Return the two-stage tables beside each other: Dice of each row, and its difference to plain training."""
    found = {
        name: json.loads(path.read_text()) for name in DATA if (path := HERE / "results" / f"{name}.json").exists()
    }
    heads = ["row", *(f"{DATA[name]}, {what}" for name in found for what in ("Dice", "against plain, points"))]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    cells = {
        name: {cell["row"]: cell for cell in table["rows"] if cell["set"] == "test"} for name, table in found.items()
    }
    for row in SHOWN:
        figures: list[str] = []
        for name, table in found.items():
            cell = cells[name].get(row)
            figures += (
                [f"{cell['dice']['mean']:.3f}", gain(table, row, cell["fraction"], "plain")] if cell else ["", ""]
            )
        lines.append(f"| {' | '.join([row, *figures])} |")
    return lines


def draw() -> None:
    """Draw what the rows of a table that have all its seeds gain, beside the pages."""
    for name, control in PICTURES.items():
        table = json.loads((HERE / "results" / f"{name}.json").read_text())
        num_seeds = max(len(found["seeds"]) for found in table["differences"])
        whole = [found for found in table["differences"] if len(found["seeds"]) == num_seeds]
        drawn = picture({**table, "differences": whole, "control": control})
        if drawn is not None:
            (HERE / f"{name}.svg").write_text(drawn)


def main() -> None:
    """Replace what stands between each pair of markers in the README, and draw the pictures."""
    draw()
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    tables = {
        "results": runs,
        "pretrained": pretrained,
        "students": students,
        "continued": continued,
        "two-stage": two_stage,
    }
    for name, make in tables.items():
        made = make()
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + "\n" + "\n".join(made) + "\n" + end + after
    readme.write_text(text)


if __name__ == "__main__":
    main()
