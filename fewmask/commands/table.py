"""A paper's table from the runs of its grid: figures with intervals, differences, and what differs from the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewmask.commands.cost import known_costs
from fewmask.commands.grid import TEACHER, Order, cells
from fewmask.commands.jobs import scored, stage_facts
from fewmask.commands.page import SETS
from fewmask.commands.papers import PAPERS, Paper, deviations
from fewmask.commands.tables import Student
from fewmask.config import Recipe
from fewmask.engine.run import read_json
from fewmask.evaluate.results import Row
from fewmask.evaluate.score import compare, read_case_csv
from fewmask.evaluate.statistics import METRICS, bootstrap_means, group_indices, interval, pair_rows

SHOWN = ("dice", "iou", "dice_256", "iou_256", "hd95_256")
NUM_BOOTSTRAP = 2000
STAGE_TITLES = {"pretrain": "Pre-training", "finetune": "Fine-tuning", "distill": "Distillation"}
FACTS = ("epochs", "steps", "seconds", "num_images", "batch_size", "device", "precision")
BySeed = dict[int, list[Row]]

STATEMENTS = (
    "Figures are means over images and seeds, at the masks' own size but for those marked 256 (at 256x256 pixels). "
    "HD95 counts a lesion without any predicted pixel as the image's diagonal.",
    "Intervals hold 95 % of 2,000 bootstrap replicates in which the seeds and the patients (or lesions; images where "
    "neither is known) are drawn with replacement.",
    "Differences are taken image by image, averaged over the seeds that both rows have; their intervals are "
    "bootstrapped over patients alone, and p-values come from random changes of sign by patient, not corrected for "
    "their number.",
    "The clock of a training starts after the data are decoded and the superpixels made, once for all runs.",
)


@dataclass(frozen=True)
class Scene:
    """What is known of the data before anything is trained, for the table to tell.

    `splits` gives each case's split by name, for the images with a mask; `unseen` facts of the unseen data set;
    `left_out` says why a row, or one at a share of the masks (`grid.cell_names`), is not run; `fingerprints` tell these
    data from others; `remarks` are sentences for the table.
    """

    splits: Mapping[str, str]
    unseen: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def measure(order: Order, scene: Scene, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return the table of what is finished so far, ready for JSON."""
    paper = PAPERS[order.table]
    rows, differences = [], []
    for name in SETS:
        results = _results(order, name, left_out)
        for (row, fraction), by_seed in results.items():
            theirs = paper.figures.get(name, {}).get(row, {}).get(fraction)
            cell = describe_cell(by_seed, order.what.columns)
            rows.append({"set": name, "row": row, "fraction": fraction, **cell, "paper": theirs})
        differences += [{"set": name, **found} for found in _differences(order, results)]
    trainings, distillations = _trainings(order, left_out), _distillations(order, left_out)
    learnt = [*trainings, *distillations]
    return {
        "table": order.table, "title": paper.title, "budget": order.budget, "published": bool(paper.figures),
        "columns": list(order.what.columns), "rows": rows, "differences": differences, "not_run": dict(left_out),
        "costs": known_costs(order.out), "losses": _losses(order), "pretraining": trainings,
        "distillation": distillations, "unseen": dict(scene.unseen),
        "excluded": learnt[0]["excluded"] if learnt else None, "duplicates": _duplicates(order, scene),
        "deviations": _all_deviations(order, scene, trainings, left_out), "statements": list(STATEMENTS),
    }  # fmt: skip


def describe_cell(by_seed: BySeed, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Return the figures of one cell from its rows per seed, ready for JSON; `columns` are metrics beside the usual.

    Each metric has "mean", "low" and "high" (None with one patient) and "per_seed". The interval is that of the mean
    over cases and seeds when groups and seeds are drawn with replacement. "missed" is a mean over the seeds.
    """
    tables = _aligned(list(by_seed.values()))
    groups, figures = group_indices(tables[0]), {}
    for metric in (*SHOWN, *columns):
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
        folder = order.folder(row, fraction, seed)
        if name in scored(folder):
            found[row, fraction][seed] = read_case_csv(folder / f"cases_{name}.csv")
    return {cell: by_seed for cell, by_seed in found.items() if by_seed}


def _differences(order: Order, results: Mapping[tuple[str, float], BySeed]) -> Iterator[dict[str, Any]]:
    for (row, fraction), by_seed in results.items():
        for reference in _compared_with(order, row):
            against = results.get((reference, fraction), {})
            seeds = sorted(by_seed.keys() & against.keys())
            for metric in order.what.compared if seeds else ():
                found = compare(average_seeds(by_seed, seeds), average_seeds(against, seeds), metric)
                yield {"row": row, "against": reference, "fraction": fraction, "seeds": seeds, **found}


def _compared_with(order: Order, row: str) -> list[str]:
    """Return the references of a row; of two references, only the first is compared with the other."""
    references = list(order.what.references)
    later = references[references.index(row) + 1 :] if row in references else references
    return list(dict.fromkeys([*later, *order.what.rows[row].against]))


def _trainings(order: Order, left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the finished pre-trainings did."""
    found = []
    for row in order.rows:
        for seed in range(order.grid.pretrain_seeds):
            facts = stage_facts(order.pretraining(row, seed), "pretrain")
            if row not in left_out and facts is not None:
                found.append({"row": row, "seed": seed, **_facts(facts)})
    return found


def _distillations(order: Order, left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the finished distillations did."""
    found = []
    for row, fraction, seed in cells(order, left_out):
        facts = stage_facts(order.folder(row, fraction, seed), "distill")
        if isinstance(order.rows[row], Student) and facts is not None:
            labelled = facts["num_labelled"]
            found.append({"row": row, "fraction": fraction, "seed": seed, "num_labelled": labelled, **_facts(facts)})
    return found


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: facts[key] for key in FACTS}
    return {"lr": facts["settings"]["lr"], **kept, "excluded": facts.get("excluded")}


def _losses(order: Order) -> dict[str, Any]:
    """Return the losses of every student beside the supervised one."""
    students = {name: row for name, row in order.rows.items() if isinstance(row, Student)}
    pseudo = {name: {"pseudo": {"weight": row.pseudo_weight}} for name, row in students.items() if row.pseudo_weight}
    return {name: {**row.losses, **pseudo.get(name, {})} for name, row in students.items()}


def _duplicates(order: Order, scene: Scene) -> dict[str, int] | None:
    """Return how many pairs of copies the audit found: in all, within test, and of a test and a trained-on image."""
    folders = [order.pretraining(row, 0) for row in order.rows] + [order.folder(*cell) for cell in cells(order)]
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
    paper, found = PAPERS[order.table], []
    for stage, recipes in _recipes(order, left_out).items():
        found += [f"{STAGE_TITLES[stage]}, {text}" for text in deviations(paper, stage, recipes)]
    if trainings:
        epochs = ", ".join(f"{done['epochs']:g} for {done['row']}" for done in trainings if done["seed"] == 0)
        found.append(f"Pre-training, epochs done before the training ended: {epochs}.")
    for stage in ("finetune", "distill"):
        if done := _epochs(order, stage, left_out):
            title = STAGE_TITLES[stage]
            found.append(f"{title}, epochs done before the training ended: {min(done):g} to {max(done):g}.")
    found += [*_data_deviations(order, scene, paper, trainings), *_seeds(order, paper), *scene.remarks]
    return [*found, *([paper.remark] if paper.remark else [])]


def _recipes(order: Order, left_out: Mapping[str, str]) -> dict[str, dict[str, Recipe]]:
    """Return the recipes of each stage by row, those of stages that the table does not go through left out."""
    kept, fraction = [row for row in order.rows if row not in left_out], order.fractions[0]
    pretraining = {row: recipe for row in kept if (recipe := order.pretrain_recipe(row, 0)) is not None}
    finetuning = {} if order.grid.teachers else {"all rows": order.finetune_recipe(fraction, 0)}
    students = [row for row in kept if isinstance(order.rows[row], Student)]
    distillation = {row: order.student_recipe(row, fraction, 0) for row in students}
    return {"pretrain": pretraining, "finetune": finetuning, "distill": distillation}


def _epochs(order: Order, stage: str, left_out: Mapping[str, str]) -> list[float]:
    places = list(cells(order, left_out))
    if order.what.distils:  # a teacher serves students where it has no row of its own
        places += [(TEACHER, fraction, seed) for _, fraction, seed in places]
    folders = {order.folder(*place) for place in places}
    return [facts["epochs"] for folder in folders if (facts := stage_facts(folder, stage)) is not None]


def _data_deviations(order: Order, scene: Scene, paper: Paper, trainings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if trainings:
        used = ", ".join(f"{done['num_images']} for {done['row']}" for done in trainings if done["seed"] == 0)
        folders = ", ".join(path.resolve().name for path in (order.data, *order.unlabelled))
        yield f"Pre-training data: the paper has {paper.data['pretrain']}, here images of {folders}: {used}."
    num = Counter(scene.splits.values())
    name = f"{order.data.resolve().name}{f' ({order.manifest})' if order.manifest else ''}"
    yield (
        f"Fine-tuning data: the paper has {paper.data['finetune']}, here {num['train']} / "
        f"{num['val'] or 'a share of these'} / {num['test']} images of {name}."
    )
    if scene.unseen:
        facts = scene.unseen
        yield (
            f"Unseen data: the paper has {paper.data.get('unseen', 'none')}, here {facts['num_cases']} of the "
            f"{facts['num_masked']} images with a mask of {facts['name']}, {facts['num_trained_on']} left out as they "
            f"are among the data's own masked images; {facts['num_in_body']} of those scored took part in the "
            f"{'distillation' if order.what.distils else 'pre-training'}, without their masks."
        )


def _seeds(order: Order, paper: Paper) -> Iterator[str]:
    if order.what.distils:
        who = "a student" if order.grid.teachers else "a cell's teacher and of each of its students"
        yield f"Seeds: the paper's are {paper.seeds}; here {order.grid.seeds} of {who}, which draw the masks anew."
        return
    again = ", whose chance is in no interval" if order.grid.pretrain_seeds == 1 else ""
    yield (
        f"Seeds: the paper's are {paper.seeds}; here {order.grid.seeds} of fine-tuning a cell, which draw the masks "
        f"anew, and {order.grid.pretrain_seeds} of pre-training a row{again}."
    )
