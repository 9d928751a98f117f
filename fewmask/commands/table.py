"""A paper's table from the runs of its grid: figures with intervals, differences, and what differs from the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewmask.commands.grid import REFERENCES, Order, cells, scored
from fewmask.commands.papers import PAPERS, Paper, deviations
from fewmask.config import Recipe
from fewmask.engine.run import read_json
from fewmask.evaluate.results import Row
from fewmask.evaluate.score import compare, read_case_csv
from fewmask.evaluate.statistics import METRICS, bootstrap_means, group_indices, interval, pair_rows

SHOWN = ("dice", "iou", "dice_256", "iou_256", "hd95_256")
NUM_BOOTSTRAP = 2000
SETS = ("test", "unseen")
COLUMNS = (
    "row", "masks", "seeds", "Dice (95 %)", "Dice 256", "paper", "IoU (95 %)", "IoU 256", "paper", "HD95 256, px",
    "paper", "missed",
)  # fmt: skip
BySeed = dict[int, list[Row]]

STATEMENTS = (
    "Figures are means over images and seeds, at the masks' own size but for those marked 256 (at 256x256 pixels). "
    "HD95 counts a lesion without any predicted pixel as the image's diagonal.",
    "Intervals hold 95 % of 2,000 bootstrap replicates in which the seeds and the patients (or lesions; images where "
    "neither is known) are drawn with replacement.",
    "Differences are of Dice, image by image, averaged over the seeds that both rows have; their intervals are "
    "bootstrapped over patients alone, and p-values come from random changes of sign by patient, not corrected for "
    "their number.",
    "The clock of a training starts after the data are decoded and the superpixels made, once for all runs.",
)


@dataclass(frozen=True)
class Scene:
    """What is known of the data before anything is trained, for the table to tell.

    `splits` gives each case's split by name, for the images with a mask; `unseen` facts of the unseen data set;
    `left_out` says why a row is not run; `fingerprints` tell these data from others.
    """

    splits: Mapping[str, str]
    unseen: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)


def measure(order: Order, scene: Scene, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return the table of what is finished so far, ready for JSON."""
    paper = PAPERS[order.table]
    rows, differences = [], []
    for name in SETS:
        results = _results(order, name, left_out)
        for (row, fraction), by_seed in results.items():
            theirs = paper.figures.get(name, {}).get(row, {}).get(fraction)
            cell = describe_cell(by_seed)
            rows.append({"set": name, "row": row, "fraction": fraction, **cell, "paper": theirs})
        differences += [{"set": name, **found} for found in _differences(order.table, results)]
    trainings = _trainings(order, left_out)
    return {
        "table": order.table, "title": paper.title, "budget": order.budget,
        "rows": rows, "differences": differences, "not_run": dict(left_out), "pretraining": trainings,
        "unseen": dict(scene.unseen), "excluded": trainings[0]["excluded"] if trainings else None,
        "duplicates": _duplicates(order, scene), "deviations": _all_deviations(order, scene, trainings, left_out),
        "statements": list(STATEMENTS),
    }  # fmt: skip


def describe_cell(by_seed: BySeed) -> dict[str, Any]:
    """Return the figures of one cell from its rows per seed, ready for JSON.

    Each metric has "mean", "low" and "high" (None with one patient) and "per_seed". The interval is that of the mean
    over cases and seeds when groups and seeds are drawn with replacement. "missed" is a mean over the seeds.
    """
    tables = _aligned(list(by_seed.values()))
    groups, figures = group_indices(tables[0]), {}
    for metric in SHOWN:
        values = np.array([[row[metric] for row in rows] for rows in tables], dtype=float).T
        rng = np.random.default_rng(0)
        replicates = bootstrap_means(values, groups, NUM_BOOTSTRAP, rng)
        drawn = rng.integers(0, len(tables), replicates.shape)
        low, high = None, None
        if groups.max() > 0:
            low, high = interval(np.take_along_axis(replicates, drawn, axis=1).mean(axis=1))
        means = np.nanmean(values, axis=0)
        figures[metric] = {"mean": float(means.mean()), "low": low, "high": high, "per_seed": means.tolist()}
    missed = float(np.mean([sum(bool(row["missed"]) for row in rows) for rows in tables]))
    sizes = {"num_cases": len(tables[0]), "num_groups": int(groups.max()) + 1}
    return {"seeds": list(by_seed), **sizes, "missed": missed, **figures}


def average_seeds(by_seed: BySeed, seeds: Sequence[int]) -> list[Row]:
    """Return one row per case whose metrics are means over the seeds."""
    tables = _aligned([by_seed[seed] for seed in seeds])
    return [
        {**same[0], **{metric: float(np.mean([row[metric] for row in same])) for metric in METRICS}}
        for same in zip(*tables, strict=True)
    ]


def _aligned(tables: list[list[Row]]) -> list[list[Row]]:
    """Return the tables with their rows by name, or raise a UserError where they are not of the same cases."""
    for other in tables[1:]:
        pair_rows(tables[0], other)
    return [sorted(rows, key=lambda row: row["name"]) for rows in tables]


def _results(order: Order, name: str, left_out: Mapping[str, str]) -> dict[tuple[str, float], BySeed]:
    """Return the rows per seed of every cell that is finished, in the table's order."""
    found: dict[tuple[str, float], BySeed] = {(row, fraction): {} for row in order.rows for fraction in order.fractions}
    for row, fraction, seed in cells(order, left_out):
        folder = order.finetuning(row, fraction, seed)
        if name in scored(folder):
            found[row, fraction][seed] = read_case_csv(folder / f"cases_{name}.csv")
    return {cell: by_seed for cell, by_seed in found.items() if by_seed}


def _differences(table: str, results: Mapping[tuple[str, float], BySeed]) -> Iterator[dict[str, Any]]:
    for (row, fraction), by_seed in results.items():
        for reference in REFERENCES[table]:
            against = results.get((reference, fraction), {})
            seeds = sorted(by_seed.keys() & against.keys())
            if row != reference and row != "random" and seeds:
                found = compare(average_seeds(by_seed, seeds), average_seeds(against, seeds))
                yield {"row": row, "against": reference, "fraction": fraction, "seeds": seeds, **found}


def _trainings(order: Order, left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the finished pre-trainings did."""
    found = []
    for row in order.rows:
        for seed in range(order.grid.pretrain_seeds):
            path = order.pretraining(row, seed) / "pretrain" / "stage.json"
            if row not in left_out and path.exists():
                facts = read_json(path)
                keys = ("epochs", "steps", "seconds", "num_images", "batch_size", "device", "precision", "excluded")
                lr = facts["settings"]["lr"]
                found.append({"row": row, "seed": seed, "lr": lr, **{key: facts[key] for key in keys}})
    return found


def _duplicates(order: Order, scene: Scene) -> dict[str, int] | None:
    """Return how many pairs of copies the audit found: in all, within test, and of a test and a trained-on image."""
    folders = [order.pretraining(row, 0) for row in order.rows] + [order.finetuning(*cell) for cell in cells(order)]
    path = next((path for folder in folders if (path := folder / "audit.json").exists()), None)
    if path is None:
        return None
    pairs = read_json(path)["duplicates"]
    splits = Counter(frozenset((scene.splits.get(a, ""), scene.splits.get(b, ""))) for a, b, _ in pairs)
    across = sum(num for both, num in splits.items() if both in ({"test", "train"}, {"test", "val"}))
    return {"pairs": len(pairs), "within_test": splits[frozenset({"test"})], "test_and_trained_on": across}


def _all_deviations(
    order: Order, scene: Scene, trainings: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> list[str]:
    paper = PAPERS[order.table]
    kept = [row for row in order.rows if row not in left_out]
    pretraining = {row: recipe for row in kept if (recipe := order.pretrain_recipe(row, 0)) is not None}
    finetuning: dict[str, Recipe] = {"all rows": order.finetune_recipe(order.fractions[0], 0)}
    found = [f"Pre-training, {text}" for text in deviations(paper, "pretrain", pretraining)]
    found += [f"Fine-tuning, {text}" for text in deviations(paper, "finetune", finetuning)]
    if trainings:
        epochs = ", ".join(f"{done['epochs']:g} for {done['row']}" for done in trainings if done["seed"] == 0)
        found.append(f"Pre-training, epochs done before the training ended: {epochs}.")
    stages = [order.finetuning(*cell) / "finetune" / "stage.json" for cell in cells(order, left_out)]
    if done := [read_json(path)["epochs"] for path in stages if path.exists()]:
        found.append(f"Fine-tuning, epochs done before the training ended: {min(done):g} to {max(done):g}.")
    found += [*_data_deviations(order, scene, paper, trainings), *_seeds(order, paper)]
    return [*found, *([paper.remark] if paper.remark else [])]


def _data_deviations(order: Order, scene: Scene, paper: Paper, trainings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if trainings:
        used = ", ".join(f"{done['num_images']} for {done['row']}" for done in trainings if done["seed"] == 0)
        folders = ", ".join(path.resolve().name for path in (order.data, *order.unlabelled))
        yield f"Pre-training data: the paper has {paper.data['pretrain']}, here images of {folders}: {used}."
    num = Counter(scene.splits.values())
    yield (
        f"Fine-tuning data: the paper has {paper.data['finetune']}, here {num['train']} / {num['val']} / {num['test']} "
        f"images of {order.data.resolve().name}."
    )
    if scene.unseen:
        facts = scene.unseen
        yield (
            f"Unseen data: the paper has {paper.data.get('unseen', 'none')}, here {facts['num_cases']} of the "
            f"{facts['num_masked']} images with a mask of {facts['name']}, {facts['num_trained_on']} left out as they "
            f"are among the data's own masked images; {facts['num_in_body']} of those scored took part in the "
            "pre-training, without their masks."
        )


def _seeds(order: Order, paper: Paper) -> Iterator[str]:
    again = ", whose chance is in no interval" if order.grid.pretrain_seeds == 1 else ""
    yield (
        f"Seeds: the paper's are {paper.seeds}; here {order.grid.seeds} of fine-tuning a cell, which draw the masks "
        f"anew, and {order.grid.pretrain_seeds} of pre-training a row{again}."
    )


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table as a page of Markdown."""
    lines = [f"# {table['title']}", "", f"Measured with the budget `{table['budget']}`."]
    for name in SETS:
        lines += _rows_text(table, name)
    if table["differences"]:
        lines += _differences_text(table["differences"])
    lines += _pretraining_text(table)
    for title, texts in (("Differences from the paper's setting", "deviations"), ("How to read this", "statements")):
        lines += ["", f"## {title}", "", *(f"- {text}" for text in table[texts])]
    return "\n".join(lines) + "\n"


def _rows_text(table: Mapping[str, Any], name: str) -> list[str]:
    rows = [row for row in table["rows"] if row["set"] == name]
    if not rows and (name != "test" or not table["not_run"]):
        return []
    title = "Test images" if name == "test" else f"Unseen data: {table['unseen'].get('name', 'unseen')}"
    lines = ["", f"## {title}" + (f" ({rows[0]['num_cases']})" if rows else ""), ""]
    lines.append(f"| {' | '.join(COLUMNS)} |")
    lines.append("|" + "---|" * len(COLUMNS))
    for row in rows:
        theirs = row["paper"] or {}
        cells_ = [
            row["row"], _percent(row["fraction"]), len(row["seeds"]), _figure(row["dice"]), _mean(row["dice_256"]),
            theirs.get("dice", ""), _figure(row["iou"]), _mean(row["iou_256"]), theirs.get("iou", ""),
            f"{row['hd95_256']['mean']:.1f}", theirs.get("hd95", ""), f"{row['missed']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells_))} |")
    if name == "test":
        lines += [f"| {row} | not run: {reason} |" + " |" * 10 for row, reason in table["not_run"].items()]
    return lines


def _differences_text(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "## Paired differences of Dice, points", "", "| set | row | against | masks | difference (95 %) | p |"]
    lines.append("|---|---|---|---|---|---|")
    for found in differences:
        between = "" if found["low"] is None else f" ({100 * found['low']:+.2f} to {100 * found['high']:+.2f})"
        lines.append(
            f"| {found['set']} | {found['row']} | {found['against']} | {_percent(found['fraction'])} | "
            f"{100 * found['difference']:+.2f}{between} | {found['p_value']:.2g} |"
        )
    return lines


def _pretraining_text(table: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if table["pretraining"]:
        lines += ["", "## Pre-training", "", "| row | seed | images | batch | lr | epochs | steps | seconds | device |"]
        lines.append("|" + "---|" * 9)
        lines += [
            f"| {done['row']} | {done['seed']} | {done['num_images']} | {done['batch_size']} | {done['lr']:.3g} | "
            f"{done['epochs']:g} | {done['steps']} | {done['seconds']:.0f} | {done['device']}, {done['precision']} |"
            for done in table["pretraining"]
        ]
    if (out := table["excluded"]) is not None:
        lines += [
            "",
            f"Kept out of pre-training: {out['test']} test images, {out['near_duplicates']} copies of one, "
            f"{out['same_group']} of the same patient or lesion.",
        ]
    if (pairs := table["duplicates"]) is not None:
        lines += [
            "",
            f"Copies among all images: {pairs['pairs']} pairs, {pairs['within_test']} of them within the test images, "
            f"{pairs['test_and_trained_on']} of a test image and one with a mask in another split (left as published).",
        ]
    return lines


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _mean(figure: Mapping[str, Any]) -> str:
    return f"{100 * figure['mean']:.2f}"


def _figure(figure: Mapping[str, Any]) -> str:
    between = "" if figure["low"] is None else f" ({100 * figure['low']:.2f} to {100 * figure['high']:.2f})"
    return f"{_mean(figure)}{between}"


def write_markdown(path: Path, table: Mapping[str, Any]) -> None:
    """Write the page in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(markdown(table), encoding="utf-8")
    temporary.replace(path)
