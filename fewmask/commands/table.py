"""A paper's table from the runs of its grid: figures with intervals, differences, and what differs from the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fewmask.commands.cost import known_costs
from fewmask.commands.grid import PLAIN, TEACHER, Order, cells
from fewmask.commands.jobs import scored, stage_facts
from fewmask.commands.page import SETS
from fewmask.commands.papers import PAPERS, Paper, deviations
from fewmask.commands.provenance import num_masks
from fewmask.commands.remarks import remarks
from fewmask.commands.select import SELECTION
from fewmask.commands.tables import MultiTask, Student, Teacher
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
# Beside the means over all images, where some have no lesion: a model that predicts nothing is right on those.
APART: dict[str, Callable[[Row], float]] = {
    "dice_positives": lambda row: np.nan if row["empty_truth"] else float(row["dice"]),
    "detection_sensitivity": lambda row: np.nan if row["empty_truth"] else float(not row["empty_prediction"]),
    "detection_specificity": lambda row: float(row["empty_prediction"]) if row["empty_truth"] else np.nan,
}


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
    found = {name: _results(order, name, left_out) for name in SETS}
    masks = {cell: _masks(order, *cell, by_seed) for cell, by_seed in found["test"].items()}
    for name, results in found.items():
        for (row, fraction), by_seed in results.items():
            theirs = paper.figures.get(name, {}).get(row, {}).get(fraction)
            cell = describe_cell(by_seed, order.what.columns, _is_pooled(order, name))
            about = {"set": name, "row": row, "fraction": fraction, "num_masks": masks.get((row, fraction), [])}
            rows.append({**about, **cell, "paper": theirs})
        differences += [{"set": name, **pair} for pair in _differences(order, results, _is_pooled(order, name))]
    trainings, distillations = _trainings(order, left_out), _distillations(order, left_out)
    learnt = [*trainings, *distillations]
    return {
        "table": order.table, "title": paper.title, "budget": order.budget, "published": bool(paper.figures),
        "columns": list(order.what.columns), "control": order.what.control, "rows": rows, "differences": differences,
        "not_run": dict(left_out),
        "costs": known_costs(order.out), "losses": _losses(order), "pretraining": trainings,
        "distillation": distillations, "networks": _networks(order), "unseen": dict(scene.unseen),
        "excluded": learnt[0]["excluded"] if learnt else None, "duplicates": _duplicates(order, scene),
        "deviations": _all_deviations(order, scene, trainings, left_out),
        "statements": remarks(order, rows),
    }  # fmt: skip


def _masks(order: Order, row: str, fraction: float, seeds: Iterable[int]) -> list[int]:
    """Return how many masks the trainings of a cell had, each number once; none of what a given teacher had."""
    if isinstance(order.what.rows[row], Teacher) and order.grid.teachers:
        return []
    found = {num_masks(order.folder(row, fraction, seed)) for seed in seeds}
    return sorted(number for number in found if number is not None)


def _is_pooled(order: Order, name: str) -> bool:
    """Return whether each seed scored other images of a data set: those of its fold."""
    return name == "test" and order.grid.folds > 0


def describe_cell(by_seed: BySeed, columns: Sequence[str] = (), pooled: bool = False) -> dict[str, Any]:
    """Return the figures of one cell from its rows per seed, ready for JSON; `columns` are metrics beside the usual.

    Each metric has "mean", "low" and "high" (None with one patient) and "per_seed". The interval is that of the mean
    over cases and seeds when groups and seeds are drawn with replacement. "missed" is a mean over the seeds. If
    `pooled`, the seeds have other cases each, which count as those of one model. Where some truths are empty, "empty"
    is their number, "dice_positives" is over the other cases, and "detection_sensitivity" and "detection_specificity"
    are the shares of lesions with a predicted pixel and of empty truths without one.
    """
    tables = [_pool(by_seed, list(by_seed))] if pooled else _aligned(list(by_seed.values()))
    groups, num_empty = group_indices(tables[0]), sum(bool(row.get("empty_truth")) for row in tables[0])
    values: dict[str, Callable[[Row], float]] = {metric: itemgetter(metric) for metric in (*SHOWN, *columns)}
    if 0 < num_empty < len(tables[0]):
        values |= APART
    figures = _figures(tables, groups, values)
    if pooled:
        for metric, value in values.items():
            figures[metric]["per_seed"] = [_mean([value(row) for row in rows]) for rows in by_seed.values()]
    missed = float(np.mean([sum(bool(row["missed"]) for row in rows) for rows in tables]))
    sizes = {"num_cases": len(tables[0]), "num_groups": int(groups.max()) + 1, "empty": num_empty}
    return {"seeds": list(by_seed), **sizes, "missed": missed, **figures}


def _figures(
    tables: Sequence[Sequence[Row]], groups: Any, metrics: Mapping[str, Callable[[Row], float]]
) -> dict[str, Any]:
    """Return each metric's mean over cases and seeds with its interval; all metrics share the drawn replicates."""
    of_each = [np.array([[value(row) for row in rows] for rows in tables], dtype=float).T for value in metrics.values()]
    rng, num_seeds = np.random.default_rng(0), len(tables)
    replicates = bootstrap_means(np.concatenate(of_each, axis=1), groups, NUM_BOOTSTRAP, rng)
    drawn = rng.integers(0, num_seeds, (NUM_BOOTSTRAP, num_seeds))
    figures = {}
    for number, (metric, values) in enumerate(zip(metrics, of_each, strict=True)):
        low, high = None, None
        if groups.max() > 0:
            own = replicates[:, number * num_seeds : (number + 1) * num_seeds]
            low, high = interval(np.take_along_axis(own, drawn, axis=1).mean(axis=1))
        means = np.nanmean(values, axis=0)
        figures[metric] = {"mean": float(means.mean()), "low": low, "high": high, "per_seed": means.tolist()}
    return figures


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of the values that are defined, None where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _pool(by_seed: BySeed, seeds: Sequence[int]) -> list[Row]:
    """Return the rows of all folds, by name."""
    return sorted((row for seed in seeds for row in by_seed[seed]), key=lambda row: row["name"])


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


def _differences(order: Order, results: Mapping[tuple[str, float], BySeed], pooled: bool) -> Iterator[dict[str, Any]]:
    join = _pool if pooled else average_seeds
    for (row, fraction), by_seed in results.items():
        for reference in _compared_with(order, row):
            against = results.get((reference, fraction), {})
            seeds = sorted(by_seed.keys() & against.keys())
            about = {"row": row, "against": reference, "fraction": fraction, "seeds": seeds}
            ours, theirs = join(by_seed, seeds), join(against, seeds)
            for metric in order.what.compared if seeds else ():
                yield {**about, **compare(ours, theirs, metric)}
            lesions, same = (_with_lesion(side) for side in (ours, theirs))
            if 0 < len(lesions) < len(ours):
                yield {**about, **compare(lesions, same), "metric": "dice_positives"}


def _with_lesion(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row["empty_truth"]]


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


def _networks(order: Order) -> list[dict[str, Any]]:
    """Return every single network of a two-stage table that is finished: how it was chosen and how long it took."""
    found: list[dict[str, Any]] = []
    for fraction, seed in [(fraction, seed) for seed in range(order.grid.seeds) for fraction in order.fractions]:
        selected = order.selection(fraction, seed)
        path = selected / SELECTION
        chosen = set(read_json(path)["chosen"].values()) if path.exists() else set()
        for name, folder in _single_folders(order, fraction, seed):
            facts = [done for stage in ("pretrain", "finetune") if (done := stage_facts(folder, stage)) is not None]
            if facts and facts[-1]["stage"] == "finetune":
                seconds, validation = sum(done["seconds"] for done in facts), facts[-1]["best_score"]
                about = {"network": name, "fraction": fraction, "seed": seed, "chosen": folder.name in chosen}
                found.append({**about, "validation": validation, "seconds": seconds, "epochs": facts[-1]["epochs"]})
    return found


def _single_folders(order: Order, fraction: float, seed: int) -> list[tuple[str, Path]]:
    """Return the name and folder of each single network of a two-stage cell, done or not; of other tables none."""
    if not order.what.selects:
        return []
    rows = [PLAIN, *(name for name, row in order.rows.items() if isinstance(row, MultiTask))]
    found = [(row, order.folder(row, fraction, seed)) for row in rows]
    found += [(path.name, path) for path in sorted(order.selection(fraction, seed).glob("candidates/*"))]
    return found + [("another seed", path) for path in sorted(order.seeds_folder(fraction, seed).glob("*"))]


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
        by_row: dict[str, list[str]] = {}
        for facts in trainings:
            by_row.setdefault(facts["row"], []).append(f"{facts['epochs']:g}")
        told = "; ".join(f"{', '.join(epochs)} for {row}" for row, epochs in by_row.items())
        found.append(f"Pre-training, epochs done before the training ended: {told}.")
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
    folders |= {path for _, fraction, seed in places for _, path in _single_folders(order, fraction, seed)}
    return [facts["epochs"] for folder in folders if (facts := stage_facts(folder, stage)) is not None]


def _data_deviations(order: Order, scene: Scene, paper: Paper, trainings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if trainings:
        used = ", ".join(f"{done['num_images']} for {done['row']}" for done in trainings if done["seed"] == 0)
        folders = ", ".join(path.resolve().name for path in (order.data, *order.unlabelled))
        yield f"Pre-training data: the paper has {paper.data['pretrain']}, here images of {folders}: {used}."
    num = Counter(scene.splits.values())
    name = f"{order.data.resolve().name}{f' ({order.manifest})' if order.manifest else ''}"
    here = f"{num['train']} / {num['val'] or 'a share of these'} / {num['test']} images of {name}"
    if order.grid.folds:
        here = f"{len(scene.splits)} images of {name} in {order.grid.folds} folds by patient"
    yield f"Fine-tuning data: the paper has {paper.data['finetune']}, here {here}."
    if scene.unseen:
        facts = scene.unseen
        yield (
            f"Unseen data: the paper has {paper.data.get('unseen', 'none')}, here {facts['num_cases']} of the "
            f"{facts['num_masked']} images with a mask of {facts['name']}, {facts['num_trained_on']} left out as they "
            f"show one of the data's own masked images; {facts['num_in_body']} of those scored took part in the "
            f"{'distillation' if order.what.distils else 'pre-training'}, without their masks."
        )


def _seeds(order: Order, paper: Paper) -> Iterator[str]:
    if order.what.selects:
        each = "one for each fold" if order.grid.folds else f"{order.grid.seeds}, which draw the masks anew"
        yield f"Seeds: the paper's are {paper.seeds}; here {each}."
        return
    if order.what.distils:
        who = "a student" if order.grid.teachers else "a cell's teacher and of each of its students"
        yield f"Seeds: the paper's are {paper.seeds}; here {order.grid.seeds} of {who}, which draw the masks anew."
        return
    which = "no interval" if order.grid.pretrain_seeds == 1 else "the intervals of means, not in those of differences"
    yield (
        f"Seeds: the paper's are {paper.seeds}; here {order.grid.seeds} of fine-tuning a cell, which draw the masks "
        f"anew, and {order.grid.pretrain_seeds} of pre-training a row, whose chance is in {which}."
    )
