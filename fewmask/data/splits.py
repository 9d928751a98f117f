"""Who is trained on, who chooses the model, who judges it: splits by patient, and nested subsets of labels."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fewmask.types import SPLITS, Case, Split, UserError

Part = TypeVar("Part", Split, int)  # what blocks are dealt to: a split, or the number of a fold


class TooFewMasksError(UserError):
    """There are fewer than two separate patients or lesions with a mask to draw splits from."""


def assign_splits(
    cases: Sequence[Case],
    *,
    seed: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    linked: Iterable[tuple[str, str]] = (),
) -> list[Case]:
    """Return the cases in their order, every labelled one in a split; unlabelled ones keep what they have.

    No group straddles two splits; `linked` pairs of names (near-duplicates) join their groups. Given splits are kept:
    a labelled case without one follows its group, else it is for training, and only a split that nobody gave is drawn
    (val_fraction, test_fraction) out of train and undecided cases. Labels are spread evenly (those too rare for it
    count as one). Depends on the seed and the set of cases, not on their order. With two groups there is no test split.
    Raises UserError with fewer than two groups to draw from, and where the given splits tear a group apart.
    """
    _check_fractions(val_fraction, test_fraction)
    labelled = [case for case in cases if case.mask is not None]
    if not labelled:
        raise UserError("The data hold no masks: draw at least two, for training and validation.")
    roots = _join_groups(cases, linked)
    _refuse_torn_groups(labelled)
    decided = _given(labelled, roots)
    fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
    missing = {split: share for split, share in fractions.items() if split not in decided.values()}
    drawn: dict[str, Split] = {}
    if missing:
        closed = {root for root, split in decided.items() if split != "train"}
        drawn = _draw(_blocks(labelled, roots, closed), missing, seed)
    split_of = {case.name: _choose(case, roots[case.name], decided, drawn) for case in labelled}
    return [case.in_split(split_of[case.name]) if case.mask is not None else case for case in cases]


def follow_given(cases: Sequence[Case], linked: Iterable[tuple[str, str]] = ()) -> list[Case]:
    """Return the cases in their order, the splits given and nothing drawn: for data with too few masks to draw from.

    A labelled case without a split follows its group, `linked` ones too, and loses its mask where that has none.
    """
    roots = _join_groups(cases, linked)
    decided = _given([case for case in cases if case.mask is not None], roots)

    def follow(case: Case) -> Case:
        if case.mask is None or case.split is not None:
            return case
        split = decided.get(roots[case.name])
        return replace(case, mask=None) if split is None else case.in_split(split)

    return [follow(case) for case in cases]


def assign_folds(
    cases: Sequence[Case], num_folds: int, seed: int = 0, linked: Iterable[tuple[str, str]] = ()
) -> dict[str, int]:
    """Return {name: fold, 0 <= fold < num_folds} of every labelled case, each fold with as much as any other.

    No group lies in two folds; `linked` pairs of names join their groups. Numbers of cases and, after them, of each
    label are spread evenly. Depends on the seed and the set of cases, not on their order. Raises UserError for fewer
    than two folds, or fewer groups with a mask than folds.
    """
    labelled = [case for case in cases if case.mask is not None]
    roots = _join_groups(cases, linked)
    blocks = _blocks(labelled, roots, set())
    if not 2 <= num_folds <= len(blocks):
        raise UserError(
            f"data.num_folds is {num_folds}, and the masks are of {len(blocks)} separate patients: give at least 2 and "
            "at most as many."
        )
    dealt = _deal(blocks, dict.fromkeys(range(num_folds), 1 / num_folds), seed)
    return {case.name: dealt[roots[case.name]] for case in labelled}


def hold_out_fold(
    cases: Sequence[Case], num_folds: int, fold: int, seed: int = 0, linked: Iterable[tuple[str, str]] = ()
) -> list[Case]:
    """Return the cases in their order, the labelled ones of a fold in the test split; see `assign_folds`.

    Raises UserError for a fold that there is not, and where the cases have a split already.
    """
    if not 0 <= fold < num_folds:
        raise UserError(f"data.fold is {fold}, and there are {num_folds} folds: give a number from 0 to one below.")
    given = next((case for case in cases if case.mask is not None and case.split is not None), None)
    if given is not None:
        raise UserError(
            f"The manifest puts '{given.name}' in {given.split}, and folds would too: leave data.num_folds out, or "
            "empty the manifest's column 'split'."
        )
    fold_of = assign_folds(cases, num_folds, seed, linked)
    return [case.in_split("test") if fold_of.get(case.name) == fold else case for case in cases]


def label_subset(cases: Sequence[Case], fraction: float, seed: int) -> list[Case]:
    """Return a share of the labelled cases, in their order: at least one, labels in proportion, and nested.

    One seeded ordering of all labelled cases is cut after round(fraction * number), so a seed's 1 % lies within its
    10 %. A case counts, not a group, as the papers' label fractions do. Raises UserError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.label_fraction is {fraction:g}: give a number above 0 and at most 1.")
    rng = random.Random(seed)
    strata: dict[str, list[str]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.name):
        if case.mask is not None:
            strata[case.label or ""].append(case.name)
    ranked = []
    for label in sorted(strata):
        names = strata[label]
        rng.shuffle(names)
        # The k-th of n stands at (k + 1/2) / n, so every prefix holds each label in proportion.
        ranked += [((k + 0.5) / len(names), rng.random(), name) for k, name in enumerate(names)]
    kept = {name for _, _, name in sorted(ranked)[: max(1, round(fraction * len(ranked)))]}
    return [case for case in cases if case.name in kept]


@dataclass(slots=True)
class _Block:
    """Groups that must stay together: how many labelled cases, and of which labels."""

    root: str
    size: int = 0
    labels: Counter[str] = field(default_factory=Counter)


def _check_fractions(val: float, test: float) -> None:
    if not (0 < val < 1 and 0 < test < 1 and val + test < 1):
        raise UserError(f"The shares of val ({val:g}) and test ({test:g}) must be above 0 and sum to less than 1.")


def _join_groups(cases: Sequence[Case], linked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {name: the name that stands for its block}, by union-find.

    It is the first by alphabet, of those with a mask where there are any: an image without one moves no other block.
    """
    parent = {case.name: case.name for case in cases}
    rank = {case.name: (case.mask is None, case.name) for case in cases}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    pairs = [(first.setdefault(case.group or case.name, case.name), case.name) for case in cases]
    for a, b in [*pairs, *linked]:
        if a in parent and b in parent:
            low, high = sorted((find(a), find(b)), key=rank.__getitem__)
            parent[high] = low
    return {name: find(name) for name in parent}


def _refuse_torn_groups(labelled: Sequence[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in labelled:
        if case.split is None:
            continue
        other = seen.setdefault(case.group or case.name, case)
        if other.split != case.split:
            raise UserError(
                f"Group '{case.group}' is in {other.split} ('{other.name}') and in {case.split} ('{case.name}'): "
                "give all its images one split in the manifest."
            )


def _given(labelled: Sequence[Case], roots: dict[str, str]) -> dict[str, Split]:
    """Return {block: split} as given; a block linked across splits counts as the one furthest from training."""
    decided: dict[str, Split] = {}
    for case in labelled:
        if case.split is not None:
            known = decided.get(roots[case.name], case.split)
            decided[roots[case.name]] = max(known, case.split, key=SPLITS.index)
    return decided


def _choose(case: Case, root: str, decided: dict[str, Split], drawn: dict[str, Split]) -> Split:
    """Return a case's split: as given, but that a missing split may take from train; else as its block's."""
    if case.split in ("val", "test"):
        return case.split
    return drawn.get(root) or (case.split or decided.get(root, "train"))


def _blocks(labelled: Sequence[Case], roots: dict[str, str], closed: set[str]) -> list[_Block]:
    blocks: dict[str, _Block] = {}
    for case in labelled:
        root = roots[case.name]
        if root not in closed:
            block = blocks.setdefault(root, _Block(root))
            block.size += 1
            block.labels[case.label or ""] += 1
    return sorted(blocks.values(), key=lambda block: block.root)


def _draw(blocks: list[_Block], shares: dict[Split, float], seed: int) -> dict[str, Split]:
    """Return {block: split} for the missing splits, the rest in train, by filling the greatest need first.

    The need is the distance to the target, summed over the block's labels and its size, each as a share of the whole
    (greedy, in the manner of Sechidis et al. 2011, iterative stratification).
    """
    if len(blocks) < 2:
        num_masks = sum(block.size for block in blocks)
        if num_masks > 1:
            raise TooFewMasksError(
                f"All {num_masks} masks to draw splits from count as one: they are of one patient, or of near-copies "
                "of one picture (audit.json lists them); draw at least two that are independent."
            )
        held = "mask" if len(blocks) == 1 else "masks"
        raise TooFewMasksError(
            f"There are {len(blocks)} {held} of separate patients to train on and validate with: draw at least two."
        )
    names: list[Split] = ["train", *shares]
    if len(blocks) < len(names):  # two blocks, both val and test missing
        names = ["train", "val"]
    weights = {name: shares.get(name, 1 - sum(shares[other] for other in names[1:])) for name in names}
    return _deal(blocks, weights, seed)


def _deal(blocks: list[_Block], weights: Mapping[Part, float], seed: int) -> dict[str, Part]:
    """Return {block: part}, every part with its share of the cases and of each label, none empty; see `_draw`."""
    names, smallest = list(weights), min(weights.values())
    blocks = _order(_pool_rare(blocks, smallest), smallest, seed)
    totals = sum((block.labels for block in blocks), Counter[str]())
    need = {name: Counter({label: weights[name] * n for label, n in totals.items()}) for name in names}
    room = {name: weights[name] * totals.total() for name in names}
    drawn: dict[str, Part] = {}
    for block in blocks:
        best = max(names, key=lambda name: _gain(block, need[name], room[name], totals))
        drawn[block.root] = best
        need[best].subtract(block.labels)
        room[best] -= block.size
    return _fill_empty(blocks, drawn, names)


def _gain(block: _Block, need: Counter[str], room: float, totals: Counter[str]) -> float:
    by_label = sum(n * need[label] / totals[label] for label, n in block.labels.items())
    return by_label + block.size * room / totals.total()


def _pool_rare(blocks: list[_Block], smallest: float) -> list[_Block]:
    """Count labels with less than one case for the smallest split as one label: alone they would all go to train."""
    totals = sum((block.labels for block in blocks), Counter[str]())
    rare = {label for label, n in totals.items() if n * smallest < 1}
    pooled = []
    for block in blocks:
        labels: Counter[str] = Counter()
        for label, n in block.labels.items():
            labels["\0rare" if label in rare else label] += n
        pooled.append(_Block(block.root, block.size, labels))
    return pooled


def _order(blocks: list[_Block], smallest: float, seed: int) -> list[_Block]:
    """Shuffle by the seed, but place first the blocks that would overshoot a small split."""
    blocks = list(blocks)
    random.Random(seed).shuffle(blocks)
    bulky = smallest * sum(block.size for block in blocks) / 2
    return sorted(blocks, key=lambda block: -block.size if block.size > max(1, bulky) else 0)


def _fill_empty(blocks: list[_Block], drawn: dict[str, Part], names: list[Part]) -> dict[str, Part]:
    """Give each empty part the smallest block of the part with most blocks."""
    for name in names:
        if name not in drawn.values():
            donor = Counter(drawn.values()).most_common(1)[0][0]
            moved = min((block for block in blocks if drawn[block.root] == donor), key=lambda block: block.size)
            drawn[moved.root] = name
    return drawn
