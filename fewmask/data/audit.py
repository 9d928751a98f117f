"""What is wrong with a data set, found in one pass over its files before an hour is spent on it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from fewmask.data.cache import num_cores
from fewmask.data.contents import content_hashes
from fewmask.data.hashing import near_duplicates
from fewmask.data.inspection import Facts, inspect
from fewmask.types import SPLITS, Case, UserError

Kind = Literal["byte", "near"]
Progress = Callable[[int, int], None]

MIN_SIDE = 32  # pixels; below it a segmenter's coarsest features have no extent
MAX_ASPECT = 4.0  # images are squashed to a square for training
FEW_MASKS = 20
SHOWN = 4  # files a message names
CLOSED_UP_TO = 200  # copies of one picture of which every two are listed as a pair
INVERTED_SHARE = 0.2  # of inverted masks, and three at least, from which on all are expected to be
_GUESSES = ("inverted", "inverted?", "alpha")  # what the reader did that deserves a look
_EXTENT = {"empty": "without any foreground", "full": "that are foreground all over"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: a stable `code`, the names of the cases it is about, and a sentence that says what to do."""

    code: str
    files: tuple[str, ...]
    message: str


@dataclass(slots=True)
class Audit:
    """What was found: `errors` must be mended, `warnings` deserve a look, `notes` say what was done to the data.

    `duplicates` lists (name, name, "byte" or "near") for every two of a set of copies, direct or through a third; of
    more than CLOSED_UP_TO copies, each with the first. `facts` holds what was measured of each readable image.
    """

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    duplicates: list[tuple[str, str, Kind]] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the audit, less `facts`, as what `json.dumps` takes."""
        lists = {key: [asdict(finding) for finding in getattr(self, key)] for key in ("errors", "warnings", "notes")}
        return {**lists, "counts": self.counts, "duplicates": [list(pair) for pair in self.duplicates]}


def audit(cases: Sequence[Case], workers: int | None = None, on_progress: Progress | None = None) -> Audit:
    """Examine every image and mask of a data set, each read once, and return what was found.

    `workers` threads decode (None: one a core; the decoders leave the interpreter free); `on_progress(done, total)`
    counts cases. Unlabelled cases are examined alike. Nothing is raised for what is wrong with a file: that is the
    answer.
    """
    started = time.perf_counter()
    result = Audit()
    facts = _inspect_all(cases, workers, on_progress)
    result.facts = {case.name: fact for case, fact in zip(cases, facts, strict=True) if fact.size is not None}
    _judge_files(result, cases, facts)
    _judge_masks(result, cases, facts)
    _judge_inversion(result, cases, facts)
    _judge_groups(result, cases)
    _find_duplicates(result, [case for case, fact in zip(cases, facts, strict=True) if fact.size], workers)
    _judge_duplicates(result, cases)
    _judge_number(result, cases)
    result.counts = {**_counts(cases, facts), "seconds": round(time.perf_counter() - started, 2)}
    return result


def overlaps(result: Audit, names_a: Iterable[str], names_b: Iterable[str]) -> list[tuple[str, str, Kind]]:
    """Return (a, b, kind), sorted, for every first name a that is a copy of a second name b, through others too."""
    roots = components((a, b) for a, b, _ in result.duplicates)
    in_b = defaultdict(list)
    for name in set(names_b):
        if name in roots:
            in_b[roots[name]].append(name)
    kinds: dict[frozenset[str], Kind] = {frozenset((a, b)): kind for a, b, kind in result.duplicates}
    return sorted(
        (a, b, kinds.get(frozenset((a, b)), "near"))
        for a in set(names_a) & roots.keys()
        for b in in_b[roots[a]]
        if a != b
    )


def _inspect_all(cases: Sequence[Case], workers: int | None, on_progress: Progress | None) -> list[Facts]:
    facts = []
    with ThreadPoolExecutor(workers or num_cores()) as pool:
        for number, fact in enumerate(pool.map(inspect, cases), 1):
            facts.append(fact)
            if on_progress is not None:
                on_progress(number, len(cases))
    return facts


def _judge_files(result: Audit, cases: Sequence[Case], facts: Sequence[Facts]) -> None:
    """Report what cannot be read or does not fit together, a finding for each file, and odd images, one for all."""
    tiny, long, constant = [], [], []
    for case, fact in zip(cases, facts, strict=True):
        result.errors += [Finding(code, (case.name,), message) for code, message in fact.errors]
        if fact.size is None:
            continue
        if min(fact.size) < MIN_SIDE:
            tiny.append(case)
        elif max(fact.size) > MAX_ASPECT * min(fact.size):
            long.append(case)
        if fact.constant:
            constant.append(case)
    _report(result.errors, "tiny-image", tiny, f"{{}} below {MIN_SIDE} pixels on a side ({{}}): remove or replace.")
    _report(result.warnings, "long-image", long, f"{{}} over {MAX_ASPECT:g} times as long as wide ({{}}): crop.")
    _report(result.warnings, "constant-image", constant, "{} of one colour only ({}): remove.")


def _judge_masks(result: Audit, cases: Sequence[Case], facts: Sequence[Facts]) -> None:
    """Report empty and full masks, and what the reader had to do to others, one finding a kind."""
    by_code: dict[str, list[Case]] = defaultdict(list)
    meanings: dict[str, str] = {}
    for case, fact in zip(cases, facts, strict=True):
        for remark in fact.remarks:
            code, _, meaning = remark.partition(": ")
            by_code[code].append(case)
            meanings.setdefault(code, meaning.lstrip("0123456789 "))
    for code, those in sorted(by_code.items()):
        if code in _EXTENT:
            text = f"{{}} {_EXTENT[code]} ({{}}): draw again where that is not what the image shows."
            _report(result.warnings, f"{code}-mask", those, text, "masks")
        else:
            where = result.warnings if code in _GUESSES else result.notes
            text = f"{{}} {'with ' if code.startswith('values') else ''}{code} ({{}}): {meanings[code]}."
            _report(where, f"mask-{code.split()[0].replace('?', '-perhaps')}", those, text, "masks")


def _judge_inversion(result: Audit, cases: Sequence[Case], facts: Sequence[Facts]) -> None:
    """Report masks that were left as they are among inverted ones, though most of them is foreground.

    The reader turns a mask only where its border proves the inversion; in an inverted folder a foreground that touches
    the edge or is tiny hides that proof, and some masks would be turned and some not.
    """
    codes = [{remark.partition(":")[0] for remark in fact.remarks} for fact in facts]
    num_masks = sum(fact.mask_fraction is not None for fact in facts)
    num_turned = sum("inverted" in those for those in codes)
    if num_turned < max(3, INVERTED_SHARE * num_masks):
        return
    left = [
        case
        for case, fact, those in zip(cases, facts, codes, strict=True)
        if "inverted" not in those and ("inverted?" in those or (fact.mask_fraction or 0) > 0.5)
    ]
    text = (
        f"{{}} probably inverted too ({{}}): {num_turned} others are, but these touch the edge or show next to "
        "nothing, so they were not turned round; invert the whole folder of masks."
    )
    _report(result.errors, "masks-inverted-in-part", left, text, "masks")


def _judge_groups(result: Audit, cases: Sequence[Case]) -> None:
    """Report patients or lesions in more than one split; pictures without a split do not count."""
    members: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.split is not None:
            members[case.group or case.name].append(case)
    for group, those in sorted(members.items()):
        splits = _splits_of(those)
        if len(splits) > 1:
            names = tuple(case.name for case in those)
            text = f"Group '{group}' is in {_and(splits)} ({_some(names)}): put all its pictures into one split."
            result.errors.append(Finding("group-straddles", names, text))


def _find_duplicates(result: Audit, cases: Sequence[Case], workers: int | None) -> None:
    """Fill `result.duplicates`: of byte-equal images one stands for all in the search for near ones."""
    try:
        hashes = content_hashes([Case(case.name, case.image) for case in cases])
    except UserError as error:  # a file that went away while we looked
        result.errors.append(Finding("unreadable-image", (), str(error)))
        return
    content = {case.name: hashes[case.image] for case in cases}
    first = {key: name for name, key in reversed(content.items())}
    unique = sorted(first.values())
    sketches = [result.facts[name].sketch for name in unique]
    near = near_duplicates([one for one in sketches if one is not None], workers)
    links = [(unique[i], unique[j]) for i, j in near]
    links += [(first[key], name) for name, key in content.items() if first[key] != name]
    copies: dict[str, list[str]] = defaultdict(list)
    for name, root in components(links).items():
        copies[root].append(name)
    for those in copies.values():
        those.sort()
        starts = range(len(those) if len(those) <= CLOSED_UP_TO else 1)
        for i in starts:
            for other in those[i + 1 :]:
                kind: Kind = "byte" if content[those[i]] == content[other] else "near"
                result.duplicates.append((those[i], other, kind))
    result.duplicates.sort()


def _judge_duplicates(result: Audit, cases: Sequence[Case]) -> None:
    """Say how many pictures are copies, and name those whose copies lie in different splits."""
    split = {case.name: case.split for case in cases}
    for kind, title in (("byte", "equal byte for byte"), ("near", "the same photograph or nearly so")):
        pairs = [(a, b) for a, b, k in result.duplicates if k == kind]
        torn = [(a, b) for a, b in pairs if split[a] and split[b] and split[a] != split[b]]
        if pairs:
            advice = "splits are drawn so that both go together"
            result.notes.append(_about_pairs(f"{kind}-duplicates", pairs, title, advice))
        if torn:
            advice = "they lie in different splits, which flatters the score; remove one of each pair"
            result.warnings.append(_about_pairs(f"{kind}-duplicates-straddle", torn, title, advice))


def _about_pairs(code: str, pairs: Sequence[tuple[str, str]], title: str, advice: str) -> Finding:
    count = f"{len(pairs)} pairs of pictures are" if len(pairs) > 1 else "1 pair of pictures is"
    names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
    shown = _some([f"{a} = {b}" for a, b in pairs])
    return Finding(code, names, f"{count} {title} ({shown}): {advice}.")


def _judge_number(result: Audit, cases: Sequence[Case]) -> None:
    """Report too few masks to train on, and a given split without any."""
    labelled = [case for case in cases if case.mask is not None]
    groups = {case.group or case.name for case in labelled}
    if not labelled:
        text = "No image has a mask: that is enough to pre-train, not to learn from masks."
        result.warnings.append(Finding("no-masks", (), text))
        return
    if len(groups) < 2:
        text = f"{_number(labelled, 'masks')} of one patient or lesion: training and validation need two of them."
        result.errors.append(Finding("too-few-masks", tuple(case.name for case in labelled), text))
    elif len(labelled) < FEW_MASKS:
        text = f"Only {len(labelled)} masks: the score of so few says little; draw {FEW_MASKS} or more if you can."
        result.warnings.append(Finding("few-masks", (), text))
    given = {case.split for case in cases if case.split is not None}
    for name in sorted(given - {case.split for case in labelled}):
        text = f"Split '{name}' holds no mask: nothing can be learnt or measured there."
        result.warnings.append(Finding("split-without-masks", (), text))


def _counts(cases: Sequence[Case], facts: Sequence[Facts]) -> dict[str, Any]:
    sizes = np.array([fact.size for fact in facts if fact.size is not None]).reshape(-1, 2)
    fractions = np.array([fact.mask_fraction for fact in facts if fact.mask_fraction is not None])
    num_masks = sum(case.mask is not None for case in cases)
    return {
        "num_images": len(cases),
        "num_masks": num_masks,
        "num_unlabelled": len(cases) - num_masks,
        "num_groups": len({case.group or case.name for case in cases}),
        "splits": _split_counts(cases),
        "labels": dict(sorted(Counter(case.label or "" for case in cases).items())),
        "height": _spread(sizes[:, 0]),
        "width": _spread(sizes[:, 1]),
        "num_sizes": len({tuple(size) for size in sizes.tolist()}),
        "num_empty_masks": int((fractions == 0).sum()),
        "mask_fraction": _quantiles(fractions),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Return {share: quantile}, empty where there are no values."""
    shares = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1) if values.size else ()
    return {f"{share:g}": round(float(np.quantile(values, share)), 4) for share in shares}


def _split_counts(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """Return {split, or "" for none: {num_images, num_masks, num_groups}} of the splits that occur."""
    counts: dict[str, dict[str, int]] = {}
    for split in (*SPLITS, None):
        those = [case for case in cases if case.split == split]
        if those:
            counts[split or ""] = {
                "num_images": len(those),
                "num_masks": sum(case.mask is not None for case in those),
                "num_groups": len({case.group or case.name for case in those}),
            }
    return counts


def _spread(values: np.ndarray) -> dict[str, int]:
    if not values.size:
        return {}
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def components(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {name: the least name that links lead to} of all names in the links."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {name: root(name) for name in list(parent)}


def _report(where: list[Finding], code: str, cases: Sequence[Case], text: str, noun: str = "images") -> None:
    """Append one finding about all the cases, if any; `text` has a place for their number and one for some files."""
    if cases:
        files = [f"'{case.mask if noun == 'masks' else case.image}'" for case in cases]
        names = tuple(case.name for case in cases)
        where.append(Finding(code, names, text.format(_number(cases, noun), _some(files))))


def _number(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun if len(things) != 1 else noun.removesuffix('s')}"


def _splits_of(cases: Iterable[Case]) -> list[str]:
    present = {case.split for case in cases}
    return [split for split in SPLITS if split in present]


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
