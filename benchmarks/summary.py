"""Write the README's results from the JSON files under `benchmarks/results`: `python benchmarks/summary.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: made by benchmarks/summary.py -->", "<!-- end of results -->"


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
            lines.append(row(label, facts["test"], f"{facts['images_per_s']:.1f} images/s"))
    for path in sorted((HERE / "results").glob("run_*.json")):
        result = json.loads(path.read_text())
        lines.append(row(result["name"], result["metrics"]["test"], result["note"]))
    return lines


def main() -> None:
    """Replace what stands between the two markers in the README."""
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    table = [
        "| 529 of 600 ISIC-2017 test images, centre-cropped | Dice (95 % interval) | HD95, px at 256x256 | missed | |",
        "|---|---|---|---|---|",
        *rows(),
    ]
    readme.write_text(before + BEGIN + "\n" + "\n".join(table) + "\n" + END + after)


if __name__ == "__main__":
    main()
